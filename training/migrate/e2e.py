"""The flags of DeepSpeed-Chat's e2e_rlhf.py, which starts its three steps, as those of train.py."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.migrate.e2e_scripts import SCRIPTS, SINGLE
from training.migrate.program import Program, Translation, as_text, as_words
from training.utils.arguments import OtherFlag
from training.utils.errors import UserError
from training.utils.run.recipes import GIVEN, read_recipe

SIZE = "facebook/opt-{}"  # of a model that is named by its size alone
HOSTFILE = Path("/job/hostfile")  # DeepSpeed's default
ZERO = OtherFlag(
    str, said="the step's stage and its role's, in `--stepN_args`", choices=("", "0", "1", "2", "3"), settled=True
)
E2E: Mapping[str, OtherFlag] = {
    "--step": OtherFlag(int, ours="--step", many=True, choices=(1, 2, 3)),
    "--actor-model": OtherFlag(str, "1.3b", said="`--actor_model_name_or_path`, a size is an OPT", settled=True),
    "--reward-model": OtherFlag(str, "350m", said="`--reward_model_name_or_path`, a size is an OPT", settled=True),
    "--actor-zero-stage": ZERO,
    "--reward-zero-stage": ZERO,
    "--output-dir": OtherFlag(str, "./output", said="`--output_dir`, with step1, step2, step3 in it", settled=True),
    "--deployment-type": OtherFlag(
        str,
        "single_gpu",
        said="`--num_gpus`: 1, or all; several hosts: `--hostfile`",
        choices=("single_gpu", "single_node", "multi_node"),
        settled=True,
    ),
}
STAGES = {"--actor-zero-stage": ((1, "--zero_stage"), (3, "--actor_zero_stage")),
          "--reward-zero-stage": ((2, "--zero_stage"), (3, "--critic_zero_stage"))}  # fmt: skip
FOLDERS = {"--actor-model": ("actor-models", "step1"), "--reward-model": ("reward-models", "step2")}
DATA, SPLIT, RECIPE = "Dahoas/rm-static", "2,4,4", "start"
NAMES = {"--actor-model": "--actor_model_name_or_path", "--reward-model": "--reward_model_name_or_path"}


def gpus_here() -> int:
    """GPUs that deepspeed's launcher would take: the visible ones, or 1 process where there is none."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len(visible.split(",")) if visible else len(list(Path("/dev").glob("nvidia[0-9]*"))) or 1


def model_of(flag: str, name: str, steps: Sequence[int], output_dir: str) -> str:
    """The model that ``--actor-model`` or ``--reward-model`` means by a size, a name of the hub, or a folder.

    Where the model's own step is none of the ``steps`` that run, an earlier run has made it, in ``output_dir``.

    Raises:
        UserError: it is not where that run would have left it.
    """
    size = name.removeprefix("facebook/opt-")
    if "/" in size:
        return name
    folder, step = FOLDERS[flag]
    if int(step[4:]) in steps:
        return SIZE.format(size)
    made = Path(output_dir) / folder / size
    if not made.is_dir():
        raise UserError(f"{flag} {name} is what an earlier {step} has made: give its folder, {NAMES[flag]} RUN/{step}")
    return str(made)


def as_train_flags(given: Mapping[str, str], steps: Sequence[int], *, hostfile: bool) -> dict[str, str]:
    """Flags of e2e_rlhf.py as flags of train.py; those of single steps are texts in ``--stepN_args``.

    ``steps`` are those that run; ``hostfile``: the command names one.

    Raises:
        UserError: a value can not be had.
    """
    found: dict[str, str] = {}
    for flag, name in NAMES.items():
        if flag in given:
            found[name] = model_of(flag, given[flag], steps, given.get("--output-dir", "./output"))
    if given.get("--output-dir"):
        found["--output_dir"] = given["--output-dir"]
    for flag, places in STAGES.items():
        for step, name in places if given.get(flag) else ():
            key = f"--step{step}_args"
            found[key] = f"{found.get(key, '')} {name} {given[flag]}".strip()
    where = given.get("--deployment-type")
    if where == "multi_node" and not hostfile:
        if not HOSTFILE.is_file():
            raise UserError("--deployment-type multi_node: name the hosts: --hostfile HOSTS")
        found["--hostfile"] = str(HOSTFILE)
    elif where in ("single_gpu", "single_node"):
        found["--num_gpus"] = str(1 if where == "single_gpu" else gpus_here())
    return found


def rewritten(argv: Sequence[str]) -> list[str]:
    """train.py's arguments with e2e_rlhf.py's replaced; what stands for the same beside them wins.

    ``argv`` has ``--stepN_args=TEXT`` as one token each.

    Raises:
        UserError: a value that e2e_rlhf.py would not take, or that can not be had.
    """
    rest, given = list[str](), dict[str, str]()
    tokens = list(argv)
    while tokens:
        name, equals, value = tokens.pop(0).partition("=")
        flag = "--" + name[2:].replace("_", "-")
        if not name.startswith("--") or flag not in E2E or flag in ("--step", "--output-dir"):
            rest.append(name + equals + value)
            continue
        if not equals and (not tokens or tokens[0].startswith("--")):
            raise UserError(f"{name}: expected one value")
        given[flag] = value if equals else tokens.pop(0)
        if E2E[flag].choices and given[flag] not in E2E[flag].choices:
            raise UserError(f"{name} {given[flag]} is none of {', '.join(map(str, E2E[flag].choices))}")
    if not given:
        return list(argv)
    names = {token.partition("=")[0] for token in rest}
    behind = rest[rest.index("--step") + 1 :] if "--step" in rest else []
    steps = [int(text) for text in itertools.takewhile(str.isdigit, behind)]
    for name, value in as_train_flags(given, steps or [1, 2, 3], hostfile="--hostfile" in names).items():
        own = next((i for i, token in enumerate(rest) if token.startswith(f"{name}=")), None)
        if name.endswith("_args") and own is not None:  # what the user writes there comes last, and counts
            rest[own] = f"{name}={value} {rest[own].partition('=')[2]}"
        elif name not in names:
            rest += [f"{name}={value}"] if name.endswith("_args") else [name, value]
    return rest


def script_flags(
    step: int, deployment: str, size: str, ranks: int, source: str = "DeepSpeed-Chat"
) -> tuple[str, list[str]] | None:
    """What a script of e2e_rlhf.py gives a step of ``source``, as flags here, and what has changed; None if not known.

    Raises:
        UserError: it can not be had here.
    """
    from training.migrate.translate import OURS, defaults_of, translate  # which knows the programs, this one too

    if (deployment, size) not in SCRIPTS[step]:
        return None
    ours = OURS[f"step{step}"]
    paths = [f"--{name}" for name in GIVEN[f"step{step}"]]  # train.py gives them
    command = ["deepspeed --num_gpus", str(ranks), ours.script, *(f"{flag} PATH" for flag in paths)]
    made = translate(" ".join([*command, SCRIPTS[step][deployment, size]]), source)
    flags = {name: values for name, values in made.flags.items() if name not in (*paths, "--data_split")}
    if flags.get("--data_path") == [DATA]:
        del flags["--data_path"]
    defaults = defaults_of(ours)
    for name in read_recipe(RECIPE)[1][f"step{step}"]:  # what the script leaves open is not for the recipe to say
        if f"--{name}" not in flags:
            flags[f"--{name}"] = as_text(defaults[f"--{name}"])
    return " ".join(as_words(flags)), [line for line in made.lines if "--data_" not in line]


def settle_e2e(t: Translation, source: str = "DeepSpeed-Chat", split: str = SPLIT) -> None:
    """Take over what the end-to-end script's flags say: models, ZeRO stages, ranks, and the flags of its steps.

    ``source`` is the project, which divides the data by ``split`` where a step's script does not say.
    """
    steps = [int(text) for text in t.given.get("--step", [])] or [1, 2, 3]
    given = {name: str(t.theirs(name)) for name in E2E if name != "--step" and t.theirs(name) not in (None, "")}
    try:
        for name, value in as_train_flags(given, steps, hostfile="--hostfile" in t.given).items():
            t.set(name, value, "as e2e_rlhf.py has it")
    except UserError as error:
        t.refused.append(str(error))
    t.set("--data_path", DATA, "the data of its scripts")
    t.set("--data_split", split if given["--deployment-type"] == SINGLE else SPLIT, "the data of its scripts")
    t.set("--recipe", RECIPE, "this project's values for own data")
    folder = given["--deployment-type"]
    for step in steps:
        size = given["--reward-model" if step == 2 else "--actor-model"].removeprefix("facebook/opt-")
        script, name = f"{folder}/run_{size}.sh of step {step}", f"--step{step}_args"
        try:
            found = script_flags(step, folder, size, int(t.values.get("--num_gpus", ["1"])[0]), source)
        except UserError as error:
            t.refused.append(f"{script}: {error}")
            continue
        if found is None:
            t.lines.append(f"batch sizes and rates are in {script}: translate it, and give them as {name}")
            continue
        flags, changed = found
        asked = t.values.pop(name, [""])[0]  # what e2e_rlhf.py gives a script counts
        t.set(name, f"{flags} {asked}".strip(), script)
        t.lines += [f"step {step}: {line}" for line in changed]


PROGRAM = Program("all three steps", ("e2e_rlhf.py", "deepspeed-chat/train.py"), "train", E2E, settle=settle_e2e)
