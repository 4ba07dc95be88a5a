"""Texts of any length, processed in pieces: a text in a temporary file, and the licences in it."""
