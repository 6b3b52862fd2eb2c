"""Exact resume: what a checkpoint holds, where it stands, whether it is of the same run."""
