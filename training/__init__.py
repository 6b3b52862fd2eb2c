"""Three-step RLHF on DeepSpeed: supervised fine-tuning, reward model, PPO."""
