"""Arrays in files: what Orbax writes and reads, trees of arrays, the headers of NumPy files."""
