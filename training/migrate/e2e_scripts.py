"""What the scripts that DeepSpeed-Chat's e2e_rlhf.py starts give their steps, beside models, folders and data.

Facts of training/stepN_.../training_scripts/opt/DEPLOYMENT/run_SIZE.sh in microsoft/DeepSpeedExamples (February 2025);
flags that only change speed there are left out. A script that is not here is named for the user to translate.
"""

from __future__ import annotations

from collections.abc import Mapping

SINGLE, NODE, NODES = "single_gpu", "single_node", "multi_node"
FOUR_SETS = (
    "Dahoas/rm-static Dahoas/full-hh-rlhf Dahoas/synthetic-instruct-gptj-pairwise yitingxie/rlhf-reward-datasets"
)
ZERO_3 = "--actor_zero_stage 3 --critic_zero_stage 3 --actor_gradient_checkpointing"
PPO = "--num_warmup_steps 100 --critic_learning_rate 5e-6"


def _rows(count: int) -> str:
    return f"--per_device_train_batch_size {count} --per_device_eval_batch_size {count}"


def _responses(count: int) -> str:
    return f"--per_device_generation_batch_size {count} --per_device_training_batch_size {count}"


LARGE_SFT = f"--data_path {FOUR_SETS} --zero_stage 3 --gradient_checkpointing"
PAIRS = f"--data_path {FOUR_SETS} --learning_rate 5e-5 --weight_decay 0.1"
# (deployment, size of the step's model) -> flags, by step
SCRIPTS: Mapping[int, Mapping[tuple[str, str], str]] = {
    1: {
        (SINGLE, "1.3b"): "--gradient_accumulation_steps 8 --lora_dim 128",
        (NODE, "1.3b"): (
            f"--data_path {FOUR_SETS} {_rows(8)} --learning_rate 9.65e-6 --num_train_epochs 16 --zero_stage 2"
        ),
        (NODE, "6.7b"): f"{LARGE_SFT} {_rows(6)} --learning_rate 9.65e-6 --num_train_epochs 16",
        (NODE, "13b"): f"{LARGE_SFT} {_rows(4)} --learning_rate 1e-4 --num_train_epochs 16 --lora_dim 128",
        (NODES, "66b"): (
            f"{LARGE_SFT} {_rows(4)} --learning_rate 1e-4 --weight_decay 0.1 --num_train_epochs 2 --lora_dim 128"
        ),
    },
    2: {
        (SINGLE, "350m"): "--weight_decay 0.1 --gradient_accumulation_steps 4",
        (NODE, "350m"): f"{PAIRS} {_rows(4)}",
        (NODES, "350m"): f"{PAIRS} {_rows(2)}",
    },
    3: {
        (SINGLE, "1.3b"): "--gradient_accumulation_steps 2 --actor_lora_dim 128 --actor_gradient_checkpointing",
        (NODE, "1.3b"): (
            f"{PPO} {_responses(4)} --actor_learning_rate 9.65e-6 --actor_zero_stage 2 --critic_zero_stage 2 "
            "--enable_ema"
        ),
        (NODE, "6.7b"): (
            f"{PPO} {_responses(4)} {ZERO_3} --actor_learning_rate 9.65e-6 --actor_weight_decay 0.1 "
            "--critic_weight_decay 0.1"
        ),
        (NODE, "13b"): (f"{PPO} {_responses(16)} {ZERO_3} --actor_learning_rate 5e-4 --actor_lora_dim 128"),
        (NODES, "66b"): (
            f"{PPO} {_responses(4)} {ZERO_3} --actor_learning_rate 5e-4 --actor_lora_dim 128 "
            "--actor_weight_decay 0.1 --critic_weight_decay 0.1"
        ),
    },
}
