"""Step 3's trajectories on recorded rollouts, and faults to plant in them; callable here and on the rank pair."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.step3.hybrid_checks import trajectory
from training.step3_rlhf_finetuning import experience, ppo_trainer, roles
from training.utils.engine import engine as engines
from training.utils.generation.engines import rollout_backend
from training.utils.generation.rollouts import RolloutBatch, RolloutRequest
from training.utils.generation.sampling import SamplingConfig
from training.utils.sharing import attention
from training.utils.sharing.rows import ways_back

RUN: dict[str, Any] = {
    "iterations": 5,
    "ppo_epochs": 2,
    "stop_ids": tuple(range(2, 80)),
}  # one token in five ends a row
Recording = dict[tuple[int, int], tuple[list[int], list[float]]]


class Recorder:
    """Decodes as `fast` does, and keeps each row's tokens and log-probs by iteration and row id."""

    def __init__(self) -> None:
        self.rows: Recording = {}

    def generate(self, model: Any, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        batch = rollout_backend("fast").generate(model, request, sampling)
        for i, row_id in enumerate(request.row_ids.tolist()):
            mask = batch.response_mask[i]
            tokens = batch.input_ids[i, batch.response_start :][mask].tolist()
            self.rows[request.iteration, row_id] = (tokens, batch.logprobs[i][mask].tolist())
        return batch


class Replay:
    """Answers every request from a recording, whatever the model says."""

    def __init__(self, rows: Recording) -> None:
        self.rows = rows

    def generate(self, model: Any, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        rows = [self.rows[request.iteration, row_id] for row_id in request.row_ids.tolist()]
        longest = max(len(tokens) for tokens, _ in rows)
        ids = torch.full((len(rows), longest), request.pad_id)
        logprobs = torch.zeros(len(rows), longest)
        mask = torch.zeros(len(rows), longest, dtype=torch.bool)
        for i, (tokens, kept) in enumerate(rows):
            ids[i, : len(tokens)], logprobs[i, : len(tokens)] = torch.tensor(tokens), torch.tensor(kept)
            mask[i, : len(tokens)] = True
        return RolloutBatch(
            torch.cat([request.prompt_ids, ids], 1),
            torch.cat([request.prompt_mask, mask.long()], 1),
            request.prompt_ids.shape[1],
            mask,
            logprobs,
        )


def _step_at_every_micro_batch(engine: Any, loss_sum: Any, count: float) -> None:
    if getattr(engine, "steps_at_last_backward", -1) == engine.global_steps:  # the loop has not stepped in between
        engine.step()
    _backward(engine, loss_sum, count)
    engine.steps_at_last_backward = engine.global_steps


def _phantom_step(*args: Any, **kwargs: Any) -> Any:
    """An optimizer step without gradients at the start, as DeepSpeed's ZeRO 0 takes one in 16 bit."""
    engine = _initialize(*args, **kwargs)
    engine.backward(sum(p.float().sum() for p in engine.module.parameters() if p.requires_grad) * 0.0)
    engine.step()
    return engine


def _own_weights(model: Any) -> Any:
    """A twin that does not see what the engine learns."""
    return AutoModelForCausalLM.from_pretrained(model.config._name_or_path, dtype=torch.float32).eval()


def _behind_each_other(seen_until: torch.Tensor) -> list[list[range]]:
    """The ways of a plain row: each answer sees those before it."""
    return ways_back(torch.where(seen_until > 0, seen_until.shape[1], 0))


_backward, _initialize, _values = engines.backward, engines.initialize_engine, experience.score_values

# name -> (where, attribute, what stands there instead): one classic mistake for each kind of test
FAULTS: dict[str, tuple[Any, str, Any]] = {
    "each rank for itself": (ppo_trainer, "all_reduce_sum", lambda values: values.detach().double().clone()),
    "a step at every micro-batch": (engines, "backward", _step_at_every_micro_batch),
    "a phantom optimizer step": (engines, "initialize_engine", _phantom_step),
    "a twin with weights of its own": (roles, "make_twin", _own_weights),
    "answers see each other": (attention, "ways_back", _behind_each_other),
    "rows in another order": (experience, "score_values", lambda *args: _values(*args).flip(0)),
}


@contextlib.contextmanager
def planted(fault: str) -> Iterator[None]:
    """While this is open the fault of that name is in the program; none for an empty name.

    The trajectory is to tell, so the first ratio, which most of them move, ends no run.
    """
    if not fault:
        yield
        return
    where, attribute, instead = FAULTS[fault]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(where, attribute, instead)
        patch.setattr(ppo_trainer, "check_first_ratio", lambda *args, **kwargs: None)
        yield


def replayed(actor: str, reward: str, rows: Recording | None, *, fault: str = "", **run: Any) -> list[dict[str, float]]:
    """`trajectory` over five iterations of two epochs, one optimizer step each, on recorded rollouts (None: live)."""
    backend = None if rows is None else Replay(rows)
    with planted(fault):
        return trajectory(actor, reward, backend=backend, **RUN, **run)


def record(actor: str, reward: str, **run: Any) -> tuple[list[dict[str, float]], Recording]:
    """The reference: one rank, all eight rows in one micro-batch, ZeRO 0; its metrics and its rollouts."""
    recorder = Recorder()
    history = trajectory(actor, reward, backend=recorder, stage=0, **{"micro_batch": 8} | RUN | run)
    return history, recorder.rows
