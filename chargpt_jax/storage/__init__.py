"""The run folder: checkpoints with checksums, the lock, atomic file writes."""
