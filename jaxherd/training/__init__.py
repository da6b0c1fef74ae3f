"""The jitted step and everything around it; knows no model."""
