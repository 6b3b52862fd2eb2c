"""docs/migration.md: its tables are the translator's, and its commands are translated."""

import re

import pytest

from tests.migrate.page import PAGE, page, tables
from training.migrate.predecessors import PREDECESSORS
from training.migrate.translate import translate

TEXT = PAGE.read_text(encoding="utf-8")
COMMANDS = re.findall(r'^\.venv/bin/python -m training.migrate (?:--run )?"([^$"][^"]*)"', TEXT, re.MULTILINE)


def test_the_tables_are_those_of_the_translator():
    assert page(TEXT) == TEXT, "python -m tests.migrate.page writes them"
    for predecessor in PREDECESSORS:
        assert tables(predecessor) in TEXT


def test_every_flag_and_constant_stands_on_the_page():
    for predecessor in PREDECESSORS:
        _, _, section = TEXT.partition(f"<!-- tables of {predecessor.name} -->")
        section = section.partition("<!-- end of tables -->")[0]
        for program in predecessor.programs:
            for name, other in program.flags.items():
                assert f"| `{name}` |" in section or name in ("--local_rank", "--deepspeed")
                assert not other.ours or f"`{other.ours}`" in section
            assert all(line.replace("|", "\\|") in section for line in program.different)


def test_only_step_1_is_said_to_keep_the_best_model():
    """Steps 2 and DPO save their last one."""
    for predecessor in PREDECESSORS:
        for program in predecessor.programs:
            said = [line for line in program.different if re.search(r"\b(best|lowest)\b", line.split(";")[0])]
            assert program.ours == "step1" or not said, (program.title, said)


@pytest.mark.parametrize("command", COMMANDS)
def test_its_commands_are_translated(command):
    assert translate(command).arguments


def test_there_are_commands():
    assert len(COMMANDS) == 2
