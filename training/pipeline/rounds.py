"""Rounds after the pipeline: answer with the current actor, judge, train reward model and actor again.

What PPO has learned to please is mended by judgements of what it writes now (Ouyang et al. 2022, arXiv 2203.02155,
section 3.4; Bai et al. 2022, arXiv 2204.05862, section 4.5). Each round is a run directory in the run, ``round1`` and
so on, with its own manifest and report, its answers and rankings, step2 and step3. The rankings are divided by the
prompt: ``rankings/train.jsonl`` trains the reward models of this and later rounds, ``rankings/eval.jsonl`` none.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import shlex
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.pipeline.paths import arguments_of
from training.utils import arguments
from training.utils.answers import Line, prompt_id, read_answers, write_lines
from training.utils.arguments import DEMO, flags_in
from training.utils.errors import UserError
from training.utils.run.files import once_each, read_object, write_json
from training.utils.run.folders import EVALUATION, is_finished, make_dir, repository_root, shown, title
from training.utils.run.manifest import read_manifest
from training.utils.run.processes import last_lines, run_logged, unused_port
from training.utils.run.recipes import GIVEN

PROGRAMS = {
    "generate": "inference/generate.py",
    "judge": "inference/judge.py",
    "rank": "inference/rank.py",
    "evaluate": "training/step2_reward_model_finetuning/evaluate.py",
}
ROUNDS_FILE = "rounds.json"
PEOPLE = "people"  # where the page leaves what people say
HELD_OUT = 5  # one prompt in so many judges the reward models
# Flags of step 3 by which its prompts are read and its answers sampled
SAMPLED_LIKE = (
    *("data_path", "data_split", "eval_data_path", "column_map", "on_bad_row", "data_output_path", "seed"),
    *("max_prompt_seq_len", "max_answer_seq_len", "per_device_generation_batch_size", "rollout_engine"),
    *("vllm_python", "temperature", "top_p", "top_k", "dtype"),
)


@dataclass
class RoundArguments:
    """Rounds"""

    rounds: int = arguments.flag(
        0, "after the steps so many rounds: answers, judgements, steps 2 and 3 again", minimum=0
    )
    rounds_from: str = arguments.flag(
        "sft", "what a round's step 3 starts from: the SFT model, or the actor of the round before",
        choices=("sft", "actor"),
    )  # fmt: skip
    generate_args: str = arguments.flag("", 'flags of inference/generate.py, such as "--samples_per_prompt 6"')
    judge_args: str = arguments.flag(
        "", 'flags of inference/judge.py, such as "--judge rules.py:score" (default: people judge, on the page)'
    )

    def __post_init__(self) -> None:
        for name, given in (("generate_args", ("model", "output")), ("judge_args", ("answers", "output"))):
            try:
                found = flags_in(shlex.split(getattr(self, name)))
            except ValueError as error:
                raise UserError(f"--{name}: {error}") from error
            if own := next((flag for flag in given if flag in found), None):
                raise UserError(f"--{name}: --{own} is given by train.py")


def check_flags(flags: RoundArguments, given: Collection[str], replaced: Mapping[str, str]) -> None:
    """Ask the programs of a round what they make of their flags, before the steps that come first take hours.

    ``given`` are names of the flags of this start; those ``replaced`` of `PROGRAMS` are not asked.

    Raises:
        UserError: one would refuse them, or there would be nothing to compare; names the flag of train.py.
    """
    if not flags.rounds:
        if idle := next((name for name in ("generate_args", "judge_args", "rounds_from") if name in given), None):
            raise UserError(f"--{idle} is for --rounds, which is not given")
        return
    sys.path.append(str(repository_root() / "inference"))
    for name, given in (("generate", ["--model", "actor=embedded"]), ("judge", ["--answers", "answers.jsonl"])):
        own = shlex.split(getattr(flags, f"{name}_args"))
        if not own or name in replaced:
            continue
        try:
            options, *_ = importlib.import_module(name).parse_flags([*given, *own])
        except UserError as error:
            raise UserError(f"--{name}_args: {error}") from None
        if name == "generate" and (options.best_of or options.count == 1):
            raise UserError("--generate_args: a round compares the answers to a prompt: --samples_per_prompt 2 or more")


@dataclass(frozen=True)
class Rounds:
    """A run whose steps are finished, and what its rounds need.

    Attributes:
        run: its folder.
        flags: the rounds'.
        launcher: what starts a program on the ranks.
        train: train.py's own main, argv -> exit code.
        how: flags of train.py that say where it runs: ranks, hosts.
        again: the command that goes on with the run.
        programs: see `PROGRAMS`; others for tests.
    """

    run: Path
    flags: RoundArguments
    launcher: Sequence[str]
    train: Callable[[Sequence[str]], int]
    how: Sequence[str]
    again: str
    programs: Mapping[str, str]

    def folder(self, number: int) -> Path:
        """The folder of a round; that of round 0 is the run's own."""
        return self.run / f"round{number}" if number else self.run

    def go(self) -> int:
        """Run the rounds that are left; returns the exit code, 0 also where people have to judge first.

        Raises:
            UserError: rankings can not be used.
        """
        for number in range(1, self.flags.rounds + 1):
            if is_finished(self.folder(number) / "step3"):
                print(f"round {number} is finished", flush=True)
            else:
                self._forget(number)
                code = self._judgements(number)
                if code or not (self.folder(number) / "rankings").is_dir():
                    return code
                if code := self._training(number):
                    return code
            if code := self._agreement(number):
                return code
        self._tell()
        return 0

    def _judgements(self, number: int) -> int:
        """Answers of the current actor, and their order, into ``rankings/``; the exit code."""
        folder = make_dir(self.folder(number))
        answers, rankings = folder / "answers.jsonl", folder / "rankings.jsonl"
        if (folder / "rankings").is_dir():  # training may have begun with them
            return 0
        named = ["--model", f"round{number - 1}={shown(self.folder(number - 1) / 'step3' / 'actor')}"]
        argv = arguments_of(read_manifest(self.run)["steps"]["step3"], self.run)
        like = [token for flag in SAMPLED_LIKE for token in _given(argv, flag)]
        like = like if "data_path" in flags_in(like) else ["--data_path", DEMO, *like]
        own = shlex.split(self.flags.generate_args)
        given = [*named, "--split", "train", *like, "--output", shown(answers), *own]
        if code := self._start("generate", number, given, ranks=True):
            return code
        if self.flags.judge_args:
            given = ["--answers", shown(answers), "--output", shown(rankings), *shlex.split(self.flags.judge_args)]
            if code := self._start("judge", number, given):
                return code
        elif not (rankings := folder / PEOPLE / "rankings.jsonl").is_file() or not rankings.read_text("utf-8").strip():
            # the page makes the file when it starts
            given = ["--answers", shown(answers), "--output_dir", shown(folder / PEOPLE)]
            page = shlex.join([shown(sys.executable), self._program("rank"), *given])
            print(f"\nround {number} waits for people to put its answers in an order:  {page}\n"
                  f"They may stop at any time; then go on with the run:  {self.again}", flush=True)  # fmt: skip
            return 0
        divide(rankings, answers, folder / "rankings")
        return 0

    def _training(self, number: int) -> int:
        """Steps 2 and 3 of a round, by train.py, with the flags of the run's own; the exit code."""
        folder, steps = self.folder(number), read_manifest(self.run)["steps"]
        argvs = {step: arguments_of(steps[step], self.run) for step in ("step2", "step3")}
        sections = {step: section_of(argv, step) for step, argv in argvs.items()}
        rankings = [shown(self.folder(i) / "rankings") for i in range(1, number + 1)]
        for name in ("data_path", "eval_data_path"):
            if (before := sections["step2"].get(name)) or name == "data_path":
                sections["step2"][name] = [*(before if isinstance(before, list) else [before or DEMO]), *rankings]
        sections["step3"].setdefault("data_path", DEMO)
        write_json(folder / "recipe.yaml", sections)  # JSON is YAML, too
        sft = flags_in(argvs["step3"])["actor_model_name_or_path"][0]
        start = sft if self.flags.rounds_from == "sft" else shown(self.folder(number - 1) / "step3" / "actor")
        print(f"\n== round {number}: reward model and PPO, in {shown(folder)}", flush=True)
        return self.train(
            ["--recipe", str(folder / "recipe.yaml"), "--output_dir", shown(folder), "--pipeline", "sft,rm,ppo",
             "--step", "2", "3", "--actor_model_name_or_path", start, "--reward_model_name_or_path", sft, *self.how]
        )  # fmt: skip

    def _agreement(self, number: int) -> int:
        """How far reward models agree with held-out judgements: the new one with all, the one before with the new."""
        path = self.run / ROUNDS_FILE
        known = _read_rounds(path)
        if str(number) in known["agreement"]:
            return 0
        found: dict[str, Any] = {}
        for model, rounds in ((number - 1, [number]), (number, range(1, number + 1))):
            rankings = [shown(self.folder(i) / "rankings") for i in rounds]
            step2 = self.folder(model) / "step2"
            given = ["--path", shown(step2), "--data_path", *rankings, "--eval_data_path", *rankings]
            if code := self._start("evaluate", number, given):
                return code
            by_source = read_object(step2 / EVALUATION).get("by_source", {})
            found[f"reward model of round {model}"] = {
                f"round {i}": by_source[source]
                for i, source in zip(rounds, rankings, strict=True)
                if source in by_source
            }
        known["agreement"][str(number)] = found
        write_json(path, known)
        return 0

    def _forget(self, number: int) -> None:
        """Drop what is known of a round that was removed and comes again."""
        known = _read_rounds(self.run / ROUNDS_FILE)
        if known["agreement"].pop(str(number), None) is not None:
            write_json(self.run / ROUNDS_FILE, known)

    def _program(self, name: str) -> str:
        return shown(repository_root() / self.programs.get(name, PROGRAMS[name]))

    def _start(self, name: str, number: int, given: Sequence[str], ranks: bool = False) -> int:
        """Run one of `PROGRAMS`, its output in the round's log of that name; the exit code."""
        before = [*self.launcher, "--master_port", str(unused_port())] if ranks else [shown(sys.executable)]
        command = [*before, self._program(name), *given]
        print(f"\n== round {number}: {name}\n{shlex.join(command)}\n", flush=True)
        log = self.folder(number) / f"{name}.log"
        ended = run_logged(command, log)
        if ended.code:
            lines = [f"\nround {number}: {name} ended with exit code {ended.code}. The last lines of {shown(log)}:"]
            lines += [f"    {line}" for line in last_lines(log)]
            print("\n".join([*lines, f"To go on with the run:  {self.again}"]), file=sys.stderr, flush=True)
        return ended.code

    def _tell(self) -> None:
        """The rounds side by side: reward, independent checks, KL, agreement with held-out judgements."""
        known = _read_rounds(self.run / ROUNDS_FILE)
        rows = [self._numbers(number, known) for number in range(self.flags.rounds + 1)]
        names = list(dict.fromkeys(name for row in rows for name in row))
        head = ["", "SFT", *("PPO" if not number else f"round {number}" for number in range(len(rows)))]
        sft = _summary(self.run)
        before = {"held-out reward, by its own model": sft.get("reward_before")}
        before |= {check["name"]: check.get("before") for check in _checks(sft)}
        body: list[list[Any]] = [[name, *(row.get(name) for row in (before, *rows))] for name in names]
        write_json(self.run / ROUNDS_FILE, known | {"table": [head, *body]})
        cells = [
            [f"{cell:.3f}" if isinstance(cell, float) else str(cell or "") for cell in row] for row in (head, *body)
        ]
        widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
        for name, *values in cells:
            print("  ".join([name.ljust(widths[0]), *(v.rjust(w) for v, w in zip(values, widths[1:], strict=True))]))
        pages = [shown(self.folder(number) / "report.html") for number in range(len(rows))]
        print(f"\nReports: {' '.join(pages)}", flush=True)

    def _numbers(self, number: int, known: Mapping[str, Any]) -> dict[str, Any]:
        summary = _summary(self.folder(number))
        found = {"held-out reward, by its own model": summary.get("reward_after")}
        found |= {check["name"]: check.get("after") for check in _checks(summary)}
        found["KL to where it started"] = summary.get("kept", {}).get("kl")
        found["tokens of an answer"] = summary.get("length_after")
        for judged_in in (number, number + 1):
            agreed = known["agreement"].get(str(judged_in), {})
            for source, value in agreed.get(f"reward model of round {number}", {}).items():
                found[f"reward model right on judgements of {source}"] = value["accuracy"]
        return found


def check_run(run: Path, planned: Sequence[str], rounds: int) -> None:
    """Refuse rounds of a run that will have no reward model and actor of its own, or that were made from others.

    ``planned`` are the steps that are run before the rounds.

    Raises:
        UserError: names the step, or the round's folder.
    """
    again = next((title(step) for step in planned if not is_finished(run / step)), "")
    for number in range(1, rounds + 1):
        if again and (folder := run / f"round{number}").is_dir():
            raise UserError(f"{shown(folder)} was made from another {again} than that which is to come: remove it, or "
                            "move it away (--data_path of step 2 takes its rankings)")  # fmt: skip
        if not is_finished(run / f"round{number}" / "step3"):
            again = again or f"round {number}"
    for step in ("step2", "step3"):
        if step not in planned and not is_finished(run / step):
            raise UserError(
                f"--rounds trains step 2 and step 3 of a run again, and {shown(run)} has no finished {step}"
            )


def _read_rounds(path: Path) -> dict[str, Any]:
    """What is known of the rounds so far; a damaged file is refused."""
    known = {"agreement": {}} | read_object(path)
    agreement = known["agreement"]
    if not isinstance(agreement, dict) or not all(isinstance(found, dict) for found in agreement.values()):
        raise UserError(f"{shown(path)} is damaged: agreement is not what a round writes; remove the file")
    return known


def _summary(folder: Path) -> dict[str, Any]:
    return read_object(folder / "step3" / "summary.json")


def _checks(summary: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return summary.get("eval_functions") or []


def _given(argv: Sequence[str], name: str) -> list[str]:
    """A flag with its values, as it stands in a command line the last time; empty where it does not."""
    values = flags_in(argv).get(name)
    return [] if values is None else [f"--{name}", *values]


def section_of(argv: Sequence[str], step: str) -> dict[str, Any]:
    """A step's arguments as a recipe's section, without what train.py gives itself."""
    off = {token[5:].replace("-", "_") for token in argv if token.startswith("--no-")}
    found: dict[str, Any] = {}
    for name, values in flags_in(argv).items():
        if name not in GIVEN[step]:
            found[name] = name not in off if not values else values[0] if len(values) == 1 else values
    return found


def divide(rankings: Path, answers: Path, folder: Path) -> None:
    """Divide rankings by their prompts into a folder's train.jsonl and eval.jsonl, the same way in every round.

    ``answers`` are what judge.py or rank.py has made rankings of, to say how many prompts have been judged.

    Raises:
        UserError: fewer than two prompts have been judged with a difference.
    """
    lines = read_rankings(rankings)
    places = {line["id"]: int(hashlib.sha256(line["id"].encode()).hexdigest(), 16) for line in lines}
    useful = {line["id"] for line in lines if len({answer.get("rank") for answer in line["answers"]}) > 1}
    if len(useful) < 2:
        raise UserError(f"{shown(rankings)}: {len(useful)} prompts have answers that differ in rank; two are needed, "
                        "one to train on and one to judge by")  # fmt: skip
    held_out = {name for name in useful if places[name] % HELD_OUT == 0} or {min(useful, key=places.__getitem__)}
    if held_out == useful:
        held_out.remove(max(useful, key=places.__getitem__))
    scratch = make_dir(folder.with_name(f"{folder.name}.tmp"))
    write_lines(scratch / "eval.jsonl", [line for line in lines if line["id"] in held_out])
    write_lines(scratch / "train.jsonl", [line for line in lines if line["id"] not in held_out])
    scratch.rename(folder)
    count = len(read_answers(answers, "answers"))
    print(f"{len(places)} of {count} prompts have been judged, {len(useful)} with a difference: {len(held_out)} of "
          "these judge the reward models, the others train them", flush=True)  # fmt: skip


def read_rankings(path: Path) -> list[Line]:
    """The lines of a file of rankings, ``id`` in each; several judges may have judged a prompt.

    Raises:
        UserError: a line is no ranking.
    """
    lines = []
    with path.open(encoding="utf-8") as file:  # not splitlines: an answer may hold U+2028, which JSON leaves as it is
        for number, text in enumerate(file, 1):
            try:
                line = json.loads(text, object_pairs_hook=once_each)
                line.setdefault("id", prompt_id(line["prompt"]))
                sound = isinstance(line["id"], str) and all("rank" in answer for answer in line["answers"])
            except (ValueError, LookupError, TypeError, AttributeError):
                sound = False
            if not sound:
                raise UserError(f"{shown(path)}:{number}: no ranking, a prompt and its answers with a rank each")
            lines.append(line)
    return lines
