"""A training step in parts: schedules, their simulation, microbatches, random numbers."""
