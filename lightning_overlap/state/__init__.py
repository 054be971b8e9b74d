"""Checkpoints: files, folders, and the parts of the state that ranks hold."""
