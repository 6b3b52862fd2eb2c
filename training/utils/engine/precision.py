"""``--dtype auto``: the precision that the hardware computes in, the same on all ranks, kept when a run goes on.

bf16 is as wide as fp32 and half as large, but a processor without instructions for it emulates each product: on a CPU
with AVX2 alone a model trains about ten times slower than in fp32. So ``auto`` is bf16 where every rank computes in it
(CUDA from Ampere on; CPUs with AVX512-BF16 or AMX; ARM with bf16), else fp16 on GPUs and fp32 on CPUs.
"""

from __future__ import annotations

import functools
import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from training.utils.arguments import AUTO
from training.utils.checkpoint import store
from training.utils.engine.zero_config import DTYPES
from training.utils.errors import UserError
from training.utils.run.distributed import gather_objects, say
from training.utils.run.folders import STEPS, title

CPU = "this CPU"
SUMMARY_KEY = "precision"  # in summary.json and evaluation.json
_ROWS, _WIDTH = 32, 384  # of the products that are timed: tens of milliseconds in emulated bf16


@dataclass(frozen=True)
class Capability:
    """What one rank's device can do.

    Attributes:
        name: as a sentence names it: ``this CPU``, ``Tesla T4``.
        bf16: it computes in bf16; emulation does not count.
        fp16: DeepSpeed trains in fp16 on it.
    """

    name: str
    bf16: bool
    fp16: bool = False


def choose(ranks: Sequence[Capability]) -> tuple[str, str]:
    """The best precision that every rank computes in, and why, for ranks in order (at least one)."""
    without = [rank for rank, device in enumerate(ranks) if not device.bf16]
    if not without:
        return "bf16", f"{ranks[0].name} computes in it"
    dtype = "fp16" if all(device.fp16 for device in ranks) else "fp32"
    name = ranks[without[0]].name
    if len(without) == len(ranks):
        return dtype, f"{name} does not compute in bf16"
    return dtype, f"{name.replace('this ', 'the ')} of rank {without[0]} does not compute in bf16, and all ranks agree"


def capability(device: torch.device) -> Capability:
    """What this process's ``device`` can do."""
    if device.type == "cpu":
        return Capability(CPU, cpu_computes_bf16())
    fp16 = bool(get_accelerator().is_fp16_supported())
    if device.type == "cuda":
        with torch.cuda.device(device):  # DeepSpeed's answer counts emulation
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return Capability(torch.cuda.get_device_name(device), bf16, fp16)
    return Capability(f"the {device.type} device", bool(get_accelerator().is_bf16_supported()), fp16)


@functools.cache
def cpu_computes_bf16() -> bool:
    """Whether this CPU computes in bf16: by what PyTorch says, and where it says nothing by a measurement."""
    said = cpu_verdict(platform.machine(), cpu_features(), onednn_bf16())
    return slowdown() <= 1.0 if said is None else said


def cpu_verdict(machine: str, features: Mapping[str, bool], onednn: bool | None) -> bool | None:
    """Whether a CPU computes in bf16, None where nobody says.

    Args:
        machine: as `platform.machine` has it.
        features: from `cpu_features`.
        onednn: whether oneDNN, PyTorch's library of products, takes bf16; None where it can not be asked. On x86 that
            is so with plain AVX512, too, which emulates it; ``ONEDNN_MAX_CPU_ISA`` can forbid it on any.
    """
    if machine in ("x86_64", "AMD64") and features:
        return onednn is not False and any(features.values())
    return onednn


def cpu_features() -> dict[str, bool]:
    """The instructions for bf16 products of x86 that PyTorch knows of -> whether they are there; empty if none."""
    known = {"_is_avx512_bf16_supported": "avx512_bf16", "_is_amx_tile_supported": "amx"}
    found = {}
    for function, name in known.items():  # private names: another version may lack them
        try:
            found[name] = bool(getattr(torch.cpu, function)())
        except (AttributeError, RuntimeError):
            continue
    return found


def onednn_bf16() -> bool | None:
    """Whether oneDNN takes bf16 on this CPU, None where it can not be asked."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return None


def slowdown() -> float:
    """How many times longer the CPU takes for products in bf16 than in fp32; takes at most about 0.1 s.

    The three products of a linear layer in training, on one thread: other work on the machine disturbs that least.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _seconds(torch.bfloat16) / _seconds(torch.float32)
    finally:
        torch.set_num_threads(threads)


def _seconds(dtype: torch.dtype) -> float:
    inputs, weight = torch.ones(_ROWS, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)
    times = []
    with torch.no_grad():
        for _ in range(3):
            start = time.perf_counter()
            _ = (inputs @ weight.T, inputs @ weight, inputs.T @ inputs)  # forward, gradients of inputs and weight
            times.append(time.perf_counter() - start)
    return min(times[1:])  # the first one prepares kernels


def check_dtype(dtype: str, named: str = "") -> None:
    """Refuse a precision that DeepSpeed does not train in here.

    Args:
        dtype: a precision or ``auto``.
        named: what asks for it; the flag if empty.

    Raises:
        UserError: fp16 on a CPU, or what the accelerator lacks.
    """
    accelerator = get_accelerator()
    on_cpu = accelerator.device_name() == "cpu"
    works = {
        "fp16": not on_cpu and accelerator.is_fp16_supported(),
        "bf16": on_cpu or accelerator.is_bf16_supported(),
    }
    if not works.get(dtype, True):
        raise UserError(
            f"{named or f'--dtype {dtype}'} does not train on {'a CPU' if on_cpu else 'this device'}; "
            "--dtype auto takes what does: bf16 where the hardware computes in it"
        )


def settle(flags: Any, output_dir: Path | str = "", resume: str = "never") -> dict[str, str]:
    """Turn ``--dtype auto`` into a precision, in ``flags`` itself, and say it; a collective if there are ranks.

    ``auto`` is what the checkpoint that the run goes on from has; else what ``auto`` was in the steps of this run that
    are finished; else what the devices of all ranks compute in.

    Args:
        flags: a group of flags with ``dtype``.
        output_dir: of the step, if it has one.
        resume: ``--resume``.

    Returns:
        What the summary records: ``dtype``, ``asked`` and, for ``auto``, ``reason``.

    Raises:
        UserError: DeepSpeed does not train in it here.
    """
    here = capability(torch.device(get_accelerator().current_device_name()))
    ranks = gather_objects([here])
    kept = gather_objects([_kept(Path(output_dir), resume) if output_dir else None])[0]  # all hosts: as on rank 0
    asked, reason = flags.dtype, ""
    if asked == AUTO:
        flags.dtype, reason = kept or choose(ranks)
        say(f"precision: {flags.dtype}, {reason} (--dtype auto)")
        check_dtype(flags.dtype, f"{flags.dtype}, {reason},")
    check_dtype(flags.dtype)
    emulating = flags.dtype == "bf16" and not here.bf16
    if warnings := [text for text in gather_objects([warning(here) if emulating else ""]) if text]:
        best = choose(ranks)[0]
        instead = f"--dtype {best} --resume never takes another" if reason else f"--dtype auto takes {best} here"
        say(f"warning: {warnings[0]}; {instead}")
    return {"dtype": flags.dtype, "asked": asked} | ({"reason": reason} if reason else {})


def for_device(dtype: str, device: torch.device) -> tuple[str, str]:
    """The precision of a model that is only run, and what to say about it ("" for nothing).

    Args:
        dtype: a precision or ``auto``.
        device: where the model goes.
    """
    here = capability(device)
    best, reason = choose([here])
    if dtype == AUTO:
        return best, f"precision: {best}, {reason} (--dtype auto)"
    emulating = dtype == "bf16" and not here.bf16
    return dtype, f"warning: {warning(here)}; --dtype auto takes {best} here" if emulating else ""


def warning(device: Capability) -> str:
    """What to say where bf16 is asked for or kept on this process's device, which does not compute in it."""
    cost = f"products take {slowdown():.0f} times as long as in fp32" if device.name == CPU else "it is emulated"
    return f"{device.name} does not compute in bf16: {cost}"


def _kept(output_dir: Path, resume: str) -> tuple[str, str] | None:
    """The precision that a run already has, and why; None for a new run."""
    for checkpoint in store.meant(output_dir, resume):
        try:
            dtype = store.read_state(checkpoint)["run"]["flags"]["dtype"]
        except (OSError, ValueError, KeyError, TypeError):  # damaged: `Run.open` says so, and takes the one before
            continue
        if dtype in DTYPES:
            return dtype, f"as in the checkpoint {checkpoint.name}"
    for step in reversed(STEPS) if output_dir.name in STEPS else ():
        try:
            found = json.loads((output_dir.parent / step / "summary.json").read_text(encoding="utf-8"))[SUMMARY_KEY]
            if found["asked"] == AUTO and found["dtype"] in DTYPES:
                return found["dtype"], f"as in {title(step)} of this run"
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None
