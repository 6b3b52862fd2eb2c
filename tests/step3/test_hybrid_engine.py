"""The twin is the actor: token for token after optimizer steps, at every ZeRO stage, on one rank and on two."""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from transformers import AutoModelForCausalLM, MambaConfig

from tests.marks import slow
from tests.step3.hybrid_checks import trajectory, twin_equals_engine
from tests.step3.mode_checks import decision, hooked_and_twin, merge_and_restore, modes, moments_at_the_decision, rested
from tests.utils.engine.engine_checks import collate, fixed_rows
from training.step3_rlhf_finetuning import hybrid_engine, roles
from training.utils.arguments import LoraArguments
from training.utils.generation.engines import rollout_backend
from training.utils.generation.vllm import VllmOptions, cache_room
from training.utils.memory import generation
from training.utils.memory.generation import free_bytes, generation_bytes
from training.utils.model.forward import response_log_probs
from training.utils.model.loading import load_causal_lm
from training.utils.model.lora import with_adapters


def check_twin(path, results):
    """Greedy tokens of each rank's twin against a plain model with the engine's weights."""
    plain = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    before = {name: p.clone() for name, p in plain.named_parameters()}
    plain.load_state_dict(results[0]["state"], strict=False)
    assert any((p - before[name]).abs().max() > 1e-3 for name, p in plain.named_parameters())
    rows = fixed_rows()
    with torch.no_grad():
        expected, _ = response_log_probs(plain, **collate(rows, max(len(ids) for ids, _ in rows)))
    for result in results:
        torch.testing.assert_close(result["engine_log_probs"], expected, rtol=0, atol=2e-4)
        tokens = rollout_backend("hf").generate(plain, result["request"], result["sampling"]).input_ids
        for name in ("hf", "fast"):
            assert result["tokens"][name].tolist() == tokens.tolist(), name
        assert not result["twin_trains"]


@pytest.mark.parametrize("stage", [slow(0), slow(1), 2, 3])
def test_twin_equals_engine_on_two_ranks(tiny_model, rank_pair, stage):
    check_twin(tiny_model, rank_pair.run(twin_equals_engine, str(tiny_model), stage=stage, checkpointing=stage > 1))


@pytest.mark.parametrize("stage", [slow(2), 3])
def test_lora_twin_equals_engine(tiny_model, rank_pair, stage):
    results = rank_pair.run(twin_equals_engine, str(tiny_model), stage=stage, lora=4)
    check_twin(tiny_model, results)
    assert not results[0]["own_reference"]


def test_a_twin_with_weights_of_its_own_is_caught(tiny_model):
    with pytest.raises(AssertionError):
        check_twin(tiny_model, [twin_equals_engine(str(tiny_model), stage=1, unlink=True)])


@pytest.mark.parametrize(("stage", "lora"), [(2, 0), slow(3, 0), (3, 4)])
def test_modes_free_what_they_held_and_keep_to_their_own_flags(tiny_model, rank_pair, stage, lora):
    for seen in rank_pair.run(modes, str(tiny_model), stage=stage, lora=lora, checkpointing=True):
        sharded = stage == 3
        assert seen["before"] == seen["after"] == (0 if sharded else seen["whole"])
        assert seen["inside"] == (seen["whole"], 1, True, False), "one gather for the whole round"
        assert seen["training"] == (True, False) and seen["evaluating"] == (False, False)
        assert seen["caches"] == 2 * 2 and seen["caches_alive"] == 0
        assert seen["checkpointing"] == (True, False)


@pytest.mark.parametrize(("stage", "free", "hooked"), [(3, None, False), (3, 1000, True), (2, 1000, False)])
def test_the_hooks_are_chosen_by_all_ranks_where_one_is_short_of_memory(tiny_model, rank_pair, stage, free, hooked):
    assert rank_pair.run(decision, str(tiny_model), stage=stage, free=free) == [(hooked, hooked, False)] * 2


@pytest.mark.parametrize(("states", "rests"), [(10**9, True), (10, False)])
def test_states_make_room_where_that_is_enough(tiny_model, rank_pair, states, rests):
    found = rank_pair.run(decision, str(tiny_model), stage=3, free=1000, states=states)
    assert found == [(not rests, not rests, rests)] * 2


def test_another_model_needs_room_to_decode_too(tiny_model, monkeypatch):
    """Beside its weights: their copies on a CPU, cache and logits, and what a server that rests takes again."""
    asked = []
    monkeypatch.setattr(hybrid_engine, "fits", lambda needed, device: asked.append(needed) or True)
    model = load_causal_lm(str(tiny_model), dtype="fp32")
    options = VllmOptions("python", str(tiny_model), str(tiny_model), "fp32", 4, 100)
    for rows, packed, server in ((4, False, None), (4, True, None), (0, False, SimpleNamespace(options=options))):
        engine = SimpleNamespace(module=model, device=torch.device("cuda"))
        actor = hybrid_engine.HybridEngine(engine, hybrid_engine.make_twin(model), None)
        actor.choose_generation(rows=rows, length=100, packed=packed)
        actor.server = server
        assert actor.another_fits()
    weights, config = generation.weight_bytes(model), model.config
    decoding = generation.cache_bytes(config, 400, 4) + 2 * 4 * config.vocab_size * 4
    assert asked == [weights + decoding, 2 * weights + decoding, 2 * weights + cache_room(config, options)]
    assert generation.cache_bytes(MambaConfig(), 400, 4) == cache_room(MambaConfig(), options) == 0


def test_memory_is_looked_at_when_moments_have_theirs(tiny_model, rank_pair):
    assert rank_pair.run(moments_at_the_decision, str(tiny_model)) == [[True]] * 2


def test_states_rest_where_the_host_has_room(monkeypatch):
    monkeypatch.setattr(generation, "free_bytes", lambda: 1000)
    monkeypatch.setattr(generation, "host_memory", lambda: 100)
    assert [generation.fits(10, torch.device("cpu"), on_host=size) for size in (0, 89, 91)] == [True, True, False]


def test_states_that_rested_are_what_they_were(tiny_model, rank_pair):
    for rests, stays in zip(*(rank_pair.run(rested, str(tiny_model), rests=r) for r in (True, False)), strict=True):
        assert all(map(all, rests["gone"])), "something still holds what should have made room"
        assert not any(map(any, stays["gone"]))
        assert all(rests["same"]) and rests["tokens"] == stays["tokens"]
        torch.testing.assert_close(rests["weights"], stays["weights"], rtol=0, atol=0)
        torch.testing.assert_close(rests["parts"], stays["parts"], rtol=0, atol=0)


@pytest.mark.parametrize("variable", ["LOCAL_SIZE", "LOCAL_WORLD_SIZE"])  # deepspeed's launcher, torchrun
def test_ranks_on_a_cpu_share_its_memory(monkeypatch, variable):
    monkeypatch.setattr(get_accelerator(), "device_name", lambda *_: "cpu")
    monkeypatch.setattr(get_accelerator(), "available_memory", lambda *_: 80_000)
    for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert free_bytes() == 80_000
    monkeypatch.setenv(variable, "4")
    assert free_bytes() == 20_000


def test_the_memory_estimate_counts_weights_copies_and_cache(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    weights = sum(p.nbytes for p in model.parameters())
    plain = generation_bytes(model, rows=4, length=32, packed=False, merged=False)
    assert plain == weights + 2 * 4 * 32 * 2 * 2 * 8 * 4 + 2 * 4 * 400 * 4  # 2 layers of 2 heads 8 wide, 400 tokens
    assert generation_bytes(model, rows=4, length=32, packed=True, merged=False) == plain + weights
    adapted = with_adapters(model, LoraArguments(4, "q_proj", True))
    more = generation_bytes(adapted, rows=4, length=32, packed=False, merged=True) - plain
    assert more == 2 * (32 * 32 + 4 * (32 + 32)) * 4  # in two layers: the saved q_proj, and the adapter itself


@pytest.mark.parametrize(("ranks", "on"), [(2, "cpu"), (2, "cuda"), (1, "cuda")])
def test_a_gather_of_what_is_in_host_memory_copies_each_ranks_shard(tiny_model, monkeypatch, ranks, on):
    """DeepSpeed takes all shards to the accelerator before it makes the whole parameters."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    plain = generation_bytes(model, rows=1, length=1, packed=False, merged=False)
    weights = sum(p.nbytes for p in model.parameters())
    for parameter in model.parameters():
        parameter.ds_tensor = torch.zeros(parameter.numel() // 2)  # stays with the processor
    monkeypatch.setattr(generation, "data_size", lambda: ranks)
    monkeypatch.setattr(generation, "get_accelerator", lambda: SimpleNamespace(device_name=lambda: on))
    found = generation_bytes(model, rows=1, length=1, packed=False, merged=False)
    assert found == (weights + weights // 2 if (ranks, on) == (2, "cuda") else plain)


def test_a_server_finds_the_card_as_empty_as_it_can_be(monkeypatch):
    """What training has reserved is given back before it starts and before it takes new weights."""
    happened = []
    server = SimpleNamespace(
        start=lambda device: happened.append("start"),
        take=lambda engine: happened.append("take"),
        rest=lambda: happened.append("rest"),
    )
    accelerator = SimpleNamespace(empty_cache=lambda: happened.append("empty"))
    for module in (roles, hybrid_engine):
        monkeypatch.setattr(module, "get_accelerator", lambda: accelerator)
    engine = SimpleNamespace(
        module=torch.nn.Linear(1, 1), device=torch.device("cpu"), eval=lambda: None, train=lambda: None
    )
    actor = hybrid_engine.HybridEngine(engine, torch.nn.Linear(1, 1), None)
    assert roles.generation_backend(actor, "vllm", rows=1, length=1, server=server) is server
    with actor.generation_mode():
        happened.append("generate")
    assert happened == ["empty", "start", "empty", "take", "generate", "rest"]


@pytest.mark.parametrize(
    ("stage", "raises"), [slow(0, False), slow(0, True), (2, False), slow(2, True), slow(3, False), (3, True)]
)
def test_merged_adapters_leave_no_trace(tiny_model, rank_pair, stage, raises):
    for result in rank_pair.run(merge_and_restore, str(tiny_model), stage=stage, dtype="bf16", raises=raises):
        assert result["weights_differ"] and result["adapters_passed_over"]
        assert result["changed"] == [] and result["adapters_back"] and result["flags_kept"]


def test_merged_and_unmerged_generate_the_same_tokens(tiny_model, rank_pair):
    for result in rank_pair.run(merge_and_restore, str(tiny_model), stage=3, dtype="fp32"):
        assert result["tokens"] == result["unmerged"]


def test_unmerging_by_subtraction_is_caught(tiny_model):
    assert merge_and_restore(str(tiny_model), stage=0, dtype="bf16", subtract=True)["changed"]


@pytest.mark.parametrize(("lora", "backend"), [slow(0, "fast"), (4, "fast"), (0, "hf"), slow(4, "hf")])
def test_hooked_generation_equals_the_twins(tiny_model, rank_pair, lora, backend):
    lengths = set()
    for result in rank_pair.run(hooked_and_twin, str(tiny_model), lora=lora, backend=backend):
        expected, got = result["expected"], result["got"]
        assert got.input_ids.tolist() == expected.input_ids.tolist()
        torch.testing.assert_close(got.logprobs, expected.logprobs, rtol=0, atol=1e-5)
        torch.testing.assert_close(*reversed(result["reference"]), rtol=0, atol=1e-5)
        assert result["held"] == [0, 0], "parameters stayed gathered"
        assert result["flags"] == (False, False)
        lengths.add(got.response_mask.shape[1])
    assert len(lengths) == 2, "ranks must stop at different lengths for this to mean anything"


def test_hooked_generation_with_other_weights_is_caught(tiny_model, rank_pair):
    result = rank_pair.run(hooked_and_twin, str(tiny_model), lora=0, backend="fast", stale=True)[0]
    assert result["got"].input_ids.tolist() != result["expected"].input_ids.tolist()


@pytest.mark.parametrize(
    ("stage", "lora", "dtype"), [slow(0, 0, "fp32"), (3, 4, "fp32"), (2, 0, "bf16"), slow(3, 0, "bf16")]
)
def test_first_minibatch_has_ratio_one_and_no_kl(tiny_model, tiny_reward, rank_pair, stage, lora, dtype):
    history, _ = rank_pair.run(
        trajectory, str(tiny_model), str(tiny_reward), stage=stage, lora=lora, dtype=dtype, iterations=2
    )
    assert history[0]["policy/first_ratio"] == 1.0
    assert history[1]["policy/first_ratio"] == 1.0
    assert history[0]["kl/per_sequence"] == 0.0
    assert history[1]["kl/per_sequence"] != 0.0
    assert history[0]["rollout/sampler_difference"] < (1e-5 if dtype == "fp32" else 0.1)
