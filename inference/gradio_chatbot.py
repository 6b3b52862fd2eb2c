"""Compare models in the browser: one prompt, their answers side by side, your vote.

    python inference/gradio_chatbot.py                                          the latest run: SFT beside DPO, RLHF
    python inference/gradio_chatbot.py --path SFT=output/demo/step1 RLHF=output/demo/step3/actor
    python inference/gradio_chatbot.py --path output/demo/step1                 one model: a plain chat page

Votes are appended to a file that step 2 trains on as it is (--data_path). The page listens on 127.0.0.1; another
--host, or a public link by --share, needs --auth USER:PASSWORD.
"""

from __future__ import annotations

import functools
import os
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.append(str(Path(__file__).resolve().parents[1]))  # outside the environment, to say so

from page_guard import credentials, free_port, guarded

from training.utils.arguments import flag, parse
from training.utils.errors import UserError, run_program
from training.utils.run.environment import check_environment
from training.utils.run.inputs import check_model_path

if TYPE_CHECKING:
    import gradio as gr

MAX_MODELS = 4  # columns that stay readable on a laptop
_say = functools.partial(print, flush=True)


@dataclass
class PageArguments:
    """Page"""

    path: list[str] = flag(
        [], "NAME=PATH of each model, or a run's folder (default: SFT, DPO and RLHF of the latest run)"
    )
    reward_model: str = flag("", "reward model for the line under each answer (default: step2 of the latest run)")
    votes_path: str = flag("", "file that votes are appended to (default: votes.jsonl in the output folder)")
    blind: bool = flag(False, "start in blind mode: names are hidden and shuffled until the vote")
    system: str = flag("", "a system message")


@dataclass
class ServerArguments:
    """Server"""

    host: str = flag("127.0.0.1", "address to listen on; any but this machine's own needs --auth")
    port: int = flag(7860, "port to listen on; the next free one if it is taken", minimum=1, maximum=65535)
    share: bool = flag(False, "make a public link through gradio's servers; needs --auth")
    auth: str = flag("", "USER:PASSWORD that visitors must give")
    max_queue: int = flag(32, "requests that may wait; more are told to come back", minimum=1)


def serve(
    page: gr.Blocks, server: ServerArguments, login: tuple[str, str] | None, style: dict[str, Any]
) -> tuple[str, str | None]:
    """Start the server in a thread; returns its address and, with ``--share``, the public one."""
    port = free_port(server.host, server.port)
    if port != server.port:
        _say(f"port {server.port} is in use, taking {port}")
    _, local, public = page.launch(
        server_name=server.host,
        server_port=port,
        share=server.share,
        auth=login,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,  # an unforeseen error's text may name paths and, in blind mode, models
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        mcp_server=False,
        ssr_mode=False,
        state_session_capacity=1000,
        max_file_size=1,  # nothing is uploaded
        **guarded(server.host, password=login is not None),
        **style,
    )
    return local, public or None


def models_of(page: PageArguments) -> tuple[dict[str, str], str]:
    """Name -> path of each model of the page, and the reward model's path or nothing; without torch.

    Args:
        page: paths; empty ones mean the latest run.

    Raises:
        UserError: a path without a model, too many models.
    """
    from chat_arguments import check_path, latest_models, named_models

    paths, reward_path = named_models(page.path, "--path"), page.reward_model
    if not paths:
        paths, judge = latest_models()
        reward_path = reward_path or judge
    if len(paths) > MAX_MODELS:
        raise UserError(f"--path: at most {MAX_MODELS} models fit side by side")
    for path in paths.values():
        check_path(path, "--path")
    if reward_path:
        check_model_path(reward_path, "--reward_model")
    return paths, reward_path


def main(argv: Sequence[str]) -> int:
    """Parse, load, serve until Ctrl-C."""
    from chat_arguments import LoadArguments, SamplingArguments, check_loading

    from training.utils.run.folders import make_dir, output_root, shown

    page, sampling, server, models = parse(
        [PageArguments, SamplingArguments, ServerArguments, LoadArguments],
        argv,
        prog="gradio_chatbot.py",
        description=__doc__ or "",
    )
    login = credentials(server.host, server.auth, server.share)
    free_port(server.host, server.port)
    votes = Path(page.votes_path).expanduser() if page.votes_path else output_root() / "votes.jsonl"
    make_dir(votes.parent, "--votes_path")
    if votes.is_dir():
        raise UserError(f"--votes_path {votes} is a folder, name a file")
    paths, reward_path = models_of(page)
    check_loading(models)
    _say("starting ...")  # the imports below take seconds
    # before gradio is imported: it reads the switch then
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import torch
    from answer_rewards import AnswerRewards
    from chat_models import load_chat_models
    from chat_page import STYLE, build_page

    judge = AnswerRewards(reward_path, []) if reward_path else None  # what it lacks is said before the loading
    loaded = load_chat_models(paths, models, _say)
    if judge is not None:
        _say(f"loading the reward model from {reward_path} ...")
        judge.load(torch.device("cuda:0" if torch.cuda.is_available() else "cpu"))
    blocks = build_page(loaded, judge, sampling, votes, blind=page.blind, system=page.system)
    blocks.queue(max_size=server.max_queue)
    local, public = serve(blocks, server, login, STYLE)
    if len(loaded) > 1:
        _say(f"votes go to {shown(votes)}")
    _say(f"open {local}" + (f" or {public}" if public else "") + "   (Ctrl-C ends)")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        _say("\nbye")
    finally:
        blocks.close(verbose=False)
    return 0


if __name__ == "__main__":
    check_environment()
    sys.exit(run_program(main))
