"""The actor served by a process with weights of its own, callable in this process and on the rank pair."""

from __future__ import annotations

import os
import signal
from typing import Any

import torch

from tests.step3.hybrid_checks import build, prompts, request, train_two_steps
from training.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from training.step3_rlhf_finetuning.roles import build_actor
from training.utils.generation.engines import FastBackend, rollout_backend
from training.utils.generation.rollouts import RolloutBatch, RolloutsLost
from training.utils.generation.sampling import SamplingConfig
from training.utils.generation.vllm import VllmBackend, VllmOptions
from training.utils.generation.vllm_python import find_vllm
from training.utils.model.loading import load_causal_lm
from training.utils.model.tokenizer import load_tokenizer
from training.utils.run.distributed import init_distributed, rank

LENGTH = 32
_servers: dict[tuple[str, str, int], VllmBackend] = {}  # of this process: a case takes the one that is there


def server(path: str, python: str = "", *, rows: int = 8, fresh: bool = False, ranks: int = 1) -> VllmBackend:
    """A started server of a model; the same one for the same arguments unless a ``fresh`` one is wanted."""
    device = init_distributed()
    if fresh or (path, python, ranks) not in _servers:
        options = VllmOptions(find_vllm(python), path, path, "fp32", rows, LENGTH, ranks=ranks)
        made = VllmBackend(options, load_tokenizer(path))
        made.start(device)
        if fresh:
            return made
        _servers[path, python, ranks] = made
    return _servers[path, python, ranks]


def greedy(actor: HybridEngine, backend: VllmBackend) -> dict[str, Any]:
    """Greedy answers of ``hf``, ``fast`` and the server to prompts of this rank, and the engine's log-probs of them."""
    together = backend.options.ranks > 1  # ranks that share a vLLM ask alike, of different numbers of rows
    how = SamplingConfig(3 if rank() and not together else 9, greedy=True)
    rows = 2 if together and not rank() else 3
    mine = request(prompts(6)[rank() :: 2][:rows], list(range(rows)))
    actor.server = None
    with actor.generation_mode() as twin:
        found = {name: rollout_backend(name).generate(twin, mine, how) for name in ("hf", "fast")}
    actor.server = backend
    with actor.generation_mode() as engine:
        found["vllm"] = backend.generate(engine, mine, how)
    return {
        "tokens": {name: rollout.input_ids.tolist() for name, rollout in found.items()},
        "logprobs": {name: rollout.logprobs for name, rollout in found.items()},
    }


def before_and_after(
    path: str, *, stage: int, lora: int = 0, base_bits: int = 0, python: str = "", ranks: int = 1
) -> list[dict[str, Any]]:
    """`greedy` before and after two optimizer steps."""
    torch.manual_seed(0)
    built = build(stage, 1e-2, lora, base_bits=base_bits)
    actor, backend = build_actor(path, built), server(path, python, ranks=ranks)
    first = greedy(actor, backend)
    train_two_steps(actor)
    return [first, greedy(actor, backend)]


def sampled(path: str, python: str = "", **how: Any) -> dict[str, RolloutBatch]:
    """Rollouts of one model by ``fast`` and the server, drawn as ``how`` says."""
    model, backend = load_causal_lm(path, dtype="fp32").eval(), server(path, python)
    stops = tuple(range(3, 60))
    asked, sampling = request(prompts(8), list(range(8)), 3, stop_ids=stops), SamplingConfig(12, **how)
    return {name: b.generate(model, asked, sampling) for name, b in (("fast", FastBackend()), ("vllm", backend))}


def drawn_together(path: str, ranks: int) -> dict[str, RolloutBatch]:
    """This rank's sampled rollouts by ``fast`` and by a server whose processes hold the model together."""
    model, backend = load_causal_lm(path, dtype="fp32").eval(), server(path, ranks=ranks)
    rows = 3 - rank()
    asked, sampling = request(prompts(4)[rank() :][:rows], [10 * rank() + i for i in range(rows)]), SamplingConfig(8)
    return {name: b.generate(model, asked, sampling) for name, b in (("fast", FastBackend()), ("vllm", backend))}


def asked_differently(path: str) -> str:
    """What a rank is told whose neighbour asks for more tokens."""
    model, backend = load_causal_lm(path, dtype="fp32").eval(), server(path, ranks=2)
    try:
        backend.generate(model, request(prompts(2), [0, 1]), SamplingConfig(2 + rank()))
    except ValueError as error:
        return str(error)
    return ""


def killed_on_rank_1(path: str, ranks: int = 1) -> list[str]:
    """What each rank is told when the process beside rank 1 is killed: while answering, and when asked again."""
    model, backend = load_causal_lm(path, dtype="fp32").eval(), server(path, fresh=True, ranks=ranks)
    asked, said = request(prompts(2), [0, 1]), []
    backend.generate(model, asked, SamplingConfig(2))
    if rank() == 1:
        os.kill(backend.worker.process.pid, signal.SIGKILL)
    for _ in range(2):
        try:
            backend.generate(model, asked, SamplingConfig(2))
        except RolloutsLost as lost:
            said.append(str(lost))
    return said
