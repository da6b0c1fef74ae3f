"""Numerical kernels behind one call each; every one has an XLA reference that defines it."""
