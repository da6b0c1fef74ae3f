"""Compile a run for a slice that is not here, and read what the compiler says."""
