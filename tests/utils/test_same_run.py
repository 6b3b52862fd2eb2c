"""What makes a run the same: which flag a refusal names, and that every flag the lists hold is one."""

import dataclasses
import importlib
from pathlib import Path

import pytest

from tests.bad_inputs import STEPS
from training.utils import same_run
from training.utils.errors import UserError

RUN = {
    "step": "step3",
    "flags": {"data_path": ["a"], "eval_data_path": [], "unsupervised_data_path": ["t"], "seed": 1},
    "models": {"--actor_model_name_or_path": "m"},
    "data": {"training": "1", "held-out": "2", "pre-training": "3"},
    "batches": {},
    "world_size": 1,
}


def refusal(**changes):
    """What is said when parts of the run have changed."""
    now = RUN | {part: RUN[part] | changed for part, changed in changes.items()}
    with pytest.raises(UserError) as refused:
        same_run.refuse_other_run(RUN, now, Path("checkpoint"))
    return str(refused.value)


def test_the_same_run_goes_on():
    same_run.refuse_other_run(RUN, RUN, Path("checkpoint"))


@pytest.mark.parametrize(
    ("rows", "flags", "named"),
    [
        ("training", {}, "--data_path"),
        ("held-out", {}, "--data_path"),
        ("held-out", {"eval_data_path": ["b"]}, "--eval_data_path"),
        ("pre-training", {}, "--unsupervised_data_path"),
        ("pre-training", {"unsupervised_data_path": []}, "--unsupervised_data_path"),
    ],
)
def test_other_rows_are_refused_by_the_flag_they_come_from(rows, flags, named):
    said = refusal(data={rows: "other"}, flags=flags)
    assert f"other {rows} rows than {named} gives" in said and "--resume never" in said


def test_the_first_of_several_changes_is_named_where_it_was_made():
    said = refusal(data={"training": "x", "held-out": "y"}, flags={"eval_data_path": ["b"]})
    assert "--eval_data_path" in said


def test_what_was_not_there_before_is_another_run():
    before = RUN | {"data": {"training": "1", "held-out": "2"}, "flags": RUN["flags"] | {"unsupervised_data_path": []}}
    with pytest.raises(UserError, match="other pre-training rows than --unsupervised_data_path gives"):
        same_run.refuse_other_run(before, RUN, Path("checkpoint"))
    assert "--critic_model_name_or_path" in refusal(models={"--critic_model_name_or_path": "r"})


def test_the_lists_hold_flags_that_exist_each_once():
    flags = {
        field.name
        for step in (1, 2, 3)
        for group in importlib.import_module(STEPS[step]).ARGUMENTS
        for field in dataclasses.fields(group)
    }
    lists = [same_run.FREE, same_run.ROUNDING, same_run.BY_CONTENT, same_run.BATCH]
    listed = [name for names in lists for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) <= flags, "a flag of these lists has gone or has another name"
    assert {name for name in flags if name.endswith(("_data_path", "_model_name_or_path"))} <= same_run.BY_CONTENT
    assert {name for names in same_run.ROWS_FROM.values() for name in names} <= same_run.BY_CONTENT


def test_every_function_that_the_docstring_names_is_there():
    text = same_run.describe.__doc__.splitlines()[0]
    names = text.split("`")[1::2]
    assert names and all(hasattr(same_run, name) for name in names)
