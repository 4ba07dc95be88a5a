"""What a run leaves for people to read: samples, the scored validation set, facts, plots and the report."""
