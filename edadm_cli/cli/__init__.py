"""The command line: build a configuration, call a stage, print its record, exit. No arithmetic."""
