"""Command lines of the predecessors' scripts and pages, and what becomes of each: a table.

python -m tests.migrate.commands
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shlex
from pathlib import Path
from typing import Any

from training.migrate.predecessors import PREDECESSORS
from training.migrate.translate import Translated, translate
from training.utils import arguments
from training.utils.errors import UserError

FILE = (
    Path(os.environ.get("TRIPOD_CASES") or Path(__file__).resolve().parents[3] / "shared" / "cases") / "commands.jsonl"
)
NAMES = {"dschat": "DeepSpeed-Chat", "alpaca": "alpaca-rlhf", "colossal": "ColossalChat", "openchat": "open-chatgpt"}
CHAT = {
    "1": "training/step1_supervised_finetuning/main.py",
    "2": "training/step2_reward_model_finetuning/main.py",
    "3": "training/step3_rlhf_finetuning/main.py",
    "dpo": "training/step2_dpo_finetuning/main.py",
    "eval1": "training/step1_supervised_finetuning/prompt_eval.py",
    "eval2": "training/step2_reward_model_finetuning/rw_eval.py",
    "e2e": "e2e_rlhf.py",
    "chat": "DeepSpeed-Chat/chat.py",
    "gradio": "alpaca_rlhf/inference/llama_chatbot_gradio.py",
}
QUOTED = ("--fsdp",)
# Of the other two a line's flags decide: the program that knows them
OTHERS = {
    "ColossalChat": {"1": ["train_sft.py"], "2": ["train_rm.py"], "3": ["train_ppo.py", "train_grpo.py"],
                     "dpo": ["train_dpo.py", "train_kto.py", "train_orpo.py"]},
    "open-chatgpt": {"1": ["train_alpaca.py", "train_alpaca_lora.py", "pt/train.py"]},
}  # fmt: skip


def cases() -> list[tuple[str, str, dict[str, Any]]]:
    """(predecessor, step, flag -> value) of every line; none where the file is not at hand."""
    if not FILE.is_file():
        return []
    rows = [json.loads(line) for line in FILE.read_text(encoding="utf-8").splitlines()]
    return [(name_of(row["predecessor"]), row["step"], row["flags"]) for row in rows]


def name_of(label: str) -> str:
    """A predecessor's name, of what the file calls it."""
    return next(name for key, name in NAMES.items() if label.lower().startswith(key))


def values_of(made: Translated) -> dict[str, Any]:
    """Our flag -> its value in a translated command."""
    groups = arguments.parse(made.ours.groups, made.arguments, prog="", description="")
    return {f"--{f.name}": getattr(group, f.name) for group in groups for f in dataclasses.fields(group)}


def lines_of(predecessor: str, step: str, flags: dict[str, Any]) -> list[str]:
    """The command with each program that it may have been meant for."""

    programs = next(p.programs for p in PREDECESSORS if p.name == predecessor)
    valued = {flag for p in programs for flag, other in p.flags.items() if other.kind is not bool and not other.many}

    def text(flag: str, value: Any) -> str:
        """As in the script: a value that was a variable there is a word; one that was quoted is quoted."""
        if value is True:
            return f"{flag} PLACE" if flag in valued else flag
        return f"{flag} {shlex.quote(value) if flag in QUOTED else value or 'PLACE'}"

    words = " ".join(text(*item) for item in flags.items())
    root = "alpaca_rlhf/deepspeed_chat/" if predecessor == "alpaca-rlhf" else "DeepSpeed-Chat/"
    if predecessor in OTHERS:
        return [f"torchrun --nproc_per_node 2 {path} {words}" for path in OTHERS[predecessor][step]]
    return [f"deepspeed --num_gpus 2 {root if step not in ('gradio', 'chat', 'e2e') else ''}{CHAT[step]} {words}"]


def outcome(predecessor: str, step: str, flags: dict[str, Any]) -> Translated | str:
    """The translated command, or what refuses it."""
    refused = ""
    for line in lines_of(predecessor, step, flags):
        try:
            return translate(line, predecessor)
        except UserError as error:
            refused = refused or str(error)
    return refused


def main() -> None:
    """Print the table, and every refusal."""
    counts: collections.Counter[tuple[str, str]] = collections.Counter()
    refusals = []
    for case in cases():
        found = outcome(*case)
        kind = "refused" if isinstance(found, str) else "translated"
        counts[case[0], kind] += 1
        if isinstance(found, str):
            refusals.append(f"{case[0]}, {case[1]}: {found}")
    print(f"{'':<16}{'translated':>12}{'refused':>10}")
    for name in NAMES.values():
        print(f"{name:<16}{counts[name, 'translated']:>12}{counts[name, 'refused']:>10}")
    print("\n".join(refusals))


if __name__ == "__main__":
    main()
