"""The Lightning strategy, and its seams to the Trainer."""
