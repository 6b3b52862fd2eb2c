"""Answers that share the forward of what they have in common: the rows, and which models can take them."""
