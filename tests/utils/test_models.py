"""Loading models: no dropout in any family, and no weight that no file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from tests.step3.test_rollout import COMMON, FAMILIES, SHAPE, VOCABULARY, build
from training.utils import models
from training.utils.errors import UserError

# Every name that these families give to a kind of dropout
DROPOUT = {
    "llama": {"attention_dropout": 0.5},
    "qwen2": {"attention_dropout": 0.5},
    "mistral": {"attention_dropout": 0.5},
    "gpt2": {"resid_pdrop": 0.5, "embd_pdrop": 0.5, "attn_pdrop": 0.5},
    "opt": {"dropout": 0.5, "attention_dropout": 0.5, "layerdrop": 0.5},
    "neox": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "bloom": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
    "falcon": {"hidden_dropout": 0.5, "attention_dropout": 0.5},
}


def save(family: str, folder: Path) -> Path:
    """A tiny model of the family whose configuration asks for every kind of dropout it knows."""
    if family == "falcon":
        model: Any = FalconForCausalLM(FalconConfig(**COMMON, **SHAPE, initializer_range=0.3))
    else:
        model = build(family)
    for name, value in DROPOUT[family].items():
        assert hasattr(model.config, name), name
        setattr(model.config, name, value)
    model.save_pretrained(folder)
    return folder


def moved_by_training_mode(model: Any) -> float:
    """The largest difference that ``train()`` makes to the logits of a fixed batch."""
    ids = torch.arange(3, 33).reshape(2, 15) % VOCABULARY
    with torch.no_grad():
        torch.manual_seed(0)
        calm = model.eval()(ids).logits
        return (model.train()(ids).logits - calm).abs().max().item()


@pytest.mark.parametrize("family", [*FAMILIES, "falcon"])
def test_no_family_drops_anything_while_it_trains(family, tmp_path):
    folder = str(save(family, tmp_path))
    assert moved_by_training_mode(AutoModelForCausalLM.from_pretrained(folder)) > 0.01  # as the files ask for
    attention = "eager" if family == "bloom" else "sdpa"
    assert moved_by_training_mode(models.load_causal_lm(folder, dtype="fp32", attn_implementation=attention)) == 0.0


@pytest.mark.parametrize("family", ["llama", "qwen2", "neox", "mistral"])
def test_rotary_frequencies_stay_in_fp32(family, tmp_path):
    """As transformers 5.17 loads a model for ZeRO-3: everything in 16 bit."""
    model = models.load_causal_lm(str(save(family, tmp_path)), dtype="bf16")
    exact = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any("inv_freq" in name for name in exact)
    model.to(torch.bfloat16)
    assert all(buffer.dtype == torch.bfloat16 for name, buffer in model.named_buffers() if "inv_freq" in name)
    models.exact_buffers(model)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == exact[name].dtype and torch.equal(buffer, exact[name]), name


def test_a_family_without_an_attention_names_the_flag(tmp_path):
    with pytest.raises(UserError, match="give --attn_implementation eager"):
        models.load_causal_lm(str(save("bloom", tmp_path)), dtype="fp32")


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_language_model_is_no_reward_model(family, tmp_path):
    """Its head would be drawn at random, another one at every start."""
    folder = str(save(family, tmp_path))
    with pytest.raises(UserError, match="language model without a reward head"):
        models.check_reward_head(folder)


def test_weights_that_no_file_holds_are_refused(tmp_path):
    folder = str(save("llama", tmp_path / "lm"))
    with pytest.raises(UserError, match=r"no weights for score\.weight"):
        models.load_classifier(folder, dtype="fp32", pad_token_id=0)
    classifier = models.load_classifier(folder, dtype="fp32", pad_token_id=0, fresh_head_seed=1)
    classifier.save_pretrained(tmp_path / "reward")
    again = models.load_classifier(str(tmp_path / "reward"), dtype="fp32", pad_token_id=0)
    assert torch.equal(again.score.weight, classifier.score.weight)
    with pytest.raises(UserError, match=r"no weights for lm_head\.weight"):
        models.load_causal_lm(str(tmp_path / "reward"), dtype="fp32")
