"""One DeepSpeed engine for one trained role: optimizer, schedule, and a step normalised over all ranks."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import bf16_optimizer
from torch import Tensor, nn

from training.utils.engine.tensor_parallel import check_split
from training.utils.engine.zero_config import DTYPES, is_plain
from training.utils.model.lora import is_adapter
from training.utils.run.distributed import bound_waits, say, world_size
from training.utils.run.phases import beat

# The 16-bit optimizer prints eighteen lines about memory for every engine, whatever the log level
bf16_optimizer.see_memory_usage = lambda *_args, **_kwargs: None

ADAM_BETAS = (0.9, 0.95)  # DeepSpeed-Chat's and InstructGPT's
NORM_CHUNK = 131_072  # elements whose fp64 copy stays in a processor's cache: many times as fast as a matrix at once
CAST = (torch.float16, torch.float32, torch.float64)  # what DeepSpeed casts to bf16, buffers left as they are
MAX_SKIPPED = 10  # optimizer steps in a row; a single one is noise, ten are a run that learns nothing any more


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did.

    Attributes:
        grad_norm: global gradient norm before clipping; not finite if the step was skipped.
        learning_rate: of the step that was just made; of the adapters only where nothing else trains.
        skipped: the gradient was not finite on some rank, so no rank changed its weights.
        failed: skipped, and not because fp16 looks for the largest loss scale that fits, which skipping is part of.
    """

    grad_norm: float
    learning_rate: float
    skipped: bool
    failed: bool


def parameter_groups(model: nn.Module, weight_decay: float, lora_learning_rate: float = 0.0) -> list[dict[str, Any]]:
    """Trainable parameters in groups: matrices with weight decay, biases and norms without.

    Adapters with a learning rate of their own are a third group, after the others; without one they are matrices.
    """
    matrices = {"weight_decay": weight_decay}
    settings = (matrices, {"weight_decay": 0.0}, matrices | {"lr": lora_learning_rate})
    groups: tuple[list[nn.Parameter], ...] = ([], [], [])
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[2 if lora_learning_rate and is_adapter(name) else not _is_matrix(name, parameter)].append(parameter)
    return [{"params": params} | of_group for params, of_group in zip(groups, settings, strict=True) if params]


def _is_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether a parameter is no bias or norm, which may have a row for each expert (gpt-oss) or head (Cohere)."""
    shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3 leaves an empty placeholder
    owner = name.split(".")[-2:-1]
    return len(shape) > 1 and not name.endswith("bias") and "norm" not in "".join(owner)


def initialize_engine(
    model: nn.Module,
    config: dict[str, Any],
    *,
    learning_rate: float,
    weight_decay: float,
    num_warmup_steps: int,
    total_steps: int,
    lr_scheduler_type: str = "cosine",
    lora_learning_rate: float = 0.0,
) -> Any:
    """Wrap a model for training: AdamW, linear warm-up, then the schedule over ``total_steps``.

    Args:
        model: on any device; only parameters that require a gradient get optimizer states.
        config: from `training.utils.engine.zero_config.deepspeed_config`.
        learning_rate: the peak.
        weight_decay: of matrices.
        num_warmup_steps, total_steps: in optimizer steps.
        lr_scheduler_type: one of `training.utils.arguments.SCHEDULES`, as transformers makes them.
        lora_learning_rate: the adapters' peak; 0 for ``learning_rate``.
    """
    from transformers import get_scheduler  # brings PEFT along: a second that evaluations and plans do without

    groups = parameter_groups(model, weight_decay, lora_learning_rate)
    rates: dict[str, Any] = {"lr": learning_rate, "betas": ADAM_BETAS}
    plain = is_plain(config, world_size())
    if plain:
        model.to(get_accelerator().current_device_name())  # masters lie beside the weights
        kind: dict[str, Any] = {"bf16": "bf16" in config, "max_grad_norm": config["gradient_clipping"]}
        optimizer: torch.optim.Optimizer = plain_adamw(model, groups, **kind, **rates)
        config = config | {"zero_optimization": {"stage": 0}, "gradient_clipping": 0.0, "bf16": {"enabled": False}}
    elif "offload_optimizer" in config["zero_optimization"]:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        optimizer = DeepSpeedCPUAdam(groups, **rates)
    else:
        optimizer = torch.optim.AdamW(groups, fused=True, **rates)
    _tell_warmup(lr_scheduler_type, num_warmup_steps, total_steps)
    # By default polynomial ends at 1e-7, and refuses to start there or below
    of_kind: dict[str, Any] = {"lr_end": 0.0} if lr_scheduler_type == "polynomial" else {}
    schedule = get_scheduler(lr_scheduler_type, optimizer, num_warmup_steps, max(total_steps, 1), of_kind)
    engine = initialized(model, config, optimizer=optimizer, lr_scheduler=schedule)
    if plain:
        engine.enable_backward_allreduce = False  # would copy all gradients into one buffer and back
    if engine.fp16_enabled():  # else it raises at the smallest scale; the programs count, and end with a checkpoint
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False
    return engine


@functools.cache  # of two roles alike it is said once
def _tell_warmup(lr_scheduler_type: str, num_warmup_steps: int, total_steps: int) -> None:
    """Say what is likely a mistake: a warm-up that is not done, or that the run ends in."""
    if num_warmup_steps and lr_scheduler_type == "constant":
        say("warning: --num_warmup_steps has no effect with --lr_scheduler_type constant: take constant_with_warmup")
    elif num_warmup_steps and num_warmup_steps >= total_steps:
        say(f"warning: --num_warmup_steps {num_warmup_steps} is the whole run, which has {total_steps} optimizer steps:"
            " the learning rate only rises, and ends below its peak")  # fmt: skip


def plain_adamw(
    model: nn.Module, groups: Sequence[dict[str, Any]], *, bf16: bool, max_grad_norm: float, **settings: Any
) -> Any:
    """AdamW for one rank, nothing sharded or offloaded (`training.utils.engine.zero_config.is_plain`): no flat buffers.

    DeepSpeed's ZeRO optimizers keep a flat copy of all masters beside the weights, and at each step copy the gradients
    into one flat buffer and the masters back. Here DeepSpeed runs its stage 0, which steps the optimizer it is given;
    what that stage lacks is added: every step clips first, changes nothing if a gradient is not finite, and rounds
    masters to weights. The arithmetic is that of stage 2, to the last bit. (Stage 1 is equal in fp32; its optimizer for
    bf16 takes the norm in fp32, and rounds the sum of several micro-batches' gradients to bf16.)

    In fp32 the weights are the masters. In bf16 each trained weight has one: its gradient is added to the master's, in
    fp32, as soon as a backward has it whole, and let go.

    DeepSpeed's engine reads the attributes that are set: ``_global_grad_norm``, and ``overflow``, at which it counts
    the step as skipped and leaves the schedule where it is.

    Args:
        model: on its device.
        groups: parameters of the model that train, as torch's optimizers take them.
        bf16: the model computes in bf16, else in fp32.
        max_grad_norm: global norm above which gradients are scaled down; 0 for never.
        settings: of `torch.optim.AdamW`.
    """
    weights = [weight for group in groups for weight in group["params"]]
    if bf16:
        for parameter in model.parameters():
            if parameter.dtype in CAST:
                parameter.data = parameter.data.bfloat16()
        groups = [group | {"params": [_with_master(weight) for weight in group["params"]]} for group in groups]
    optimizer: Any = torch.optim.AdamW(groups, fused=True, **settings)
    optimizer.masters = dict(zip(weights, (m for group in groups for m in group["params"]), strict=True))

    def before(optimizer: Any, *_: Any) -> None:
        """Norm, finiteness, clipping."""
        masters = list(optimizer.masters.values())
        for master in masters:
            if master.grad is None:  # an expert that no token went to: decays like all others
                master.grad = torch.zeros_like(master)
        norm = global_norm(optimizer)
        optimizer.overflow = not bool(torch.isfinite(norm))
        optimizer._global_grad_norm = math.inf if optimizer.overflow else norm
        if optimizer.overflow:
            optimizer.zero_grad()
        elif max_grad_norm > 0 and (clip := (norm + 1e-6) / max_grad_norm) > 1:
            torch._foreach_mul_([master.grad for master in masters], 1.0 / clip)

    def after(optimizer: Any, *_: Any) -> None:
        """The weights follow; gradients are let go, of which DeepSpeed only knows the weights'."""
        round_weights(optimizer)
        optimizer.zero_grad()

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
    return optimizer


def _with_master(weight: nn.Parameter) -> Tensor:
    """A bf16 weight's fp32 master, which takes over the weight's gradients."""
    master = weight.detach().float()

    def take(weight: Tensor) -> None:
        """Add a gradient that is whole."""
        assert weight.grad is not None, "another engine trains this weight"
        if master.grad is None:
            master.grad = weight.grad.float()
        else:
            master.grad += weight.grad
        weight.grad = None

    weight.register_post_accumulate_grad_hook(take)
    return master


def round_weights(optimizer: Any) -> None:
    """Make a model's weights from the masters, where they are not the same.

    Args:
        optimizer: from `plain_adamw`.
    """
    apart = {weight: master for weight, master in optimizer.masters.items() if weight is not master}
    with torch.no_grad():
        torch._foreach_copy_(list(apart), list(apart.values())) if apart else None


def global_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """Norm of all gradients, fp32: summed in fp64, rounded once for each parameter group, as DeepSpeed does it."""
    norms = []
    for group in optimizer.param_groups:
        gradients = [parameter.grad.reshape(-1) for parameter in group["params"]]
        if gradients[0].device.type == "cpu":
            squares = _squares_in_cache(gradients)
        else:
            squares = torch.stack(torch._foreach_norm(gradients, 2, torch.float64)).square()
        norms.append(squares.sum().float().sqrt())
    return torch.linalg.vector_norm(torch.stack(norms))


def _squares_in_cache(gradients: list[Tensor]) -> Tensor:
    """Sums of squares, fp64, of pieces of ``NORM_CHUNK`` elements: each copied in turn to the one place they share."""
    room = torch.empty(NORM_CHUNK, dtype=torch.float64)
    pieces = (piece for gradient in gradients for piece in gradient.split(NORM_CHUNK))
    in_fp64 = (room[: len(piece)].copy_(piece) for piece in pieces)
    return torch.stack([torch.dot(piece, piece) for piece in in_fp64])


def initialized(model: nn.Module, config: dict[str, Any], **trained_by: Any) -> Any:
    """``deepspeed.initialize``, and what it leaves to do: the engine of a model.

    Args:
        model: on any device; its buffers keep their precision.
        config: the engine's.
        trained_by: ``optimizer`` and ``lr_scheduler`` of a role that trains.
    """
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    engine, *_ = deepspeed.initialize(model=model, config=config, **trained_by)
    bound_waits()
    _restore_buffers(engine.module, buffers)
    if getattr(engine.optimizer, "parameter_offload", None) is not None:
        _drop_what_no_backward_takes(engine.module, engine.optimizer.parameter_offload.get_param_coordinator())
    if "tensor_parallel" in config:
        check_split(engine.module)
    return engine


def _drop_what_no_backward_takes(module: nn.Module, coordinator: Any) -> None:
    """After a forward without gradients, free what ZeRO-3 has fetched ahead for the backward that it foresees.

    It would stay in flight until the next forward: whoever gathers in between, an export or a rollout, would read a
    parameter that is not there yet, and could not free it.
    """

    def after_forward(*_: Any) -> None:
        """At a record of modules that is complete; before that nothing is fetched ahead."""
        if not torch.is_grad_enabled() and coordinator.is_complete_trace():
            coordinator.reset_step()

    module.register_forward_hook(after_forward)


def _restore_buffers(model: nn.Module, buffers: dict[str, Tensor]) -> None:
    """Undo DeepSpeed's cast of buffers to 16 bit: rotary frequencies in bf16 are another model than the saved one."""
    for name, buffer in buffers.items():
        owner, _, leaf = name.rpartition(".")
        buffers_of_module = model.get_submodule(owner)._buffers
        cast = buffers_of_module[leaf]
        assert cast is not None
        buffers_of_module[leaf] = buffer.to(cast.device)


@contextlib.contextmanager
def gathered(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Inside, parameters that ZeRO-3 shards are whole on every rank; a collective, changes are not kept."""
    sharded = [p for p in parameters if hasattr(p, "ds_id")]
    if not sharded:
        yield
        return
    with deepspeed.zero.GatheredParameters(sharded):
        yield


def dtype_name(engine: Any) -> str:
    """The precision of an engine's weights: ``bf16``, ``fp16`` or ``fp32``."""
    kinds = {parameter.dtype for parameter in engine.module.parameters()}
    return next((name for name, dtype in DTYPES.items() if dtype in kinds), "fp32")


def backward(engine: Any, loss_sum: Tensor, global_count: float) -> None:
    """Accumulate the gradient of ``loss_sum / global_count``, a mean over all ranks and micro-batches.

    DeepSpeed averages gradients over ranks, hence the factor: 1 rank x batch 8, 2 ranks x batch 4 and
    batch 1 x accumulation 8 then give the same step. Ranks that share a row have its gradient in parts, and are
    averaged over too.

    Args:
        engine: the role's engine.
        loss_sum: this micro-batch's sum over its tokens (step 2: pairs), a scalar.
        global_count: tokens (pairs) of the whole optimizer step, over all ranks and micro-batches.
    """
    beat("training")
    engine.backward(loss_sum * (engine.dp_world_size / max(global_count, 1.0)), scale_wrt_gas=False)


@dataclass(eq=False)
class SkipGuard:
    """Counts optimizer steps in a row at which a trained role learned nothing, and says when it is time to stop.

    Attributes:
        in_a_row: steps skipped since the last that was not; a resumed run goes on counting.
        reason: why the run must stop; empty while it may go on.
    """

    in_a_row: int = 0
    reason: str = ""

    def count(self, causes: Sequence[str]) -> None:
        """Take in one step: why it was skipped, empty if it was not. All ranks must say the same."""
        self.in_a_row = self.in_a_row + 1 if causes else 0
        if self.in_a_row >= MAX_SKIPPED and not self.reason:
            self.reason = (
                f"{self.in_a_row} optimizer steps in a row were skipped, the last because of {' and '.join(causes)}"
            )


def optimizer_step(engine: Any) -> StepResult:
    """Clip, step the optimizer and the schedule, and clear gradients."""
    beat("training")
    learning_rate = engine.get_lr()[0]
    skipped_before = engine.skipped_steps
    engine.step()
    norm = engine.get_global_grad_norm()
    grad_norm = math.nan if norm is None else float(norm)
    skipped = engine.skipped_steps > skipped_before
    scaled = engine.fp16_enabled() and engine.optimizer.dynamic_loss_scale
    searching = scaled and engine.optimizer.cur_scale > 1  # DeepSpeed halves it down to 1
    return StepResult(grad_norm, learning_rate, skipped, skipped and not searching)
