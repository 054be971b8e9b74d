"""What is hidden, and what is not."""
