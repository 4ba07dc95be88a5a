"""The training step, optimizers, the learning-rate range test, the training loop."""
