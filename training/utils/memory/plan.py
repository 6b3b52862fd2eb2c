"""``--plan``: what a run will need of the device's memory, before a model is loaded.

Each step program describes itself as roles (what is held all the time, per ZeRO stage: `training.utils.memory.zero`)
and phases (what comes and goes: activations, logits, KV cache, found by `training.utils.memory.live`). The peak is that
of the most demanding phase. Every row is taken to fill the longest length that the flags allow, all of it response.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from training.utils.arguments import LoraArguments
from training.utils.engine import four_bit, sequence_parallel
from training.utils.engine.tensor_parallel import cut_for_plan
from training.utils.engine.zero_config import DTYPES
from training.utils.errors import UserError
from training.utils.memory.live import FakeModel, PassMemory
from training.utils.memory.zero import BYTES, RoleMemory, RoleSize
from training.utils.model.forward import TokenScorer, is_split, without_adapters
from training.utils.model.loading import config_without_dropout, no_dropout, remote_code, with_attention
from training.utils.model.lora import is_adapter, with_adapters
from training.utils.run.distributed import data_size, say
from training.utils.run.runtime import local_ranks

MIB, GIB = 2**20, 2**30
DOES_NOT_FIT = 1  # exit code
ALLOCATOR_SLACK = 1.45  # docs/results.md: resident memory of a CPU run with glibc's default settings, against tensors


@dataclass(frozen=True)
class Phase:
    """A time in the run, with what is allocated in it beyond the roles.

    Attributes:
        name: for the table.
        parts: bytes by name, on the device.
        host: bytes by name, in the host's memory.
    """

    name: str
    parts: dict[str, int] = field(default_factory=dict)
    host: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """Memory of one rank.

    Attributes:
        roles: by name.
        phases: in the order of the run.
        on_cpu: device and host are the same memory.
        notes: lines for the reader.
    """

    roles: dict[str, RoleMemory]
    phases: Sequence[Phase]
    on_cpu: bool
    notes: Sequence[str] = ()

    def resident(self) -> int:
        """Bytes that the roles hold on the device all the time."""
        return sum(
            size
            for role in self.roles.values()
            for name, size in role.resident.items()
            if self.on_cpu or name not in role.host
        )

    def need(self, phase: Phase) -> int:
        """Bytes on the device in a phase."""
        return self.resident() + sum(phase.parts.values()) + (sum(phase.host.values()) if self.on_cpu else 0)

    def peak(self) -> int:
        """Bytes on the device in the most demanding phase."""
        return max(self.need(phase) for phase in self.phases)

    def host_peak(self) -> int:
        """Bytes in the host's memory beside an accelerator: what is offloaded, and copies while saving."""
        offloaded = sum(size for r in self.roles.values() for name, size in r.resident.items() if name in r.host)
        return 0 if self.on_cpu else offloaded + max(sum(phase.host.values()) for phase in self.phases)


@dataclass(frozen=True)
class Settings:
    """What may be changed to make a run fit, without changing what it computes.

    Attributes:
        zero_stage: of the trained roles.
        offload: optimizer states in the host's memory.
        checkpointing: recompute activations.
        batch: rows per rank and micro-batch of training.
        other_batch: rows per rank in evaluation (step 3: in generation).
        accumulates: several micro-batches per step.
        scored_batch: rows per rank of a forward that scores (step 3); 0: as many as ``batch``.
    """

    zero_stage: int
    offload: bool
    checkpointing: bool
    batch: int
    other_batch: int
    accumulates: bool
    scored_batch: int = 0


def in_words(dtype: str, lora: LoraArguments) -> str:
    """The precision of a role, for a title."""
    return f"{dtype} on a base in {lora.base_bits} bits" if lora.base_bits else dtype


def device() -> torch.device:
    """The device that this machine trains on, without touching it."""
    return torch.device(get_accelerator().device_name())


def available_memory() -> int:
    """Bytes that one rank may take: free device memory; on a CPU the machine's or the container's, by local ranks."""
    accelerator, local = get_accelerator(), int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() == "cuda":
        return int(torch.cuda.mem_get_info(local)[0])  # DeepSpeed's own reads no UUID in CUDA_VISIBLE_DEVICES
    if accelerator.device_name() != "cpu":
        return int(accelerator.available_memory(local))
    return host_memory()


def host_memory() -> int:
    """Bytes of the machine's or the container's own memory that one rank may take, by local ranks."""
    accelerator = get_accelerator()
    free = int((accelerator if accelerator.device_name() == "cpu" else CPU_Accelerator()).available_memory())
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file() and (limit := (group / "memory.max").read_text().strip()) != "max":
        statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        used = int((group / "memory.current").read_text()) - int(statistics.get("inactive_file", 0))
        free = min(free, int(limit) - used)
    return max(free, 0) // local_ranks()


def _mib(size: int) -> str:
    return f"{size / MIB:,.0f}"


def _row(name: str, width: int, total: int, parts: Mapping[str, int]) -> str:
    """What a role or a phase needs in all, and the parts of that, in MiB."""
    shown = ", ".join(f"{part} {_mib(size)}" for part, size in parts.items() if size)
    return f"  {name:<{width}}{_mib(total):>8}   {shown}"


def show_plan(title: str, settings: Settings, plan_of: Callable[[Settings], Plan], flags: Mapping[str, str]) -> int:
    """Print the plan; returns the exit code: 0 if it fits, `DOES_NOT_FIT` if not.

    Args:
        title: what is planned: step, model, precision, ranks.
        flags: name in `Settings` -> the flags that set it, with ``{}`` for the value.
    """
    available, plan = available_memory(), plan_of(settings)
    at = max(plan.phases, key=plan.need)
    fits = plan.peak() <= available
    by_stage = {stage: plan_of(replace(settings, zero_stage=stage)).peak() for stage in range(4)}
    least = next((stage for stage, peak in by_stage.items() if peak <= available), None)
    lines = [f"Memory plan of {title}; for each rank, in MiB", "", "  held all the time"]
    for name, role in plan.roles.items():
        lines.append(_row(name, 12, role.total, role.resident))
        if role.host and not plan.on_cpu:
            lines.append(f"  {'':<20}   in the host's memory: {', '.join(sorted(role.host))}")
    lines += ["", "  phase                 total   of it, for that time"]
    for phase in plan.phases:
        lines.append(_row(phase.name, 20, plan.need(phase), phase.parts | (phase.host if plan.on_cpu else {})))
    lines += ["", *(f"  {note}" for note in plan.notes)]
    lines.append(
        f"  peak {_mib(plan.peak())} in {at.name}; free for this rank ({device().type}): {_mib(available)}: "
        + ("it fits" if fits else "it does NOT fit")
    )
    if plan.on_cpu:
        lines.append(
            "  that is tensors; the C library keeps freed memory too, up to "
            f"{_mib(int(plan.peak() * ALLOCATOR_SLACK))} in all, unless MALLOC_MMAP_THRESHOLD_=65536 is set"
        )
    if host := plan.host_peak():
        lines.append(f"  host memory beside it: {_mib(host)}")
    lines.append("  peak by ZeRO stage: " + ", ".join(f"{stage}: {_mib(peak)}" for stage, peak in by_stage.items()))
    lines.append(f"  least sharded ZeRO stage that fits: {'none' if least is None else least}")
    if not fits:
        lines += advice(settings, plan_of, flags, available)
    say("\n".join(lines))
    return 0 if fits else DOES_NOT_FIT


def advice(
    settings: Settings, plan_of: Callable[[Settings], Plan], flags: Mapping[str, str], available: int
) -> list[str]:
    """Which settings to change, the cheapest first, each on top of those before it, until the plan fits.

    After each change the cheapest ones are tried again: a smaller batch of one phase may leave another the largest.
    """
    lines, plan = ["  what to change first, one after the other:"], plan_of(settings)
    peak, on_cpu, found = plan.peak(), plan.on_cpu, True
    while found:
        found = False
        for name, value in cheaper(settings, on_cpu=on_cpu):
            changed = replace(settings, **{name: value}, accumulates=settings.accumulates or name == "batch")
            lower = plan_of(changed).peak()
            if lower < peak:
                settings, peak, found = changed, lower, True
                fits = ", fits" if peak <= available else ""
                lines.append(f"    {flags[name].format(value):<48} peak {_mib(peak)}{fits}")
                if fits:
                    return lines
                break
    last = "    then LoRA with --only_optimize_lora, --base_bits 4, shorter sequences, more ranks or a smaller model"
    return [*lines, last]


def cheaper(settings: Settings, *, on_cpu: bool) -> Iterator[tuple[str, Any]]:
    """Changes of settings in the order of what they cost in time: (name, value)."""
    if not settings.checkpointing:
        yield "checkpointing", True
    if data_size() > 1:
        yield from (("zero_stage", stage) for stage in range(max(settings.zero_stage, 1) + 1, 4))
    for name in ("other_batch", "scored_batch", "batch"):
        size = getattr(settings, name)
        yield from ((name, part) for part in range(size // 2, 0, -1) if size % part == 0)
    if not settings.offload and not on_cpu:
        yield "offload", True


def fake_batch(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask ``[rows, length]`` of rows without padding."""
    ids = torch.zeros(rows, length, dtype=torch.long)
    return ids, torch.ones_like(ids)


def saving_phase(parameters: int, width: int) -> Phase:
    """The export: weights are copied to the host on rank 0, written, loaded again and compared."""
    return Phase("saving (rank 0)", host={"copy": parameters * width, "reloaded": parameters * width})


def training_phases(
    role: str,
    memory: RoleMemory,
    passes: PassMemory,
    logits: int,
    *,
    accumulates: bool,
    checkpointing: bool = False,
    others: int = 0,
    others_at_step: int = 0,
) -> list[Phase]:
    """Backward and step of one role.

    In the backward all gradients are there, in the parameters' precision, unless ZeRO lets them go bucket by bucket or
    they become fp32 one by one.

    Args:
        memory: from `training.utils.memory.zero.trained_memory`.
        logits: bytes of its logits, 0 for a role without.
        checkpointing: activations are computed again, and what they were computed with is gathered again.
        accumulates: several micro-batches per step: from the second on, gradients of those before are there.
        others, others_at_step: gradients that another role keeps in the backward and in the step.
    """
    earlier = {"gradients of the other role": others}
    if memory.releases:
        gradients = {"activations": passes.lean - logits, "gradients and buckets": memory.reduction - memory.gathered}
    else:
        alone = passes.wide if memory.widens else passes.peak
        here = passes.lean if accumulates and memory.adds else alone
        gradients = {
            "activations and gradients": here - logits,
            "gradients of earlier micro-batches": memory.pending if accumulates else 0,
        }
    gathered = memory.gathered + (0 if checkpointing else memory.kept)
    backward = {"gathered parameters": gathered, "logits": logits, **gradients}
    return [
        Phase(f"{role}: backward", backward | earlier),
        Phase(f"{role}: reduction", {"gradients and buckets": memory.reduction} | earlier),
        Phase(f"{role}: step", {"gradients and norms": memory.step, "gradients of the other role": others_at_step}),
    ]


def fake_role(
    path: str, dtype: str, attn_implementation: str, lora: LoraArguments, *, classifier: bool, tensor_parallel: int = 1
) -> FakeModel:
    """A role's model without storage, adapters included, or a rank's part of it.

    Args:
        path: a model folder or hub name; only its configuration is read.
        dtype, attn_implementation: as for loading; FlashAttention is planned as PyTorch's own, which needs as much.
        lora: its adapters.
        classifier: a `TokenScorer` in place of a causal LM.
        tensor_parallel: ranks that hold it together, see `cut_for_plan`.

    Raises:
        UserError: the family can not be built.
    """
    attention = "sdpa" if attn_implementation == "flash_attention_2" else attn_implementation
    factory: Any = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM

    def build() -> Any:
        """The model, on whatever device is in force."""
        config = config_without_dropout(path)
        if classifier:
            config.num_labels, config.pad_token_id = 1, 0
        model = with_attention(
            lambda kind: factory.from_config(config, dtype=DTYPES[dtype], attn_implementation=kind, **remote_code()),
            attention,
        )
        no_dropout(model)
        if tensor_parallel > 1:
            cut_for_plan(model, tensor_parallel)
        for layer in four_bit.packable(model) if lora.base_bits else ():
            layer.four_bit = True  # type: ignore[assignment]
        if is_split(model):
            sequence_parallel.mlps_in_pieces(model)
        model = with_adapters(model, lora)
        return TokenScorer(model) if classifier else model

    try:
        fake = FakeModel(build, device())
        fake.beside = max(packed_weights(fake.module), default=0) * BYTES[dtype]
        return fake
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: {str(error).splitlines()[0]}") from error


def role_size(model: FakeModel) -> RoleSize:
    """The numbers of elements of a role."""
    trained = [p.numel() for p in model.module.parameters() if p.requires_grad]
    count = sum(p.numel() for p in model.module.parameters())
    packed = packed_weights(model.module)
    return RoleSize(count, sum(trained), max(trained, default=0), sum(packed), sum(map(four_bit.scale_bytes, packed)))


def packed_weights(module: Any) -> list[int]:
    """Numbers of weights of the layers that `fake_role` has marked as in 4 bits."""
    return [layer.weight.numel() for layer in module.modules() if getattr(layer, "four_bit", False)]


def base_parameters(model: FakeModel) -> int:
    """The number of a causal LM's parameters without adapters."""
    return sum(p.numel() for name, p in model.module.named_parameters() if not is_adapter(name))


def vocabulary(model: FakeModel) -> int:
    """The width of a causal LM's logits."""
    head = without_adapters(model.module).get_output_embeddings()
    return int(getattr(head, "out_features", head.weight.shape[0]))  # also where a rank has a part of it


def logits_bytes(model: FakeModel, rows: int, columns: int, dtype: str) -> int:
    """Bytes of ``[rows, columns, vocabulary]`` logits."""
    return rows * columns * vocabulary(model) * BYTES[dtype]
