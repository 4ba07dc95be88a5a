"""Ahead-of-time compilation of a config's programs for accelerators that are not there, and what it shows."""
