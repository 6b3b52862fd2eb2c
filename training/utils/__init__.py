"""What the three steps share: arguments, models, data, DeepSpeed engines, checkpoints, metrics."""
