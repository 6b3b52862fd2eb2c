"""DeepSpeed: its configuration, the precision, one engine for one trained role."""
