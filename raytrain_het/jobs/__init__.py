"""What the command line runs: job files, the built-in jobs, and the live display."""
