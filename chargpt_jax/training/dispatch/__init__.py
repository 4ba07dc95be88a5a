"""One dispatch of training steps: how many they are, and the text that they train on."""
