"""Give a trained model an OpenAI-compatible endpoint on this machine, by transformers' own server.

    python inference/serve.py                            the model that the latest run's step 3 has trained
    python inference/serve.py --path output/demo/step1 --port 8001

Needs ``pip install openai -c .venv/constraints.txt``. Chat, completions and a stream are asked for at
http://127.0.0.1:8000/v1, as any client of that interface does. Ctrl-C ends the program.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import math
import sys
import threading
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # outside the environment, to say so

from chat_arguments import LoadArguments, latest_models
from page_guard import address_of, free_port, is_loopback

from training.utils.arguments import AUTO, PRECISIONS, flag, parse
from training.utils.errors import UserError, run_program
from training.utils.run.demo import EMBEDDED
from training.utils.run.environment import check_environment
from training.utils.run.folders import installing
from training.utils.run.inputs import check_model_path

if TYPE_CHECKING:
    from chat_models import ChatModel

SERVED = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health")
NEEDED = {"ChatCompletionHandler": "messages", "CompletionHandler": "prompt", "ResponseHandler": "input"}
# What transformers' server leaves unheard although it changes the answer, or takes for something else (a frequency
# penalty for one on whatever was said, a suffix for an end of the answer); values that ask for nothing may stand there
UNHEARD = ("logprobs", "top_logprobs", "presence_penalty", "frequency_penalty", "response_format", "functions", "audio",
           "function_call", "prediction", "echo", "suffix", "web_search_options", "modalities", "reasoning", "text",
           "reasoning_effort", "verbosity", "prompt", "conversation", "previous_response_id", "context_management",
           "image", "truncation", "background")  # fmt: skip
EMPTY: tuple[Any, ...] = (None, "", [], {})
NOTHING = (*EMPTY, False, 0, {"type": "text"}, {"format": {"type": "text"}}, ["text"], "medium", "disabled")
TEXTS = ("text", "input_text", "output_text")  # types of the parts of a message
MARK = "Kwzhia"  # a text that stands out
NUMBERS = {"temperature": (0, math.inf), "top_p": (1e-9, 1)}
COUNTS = {"max_tokens": 1, "max_completion_tokens": 1, "max_output_tokens": 1, "seed": 0}  # field -> its least value
SEED: ContextVar[int | None] = ContextVar("SEED", default=None)  # of the request that is worked on
TOOLS: ContextVar[Any] = ContextVar("TOOLS", default=None)  # of that request
LONGEST = 1024  # tokens of an answer, where a request does not say; the server's own


@dataclass
class ServeArguments:
    """Server"""

    path: str = flag("", "folder, hub name or GGUF file (default: step3/actor of the latest run)")
    host: str = flag("127.0.0.1", "the address to listen at; another than this machine's own opens it to others")
    port: int = flag(8000, "the port", minimum=1, maximum=65535)
    dtype: str = flag(
        AUTO, "precision of the weights; auto: bf16 where the hardware computes in it", choices=PRECISIONS
    )


def served_as(path: str) -> str:
    """What a model is called by those who ask: a folder or a file by its name, others as they are given."""
    found = Path(path).expanduser()
    return found.resolve().name if found.exists() else path


def refusal(body: dict[str, Any], needed: str) -> str:
    """Why a request is not served, empty if it is: what the server would leave unheard, or fail at.

    Args:
        body: of the request.
        needed: the field that holds what is to be answered, empty where it is not known.
    """
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            return f"{name}: a request gets one answer here; ask again, with another seed"
    if unheard := [name for name in UNHEARD if name != needed and body.get(name) not in NOTHING]:
        return f"not served here: {', '.join(unheard)}"
    if body.get("tool_choice") not in (None, "auto", "none"):
        return "tool_choice: auto or none here"
    for name, (low, high) in NUMBERS.items():
        value = body.get(name)
        if value is not None and not (type(value) in (int, float) and low <= value <= high and math.isfinite(value)):
            return f"{name}: a number from {low:g} to {high:g}"
    for name, least in COUNTS.items():
        value = body.get(name)
        if value is not None and not (type(value) is int and least <= value < 2**63):
            return f"{name}: a whole number from {least} on"
    stops = body.get("stop") or []
    if not isinstance(stops, (str, list)) or not all(isinstance(one, str) and one for one in stops):
        return "stop: a text, or a list of texts"
    if needed and not body.get(needed):
        return f"{needed} is missing or empty"
    return _no_messages(needed, body[needed]) if needed in ("messages", "input") else ""


def _no_messages(name: str, said: Any) -> str:
    """Why these are no messages, or no input of a response; empty if they are."""
    items = said if isinstance(said, list) else []
    of_roles = [item for item in items if isinstance(item, dict) and isinstance(item.get("role"), str)]
    if name == "messages" and (not items or len(of_roles) < len(items)):
        return "messages: each has a role and a content"
    contents = [item.get("content") for item in of_roles] if of_roles[:1] == items[:1] else [items]
    for content in contents:
        parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
        texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") in TEXTS]
        if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
            return f"{name}: a content is a text, or parts of type text; images and sound are not read here"
    return ""


def unwritten(messages: Sequence[dict[str, Any]], tools: Any, tokenizer: Any) -> str:
    """What of a request the model's chat template has no place for, so that it would be left unheard; else empty.

    Args:
        messages: as the template gets them.
        tools: of the request, empty where none are to be used.
        tokenizer: the model's.
    """

    def text(index: int = 0, **changes: Any) -> str:
        """What the template makes of the conversation with one message changed."""
        changed = [*messages[:index], {**messages[index], **changes}, *messages[index + 1 :]]
        return str(tokenizer.apply_chat_template(changed, tokenize=False))

    place = "the model's chat template has no place for"
    if tools and str(tokenizer.apply_chat_template(messages, tools=tools, tokenize=False)) == text():
        return f"tools: {place} them"
    for index, message in enumerate(messages):
        if message["role"] not in ("user", "assistant") and MARK not in text(index, content=MARK):
            return f"{place} a {message['role']} message" + (" in this place" if index else "")
        calls = [
            {**call, "function": {**call.get("function", {}), "name": MARK}} for call in message.get("tool_calls", ())
        ]
        if calls and MARK not in text(index, tool_calls=calls):
            return f"tool_calls: {place} them"
    return ""


def settle(body: dict[str, Any]) -> None:
    """Put a request that is served into what the server takes as it is meant: an empty value asks for nothing.

    The server ends an answer at the stop "", drops what a message says beside ``tool_calls``, an empty list too, and
    streams a response that does not ask for it.
    """
    for one in (body, *body.get("messages", ())):
        for name in [name for name, value in one.items() if value in EMPTY]:
            del one[name]
    if body.get("tool_choice") == "none":
        body.pop("tools", None)
    body.setdefault("stream", False)
    if "logit_bias" in body:
        body["logit_bias"] = {token: float(bias) for token, bias in body["logit_bias"].items()}


def settled(app: Any, listed: dict[str, Any]) -> Any:
    """The server's application with nothing but what is served, errors in OpenAI's words, and clients that may leave.

    ``listed`` is the model as the list of models has it. Clients look for ``error``: the one for JavaScript says "400
    status code (no body)" of anything else.
    """
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse
    from starlette.exceptions import HTTPException

    async def told(request: Any, error: Exception) -> Any:
        """Any error as JSON; of a body that is no object its values are left out, which may be no JSON themselves."""
        status, said = 500, f"{type(error).__name__}: {error}"
        if isinstance(error, HTTPException):
            status, said = error.status_code, str(error.detail)
        elif isinstance(error, RequestValidationError):
            status, said = 400, "the body of a request is a JSON object, sent as application/json"
        kind = "invalid_request_error" if status < 500 else "server_error"
        said = said.encode(errors="replace").decode()  # it may repeat half a character of the request
        return JSONResponse({"error": {"message": said, "type": kind, "param": None, "code": None}}, status)

    def one_model(name: str) -> dict[str, Any]:
        """The model by its name, which the server itself only lists."""
        if name != listed["id"]:
            raise HTTPException(404, f"{name} is not served here, {listed['id']} is")
        return listed

    app.router.routes = [route for route in app.router.routes if route.path in SERVED]
    app.get("/v1/models/{name:path}")(one_model)
    for error in (HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(error, told)
    return leaving(app)


def leaving(app: Any) -> Any:
    """An application that ends the work on a request whose client has gone; the server ends that on streams alone."""

    async def watched(scope: Any, receive: Any, send: Any) -> None:
        """The request, which ends with its client."""
        if scope["type"] != "http":
            return await app(scope, receive, send)
        said: asyncio.Queue[Any] = asyncio.Queue()
        work = asyncio.ensure_future(app(scope, said.get, send))

        async def listen() -> None:
            """Hand on what the client sends, until it has gone."""
            while (message := await receive())["type"] != "http.disconnect":
                said.put_nowait(message)
            said.put_nowait(message)
            work.cancel()

        listening = asyncio.ensure_future(listen())
        try:
            with contextlib.suppress(asyncio.CancelledError):
                await work
        finally:
            listening.cancel()

    return watched


def understood(handle: Any) -> Any:
    """A handler that says so where the server fails at what it reads: a template, or a value of another type."""
    from fastapi import HTTPException
    from jinja2 import TemplateError

    async def handled(handler: Any, body: dict[str, Any], request_id: str) -> Any:
        """``handle``, whose errors become status 400."""
        try:
            return await handle(handler, body, request_id)
        except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, TemplateError) as error:
            raise HTTPException(400, f"not understood: {type(error).__name__}: {error}") from error

    return handled


def ended(stream: Any) -> Any:
    """A stream of a handler with the line that ends it, for which clients wait; the server leaves it out."""

    async def whole(chunks: Any) -> Any:
        """The chunks and the line."""
        async for chunk in chunks:
            yield chunk
        yield "data: [DONE]\n\n"

    def streaming(*given: Any, **more: Any) -> Any:
        """The handler's answer, whose body is whole."""
        response = stream(*given, **more)
        response.body_iterator = whole(response.body_iterator)
        return response

    return streaming


def settle_requests(model: ChatModel) -> None:
    """Make transformers' server keep to a model, sample where it is asked to, and refuse what it would leave unheard.

    Args:
        model: the one that is served, loaded; the server would load it again, another way, with what its files have.
    """
    from fastapi import HTTPException
    from transformers.cli.serving import chat_completion, completion, response, server
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import BaseHandler

    from training.utils.model.tokenizer import end_ids

    configure = BaseHandler._build_generation_config
    weights, tokenizer = model.weights.model, model.tokenizer
    rows = weights.get_input_embeddings().weight.shape[0]

    def configured(handler: Any, body: dict[str, Any], saved: Any, use_cb: bool = False) -> Any:
        """How a request is answered: its own seed, length, biases of tokens, and sampling where it asks for that.

        It ends where the chat programs end an answer, too.
        """
        SEED.set(body.pop("seed", None))  # the server would set it now, in the midst of another's answer
        config = configure(handler, body, saved, use_cb=use_cb)
        config.max_new_tokens = config.max_new_tokens or LONGEST
        config.eos_token_id = end_ids(tokenizer, saved if config.eos_token_id is None else config, model.name)
        if "logit_bias" in body:
            config.sequence_bias = {(int(token),): bias for token, bias in body["logit_bias"].items()}
            if not all(0 <= token < rows and math.isfinite(bias) for (token,), bias in config.sequence_bias.items()):
                raise HTTPException(400, f"logit_bias: ids of tokens below {rows:,}, with a number each")
        if not config.do_sample and (body.get("temperature") or (body.get("top_p") and body.get("temperature") != 0)):
            config.do_sample, config.top_k = True, 0  # else temperature and top_p have no effect
        return config

    for kind in (chat_completion.ChatCompletionHandler, completion.CompletionHandler, response.ResponseHandler):
        kind.handle_request = understood(kind.handle_request)
    for kind in (chat_completion.ChatCompletionHandler, completion.CompletionHandler):
        kind._streaming = ended(kind._streaming)
    BaseHandler._build_generation_config = configured
    ModelManager.load_model_and_processor = lambda *_, **__: (weights, tokenizer)
    ModelManager.process_model_name = staticmethod(lambda name: name)  # the server's has a revision behind it
    # What the server would list is the hub's cache, and it fails where there is none
    listed = {"id": model.name, "object": "model", "owned_by": "", "created": 0}
    ModelManager.get_gen_models = staticmethod(lambda: [listed])
    build = server.build_server
    server.build_server = lambda *given, **more: settled(build(*given, **more), listed)
    settle_bodies(tokenizer)
    settle_answers(model.context)


def settle_bodies(tokenizer: Any) -> None:
    """Make transformers' server refuse what it, or the model's chat template, would leave unheard."""
    from fastapi import HTTPException
    from transformers.cli.serving.utils import BaseHandler

    validate, converse = BaseHandler._validate_request, BaseHandler.get_processor_inputs_from_messages

    def validated(handler: Any, body: dict[str, Any]) -> None:
        """Refuse what is not served, with status 400, and settle what is."""
        if reason := refusal(body, NEEDED.get(type(handler).__name__, "")):
            raise HTTPException(400, reason)
        settle(body)
        TOOLS.set(body.get("tools"))
        validate(handler, body)

    def conversed(messages: list[dict[str, Any]], modality: Any) -> list[dict[str, Any]]:
        """The messages as the template gets them, if it writes them."""
        given = converse(messages, modality)
        if reason := unwritten(given, TOOLS.get(), tokenizer):
            raise HTTPException(400, reason)
        return given

    BaseHandler._validate_request = validated
    BaseHandler.get_processor_inputs_from_messages = staticmethod(conversed)


def settle_answers(context: int | None) -> None:
    """Make transformers' server keep to the model's context, to a request's own seed, and end what nobody waits for."""
    import torch
    from fastapi import HTTPException
    from transformers.cli.serving.utils import GenerateManager

    stream, answer = GenerateManager.generate_streaming, GenerateManager.generate_non_streaming

    def begin(manager: Any, model: Any, inputs: Any, config: Any) -> None:
        """Refuse a prompt that leaves no room in the context, end an answer where the context does, and seed it.

        The seed goes to the thread that generates, before the answer: what it does now belongs to another request.
        """
        length = len(inputs["input_ids"][0])
        if context and length >= context:
            raise HTTPException(400, f"the prompt has {length:,} tokens, the model reads at most {context - 1:,}")
        if context:
            config.max_new_tokens = min(config.max_new_tokens, context - length)
        seed = SEED.get()
        manager.submit(*((torch.seed,) if seed is None else (torch.manual_seed, seed)))

    def streamed(manager: Any, model: Any, processor: Any, inputs: Any, config: Any, **more: Any) -> Any:
        """An answer piece by piece; the server itself ends it when its client leaves."""
        begin(manager, model, inputs, config)
        return stream(manager, model, processor, inputs, config, **more)

    async def answered(manager: Any, model: Any, processor: Any, inputs: Any, config: Any, **more: Any) -> Any:
        """A whole answer, which ends early when its client leaves."""
        gone = threading.Event()

        def ends(ids: Any, scores: Any, **kwargs: Any) -> Any:
            """Whether each row is to end, as a stopping criterion of ``generate``."""
            return torch.full((len(ids),), gone.is_set(), device=ids.device)

        async def work() -> Any:
            """Check, seed and answer."""
            begin(manager, model, inputs, config)
            return await answer(manager, model, processor, {**inputs, "stopping_criteria": [ends]}, config, **more)

        try:
            return await asyncio.shield(asyncio.ensure_future(work()))
        except asyncio.CancelledError:
            gone.set()
            raise

    GenerateManager.generate_streaming, GenerateManager.generate_non_streaming = streamed, answered


def main(argv: Sequence[str]) -> int:
    """Parse, look at the model, serve; 0 when Ctrl-C ends it."""
    [given] = parse([ServeArguments], argv, prog="serve.py", description=__doc__ or "")
    if given.path and given.path != EMBEDDED:
        check_model_path(given.path, "--path")
    if importlib.util.find_spec("openai") is None:
        raise UserError(f"transformers' server needs the package openai: {installing('openai')}")
    if free_port(given.host, given.port) != given.port:
        raise UserError(f"--port {given.port} is in use at {given.host}; choose another")
    path = given.path or list(latest_models()[0].values())[-1]
    print("starting ...", flush=True)
    import torch
    from chat_models import load_chat_models
    from transformers.cli.serve import Serve

    load = LoadArguments(dtype=given.dtype, device_map="auto" if torch.cuda.is_available() else "")
    [model] = load_chat_models({served_as(path): path}, load, print)
    if not is_loopback(given.host):
        print(f"warning: whoever reaches {given.host} can use the model; there is no password")
    settle_requests(model)
    print(f"model {model.name} at http://{address_of(given.host, given.port)}/v1", flush=True)
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C, which uvicorn raises again when it has ended
        Serve(force_model=model.name, host=given.host, port=given.port, log_level="error")
    return 0


if __name__ == "__main__":
    check_environment()
    raise SystemExit(run_program(main))
