"""The command line: one file per command, flags and wiring only."""
