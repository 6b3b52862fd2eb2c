"""Decoding: what is asked for and comes back, the two engines, sampling, attention and linear layers for one token."""
