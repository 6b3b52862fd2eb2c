"""ZeRO stage, precision and offload -> the DeepSpeed configuration, with the user's own JSON merged on top."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from training.utils.errors import UserError
from training.utils.run.distributed import say
from training.utils.run.files import once_each

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

MAX_GRAD_NORM = 1.0  # DeepSpeed-Chat's and TRL's value
_BF16, _SUMS = {"enabled": True}, {"grad_accum_dtype": "fp32"}  # of bf16 weights, and of gradients

# What the programs decide themselves: a user's JSON that sets these would silently change the mathematics
# (batch arithmetic, loss normalisation, schedule).
_OWNED = {
    "managed_gradient_accumulation": "the programs normalise over the global token count themselves",
    "train_batch_size": "use the step's own flags for batch sizes",
    "train_micro_batch_size_per_gpu": "use the step's own flags for batch sizes",
    "gradient_accumulation_steps": "use --gradient_accumulation_steps",
    "scheduler": "use --num_warmup_steps",
    "optimizer": "use the step's own flags for learning rate and weight decay",
    "tensor_parallel": "use --tensor_parallel",
    "hybrid_engine": "DeepSpeed's hybrid engine accelerates no model family of transformers 5; step 3 has its own",
}


# Sections of DeepSpeed's configuration that its constants do not name
_SECTIONS = {
    "zero_optimization", "activation_checkpointing", "flops_profiler", "comms_logger", "aio", "compression_training",
    "tensorboard", "wandb", "csv_monitor", "comet", "autotuning", "elasticity", "data_efficiency", "nebula", "compile",
    "tensor_parallel", "checkpoint", "data_types", "amp", "sparse_attention", "pipeline", "curriculum_learning",
    "weight_quantization", "zero_quantized_weights", "timers", "monitor_config", "zenflow", "superoffload",
}  # fmt: skip


def effective_stage(zero_stage: int) -> int:
    """The stage DeepSpeed is given where states may be sharded: stage 0 runs as stage 1.

    At stage 0 DeepSpeed 0.19 takes a phantom Adam step in bf16 and fp16, and in fp32 lets a NaN gradient into
    the weights and reports no gradient norm. Stage 1 does the same arithmetic with sharded optimizer states.
    """
    return max(zero_stage, 1)


def is_plain(config: dict[str, Any], ranks: int) -> bool:
    """Whether a role takes the plain step: one rank, fp32 or bf16, nothing offloaded, below stage 3.

    See `training.utils.engine.engine.plain_adamw`. What a user's configuration asks of DeepSpeed's own 16-bit
    optimizers, they do.

    Args:
        config: from `deepspeed_config`.
        ranks: in the process group.
    """
    zero = config["zero_optimization"]
    other = {"fp16", "torch_autocast", "tensor_parallel"} & config.keys()
    offloaded = {"offload_optimizer", "offload_param"} & zero.keys()
    asked = config.get("bf16", _BF16) != _BF16 or config["data_types"] != _SUMS
    return ranks == 1 and zero["stage"] < 3 and not other and not offloaded and not asked


def deepspeed_config(
    *,
    zero_stage: int,
    dtype: str,
    offload: bool = False,
    micro_batch_size: int = 1,
    max_grad_norm: float = MAX_GRAD_NORM,
    tensor_parallel: int = 1,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """The configuration of one trained role.

    Args:
        zero_stage: 0-3, see `effective_stage`.
        dtype: ``bf16``, ``fp16`` or ``fp32``; the master weights are fp32 in every case.
        offload: optimizer states (at stage 3 parameters too) in CPU memory.
        micro_batch_size: rows per rank and backward; DeepSpeed only reports with it.
        max_grad_norm: global gradient norm above which gradients are scaled down.
        tensor_parallel: ranks that hold the model together, see `training.utils.engine.tensor_parallel`.
        overrides: the user's own configuration, from `read_user_config`.
    """
    stage = effective_stage(zero_stage)
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "overlap_comm": False}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        # backward() only accumulates and step() is always the boundary: the number of micro-batches may differ
        # from step to step, and the loss arrives already divided by the global token count
        "managed_gradient_accumulation": False,
        "zero_optimization": zero,
        "gradient_clipping": max_grad_norm,
        "steps_per_print": 2**31 - 1,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "data_types": dict(_SUMS),
    }
    if dtype == "bf16":
        config["bf16"] = dict(_BF16)
    elif dtype == "fp16":
        config["fp16"] = {"enabled": True, "initial_scale_power": 12}
    if tensor_parallel > 1:  # every rank sees all logits: with tied embeddings AutoTP would cut the vocabulary
        config["tensor_parallel"] = {"autotp_size": tensor_parallel, "vocab_parallel_lm_head": False}
    if overrides:
        config = merge(config, overrides)
        _check(config)
    return config


def _check(config: dict[str, Any]) -> None:
    """Let DeepSpeed read a user's configuration before a model is loaded.

    Raises:
        UserError: a value of the wrong type, or one that DeepSpeed does not know in a section.
    """
    from deepspeed.runtime.config import DeepSpeedConfig

    for key in ("gradient_clipping", "steps_per_print", "gradient_predivide_factor"):  # which it takes as they are
        if not isinstance(config.get(key, 1), (int, float)):
            raise UserError(f"--deepspeed_config: {key} is {config[key]!r}, it must be a number")
    try:
        DeepSpeedConfig(copy.deepcopy(config))
    except (ValueError, TypeError, AssertionError, KeyError, AttributeError) as error:  # pydantic's are ValueErrors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise UserError(f"--deepspeed_config: DeepSpeed refuses it: {' '.join(lines[:3])}") from error


def unknown_keys(config: dict[str, Any]) -> list[str]:
    """Keys that DeepSpeed would pass over in silence."""
    from deepspeed.runtime import constants

    known = {value for value in vars(constants).values() if isinstance(value, str)} | _SECTIONS
    return sorted(key for key in config if key not in known and not key.startswith("_"))


def frozen_config(
    *, zero_stage: int, dtype: str, offload: bool = False, tensor_parallel: int = 1
) -> dict[str, Any] | None:
    """The configuration of a frozen role that the ranks share: at ZeRO-3 or over a tensor parallel group; else None.

    Args:
        zero_stage: of the trained role that it accompanies; below 3 its parameters are not sharded.
        dtype, tensor_parallel: see `deepspeed_config`.
        offload: at ZeRO-3 keep its parameters in CPU memory.
    """
    if zero_stage < 3 and tensor_parallel == 1:
        return None
    config = deepspeed_config(zero_stage=3, dtype=dtype, tensor_parallel=tensor_parallel)
    if zero_stage < 3:
        config["zero_optimization"] = {"stage": 0}
    elif offload:
        config["zero_optimization"]["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    return config


def merge(base: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Merge nested dictionaries; where both have a value, that of ``overrides`` wins."""
    result = dict(base)
    for key, value in overrides.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merge(result[key], value) if both else value
    return result


def user_config(path: str) -> dict[str, Any]:
    """What ``--deepspeed_config`` says, a file or JSON; empty where it is not given.

    Raises:
        UserError: the file is missing or is not a JSON object.
    """
    if not path:
        return {}
    try:
        text = path if path.lstrip().startswith("{") else Path(path).expanduser().read_text(encoding="utf-8-sig")
        config = json.loads(text, object_pairs_hook=once_each)
    except UnicodeDecodeError as error:
        raise UserError(f"--deepspeed_config {path}: not a text file") from error
    except OSError as error:
        raise UserError(f"--deepspeed_config {path}: {error.strerror}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"--deepspeed_config {path}: line {error.lineno} column {error.colno}: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # a key twice, a number of too many digits, nested too deeply
        raise UserError(f"--deepspeed_config {path}: {error}") from error
    if not isinstance(config, dict):
        raise UserError(f"--deepspeed_config {path}: a JSON object is needed")
    return config


def read_user_config(path: str, save_every: int = 0) -> dict[str, Any]:
    """`user_config`, checked.

    Args:
        path: the flag, a file or JSON.
        save_every: steps between two checkpoints, 0 for none.

    Raises:
        UserError: as `user_config`, or it sets what the programs decide themselves, or puts on NVMe what checkpoints
            hold.
    """
    config = user_config(path)
    for key, instead in _OWNED.items():
        if key in config:
            raise UserError(f"--deepspeed_config {path}: {key} is not for the file: {instead}")
    for key in ("bf16", "fp16"):  # else the engine would compute in another precision than the run records
        if isinstance(config.get(key), dict) and "enabled" in config[key]:
            raise UserError(f"--deepspeed_config {path}: {key}.enabled is not for the file: use --dtype")
    if unknown := unknown_keys(config):
        raise UserError(f"--deepspeed_config {path}: DeepSpeed knows no {', '.join(unknown)} and would pass it over")
    if states_on_nvme(config):
        unsaved = "optimizer states on NVMe can not be saved"
        if save_every:
            raise UserError(f"--deepspeed_config {path}: {unsaved}: use --offload instead, or --save_every 0")
        say(f"warning: {unsaved}: a run that is stopped can not go on")
    return config


def states_on_nvme(config: Mapping[str, Any]) -> bool:
    """Whether a user's configuration puts optimizer states, the masters among them, on NVMe."""
    zero = config.get("zero_optimization")
    optimizer = zero.get("offload_optimizer") if isinstance(zero, dict) else None
    return isinstance(optimizer, dict) and optimizer.get("device") == "nvme"
