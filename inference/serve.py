"""Give a trained model an OpenAI-compatible endpoint on this machine, by transformers' own server.

    python inference/serve.py                            the model that the latest run's step 3 has trained
    python inference/serve.py --path output/demo/step1 --port 8001

Needs ``pip install openai -c constraints.txt``. Chat, completions and a stream are asked for at
http://127.0.0.1:8000/v1, as any client of that interface does. Ctrl-C ends the program.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # outside the environment, to say so

from chat_arguments import latest_models

from training.utils.arguments import AUTO, PRECISIONS, flag, parse
from training.utils.errors import UserError, run_program
from training.utils.run.demo import EMBEDDED
from training.utils.run.environment import check_environment
from training.utils.run.inputs import check_model_path

LOOPBACK = ("127.0.0.1", "localhost", "::1")


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
    from transformers.cli.serving.model_manager import ModelManager

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
    # What the server would list is the hub's cache, and it fails where there is none
    ModelManager.get_gen_models = staticmethod(lambda: [{"id": model, "object": "model", "owned_by": "", "created": 0}])
    print(f"model {model} at http://{given.host}:{given.port}/v1", flush=True)
    precision = str(DTYPES[dtype]).removeprefix("torch.")
    with contextlib.suppress(KeyboardInterrupt):  # Ctrl-C, which uvicorn raises again when it has ended
        Serve(force_model=model, host=given.host, port=given.port, dtype=precision, log_level="error")
    return 0


if __name__ == "__main__":
    check_environment()
    raise SystemExit(run_program(main))
