"""ColossalChat (hpcaitech/ColossalAI, applications/ColossalChat, 2024 to 2026): flags and defaults of its scripts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

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
from training.utils.arguments import OtherFlag

# --plugin -> ZeRO stage, and whether optimizer states (at stage 3 parameters) are in CPU memory
PLUGINS = {
    "gemini": (3, False),
    "gemini_auto": (3, True),
    "zero2": (2, False),
    "zero2_cpu": (2, True),
    "ddp": (0, False),
}
PLUGIN_3D = "it counts with --plugin 3d, and alone there"
WIDTHS = {"--tp": "tensor", "--pp": "pipeline", "--sp": "sequence"}
OUR_WIDTHS = {"--tp": "--tensor_parallel", "--sp": "--sequence_parallel"}  # a program without the flag refuses it

# Programs of applications/Chat, its predecessor of 2023, and --strategy, which all of them took -> our step
OF_2023 = {
    **dict.fromkeys(("train_sft.py", "train_peft_sft.py"), "step1"),
    "train_reward_model.py": "step2",
    **dict.fromkeys(("train_prompts.py", "train_peft_prompts.py", "train_dummy.py"), "step3"),
}
STRATEGY = "--strategy"

LORA_FLAGS = "--lora_dim, --lora_alpha, --lora_module_name, --only_optimize_lora"

# What all of its training scripts take
COMMON: dict[str, OtherFlag] = {
    "--plugin": OtherFlag(
        str, "gemini", said="--zero_stage and --offload say it", choices=(*PLUGINS, "3d"), settled=True
    ),
    "--zero_stage": OtherFlag(int, 0, said=PLUGIN_3D, choices=(0, 1, 2), settled=True),
    "--zero_cpu_offload": OtherFlag(bool, said=PLUGIN_3D, settled=True),
    **{name: OtherFlag(int, 1, said=PLUGIN_3D, minimum=1, settled=True) for name in WIDTHS},
    "--sp_mode": OtherFlag(
        str,
        "split_gather",
        said="all_to_all alone has ranks beside --tp's",
        choices=("split_gather", "ring", "all_to_all"),
    ),
    "--enable_sequence_parallelism": OtherFlag(bool, said="of --sp"),
    "--grad_clip": OtherFlag(
        float, 1.0, said="gradient_clipping of --deepspeed_config, 1.0 without", minimum=0, settled=True
    ),
    "--pretrain": OtherFlag(str, ours="--model_name_or_path"),
    "--tokenizer_dir": OtherFlag(str, said="the tokenizer in the model's own folder is taken: it must be the same one"),
    "--mixed_precision": OtherFlag(str, "fp16", "--dtype", choices=("fp16", "bf16")),
    "--warmup_steps": OtherFlag(int, ours="--num_warmup_steps", minimum=0),
    "--accumulation_steps": OtherFlag(int, 8, "--gradient_accumulation_steps", minimum=1),
    "--save_interval": OtherFlag(int, 1000, "--save_every", minimum=1),
    "--checkpoint_path": OtherFlag(
        str, only=(), said="a run here goes on by itself (--resume); give a model's folder to --pretrain"
    ),
    "--config_file": OtherFlag(str, said="the output folder holds the configuration"),
    "--log_dir": OtherFlag(str, said="TensorBoard's files lie in the output folder"),
    "--use_wandb": OtherFlag(bool, said="--report_to wandb, if it is installed", settled=True),
    "--use_flash_attn": OtherFlag(bool, said="--attn_implementation flash_attention_2", settled=True),
    "--lora_config": OtherFlag(str, said=LORA_FLAGS, settled=True),
    "--lora_rank": OtherFlag(int, 0, said=LORA_FLAGS, minimum=0, settled=True),  # of 2023 and 2024
    "--merge_lora_weights": OtherFlag(bool, said="a model is saved whole, its adapter beside it"),
}

# Those that go over a data set: SFT, the reward model, DPO and its kin
OVER_DATA = COMMON | {
    "--dataset": OtherFlag(str, ours="--data_path", many=True),
    "--eval_dataset": OtherFlag(str, ours="--eval_data_path", many=True),
    "--weight_decay": OtherFlag(float, 0.1, "--weight_decay", minimum=0),
    "--lr": OtherFlag(float, 5e-6, "--learning_rate", minimum=0),
    "--batch_size": OtherFlag(int, 4, "--per_device_train_batch_size", "rows of a rank in a micro-batch", minimum=1),
    "--max_epochs": OtherFlag(int, 3, "--num_train_epochs", minimum=1),
    "--grad_checkpoint": OtherFlag(bool, ours="--gradient_checkpointing"),
    "--microbatch_size": OtherFlag(int, 1, said="of pipelines alone", minimum=1),
}
SFT = OVER_DATA | {
    "--mixed_precision": OtherFlag(str, "bf16", "--dtype", choices=("fp16", "bf16")),
    "--save_path": OtherFlag(str, ours="--output_dir"),
    "--max_len": OtherFlag(int, 512, "--max_seq_len", minimum=8),
    "--disable_loss_mask": OtherFlag(bool, ours="--train_on_prompts"),
}
PAIRS = OVER_DATA | {
    "--save_dir": OtherFlag(str, ours="--output_dir"),
    "--max_length": OtherFlag(int, 2048, "--max_seq_len", minimum=8),
}
REWARD = PAIRS | {"--loss_fn": OtherFlag(str, "log_sig", "--loss", choices=("log_sig", "log_exp"))}
UNMASKED = OtherFlag(bool, said="only responses count in a loss of pairs")
PREFERENCE = PAIRS | {
    "--model_type": OtherFlag(str, said="the model's own configuration says it"),
    "--disable_loss_mask": UNMASKED,
    "--disable_reference_model": OtherFlag(bool, said="--loss simpo and orpo have none", settled=True),
    "--ref_tp": OtherFlag(int, 1, only=(1,), said="--tensor_parallel divides policy and reference alike", minimum=1),
}
DPO = PREFERENCE | {
    "--accumulation_steps": OtherFlag(int, 1, "--gradient_accumulation_steps", minimum=1),
    "--loss_type": OtherFlag(
        str, "dpo_loss", said="--loss sigmoid, or simpo", choices=("dpo_loss", "simpo_loss"), settled=True
    ),
    "--beta": OtherFlag(float, 0.1, "--beta", minimum=0),
    "--gamma": OtherFlag(float, 0.0, said="--simpo_gamma; there 1.4 with simpo_loss", minimum=0, settled=True),
    "--length_normalization": OtherFlag(bool, said="--loss simpo has it", settled=True),
}
ORPO = PREFERENCE | {"--lam": OtherFlag(float, 0.1, "--beta", "the weight of the odds", minimum=0)}
BALANCED = "pairs have as many good answers as bad ones"
KTO = PREFERENCE | {
    "--beta": OtherFlag(float, 0.1, "--beta", minimum=0),
    "--desirable_weight": OtherFlag(float, 1.0, only=(1.0,), said=BALANCED),
    "--undesirable_weight": OtherFlag(float, 1.0, only=(1.0,), said=BALANCED),
    "--auto_weight": OtherFlag(bool, said=BALANCED),
}

SPEED_ONLY = "it changed the speed alone"
ROLLOUTS = COMMON | {
    "--pretrain": OtherFlag(str, ours="--actor_model_name_or_path"),
    "--tokenizer_dir": OtherFlag(str, ours="--tokenizer_name_or_path"),
    "--rm_pretrain": OtherFlag(str, said="--rm_checkpoint_path is a whole model here, and the critic starts from it"),
    "--rm_checkpoint_path": OtherFlag(str, ours="--critic_model_name_or_path"),
    "--conversation_template_config": OtherFlag(str, ours="--chat_template"),
    "--prompt_dataset": OtherFlag(str, ours="--data_path", many=True),
    "--ptx_dataset": OtherFlag(str, ours="--unsupervised_data_path", many=True),
    "--pretrain_dataset": OtherFlag(str, ours="--unsupervised_data_path", many=True),  # its name until 2024
    "--ptx_coef": OtherFlag(float, 0.0, said="--unsup_coef c / (1 - c), see above", minimum=0, maximum=1, settled=True),
    "--ptx_batch_size": OtherFlag(int, 4, said="a step takes as many rows of the mix as it has responses", minimum=1),
    "--reward_functions": OtherFlag(str, said="--reward_function FILE.py:NAME, of yours", many=True, settled=True),
    "--save_path": OtherFlag(str, "actor_checkpoint_prompts", "--output_dir"),
    "--num_episodes": OtherFlag(int, 1, "--num_iterations", minimum=1),
    "--num_collect_steps": OtherFlag(int, 2, said="a part of the buffer, see above", minimum=1, settled=True),
    "--num_update_steps": OtherFlag(int, 5, "--ppo_epochs", "passes over the buffer", minimum=1),
    "--experience_batch_size": OtherFlag(int, 16, said="a part of the buffer, see above", minimum=1, settled=True),
    "--train_batch_size": OtherFlag(int, 16, "--per_device_training_batch_size", minimum=1),
    "--lr": OtherFlag(float, 9e-6, "--actor_learning_rate", minimum=0),
    "--weight_decay": OtherFlag(float, 0.1, "--actor_weight_decay", minimum=0),
    "--max_length": OtherFlag(int, 2048, said="--max_prompt_seq_len, less --max_seq_len", minimum=8, settled=True),
    "--max_seq_len": OtherFlag(int, 256, "--max_answer_seq_len", "new tokens", minimum=1),
    "--grad_checkpoint": OtherFlag(bool, ours="--actor_gradient_checkpointing"),
    "--disable_loss_mask": UNMASKED,
}  # fmt: skip
PPO = ROLLOUTS | {
    "--critic_lr": OtherFlag(float, 9e-6, "--critic_learning_rate", minimum=0),
    "--kl_coef": OtherFlag(float, 0.1, "--kl_coef", minimum=0),
    "--no_neural_reward_model": OtherFlag(bool, said="--critic_model_name_or_path none says it", settled=True),
    "--critic_checkpoint_path": COMMON["--checkpoint_path"],
}
GRPO = ROLLOUTS | {
    "--lr": OtherFlag(float, 1e-6, "--actor_learning_rate", minimum=0),
    "--kl_coef": OtherFlag(float, 0.7, "--kl_coef", minimum=0),
    "--num_generations": OtherFlag(int, 8, "--samples_per_prompt", minimum=2),
    "--inference_batch_size": OtherFlag(int, said=SPEED_ONLY, minimum=1),
    "--logits_forward_batch_size": OtherFlag(int, 1, said=SPEED_ONLY, minimum=1),
    "--initial_temperature": OtherFlag(float, 1.0, "--temperature", minimum=0),
    "--final_temperature": OtherFlag(float, 0.9, said="the temperature stays as it is", minimum=0),
    "--max_tokens_thinking": OtherFlag(int, 2000, said="its reward functions alone looked at it", minimum=1),
}

SCHEDULE = "the learning rate falls to 0 along the cosine; there to a tenth"
ADAM = "weights decay except biases and norms; there they, too"
HELD_OUT = "a tenth of the prompts, or --eval_data_path, is held out; there --eval_dataset alone"
KEPT = "a tenth of the prompts, or --eval_data_path, is held out, and the best model by it kept; there the last one"
ON_LAST = "the reward comes with the last token of a response; there with every one of them"
CRITIC = "the critic starts from the reward model; there from --rm_pretrain with a new head"
ON_POLICY = {
    "--top_k": Constant(50, "top_k of its generation"),
    "--clip_ratio": Constant(0.2, "eps_clip"),
    "--gamma": Constant(1.0, "gamma"),
    "--missing_eos_penalty": Constant(0.0, "a response without an end costs nothing there"),
    "--normalize_reward": Constant(False, "rewards are taken as they are there"),
}


def widths_of(t: Translation) -> dict[str, int]:
    """Their flag -> ranks that take rows together, where they are several; of the flags that count there."""
    widths = {name: ranks for name in WIDTHS if (ranks := t.theirs(name)) > 1}
    mode = t.theirs("--sp_mode")
    if widths.keys() >= {"--tp", "--sp"} and mode != "all_to_all":  # else their program stops
        t.lines.append(f"--sp {widths.pop('--sp')}: left out, as --sp_mode {mode} leaves it, which has --tp's ranks")
    return widths


def settle_plugin(t: Translation, stages: Sequence[str], batches: Sequence[str]) -> None:
    """The plugin as ZeRO stages; ``batches`` are their flags of rows per group of ranks."""
    plugin = t.theirs("--plugin")
    if plugin == "3d":
        widths = widths_of(t)
        ours = {name: flag for name, flag in OUR_WIDTHS.items() if name in widths and flag in t.defaults}
        if len(ours) > 1:
            t.refused.append(
                f"--tp {widths['--tp']} --sp {widths['--sp']}: {' and '.join(ours.values())} do not go together; the "
                f"nearest, with the same rows in a step, is --sp {widths['--tp'] * widths['--sp']} without --tp"
            )
        else:
            for name, flag in ours.items():
                t.set(flag, widths[name], f"{name} {widths[name]}")
        refused = {name: ranks for name, ranks in widths.items() if name not in ours}
        if refused:
            width = math.prod(refused.values())
            rows = [f"{name} {-(-t.theirs(name) // width)} for {t.theirs(name)}" for name in batches]
            wide = " ".join(f"{name} {ranks}" for name, ranks in refused.items())
            kinds = " and ".join(WIDTHS[name] for name in refused)
            where = "in step 3" if "--sp" in refused else "here"
            t.refused.append(
                f"{wide}: no {kinds} parallelism {where}; the nearest is --plugin gemini (ZeRO-3 divides "
                f"the model over all ranks) without it, and as {width} ranks that shared rows then have their own, "
                f"{', '.join(rows)}"
            )
        stage, offload = t.theirs("--zero_stage"), t.theirs("--zero_stage") > 0 and t.theirs("--zero_cpu_offload")
    else:
        stage, offload = PLUGINS[plugin]
    for flag in stages:
        t.set(flag, stage, f"--plugin {plugin}")
    if offload:
        t.set("--offload", True, f"--plugin {plugin}")
    counted = [name for name in ("--zero_stage", "--zero_cpu_offload", *WIDTHS) if name in t.given]
    if counted and plugin != "3d":
        t.lines.append(f"{', '.join(counted)}: left out, as --plugin {plugin} leaves it")


def settle_common(t: Translation) -> None:
    """What all scripts have in common."""
    settle_clipping(t, "--grad_clip")
    if t.theirs("--use_flash_attn"):
        t.set("--attn_implementation", "flash_attention_2", "--use_flash_attn")
    if t.theirs("--use_wandb"):
        settle_report(t, "wandb", "--use_wandb")


def settle_tokenizer(t: Translation, flag: str = "--tokenizer_dir", model: str = "--model_name_or_path") -> None:
    """A tokenizer from elsewhere has no flag in the steps that go over data, nor in the chat."""
    tokenizer, path = t.theirs(flag), t.values.get(model, [""])[0]
    if tokenizer and path and "$" not in tokenizer + path and Path(path) != Path(tokenizer):
        t.refused.append(f"{flag} {tokenizer} is not the model's folder: copy its files to {path}")


def lora_config(t: Translation) -> dict[str, Any]:
    """What ``--lora_rank`` or the file of ``--lora_config`` asks for, as the file has it; without adapters r is 0."""
    found = {"r": t.theirs("--lora_rank"), "lora_alpha": 1, "linear_lora_dropout": 0.0, "target_modules": None}
    path = t.theirs("--lora_config")
    if found["r"] or path is None:
        return found
    instead = "give --lora_rank N, or the flags here that have lora in their names"
    try:
        given = json.loads(Path(path).read_text(encoding="utf-8"))
        whole = found | {"lora_alpha": 32, "linear_lora_dropout": 0.1} | given
    except (OSError, ValueError, TypeError, RecursionError) as error:
        t.refused.append(f"--lora_config {path} can not be read here ({type(error).__name__}): {instead}")
        return found
    odd = [name for name in whole["target_modules"] or [] if "embed" in name]
    for key, value in (("lora_initialization_method", "kaiming_uniform"), ("lora_train_bias", "none")):
        odd += [f"{key} {given[key]}"] if given.get(key, value) != value else []
    if odd:
        t.refused.append(f"--lora_config {path}: {', '.join(odd)} can not be had here: leave it out of the file")
    return whole


def settle_lora(t: Translation, roles: Sequence[str]) -> None:
    """Adapters; there nothing else trains with them."""
    found = lora_config(t)
    if not found["r"]:
        return
    why = "--lora_rank" if t.theirs("--lora_rank") else "--lora_config"
    for role in roles:
        t.set(f"--{role}lora_dim", found["r"], why)
        t.set(f"--{role}lora_module_name", ",".join(found["target_modules"] or ["all-linear"]), why)
    t.set("--lora_alpha", found["lora_alpha"], why)
    if found["linear_lora_dropout"] and "" in roles:
        t.set("--lora_dropout", found["linear_lora_dropout"], why)
    t.set("--only_optimize_lora", True, why)


def settle_data(t: Translation) -> None:
    """Scripts that go over a data set."""
    settle_plugin(t, ["--zero_stage"], ["--batch_size"])
    settle_common(t)
    settle_tokenizer(t)
    settle_lora(t, [""])
    t.need("--pretrain", "--dataset")
    if "--chat_template" not in t.values:
        t.lines.append("rows are rendered here: what prepare_dataset.py had as --conversation_template_config "
                       "is --chat_template")  # fmt: skip
    batch, accumulation = t.theirs("--batch_size"), t.theirs("--accumulation_steps")
    settle_warm_up(t, 0.025, batch, accumulation, "their default of --warmup_steps", whole=True)


def settle_dpo(t: Translation) -> None:
    """DPO or SimPO."""
    settle_data(t)
    if t.theirs("--loss_type") == "simpo_loss":
        t.set("--loss", "simpo", "--loss_type simpo_loss")
        t.set("--simpo_gamma", t.theirs("--gamma") or 1.4, "--gamma" if t.theirs("--gamma") else "their default")
        if not t.theirs("--disable_reference_model"):
            t.lines.append("not the same: simpo has no reference; there it has one without --disable_reference_model")
        return
    t.set("--loss", "sigmoid", "--loss_type dpo_loss")
    for name in ("--length_normalization", "--disable_reference_model"):
        if t.theirs(name):
            t.refused.append(f"{name} goes with --loss_type simpo_loss here")
    if t.theirs("--gamma"):
        t.refused.append(f"--gamma {t.theirs('--gamma'):g} goes with --loss_type simpo_loss here")


def settle_loss(t: Translation, loss: str) -> None:
    """ORPO, or KTO."""
    settle_data(t)
    t.set("--loss", loss, f"train_{loss}.py")


def settle_buffer(t: Translation, answers: int) -> None:
    """The buffer of an episode as an iteration.

    A rank's buffer has num_collect_steps x experience_batch_size prompts, each with ``answers`` responses; a pass over
    it has so many micro-batches of train_batch_size, and an optimizer step takes accumulation_steps of them.
    """
    collected, rows = t.theirs("--num_collect_steps"), t.theirs("--experience_batch_size") * answers
    size, accumulation = t.theirs("--train_batch_size"), t.theirs("--accumulation_steps")
    buffer, passes = collected * rows, t.theirs("--num_update_steps")
    told = (
        f"--num_collect_steps {collected} x --experience_batch_size {rows // answers}"
        + (f" x --num_generations {answers}" if answers > 1 else "")
        + f" = {buffer} responses"
    )
    if buffer % size:
        fits = next(n for n in range(min(size, buffer), 0, -1) if buffer % n == 0)
        t.refused.append(
            f"{told}, no multiple of --train_batch_size {size}: there every pass leaves the rest out; the nearest is "
            f"--train_batch_size {fits}"
        )
        return
    pieces, episodes = buffer // size, 1
    why = f"{told}, --train_batch_size {size} x --accumulation_steps {accumulation} = {size * accumulation}"
    if pieces % accumulation:
        episodes, rest = divmod(accumulation, pieces * passes)
        if rest or not episodes:
            nearest = max((n for n in range(1, pieces + 1) if pieces % n == 0 and n <= accumulation), default=1)
            t.refused.append(
                f"{why}: a step would end within a later pass; the nearest is --accumulation_steps {nearest}"
            )
            return
        if t.theirs("--num_episodes") % episodes:
            t.refused.append(f"{why}: a step takes {episodes} episodes, and --num_episodes is no multiple of that")
            return
        why += f", a step over {episodes} episodes and their {passes} passes, which repeat one gradient"
        t.set("--gradient_accumulation_steps", pieces * episodes, why)
        t.set("--ppo_epochs", 1, why)
        t.set("--num_iterations", t.theirs("--num_episodes") // episodes, why)
    together = math.lcm(rows, size)
    t.set("--per_device_generation_batch_size", together, why)
    t.set("--generation_batches", buffer * episodes // together, why)


def settle_rollouts(t: Translation, answers: int) -> None:
    """PPO and GRPO."""
    roles = ["actor_"] if answers > 1 else ["actor_", "critic_"]
    settle_plugin(t, ["--actor_zero_stage", "--critic_zero_stage"], ["--experience_batch_size", "--train_batch_size"])
    settle_common(t)
    settle_lora(t, roles)
    settle_buffer(t, answers)
    if "--warmup_steps" not in t.given and "--num_warmup_steps" not in t.values:
        t.set("--num_warmup_steps", int(0.025 * t.theirs("--num_episodes")), "their default, 2.5% of --num_episodes")
    room = t.theirs("--max_length") - t.theirs("--max_seq_len")
    t.set("--max_prompt_seq_len", room, f"--max_length {t.theirs('--max_length')} less --max_seq_len")
    if room < 4:
        t.refused.append(f"--max_length {t.theirs('--max_length')} leaves {room} tokens for a prompt")
    if "critic_" in roles:
        t.set("--critic_weight_decay", t.theirs("--weight_decay"), "--weight_decay")
        if t.theirs("--grad_checkpoint"):
            t.set("--critic_gradient_checkpointing", True, "--grad_checkpoint")
    settle_mix(t)
    settle_rewards(t)
    t.need("--pretrain", "--prompt_dataset")


def settle_mix(t: Translation) -> None:
    """(1 - c) x PPO + c x mix has the direction of PPO + c / (1 - c) x mix, and Adam's steps have no other scale."""
    coefficient, data = t.theirs("--ptx_coef"), "--unsupervised_data_path"
    if coefficient == 0:
        t.leave(data, "--ptx_coef 0 gives it no weight")
    elif coefficient == 1:
        t.refused.append("--ptx_coef 1 trains on the mix alone: that is step 1")
    elif data not in t.values:
        t.refused.append(f"--ptx_coef {coefficient:g} needs --ptx_dataset")
    else:
        t.set("--unsup_coef", coefficient / (1 - coefficient), f"--ptx_coef {coefficient:g}, c / (1 - c)")
        t.lines.append("not the same: all tokens of the mix's rows train; there only the answers of conversations")


def settle_rewards(t: Translation) -> None:
    """A reward model, or functions."""
    model, functions = "--critic_model_name_or_path", t.theirs("--reward_functions")
    none = "--no_neural_reward_model" in t.flags and t.theirs("--no_neural_reward_model")
    if functions and "--reward_function" not in t.values:
        t.refused.append(
            f"--reward_functions {' '.join(functions)}: its functions read the tags of its own prompts; add "
            "--reward_function FILE.py:NAME, such as training/step3_rlhf_finetuning/reward_examples.py:exact_answer"
        )
    if model in t.values and not none:
        t.lines.append(f"{model}: a step 2's output, or a sequence classifier of transformers; one of train_rm.py's is "
                       "converted once by python -m training.migrate.reward_model")  # fmt: skip
    elif "--reward_function" in t.values or functions:
        t.set(model, "none", "there is no reward model")
        if "--num_generations" not in t.flags:
            t.refused.append("PPO without a reward model has no critic here: train_grpo.py's flags do without one")
    else:
        t.refused.append("--rm_checkpoint_path is missing")


def settle_chat(t: Translation) -> None:
    """The terminal chat and the server."""
    settle_tokenizer(t, "--tokenizer_path", "--path")
    if "--quant" in t.given:
        t.set("--quantize", "int8" if t.theirs("--quant") == "8bit" else "int4", f"--quant {t.theirs('--quant')}")


TOKENIZER = OtherFlag(str, said="the tokenizer in the model's own folder is taken")
CHAT = {
    "--model_path": OtherFlag(str, ours="--path"),
    "--tokenizer_path": TOKENIZER,
    "--conversation_template_config": OtherFlag(str, ours="--chat_template"),
    "--model_max_length": OtherFlag(int, 2048, said="the model says how long a conversation may be", minimum=1),
    "--max_new_tokens": OtherFlag(int, 512, "--max_new_tokens", minimum=1),
    "--io": OtherFlag(str, "rich", said="there is one way of writing", choices=("simple", "rich", "dummy")),
}
SERVER = {
    "pretrained": OtherFlag(str, ours="--path"),
    "--tokenizer_path": TOKENIZER,
    "--quant": OtherFlag(str, said="--quantize int8 or int4", choices=("8bit", "4bit"), settled=True),
    "--gptq_checkpoint": OtherFlag(str, only=(), said="--quantize int4 needs none: it makes NF4 of any model"),
    "--gptq_group_size": OtherFlag(int, 128, said="of --gptq_checkpoint"),
    "--http_host": OtherFlag(str, ours="--host"),
    "--http_port": OtherFlag(int, 7070, "--port", minimum=1, maximum=65535),
    "--profanity_file": OtherFlag(str, only=(), said="answers are shown as they are"),
}

# prepare_dataset.py's --type -> the step whose rows are shown, and the flag of their length
KINDS = {"sft": (1, "--max_seq_len"), "preference": (2, "--max_seq_len"), "prompt": (3, "--max_prompt_seq_len")}
PREPARATION = {
    "--type": OtherFlag(str, said="--step says it", choices=(*KINDS, "kto"), settled=True),
    "--data_input_dirs": OtherFlag(str, said="--data_path, without commas", settled=True),
    "--tokenizer_dir": OtherFlag(str, ours="--model_name_or_path"),
    "--conversation_template_config": OtherFlag(
        str, said="--chat_template; there it was written where it was missing", settled=True
    ),
    "--data_cache_dir": OtherFlag(str, "cache", said="--data_output_path says where tokens are kept"),
    "--data_jsonl_output_dir": OtherFlag(str, said="--write, one file", settled=True),
    "--data_arrow_output_dir": OtherFlag(str, said="training finds the tokens in the cache"),
    "--max_length": OtherFlag(int, 4096, said="--max_seq_len, --max_prompt_seq_len", minimum=8, settled=True),
    "--num_spliced_dataset_bins": OtherFlag(int, 10, said="data stay in one piece", minimum=1),
    "--num_samples_per_datafile": OtherFlag(int, -1, only=(-1,), said="--data_path FILE:N takes N rows"),
}  # fmt: skip


def settle_preparation(t: Translation) -> None:
    """What it prepares, to look at: training prepares the same by itself."""
    kind, folders = t.theirs("--type"), t.theirs("--data_input_dirs")
    if kind is None or folders is None:
        t.refused.append("--type and --data_input_dirs are missing")
        return
    if kind == "kto":
        t.refused.append("--type kto: its rows have one answer each, and --loss kto takes pairs here")
        return
    t.set("--data_path", folders.split(","), "--data_input_dirs")
    step, length = KINDS[kind]
    t.set("--step", step, f"--type {kind}")
    t.set(length, t.theirs("--max_length"), "--max_length")
    template = t.theirs("--conversation_template_config")
    if template and ("$" in template or Path(template).is_file()):
        t.set("--chat_template", template, "--conversation_template_config")
    elif template:
        t.lines.append(f"--conversation_template_config {template} is not there: the tokenizer's own template is taken")
    if written := t.theirs("--data_jsonl_output_dir"):
        t.set("--write", f"{written.rstrip('/')}.jsonl", "--data_jsonl_output_dir")


OVER_DATA_DIFFERENT = (SCHEDULE, ADAM, HELD_OUT)
OVER_PAIRS_DIFFERENT = (*OVER_DATA_DIFFERENT, "too long pairs lose their oldest turns; there they are left out")
MEAN_ODDS = "the odds are of a response's mean log-prob; there means of each token's odds"
COLOSSALCHAT = Predecessor(
    "ColossalChat",
    (
        Program("supervised fine-tuning", ("train_sft.py",), "step1", SFT, different=(SCHEDULE, ADAM, KEPT, DROPOUT),
                settle=settle_data),
        Program("the reward model", ("train_rm.py",), "step2", REWARD, different=(*OVER_PAIRS_DIFFERENT, DROPOUT),
                settle=settle_data),
        Program("DPO", ("train_dpo.py",), "dpo", DPO, different=OVER_PAIRS_DIFFERENT, settle=settle_dpo),
        Program(
            "ORPO", ("train_orpo.py",), "dpo", ORPO, settle=partial(settle_loss, loss="orpo"),
            different=(*OVER_PAIRS_DIFFERENT, MEAN_ODDS),
        ),
        Program(
            "KTO", ("train_kto.py",), "dpo", KTO, settle=partial(settle_loss, loss="kto"),
            different=(*OVER_DATA_DIFFERENT, "it takes pairs, chosen and rejected; there answers with a label"),
        ),
        Program(
            "PPO", ("train_ppo.py",), "step3", PPO,
            {
                **ON_POLICY,
                "--temperature": Constant(0.7, "temperature of its generation"),
                "--clip_value": Constant(0.2, "value_clip"),
                "--clip_reward": Constant(5.0, "reward_eps"),
                "--gae_lambda": Constant(0.95, "lam"),
                "--whiten_advantages": Constant(False, "advantages are not whitened there"),
            },
            (ON_LAST, CRITIC, SCHEDULE, ADAM),
            partial(settle_rollouts, answers=1),
        ),
        Program(
            "GRPO", ("train_grpo.py",), "step3", GRPO,
            {
                **ON_POLICY,
                "--advantage": Constant("grpo", "its algorithm"),
                "--clip_reward": Constant(0.0, "rewards are not clipped there"),
            },
            ("the KL penalty is summed over a response's tokens; there their mean, so --kl_coef weighs more here",
             "the temperature stays as it is; there it falls to --final_temperature", SCHEDULE, ADAM),
            lambda t: settle_rollouts(t, t.theirs("--num_generations")),
        ),
        Program("data preparation", ("prepare_dataset.py",), "preview", PREPARATION, settle=settle_preparation,
                different=("training prepares data itself: --data_path and --chat_template are enough",)),
        Program("the chat in a terminal", ("inference/inference.py", "inference.py"), "chat", CHAT,
                {"--temperature": Constant(0.7, "temperature of its generation"), "--top_p": Constant(1.0, "top_p")},
                settle=settle_chat),
        Program("the chat's server", ("web_chatbot/server.py", "server.py"), "page", SERVER,
                different=("it is a page with gradio's API in place of POST /generate/stream",
                           "it listens on 127.0.0.1; there on all addresses, which needs --auth here"),
                settle=settle_chat),
    ),
    ("colossalchat", "colossalai"),
)  # fmt: skip
