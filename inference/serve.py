"""Give a trained model an OpenAI-compatible endpoint on this machine, by transformers' own server.

    python inference/serve.py                            the model that the latest run's step 3 has trained
    python inference/serve.py --path output/demo/step1 --port 8001

Needs ``pip install openai -c constraints.txt``. Chat, completions and a stream are asked for at
http://127.0.0.1:8000/v1, as any client of that interface does. Ctrl-C ends the program.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # outside the environment, to say so

from chat_arguments import latest_models

from training.utils.arguments import AUTO, PRECISIONS, flag, parse
from training.utils.errors import UserError, run_program
from training.utils.run.demo import EMBEDDED
from training.utils.run.environment import check_environment
from training.utils.run.inputs import check_model_path

LOOPBACK = ("127.0.0.1", "localhost", "::1")
NEEDED = {"ChatCompletionHandler": "messages", "CompletionHandler": "prompt", "ResponseHandler": "input"}
# What transformers' server leaves unheard although it changes the answer; values that ask for nothing may stand there
UNHEARD = ("logprobs", "top_logprobs", "presence_penalty", "response_format", "functions", "function_call", "audio",
           "prediction", "echo")  # fmt: skip
NOTHING: tuple[Any, ...] = (None, False, 0, [], {}, {"type": "text"})
NUMBERS = {"temperature": (0, math.inf), "top_p": (1e-9, 1), "frequency_penalty": (-0.999, math.inf)}
COUNTS = {"max_tokens": 1, "max_completion_tokens": 1, "max_output_tokens": 1, "seed": 0}  # field -> its least value


@dataclass
class ServeArguments:
    """Server"""

    path: str = flag("", "folder, hub name or GGUF file (default: step3/actor of the latest run)")
    host: str = flag("127.0.0.1", "the address to listen at; another than this machine's own opens it to others")
    port: int = flag(8000, "the port", minimum=1, maximum=65535)
    dtype: str = flag(
        AUTO, "precision of the weights; auto: bf16 where the hardware computes in it", choices=PRECISIONS
    )


def check_port(host: str, port: int) -> None:
    """See that the server will be able to listen there.

    Raises:
        UserError: it is taken, or no address of this machine.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as there:
            there.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            there.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}") from error


def check_kind(path: str) -> None:
    """See that a folder's model answers in text.

    Raises:
        UserError: it is a reward model or another classifier, or a LoRA adapter without its base.
    """
    from transformers import AutoConfig

    from training.utils.model.loading import remote_code

    kinds = AutoConfig.from_pretrained(path, **remote_code()).architectures or [""]
    if kinds[0].endswith("Classification"):
        raise UserError(f"--path {path}: {kinds[0]} gives scores, not text; name step 1's, DPO's or step 3's model")


def refusal(body: dict[str, Any], needed: str) -> str:
    """Why a request is not served, empty if it is: what the server would leave unheard, or fail at.

    Args:
        body: of the request.
        needed: the field that holds what is to be answered, empty where it is not known.
    """
    for name in ("n", "best_of"):
        if body.get(name) not in (None, 1):
            return f"{name}: a request gets one answer here; ask again, with another seed"
    if unheard := [name for name in UNHEARD if body.get(name) not in NOTHING]:
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
    return next(filter(None, map(_no_message, body["messages"])), "") if needed == "messages" else ""


def _no_message(message: Any) -> str:
    """Why that is no message; empty if it is one."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        return "messages: each has a role and a content"
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content or ""}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if len(texts) < len(parts) or not all(isinstance(text, str) for text in texts):
        return "messages: a content is a text, or parts of type text; images and sound are not read here"
    return ""


def settle_requests(model: str) -> None:
    """Make transformers' server refuse what it would leave unheard, sample where it is asked to, and keep to a model.

    Args:
        model: the one that is served, as the server calls it.
    """
    from fastapi import HTTPException
    from transformers.cli.serving.model_manager import ModelManager
    from transformers.cli.serving.utils import BaseHandler, GenerateManager

    validate, configure = BaseHandler._validate_request, BaseHandler._build_generation_config
    named, stream, answer = (
        ModelManager.process_model_name,
        GenerateManager.generate_streaming,
        GenerateManager.generate_non_streaming,
    )

    def validated(handler: Any, body: dict[str, Any]) -> None:
        if reason := refusal(body, NEEDED.get(type(handler).__name__, "")):
            raise HTTPException(400, reason)
        validate(handler, body)

    def configured(handler: Any, body: dict[str, Any], saved: Any, use_cb: bool = False) -> Any:
        config = configure(handler, body, saved, use_cb=use_cb)
        if not saved.do_sample and (body.get("temperature") or (body.get("top_p") and body.get("temperature") != 0)):
            config.do_sample, config.top_k = True, 0  # else temperature and top_p have no effect
        return config

    def pinned(asked: str) -> str:
        if str(asked).partition("@")[0] != model:
            raise HTTPException(400, f"{model} alone is served here")
        return named(asked)

    def fits(model: Any, inputs: Any, config: Any) -> None:
        """Refuse a prompt that leaves no room in the context, and end an answer where the context does."""
        length, context = len(inputs["input_ids"][0]), getattr(model.config, "max_position_embeddings", None)
        if context and length >= context:
            raise HTTPException(400, f"the prompt has {length:,} tokens, the model reads at most {context - 1:,}")
        if context:
            config.max_new_tokens = min(config.max_new_tokens, context - length)

    def streamed(manager: Any, model: Any, processor: Any, inputs: Any, config: Any, **more: Any) -> Any:
        fits(model, inputs, config)
        return stream(manager, model, processor, inputs, config, **more)

    async def answered(manager: Any, model: Any, processor: Any, inputs: Any, config: Any, **more: Any) -> Any:
        fits(model, inputs, config)
        return await answer(manager, model, processor, inputs, config, **more)

    GenerateManager.generate_streaming, GenerateManager.generate_non_streaming = streamed, answered
    BaseHandler._validate_request = validated
    BaseHandler._build_generation_config = configured
    ModelManager.process_model_name = staticmethod(pinned)
    # What the server would list is the hub's cache, and it fails where there is none
    ModelManager.get_gen_models = staticmethod(lambda: [{"id": model, "object": "model", "owned_by": "", "created": 0}])


def main(argv: Sequence[str]) -> int:
    """Parse, look at the model, serve; 0 when Ctrl-C ends it."""
    [given] = parse([ServeArguments], argv, prog="serve.py", description=__doc__ or "")
    if given.path and given.path != EMBEDDED:
        check_model_path(given.path, "--path")
    if importlib.util.find_spec("openai") is None:
        raise UserError("transformers' server needs the package openai: pip install openai -c constraints.txt")
    check_port(given.host, given.port)
    path = given.path or list(latest_models()[0].values())[-1]
    print("starting ...", flush=True)
    import torch
    from transformers.cli.serve import Serve

    from training.utils.engine.precision import for_device
    from training.utils.engine.zero_config import DTYPES
    from training.utils.model.loading import resolve_model

    model = resolve_model(path, "--path")
    check_kind(model)
    dtype, line = for_device(given.dtype, torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))
    if line:
        print(line)
    if given.host not in LOOPBACK:
        print(f"warning: whoever reaches {given.host} can use the model; there is no password")
    if (folder := Path(model)).is_dir():  # the server calls a model by its path: step1, actor
        os.chdir(folder.parent)
        model = folder.name
    settle_requests(model)
    print(f"model {model} at http://{given.host}:{given.port}/v1", flush=True)
    precision = str(DTYPES[dtype]).removeprefix("torch.")
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C, which uvicorn raises again when it has ended
        Serve(force_model=model, host=given.host, port=given.port, dtype=precision, log_level="error")
    return 0


if __name__ == "__main__":
    check_environment()
    raise SystemExit(run_program(main))
