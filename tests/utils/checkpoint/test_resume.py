"""A run that is taken up; what becomes of killed ones is in tests/reliability."""

import shutil
from types import SimpleNamespace

import pytest

from training.utils.arguments import ReliabilityArguments
from training.utils.checkpoint import resume
from training.utils.checkpoint.resume import Run
from training.utils.errors import UserError


def test_a_checkpoint_that_went_while_the_model_was_loaded_is_named(tmp_path):
    """A run that is at work in the folder of ``--resume PATH`` replaces it by the next one."""
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    run = Run(tmp_path / "new", ReliabilityArguments(), {"batches": {}}, checkpoint, {"engines": {"model": {}}})
    with pytest.raises(UserError, match="step-00000002 is gone: is another run at work there"):
        run.load({"model": None})


@pytest.mark.parametrize("averages", [{}, {"ema": SimpleNamespace(load=None)}])
def test_a_checkpoint_that_goes_while_it_is_read_is_named(tmp_path, monkeypatch, averages):
    checkpoint = tmp_path / "checkpoints" / "step-00000002"
    checkpoint.mkdir(parents=True)
    (checkpoint / "model-rank0000-0000.safetensors").touch()
    monkeypatch.setattr(resume, "load_engine", lambda *_: shutil.rmtree(checkpoint))
    state = {"engines": {"model": {}}, "random": [resume._random_state()]}
    run = Run(tmp_path, ReliabilityArguments(), {"batches": {}}, checkpoint, state)
    with pytest.raises(UserError, match="step-00000002 is gone: is another run at work there"):
        run.load({"model": None}, averages)


def test_the_time_of_the_starts_before_is_a_phase(tmp_path):
    """Else a report would take it for that of starting and stopping."""
    taken_up, new = (Run(tmp_path, ReliabilityArguments(), {"batches": {}}, None, s) for s in ({"seconds": 7.5}, {}))
    assert taken_up.earlier_starts() == {"earlier starts": {"seconds": 7.5}} and new.earlier_starts() == {}


def test_a_run_that_starts_over_in_a_folder_shows_nothing_of_the_one_before(tmp_path):
    """What its evaluation found is kept under another name, as evaluate.py itself would keep it."""
    for name in ("metrics.jsonl", "samples.json", "answers.jsonl", "evaluation.json", "evaluation-1.json"):
        (tmp_path / name).write_text(name)
    Run(tmp_path, ReliabilityArguments(), {"batches": {}}, None, {}).load({})
    found = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert found == {"evaluation-1.json": "evaluation-1.json", "evaluation-2.json": "evaluation.json"}


def test_checkpoints_on_a_disk_that_is_not_there_are_not_taken_for_none(tmp_path):
    """The run would start over, and metrics and the best model so far would go."""
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").symlink_to(tmp_path / "not mounted")
    with pytest.raises(UserError, match="checkpoints is a link to nothing: is the disk there"):
        resume._choose(tmp_path, "auto")
    assert resume._choose(tmp_path, "never") is None
