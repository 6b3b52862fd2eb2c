"""What an iteration of step 3 moves between GPUs and how long it takes, phase by phase: arithmetic, nothing is run.

    python benchmarks/scaling.py                                          the three cases of docs/scaling.md
    python benchmarks/scaling.py --actor FOLDER --critic FOLDER --gpus 8 --machine h100
    python benchmarks/scaling.py --case 7b --machine 4090 --zero_stage 3 --offload
    python benchmarks/scaling.py --case 13b --machine '{"memory_gib": 40, "network": 12.5}'

Reads only the models' configurations. Memory is that of ``--plan``; bytes are those of DeepSpeed's collectives, which
tests/test_scaling.py holds against its communication logger; seconds are those of `Machine`: published peaks times the
shares of them that are commonly reached, which are assumptions and printed with the table.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import flags_of, head_of, row_of

WIDTH = 2  # bytes of a weight and of a gradient that is reduced, in bf16
STATES = 12  # bytes of a trained weight's fp32 master and two moments
LIVE = 1_000_000_000  # DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance
GIB, GB = 2**30, 1e9


@dataclass(frozen=True)
class Machine:
    """Numbers of a kind of machine: peaks from the vendors' data sheets, and what is reached of them (assumed).

    Attributes:
        flops: dense products in bf16, 1/s, of one GPU.
        memory_gib: of one GPU. memory: its bandwidth, GB/s.
        link: GB/s each way between the GPUs of a machine, of one GPU.
        network: GB/s between machines, of all the network cards of one machine.
        per_machine: GPUs in one machine.
        host: GB/s each way between a GPU and the host's memory. host_memory: bandwidth of that memory, GB/s.
        flops_reached, memory_reached, link_reached: shares of the peaks.
        layer_ms: a decoding step takes at least this long for each layer; OPT-1.3B on an H100 with CUDA graphs.
    """

    flops: float = 312e12
    memory_gib: float = 79.0
    memory: float = 2039.0
    link: float = 300.0
    network: float = 200.0
    per_machine: int = 8
    host: float = 25.0
    host_memory: float = 200.0
    flops_reached: float = 0.45
    memory_reached: float = 0.8
    link_reached: float = 0.75
    layer_ms: float = 0.28

    def link_seconds(self, moved: float, gpus: int) -> float:
        """Of ``moved`` bytes in and out of each GPU; a ring over machines crosses each one's network once."""
        speed = self.link if gpus <= self.per_machine else min(self.link, self.network)
        return moved / (speed * self.link_reached * GB)

    def compute_seconds(self, operations: float) -> float:
        """Of products on one GPU."""
        return operations / (self.flops * self.flops_reached)


MACHINES = {
    "a100": Machine(),
    "h100": Machine(flops=989e12, memory=3350.0, link=450.0, network=400.0, host=50.0, host_memory=300.0),
    "4090": Machine(flops=165e12, memory_gib=23.5, memory=1008.0, link=20.0, network=1.25, per_machine=2),
}

# Llama 2's shapes (Touvron et al. 2023, arXiv 2307.09288), TinyLlama's, and OPT's (Zhang et al. 2022, arXiv 2205.01068)
SHAPES: dict[str, dict[str, Any]] = {
    "1.1b": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32,
             "num_key_value_heads": 4},
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13b": {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40},
    "70b": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 8},
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What is planned: models, by shape or folder, GPUs, and step 3's settings per GPU."""

    actor: str
    critic: str
    gpus: int
    machine: str = "a100"
    rows: int = 32  # responses of an iteration
    batch: int = 4  # rows of a micro-batch
    scored: int = 0  # rows of a forward that scores; 0: of a micro-batch
    prompt: int = 256
    response: int = 256
    zero_stage: int = 0  # 0: the first of `SETTINGS` that fits
    offload: bool = False


# ZeRO stage and offload, by what they cost in time
SETTINGS = ((1, False), (2, False), (3, False), (2, True), (3, True))

CASES = {
    "7b": Case("7b", "1.1b", 2),
    "13b": Case("13b", "1.1b", 8),
    "70b": Case("70b", "7b", 64, machine="h100"),
}


@dataclass(frozen=True)
class Role:
    """A model's numbers: parameters, layers, width, and bytes of keys and values of a token."""

    parameters: int
    layers: int
    hidden: int
    cache: int = 0

    def forward(self, rows: float, tokens: int) -> float:
        """Operations of a forward over ``rows`` of ``tokens``: 2 a weight and token, and causal attention."""
        return rows * tokens * (2 * self.parameters + 2 * self.layers * self.hidden * tokens)


@dataclass(frozen=True)
class Phase:
    """A line of the table: seconds of computing and of moving ``moved`` bytes in and out of each GPU."""

    name: str
    compute: float
    moved: float
    moving: float


def ring(gpus: int) -> float:
    """The share of a message that a ring moves through each GPU when it is gathered or scattered: (n - 1) / n."""
    return (gpus - 1) / gpus


def gathered_bytes(parameters: int, gpus: int) -> float:
    """Bytes into each GPU when sharded weights are gathered once."""
    return ring(gpus) * WIDTH * parameters


def training_bytes(
    parameters: int, trained: int, *, stage: int, gpus: int, micro_batches: int, live: int = LIVE
) -> float:
    """Bytes in and out of each GPU in one optimizer step, as DeepSpeed 0.19 moves them.

    Args:
        parameters: of the model, a tied embedding twice. trained: those with a gradient.
        stage: ZeRO stage; 0 runs as 1.
        gpus: that share the batch.
        micro_batches: backwards of the step.
        live: parameters that may stay gathered from a forward to its backward.
    """
    if stage == 3:
        passes = 1 if parameters <= live else 2
        return micro_batches * (passes * gathered_bytes(parameters, gpus) + ring(gpus) * WIDTH * trained)
    reduced = micro_batches if stage == 2 else 1  # stage 2 keeps its share alone, so each backward is reduced
    all_reduced = 2 * ring(gpus) * WIDTH * trained
    return reduced * all_reduced + ring(gpus) * WIDTH * trained  # and the weights that others have stepped


def phases(case: Case, machine: Machine, roles: dict[str, Role], *, twin: bool, rests: bool = False) -> Iterator[Phase]:
    """The phases of one iteration.

    Args:
        case: its settings; backwards compute activations again (``--actor_gradient_checkpointing``).
        machine: of each GPU.
        roles: actor and critic; reference and reward model have their shapes.
        twin: the gathered actor fits, so that a round of rollouts gathers once; else each token gathers each layer.
        rests: it does while the optimizers' states are in the host's memory.
    """
    actor, tokens, sharded = roles["actor"], case.prompt + case.response, case.zero_stage == 3
    micro_batches, scorings = -(-case.rows // case.batch), -(-case.rows // (case.scored or case.batch))
    weights = actor.parameters * WIDTH
    cache = case.rows * (case.prompt + case.response / 2) * actor.cache
    step = max(
        actor.layers * machine.layer_ms / 1000,
        (weights + cache) / (machine.memory * machine.memory_reached * GB),
        machine.compute_seconds(2 * actor.parameters * case.rows),
    )
    gathers = 0 if not sharded else 1 if twin else case.response
    gathered = gathers * gathered_bytes(actor.parameters, case.gpus)
    share = sum(role.parameters for role in roles.values()) / case.gpus
    if rests:
        moved = 2 * STATES * share
        yield Phase("generation: states to the host and back", 0.0, moved, moved / (machine.host * GB))
    prefill = machine.compute_seconds(actor.forward(case.rows, case.prompt))
    yield phase("generation: prompts", prefill, 0.0, machine, case.gpus)
    yield phase("generation: responses", case.response * step, gathered, machine, case.gpus)
    for name, role, count in (("log-probs (actor, reference)", actor, 2), ("values, rewards", roles["critic"], 2)):
        moved = count * scorings * gathered_bytes(role.parameters, case.gpus) if sharded else 0.0
        operations = count * role.forward(case.rows, tokens)
        yield phase(f"scoring: {name}", machine.compute_seconds(operations), moved, machine, case.gpus)
    for name, role in roles.items():
        moved = training_bytes(
            role.parameters, role.parameters, stage=case.zero_stage, gpus=case.gpus, micro_batches=micro_batches
        )
        operations = 4 * role.forward(case.rows, tokens)  # forward, again, and twice as much backwards
        yield phase(f"training: {name}", machine.compute_seconds(operations), moved, machine, case.gpus)
    if case.offload:  # fp32 gradients to the host, 16-bit weights back; Adam reads and writes 28 bytes a weight there
        there, moving = 28 * share / (machine.host_memory * GB), (4 + WIDTH) * share / (machine.host * GB)
        yield Phase("step, on the host", there, (4 + WIDTH) * share, moving)
    else:
        yield Phase("step", 28 * share / (machine.memory * machine.memory_reached * GB), 0.0, 0.0)


def phase(name: str, compute: float, moved: float, machine: Machine, gpus: int) -> Phase:
    """A phase whose bytes go between GPUs."""
    return Phase(name, compute, moved, machine.link_seconds(moved, gpus))


def folder_of(shape: str, scratch: Path) -> str:
    """A folder with a model's configuration, made for a name of `SHAPES`."""
    if shape not in SHAPES:
        return shape
    from transformers import LlamaConfig

    common = {"vocab_size": 32000, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    LlamaConfig(**SHAPES[shape], **common).save_pretrained(scratch / shape)
    return str(scratch / shape)


# GiB of a GPU: held, and the peaks of training, of generation, of it with the states at rest, and through hooks
Needs = dict[str, float]


def memory(case: Case, scratch: Path) -> tuple[dict[str, Role], dict[tuple[int, bool], Needs]]:
    """The roles' numbers, and what each GPU needs with each of `SETTINGS`."""
    from training.step3_rlhf_finetuning import arguments as flags
    from training.step3_rlhf_finetuning.plan import RoleCosts, rlhf_plan, states_that_rest
    from training.utils.arguments import LoraArguments
    from training.utils.memory import plan as plans

    os.environ["WORLD_SIZE"] = str(case.gpus)
    actor, critic = (
        plans.fake_role(folder_of(shape, scratch), "bf16", "sdpa", LoraArguments(), classifier=classifier)
        for shape, classifier in ((case.actor, False), (case.critic, True))
    )
    size = {"actor": plans.role_size(actor).parameters, "critic": plans.role_size(critic).parameters}
    costs = RoleCosts(actor, critic, critic, case.prompt, case.response, size["critic"])
    roles = {}
    for name, model in (("actor", actor), ("critic", critic)):
        config: Any = model.module.config
        cache = costs.cache_bytes_per_token if name == "actor" else 0
        roles[name] = Role(size[name], config.num_hidden_layers, config.hidden_size, cache)
    batch = {"per_device_training_batch_size": case.batch, "gradient_accumulation_steps": 2}
    rollout = flags.RolloutArguments(case.prompt, case.response, case.rows)
    train = flags.OptimizationArguments(**batch)  # type: ignore[arg-type]
    found = {}
    for stage, offload in SETTINGS:
        settings = plans.Settings(stage, offload, True, case.batch, case.rows, True, case.scored)
        zero, of_roles = flags.RoleZeroArguments(stage, stage, offload=offload), flags.RoleArguments(dtype="bf16")
        plan = rlhf_plan(costs, settings, of_roles, rollout, train, zero, {}, (stage, stage), on_cpu=False)
        twin = next(p for p in plan.phases if p.name == "generation").parts["gathered twin"]
        need = {p.name: plan.need(p) / GIB for p in plan.phases}
        at_generation = need.pop("generation")
        found[stage, offload] = {
            "held": plan.resident() / GIB,
            "peak": max(need.values()),
            "generation": at_generation,
            "rested": at_generation - states_that_rest(plan) / GIB,
            "hooked": at_generation - twin / GIB,
        }
    return roles, found


def show(case: Case, machine: Machine, scratch: Path) -> None:
    """Print a case: memory by setting, then the phases with the setting asked for, or the first that fits."""
    roles, needs = memory(case, scratch)
    free = machine.memory_gib
    print(f"\n### {case.actor} actor, {case.critic} critic, {case.gpus} GPUs ({case.machine})\n")
    print(
        f"On each GPU {case.rows} rows of {case.prompt} + {case.response} tokens, micro-batches of {case.batch}, "
        f"{case.scored or case.batch} scored together, bf16, "
        "gradient checkpointing.\n"
    )
    names = ("held, GiB", "training, scoring, saving", "generation", "states at rest", "through hooks")
    print(head_of("ZeRO", *names, f"in {free:g} GiB"))
    for setting, need in needs.items():
        cells = [f"{need[name]:.1f}" for name in ("held", "peak", "generation", "rested", "hooked")]
        print(row_of(told(*setting), *cells, verdict(need, free)))
    if not case.zero_stage:
        fit = [setting for setting, need in needs.items() if verdict(need, free) != NOT]
        if not fit:
            print("\nNothing fits: more GPUs, LoRA with --only_optimize_lora, or a smaller micro-batch.")
            return
        case = replace(case, zero_stage=fit[0][0], offload=fit[0][1])
    setting = (case.zero_stage, case.offload)
    twin, rests = gathers(needs[setting], free) if setting in needs else (True, False)
    print(f"\nZeRO {told(*setting)}:\n")
    show_phases(case, list(phases(case, machine, roles, twin=twin, rests=rests)))


def told(stage: int, offload: bool) -> str:
    """A setting in words."""
    return f"{stage}, --offload" if offload else str(stage)


def show_phases(case: Case, found: list[Phase]) -> None:
    """Print the phases of an iteration and what they come to."""
    least, most = sum(max(p.compute, p.moving) for p in found), sum(p.compute + p.moving for p in found)
    print(head_of("phase", "computing, s", "moved, GB", "moving, s", "at least, s", "share"))
    for p in found:
        longer = max(p.compute, p.moving)
        cells = f"{p.compute:.2f}", f"{p.moved / GB:.1f}", f"{p.moving:.2f}", f"{longer:.2f}", f"{longer / least:.0%}"
        print(row_of(p.name, *cells))
    answers = case.rows * case.gpus
    print(
        f"\nAn iteration of {answers} responses takes {least:.1f} s if moving hides behind computing, {most:.1f} s if "
        f"it does not: {answers / most:.1f} to {answers / least:.1f} responses a second."
    )


NOT, FITS, RESTS, HOOKS = "does not fit", "fits", "fits, states at rest", "fits, through the hooks"


def gathers(need: Needs, free: float) -> tuple[bool, bool]:
    """Whether a rollout has the whole actor, and whether only while the optimizers' states are at rest."""
    fits = need["generation"] <= free
    return fits or need["rested"] <= free, not fits and need["rested"] <= free


def verdict(need: Needs, free: float) -> str:
    """Whether a stage fits, and how it generates."""
    twin, rests = gathers(need, free)
    if need["peak"] > free or not (twin or need["hooked"] <= free):
        return NOT
    return RESTS if rests else FITS if twin else HOOKS


def chosen(arguments: argparse.Namespace) -> list[tuple[Case, Machine]]:
    """The cases of the command line."""
    cases = [CASES[arguments.case]] if arguments.case else list(CASES.values())
    given = {name: value for name in ("actor", "critic", "gpus", "zero_stage", "rows", "batch", "scored", "offload")
             if (value := getattr(arguments, name)) is not None}  # fmt: skip
    if arguments.actor:
        cases = [replace(CASES["7b"], **{"critic": arguments.actor} | given)]
    found = []
    for case in cases:
        case, machine = replace(case, **given), MACHINES[case.machine]
        if arguments.machine in MACHINES:
            case, machine = replace(case, machine=arguments.machine), MACHINES[arguments.machine]
        elif arguments.machine:
            case, machine = replace(case, machine="own numbers"), replace(machine, **json.loads(arguments.machine))
        found.append((case, machine))
    return found


def main() -> int:
    """Parse flags, print every case."""
    parser = flags_of(__doc__)
    parser.add_argument("--case", choices=CASES, help="one case of docs/scaling.md")
    parser.add_argument("--actor", help=f"folder with a config.json, or one of {', '.join(SHAPES)}")
    parser.add_argument("--critic", help="of critic and reward model (default: the actor's, or the case's)")
    parser.add_argument("--gpus", type=int)
    parser.add_argument("--machine", help=f"one of {', '.join(MACHINES)}, or JSON over the case's: see Machine")
    parser.add_argument("--zero_stage", type=int, choices=(1, 2, 3))
    parser.add_argument("--rows", type=int, help="responses of an iteration, per GPU")
    parser.add_argument("--batch", type=int, help="rows of a micro-batch")
    parser.add_argument("--scored", type=int, help="rows of a forward that scores (default: of a micro-batch)")
    parser.add_argument("--offload", action="store_true", default=None)
    arguments = parser.parse_args()
    try:
        cases = chosen(arguments)
    except (json.JSONDecodeError, TypeError) as error:
        parser.error(f"--machine {arguments.machine}: {error}")
    machines = {case.machine: machine for case, machine in cases}
    for name, machine in machines.items():
        print(f"{name}: " + ", ".join(f"{key} {value:g}" for key, value in vars(machine).items()))
    with tempfile.TemporaryDirectory() as scratch:
        for case, machine in cases:
            show(case, machine, Path(scratch))
    return 0


if __name__ == "__main__":
    sys.exit(main())
