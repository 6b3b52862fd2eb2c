"""The endpoint of a trained model: what it answers, and what is refused before it starts."""

from __future__ import annotations

import importlib.util
import os
import signal
import socket
import subprocess
import sys
import time

import httpx
import pytest
import serve
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.inference.conftest import INFERENCE
from tests.signals import hear_signals
from training.utils.errors import run_program
from training.utils.run.folders import python_path


@pytest.fixture
def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_it_answers_as_the_saved_model_and_ends_on_ctrl_c(chat_folders, free_port, tmp_path):
    pytest.importorskip("openai")
    folder = chat_folders["sft"]
    command = [sys.executable, str(INFERENCE / "serve.py"), "--path", str(folder), "--port", str(free_port)]
    environment = os.environ | {"PYTHONPATH": python_path(), "HF_HOME": str(tmp_path / "none")}
    log = (tmp_path / "log").open("w+")
    program = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, env=environment, preexec_fn=hear_signals, cwd=tmp_path
    )
    address = f"http://127.0.0.1:{free_port}/v1"
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                listed = httpx.get(f"{address}/models").json()["data"]
                break
            except httpx.ConnectError:
                assert program.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                time.sleep(0.2)
        assert [model["id"] for model in listed] == [folder.name]
        messages = [{"role": "user", "content": "What is red?"}]
        asked = {"model": folder.name, "messages": messages, "temperature": 0, "max_tokens": 8}
        answer = httpx.post(f"{address}/chat/completions", json=asked, timeout=60).json()
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        out = model.generate(**ids, max_new_tokens=8, do_sample=False)[0, ids["input_ids"].shape[1] :]
        assert answer["choices"][0]["message"]["content"] == tokenizer.decode(out, skip_special_tokens=True)
        assert answer["usage"]["completion_tokens"] == len(out)
        other = httpx.post(f"{address}/chat/completions", json=asked | {"model": "another"}, timeout=60)
        assert other.status_code == 400 and folder.name in other.text
        program.send_signal(signal.SIGINT)
        assert program.wait(30) == 0
        assert f"model {folder.name} at {address}" in (tmp_path / "log").read_text()
    finally:
        program.kill()
        log.close()


def refused(capsys, *flags: str) -> str:
    assert run_program(serve.main, list(flags)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_bad_input_is_one_line(chat_folders, free_port, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install openai" in refused(capsys)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port))
        taken.listen()
        assert "Address already in use" in refused(capsys, "--port", str(free_port))
    assert "--host 192.0.2.1" in refused(capsys, "--host", "192.0.2.1", "--port", str(free_port))
    monkeypatch.undo()
    pytest.importorskip("openai")
    port = ("--port", str(free_port))
    assert "no such" in refused(capsys, "--path", str(tmp_path / "none"), *port)
    assert "gives scores, not text" in refused(capsys, "--path", str(chat_folders["reward"]), *port)
    assert "--path" in refused(capsys, "--path", str(chat_folders["adapter"]), *port)
