"""Data: sources -> formats -> chat template -> tokens -> batches. docs/data.md tells it from the user's side."""
