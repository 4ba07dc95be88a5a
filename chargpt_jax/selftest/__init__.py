"""The self-test: stop trainings, damage checkpoints, and check that no data is lost."""
