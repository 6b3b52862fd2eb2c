"""Models and tokenizers: load, adapt, score, export, describe."""
