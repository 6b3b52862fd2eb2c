"""The house: imports point one way, rooms stay small, and the page that describes them names what is there."""

from __future__ import annotations

import ast
import itertools
import re
from pathlib import Path

import pytest

from tests.conftest import LONG

ROOT = Path(__file__).resolve().parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "training").rglob("*.py")
}


def imports_of(path: Path, everywhere: bool = False) -> set[str]:
    """Modules of the project that a file imports at its top, or also within functions."""
    found = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    tops = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))]
    for top in tops:
        if isinstance(top, (ast.FunctionDef, ast.ClassDef)) and not everywhere:
            continue
        for node in ast.walk(top):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("training"):
                names = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in MODULES else node.module for name in names}
    return found


GRAPH = {name: imports_of(path) & MODULES.keys() for name, path in MODULES.items()}


def circle_from(start: str, graph: dict[str, set[str]]) -> list[str]:
    """A way back to a module along imports; empty if there is none."""
    open_, seen = [[start]], set()
    while open_:
        way = open_.pop()
        for following in graph[way[-1]]:
            if following == start:
                return [*way, start]
            if following not in seen:
                seen.add(following)
                open_.append([*way, following])
    return []


def test_no_circle():
    assert not [way for name in GRAPH if (way := circle_from(name, GRAPH))]


def test_a_circle_would_be_seen():
    assert circle_from("a", {"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]


def test_imports_point_one_way():
    step = re.compile(r"training\.(step\d_\w+?)_finetuning")
    for name, path in MODULES.items():
        for imported in imports_of(path, everywhere=True):
            above = step.match(imported) or imported.startswith(
                ("training.pipeline", "training.report.", "training.migrate")
            )
            assert not (name.startswith("training.utils.") and above), (name, imported)
            own, other = step.match(name), step.match(imported)
            assert not (own and other and own[1] != other[1]), (name, imported)
    assert not {"deepspeed", "transformers"} & {
        alias.name.split(".")[0]
        for module in (
            "step3_rlhf_finetuning.ppo",
            "step3_rlhf_finetuning.reward_functions",
            "step2_dpo_finetuning.dpo",
        )
        for node in ast.walk(ast.parse(MODULES[f"training.{module}"].read_text()))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(node.module or "")])
    }


def test_rooms_stay_small():
    for folder in {path.parent for path in MODULES.values()}:
        most = 21 if folder.name.startswith("step3") else 14
        assert len(list(folder.glob("*.py"))) <= most, folder


def test_steps_that_fine_tune_share_their_frame():
    """No six lines in a row stand in two of the programs, but for their imports."""
    blocks = []
    for step in ("step1_supervised_finetuning", "step2_reward_model_finetuning", "step2_dpo_finetuning"):
        text = (ROOT / "training" / step / "main.py").read_text(encoding="utf-8")
        lines = [line.strip() for line in text[text.index("def main(") :].splitlines() if line.strip()]
        blocks.append({tuple(lines[i : i + 6]) for i in range(len(lines) - 5)})
    assert not [1 for one, other in itertools.combinations(blocks, 2) if one & other]


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md"])
def test_files_and_names_on_the_page_are_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in re.findall(r"`((?:training|tests)/[\w./]+\.py)`", text):
        assert (ROOT / name).is_file(), name
    for row in re.findall(r"^\| .*$", text[text.find("## Where") :], re.M):
        for file, name in re.findall(r"`(training/[\w./]+\.py)`, `(?:\w+\.)?(\w+)`", row):
            assert re.search(rf"(def|class) {name}\b|^{name} =", (ROOT / file).read_text(), re.M), (file, name)


def test_long_test_files_are_there():
    assert len(set(LONG)) == len(LONG)
    assert not [name for name in LONG if not (ROOT / "tests" / name).is_file()]
