"""Lightning's side: the strategy, and what it touches of Trainer."""
