"""Every command that the documents print names a program that is there and flags that it takes; the README's run."""

import importlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from training.utils import arguments
from training.utils.run.folders import STEPS

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "inference"))  # where Python looks for a program's neighbours
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("**/*.md"))]
FOLDERS = (
    "training/",
    "inference/",
    "benchmarks/",
    "tests/",
    "scripts/",
    "examples/",
)  # of paths that are there, not the reader's

# Where each command of the README is run: a target of make demo's path, or a test with the same program and flags.
RUN_BY = {
    "make demo": "Makefile",
    "make test": "Makefile",
    "make gpu-check": "tests/gpu/test_gpu_check.py::test_the_whole_check_on_a_cpu",
    "make chat": "tests/inference/test_gradio_chatbot.py::test_the_program_starts_says_where_and_ends_on_ctrl_c",
    "python3 -m venv": "scripts/setup.py",
    ".venv/bin/pip install": "scripts/setup.py",
    ".venv/bin/deepspeed --num_gpus": "tests/test_programs.py::test_steps_leave_finished_folders",
    ".venv/bin/python train.py --data_path": "tests/test_train.py::test_own_rows_through_the_three_real_steps",
    ".venv/bin/python train.py": "tests/test_train.py::test_continues",
    ".venv/bin/python -m training.utils.data.preview": "tests/data/test_preview.py",
    ".venv/bin/python benchmarks/demo_seeds.py": "tests/test_demo_seeds.py::test_tables_and_page",
    ".venv/bin/python benchmarks/plot_run.py": "tests/test_readme.py::test_curves_of_a_run_are_drawn",
}


def commands(document: Path) -> list[str]:
    """Commands of the fenced blocks and of the inline code that start a program of this repository."""
    text = re.sub(r"\\\n *", " ", document.read_text(encoding="utf-8"))
    fenced = re.findall(r"```\w*\n(.*?)```", text, re.S)
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    lines = [line.strip() for block in [*fenced, *re.findall(r"^ {4}.*", prose, re.M)] for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", prose)
    started = re.compile(r"(make [a-z-]+$|\S*(python3?|deepspeed|pip|pytest|ruff|mypy)\s+\S)")
    found = [line.split(" #")[0].split("   ")[0].strip().removeprefix("$ ") for line in [*lines, *inline]]
    return [line for line in found if started.match(line)]


CASES = [(document.relative_to(ROOT).as_posix(), command) for document in DOCUMENTS for command in commands(document)]


def words_of(command: str) -> list[str]:
    return shlex.split(command.split("|")[0].split(">")[0].replace("...", ""))


def flags_of(file):
    """What parses a program's flags: by its own groups, or its own `parse_flags`; None if it has neither."""
    if "def parse_flags(" not in file.read_text(encoding="utf-8"):
        return None
    if not file.is_relative_to(ROOT):
        return None
    name = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    module = importlib.import_module(name)
    if not hasattr(module, "ARGUMENTS"):
        return module.parse_flags
    names = {"prog": name, "description": "", "others": getattr(module, "OTHERS", {})}
    return lambda words: arguments.parse(module.ARGUMENTS, words, **names)  # what they name is the reader's


@pytest.mark.parametrize(("document", "command"), CASES)
def test_printed_command_is_there_and_takes_its_flags(document, command):
    words = words_of(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M), command
        return
    program = next((word for word in words[1:] if word.endswith(".py")), None)
    if "-m" in words and program is None:
        module = words[words.index("-m") + 1]
        if not module.startswith("training"):
            return
        program = importlib.util.find_spec(module).origin
        words = words[words.index("-m") + 1 :]
    elif program is None or program.startswith("llama.cpp/"):  # another project's
        return
    else:
        words = words[words.index(program) :]
    file = ROOT / program if not Path(program).is_absolute() else Path(program)
    assert file.is_file(), f"{document}: {command}"
    for word in words[1:]:
        path = word.partition(":")[0]
        assert not path.startswith(FOLDERS) or (ROOT / path).exists(), f"{document}: {command}: {path}"
    parse = flags_of(file)
    if parse:
        parse([word for word in words[1:] if word not in ("--help", "-h")])
        return
    source = file.read_text(encoding="utf-8") + (ROOT / "training/utils/arguments.py").read_text(encoding="utf-8")
    source += "".join(f.read_text(encoding="utf-8") for f in file.parent.glob("*.py"))
    for word in words[1:]:
        name = word.split("=")[0].removeprefix("--")
        assert not word.startswith("--") or re.search(rf"\b{name}\b", source), f"{document}: {command}: --{name}"


def test_an_unknown_flag_or_program_is_caught():
    with pytest.raises(AssertionError):
        test_printed_command_is_there_and_takes_its_flags("x", "python benchmarks/rollout.py --no_such_flag")
    with pytest.raises(AssertionError):
        test_printed_command_is_there_and_takes_its_flags("x", "python training/no_such_program.py")
    with pytest.raises(Exception, match="no_such_flag"):
        step = "training/step1_supervised_finetuning/main.py"
        test_printed_command_is_there_and_takes_its_flags("x", f"deepspeed {step} --no_such_flag")


@pytest.mark.parametrize("command", commands(ROOT / "README.md"))
def test_each_command_of_the_readme_is_run(command):
    place = next((where for start, where in RUN_BY.items() if command.startswith(start)), None)
    assert place, f"the README prints {command}, and nothing runs it: give it a test and name it in RUN_BY"
    file, _, name = place.partition("::")
    assert (ROOT / file).is_file()
    assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_tests_named_in_documents_exist(document):
    text = document.read_text(encoding="utf-8")
    for file, name in re.findall(r"(tests/[\w/]+\.py)::(\w+)", text):
        assert f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{document.name} names {file}::{name}"
    files = list((ROOT / "tests").rglob("test_*.py"))
    known = {path.stem for path in files} | {
        name for path in files for name in re.findall(r"def (test_\w+)\(", path.read_text(encoding="utf-8"))
    }
    assert set(re.findall(r"(?<![\w-])test_\w+", text)) <= known, document.name


def anchors(document: Path) -> list[str]:
    """What a page's headings are called in links, as GitHub makes it."""
    headings = re.findall(r"^#+ (.*)$", document.read_text(encoding="utf-8"), re.M)
    return [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CHANGELOG.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for path, anchor in re.findall(r"\]\(([^)\s#]*)#?([^)\s]*)\)", document.read_text(encoding="utf-8")):
        if "://" not in path:
            target = document.parent / path if path else document
            assert target.exists(), f"{document.name}: {path}"
            assert not anchor or anchor in anchors(target), f"{document.name}: {path}#{anchor}"


def test_the_change_log_says_nothing_twice():
    entries = re.findall(r"^- .*(?:\n  .*)*", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert [entry for entry in set(entries) if entries.count(entry) > 1] == []


EVALUATIONS = [path.replace("main.py", "evaluate.py") for path in STEPS.values()]


@pytest.mark.parametrize("program", [*STEPS.values(), *EVALUATIONS])
def test_every_flag_of_a_step_stands_in_a_document(program):
    """Beside the tables of other projects' flags, which say what it is called elsewhere, not when to use it."""
    told = "".join(document.read_text(encoding="utf-8") for document in DOCUMENTS if document.name != "migration.md")
    module = importlib.import_module(".".join(Path(program).with_suffix("").parts))
    flags = [name for name in arguments.fields_of(module.ARGUMENTS) if name != "local_rank"]
    assert [name for name in flags if not re.search(rf"\b{name}\b", told)] == []


def test_curves_of_a_run_are_drawn(tmp_path):
    records = {
        "step1": {"train/loss": 2.0, "eval/loss": 2.1},
        "step2": {"train/accuracy": 0.6, "eval/accuracy": 0.5},
        "step3": {"reward/mean": 0.1, "kl/per_sequence": 0.2, "rollout/length": 9.0, "rollout/eos_rate": 1.0},
    }
    for step, record in records.items():
        (tmp_path / step).mkdir()
        lines = [json.dumps({"step": number} | record) for number in (1, 2, 3)]
        (tmp_path / step / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    picture = tmp_path / "curves.png"
    program = str(ROOT / "benchmarks" / "plot_run.py")
    subprocess.run([sys.executable, program, str(tmp_path), str(picture)], check=True, timeout=120)
    assert picture.read_bytes().startswith(b"\x89PNG")
    for argv, said in (([], "the following arguments are required: run, picture"), (["none", "x.png"], "no such file")):
        done = subprocess.run([sys.executable, program, *argv], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr
