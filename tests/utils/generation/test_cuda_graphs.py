"""Steps that a CUDA graph can hold, one by one on a CPU: the tokens of the loop that grows, whatever leaves when."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import families
from tests.marks import slow
from tests.utils.generation.test_rollout import FAMILIES, assert_same, build, request, responses, shared_beginnings
from training.utils.generation import cuda_graphs, decode_loop, engines
from training.utils.generation.engines import FastBackend
from training.utils.generation.rollouts import RolloutBatch, RolloutRequest
from training.utils.generation.sampling import SamplingConfig

STOPS = tuple(range(5, 9))
FREE = SamplingConfig(30, temperature=2.0)
SAMPLINGS = {
    "free": FREE,
    "truncated": SamplingConfig(30, temperature=1.5, top_p=0.9, top_k=20),
    "greedy": SamplingConfig(30, greedy=True),
}
STILL = ("llama", "qwen2", "gpt2", "opt", "neox")


def named(value: Any) -> str | None:
    """A case's name: a family's own, a sampling's in `SAMPLINGS`."""
    return next((name for name, sampling in SAMPLINGS.items() if sampling is value), None)


@pytest.fixture(autouse=True)
def small_graphs(monkeypatch):
    """Several graphs in a short response: after 7 tokens, and where half of the rows have left."""
    for module in (cuda_graphs, decode_loop):
        monkeypatch.setattr(module, "TOKENS_WORTH_A_GRAPH", 4)
    monkeypatch.setattr(cuda_graphs, "TOKENS_OF_A_GRAPH", 7)
    monkeypatch.setattr(cuda_graphs, "LOOK_EVERY", 2)
    monkeypatch.setattr(cuda_graphs, "FEW_ROWS", 1)


def respond(model: Any, asked: Any, sampling: SamplingConfig, *, graphs: bool) -> RolloutBatch:
    """As on a GPU: with transformers' own attention."""
    return FastBackend(graphs=graphs, decode_attention=False).generate(model, asked, sampling)


def both(model: Any, asked: Any, sampling: SamplingConfig) -> tuple[RolloutBatch, RolloutBatch]:
    """By the loop that grows, and by the one that stands still."""
    return respond(model, asked, sampling, graphs=False), respond(model, asked, sampling, graphs=True)


# each family with one way to draw in every run of the suite, each way with one family and more
IN_EVERY_RUN = dict(zip(STILL, ["free", "truncated", "greedy", "truncated", "free"], strict=True))
CASES = [
    (family, sampling) if IN_EVERY_RUN[family] == name else slow(family, sampling)
    for family in STILL
    for name, sampling in SAMPLINGS.items()
]


@pytest.mark.parametrize(("family", "sampling"), CASES, ids=named)
def test_the_tokens_are_those_of_the_growing_loop(family: str, sampling: SamplingConfig) -> None:
    model = build(family)
    assert not cuda_graphs.why_not(model)
    for asked in (request(stop_ids=STOPS), shared_beginnings(request((3, 9, 1, 6, 9, 4, 8), stop_ids=STOPS), 9)):
        grown, still = both(model, asked, sampling)
        assert_same(still, grown)
    grown, still = both(model, request(), sampling)
    assert_same(still, grown)


def test_rows_that_have_ended_are_left_behind_and_nothing_is_written_past_their_end(monkeypatch) -> None:
    model, made = build("llama"), []
    original = cuda_graphs._Steps.run
    monkeypatch.setattr(
        cuda_graphs._Steps, "run", lambda s, *a: made.append((len(s.ids), original(s, *a))) or made[-1][1]
    )
    grown, still = both(model, request(stop_ids=STOPS), FREE)
    lengths = still.response_mask.sum(1)
    assert len(set(lengths.tolist())) >= 4, "rows must end at different steps for this to mean anything"
    assert_same(still, grown)
    rows, steps = [rows for rows, _ in made], [steps for _, steps in made]
    assert rows[0] > rows[-1] and rows == sorted(rows, reverse=True), made
    assert max(steps) < 7 + 4 and lengths.max() - 1 <= sum(steps) < lengths.max() - 1 + 2, made


class _Recorder(TorchDispatchMode):
    """Operations with their sizes and numbers; those among them that would wait for a GPU or copy from the host."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "isin", "unique", "bincount", "lift_fresh", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Any] = []
        self.waiting: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        inside = [t for arg in args[1:] if isinstance(arg, (list, tuple)) for t in arg if torch.is_tensor(t)]
        if name.startswith(self.WAITS) or (name.startswith("index") and any(t.dtype == torch.bool for t in inside)):
            self.waiting.append(name)
        told = [tuple(arg.shape) if torch.is_tensor(arg) else str(arg) for arg in args if not isinstance(arg, list)]
        self.kernels.append((name, told))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=named)
@pytest.mark.parametrize("family", STILL)
def test_each_step_is_the_same_operations_and_none_waits(family: str, sampling: SamplingConfig, monkeypatch) -> None:
    """What a graph bakes in, numbers among it, must not change from step to step."""
    model, recorders, once = build(family), [], cuda_graphs._Steps.once
    assert not cuda_graphs.why_not(model)

    def recorded(*given: Any) -> None:
        recorders.append(_Recorder())
        with recorders[-1]:
            once(*given)

    monkeypatch.setattr(cuda_graphs._Steps, "once", recorded)
    respond(model, request((3, 9)), SamplingConfig(**(vars(sampling) | {"max_new_tokens": 8})), graphs=True)
    assert len(recorders) == 7 and not recorders[0].waiting
    assert all(recorder.kernels == recorders[0].kernels for recorder in recorders)


def test_the_recorder_sees_what_it_is_for() -> None:
    with _Recorder() as recorder:
        numbers = torch.tensor([1, 2])
        numbers[numbers > 1]
        torch.isin(numbers, numbers)
        int(numbers.sum())
    assert {"lift_fresh", "index", "isin", "_local_scalar_dense"} <= set(recorder.waiting)


def test_a_row_that_has_ended_stays_in_the_models_range(monkeypatch) -> None:
    """GPT-2 has 64 positions: the longer row ends soon, and would be at its 80th while the other goes on."""
    monkeypatch.setattr(cuda_graphs, "FEW_ROWS", 8)
    monkeypatch.setattr(cuda_graphs, "TOKENS_OF_A_GRAPH", 64)
    model = build("gpt2")
    ids = torch.randint(3, 97, (2, 50), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :40] = 0
    free = respond(
        model,
        RolloutRequest(ids * mask, mask, torch.arange(2), 0, 0, (), 0),
        SamplingConfig(12, greedy=True),
        graphs=False,
    )
    first, other = responses(free)
    stop = next(token for token in first if token not in [first[0], *other])
    grown, still = both(
        model, RolloutRequest(ids * mask, mask, torch.arange(2), 0, 0, (stop,), 0), SamplingConfig(30, greedy=True)
    )
    assert_same(still, grown)
    assert sorted(map(len, responses(still)))[1] == 30


@pytest.mark.parametrize("fault", ["positions", "seen", "column"])
def test_a_planted_fault_in_what_a_step_moves_on_is_noticed(monkeypatch, fault: str) -> None:
    model, original = build("opt"), cuda_graphs._Steps.once

    def faulty(steps: Any, *args: Any) -> None:
        original(steps, *args)
        if fault == "seen":
            steps.seen[:, 0] = True
        else:
            getattr(steps, fault).sub_(1)

    grown, _ = both(model, request(), FREE)
    monkeypatch.setattr(cuda_graphs._Steps, "once", faulty)
    still = respond(model, request(), FREE, graphs=True)
    same = torch.equal(still.input_ids, grown.input_ids)
    assert not same or (still.logprobs - grown.logprobs).abs().max() > 1e-2


def test_a_repetition_penalty_is_for_the_growing_loop(monkeypatch) -> None:
    monkeypatch.setattr(decode_loop, "decode_still", lambda *_: pytest.fail("the penalty would be lost"))
    sampling = SamplingConfig(30, greedy=True, repetition_penalty=1.3)
    assert_same(*both(build("llama"), request(stop_ids=STOPS), sampling))


def test_models_that_do_not_stand_still(monkeypatch) -> None:
    for family in set(FAMILIES) - set(STILL):  # a bias by distance from the mask, a sliding window
        assert cuda_graphs.why_not(build(family)), family
        assert_same(*both(build(family), request(stop_ids=STOPS), FREE))
    scaled = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    assert "rotary" in cuda_graphs.why_not(build("llama", rope_parameters=scaled))
    quantised = build("llama")
    quantised.lm_head.weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    assert "quantised" in cuda_graphs.why_not(quantised)
    other = build("llama")
    monkeypatch.setattr(cuda_graphs._Steps, "logits", lambda steps: torch.zeros(2, other.config.vocab_size))
    assert "logits" in cuda_graphs.why_not(other), "a family whose steps give something else"


@pytest.mark.parametrize(
    ("family", "reason"),
    [("bloom", "position_ids"), ("mistral", "every token"), ("mixtral", "experts"), ("gpt_neo", "compile it whole")],
)
def test_families_that_grow_are_named_once(family: str, reason: str, monkeypatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(engines, "say", said.append)
    model, backend = families.build(family), FastBackend(graphs=True)
    for _ in range(2):
        backend.generate(model, families.prompts(), SamplingConfig(6))
    assert len(said) == 1 and "without CUDA graphs" in said[0] and reason in said[0]


def test_a_bias_of_positions_and_a_mask_that_is_not_taken_are_reasons(monkeypatch) -> None:
    monkeypatch.setitem(families.FAMILIES, "falcon", families.FAMILIES["falcon"] | {"alibi": True})
    model = families.build("falcon")  # as falcon-rw-1b
    assert "bias" in cuda_graphs.why_not(model)
    assert_same(*both(model, request(), SamplingConfig(8, greedy=True)))
    other = build("llama")
    forward = other.forward

    def narrow(*args: Any, attention_mask: Tensor, position_ids: Tensor, **kwargs: Any) -> Any:
        if attention_mask.ndim != 2:
            raise ValueError("a mask of tokens, please")
        return forward(*args, attention_mask=attention_mask, position_ids=position_ids, **kwargs)

    other.forward = narrow
    assert cuda_graphs.why_not(other) == "ValueError: a mask of tokens, please"


def test_a_position_that_the_host_counts_is_noticed(monkeypatch) -> None:
    """The first step would be right: the cache says how many tokens it holds when the steps begin."""
    model = build("gpt2")
    forward = model.forward

    def counting(*args: Any, position_ids: Tensor, past_key_values: Any, **kwargs: Any) -> Any:
        if position_ids.shape[1] == 1:
            position_ids = position_ids * 0 + past_key_values.get_seq_length() - torch.tensor([[2], [0]])
        return forward(*args, position_ids=position_ids, past_key_values=past_key_values, **kwargs)

    assert not cuda_graphs.why_not(build("gpt2"))
    model.forward = counting
    assert "logits" in cuda_graphs.why_not(model)


def test_who_gets_graphs(monkeypatch) -> None:
    model, said = build("llama"), []
    monkeypatch.setattr(engines, "say", said.append)
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert FastBackend()._by_graphs(model, gpu) and not FastBackend()._by_graphs(model, cpu)
    assert not FastBackend(synced=True)._by_graphs(model, gpu)
    assert not FastBackend(graphs=False)._by_graphs(model, gpu) and not said
    monkeypatch.setenv(cuda_graphs.SWITCH, "0")
    assert not FastBackend()._by_graphs(model, gpu)
    assert said == ["TRIPOD_CUDA_GRAPHS=0: tokens are decoded without CUDA graphs"]


def test_graphs_are_made_and_replayed_on_one_side_stream(monkeypatch) -> None:
    """With a stand-in for CUDA: its graph is the call that it would have captured."""
    model, asked, capturing, made, streams = build("llama"), request(stop_ids=STOPS), [], [], []
    expected = respond(model, asked, FREE, graphs=False)
    once, captured = cuda_graphs._Steps.once, cuda_graphs._Steps._captured

    class Graph:
        replay: Any

    class Stream:
        def __init__(self, *_: Any) -> None:
            streams.append(self)

        def wait_stream(self, other: Any) -> None:
            assert other is not self

    @contextlib.contextmanager
    def capture(graph: Graph, stream: Stream, capture_error_mode: str) -> Any:
        assert stream is streams[1] and capture_error_mode == "thread_local"
        capturing.append(graph)
        yield
        made.append(capturing.pop())

    def step(*given: Any) -> None:
        if not capturing:
            return once(*given)
        capturing[0].replay = lambda: once(*given)

    main = Stream()
    stand_ins = {"CUDAGraph": Graph, "Stream": Stream, "current_stream": lambda *_: main, "graph": capture}
    for name, stand_in in (stand_ins | {"stream": lambda _: contextlib.nullcontext()}).items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    cuda_graphs._side_stream.cache_clear()
    monkeypatch.setattr(cuda_graphs._Steps, "once", step)
    run = cuda_graphs._Steps.run

    def on_a_gpu(steps: Any, count: int, make: Any) -> int:
        first = [True]

        def next_step() -> None:
            nonlocal make
            if first.pop() if first else False:
                make = captured(steps, make)
            else:
                make()

        return run(steps, count, next_step)

    monkeypatch.setattr(cuda_graphs._Steps, "run", on_a_gpu)
    assert_same(respond(model, asked, FREE, graphs=True), expected)
    cuda_graphs._side_stream.cache_clear()
    assert len(made) > 2 and len(streams) == 2
