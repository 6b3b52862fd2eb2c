"""The endpoint of a trained model: what it answers, and what is refused before it starts."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import pytest
import serve
from chat_models import LoadArguments, load_chat_models
from chat_stream import SamplingArguments, stream_answer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from tests.inference.conftest import INFERENCE
from tests.inference.tiny_chat import CHATML, save_chat_model
from tests.signals import hear_signals
from training.utils.data.template_file import read_template_file
from training.utils.errors import run_program
from training.utils.run.folders import python_path


@pytest.fixture
def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_it_answers_as_the_saved_model_and_ends_on_ctrl_c(chat_folders, free_port, tmp_path):
    pytest.importorskip("openai")
    folder = save_chat_model(tmp_path / "sft", 1, max_position_embeddings=50_000)
    GenerationConfig(eos_token_id=7, pad_token_id=0).save_pretrained(folder)  # beside 2, the template's end
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
        how = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": [2, 7]}
        out = model.generate(**ids, **how)[0, ids["input_ids"].shape[1] :]
        assert answer["choices"][0]["message"]["content"] == tokenizer.decode(out, skip_special_tokens=True)
        assert answer["usage"]["completion_tokens"] == len(out)
        other = httpx.post(f"{address}/chat/completions", json=asked | {"model": "another"}, timeout=60)
        assert other.status_code == 400 and folder.name in other.text
        for end in ("2", "7"):
            ended = httpx.post(f"{address}/chat/completions", json=asked | {"logit_bias": {end: 100}}, timeout=60)
            assert ended.json()["usage"]["completion_tokens"] == 1
        drawn = {}
        for seed in (1, 2, 1):
            sampled = asked | {"temperature": 1.5, "seed": seed}
            [choice] = httpx.post(f"{address}/chat/completions", json=sampled, timeout=60).json()["choices"]
            assert drawn.setdefault(seed, choice["message"]["content"]) == choice["message"]["content"]
        assert drawn[1] != drawn[2], "a temperature counts"
        meant_alike(address, asked)
        seeds_at_once(address, asked)
        nobody_waits(address, asked | {"logit_bias": {"2": -100, "7": -100}})
        several = httpx.post(f"{address}/chat/completions", json=asked | {"n": 2}, timeout=60)
        assert several.status_code == 400 and "one answer" in several.text
        long = asked | {"messages": [{"role": "user", "content": "hello " * 100_000}]}
        for stream in (False, True):
            reply = httpx.post(f"{address}/chat/completions", json=long | {"stream": stream}, timeout=60)
            assert reply.status_code == 400 and "the model reads at most" in reply.text
        for path in ("load_model", "reset", "v1/audio/transcriptions", "v1/systemone", "v1/embeddings"):
            unserved = httpx.post(f"{address[:-3]}/{path}", json={"model": str(chat_folders["rlhf"])}, timeout=60)
            assert unserved.status_code == 404 and unserved.json()["error"]["message"] == "Not Found"
        program.send_signal(signal.SIGINT)
        assert program.wait(30) == 0
        assert f"model {folder.name} at {address}" in (tmp_path / "log").read_text()
    finally:
        program.kill()
        log.close()


def meant_alike(address, asked):
    """What a client may write in several ways; and what can not be read is the client's mistake, not the server's."""

    def said(**changes):
        reply = httpx.post(f"{address}/chat/completions", json=asked | changes, timeout=60)
        assert reply.status_code == 200, reply.text
        return reply.json()["choices"][0]["message"]["content"]

    turns = [*asked["messages"], {"role": "assistant", "content": "hello there"}, {"role": "user", "content": "b"}]
    again = said(messages=turns)
    for nothing in (None, []):
        turns[1] = {"role": "assistant", "content": "hello there", "tool_calls": nothing, "audio": None}
        assert said(messages=turns) == again
    assert said(stop="") == said(stop=[]) == said(logit_bias={}) == said(generation_config="{}") == said()
    assert said(logit_bias={"5": 100}, max_tokens=3) == "###"
    for changes in ({"chat_template_kwargs": 3}, {"generation_config": "{"}, {"logit_bias": {"a": 1}}):
        reply = httpx.post(f"{address}/chat/completions", json=asked | changes, timeout=60)
        assert reply.status_code == 400 and "not understood" in reply.text
    response = httpx.post(f"{address}/responses", json={"model": asked["model"], "input": "a"}, timeout=60).json()
    assert response["status"] == "completed", "a stream comes where one is asked for"


def seeds_at_once(address, asked):
    """An answer depends on its own seed alone, whoever else asks while it is written."""
    found: dict[int, list[str]] = {1: [], 2: [], 3: []}

    def ask(seed):
        sampled = asked | {"temperature": 2.0, "seed": seed, "max_tokens": 100}
        [choice] = httpx.post(f"{address}/chat/completions", json=sampled, timeout=60).json()["choices"]
        found[seed].append(choice["message"]["content"])

    for together in ([1], [2], [3], [1, 2, 3]):
        askers = [threading.Thread(target=ask, args=(seed,)) for seed in together]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
    assert all(len(answers) == 2 and len(set(answers)) == 1 for answers in found.values())


def nobody_waits(address, asked):
    """An answer that would go on for minutes ends when its client leaves: the next one is not kept waiting."""
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{address}/chat/completions", json=asked | {"max_tokens": 40_000}, timeout=1)
    assert httpx.post(f"{address}/chat/completions", json=asked, timeout=20).status_code == 200


USER_ALONE = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}"
USER = {"messages": [{"role": "user", "content": "a"}]}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, ""),
        ({"n": 1, "logprobs": False, "presence_penalty": 0.0, "response_format": {"type": "text"}, "stop": None}, ""),
        ({"temperature": 0, "top_p": 1, "max_tokens": 3, "seed": 0, "stop": ["a", "b"], "stream_options": {}}, ""),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}, {"role": "tool", "content": "b"},
                       {"role": "assistant", "content": None, "tool_calls": []}]}, ""),
        ({"n": 2}, "n: a request gets one answer"),
        ({"logprobs": True, "top_logprobs": 3}, "not served here: logprobs, top_logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"temperature": -1}, "temperature: a number from 0"),
        ({"temperature": "hot"}, "temperature: a number"),
        ({"temperature": float("nan")}, "temperature: a number"),
        ({"top_p": 0}, "top_p: a number"),
        ({"max_tokens": 0}, "max_tokens: a whole number from 1"),
        ({"max_completion_tokens": 1.5}, "max_completion_tokens: a whole number"),
        ({"seed": 2**80}, "seed: a whole number"),
        ({"stop": [1]}, "stop: a text"),
        ({"stop": 1}, "stop: a text"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"messages": []}, "messages is missing or empty"),
        ({"messages": ["a"]}, "each has a role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "images and sound are not read"),
        ({"messages": [{"role": "user", "content": 3}]}, "a content is a text"),
        ({"messages": "a"}, "each has a role"),
        ({"messages": {"role": "user", "content": "a"}}, "each has a role"),
        ({"frequency_penalty": 0.5}, "not served here: frequency_penalty"),
        ({"reasoning_effort": "high"}, "not served here: reasoning_effort"),
        ({"modalities": ["text"], "verbosity": "medium", "frequency_penalty": 0}, ""),
    ],
)  # fmt: skip
def test_what_would_be_left_unheard_or_fail_is_refused(changes, said):
    found = serve.refusal(USER | changes, "messages")
    assert said in found and bool(said) == bool(found)


@pytest.mark.parametrize(
    ("field", "body", "said"),
    [
        ("prompt", {"prompt": "a", "suffix": ""}, ""),
        ("prompt", {"prompt": "a", "suffix": "b"}, "not served here: suffix"),
        ("prompt", {"prompt": ""}, "prompt is missing or empty"),
        ("input", {"input": "a", "text": {"format": {"type": "text"}}, "truncation": "disabled"}, ""),
        ("input", {"input": [{"type": "input_text", "text": "a"}]}, ""),
        ("input", {"input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]},
                             {"type": "function_call_output", "call_id": "1", "output": "b"}]}, ""),
        ("input", {"input": "a", "previous_response_id": "1"}, "not served here: previous_response_id"),
        ("input", {"input": "a", "text": {"format": {"type": "json_object"}}}, "not served here: text"),
        ("input", {"input": "a", "prompt": {"id": "1"}}, "not served here: prompt"),
        ("input", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "images and sound are not read"),
        ("input", {"input": [{"type": "input_image"}]}, "images and sound are not read"),
        ("input", {"input": [3]}, "a content is a text"),
    ],
)  # fmt: skip
def test_the_other_endpoints_refuse_it_too(field, body, said):
    found = serve.refusal(body, field)
    assert said in found and bool(said) == bool(found)


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]


CALL = {"role": "assistant", "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}]}
TOLD = {"role": "tool", "tool_call_id": "1", "content": "b"}
SYSTEM, ASKED = {"role": "system", "content": "b"}, USER["messages"][0]
TALK = [ASKED, {"role": "assistant", "content": "c"}]
CALLS = CHATML.replace("m['content']", "m['tool_calls'] | string + m['content']")
LLAMA2 = read_template_file("llama2").template  # a system message stands at the beginning alone


@pytest.mark.parametrize(
    ("template", "changes", "said"),
    [
        (CHATML, {"tools": TOOLS}, "tools: the model's chat template has no place"),
        (CHATML, {"tools": TOOLS, "tool_choice": "none"}, ""),
        ("{{ tools }}" + CHATML, {"tools": TOOLS}, ""),
        (CHATML, {"messages": [SYSTEM, ASKED]}, ""),
        (CHATML, {"messages": [ASKED, TOLD]}, ""),
        (USER_ALONE, {"messages": [SYSTEM | {"role": "developer"}, ASKED]}, "no place for a developer message"),
        (USER_ALONE, {"messages": [*TALK, TOLD]}, "no place for a tool message"),
        (LLAMA2, {"messages": [SYSTEM, *TALK, ASKED]}, ""),
        (LLAMA2, {"messages": [*TALK, SYSTEM, ASKED]}, "no place for a system message in this place"),
        (CHATML, {"messages": [ASKED, CALL, TOLD]}, "tool_calls: the model's chat template has no place"),
        (CALLS, {"messages": [ASKED, CALL, TOLD]}, ""),
        (USER_ALONE, {"input": "a", "instructions": "b"}, "no place for a system message"),
        (CHATML, {"input": "a", "instructions": "b"}, ""),
    ],
)
def test_what_the_template_would_leave_unheard_is_refused(template, changes, said, endpoint, load):
    [model] = load("fox")
    ask = endpoint(model)
    model.tokenizer.chat_template = template
    at, asked = ("responses", {"max_output_tokens": 1}) if "input" in changes else ("chat/completions", USER)
    reply = ask(f"POST /v1/{at}", asked | changes)
    assert said in reply.text and reply.status_code == (400 if said else 200), reply.text


@pytest.fixture
def endpoint(monkeypatch):
    """``endpoint(model)`` gives ``ask(path, body)`` of its endpoint in this process, without a port."""
    pytest.importorskip("openai")
    import uvicorn
    from transformers.cli.serve import Serve
    from transformers.cli.serving import chat_completion, completion, response, server, utils
    from transformers.cli.serving.model_manager import ModelManager

    settled = {
        utils.BaseHandler: ("_validate_request", "_build_generation_config", "get_processor_inputs_from_messages"),
        utils.GenerateManager: ("generate_streaming", "generate_non_streaming"),
        ModelManager: ("load_model_and_processor", "process_model_name", "get_gen_models"),
        server: ("build_server",),
        chat_completion.ChatCompletionHandler: ("handle_request", "_streaming"),
        completion.CompletionHandler: ("handle_request", "_streaming"),
        response.ResponseHandler: ("handle_request",),
    }
    for owner, names in settled.items():
        for name in names:
            monkeypatch.setattr(owner, name, vars(owner)[name])  # put back at the end
    monkeypatch.setattr(uvicorn.Server, "run", lambda server: None)

    def _of(model):
        serve.settle_requests(model)
        app = Serve(force_model=model.name, log_level="error").server.config.app

        async def post(path, body):
            transport = httpx.ASGITransport(app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                sent = {"content": body} if isinstance(body, bytes) else {"json": body}
                headers = {"content-type": "application/json"}
                return await client.request(*path.split(), **sent, headers=headers, timeout=60)

        return lambda path, body=None: asyncio.run(post(path, body))  # a body is sent as it is, or as JSON

    return _of


def test_a_model_without_a_template_of_its_own_answers_as_in_the_chat(endpoint, chat_folders, tmp_path):
    folder = shutil.copytree(chat_folders["fox"], tmp_path / "fox@2")
    (folder / "chat_template.jinja").unlink()
    [model] = load_chat_models({"fox@2": str(folder)}, LoadArguments(), lambda line: None)
    ask = endpoint(model)
    *_, said = stream_answer(model, USER["messages"], SamplingArguments(temperature=0))
    reply = ask("POST /v1/chat/completions", {"model": "fox@2", **USER}).json()
    assert reply["choices"][0]["message"]["content"] == said.text and reply["model"] == "fox@2"
    [listed] = ask("GET /v1/models").json()["data"]
    assert listed["id"] == "fox@2" and ask("GET /v1/models/fox@2").json() == listed
    other = ask("GET /v1/models/no-one/fox")
    assert other.status_code == 404 and "no-one/fox is not served here, fox@2 is" in other.json()["error"]["message"]


@pytest.mark.parametrize(("at", "asked"), [("chat/completions", USER), ("completions", {"prompt": "a"})])
def test_a_stream_ends_with_the_line_that_clients_wait_for(at, asked, endpoint, load):
    [model] = load("fox")
    reply = endpoint(model)(f"POST /v1/{at}", asked | {"stream": True, "max_tokens": 3})
    *lines, last = [line for line in reply.text.split("\n") if line]
    assert last == "data: [DONE]" and "finish_reason" in lines[-1]


def test_errors_are_told_as_clients_look_for_them(endpoint, load, monkeypatch):
    [model] = load("fox")
    ask, chat = endpoint(model), "POST /v1/chat/completions"

    def error(path, body, status):
        reply = ask(path, body)
        assert reply.status_code == status and list(reply.json()) == ["error"]
        return reply.json()["error"]["message"]

    assert "one answer" in error(chat, USER | {"n": 2}, 400)
    assert "top_k" in error(chat, USER | {"top_k": 3}, 422)
    assert "fox" in error(chat, USER | {"model": "cat"}, 400)
    assert "pinned" in error(chat, json.dumps(USER | {"model": "\ud800"}).encode(), 400)
    for body in (b"{", b"[NaN]", b'"\\ud800"', b"\xff", b""):
        assert "JSON object" in error(chat, body, 400) or body == b"\xff"
    for bias in ({"5": float("nan")}, {"5": float("inf")}, {"-1": 1}, {"99999": 1}):
        for stream in (False, True):
            assert "logit_bias" in error(chat, json.dumps(USER | {"logit_bias": bias, "stream": stream}).encode(), 400)
    assert "OverflowError" in error(chat, USER | {"temperature": 10**400}, 400)
    assert error("POST /v1/nothing", USER, 404) and error("GET /v1/completions", None, 405)

    def fails(*given, **more):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(model.weights.model, "generate", fails)
    assert error(chat, USER, 500) == "RuntimeError: out of memory"


@pytest.mark.parametrize("ends", ["fails", "leaves", "answers"])
def test_a_request_leaves_nothing_running(ends):
    """However it ends; and what its client sends, its leaving included, is handed on."""
    said = asyncio.Queue()

    async def app(scope, receive, send):
        assert (await receive())["type"] == "http.request"
        if ends == "fails":
            raise ValueError("wrong")
        if ends == "leaves":
            said.put_nowait({"type": "http.disconnect"})
            await asyncio.sleep(60)
        await send("answer")

    async def one():
        said.put_nowait({"type": "http.request"})
        sent = []

        async def send(message):
            sent.append(message)

        try:
            await asyncio.wait_for(serve.leaving(app)({"type": "http"}, said.get, send), 10)
        except ValueError as error:
            sent.append(str(error))
        await asyncio.sleep(0)
        return sent, len(asyncio.all_tasks())

    assert asyncio.run(one()) == ({"fails": ["wrong"], "leaves": [], "answers": ["answer"]}[ends], 1)


def refused(capsys, *flags: str) -> str:
    assert run_program(serve.main, list(flags)) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_a_model_is_called_after_its_folder_or_file(tmp_path, monkeypatch):
    (tmp_path / "step1").mkdir()
    (tmp_path / "a.gguf").touch()
    monkeypatch.chdir(tmp_path / "step1")
    for path, name in ((".", "step1"), ("../a.gguf", "a.gguf"), ("../none", "../none"), ("embedded", "embedded")):
        assert serve.served_as(path) == name


def test_bad_input_is_one_line(chat_folders, free_port, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install openai" in refused(capsys)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", free_port))
        taken.listen()
        assert "is in use" in refused(capsys, "--port", str(free_port))
    assert "--host 192.0.2.1" in refused(capsys, "--host", "192.0.2.1", "--port", str(free_port))
    monkeypatch.undo()
    pytest.importorskip("openai")
    port = ("--port", str(free_port))
    assert "no such" in refused(capsys, "--path", str(tmp_path / "none"), *port)
    assert "a reward model that writes no answers" in refused(capsys, "--path", str(chat_folders["reward"]), *port)
    assert "--path" in refused(capsys, "--path", str(chat_folders["adapter"]), *port)
