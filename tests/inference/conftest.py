"""The scripts of inference/ on the import path, and models that several tests read."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

INFERENCE = Path(__file__).resolve().parents[2] / "inference"
sys.path.insert(0, str(INFERENCE))

from tests.inference.tiny_chat import save_adapter, save_chat_model, save_parrot, save_reward_model  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _in_fp32():
    """``--dtype auto`` is fp32 on every machine, so that answers can be compared exactly; programs started, too.

    Not by the test's own ``monkeypatch``, which some undo in their middle, and around it: undone after this, it would
    put back for all later tests what it found.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("training.utils.engine.precision.cpu_computes_bf16", lambda: False)
        patch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
        yield


@pytest.fixture(scope="session")
def chat_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models that no test changes; "fox" and "house" are parrots, see `save_parrot`."""
    root = tmp_path_factory.mktemp("chat")
    folders = {"sft": save_chat_model(root / "sft", 1), "rlhf": save_chat_model(root / "rlhf", 2)}
    folders["reward"] = save_reward_model(root / "reward", 3)
    folders["adapter"] = save_adapter(root / "adapter", folders["sft"], 4)
    folders["adapter2"] = save_adapter(root / "adapter2", folders["sft"], 5)
    folders["fox"] = save_parrot(root / "fox", "the quick brown fox jumps!")
    folders["house"] = save_parrot(root / "house", "a small red house")
    return folders


@pytest.fixture
def load(chat_folders):
    """``load("sft", "adapter")`` gives their chat models, loaded together."""
    from chat_models import LoadArguments, load_chat_models

    def _load(*names: str, **options: str) -> list:
        return load_chat_models({n: str(chat_folders[n]) for n in names}, LoadArguments(**options), lambda line: None)

    return _load


@pytest.fixture
def visitors(tmp_path):
    """``visitors(Browser, address)`` opens a browser, which is closed at the end of the test."""
    open_ = []

    def _visit(kind, address, **options):
        open_.append(kind(address, tmp_path, **options))
        return open_[-1]

    yield _visit
    for browser in open_:
        browser.driver.quit()


@pytest.fixture
def serve():
    """``serve(*flags)`` starts the ranking page as a process, which ends with the test."""
    from tests.inference.ranked import Server

    started = []

    def _serve(*flags, **options):
        started.append(Server(*flags, **options))
        return started[-1]

    yield _serve
    for server in started:
        server.kill()
