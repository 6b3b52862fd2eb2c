"""What alternates and what is taken up again: twin and engine, `fast` and `hf`, the start-up check, exact resume."""

from __future__ import annotations

import dataclasses
import statistics
import time
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.marks import slow
from tests.step3.hybrid_checks import build, prompts, request, train_two_steps
from tests.utils.checkpoint.resume_checks import ADAPTERS, interrupted
from tests.utils.engine.engine_checks import collate, fixed_rows, train
from tests.utils.generation.test_rollout import build as build_family, request as tokens_request
from training.step3_rlhf_finetuning.roles import build_actor
from training.step3_rlhf_finetuning.sampler_check import SamplerDifference, check_sampler, sampler_difference
from training.utils.engine.states import resting_bytes, states_on_host
from training.utils.engine.zero_config import DTYPES
from training.utils.errors import UserError
from training.utils.generation import cuda_graphs
from training.utils.generation.decode_loop import seconds_since
from training.utils.generation.engines import FastBackend, rollout_backend
from training.utils.generation.sampling import SamplingConfig
from training.utils.model.export import full_state_dict
from training.utils.model.forward import response_log_probs
from training.utils.run.phases import Phases

GREEDY, GREEDY_48 = SamplingConfig(24, greedy=True), SamplingConfig(48, greedy=True)


def test_optimizer_states_make_room_on_a_gpu(device, tiny_model):
    actor = build_actor(str(tiny_model), build(3, 1e-2, 0))
    train_two_steps(actor)
    trained = sum(p.ds_numel for p in actor.engine.module.parameters())
    freed, on_host = resting_bytes(actor.engine)
    if device.type == "cpu":
        assert freed == on_host == 0
        return
    assert freed == pytest.approx(12 * trained, rel=0.05) and freed <= on_host <= 2 * freed
    before = torch.cuda.memory_allocated()
    with states_on_host(actor.engine):
        freed = before - torch.cuda.memory_allocated()
    assert freed == pytest.approx(12 * trained, rel=0.05) and torch.cuda.memory_allocated() == before


def decoded(model: Any) -> dict[str, list[list[int]]]:
    """Greedy tokens of both engines."""
    asked = request(prompts(6), list(range(6)))
    return {name: rollout_backend(name).generate(model, asked, GREEDY).input_ids.tolist() for name in ("hf", "fast")}


def twin_against_plain(path: str, stage: int, lora: int, bits: int) -> tuple[list[dict[str, Any]], torch.Tensor]:
    """Greedy tokens by the twin and by a plain model of the same weights, before and after two optimizer steps; and
    how far log-probs of the engine are from those of the plain model, fp32."""
    torch.manual_seed(0)
    actor = build_actor(path, build(stage, 1e-2, lora, base_bits=bits, actor_gradient_checkpointing=stage > 0))
    plain: Any = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval().to(actor.engine.device)
    found = []
    for trained in (False, True):
        if trained:
            train_two_steps(actor)
        if trained or bits:  # what is loaded in 4 bits is not what the files hold
            state = {name: tensor.to(actor.engine.device) for name, tensor in full_state_dict(actor.engine).items()}
            assert any((state[name] - p).abs().max() > 1e-3 for name, p in plain.named_parameters() if name in state)
            plain.load_state_dict(state, strict=False)
        with actor.generation_mode() as twin:
            mine = decoded(twin)
        found.append({"twin": mine, "plain": decoded(plain)})
    rows = fixed_rows()
    batch = collate(rows, max(len(ids) for ids, _ in rows))
    with actor.scoring_mode() as engine, torch.no_grad():
        difference = response_log_probs(engine, **batch)[0] - response_log_probs(plain, **batch)[0]
    return found, difference.abs().max()


@pytest.mark.parametrize(
    ("stage", "lora", "bits"), [slow(0, 0, 0), (2, 4, 0), slow(3, 0, 0), slow(3, 4, 0), slow(2, 4, 4), slow(3, 4, 4)]
)
def test_the_twin_is_the_engine_before_and_after_steps(device, tiny_model, stage, lora, bits):
    if bits:
        pytest.importorskip("bitsandbytes", reason="requirements-optional.txt")
    found, difference = twin_against_plain(str(tiny_model), stage, lora, bits)
    for at in found:
        assert at["twin"] == at["plain"] and at["twin"]["hf"] == at["twin"]["fast"]
    assert found[0]["twin"] != found[1]["twin"], "the steps must change what is said for this to mean anything"
    assert difference < 2e-4


@pytest.mark.parametrize("tokens_of_a_graph", [7, 256])
@pytest.mark.parametrize("family", ["llama", "opt", "neox", "gpt2"])
def test_graphs_give_what_the_growing_loop_gives(device_of_long_tests, monkeypatch, family, tokens_of_a_graph):
    """In fp32, by several graphs and by one; and with other weights others, as a graph of the old ones would not."""
    device = device_of_long_tests
    monkeypatch.setattr(cuda_graphs, "TOKENS_OF_A_GRAPH", tokens_of_a_graph)
    model, plain = build_family(family).to(device), tokens_request(stop_ids=tuple(range(5, 8)))
    moved = {name: value.to(device) for name, value in vars(plain).items() if isinstance(value, torch.Tensor)}
    asked, made = dataclasses.replace(plain, **moved), []
    captured = cuda_graphs._Steps._captured
    monkeypatch.setattr(cuda_graphs._Steps, "_captured", lambda *a: made.append(1) or captured(*a))
    found = []
    for sampling in (GREEDY_48, SamplingConfig(48, temperature=2.0), SamplingConfig(48, temperature=2.0, top_p=0.9)):
        grown, still = (
            FastBackend(decode_attention=False, graphs=g).generate(model, asked, sampling) for g in (False, True)
        )
        assert torch.equal(still.input_ids, grown.input_ids)
        torch.testing.assert_close(still.logprobs, grown.logprobs, atol=1e-4, rtol=0)
        found.append(still.input_ids.tolist())
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.05)
    assert found[1] != found[0]
    assert len(made) >= 3 * (1 + (tokens_of_a_graph < 48)) if device.type == "cuda" else not made


def sampled_and_scored(path: str, dtype: str, shift: int = 0) -> SamplerDifference:
    """Log-probs as `fast` keeps them against a whole forward's; ``shift`` scores other tokens than the sampled ones."""
    from training.utils.run.distributed import init_distributed

    device = init_distributed()
    model: Any = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPES[dtype]).eval().to(device)
    asked = request([p * 4 for p in prompts(16)], list(range(16)))
    rollout = rollout_backend("fast").generate(model, asked, SamplingConfig(48))
    start = rollout.response_start
    mask = torch.zeros_like(rollout.attention_mask, dtype=torch.bool)
    mask[:, start:] = rollout.response_mask
    ids = rollout.input_ids.clone()
    ids[:, start:] = (ids[:, start:] + shift) % 400
    with torch.no_grad():
        scored = response_log_probs(model, ids, rollout.attention_mask, mask)[0][:, start:]
    return sampler_difference([rollout.logprobs], [scored], [rollout.response_mask])


@pytest.mark.parametrize("dtype", [slow("fp32"), "bf16", slow("fp16")])
def test_the_start_up_check_passes_the_sampler_and_catches_another_policy(device, tiny_model, dtype):
    check_sampler(sampled_and_scored(str(tiny_model), dtype), dtype)
    with pytest.raises(UserError, match="the sampler is not the policy"):
        check_sampler(sampled_and_scored(str(tiny_model), dtype, shift=1), dtype)


@pytest.mark.parametrize(
    ("stage", "dtype", "options"),
    [
        slow(0, "fp32", {}),
        (2, "bf16", {"lora": ADAPTERS}),
        slow(3, "fp32", {}),
        slow(2, "fp32", {"offload": True}),
    ],
)
def test_training_goes_on_where_it_was_saved(device, tiny_model, tmp_path, stage, dtype, options):
    """Bit for bit on a CPU; on a GPU sums that are made by atomic additions have no order, so up to their rounding."""
    result = interrupted(str(tiny_model), str(tmp_path / "c"), stage=stage, dtype=dtype, **options)
    assert result["first"][1] != result["rest"][1], "the schedule moves, so a forgotten one would show"
    exact = device.type == "cpu"
    assert result["resumed"] == (result["rest"] if exact else pytest.approx(result["rest"], rel=1e-4))
    for name, tensor in result["state"].items():
        within = {"rtol": 0.0, "atol": 0.0 if exact else 1e-5 if dtype == "fp32" else 1e-2}
        torch.testing.assert_close(result["resumed_state"][name], tensor, **within)


@pytest.mark.parametrize("stage", [1, slow(2), slow(3)])
def test_fp16_learns_as_fp32_does(device, fp16_everywhere, tiny_model, stage):
    losses = {d: train(str(tiny_model), stage=stage, dtype=d, steps=5)["losses"] for d in ("fp32", "fp16")}
    assert losses["fp16"] == pytest.approx(losses["fp32"], abs=2e-2)
    assert losses["fp16"][-1] < 0.6 * losses["fp16"][0]


@pytest.mark.parametrize("training", [False, True])
def test_a_length_not_seen_before_costs_no_plan(device, training):
    """cuDNN's attention, which PyTorch would take on Hopper, makes one for each shape, far longer than it computes."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    query = torch.randn(4, 8, 64 if training else 1, 64, device=device, dtype=dtype, requires_grad=training)

    def seconds(length: int) -> float:
        mask = torch.ones(4, 1, query.shape[2], length, dtype=torch.bool, device=device)
        states = torch.randn(2, 4, 8, length, 64, device=device, dtype=dtype, requires_grad=training)
        start = time.perf_counter()
        out = torch.nn.functional.scaled_dot_product_attention(query, *states, attn_mask=mask)
        if training:
            out.sum().backward()
        return seconds_since(start, device)

    seconds(64)
    new = statistics.median(seconds(length) for length in range(65, 97))
    known = statistics.median(seconds(length) for length in range(65, 97))
    assert new < 5 * known


def test_phases_say_what_the_allocator_holds(device):
    phases = Phases()
    held = torch.zeros(64 << 20, dtype=torch.uint8, device=device) + 1
    phases.end("load")
    figures = phases.summary()["load"]
    assert figures["peak_gib"] > 0.06 and held.sum() == 64 << 20
    assert ("reserved_gib" in figures) == (device.type == "cuda")
    if device.type == "cuda":
        assert figures["reserved_gib"] >= figures["peak_gib"]
