"""Exported models: in several files, over an earlier model, and one that is damaged on its way."""

import json
import os

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tests.tiny import save_tiny_model, tiny_tokenizer
from training.utils.arguments import LoraArguments
from training.utils.model import export
from training.utils.model.lora import with_adapters


def save(model, folder, size="5GB"):
    export.save_model(model, tiny_tokenizer(), folder, stop_ids=[2], max_shard_size=size)


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


def test_weights_may_be_read_by_whom_the_user_allows(tiny_model, model, tmp_path):
    adapted = with_adapters(model, LoraArguments(lora_dim=2, only_optimize_lora=True))
    save(adapted, tmp_path / "m")
    files = [path for path in (tmp_path / "m").rglob("*") if path.is_file()]
    assert {path.name for path in files} >= {"model.safetensors", "adapter_model.safetensors"}
    assert len({path.stat().st_mode for path in files}) == 1


@pytest.mark.parametrize(("first", "then"), [("5GB", "100KB"), ("100KB", "5GB")])
def test_files_of_an_earlier_model_are_not_loaded_instead(model, tmp_path, first, then):
    earlier = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "other", seed=9), dtype=torch.float32)
    save(earlier, tmp_path / "m", first)
    (tmp_path / "m" / "adapter").mkdir()  # of LoRA, which the next run is without
    save(model, tmp_path / "m", then)
    assert same_weights(model, tmp_path / "m") and not same_weights(earlier, tmp_path / "m")
    assert not (tmp_path / "m" / "adapter").exists()


def test_a_tensor_that_was_not_saved_as_it_is_ends_the_run(model, tmp_path, monkeypatch):
    original = export._write

    def wrong(model, weights, *rest):
        name = next(iter(weights))
        return original(model, weights | {name: weights[name] + 1}, *rest)

    monkeypatch.setattr(export, "_write", wrong)
    with pytest.raises(RuntimeError, match="differs from the trained one in 1 tensors"):
        save(model, tmp_path / "m")
    assert not list((tmp_path / "m").iterdir()), "no part of it"


def test_a_save_that_is_stopped_leaves_the_earlier_model_and_the_next_one_cleans_up(model, tmp_path, monkeypatch):
    """All of it happens in the folder itself: another file system may begin at it, and its parent may be another's."""
    save(model, tmp_path / "m")
    earlier = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    with monkeypatch.context() as killed:
        killed.setattr(export, "move_into", lambda *_: 1 / 0)
        killed.setattr(export.shutil, "rmtree", lambda *_, **__: None)
        with pytest.raises(ZeroDivisionError):
            save(model, tmp_path / "m")
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir() if path.is_file()} == earlier
    assert [path.name for path in tmp_path.iterdir()] == ["m"] and (tmp_path / "m" / ".saving").is_dir()
    save(model, tmp_path / "m")
    assert {path.name for path in (tmp_path / "m").iterdir()} == earlier.keys() and same_weights(model, tmp_path / "m")


def test_a_folder_that_was_moved_in_part_is_moved_again(model, tmp_path):
    """A resumed run puts it back as links to its checkpoint's files, and some of those lie at the target already."""
    save(model, tmp_path / "best")
    (tmp_path / "m").mkdir()
    for name in ("tokenizer.json", "model.safetensors"):
        os.link(tmp_path / "best" / name, tmp_path / "m" / name)
    export.move_into(tmp_path / "best", tmp_path / "m")
    assert not (tmp_path / "best").exists() and same_weights(model, tmp_path / "m")


@pytest.mark.parametrize("only_adapters", [True, False])
def test_an_adapter_folder_and_its_base_are_the_model_or_it_is_not_written(tiny_model, tmp_path, capsys, only_adapters):
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    trained = with_adapters(base, LoraArguments(2, "q_proj,v_proj", only_adapters))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    save(trained, tmp_path / "m")
    ids = torch.arange(3, 20).unsqueeze(0)
    expected = trained.eval()(ids).logits
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.float32).eval()
    torch.testing.assert_close(merged(ids).logits, expected, atol=1e-4, rtol=1e-4)
    if not only_adapters:
        assert not (tmp_path / "m" / "adapter").exists()
        assert "an adapter alone would be another model" in capsys.readouterr().out
        return
    fresh = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    loaded = PeftModel.from_pretrained(fresh, tmp_path / "m" / "adapter").eval()
    torch.testing.assert_close(loaded(ids).logits, expected, atol=1e-5, rtol=1e-5)
    for name in ("chat_template.jinja", "tokenizer_config.json", "generation_config.json"):  # those of the base differ
        assert (tmp_path / "m" / "adapter" / name).read_bytes() == (tmp_path / "m" / name).read_bytes()


@pytest.mark.parametrize(
    "settings",
    [
        {"do_sample": False, "temperature": 0.9},
        {"do_sample": False, "top_p": 0.5, "top_k": 3},
        {"num_return_sequences": 3},
        {"early_stopping": True, "length_penalty": 2.0},
    ],
)
def test_generation_settings_that_can_be_read_and_not_written(model, tmp_path, settings):
    """transformers reads such a generation_config.json and refuses to write it: after hours of training."""
    for name, value in settings.items():
        setattr(model.generation_config, name, value)
    with pytest.raises(ValueError, match="Fix these issues|invalid"):
        model.save_pretrained(tmp_path / "plain")
    save(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["eos_token_id"] == [2]


def test_sampling_settings_of_the_base_model_are_kept(model, tmp_path):
    model.generation_config.do_sample, model.generation_config.temperature = True, 0.6
    save(model, tmp_path / "m")
    assert json.loads((tmp_path / "m" / "generation_config.json").read_text())["temperature"] == 0.6
