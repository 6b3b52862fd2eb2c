"""Rows divided among ranks: numbers of whole rows, at every stage; what can not be divided; pieces; the memory plan."""

import contextlib
import functools

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from tests.families import FAMILIES as SHAPES, save
from tests.marks import slow
from tests.rank_pair import RankPair
from tests.utils.engine.sequence_checks import (
    beside,
    greedy,
    live_memory,
    log_probs_of,
    refused,
    trained,
)
from training.utils.arguments import LoraArguments, ModelArguments
from training.utils.engine import sequence_parallel
from training.utils.engine.sequence_parallel import FAMILIES, HEAD_POSITIONS, PIECES, head_log_softmax
from training.utils.errors import UserError
from training.utils.memory import plan as plans
from training.utils.memory.training import SequenceCosts
from training.utils.model.limits import divide_rows
from training.utils.model.lora import with_adapters
from training.utils.run.distributed import share_rows

# Of a number, relative to it where it is above 1. In bf16 one rank alone is off from fp32 by 0.12 (DPO's second norm)
TOLERANCE = {"fp32": 1e-5, "bf16": 0.1}


def difference(found, expected):
    """The largest of losses, gradient norms, numbers of evaluation and weights.

    Not of attention's biases: a key's moves all scores of a softmax alike, so its gradient is rounding alone, of which
    Adam makes whole steps.
    """
    pairs = [
        *zip(found["losses"], expected["losses"], strict=True),
        *zip(found["norms"], expected["norms"], strict=True),
    ]
    numbers = [abs(a - b) / max(1.0, abs(b)) for a, b in pairs]
    tensors = [*zip(found["eval"], expected["eval"], strict=True)]
    tensors += [
        (found["weights"][name].float(), weight.float())
        for name, weight in expected["weights"].items()
        if not (name.endswith(".bias") and ("attn" in name or "attention" in name))
    ]
    return max(numbers + [((a - b).abs() / b.abs().clamp(min=1)).max().item() for a, b in tensors])


@pytest.fixture(scope="module")
def whole(tiny_model):
    """The same on one rank."""
    return functools.cache(lambda step, **settings: trained(step, str(tiny_model), ranks=1, **settings))


def save_llama(folder, *, num_attention_heads, num_key_value_heads):
    """A two-layer Llama of so many heads, of eight numbers each; its folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8 * num_attention_heads, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": num_attention_heads, "num_key_value_heads": num_key_value_heads}
    config = LlamaConfig(vocab_size=400, initializer_range=0.3, pad_token_id=0, **sizes, **heads)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


CASES = [
    slow(1, {"stage": 2}),
    slow(1, {"stage": 3, "lora": True, "checkpointing": True}),
    (2, {"stage": 1, "lora": True}),
    slow("dpo", {"stage": 3, "micro_batch": 3}),
]
ALL = [
    (step, {"stage": stage, "lora": lora, "checkpointing": checkpointing, "dtype": dtype})
    for step in (1, 2, "dpo")
    for stage in range(4)
    for lora in (False, True)
    for checkpointing in (False, True)
    for dtype in ("fp32", "bf16")
]


def settings_of_whole(settings):
    kept = ("lora", "base_bits", "dtype", "micro_batch")
    return {name: settings[name] for name in kept if name in settings} | {"stage": 1}


@pytest.mark.parametrize(("step", "settings"), CASES)
def test_divided_rows_train_as_whole_ones(rank_pair, tiny_model, whole, step, settings):
    expected = whole(step, **settings_of_whole(settings))
    for found in rank_pair.run(trained, step, str(tiny_model), ranks=2, **settings):
        assert difference(found, expected) < TOLERANCE["fp32"]


@pytest.mark.parametrize(("step", "stage"), [(1, 3), slow(2, 1), slow("dpo", 2)])
def test_divided_rows_train_adapters_on_a_base_in_4_bits(rank_pair, tiny_model, whole, step, stage):
    pytest.importorskip("bitsandbytes", reason="requirements-optional.txt")
    settings = {"stage": stage, "lora": True, "base_bits": 4}
    expected = whole(step, **settings_of_whole(settings))
    for found in rank_pair.run(trained, step, str(tiny_model), ranks=2, **settings):
        assert difference(found, expected) < TOLERANCE["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 2, "dpo"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_divided_rows_train_as_whole_ones_in_all_settings(rank_pair, tiny_model, whole, step, dtype):
    different = {}
    for _, settings in [case for case in ALL if case[0] == step and case[1]["dtype"] == dtype]:
        expected = whole(step, **settings_of_whole(settings))
        first, second = rank_pair.run(trained, step, str(tiny_model), ranks=2, **settings)
        assert first["losses"] == second["losses"] and first["norms"] == second["norms"]
        if (off := difference(first, expected)) > TOLERANCE[dtype]:
            different[tuple(settings.values())] = off
    assert not different


@pytest.mark.slow
@pytest.mark.parametrize(("world", "ranks", "key_heads"), [(4, 2, 2), (3, 3, 3), (6, 3, 1)])
def test_more_ranks_than_a_pair(tmp_path, world, ranks, key_heads):
    """Groups that each take a share of the rows, and rows in pieces that are not equally long."""
    model = save_llama(tmp_path / "six-heads", num_attention_heads=6, num_key_value_heads=key_heads)
    with contextlib.closing(RankPair(world)) as group:
        for step, stage in [(1, 0), (1, 3), (2, 1), ("dpo", 2), ("dpo", 3)]:
            expected = trained(step, model, ranks=1, stage=1)
            found = group.run(trained, step, model, ranks=ranks, stage=stage)
            shares = found[::ranks]  # one rank of each group, which has the rows of that group
            together = shares[0] | {"eval": [batch for share in shares for batch in share["eval"]]}
            no_weights = {"weights": {}}
            assert difference(together | no_weights, expected | no_weights) < TOLERANCE["fp32"], (step, stage)
            # of a gradient near 0 Adam makes a step of 1e-3: its rounding shows in single weights
            assert difference(together, expected) < 2e-4, (step, stage)
            assert all(other["losses"] == found[0]["losses"] for other in found)


def test_a_wrong_scale_of_the_gradient_is_caught(rank_pair, tiny_model, whole):
    found, _ = rank_pair.run(trained, 1, str(tiny_model), ranks=2, stage=3, fault=True)
    assert found["norms"][0] == pytest.approx(whole(1, stage=1)["norms"][0] / 2, rel=1e-4)


@pytest.fixture(scope="module")
def one_key_head(tmp_path_factory):
    """A model whose two ranks must share its only key head."""
    return save_llama(tmp_path_factory.mktemp("one-key-head"), num_attention_heads=4, num_key_value_heads=1)


def test_other_models_in_the_process_and_answers_see_whole_rows(rank_pair, one_key_head):
    ids = torch.randint(3, 400, (3, 13), generator=torch.Generator().manual_seed(0))
    expected = log_probs_of(one_key_head, "sdpa", ids)
    answers = greedy(AutoModelForCausalLM.from_pretrained(one_key_head, dtype=torch.float32).eval(), ids)
    for found in rank_pair.run(beside, one_key_head, ids):
        for name in ("divided", "whole", "again"):
            assert torch.allclose(found[name], expected, atol=1e-4), name
        assert found["answers"] == answers


def test_rows_that_can_not_be_divided_are_refused(rank_pair, one_key_head):
    for left, several, mask in rank_pair.run(refused, one_key_head):
        assert "padded on the right" in left and "one text each" in several and "no attention mask" in mask


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_that_is_let_in_gives_the_numbers_of_whole_rows(rank_pair, tmp_path, family):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SHAPES[family], "sliding_window", None)
        folder = save(family, tmp_path)
    expected = trained(1, folder, ranks=1, stage=1)
    for stage in (1, 3):
        for found in rank_pair.run(trained, 1, folder, ranks=2, stage=stage):
            assert difference(found, expected) < 2 * TOLERANCE["fp32"], stage


@pytest.mark.parametrize(
    ("ranks", "world", "config", "flags", "words"),
    [
        (2, 3, {}, {}, "number of ranks, 3"),
        (3, 3, {"num_attention_heads": 4, "num_key_value_heads": 2}, {}, "4 attention heads and 2 key heads"),
        (
            4,
            4,
            {"num_attention_heads": 12, "num_key_value_heads": 3, "head_dim": 32},
            {},
            "12 attention heads and 3 key heads",
        ),
        (2, 2, {}, {"attn_implementation": "eager"}, "leave out --attn_implementation"),
        (2, 2, {"sliding_window": 100}, {}, "no further back than 100 tokens"),
    ],
)
def test_what_can_not_be_divided_is_said_before_loading(tmp_path, monkeypatch, ranks, world, config, flags, words):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", str(world))
    MistralConfig(**({"sliding_window": None} | config)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=words):
        divide_rows(str(tmp_path), ModelArguments(**flags), ranks)


@pytest.mark.parametrize("family", [name for name in SHAPES if name not in FAMILIES])
def test_other_families_are_refused_by_name(tmp_path, monkeypatch, family):
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    folder = save(family, tmp_path)
    with pytest.raises(UserError, match=f"is a {family} model"):
        divide_rows(folder, ModelArguments(), 2)


@pytest.mark.parametrize("tokens", [9, 10, PIECES**2 - PIECES - 7, PIECES**2 - 1, PIECES**2, 200])
@pytest.mark.parametrize("rows", [1, 2])
def test_an_mlp_in_pieces_gives_the_same_gradients(tokens, rows):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    mlp = model.model.layers[0].mlp
    hidden, weights = torch.randn(rows, tokens, 16), torch.randn(rows, tokens, 16)

    def gradients():
        inputs = hidden.clone().requires_grad_()
        model.zero_grad()
        (mlp(inputs) * weights).sum().backward()
        ready = [getattr(parameter, "ds_grad_is_ready", True) for parameter in mlp.parameters()]
        assert all(ready), "ZeRO would take none of these gradients"
        return [inputs.grad, *(parameter.grad.clone() for parameter in mlp.parameters())]

    plain = gradients()
    sequence_parallel.mlps_in_pieces(model)
    for found, expected in zip(gradients(), plain, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


def gradients_of_adapters(in_pieces, dropout=0.0):
    """Those of adapters in an MLP, before which nothing trains."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2)
    )
    hidden, weights = torch.randn(2, 200, 16), torch.randn(2, 200, 16)
    if in_pieces:
        sequence_parallel.mlps_in_pieces(model)
    adapted = with_adapters(model, LoraArguments(4, "up_proj,down_proj", True, lora_dropout=dropout)).train()
    trained = {name: parameter for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    for name, parameter in trained.items():
        torch.nn.init.ones_(parameter) if "lora_B" in name else None
    (model.model.layers[0].mlp(hidden) * weights).sum().backward()
    return [parameter.grad for parameter in trained.values()]


def test_adapters_of_a_first_mlp_in_pieces_train():
    for found, expected in zip(gradients_of_adapters(True), gradients_of_adapters(False), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_adapters_of_an_mlp_learn_from_what_they_did_not_drop():
    for found, expected in zip(gradients_of_adapters(True, 0.5), gradients_of_adapters(False, 0.5), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_frozen_mlp_in_pieces_gives_what_one_that_trains_does():
    """To the last bit: before its first step DPO's policy is its reference."""
    torch.manual_seed(0)
    settings = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(num_attention_heads=2, **settings))
    sequence_parallel.mlps_in_pieces(model)
    mlp, hidden = model.model.layers[0].mlp, torch.randn(8, 27, 32)
    trains = mlp(hidden)
    assert torch.equal(mlp.requires_grad_(False)(hidden), trains)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])  # of the loss, after the head
def test_log_probs_of_the_output_layer_in_pieces_have_the_gradients_of_all_logits(bias, scale):
    torch.manual_seed(0)
    count, temperature = HEAD_POSITIONS + 37, 0.7
    head = torch.nn.Linear(16, 40, bias=bias)
    hidden, targets, weights = torch.randn(count, 16), torch.randint(0, 40, (count,)), torch.randn(count)

    def gradients(log_probs):
        inputs = hidden.clone().requires_grad_()
        head.zero_grad()
        found = log_probs(inputs)
        ((found * weights).sum() * scale).backward()
        return [found.detach(), inputs.grad, *(parameter.grad.clone() for parameter in head.parameters())]

    plain = gradients(lambda h: head_log_softmax(h, head.weight, head.bias, temperature)[torch.arange(count), targets])
    pieces = gradients(lambda h: sequence_parallel._HeadLogProbs.apply(h, head.weight, head.bias, targets, temperature))
    for found, expected in zip(pieces, plain, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("classifier", [False, slow(True)])
def test_the_plan_counts_a_rank_s_share_of_the_rows(rank_pair, tiny_model, monkeypatch, classifier):
    peaks = {}
    for ranks, attention in ((1, "sdpa"), (2, sequence_parallel.ULYSSES)):
        with contextlib.ExitStack() as stack, monkeypatch.context() as patch:
            patch.setattr("torch.distributed.is_initialized", lambda: False)
            patch.setenv("WORLD_SIZE", "2")
            share_rows(ranks)
            stack.callback(share_rows, 1)
            fake = plans.fake_role(str(tiny_model), "fp32", attention, LoraArguments(), classifier=classifier)
            costs = SequenceCosts(fake, 400, classifier=classifier)
            peaks[ranks] = {checkpointing: costs.training(2, checkpointing).peak for checkpointing in (False, True)}
    for checkpointing, planned in peaks[2].items():
        for found in rank_pair.run(live_memory, str(tiny_model), classifier, 400, checkpointing):
            assert planned == pytest.approx(found, rel=0.1), checkpointing
        assert planned < 0.7 * peaks[1][checkpointing]
