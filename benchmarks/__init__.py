"""Measurements whose figures the documentation quotes; each is run from the repository's root."""
