"""The command line: argument wiring only."""
