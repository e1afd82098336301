"""The command line: what a person runs. The daemon imports nothing of it."""
