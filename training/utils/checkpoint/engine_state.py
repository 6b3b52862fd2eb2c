"""What an engine's next step depends on, by parameter name: fp32 masters, both moments of Adam, step counts.

Each rank holds a part of every trained parameter's master and moments: at ZeRO 1 and 2 a piece of one flat partition,
at ZeRO 3 a slice of each parameter. On one rank each has a master of its own, in fp32 the weight itself. A rank writes
the parts it holds, each with its parameter's name and its place in the flattened parameter; nothing is gathered and
nothing is pickled. A run of the same ranks and stage reads back exactly what each rank wrote. Other ranks or stages
read what overlaps with their own parts. Where a parameter is cut over a tensor parallel group, a rank's place is in its
own cut, which the key says; a run that cuts otherwise, or not at all, puts the whole together. The 16-bit weights are
the masters, rounded, and need no room; parameters that do not train come from the model that the run began with.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from training.utils.engine.engine import round_weights
from training.utils.engine.states import MOMENTS, adam_of, flat_partitions, make_moments
from training.utils.engine.tensor_parallel import Split, split_of
from training.utils.errors import UserError
from training.utils.run.distributed import rank_in_row, speaks_for_rows, world_size

MASTER = "master"
_SEPARATOR = "|"  # occurs in no parameter name


@dataclass(frozen=True)
class Part:
    """This rank's part of one parameter.

    Attributes:
        name: of the parameter in the engine's module.
        start: of the part in the flattened parameter, or in this rank's cut of it.
        values: ``master`` and the moments, views ``[length]`` of what DeepSpeed trains with.
        shape: of the whole parameter.
        split: how it is cut over a tensor parallel group; None if it is not.
    """

    name: str
    start: int
    values: dict[str, Tensor]
    shape: tuple[int, ...]
    split: Split | None

    @property
    def layout(self) -> str:
        """Which cut of the parameter ``start`` counts in, as ``place/dim/sizes``; empty if it is not cut."""
        if self.split is None:
            return ""
        return f"{rank_in_row()}/{self.split.dim}/{','.join(map(str, self.split.sizes))}"

    def key(self, kind: str) -> str:
        """Its key in a checkpoint's files."""
        return _SEPARATOR.join((self.name, kind, str(self.start), *filter(None, [self.layout])))

    def of(self, parameter: Tensor) -> Tensor:
        """The same part ``[length]`` of a tensor of the parameter's whole shape."""
        if self.split is not None:
            parameter = parameter.split(self.split.sizes, self.split.dim)[rank_in_row()]
        return parameter.reshape(-1)[self.start : self.start + self.values[MASTER].numel()]


def _has_moments(zero: Any) -> bool:
    return all(adam_of(zero).state.get(flat) for flat in flat_partitions(zero))


def parts(engine: Any, *, moments: bool) -> Iterator[Part]:
    """This rank's parts of every trained parameter.

    Args:
        moments: give the moments too; the optimizer must have made them.

    Raises:
        UserError: optimizer states lie on NVMe.
    """
    zero = engine.optimizer
    if getattr(zero, "swap_optimizer", False):
        raise UserError("optimizer states on NVMe can not be saved; offload them to CPU memory: --offload")
    keys = (None, *MOMENTS) if moments else (None,)
    if moments and hasattr(zero, "_lazy_init_hp_params_optimizer_state"):
        # Of ZeRO 1 and 2 DeepSpeed 0.19 maps parameters to their moments only once, after the first group of them has
        # stepped: too early for the second group, which has no moments yet
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()
    for name, parameter in engine.module.named_parameters():
        if not parameter.requires_grad:
            continue
        if hasattr(parameter, "ds_id"):
            start = dist.get_rank(group=parameter.ds_process_group) * parameter.partition_numel()
            length = max(0, min(parameter.partition_numel(), parameter.ds_numel - start))  # the rest is padding
            views = [zero._get_fp32_opt_state_partition(parameter, True, key)[0][:length] for key in keys]
        elif hasattr(zero, "masters"):  # of a plain step
            start, master = 0, zero.masters[parameter]
            views = [(zero.state[master][key] if key else master.data).view(-1) for key in keys]
        elif parameter._hp_mapping is not None:
            start = parameter._hp_mapping.lp_fragment_address.start
            views = [parameter._hp_mapping.get_hp_fragment(key) for key in keys]
        else:
            continue  # it lies in other ranks' partitions
        if views[0].numel():
            split = split_of(parameter)
            shape = split.shape if split else tuple(getattr(parameter, "ds_shape", parameter.shape))
            values = {key or MASTER: view for key, view in zip(keys, views, strict=True)}
            yield Part(name, start, values, shape, split)


def masters(engine: Any) -> Iterator[Part]:
    """This rank's parts of the fp32 masters alone."""
    return parts(engine, moments=False)


def written_parts(engine: Any, *, moments: bool) -> Iterator[Part]:
    """`parts` that this rank writes; what a tensor parallel group has whole on each rank, the first one writes."""
    sharded_over_all = engine.dp_world_size == world_size()  # ranks that divide rows, too, have parts of their own
    for part in parts(engine, moments=moments):
        if part.split is not None or sharded_over_all or speaks_for_rows():
            yield part


@contextlib.contextmanager
def _editing(zero: Any) -> Iterator[None]:
    """Inside, masters may be written; the model's weights follow them at the end; a collective."""
    if hasattr(zero, "checkpoint_event_prologue"):
        zero.checkpoint_event_prologue()  # ZeRO 3: what is whole on every rank now would hide what is written
    with torch.no_grad():
        yield
        if hasattr(zero, "masters"):
            round_weights(zero)
        elif hasattr(zero, "fp32_partitioned_groups_flat"):
            for group in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(group)
        else:
            zero.update_lp_params()
    if hasattr(zero, "checkpoint_event_epilogue"):
        zero.checkpoint_event_epilogue()


def replace_masters(engine: Any, values: Mapping[tuple[str, int], Tensor]) -> None:
    """Write this rank's parts of the masters, by (name, start), and the weights that they round to; a collective."""
    with _editing(engine.optimizer):
        for part in masters(engine):
            part.values[MASTER].copy_(values[part.name, part.start])


def engine_tensors(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """What this rank writes to a checkpoint: (key, a copy in CPU memory), one after the other."""
    for part in written_parts(engine, moments=_has_moments(engine.optimizer)):
        for kind, view in part.values.items():
            yield part.key(kind), view.detach().to("cpu", copy=True)


def engine_counters(engine: Any) -> dict[str, Any]:
    """Everything else of an engine, as JSON: counters, schedule, loss scale, Adam's step counts; equal on all ranks."""
    zero = engine.optimizer
    scaler = getattr(zero, "loss_scaler", None)
    steps = [adam_of(zero).state[flat]["step"] for flat in flat_partitions(zero)] if _has_moments(zero) else []
    return {
        "global_steps": engine.global_steps,
        "global_samples": engine.global_samples,
        "micro_steps": engine.micro_steps,
        "skipped_steps": engine.skipped_steps,
        "schedule": engine.lr_scheduler.state_dict(),
        "learning_rates": [group["lr"] for group in adam_of(zero).param_groups],
        "loss_scale": {k: v for k, v in vars(scaler).items() if isinstance(v, int | float)} if scaler else {},
        "adam_step": max((int(s) for s in steps), default=0),
    }


@dataclass(frozen=True)
class _Place:
    """Where a saved part is: see `Part`."""

    start: int
    length: int
    file: Path
    key: str
    layout: str


class SavedParts:
    """The parts in a checkpoint's files, found by parameter and kind."""

    def __init__(self, files: list[Path]) -> None:
        self._places: dict[tuple[str, str], list[_Place]] = {}
        for file in files:
            with safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  not a dictionary
                    name, kind, start, *layout = key.split(_SEPARATOR)
                    place = _Place(int(start), opened.get_slice(key).get_shape()[0], file, key, *(layout or [""]))
                    self._places.setdefault((name, kind), []).append(place)

    def __contains__(self, name_and_kind: tuple[str, str]) -> bool:
        return name_and_kind in self._places

    def names(self) -> set[str]:
        """Every parameter in the files."""
        return {name for name, _ in self._places}

    def read(self, part: Part, kind: str) -> Tensor:
        """Values ``[length]`` of one kind for a part, put together from the files.

        Raises:
            UserError: the files do not hold them all.
        """
        layouts = {place.layout for place in self._places.get((part.name, kind), [])}
        if part.layout in layouts or not layouts:
            return self._range(part, kind, part.layout, part.start, part.values[MASTER].numel())
        return part.of(self._whole(part, kind, layouts))

    def _whole(self, part: Part, kind: str, layouts: set[str]) -> Tensor:
        """The whole parameter from a run that has cut it in another way."""
        if "" in layouts:
            return self._range(part, kind, "", 0, math.prod(part.shape)).view(part.shape)
        cut = min(layouts).partition("/")[2]
        dim, sizes = cut.split("/")
        split = Split(int(dim), tuple(map(int, sizes.split(","))), part.shape)
        shapes = [split.part_shape(place) for place in range(len(split.sizes))]
        cuts = [self._range(part, kind, f"{n}/{cut}", 0, math.prod(s)).view(s) for n, s in enumerate(shapes)]
        return torch.cat(cuts, split.dim)

    def _range(self, part: Part, kind: str, layout: str, start: int, length: int) -> Tensor:
        """Values ``[length]`` from ``start`` on in one layout."""
        values = torch.empty(length, dtype=torch.float32)
        found = 0
        for place in self._places.get((part.name, kind), []):
            low, high = max(start, place.start), min(start + length, place.start + place.length)
            if place.layout != layout or low >= high:
                continue
            with safe_open(place.file, framework="pt") as opened:
                saved = opened.get_slice(place.key)
                values[low - start : high - start] = saved[low - place.start : high - place.start]
            found += high - low
        if found != length:
            raise UserError(f"the checkpoint lacks values of {part.name} ({kind}); it is not of this model")
        return values


def load_engine(engine: Any, files: list[Path], counters: dict[str, Any]) -> None:
    """Put a checkpoint into a new engine of the same model; a collective.

    Args:
        engine: fresh from `training.utils.engine.engine.initialize_engine`, on any number of ranks and any ZeRO stage.
        files: every rank's safetensors files of this role.
        counters: from `engine_counters`.

    Raises:
        UserError: the files are of another model.
    """
    zero, saved = engine.optimizer, SavedParts(files)
    trained = {name for name, parameter in engine.module.named_parameters() if parameter.requires_grad}
    if trained != saved.names():
        name = min(trained ^ saved.names())
        raise UserError(f"the checkpoint is of a model with other trained parameters: {name} is only in one of them")
    moments = any((name, MOMENTS[0]) in saved for name in trained)
    with _editing(zero):
        if moments:
            make_moments(zero)
        for part in parts(engine, moments=moments):
            for kind, view in part.values.items():
                view.copy_(saved.read(part, kind))
    _load_counters(engine, counters, moments)


def _load_counters(engine: Any, counters: dict[str, Any], moments: bool) -> None:
    zero = engine.optimizer
    for name in ("global_steps", "global_samples", "micro_steps", "skipped_steps"):
        setattr(engine, name, counters[name])
    engine.lr_scheduler.load_state_dict(dict(counters["schedule"]))
    for group, rate in zip(adam_of(zero).param_groups, counters["learning_rates"], strict=True):
        group["lr"] = rate
    for name, value in counters["loss_scale"].items() if hasattr(zero, "loss_scaler") else ():
        setattr(zero.loss_scaler, name, value)
    for flat in flat_partitions(zero) if moments else []:
        state = adam_of(zero).state[flat]
        if torch.is_tensor(state["step"]):
            state["step"].fill_(counters["adam_step"])
        else:
            state["step"] = counters["adam_step"]
