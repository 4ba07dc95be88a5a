"""Import and export: the original's checkpoints, Hugging Face, safetensors."""
