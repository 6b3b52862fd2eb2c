"""Where numbers and texts go, with a stand-in for Weights & Biases, which is not installed."""

import json
import sys
from types import SimpleNamespace

import pytest

from training.utils.metrics import MetricsLogger


@pytest.fixture
def wandb(monkeypatch):
    """The module, with what a run got as (step, name, value) in ``logged``."""
    logged = []
    run = SimpleNamespace(
        log=lambda values, step: logged.extend((step, name, value) for name, value in values.items()),
        finish=lambda: logged.append("finished"),
    )
    begun: list[dict] = []
    module = SimpleNamespace(
        init=lambda **how: begun.append(how) or run, Html=lambda text: ("page", text), logged=logged, begun=begun
    )
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


def test_wandb_gets_numbers_and_texts(wandb, tmp_path):
    logger = MetricsLogger(tmp_path, "wandb", "demo/step3")
    logger.log(5, {"reward/mean": 0.5})
    logger.text(5, "rollouts", "| prompt | <b>answer</b> |")
    logger.close()
    number, (step, name, (kind, page)), end = wandb.logged
    assert number == (5, "reward/mean", 0.5) and end == "finished"
    assert (step, name, kind) == (5, "rollouts", "page")
    assert "| prompt | &lt;b&gt;answer&lt;/b&gt; |" in page, "what a model writes stays text"
    record = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert (record["step"], record["reward/mean"]) == (5, 0.5)


def test_a_resumed_run_goes_on_with_its_own_wandb_run(wandb, tmp_path):
    for done in (None, 3, None):
        MetricsLogger(tmp_path, "wandb", "demo/step3", done=done).close()
    first, resumed, anew = wandb.begun
    assert first["id"] == resumed["id"] != anew["id"]
    assert resumed["resume"] == "allow", "a run that the service has lost is made anew"


def test_tensorboard_gets_texts(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logger = MetricsLogger(tmp_path, "tensorboard", "demo/step3")
    logger.text(5, "rollouts", "| prompt | answer |")
    logger.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    [text] = events.Tensors("rollouts/text_summary")
    assert text.step == 5 and text.tensor_proto.string_val == [b"| prompt | answer |"]


@pytest.mark.parametrize(("done", "kept"), [(None, []), (0, [0.0]), (1, [0.0, 0.0])])
def test_tensorboard_shows_nothing_of_what_is_done_again(tmp_path, done, kept):
    """A run that starts over has the folder of an earlier one, of which more may be there than it has done itself."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for behind, value, steps in ((None, 0.0, 4), (done, 1.0, 2)):
        logger = MetricsLogger(tmp_path, "tensorboard", "demo/step3", done=behind)
        for step in range(0 if behind is None else behind + 1, steps):
            logger.log(step, {"reward": value})
        logger.close()
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    for number, file in enumerate(files):  # named by the second, and read in the order of their names
        file.rename(file.with_name(f"events.out.tfevents.{number}"))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.value for event in events.Scalars("reward")] == [*kept, *[1.0] * (2 - len(kept))]


def test_without_either_a_text_goes_nowhere(tmp_path):
    logger = MetricsLogger(tmp_path, "none", "demo/step3")
    logger.text(5, "rollouts", "text")
    logger.close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
