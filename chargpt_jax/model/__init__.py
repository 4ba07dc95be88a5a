"""Token ids to logits: the transformer, its initial parameters, its FLOP count."""
