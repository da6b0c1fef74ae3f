"""Mapping tables between published checkpoints and our modules."""
