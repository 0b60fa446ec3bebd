"""Training runs as YAML, one file a run; this package only carries the files."""
