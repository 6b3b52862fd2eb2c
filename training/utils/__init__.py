"""What all steps share: arguments, data, models, DeepSpeed engines, generation, memory, runs, checkpoints, metrics."""
