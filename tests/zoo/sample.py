"""What is run with the other tests: each layout, and each kind of model and of verdict."""

SAMPLE: list[tuple[str, str, str]] = [
    ("gpt", "plain", "pp_interleaved"),
]
