"""Tiny models and tokenizers built here, and one pair of ranks that lives for the whole test run."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from training.utils.run.runtime import available_cores, has_nvidia, prepare_runtime

PARALLEL = "PYTEST_XDIST_WORKER" in os.environ
if PARALLEL:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # the other cores are the other workers'
if os.environ.get("TRIPOD_TEST_DEVICE") != "cuda":  # the tests are a CPU's, on a machine with a GPU too
    os.environ["DS_ACCELERATOR"] = "cpu"
    if has_nvidia():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
prepare_runtime()  # before torch: the same compiled operations and the same freed locks as the programs

from tests.rank_pair import RankPair  # noqa: E402
from tests.tiny import save_tiny_model  # noqa: E402

DEMO = Path(__file__).resolve().parents[1] / "training" / "data" / "demo"

# Files that take a minute and more of `make test`, the longest first: a worker that takes one last would end alone.
LONG = (
    "reliability/test_faults.py",
    "test_programs.py",
    "step3/test_toy_task.py",
    "test_equality.py",
    "reliability/test_kills.py",
    "step3/test_hybrid_engine.py",
    "reliability/test_train_kills.py",
    "test_train.py",
    "step3/test_skipping.py",
    "step3/test_trajectories.py",
    "test_families.py",
    "gpu/test_steps.py",
    "dpo/test_main.py",
    "utils/engine/test_tensor_parallel.py",
    "utils/engine/test_sequence_parallel.py",
    "utils/engine/test_four_bit.py",
    "inference/test_generate.py",
    "test_examples.py",
)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """``-n auto``: a worker often waits for processes that it has started; each has up to 1 GiB."""
    return min(4, available_cores() + 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Long files first, where several are worked on at once."""
    if PARALLEL:
        place = {Path(__file__).parent / name: number for number, name in enumerate(LONG)}
        items.sort(key=lambda item: place.get(item.path, len(LONG)))


@pytest.fixture(autouse=True)
def _own_environment(tmp_path_factory, monkeypatch):
    """No test writes into the user's cache or output folder, or leaves variables to the programs that others start.

    DeepSpeed, accelerate and transformers set some: accelerate a ``MASTER_PORT`` where there is a ``LOCAL_RANK``.
    """
    before = dict(os.environ)
    base = tmp_path_factory.getbasetemp()
    monkeypatch.setenv("TRIPOD_CACHE", str(base / "cache"))
    monkeypatch.setenv("TRIPOD_OUTPUT", str(base / "output"))
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


@pytest.fixture(scope="session", autouse=True)
def _one_terminal():
    """Widths and colours of what programs print do not depend on who runs the tests, and where."""
    with pytest.MonkeyPatch.context() as environment:
        for name, value in {"COLUMNS": "100", "LINES": "24", "TERM": "xterm"}.items():
            environment.setenv(name, value)
        for name in ("NO_COLOR", "FORCE_COLOR", "PYTHON_COLORS", "CLICOLOR", "CLICOLOR_FORCE"):
            environment.delenv(name, raising=False)
        yield


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A two-layer Llama with a chat template whose pad token is its EOS, as SmolLM2's."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_reward(tiny_model, tmp_path_factory) -> Path:
    """A reward model with the tiny model's backbone, which tests only read."""
    from tests.step3.hybrid_checks import save_tiny_reward_model  # takes seconds

    return save_tiny_reward_model(str(tiny_model), tmp_path_factory.mktemp("models") / "reward")


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory) -> Path:
    """A folder with a few demo rows for each step: sft.jsonl, preferences.jsonl, prompts.jsonl, held_out.jsonl."""
    folder = tmp_path_factory.mktemp("data")
    for name, count in {"sft": 12, "preferences": 12, "prompts": 8, "held_out": 6}.items():
        lines = (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()[:count]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        assert all(json.loads(line) for line in lines)
    return folder


@pytest.fixture(scope="session")
def rank_pair():
    """Two gloo ranks in two processes; ``rank_pair.run(function, ...)`` gives both ranks' results."""
    pair = RankPair()
    yield pair
    pair.close()
