"""Samplers: pure functions from (state, logits) to (state, logits), and chains of them."""
