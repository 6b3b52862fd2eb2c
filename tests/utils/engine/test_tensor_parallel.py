"""Two ranks that hold a model together train, save and go on as one rank does; a missing guard fails a test."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.families import save as save_family
from tests.marks import slow
from tests.rank_pair import RankPair
from tests.tiny import save_tiny_model
from tests.utils.checkpoint.resume_checks import interrupted_divided, resumed_divided, resumed_elsewhere
from tests.utils.engine.engine_checks import collate, fixed_rows, frozen_divided, train, train_divided, without_guard
from training.utils.engine import tensor_parallel
from training.utils.engine.tensor_parallel import FAMILIES, divide_model
from training.utils.errors import UserError
from training.utils.model.forward import response_log_probs

# The same number is added to all of a query's scores: its gradient is 0 but for rounding, and Adam makes steps of it
UNDETERMINED = ("k_proj.bias", "query_key_value.bias")


def assert_equal_training(one, together, odd=0):
    """``odd``: weights of a matrix whose gradient is about Adam's epsilon, so that rounding decides their step."""
    assert together["losses"] == pytest.approx(one["losses"], abs=1e-5)
    assert together["norms"] == pytest.approx(one["norms"], rel=1e-5)
    torch.testing.assert_close(together["log_probs"], one["log_probs"], rtol=0, atol=2e-3 if odd else 1e-4)
    assert together["state"].keys() == one["state"].keys()
    for name in [name for name in one["state"] if not name.endswith(UNDETERMINED)]:
        assert ((together["state"][name] - one["state"][name]).abs() > 1e-4).sum() <= odd, name


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "untied", tie=False)


@pytest.fixture(scope="module")
def one_rank(tiny_model, untied_model):
    """What one rank makes of each model, in three steps that clip and three that do not."""
    return {
        (model, norm): train(str(model), stage=0, max_grad_norm=norm)
        for model in (tiny_model, untied_model)
        for norm in (1.0, 1e6)
    }


@pytest.mark.parametrize(("stage", "norm"), [(0, 1e6), slow(1, 1.0), (2, 1.0), (3, 1.0), slow(3, 1e6)])
@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks_hold_a_model_as_one_rank_does(tiny_model, untied_model, one_rank, rank_pair, stage, norm, tied):
    model = tiny_model if tied else untied_model
    options = {"stage": stage, "micro_batch": 4, "max_grad_norm": norm, "export_between": True}
    first, second = rank_pair.run(train_divided, 2, str(model), **options)
    assert_equal_training(one_rank[model, norm], first, odd=0 if tied else 1)
    assert (first["losses"], first["norms"]) == (second["losses"], second["norms"])


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(tmp_path, rank_pair, family, stage):
    path = save_family(family, tmp_path)
    first, _ = rank_pair.run(train_divided, 2, path, stage=stage)
    assert_equal_training(train(path, stage=0), first, odd=2)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_frozen_model_with_norms_inside_its_heads(tmp_path, rank_pair, stage):
    """DeepSpeed hangs hooks on their gradients."""
    path = save_family("qwen3", tmp_path)
    expected = frozen_divided(1, path, 0)
    for found in rank_pair.run(frozen_divided, 2, path, stage):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_in_bf16_within_its_digits(tiny_model, one_rank, rank_pair, stage):
    first, _ = rank_pair.run(train_divided, 2, str(tiny_model), stage=stage, dtype="bf16")
    assert first["losses"] == pytest.approx(one_rank[tiny_model, 1.0]["losses"], abs=0.1)


@pytest.mark.parametrize("stage", [1, 3])
def test_saved_model_is_whole_and_the_engine(untied_model, rank_pair, tmp_path, stage):
    first, _ = rank_pair.run(train_divided, 2, str(untied_model), stage=stage, save_to=str(tmp_path / "m"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    rows = fixed_rows()
    with torch.no_grad():
        again, _ = response_log_probs(loaded, **collate(rows, max(len(ids) for ids, _ in rows)))
    torch.testing.assert_close(again, first["log_probs"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("stage", [slow(1), 3])
def test_goes_on_bit_for_bit_and_closely_with_another_number(tiny_model, rank_pair, tmp_path, stage):
    """From two ranks that hold a model to the same, to one rank, and to two ranks with a whole model each."""
    folder, kind = str(tmp_path / "c"), {"dtype": "fp32"}
    first, _ = rank_pair.run(interrupted_divided, 2, str(tiny_model), folder, stage=stage, **kind)
    assert first["resumed"] == first["rest"]
    for name, tensor in first["state"].items():
        assert torch.equal(first["resumed_state"][name], tensor), name
    alone = resumed_elsewhere(str(tiny_model), folder, first["counters"], stage=stage, **kind)
    beside = rank_pair.run(resumed_elsewhere, str(tiny_model), folder, first["counters"], stage=4 - stage, **kind)[0]
    for name, tensor in first["state"].items():
        torch.testing.assert_close(alone[name], tensor, rtol=0, atol=1e-5)
        torch.testing.assert_close(beside[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 3])
def test_takes_up_what_whole_models_have_saved(tiny_model, rank_pair, tmp_path, stage):
    folder, kind = str(tmp_path / "c"), {"stage": stage, "dtype": "fp32"}
    first, _ = rank_pair.run(interrupted_divided, 1, str(tiny_model), folder, **kind)
    together, _ = rank_pair.run(resumed_divided, 2, str(tiny_model), folder, first["counters"], **kind)
    for name, tensor in first["state"].items():
        torch.testing.assert_close(together[name], tensor, rtol=0, atol=1e-5)


@pytest.mark.slow
def test_two_groups_of_two(tiny_model, one_rank, tmp_path):
    """Four ranks: each group takes half of the rows."""
    four = RankPair(4)
    try:
        for stage in (0, 1, 2, 3):
            found = four.run(train_divided, 2, str(tiny_model), stage=stage, micro_batch=2)
            assert_equal_training(one_rank[tiny_model, 1.0], found[0])
            assert all(other["losses"] == found[0]["losses"] for other in found)
        first, *_ = four.run(interrupted_divided, 2, str(tiny_model), str(tmp_path / "c"), stage=3, dtype="fp32")
        assert first["resumed"] == first["rest"]
        alone = resumed_elsewhere(str(tiny_model), str(tmp_path / "c"), first["counters"], stage=1, dtype="fp32")
        for name, tensor in first["state"].items():
            torch.testing.assert_close(alone[name], tensor, rtol=0, atol=1e-5)
    finally:
        four.close()


GUARDS = {
    "loss factor": "norms",  # the number of ranks in place of that of their groups
    "rows once": "losses",  # sums over ranks that have the same rows
    "whole export": "state",  # a rank's part of each layer
}


@pytest.mark.parametrize("guard", GUARDS)
def test_what_a_missing_guard_would_do(untied_model, one_rank, rank_pair, guard):
    first, _ = rank_pair.run(without_guard, guard, str(untied_model))
    expected = one_rank[untied_model, 1.0]
    if GUARDS[guard] == "state":
        assert first["state"]["lm_head.weight"].shape != expected["state"]["lm_head.weight"].shape
    else:
        found, right = first[GUARDS[guard]], expected[GUARDS[guard]]
        assert max(abs(a - b) for a, b in zip(found, right, strict=True)) > 1e-3


def test_a_vocabulary_that_is_cut_is_noticed(tiny_model, rank_pair):
    """Tied embeddings, by DeepSpeed's default."""
    assert rank_pair.run(without_guard, "whole logits", str(tiny_model))[0]["error"].startswith("DeepSpeed has cut the")


@pytest.mark.parametrize(
    ("family", "ranks", "words"),
    [
        ("gpt2", 2, "AutoTP does not train gpt2"),
        ("bloom", 2, "AutoTP does not train bloom"),
        ("llama", 4, "does not divide the 2 key-value heads"),
        ("llama", 3, "does not divide the 4 attention heads"),
        ("llama", 5, "does not divide the number of ranks, 12"),
    ],
)
def test_what_can_not_be_divided_is_refused_before_loading(tmp_path, monkeypatch, family, ranks, words):
    monkeypatch.setattr(tensor_parallel, "world_size", lambda: 12)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2} if family == "llama" else {}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family, **heads}), encoding="utf-8")
    with pytest.raises(UserError, match=words):
        divide_model(ranks, str(tmp_path))
