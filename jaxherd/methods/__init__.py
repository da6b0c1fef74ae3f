"""The papers' techniques, named by technique."""
