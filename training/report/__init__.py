"""One page about a run: what ran, how it went, what the models say, what to try next. ``python -m training.report``."""
