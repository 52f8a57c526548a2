"""The command line: it builds a configuration, calls a stage, prints its record, and exits."""
