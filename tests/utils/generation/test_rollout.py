"""The decoding backends agree with each other, with a full forward, and with the distribution they sample from."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from training.utils.errors import UserError
from training.utils.generation import cache, decode_attention, decode_loop, engines, packed_linear
from training.utils.generation.engines import FastBackend, rollout_backend
from training.utils.generation.rollouts import RolloutBatch, RolloutRequest, has_ended
from training.utils.generation.sampling import SamplingConfig
from training.utils.run.distributed import rank

VOCABULARY, PAD, WIDTH = 97, 0, 12
COMMON: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": PAD}
SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
FAMILIES = ("llama", "qwen2", "gpt2", "opt", "neox", "bloom", "mistral")


def build(family: str, **changes: Any) -> Any:
    """A tiny random model, initialised so widely that a wrong mask or position changes what it says.

    mistral stands for models with a sliding window, whose cache is not the plain one.
    """
    torch.manual_seed(0)
    wide = COMMON | {"initializer_range": 0.3}
    gated = wide | SHAPE | {"intermediate_size": 48, "num_key_value_heads": 2} | changes
    if family == "llama":
        return LlamaForCausalLM(LlamaConfig(**gated)).eval()
    if family == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**gated)).eval()
    if family == "mistral":
        return MistralForCausalLM(MistralConfig(**gated, sliding_window=6)).eval()
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(**wide, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    if family == "opt":
        shape = SHAPE | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}
        return OPTForCausalLM(OPTConfig(**COMMON, init_std=0.3, **shape)).eval()
    if family == "neox":
        return GPTNeoXForCausalLM(GPTNeoXConfig(**wide, **SHAPE, intermediate_size=48)).eval()
    return BloomForCausalLM(BloomConfig(**wide, hidden_size=32, n_layer=2, n_head=4)).eval()


def request(
    lengths: tuple[int, ...] = (3, 9, 1, 6, 9), stop_ids: tuple[int, ...] = (), seed: int = 0
) -> RolloutRequest:
    """Random prompts of the given lengths, left-padded to a width that none of them fills."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.full((len(lengths), WIDTH), PAD)
    mask = torch.zeros_like(ids)
    for row, length in enumerate(lengths):
        ids[row, WIDTH - length :] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, WIDTH - length :] = 1
    return RolloutRequest(ids, mask, torch.arange(len(lengths)) + 100, seed, 3, stop_ids, PAD)


def test_prompts_of_unequal_lengths_are_padded_on_the_left():
    asked = RolloutRequest.of([[1, 2, 3], [2]], [7, 2**62], 2, torch.device("cpu"), seed=4, iteration=5, stop_ids=(2,))
    assert asked.prompt_ids.tolist() == [[1, 2, 3], [2, 2, 2]] and asked.prompt_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert asked.row_ids.tolist() == [7, 2**62] and asked.prompt_ids.dtype == asked.row_ids.dtype == torch.long
    assert (asked.seed, asked.iteration, asked.stop_ids, asked.pad_id, asked.rows) == (4, 5, (2,), 2, ())


def choose(asked: RolloutRequest, rows: list[int]) -> RolloutRequest:
    """The request with these rows only, in this order."""
    return RolloutRequest(
        asked.prompt_ids[rows],
        asked.prompt_mask[rows],
        asked.row_ids[rows],
        asked.seed,
        asked.iteration,
        asked.stop_ids,
        asked.pad_id,
    )


def responses(batch: RolloutBatch) -> list[list[int]]:
    """The response tokens of each row, without padding."""
    ids = batch.input_ids[:, batch.response_start :]
    return [row[mask].tolist() for row, mask in zip(ids, batch.response_mask, strict=True)]


def full_forward_logprobs(model: Any, batch: RolloutBatch, temperature: float = 1.0) -> Tensor:
    """[B, R] log-probs of the responses from one forward per row, alone, without cache and without padding."""
    rows = []
    for ids, mask, response in zip(batch.input_ids, batch.attention_mask, batch.response_mask, strict=True):
        kept, count = ids[mask.bool()][None], int(response.sum())
        with torch.no_grad():
            logits = model(kept).logits[0, -count - 1 : -1].float() / temperature
        picked = logits.log_softmax(-1).gather(1, kept[0, -count:, None])[:, 0]
        rows.append(torch.nn.functional.pad(picked, (0, len(response) - count)))
    return torch.stack(rows)


def two_stops(model: Any, sampling: SamplingConfig) -> tuple[int, int]:
    """Two tokens that greedy decoding produces in the middle, so that rows end at different steps."""
    free = rollout_backend("hf").generate(model, request(), sampling)
    return int(free.input_ids[0, WIDTH + 4]), int(free.input_ids[1, WIDTH + 7])


def assert_same(left: RolloutBatch, right: RolloutBatch) -> None:
    for field in ("input_ids", "attention_mask", "response_mask"):
        assert torch.equal(getattr(left, field), getattr(right, field)), field
    torch.testing.assert_close(left.logprobs, right.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_backends_agree_on_greedy_decoding(family: str) -> None:
    model, sampling = build(family), SamplingConfig(12, greedy=True, temperature=0.7)
    asked = request(stop_ids=two_stops(model, sampling))
    hf = rollout_backend("hf").generate(model, asked, sampling)
    fast = rollout_backend("fast").generate(model, asked, sampling)
    assert len(set(hf.response_mask.sum(1).tolist())) > 1, "rows must end at different steps for this to mean anything"
    assert_same(fast, hf)
    torch.testing.assert_close(fast.logprobs, full_forward_logprobs(model, fast, 0.7), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("name", "module"), [("hf", engines), ("fast", decode_loop)])
def test_every_token_is_a_sign_of_life(monkeypatch, name, module):
    """A batch of long answers may take longer than --hang_timeout."""
    beats = []
    monkeypatch.setattr(module, "beat", lambda: beats.append(1))
    rollout_backend(name).generate(build("llama"), request(), SamplingConfig(8))
    assert len(beats) >= 7


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", ["hf", "fast"])
def test_kept_logprobs_are_the_untruncated_policy(family: str, name: str) -> None:
    model = build(family)
    sampling = SamplingConfig(10, temperature=1.5, top_p=0.9, top_k=20, repetition_penalty=1.3)
    batch = rollout_backend(name).generate(model, request(stop_ids=tuple(range(5, 15))), sampling)
    torch.testing.assert_close(batch.logprobs, full_forward_logprobs(model, batch, 1.5), atol=1e-4, rtol=0)
    assert not batch.logprobs.requires_grad and batch.logprobs.dtype == torch.float32


@pytest.mark.parametrize("name", ["hf", "fast"])
def test_layout(name: str) -> None:
    stops = tuple(range(5, 20))
    asked = request(stop_ids=stops)
    batch = rollout_backend(name).generate(build("llama"), asked, SamplingConfig(10, temperature=2.0))
    longest = int(batch.response_mask.sum(1).max())
    assert batch.response_start == WIDTH and batch.response_mask.dtype == torch.bool
    assert batch.input_ids.shape == batch.attention_mask.shape == (5, WIDTH + longest)
    assert torch.equal(batch.input_ids[:, :WIDTH], asked.prompt_ids)
    assert torch.equal(batch.attention_mask, torch.cat([asked.prompt_mask, batch.response_mask.long()], 1))
    assert (batch.input_ids[:, WIDTH:][~batch.response_mask] == PAD).all()
    assert (batch.logprobs[~batch.response_mask] == 0).all() and (batch.logprobs[batch.response_mask] < 0).all()
    for tokens in responses(batch):
        assert not set(tokens[:-1]) & set(stops), "a row went on after a stop token"
        assert tokens[-1] in stops or len(tokens) == 10


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_gets_the_same_tokens_in_any_batch(family: str) -> None:
    model, sampling = build(family), SamplingConfig(10, temperature=2.0)
    asked = request(stop_ids=tuple(range(5, 15)))
    together = responses(FastBackend().generate(model, asked, sampling))
    assert len({tuple(tokens) for tokens in together}) == 5
    for rows in ([4, 2, 0, 1, 3], [2], [0, 2], [3, 1]):
        again = responses(FastBackend().generate(model, choose(asked, rows), sampling))
        assert again == [together[row] for row in rows]


def rank_rows(rows_of_rank: list[list[int]], lengths: tuple[int, ...]) -> list[list[int]]:
    """Run on a rank: the responses of its share of the rows."""
    model, asked = build("llama"), request(lengths, stop_ids=tuple(range(5, 15)))
    mine = choose(asked, rows_of_rank[rank()])
    return responses(FastBackend().generate(model, mine, SamplingConfig(10, temperature=2.0)))


def test_samples_do_not_depend_on_the_number_of_ranks(rank_pair: Any) -> None:
    lengths, shares = (3, 9, 1, 6, 9), [[4, 0], [1, 3, 2]]
    asked = request(lengths, stop_ids=tuple(range(5, 15)))
    alone = responses(FastBackend().generate(build("llama"), asked, SamplingConfig(10, temperature=2.0)))
    for share, got in zip(shares, rank_pair.run(rank_rows, shares, lengths), strict=True):
        assert got == [alone[row] for row in share]


def shared_beginnings(family_request: RolloutRequest, count: int) -> RolloutRequest:
    """The prompts with `count` equal tokens put before each."""
    start = torch.arange(20, 20 + count)
    ids = torch.full((len(family_request.prompt_ids), WIDTH + count), PAD)
    mask = torch.zeros_like(ids)
    for row, (prompt, kept) in enumerate(zip(family_request.prompt_ids, family_request.prompt_mask, strict=True)):
        tokens = torch.cat([start, prompt[kept.bool()]])
        ids[row, -len(tokens) :], mask[row, -len(tokens) :] = tokens, 1
    fields = vars(family_request) | {"prompt_ids": ids, "prompt_mask": mask}
    return RolloutRequest(**fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_shared_beginning_is_computed_once(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = build(family), SamplingConfig(10, temperature=2.0, repetition_penalty=1.2)
    asked = shared_beginnings(request(stop_ids=tuple(range(5, 15))), 9)
    plain = FastBackend().generate(model, asked, sampling)
    shapes = []
    original = decode_loop.last_logits
    monkeypatch.setitem(decode_loop.PREFILL_TOKENS, "cpu", 20)
    monkeypatch.setattr(decode_loop, "last_logits", lambda *a: shapes.append(tuple(a[1].shape)) or original(*a))
    shared = FastBackend().generate(model, asked, sampling)
    assert_same(shared, plain)
    torch.testing.assert_close(shared.logprobs, full_forward_logprobs(model, shared, 2.0), atol=1e-4, rtol=0)
    if family != "mistral":  # a sliding window has a cache of another kind
        assert shapes[:3] == [(1, 9), (3, 6), (2, 9)], "the beginning once, then what is left of the prompts"


def test_a_beginning_that_is_not_shared_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = build("llama"), SamplingConfig(6, temperature=2.0)
    monkeypatch.setattr(decode_loop, "_shared_prefix", lambda ids, mask: (ids, mask, 2))
    batch = FastBackend().generate(model, request((9, 8, 7)), sampling)
    assert (batch.logprobs - full_forward_logprobs(model, batch, 2.0)).abs().max() > 1e-2


def test_noise_follows_seed_iteration_and_row_id() -> None:
    model, sampling = build("llama"), SamplingConfig(8, temperature=3.0)
    base = request((4, 4))
    same_prompt = RolloutRequest(
        base.prompt_ids[[0, 0, 0]], base.prompt_mask[[0, 0, 0]], torch.tensor([7, 8, 7]), 0, 3, (), PAD
    )
    first, second, third = responses(FastBackend().generate(model, same_prompt, sampling))
    assert first == third != second
    seen = {
        tuple(responses(FastBackend().generate(model, RolloutRequest(*fields), sampling))[0])
        for fields in [
            (base.prompt_ids, base.prompt_mask, base.row_ids, seed, iteration, (), PAD)
            for seed, iteration in [(0, 0), (0, 1), (1, 0), (1, 1), (2**63 + 5, 0), (-3, 0)]
        ]
    }
    assert len(seen) == 6


def test_equal_prompts_and_small_groups_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = build("llama"), SamplingConfig(9, temperature=2.0)
    asked = choose(request(), [0, 1, 0, 2, 3, 1, 4, 0])
    asked = RolloutRequest(asked.prompt_ids, asked.prompt_mask, torch.arange(8), 0, 0, tuple(range(5, 15)), PAD)
    alone = [responses(FastBackend().generate(model, choose(asked, [row]), sampling))[0] for row in range(8)]
    widths = []
    original = decode_loop.last_logits
    monkeypatch.setattr(decode_loop, "last_logits", lambda *a: widths.append(tuple(a[1].shape)) or original(*a))
    monkeypatch.setitem(decode_loop.PREFILL_TOKENS, "cpu", 8)
    assert responses(FastBackend().generate(model, asked, sampling)) == alone
    assert widths[:4] == [(2, 3), (1, 6), (1, 9), (1, 9)], "five distinct prompts, a group is full at 8 tokens"


def test_an_accelerator_takes_prompts_in_larger_groups() -> None:
    lengths = [100] * 100
    sizes = {}
    for device in ("cpu", "cuda"):
        groups = decode_loop._prompt_groups(lengths, decode_loop.prefill_tokens(torch.device(device)))
        assert sorted(row for group in groups for row in group) == list(range(100))
        sizes[device] = [len(group) * 100 for group in groups[:-1]]
    assert set(sizes["cpu"]) == {300} and set(sizes["cuda"]) == {8200}


def test_large_groups_give_the_tokens_of_small_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = build("llama"), SamplingConfig(10, temperature=2.0)
    asked = shared_beginnings(request((3, 9, 1, 6, 9, 4, 8), stop_ids=tuple(range(5, 15))), 9)
    small = FastBackend().generate(model, asked, sampling)
    monkeypatch.setitem(decode_loop.PREFILL_TOKENS, "cpu", decode_loop.PREFILL_TOKENS_OF_ACCELERATORS)
    assert_same(FastBackend().generate(model, asked, sampling), small)


@pytest.mark.parametrize("gone", [(), (0,), (4,), (1, 3), (0, 1, 2), (2, 3, 4), (0, 2, 4)])
def test_rows_that_stay_keep_their_place_and_the_last_ones_fill_the_holes(gone: tuple[int, ...]) -> None:
    going = [row not in gone for row in range(5)]
    order, holes, movers = cache.survivors(going)
    assert sorted(order) == [row for row in range(5) if row not in gone]
    assert [place for place, row in enumerate(order) if place != row] == holes
    assert [order[hole] for hole in holes] == movers and not set(movers) & set(range(len(order)))


@pytest.mark.parametrize("stops", [(), tuple(range(5, 15))])
def test_the_host_asks_the_device_once_per_token(monkeypatch: pytest.MonkeyPatch, stops: tuple[int, ...]) -> None:
    """Each question waits until a GPU has finished; rows that leave must not cost one for every layer."""
    model, questions = build("llama", num_hidden_layers=6), []
    for name in ("tolist", "nonzero", "item"):
        asked_by = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda t, *a, f=asked_by, n=name: questions.append(n) or f(t, *a))
    prefill = decode_loop._prefill
    monkeypatch.setattr(decode_loop, "_prefill", lambda *a, **k: (prefill(*a, **k), questions.clear())[0])
    batch = FastBackend(pack_weights=False).generate(
        model, request(stop_ids=stops), SamplingConfig(10, temperature=2.0)
    )
    assert questions == ["tolist"] * batch.response_mask.shape[1]
    assert bool(stops) == (not batch.response_mask.all()), "rows must leave for this to mean anything"


def fault_positions(ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ids, mask, torch.arange(mask.shape[1] - ids.shape[1], mask.shape[1]).expand_as(ids)


def fault_mask(ids: Tensor, mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return ids, torch.ones_like(mask), positions


@pytest.mark.parametrize(
    ("family", "fault"),
    [
        ("gpt2", fault_positions),
        ("opt", fault_positions),
        ("llama", fault_mask),
        ("neox", fault_mask),
        ("bloom", fault_mask),
    ],
)
def test_planted_fault_in_the_inputs_is_noticed(family: str, fault: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, sampling = build(family), SamplingConfig(6, greedy=True)
    original = decode_loop.last_logits
    faulty = lambda model, i, m, p, cache: original(model, *fault(i, m, p), cache)  # noqa: E731
    monkeypatch.setattr(decode_loop, "last_logits", faulty)
    batch = FastBackend().generate(model, request(), sampling)
    assert (batch.logprobs - full_forward_logprobs(model, batch)).abs().max() > 1e-2


def test_planted_fault_in_the_compaction_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    asked = request(stop_ids=tuple(range(5, 15)))
    forgetful = lambda layer, rows, target, source: setattr(layer, "rows", rows)  # noqa: E731
    monkeypatch.setattr(cache.DecodeLayer, "keep", forgetful)
    batch = FastBackend().generate(model, asked, SamplingConfig(10, temperature=2.0))
    assert (batch.logprobs - full_forward_logprobs(model, batch, 2.0)).abs().max() > 1e-2


def test_lora_adapter_is_active_while_decoding() -> None:
    torch.manual_seed(1)
    model = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear", r=4, init_lora_weights=False)).eval()
    hf, fast = (rollout_backend(n).generate(model, request(), SamplingConfig(8, greedy=True)) for n in ("hf", "fast"))
    assert_same(hf, fast)
    with model.disable_adapter():
        base = FastBackend().generate(model, request(), SamplingConfig(8, greedy=True))
    assert responses(base) != responses(fast)


def wide_model() -> Any:
    """A Llama whose matrices are large enough to be packed, head tied to the embedding."""
    return build("llama", hidden_size=128, intermediate_size=160, tie_word_embeddings=True, vocab_size=300)


def test_decoding_leaves_no_trace_on_models_that_share_a_config(monkeypatch: pytest.MonkeyPatch) -> None:
    trained = wide_model()
    memo: dict[int, Any] = {id(tensor): tensor for tensor in [*trained.parameters(), *trained.buffers()]}
    twin = copy.deepcopy(trained, memo | {id(trained.config): trained.config})
    assert twin.config is trained.config and twin.lm_head.weight is trained.lm_head.weight
    probe, singles = torch.tensor([[7]]), []
    FastBackend().generate(twin, request(), SamplingConfig(2))  # which looks once whether our attention serves
    original = decode_attention.decode_attention

    def counting(module: Any, query: Tensor, *rest: Any, **kwargs: Any) -> Any:
        singles.append(query.shape[2] == 1)
        return original(module, query, *rest, **kwargs)

    monkeypatch.setitem(
        decode_attention.AttentionInterface._global_mapping, decode_attention.DECODE_ATTENTION, counting
    )
    forwards = []
    real_forward = decode_loop.last_logits

    def forward_of_both(*given: Any) -> Tensor:
        before = len(singles)
        trained(probe)  # the training module runs while the twin decodes: it must not meet the decoding attention
        forwards.append(len(singles) - before)
        return real_forward(*given)

    monkeypatch.setattr(decode_loop, "last_logits", forward_of_both)
    modules = {name: dict(module.__dict__) for name, module in twin.named_modules()}
    FastBackend().generate(twin, request(), SamplingConfig(20))
    assert sum(singles) == 19 * 2 and set(forwards) == {0}
    for name, module in twin.named_modules():
        now = module.__dict__
        assert now.keys() == modules[name].keys() and all(now[key] is modules[name][key] for key in now), name
    assert trained.config._attn_implementation == "sdpa"


def test_an_exception_while_decoding_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide_model()

    def broken(*_: Any) -> Tensor:
        assert model.config._attn_implementation == decode_attention.DECODE_ATTENTION
        raise RuntimeError("out of memory")

    monkeypatch.setattr(decode_loop, "last_logits", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        FastBackend().generate(model, request(), SamplingConfig(20))
    assert all("forward" not in module.__dict__ for module in model.modules())
    assert all(getattr(module, "config", model.config) is model.config for module in model.modules())
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.skipif(not packed_linear.packing_supported(), reason="no packed linear layers on this processor")
def test_packed_layers_compute_the_same() -> None:
    model = wide_model()
    ids = torch.randint(3, 300, (5, 7))
    with torch.no_grad():
        plain = model(ids).logits
        with packed_linear.packed_linear(model, 5) as count:
            assert count == 2 * 5 + 1, "q, o, gate, up, down of two layers, and the head; k and v are small"
            packed = model(ids).logits
    torch.testing.assert_close(packed, plain, atol=2e-4, rtol=1e-5)


def test_switches_of_the_fast_backend_do_not_change_tokens() -> None:
    model, sampling = wide_model(), SamplingConfig(20, greedy=True)
    reference = rollout_backend("hf").generate(model, request(), sampling)
    for pack, attention in ((False, False), (True, False), (False, True), (True, True)):
        assert_same(
            FastBackend(pack_weights=pack, decode_attention=attention).generate(model, request(), sampling), reference
        )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("heads", "key_heads"), [(6, 2), (4, 4)])
def test_decode_attention_equals_sdpa(masked: bool, heads: int, key_heads: int) -> None:
    torch.manual_seed(0)
    module = torch.nn.Module()
    module.num_key_value_groups = heads // key_heads  # type: ignore[assignment]
    query = torch.randn(3, heads, 1, 8)
    key, value = torch.randn(3, key_heads, 5, 8), torch.randn(3, key_heads, 5, 8)
    mask = torch.ones(3, 1, 1, 5, dtype=torch.bool)
    mask[1, ..., :2] = False
    bias = torch.zeros(3, 1, 1, 5).masked_fill(~mask, torch.finfo(torch.float32).min)
    ours, _ = decode_attention.decode_attention(module, query, key, value, bias if masked else None, scaling=0.3)
    theirs, _ = decode_attention.sdpa_attention_forward(
        module, query, key, value, mask if masked else None, scaling=0.3
    )
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["hf", "fast"])
def test_the_models_own_generation_config_and_the_global_stream_stay_out(name: str) -> None:
    model, sampling = build("llama"), SamplingConfig(8, temperature=3.0)
    expected = responses(rollout_backend(name).generate(model, request(), sampling))
    own = GenerationConfig(do_sample=True, top_k=1, repetition_penalty=5.0, no_repeat_ngram_size=1, max_new_tokens=2)
    model.generation_config = own
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert responses(rollout_backend(name).generate(model, request(), sampling)) == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert model.generation_config is own and own.top_k == 1


@pytest.mark.parametrize("name", ["hf", "fast"])
def test_bf16_logprobs_stay_near_the_full_forward(name: str) -> None:
    model = build("llama").to(torch.bfloat16)
    batch = rollout_backend(name).generate(model, request(), SamplingConfig(8))
    difference = (batch.logprobs - full_forward_logprobs(model, batch)).abs()[batch.response_mask]
    assert batch.logprobs.dtype == torch.float32 and difference.mean() < 0.1


def test_fast_takes_an_empty_batch_and_a_single_token() -> None:
    model = build("llama")
    empty = FastBackend().generate(model, choose(request(), []), SamplingConfig(5))
    assert empty.input_ids.shape == (0, WIDTH) and empty.logprobs.shape == (0, 0)
    assert responses(FastBackend().generate(model, request((2, 5)), SamplingConfig(1, greedy=True)))[0].__len__() == 1


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_new_tokens", 0),
        ("temperature", 0.0),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("repetition_penalty", 0.0),
    ],
)
def test_bad_sampling_is_one_clear_line(field: str, value: float) -> None:
    with pytest.raises(UserError, match=field):
        SamplingConfig(**({"max_new_tokens": 4} | {field: value}))  # type: ignore[arg-type]


def test_unknown_backend_is_one_clear_line() -> None:
    with pytest.raises(UserError, match="hf or fast"):
        rollout_backend("vllm")


@pytest.mark.parametrize("pad", [0, 2])
def test_the_end_token_is_found_with_pad_equal_to_eos_and_not(pad):
    ids = torch.tensor([[9, 9, 5, 2, pad], [9, 9, 5, 6, 7], [9, 9, pad, pad, pad]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=torch.bool)
    rollout = RolloutBatch(ids, torch.ones_like(ids), 2, mask, torch.zeros(3, 3))
    assert has_ended(rollout, (2,)).tolist() == [True, False, False]
