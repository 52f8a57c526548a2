"""What `--dry-run` reports of each stage: time, memory and disk, from short probes. One module per stage."""
