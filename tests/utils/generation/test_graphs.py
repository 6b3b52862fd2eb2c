"""Steps that a CUDA graph can hold, one by one on a CPU: the tokens of the loop that grows, whatever leaves when."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.utils.generation.test_rollout import FAMILIES, assert_same, build, request, shared_beginnings
from training.utils.generation import decode_loop, graphs
from training.utils.generation.engines import FastBackend
from training.utils.generation.requests import RolloutBatch
from training.utils.generation.sampling import SamplingConfig

STOPS = tuple(range(5, 9))
SAMPLINGS = [
    SamplingConfig(30, temperature=2.0),
    SamplingConfig(30, temperature=1.5, top_p=0.9, top_k=20),
    SamplingConfig(30, greedy=True),
]
STILL = ("llama", "qwen2", "gpt2", "opt", "neox")


@pytest.fixture(autouse=True)
def small_graphs(monkeypatch):
    """Several graphs in a short response: after 7 tokens, and where half of the rows have left."""
    for module in (graphs, decode_loop):
        monkeypatch.setattr(module, "TOKENS_WORTH_A_GRAPH", 4)
    monkeypatch.setattr(graphs, "TOKENS_OF_A_GRAPH", 7)
    monkeypatch.setattr(graphs, "LOOK_EVERY", 2)


def respond(model: Any, asked: Any, sampling: SamplingConfig, *, graphs: bool) -> RolloutBatch:
    """As on a GPU: with transformers' own attention."""
    return FastBackend(graphs=graphs, decode_attention=False).generate(model, asked, sampling)


def both(model: Any, asked: Any, sampling: SamplingConfig) -> tuple[RolloutBatch, RolloutBatch]:
    """By the loop that grows, and by the one that stands still."""
    return respond(model, asked, sampling, graphs=False), respond(model, asked, sampling, graphs=True)


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["free", "truncated", "greedy"])
@pytest.mark.parametrize("family", STILL)
def test_the_tokens_are_those_of_the_growing_loop(family: str, sampling: SamplingConfig) -> None:
    model = build(family)
    assert graphs.stands_still(model)
    for asked in (request(stop_ids=STOPS), shared_beginnings(request((3, 9, 1, 6, 9, 4, 8), stop_ids=STOPS), 9)):
        grown, still = both(model, asked, sampling)
        assert_same(still, grown)
    grown, still = both(model, request(), sampling)
    assert_same(still, grown)


def test_rows_that_have_ended_are_left_behind_and_nothing_is_written_past_their_end(monkeypatch) -> None:
    model, made = build("llama"), []
    original = graphs._Steps.run
    monkeypatch.setattr(graphs._Steps, "run", lambda s, *a: made.append((len(s.ids), original(s, *a))) or made[-1][1])
    grown, still = both(model, request(stop_ids=STOPS), SAMPLINGS[0])
    lengths = still.response_mask.sum(1)
    assert len(set(lengths.tolist())) >= 4, "rows must end at different steps for this to mean anything"
    assert_same(still, grown)
    rows, steps = [rows for rows, _ in made], [steps for _, steps in made]
    assert rows[0] > rows[-1] and rows == sorted(rows, reverse=True), made
    assert max(steps) <= 7 and lengths.max() - 1 <= sum(steps) < lengths.max() - 1 + 2, made


def test_a_step_asks_the_device_nothing(monkeypatch) -> None:
    """A graph can not be made of a step that waits for an answer."""
    model, questions = build("llama"), []
    once = graphs._Steps.once

    def watched(*args: Any) -> None:
        with monkeypatch.context() as patched:
            for name in ("tolist", "nonzero", "item", "__bool__", "__int__", "__index__", "__float__"):
                real = getattr(Tensor, name)
                patched.setattr(Tensor, name, lambda t, *a, f=real, n=name: questions.append(n) or f(t, *a))
            once(*args)

    monkeypatch.setattr(graphs._Steps, "once", watched)
    for sampling in SAMPLINGS:
        respond(model, request(stop_ids=STOPS), sampling, graphs=True)
    assert questions == []


@pytest.mark.parametrize("fault", ["positions", "seen", "column"])
def test_a_planted_fault_in_what_a_step_moves_on_is_noticed(monkeypatch, fault: str) -> None:
    model, original = build("opt"), graphs._Steps.once

    def faulty(steps: Any, *args: Any) -> None:
        original(steps, *args)
        if fault == "seen":
            steps.seen[:, 0] = True
        else:
            getattr(steps, fault).sub_(1)

    grown, _ = both(model, request(), SAMPLINGS[0])
    monkeypatch.setattr(graphs._Steps, "once", faulty)
    still = respond(model, request(), SAMPLINGS[0], graphs=True)
    same = torch.equal(still.input_ids, grown.input_ids)
    assert not same or (still.logprobs - grown.logprobs).abs().max() > 1e-2


def test_a_repetition_penalty_is_for_the_growing_loop(monkeypatch) -> None:
    monkeypatch.setattr(decode_loop, "decode_still", lambda *_: pytest.fail("the penalty would be lost"))
    sampling = SamplingConfig(30, greedy=True, repetition_penalty=1.3)
    assert_same(*both(build("llama"), request(stop_ids=STOPS), sampling))


def test_models_that_do_not_stand_still(monkeypatch) -> None:
    for family in set(FAMILIES) - set(STILL):  # a bias by distance from the mask, a sliding window
        assert not graphs.stands_still(build(family)), family
        assert_same(*both(build(family), request(stop_ids=STOPS), SAMPLINGS[0]))
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert not graphs.stands_still(build("llama", rope_parameters=scaled))
    quantised = build("llama")
    quantised.lm_head.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    assert not graphs.stands_still(quantised)
    other = build("llama")
    monkeypatch.setattr(graphs._Steps, "logits", lambda steps: torch.zeros(2, other.config.vocab_size))
    assert not graphs.stands_still(other), "a family whose steps give something else"
