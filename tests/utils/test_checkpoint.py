"""Exported models: in several files, over an earlier model, and one that is damaged on its way."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.tiny import save_tiny_model, tiny_tokenizer
from training.utils import checkpoint


def save(model, folder, size="5GB"):
    checkpoint.save_model(model, tiny_tokenizer(), folder, stop_ids=[2], max_shard_size=size)


def same_weights(model, folder):
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    return all(torch.equal(tensor, loaded[name]) for name, tensor in model.state_dict().items())


@pytest.fixture
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)


def test_a_large_model_is_saved_in_several_files(model, tmp_path):
    save(model, tmp_path / "m", "100KB")
    files = sorted(p.name for p in (tmp_path / "m").glob("model*.safetensors"))
    assert len(files) > 1
    index = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == files
    assert same_weights(model, tmp_path / "m")


@pytest.mark.parametrize(("first", "then"), [("5GB", "100KB"), ("100KB", "5GB")])
def test_files_of_an_earlier_model_are_not_loaded_instead(model, tmp_path, first, then):
    earlier = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "other", seed=9), dtype=torch.float32)
    save(earlier, tmp_path / "m", first)
    save(model, tmp_path / "m", then)
    assert same_weights(model, tmp_path / "m") and not same_weights(earlier, tmp_path / "m")


def test_a_tensor_that_was_not_saved_as_it_is_ends_the_run(model, tmp_path, monkeypatch):
    original = checkpoint._write

    def wrong(model, weights, *rest):
        name = next(iter(weights))
        return original(model, weights | {name: weights[name] + 1}, *rest)

    monkeypatch.setattr(checkpoint, "_write", wrong)
    with pytest.raises(RuntimeError, match="differs from the trained one in 1 tensors"):
        save(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()
