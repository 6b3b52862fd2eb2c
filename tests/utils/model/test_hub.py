"""A hub that can not be reached: said at once, with what to give instead."""

import socket
from pathlib import Path

import huggingface_hub.constants
import pytest

from training.utils.errors import UserError
from training.utils.model import hub
from training.utils.model.loading import resolve_model

PROXIES = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))


def test_a_name_that_is_not_known_here(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*args: object) -> None:
        raise OSError("no name server")

    monkeypatch.setattr(hub.socket, "getaddrinfo", unknown)
    with pytest.raises(UserError, match="^--model_name_or_path someone/model: .*or embedded$"):
        resolve_model("someone/model")
    assert huggingface_hub.constants.HF_HUB_OFFLINE  # what the libraries look for later is not tried either


def test_a_proxy_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{closed.getsockname()[1]}")
        with pytest.raises(UserError, match="does not reach the hub"):
            resolve_model("someone/model", "--tokenizer_name_or_path")


def test_offline_with_the_model_in_the_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="whose cache has no such model"):
        hub.check_model("someone/model", "--model_name_or_path")
    snapshot = tmp_path / "models--someone--model" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "models--someone--model" / "refs").mkdir()
    (tmp_path / "models--someone--model" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache",
        lambda name, file: str(snapshot / file) if (name, file) == ("someone/model", "config.json") else None,
    )
    hub.check_model("someone/model", "--model_name_or_path")


@pytest.mark.parametrize("name", ["", "none", "embedded", "model.gguf"])
def test_what_is_no_hub_name_passes(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr(hub, "is_reachable", lambda: False)
    hub.check_model(name, "--model_name_or_path")
