"""PPO in twenty lines: roles from a run's folders, experience, updates, and what comes of it saved.

    .venv/bin/deepspeed --num_gpus 2 examples/ppo_from_python.py output/demo prompts.jsonl output/mine zero2

.venv/bin/python starts it on one process. docs/library.md: strategies, and how to go on from what was saved.
"""

import sys
from pathlib import Path

from training import PPO

run, prompts, output, strategy = Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]), sys.argv[4]
ppo = PPO(
    [prompts],
    strategy=strategy,
    actor_model_name_or_path=str(run / "step1"),
    critic_model_name_or_path=str(run / "step2"),
    per_device_generation_batch_size=8,
    per_device_training_batch_size=4,
    max_answer_seq_len=64,
    ppo_epochs=2,
    actor_learning_rate=5e-6,
    num_iterations=4,
)
for number in range(ppo.iterations):
    experience = ppo.make_experience(number)
    metrics = ppo.update(experience, number)
    print(f"{number}: reward {metrics['reward/score']:.3f}, KL {metrics['kl/per_sequence']:.3f}")
for role in ("actor", "critic"):
    ppo.save_model(role, output / role)
    ppo.save_optimizer(role, output / f"{role}_optimizer")
