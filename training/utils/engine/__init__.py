"""DeepSpeed: its configuration, the precision, an engine for each role, models and rows that several ranks hold."""
