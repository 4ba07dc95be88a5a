"""The learning-rate range test: the search over zooms, the methods that choose a rate, whether the answer is clear."""
