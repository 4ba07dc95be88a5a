"""The command line: flags, modes, signals, progress output."""
