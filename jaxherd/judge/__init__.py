"""Judging of agents and their work."""
