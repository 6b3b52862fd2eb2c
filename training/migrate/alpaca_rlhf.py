"""alpaca-rlhf (l294265421/alpaca-rlhf): DeepSpeed-Chat of May 2023 with its own names and constants."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from training.migrate import deepspeed_chat as chat, e2e
from training.migrate.deepspeed_chat import same
from training.migrate.program import Constant, Predecessor, Program, Translation
from training.utils.arguments import OtherFlag

LATER = ("--dtype", "--dropout", "--actor_dropout", "--critic_dropout", "--compute_fp32_loss", "--enable_tensorboard",
         "--tensorboard_path", "--add_eot_token", "--eot_token", "--print_loss", "--eval_interval", "--eval_iters",
         "--offload_reward_model", "--enable_mixed_precision_lora", "--align_overflow", "--print_answers",
         "--print_answers_interval", "--enable_test_mode", "--test_stop_step", "--lora_learning_rate",
         "--actor_lora_learning_rate", "--critic_lora_learning_rate")  # fmt: skip  # flags that came after it


def before(flags: dict[str, OtherFlag]) -> dict[str, OtherFlag]:
    """DeepSpeed-Chat's flags as they were then, with alpaca-rlhf's division of data."""
    return {name: other for name, other in flags.items() if name not in LATER} | same("data_split", str, "4,4,2")


STEP1 = before(chat.STEP1)
STEP2 = before(chat.STEP2)
STEP3 = {
    **before(chat.RLHF),
    **same("tokenizer_name_or_path", str),
    "--per_device_train_batch_size": OtherFlag(
        int, 16, "--per_device_generation_batch_size",
        "rollouts that are decoded together (in steps 1 and 2: rows of an optimizer step)", minimum=1,
    ),
    "--per_device_mini_train_batch_size": OtherFlag(int, 16, "--per_device_training_batch_size", minimum=1),
    "--generation_batch_numbers": OtherFlag(int, 1, "--generation_batches", minimum=1),
    **chat.DISABLE_DROPOUTS,
}  # fmt: skip

FP16 = {"--dtype": Constant("fp16", "fp16 is fixed there")}


def settle_step1(t: Translation) -> None:
    """Its own dialogues by name."""
    chat.settle_fine_tuning(t)
    if "MultiTurnAlpaca" in t.values.get("--sft_only_data_path", []):
        t.lines.append(
            "MultiTurnAlpaca is a folder with training_data.txt.train and .test: unzip data.zip to it, or give its path"
        )


def settle_step3(t: Translation) -> None:
    """Its names of the batch sizes."""
    chat.settle_rlhf(t)
    chat.settle_accumulation(
        t, "--per_device_train_batch_size", "--per_device_mini_train_batch_size", "--generation_batch_numbers"
    )


ALPACA_RLHF = Predecessor(
    "alpaca-rlhf",
    (
        Program("step 1, supervised fine-tuning", ("step1_supervised_finetuning/main.py",), "step1", STEP1, FP16,
                (chat.KEPT,), settle_step1),
        Program("step 2, the reward model", ("step2_reward_model_finetuning/main.py",), "step2", STEP2, FP16,
                (chat.LAST_TOKEN, chat.CUT), chat.settle_fine_tuning),
        Program(
            "step 3, RLHF",
            ("step3_rlhf_finetuning/main.py",),
            "step3",
            STEP3,
            {**FP16, **chat.PPO_CONSTANTS, "--kl_coef": Constant(0.02, "kl_ctl")},
            (chat.GREEDY, "rewards are normalised by step 2's reward_stats.json; there by two numbers in the code"),
            settle_step3,
        ),
        replace(e2e.PROGRAM, settle=partial(e2e.settle_e2e, source="alpaca-rlhf", split="4,4,2")),
        *chat.EVALUATIONS,
        Program("the chat page", ("llama_chatbot_gradio.py",), "page", chat.CHAT_SCRIPT,
                settle=chat.settle_template),
    ),
    ("alpaca_rlhf", "alpaca-rlhf"),
)  # fmt: skip
