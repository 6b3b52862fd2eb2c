"""The flags that train.py passes to every step: those that the dataclasses of all steps have; without torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from training.migrate.predecessors import others_of
from training.step3_rlhf_finetuning.arguments import ALIASES, ARGUMENTS as STEP3, check
from training.utils.arguments import DPO, STEP1, STEP2, OtherFlag, check_fine_tuning, fields_of, flags_in, parse
from training.utils.errors import UserError
from training.utils.run.folders import title

GROUPS: Mapping[str, Sequence[type]] = {"step1": STEP1, "step2": STEP2, "dpo": DPO, "step3": STEP3}
OWN = ("output_dir", "resume", "plan")  # of train.py itself, with a meaning for the whole run


_FLAGS = {name: fields_of(groups) for name, groups in GROUPS.items()}

# Step 1's field stands for all: where step 3 takes a value for each role, one counts for both. None is "not given".
SharedArguments: type = dataclasses.make_dataclass(
    "SharedArguments",
    [
        (name, hint, dataclasses.field(default=None, metadata=field.metadata))
        for name, (hint, field) in _FLAGS["step1"].items()
        if name not in OWN and all(name in flags for flags in _FLAGS.values())
    ],
    namespace={"__doc__": "Flags of every step (defaults: see each step's --help)"},
)


def flag_names(name: str, argv: Sequence[str]) -> set[str]:
    """The flags in a step's arguments, without dashes, each under the name that it has here."""
    others = _others(name)
    own = {other.removeprefix("--"): flag.ours.removeprefix("--") for other, flag in others.items() if flag.ours}
    return {own.get(given, given) for given in flags_in(argv)}


def _others(name: str) -> dict[str, OtherFlag]:
    return others_of(name) | (ALIASES if name == "step3" else {})


def parse_step(name: str, argv: Sequence[str]) -> list[Any]:
    """What a step's program makes of its arguments, without starting it.

    Raises:
        UserError: it would refuse them.
    """
    try:
        groups = parse(GROUPS[name], argv, prog=f"{name}/main.py", description="", others=_others(name))
        return check(groups) if name == "step3" else check_fine_tuning(groups)
    except UserError as error:
        raise UserError(f"{title(name)}: {error}") from None


def refuse_flags_of_some_steps(argv: Sequence[str], known: Sequence[type]) -> None:
    """Say where a flag in train.py's arguments belongs that only some steps have; ``known`` are its own groups.

    Raises:
        UserError: there is such a flag.
    """
    own = {field.name for group in known for field in dataclasses.fields(group)}
    for name in flags_in(argv):
        steps = [step for step, flags in _FLAGS.items() if name in flags]
        if steps and name not in own and name != "model_name_or_path":
            named = ", ".join(title(step) for step in steps)
            where = " or ".join(f"--{step}_args" for step in steps)
            raise UserError(f'--{name} is a flag of {named} alone: give it there, {where} "--{name} ..."')
