"""Many trainings of one config at once: a grid of learning rates and seeds."""
