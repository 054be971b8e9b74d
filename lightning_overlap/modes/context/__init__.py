"""Context parallelism: its configuration. The mode itself is not in this version."""
