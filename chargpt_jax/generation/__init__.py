"""A trained model: sampling, scoring, the metrics per character."""
