"""Text to token ids to batches: download, repair, tokenizer, the batch of a given step."""
