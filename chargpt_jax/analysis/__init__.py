"""What a trained model does inside: attention, the predictions of each layer, the letters of words."""
