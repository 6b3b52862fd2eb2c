"""Loading models: no dropout in any family, and no weight that no file holds."""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    Phi3Config,
    PreTrainedTokenizerFast,
    RobertaConfig,
)

from tests.data import families
from tests.families import save as save_family
from tests.utils.generation.test_rollout import COMMON, FAMILIES, SHAPE, VOCABULARY, build
from training.utils.errors import UserError
from training.utils.model import classifiers, loading
from training.utils.model.limits import check_length
from training.utils.model.tokenizer import load_tokenizer
from training.utils.run.distributed import say_once

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
    assert moved_by_training_mode(loading.load_causal_lm(folder, dtype="fp32", attn_implementation=attention)) == 0.0


@pytest.mark.parametrize("family", ["llama", "qwen2", "neox", "mistral"])
def test_rotary_frequencies_stay_in_fp32(family, tmp_path):
    """As transformers 5.17 loads a model for ZeRO-3: everything in 16 bit."""
    model = loading.load_causal_lm(str(save(family, tmp_path)), dtype="bf16")
    exact = {name: buffer.clone() for name, buffer in model.named_buffers()}
    assert any("inv_freq" in name for name in exact)
    model.to(torch.bfloat16)
    assert all(buffer.dtype == torch.bfloat16 for name, buffer in model.named_buffers() if "inv_freq" in name)
    loading.exact_buffers(model)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == exact[name].dtype and torch.equal(buffer, exact[name]), name


@pytest.mark.parametrize("family", ["bloom", "gptj", "gpt_neo", "gemma2"])
def test_a_family_without_sdpa_takes_eager_by_itself(family, tmp_path, capsys):
    """Everywhere: samples, held-out answers and the evaluate programs load models too, and ask for nothing."""
    (tmp_path / "model").mkdir()
    path = save_family(family, tmp_path / "model")
    say_once.cache_clear()
    made = [
        loading.load_causal_lm(path, dtype="fp32"),
        classifiers.load_classifier(path, dtype="fp32", pad_token_id=0, fresh_head_seed=1),
    ]
    if family == "gemma2":  # transformers chooses for it
        return
    assert {model.config._attn_implementation for model in made} == {"eager"}
    said = capsys.readouterr().out.count("has no sdpa attention in transformers")
    assert said == 1, "once for all roles"


def test_a_family_without_an_attention_names_the_flag(tmp_path):
    with pytest.raises(UserError, match="give --attn_implementation eager"):
        loading.load_causal_lm(str(save("bloom", tmp_path)), dtype="fp32", attn_implementation="flash_attention_2")


@pytest.mark.parametrize("family", ["phimoe", "mixtral", "mpt"])
def test_no_noise_under_another_name_and_of_another_type(family, tmp_path):
    """A router's jitter moves logits as dropout does; MPT's configuration takes an integer for its dropout."""
    (tmp_path / "model").mkdir()
    folder = save_family(family, tmp_path / "model")
    assert moved_by_training_mode(loading.load_causal_lm(folder, dtype="fp32")) == 0.0


def test_a_router_weighs_its_experts_as_the_files_ask_for(tmp_path):
    """PhiMoE's do so by the size of a noise that they have in training alone."""
    folder = save_family("phimoe", tmp_path)
    ids = torch.arange(3, 33).reshape(2, 15)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
        model = loading.load_causal_lm(folder, dtype="fp32").train()
        assert torch.allclose(model(ids).logits, expected, atol=1e-5)
        assert torch.equal(copy.deepcopy(model).train()(ids).logits, model(ids).logits), "step 3's twin"


def test_a_router_s_auxiliary_loss_is_left_out_aloud(tmp_path, capsys):
    """transformers makes it of the attention mask, which a step of decoding has longer than its tokens."""
    folder = save_family("mixtral", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"output_router_logits": True}))
    model = loading.load_causal_lm(folder, dtype="fp32")
    assert "asks for its router's auxiliary loss" in capsys.readouterr().out
    mask = torch.ones(1, 4, dtype=torch.long)
    with torch.no_grad():
        cache = model(input_ids=mask[:, :3], attention_mask=mask[:, :3], use_cache=True).past_key_values
        model(input_ids=mask[:, :1], attention_mask=mask, past_key_values=cache)


def broken(kind: str, folder: Path) -> str:
    """A folder with a model that can not be loaded."""
    save("llama", folder)
    weights = folder / "model.safetensors"
    if kind == "cut weights":
        weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    elif kind == "empty weights":
        weights.write_bytes(b"")
    elif kind == "a page instead of weights":
        weights.write_text("<!doctype html><html>Not found</html>")
    elif kind == "no weights":
        weights.unlink()
    elif kind == "a configuration that is no JSON":
        (folder / "config.json").write_text("{")
    elif kind == "an empty configuration":
        (folder / "config.json").write_text("{}")
    elif kind == "a configuration that is a list":
        (folder / "config.json").write_text("[]")
    elif kind == "an unknown family":
        (folder / "config.json").write_text('{"model_type": "nothing"}')
    elif kind == "weights of other sizes":
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))
    elif kind == "weights that are no numbers":
        tensors = load_file(weights)
        tensors["model.norm.weight"][3] = float("nan")
        save_file(tensors, weights, metadata={"format": "pt"})
    return str(folder)


@pytest.mark.parametrize(
    "kind",
    [
        *("cut weights", "empty weights", "a page instead of weights", "no weights"),
        *("a configuration that is no JSON", "an empty configuration", "a configuration that is a list"),
        *("an unknown family", "weights of other sizes", "weights that are no numbers"),
    ],
)
def test_a_broken_model_folder_is_one_line(kind, tmp_path):
    folder = broken(kind, tmp_path)
    with pytest.raises(UserError) as refused:
        loading.load_causal_lm(folder, dtype="fp32")
    assert "\n" not in str(refused.value) and folder in str(refused.value)


@pytest.mark.parametrize("family", ["llama", "neox"])
def test_weights_of_other_sizes_are_named(family, tmp_path):
    folder = save(family, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 2 * config["hidden_size"]}))
    size = config["hidden_size"]
    sizes = rf"\S+weight is \[.*{size}.*\] in its files and \[.*{2 * size}.*\] by its config\.json"
    with pytest.raises(UserError, match=sizes):
        loading.load_causal_lm(str(folder), dtype="fp32")
    with pytest.raises(UserError, match=sizes):
        classifiers.load_classifier(str(folder), dtype="fp32", pad_token_id=0, fresh_head_seed=1)


def test_a_reward_head_with_a_bias_is_not_loaded_without_it(tmp_path):
    """Its rewards would be others, and nothing would say so."""
    folder = str(save("llama", tmp_path / "lm"))
    classifiers.load_classifier(folder, dtype="fp32", pad_token_id=0, fresh_head_seed=1).save_pretrained(
        tmp_path / "reward"
    )
    weights = tmp_path / "reward" / "model.safetensors"
    save_file(load_file(weights) | {"score.bias": torch.ones(1)}, weights, metadata={"format": "pt"})
    for seed in (None, 2):
        with pytest.raises(UserError, match=r"no place for score\.bias"):
            classifiers.load_classifier(str(tmp_path / "reward"), dtype="fp32", pad_token_id=0, fresh_head_seed=seed)


def test_weights_that_the_model_has_no_place_for_are_said(tmp_path, capsys):
    folder = save("llama", tmp_path)
    weights = folder / "model.safetensors"
    save_file(load_file(weights) | {"model.extra.weight": torch.ones(1)}, weights, metadata={"format": "pt"})
    loading.load_causal_lm(str(folder), dtype="fp32")
    assert "holds 1 weights that the model has no place for, such as model.extra.weight" in capsys.readouterr().out


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_a_language_model_is_no_reward_model(family, tmp_path):
    """Its head would be drawn at random, another one at every start."""
    folder = str(save(family, tmp_path))
    with pytest.raises(UserError, match="language model without a reward head"):
        classifiers.check_reward_head(folder)


def test_a_model_that_sees_the_tokens_it_predicts_is_no_policy(tmp_path):
    """BERT and its like: their loss would fall, and they could write nothing."""
    AutoModelForMaskedLM.from_config(RobertaConfig(**SHAPE, vocab_size=VOCABULARY)).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a RobertaForMaskedLM, which sees the tokens that it predicts"):
        loading.resolve_policy(str(tmp_path))


def test_weights_that_no_file_holds_are_refused(tmp_path):
    folder = str(save("llama", tmp_path / "lm"))
    with pytest.raises(UserError, match=r"no weights for score\.weight"):
        classifiers.load_classifier(folder, dtype="fp32", pad_token_id=0)
    classifier = classifiers.load_classifier(folder, dtype="fp32", pad_token_id=0, fresh_head_seed=1)
    classifier.save_pretrained(tmp_path / "reward")
    for seed in (None, 2):  # what step 2 goes on from keeps its head, too
        made = {"dtype": "fp32", "pad_token_id": 0, "fresh_head_seed": seed}
        again = classifiers.load_classifier(str(tmp_path / "reward"), **made)
        assert torch.equal(again.score.weight, classifier.score.weight)
    with pytest.raises(UserError, match=r"no weights for lm_head\.weight"):
        loading.load_causal_lm(str(tmp_path / "reward"), dtype="fp32")


def neox_like():
    """GPT-NeoX's kind: ids of runs of blanks come last, and an added token for padding that is not named as such."""
    tokenizer = families.byte_bpe()
    tokenizer.add_special_tokens([AddedToken("<|padding|>", special=True)])
    tokenizer.add_tokens([AddedToken(" " * n, normalized=True) for n in range(24, 1, -1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def gpt2_alone():
    """No special token but the end token; the highest id is a word of the text."""
    tokenizer = Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(families.CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", bos_token="<|endoftext|>")


TEXTS = ("a  b      c", "def f():\n        return 1", "The quick brown fox", " ".join(families.CORPUS))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (neox_like, "<|padding|>"),
        (gpt2_alone, "<|endoftext|>"),
        (lambda: families.llama_like("first"), "<unk>"),
        (families.smol_like, "<|endoftext|>"),
        (families.word_piece, "[PAD]"),
        (families.unigram, None),
    ],
)
def test_the_pad_token_is_never_part_of_a_text(make, expected, tmp_path):
    """Else texts would lose it: in decoded answers, rewards of functions, the chat; and rows with it be refused."""
    make().save_pretrained(tmp_path)
    tokenizer = load_tokenizer(str(tmp_path))
    assert expected is None or tokenizer.pad_token == expected
    assert tokenizer.pad_token in {t.content for t in tokenizer.added_tokens_decoder.values() if t.special}
    tokenizer.save_pretrained(tmp_path / "saved")
    fallback = tokenizer.unk_token is None or tokenizer.unk_token_id not in tokenizer(" ".join(TEXTS))["input_ids"]
    for loaded in (
        tokenizer,
        load_tokenizer(str(tmp_path / "saved")),
        AutoTokenizer.from_pretrained(tmp_path / "saved"),
    ):
        for text in TEXTS:
            ids = loaded(text, add_special_tokens=False)["input_ids"]
            assert loaded.pad_token_id not in ids
            plain, skipped = (loaded.decode(ids, skip_special_tokens=skip) for skip in (False, True))
            assert plain == skipped or not fallback, "a text lost something"


def test_a_vocabulary_alone_needs_the_model_s_own_end(tmp_path):
    """As DeepSpeed-Chat saves a model: OPT's family is read as GPT-2's, whose EOS it does not have."""
    trained = tokenizers.ByteLevelBPETokenizer()
    trained.train_from_iterator(["What is two and one?"], special_tokens=["<s>", "<pad>", "</s>"])
    trained.save_model(str(tmp_path))
    config = {"model_type": "opt", "vocab_size": trained.get_vocab_size(), "eos_token_id": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"taken for '<\|endoftext\|>' .*, the model's is id 2: copy the tokenizer"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "bos_token": "<s>"}))
    assert load_tokenizer(str(tmp_path)).eos_token_id == 2


def test_longrope_says_where_a_row_depends_on_its_neighbours(tmp_path, capsys):
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    config = Phi3Config(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=1, pad_token_id=0, vocab_size=64,
        max_position_embeddings=256, original_max_position_embeddings=64, rope_scaling=scaling,
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    check_length(str(tmp_path), 64, "--max_seq_len")
    assert not capsys.readouterr().out
    check_length(str(tmp_path), 65, "--max_seq_len")
    assert "more than 64 tokens" in capsys.readouterr().out


def test_a_converted_gguf_file_may_be_read_by_whom_the_user_allows(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPOD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.gguf").touch()
    (tmp_path / "any").mkdir()
    tokenizer, model = AutoTokenizer.from_pretrained(tiny_model), AutoModelForCausalLM.from_pretrained(tiny_model)
    monkeypatch.setattr(loading.AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    monkeypatch.setattr(loading.AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    with monkeypatch.context() as full:  # what a killed program leaves: it can not clean up
        full.setattr(shutil, "rmtree", lambda *_, **__: None)
        full.setattr(tokenizer, "save_pretrained", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            loading._convert_gguf(tmp_path / "a.gguf")
    folder = loading._convert_gguf(tmp_path / "a.gguf")
    assert folder.stat().st_mode == (tmp_path / "any").stat().st_mode and (folder / "config.json").is_file()
    assert {path.name for path in folder.parent.iterdir()} == {folder.name, f"{folder.name}.lock"}
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1, "the weights too"


def test_a_gguf_file_is_converted_once_for_what_it_holds(tmp_path, monkeypatch):
    """Another of the same name, size and time is converted anew; one that was installed again or copied is not."""
    monkeypatch.setenv("TRIPOD_CACHE", str(tmp_path / "cache"))
    read = []

    def convert(path: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        read.append(path.read_text())

    monkeypatch.setattr(loading, "_write_converted", convert)
    for content in ("one", "two"):
        (tmp_path / "a.gguf").write_text(content)
        os.utime(tmp_path / "a.gguf", ns=(0, 0))  # as unpacking and copying may
        copy = tmp_path / content / "a.gguf"
        copy.parent.mkdir()
        copy.write_text(content)
        assert loading._convert_gguf(tmp_path / "a.gguf") == loading._convert_gguf(copy)
    assert read == ["one", "two"]


def test_what_is_noted_of_a_converted_model_outlives_the_cache(tmp_path, monkeypatch):
    """Which users empty, and in which another version of transformers converts anew."""
    monkeypatch.setattr(loading, "_convert_gguf", lambda path: tmp_path / f"converted-{path.stem}")
    monkeypatch.setattr(loading, "_embedded_gguf", lambda: tmp_path / "own.gguf")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    for named in (loading.EMBEDDED, "a.gguf"):
        found = loading.resolve_model(named)
        noted = loading.noted(named, found)
        assert "converted" not in noted and loading.resolve_model(noted) == found
    assert loading.noted("mine", str(tmp_path / "mine")) == str(tmp_path / "mine")
