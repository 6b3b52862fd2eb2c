"""Which flags a model of a size needs on so many cards, by the memory plan: the tables of docs/parallel.md.

    python benchmarks/parallel_table.py                    cards of 79 GiB
    python benchmarks/parallel_table.py --memory_gib 23.5

Full training in bf16 with --gradient_checkpointing: step 1 with one row of 2,048 tokens, step 3 with actor, reference,
critic and reward model of one size, 256 + 256 tokens, 32 responses decoded together and 4 in a micro-batch. Nothing is
run and no weights are read: what a rank holds and needs is what ``--plan`` says of an accelerator.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from common import flags_of, head_of, row_of
from scaling import GIB, folder_of  # beside this file

SIZES, CARDS = ("1.1b", "7b", "13b", "70b"), (1, 2, 4, 8, 16)
LENGTH, PROMPT, RESPONSE, TOGETHER, MICRO_BATCH = 2048, 256, 256, 32, 4
PER_MACHINE = 8  # cards: a tensor parallel group stays within one

Setting = tuple[int, int, bool]  # ranks that hold a model, ZeRO stage, offload


def settings(cards: int, groups: Sequence[int]) -> Iterator[Setting]:
    """What may be set on so many cards, the cheapest first, for groups of these sizes."""
    stages = (1, 2, 3) if cards > 1 else (1, 2)
    yield from ((ranks, stage, False) for stage in stages for ranks in groups if ranks <= cards)
    yield from ((ranks, stage, True) for stage in (2, 3) for ranks in groups if ranks <= cards)


def told(setting: Setting, step: int) -> str:
    """The flags of a setting."""
    ranks, stage, offload = setting
    flags = [f"--tensor_parallel {ranks}"] if ranks > 1 else []
    flags.append(f"ZeRO {stage}" if step == 3 else f"--zero_stage {stage}")
    return " ".join([*flags, *(["--offload"] if offload else [])])


def peaks_of_step_1(path: str) -> Callable[[Setting], float]:
    """GiB that a rank needs in step 1, by setting."""
    from training.utils.arguments import LoraArguments
    from training.utils.memory import plan as plans
    from training.utils.memory.training import SequenceCosts, sequence_plan

    costs: dict[int, SequenceCosts] = {}

    def peak(setting: Setting) -> float:
        """Of one."""
        ranks, stage, offload = setting
        if ranks not in costs:
            kind: dict[str, Any] = {"classifier": False, "tensor_parallel": ranks}
            model = plans.fake_role(path, "bf16", "sdpa", LoraArguments(), **kind)
            costs[ranks] = SequenceCosts(model, LENGTH, classifier=False)
        given = plans.Settings(stage, offload, True, batch=1, other_batch=1, accumulates=True)
        plan = sequence_plan(costs[ranks], given, "bf16", {}, tensor_parallel=ranks, on_cpu=False)
        return plan.peak() / GIB

    return peak


def peaks_of_step_3(path: str) -> Callable[[Setting], float]:
    """GiB that a rank needs in step 3, by setting; at ZeRO-3 generation may go through the hooks."""
    from training.step3_rlhf_finetuning import arguments as flags
    from training.step3_rlhf_finetuning.plan import RoleCosts, rlhf_plan
    from training.utils.arguments import LoraArguments
    from training.utils.memory import plan as plans

    costs: dict[int, RoleCosts] = {}
    rollout = flags.RolloutArguments(PROMPT, RESPONSE, TOGETHER)
    train = flags.OptimizationArguments(MICRO_BATCH, gradient_accumulation_steps=2)

    def peak(setting: Setting) -> float:
        """Of one."""
        ranks, stage, offload = setting
        if ranks not in costs:
            actor, critic = (
                plans.fake_role(path, "bf16", "sdpa", LoraArguments(), classifier=c, tensor_parallel=ranks)
                for c in (False, True)
            )
            parameters = plans.role_size(critic).parameters
            costs[ranks] = RoleCosts(actor, critic, critic, PROMPT, RESPONSE, parameters)
        given = plans.Settings(stage, offload, True, MICRO_BATCH, TOGETHER, True)
        zero = flags.RoleZeroArguments(stage, stage, offload=offload, tensor_parallel=ranks)
        roles = flags.RoleArguments(dtype="bf16")
        plan = rlhf_plan(costs[ranks], given, roles, rollout, train, zero, {}, (stage, stage), on_cpu=False)
        twin = next(p for p in plan.phases if p.name == "generation").parts["gathered twin"]
        return max(plan.need(p) - (twin if p.name == "generation" else 0) for p in plan.phases) / GIB

    return peak


def table(step: int, models: Sequence[str], free: float, scratch: Path) -> Iterator[str]:
    """The lines of one step's table."""
    from training.utils.memory.generation import key_heads
    from training.utils.model.loading import load_config

    yield head_of("model", "cards", "ZeRO alone", "GiB", "with tensor parallelism", "GiB")
    for size in models:
        path = folder_of(size, scratch)
        peak = peaks_of_step_1(path) if step == 1 else peaks_of_step_3(path)
        groups = [n for n in (2, 4, 8) if n <= PER_MACHINE and key_heads(load_config(path)) % n == 0]
        for cards in CARDS:
            os.environ["WORLD_SIZE"] = str(cards)
            cells = [size.upper(), str(cards)]
            for sizes in ([1], groups):
                fitting = ((s, need) for s in settings(cards, sizes) if (need := peak(s)) <= free)
                found = next(fitting, None)
                cells += [f"`{told(found[0], step)}`", f"{found[1]:.0f}"] if found else ["none", ""]
            yield row_of(*cells)


def main() -> int:
    """Print both tables."""
    parser = flags_of(__doc__)
    parser.add_argument("--memory_gib", type=float, default=79.0, help="free on a card (default: %(default)s)")
    parser.add_argument("--step", type=int, nargs="+", default=[1, 3], choices=(1, 3))
    parser.add_argument("--size", nargs="+", default=list(SIZES), choices=SIZES)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for step in given.step:
            print(f"\nStep {step}, {given.memory_gib:g} GiB:\n")
            for line in table(step, given.size, given.memory_gib, Path(scratch)):
                print(line, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
