"""open-chatgpt (jianzhnie/open-chatgpt, 2023 to 2025): scripts with flags of transformers' Trainer, and fixed ones."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

from training.migrate.program import (
    DROPOUT,
    Constant,
    Predecessor,
    Program,
    Translation,
    settle_clipping,
    settle_report,
)
from training.migrate.warm_up import settle_warm_up
from training.utils.arguments import SCHEDULES, OtherFlag

NONE_LEFT = "there is nothing to choose here"


def switch(said: str) -> OtherFlag:
    """A flag of the Trainer that is true or false, written with or without a value; ``said`` may be a flag here."""
    values = ("True", "False", "true", "false")
    return OtherFlag(str, said=said, many=True, choices=values, settled=said.startswith("--"))


# The flags of transformers' TrainingArguments that such commands have, with its defaults
TRAINER: dict[str, OtherFlag] = {
    "--model_name_or_path": OtherFlag(str, "facebook/opt-125m", "--model_name_or_path"),
    "--data_path": OtherFlag(str, ours="--data_path"),
    "--output_dir": OtherFlag(str, ours="--output_dir"),
    "--num_train_epochs": OtherFlag(int, 3, "--num_train_epochs", minimum=1),
    "--per_device_train_batch_size": OtherFlag(int, 8, "--per_device_train_batch_size", minimum=1),
    "--per_device_eval_batch_size": OtherFlag(int, 8, "--per_device_eval_batch_size", minimum=1),
    "--gradient_accumulation_steps": OtherFlag(int, 1, "--gradient_accumulation_steps", minimum=1),
    "--learning_rate": OtherFlag(float, 5e-5, "--learning_rate", minimum=0),
    "--weight_decay": OtherFlag(float, 0.0, "--weight_decay", minimum=0),
    "--lr_scheduler_type": OtherFlag(str, "linear", "--lr_scheduler_type", choices=SCHEDULES),
    "--warmup_steps": OtherFlag(int, ours="--num_warmup_steps", minimum=0),
    "--warmup_ratio": OtherFlag(float, 0.0, said="--num_warmup_steps, of the rows", minimum=0, maximum=1, settled=True),
    "--max_grad_norm": OtherFlag(float, 1.0, said="gradient_clipping of --deepspeed_config", minimum=0, settled=True),
    "--seed": OtherFlag(int, 42, "--seed", minimum=0),
    "--model_max_length": OtherFlag(int, 512, "--max_seq_len", minimum=8),
    "--max_steps": OtherFlag(int, -1, only=(-1,), said="give epochs, and --data_path NAME:N for N rows"),
    "--optim": OtherFlag(str, "adamw_torch", only=("adamw_torch", "adamw_hf", "adamw_torch_fused"), said="AdamW it is"),
    "--adam_beta1": OtherFlag(float, 0.9, only=(0.9,), said="it is 0.9"),
    "--adam_beta2": OtherFlag(float, 0.999, said="it is 0.95"),
    "--bf16": switch("--dtype"),
    "--fp16": switch("--dtype"),
    "--tf32": switch("how fp32 is multiplied is the machine's setting"),
    "--gradient_checkpointing": switch("--gradient_checkpointing"),
    "--save_strategy": OtherFlag(str, "steps", said="--save_every", choices=("no", "steps", "epoch"), settled=True),
    "--save_steps": OtherFlag(int, 500, "--save_every", "optimizer steps", minimum=1),
    "--save_total_limit": OtherFlag(int, ours="--keep_last", minimum=1),
    "--evaluation_strategy": OtherFlag(
        str, "no", said="--eval_interval", choices=("no", "steps", "epoch"), settled=True
    ),
    "--eval_strategy": OtherFlag(str, said="--eval_interval", choices=("no", "steps", "epoch"), settled=True),
    "--eval_steps": OtherFlag(int, ours="--eval_interval", minimum=1),
    "--load_best_model_at_end": switch("the best model on held-out rows is always kept"),
    "--logging_steps": OtherFlag(int, said="every step is logged"),
    "--logging_dir": OtherFlag(str, said="TensorBoard's files lie in the output folder"),
    "--report_to": OtherFlag(str, said="--report_to", choices=("tensorboard", "wandb", "none", "all"), settled=True),
    "--run_name": OtherFlag(str, said="a run is called as its output folder"),
    "--deepspeed": OtherFlag(str, said="--zero_stage and --offload", settled=True),
    "--fsdp": OtherFlag(str, said="--zero_stage and --offload", settled=True),
    "--fsdp_transformer_layer_cls_to_wrap": OtherFlag(str, said="ZeRO divides parameters one by one"),
    "--lazy_preprocess": switch("rows are tokenised once and kept in a cache"),
    "--cache_dir": OtherFlag(str, said="HF_HOME says where the hub's files go"),
    "--group_by_length": switch("rows of like length always go together"),
    "--dataloader_num_workers": OtherFlag(int, said="rows are tokenised beforehand"),
    "--ddp_find_unused_parameters": switch("there is no DDP here"),
    "--overwrite_output_dir": switch("--resume never"),
    "--do_train": switch(NONE_LEFT),
    "--do_eval": switch(NONE_LEFT),
}  # fmt: skip
LORA = TRAINER | {
    "--model_max_length": OtherFlag(int, 2048, "--max_seq_len", minimum=8),
    "--lora_r": OtherFlag(int, 8, "--lora_dim", minimum=1),
    "--lora_alpha": OtherFlag(int, 16, "--lora_alpha", minimum=1),
    "--lora_dropout": OtherFlag(float, 0.05, "--lora_dropout", minimum=0, maximum=0.9),
    "--lora_target_modules": OtherFlag(str, said="--lora_module_name", many=True, settled=True),
    "--lora_weight_path": OtherFlag(str, only=("",), said="a run here goes on by itself (--resume)"),
    "--bias": OtherFlag(str, "none", only=("none",), said="adapters have no biases"),
}
SLICES = "N rows of a source are --data_path NAME:N, its first ones"
PRETRAINING = TRAINER | {
    "--train_data_split": OtherFlag(str, said=SLICES, settled=True),
    "--eval_data_path": OtherFlag(str, ours="--eval_data_path"),
    "--eval_data_split": OtherFlag(str, said=SLICES, settled=True),
}


def true(t: Translation, name: str) -> bool:
    """Whether a switch of the Trainer is on."""
    return name in t.given and t.given[name][-1:] not in (["False"], ["false"])


def settle_zero(t: Translation) -> None:
    """FSDP, or the Trainer's own DeepSpeed file."""
    if sharded := (t.theirs("--fsdp") or "").split():
        stage = 2 if "shard_grad_op" in sharded else 3 if {"full_shard", "hybrid_shard"} & set(sharded) else 0
        t.set("--zero_stage", stage, f"--fsdp {' '.join(sharded)}")
        if "offload" in sharded:
            t.set("--offload", True, f"--fsdp {' '.join(sharded)}")
    path = t.theirs("--deepspeed")
    if not path:
        return
    try:
        zero = json.loads(Path(path).read_text(encoding="utf-8"))["zero_optimization"]
        t.set("--zero_stage", int(zero["stage"]), f"--deepspeed {path}")
        if (zero.get("offload_optimizer") or {}).get("device", "none") != "none" or zero.get("cpu_offload") is True:
            t.set("--offload", True, f"--deepspeed {path}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        if "--zero_stage" not in t.values:
            t.refused.append(f"--deepspeed {path} can not be read here ({type(error).__name__}): add --zero_stage N in "
                             "its place")  # fmt: skip


def settle_trainer(t: Translation) -> None:
    """What the Trainer's flags decide together."""
    settle_zero(t)
    kind = next((name for name in ("bf16", "fp16") if true(t, f"--{name}")), "fp32")
    if "--dtype" not in t.values:
        t.set("--dtype", kind, f"--{kind} True" if kind != "fp32" else "neither bf16 nor fp16")
    if true(t, "--overwrite_output_dir"):
        t.set("--resume", "never", "--overwrite_output_dir")
    if true(t, "--gradient_checkpointing"):
        t.set("--gradient_checkpointing", True, "--gradient_checkpointing True")
    settle_clipping(t, "--max_grad_norm")
    if t.theirs("--save_strategy") == "no":
        t.set("--save_every", 0, "--save_strategy no")
    elif t.theirs("--save_strategy") == "epoch":
        t.lines.append(f"--save_strategy epoch: checkpoints come every {t.values['--save_every'][0]} steps")
    if (t.theirs("--eval_strategy") or t.theirs("--evaluation_strategy")) != "steps":
        t.leave("--eval_interval", "evaluation is at the start and after each epoch")
    elif "--eval_steps" not in t.given:
        t.lines.append("evaluation is at the start and after each epoch; there every --logging_steps")
    if (where := t.theirs("--report_to")) not in (None, "all"):
        settle_report(t, where, f"--report_to {where}")
    t.need("--data_path")
    batch, share = t.theirs("--per_device_train_batch_size"), t.theirs("--warmup_ratio")
    if share and t.theirs("--warmup_steps") == 0:
        t.leave("--num_warmup_steps", "the Trainer takes --warmup_ratio where --warmup_steps is 0")
    settle_warm_up(t, share, batch, t.theirs("--gradient_accumulation_steps"), f"--warmup_ratio {share:g}", whole=False)


def settle_lora(t: Translation) -> None:
    """Adapters on the modules that are named."""
    settle_trainer(t)
    modules = t.theirs("--lora_target_modules") or ["q_proj", "v_proj"]
    t.set("--lora_module_name", ",".join(modules), "--lora_target_modules")
    t.set("--only_optimize_lora", True, "PEFT freezes the rest")


def settle_pretraining(t: Translation) -> None:
    """Slices of splits, as ``train[:N]`` of datasets."""
    settle_trainer(t)
    for flag, split in (("--data_path", "--train_data_split"), ("--eval_data_path", "--eval_data_split")):
        text = t.theirs(split)
        if text is None or flag not in t.values:
            continue
        found = re.fullmatch(r"\w+(?:\[:(\d+)\])?", text)
        if found is None:
            rows = re.fullmatch(r"\w+\[(\d+):(\d+)\]", text)
            nearest = f"; the nearest is {split} 'train[:{int(rows[2]) - int(rows[1])}]'" if rows else ""
            t.refused.append(f"{split} {text}: {SLICES}{nearest}")
        elif found[1]:
            t.set(flag, f"{t.values[flag][0]}:{found[1]}", f"{split} {text}")


def settle_needed(t: Translation, flag: str, why: str) -> None:
    """What its code makes itself, and no flag of ours can."""
    if flag not in t.values:
        t.refused.append(why)


def fixed(values: dict[str, object], said: str) -> dict[str, Constant]:
    """What a script without flags has in its code."""
    return {flag: Constant(value, said) for flag, value in values.items()}


KEPT = "a tenth of the prompts, or --eval_data_path, is held out, and the best model by it kept; there the last one"
BETA = "AdamW's second beta is 0.95; there 0.999"
INT8 = "frozen weights are in --dtype; there in 8 bits"
RANDOM_HEAD = "its reward model is opt-125m with a random head: add --critic_model_name_or_path, the output of a step 2"
CUT_PROMPTS = (
    'its prompts are the first 3 to 12 tokens of IMDB reviews: write them as rows {"prompt": "..."} and add '
    "--data_path FILE"
)
PROMPTS = "whole prompts are answered; there their first 5 to 20 characters"
PPO = {
    "--clip_reward": 0.0, "--normalize_reward": False, "--whiten_advantages": False, "--missing_eos_penalty": 0.0,
    "--clip_ratio": 0.2, "--gamma": 1.0, "--gae_lambda": 0.95,
}  # fmt: skip
FIXED_SFT = {
    "--model_name_or_path": "facebook/opt-125m", "--data_path": ["CarperAI/openai_summarize_tldr"],
    "--num_train_epochs": 5, "--per_device_train_batch_size": 8, "--per_device_eval_batch_size": 8,
    "--gradient_accumulation_steps": 4, "--learning_rate": 2e-5, "--weight_decay": 0.001, "--num_warmup_steps": 100,
    "--lr_scheduler_type": "linear", "--dtype": "fp16", "--gradient_checkpointing": True, "--save_every": 500,
    "--keep_last": 5, "--eval_interval": 5, "--seed": 42, "--max_seq_len": 512, "--train_on_prompts": True,
    "--output_dir": "fintune-summarize-checkpoint",
}  # fmt: skip
FIXED_RM = {
    "--model_name_or_path": "facebook/opt-125m", "--data_path": ["CarperAI/openai_summarize_comparisons"],
    "--num_train_epochs": 10, "--per_device_train_batch_size": 4, "--per_device_eval_batch_size": 16,
    "--gradient_accumulation_steps": 4, "--learning_rate": 1e-5, "--weight_decay": 0.0001, "--num_warmup_steps": 100,
    "--lr_scheduler_type": "linear", "--dtype": "fp32", "--save_every": 1000, "--keep_last": 5, "--eval_interval": 500,
    "--seed": 42, "--max_seq_len": 550, "--output_dir": "work_dirs/reward_model_checkpoint",
}  # fmt: skip
FIXED_RL = PPO | {
    "--actor_model_name_or_path": "facebook/opt-125m", "--data_path": ["CarperAI/openai_summarize_tldr"],
    "--actor_learning_rate": 1e-7, "--critic_learning_rate": 1e-7, "--lr_scheduler_type": ["constant"],
    "--kl_coef": 0.1, "--clip_value": 0.4, "--top_k": 50, "--max_prompt_seq_len": 512, "--dtype": "fp32",
}  # fmt: skip
FIXED_SENTIMENT = PPO | {
    "--actor_model_name_or_path": "lvwerra/gpt2-imdb", "--critic_model_name_or_path": "lvwerra/distilbert-imdb",
    "--actor_learning_rate": 1e-5, "--critic_learning_rate": 1e-5, "--lr_scheduler_type": ["constant"],
    "--kl_coef": 0.2, "--clip_value": 0.2, "--ppo_epochs": 4, "--per_device_generation_batch_size": 256,
    "--per_device_training_batch_size": 8, "--max_answer_seq_len": 16, "--dtype": "fp32",
}  # fmt: skip
RL_FLAGS = {
    "--prompt_path": OtherFlag(str, said="its code never reads it; --data_path does"),
    "--pretrain_dataset": OtherFlag(str, said="its code never reads it; --unsupervised_data_path does"),
    "--num_episodes": OtherFlag(int, 10, said="--num_iterations says when a run ends", minimum=1),
    "--max_timesteps": OtherFlag(int, 10, said="its code never reads it", minimum=1),
    "--update_timesteps": OtherFlag(int, 10, said="its code never reads it", minimum=1),
    "--max_epochs": OtherFlag(int, 5, "--ppo_epochs", minimum=1),
    "--train_batch_size": OtherFlag(int, 8, "--per_device_training_batch_size", minimum=1),
    "--experience_batch_size": OtherFlag(int, 8, "--per_device_generation_batch_size", minimum=1),
    "--buffer_limit": OtherFlag(int, 32, said="an iteration's responses are its buffer", minimum=0),
    "--ptx_batch_size": OtherFlag(int, 1, said="its code never reads it", minimum=1),
    "--kl_coef": OtherFlag(float, 0.1, said="its code never reads it, 0.1 it is", minimum=0),
    "--ptx_coef": OtherFlag(float, 0.9, said="its code never reads it", minimum=0),
}
OPEN_CHATGPT = Predecessor(
    "open-chatgpt",
    (
        Program("Alpaca", ("train_alpaca.py", "train_alpaca_mem.py"), "step1", TRAINER,
                fixed({"--chat_template": "alpaca"}, "its prompts"), (KEPT, DROPOUT, BETA), settle_trainer),
        Program("Alpaca with LoRA", ("train_alpaca_lora.py", "train_alpaca_lora_mem.py"), "step1", LORA,
                fixed({"--chat_template": "alpaca"}, "its prompts"), (KEPT, DROPOUT, BETA, INT8), settle_lora),
        Program("Vicuna", ("train/train_mem.py", "train_mem.py"), "step1", TRAINER,
                fixed({"--chat_template": "vicuna"}, "its prompts"), (KEPT, DROPOUT, BETA), settle_trainer),
        Program("pre-training", ("train/pt/train.py", "pt/train.py"), "step1", PRETRAINING,
                fixed({"--train_on_prompts": True}, "all tokens train"), (KEPT, DROPOUT, BETA), settle_pretraining),
        Program("TL;DR, supervised fine-tuning", ("train_fintune_summarize.py",), "step1", {},
                fixed(FIXED_SFT, "in its code"), (BETA, "the model of the lowest held-out loss is kept, as there")),
        Program("TL;DR, the reward model", ("train_reward_model.py",), "step2", {}, fixed(FIXED_RM, "in its code"),
                ("it runs through all epochs and keeps the last model; there it stops early",)),
        Program("TL;DR, PPO", ("train_ppo_rlhf.py",), "step3", RL_FLAGS, fixed(FIXED_RL, "in its code"),
                (BETA, PROMPTS), partial(settle_needed, flag="--critic_model_name_or_path", why=RANDOM_HEAD)),
        Program("positive sentiment, PPO", ("gpt2-sentiment.py",), "step3", {},
                fixed(FIXED_SENTIMENT, "of it, or TRL's default"),
                ("the KL coefficient stays as it is; there it follows a target of 6 nats",
                 "answers end at 16 tokens; there at a drawn length of 4 to 16"),
                partial(settle_needed, flag="--data_path", why=CUT_PROMPTS)),
    ),
    ("open-chatgpt",),
)  # fmt: skip
