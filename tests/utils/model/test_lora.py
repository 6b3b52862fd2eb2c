"""Which parameters train beside adapters, with what learning rates, and what an adapter adds."""

import contextlib
import json

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
)

from tests.utils.engine.engine_checks import train
from training.utils.arguments import LoraArguments
from training.utils.errors import UserError
from training.utils.memory import plan as plans
from training.utils.model.export import full_state_dict
from training.utils.model.lora import check_lora, with_adapters

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 400}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=64, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=400),
    "opt": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32),
    "neox": GPTNeoXConfig(**SMALL, intermediate_size=64),
}
# family, --lora_module_name, and what a parameter's name has if DeepSpeed-Chat would freeze it
CASES = [
    ("llama", "q_proj,down_proj", ("q_proj.weight", "down_proj.weight")),
    ("gpt2", "attn.c_attn", ("attn.c_attn.weight",)),
    ("opt", "decoder.layers.", ("_proj.weight", "fc1.weight", "fc2.weight")),
    ("neox", "gpt_neox.layers.", ("query_key_value.weight", "dense.weight", "_to_h.weight", "_to_4h.weight")),
]


def build(family: str, classifier: bool = False):
    torch.manual_seed(1)
    config = FAMILIES[family]
    config.num_labels, config.pad_token_id = 1, 0
    return (AutoModelForSequenceClassification if classifier else AutoModelForCausalLM).from_config(config)


def plain_name(name: str) -> str:
    """A parameter's name before PEFT."""
    return name.replace("base_model.model.", "").replace(".base_layer.", ".").replace(".modules_to_save.default.", ".")


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize(("family", "modules", "adapted"), CASES)
def test_adapted_weights_are_frozen_and_everything_else_trains(family, modules, adapted, classifier):
    plain = {name for name, _ in build(family, classifier).named_parameters()}
    frozen = {name for name in plain if name.endswith(adapted)}
    assert frozen and any(name.endswith(".bias") for name in plain) == (family != "llama")
    model = with_adapters(build(family, classifier), LoraArguments(4, modules))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    adapters = {name for name in trained if ".lora_" in name}
    assert {plain_name(name) for name in trained - adapters} == plain - frozen
    assert not any(".original_module." in name for name in trained), "of the head only the copy that is used"
    stem = {name.removesuffix(".weight") for name in frozen}
    assert {plain_name(name).partition(".lora_")[0] for name in adapters} == stem
    assert len(adapters) == 2 * len(frozen)
    alone = with_adapters(build(family, classifier), LoraArguments(4, modules, only_optimize_lora=True))
    heads = {name for name, p in alone.named_parameters() if p.requires_grad and ".lora_" not in name}
    assert {plain_name(name) for name in heads} == ({"score.weight"} if classifier else set())


@pytest.mark.parametrize("only", [False, True])
@pytest.mark.parametrize("classifier", [False, True])
def test_the_plan_counts_what_trains(tmp_path, classifier, only):
    """OPT: biases, norms, positions and tied embeddings beside the adapters."""
    lora = LoraArguments(4, "decoder.layers.", only)
    build("opt", classifier).save_pretrained(tmp_path)
    real = with_adapters(build("opt", classifier), lora)
    size = plans.role_size(plans.fake_role(str(tmp_path), "fp32", "sdpa", lora, classifier=classifier))
    trained = [p.numel() for p in real.parameters() if p.requires_grad]
    assert (size.trained, size.largest) == (sum(trained), max(trained))
    assert size.parameters == sum(p.numel() for p in real.parameters())


@pytest.mark.parametrize(("alpha", "scale"), [(0, 2.0), (1, 0.25), (6, 1.5)])
def test_adapters_count_with_alpha_over_rank(alpha, scale):
    model = with_adapters(build("llama"), LoraArguments(4, "q_proj", lora_alpha=alpha))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    base, layer = build("llama").state_dict(), "model.layers.1.self_attn.q_proj"
    state = model.state_dict()
    a, b = (state[f"base_model.model.{layer}.lora_{x}.default.weight"] for x in "AB")
    expected = base[f"{layer}.weight"] + scale * b @ a
    merged = full_state_dict(model)
    torch.testing.assert_close(merged[f"{layer}.weight"], expected, rtol=0, atol=1e-6)
    ids = torch.arange(3, 20).unsqueeze(0)
    plain = build("llama")
    plain.load_state_dict(merged, strict=False)  # the tied output layer comes once
    torch.testing.assert_close(model.eval()(ids).logits, plain.eval()(ids).logits, rtol=0, atol=1e-5)


def test_dropout_is_of_training_alone():
    model, plain = (with_adapters(build("llama"), LoraArguments(4, "q_proj", lora_dropout=p)) for p in (0.5, 0.0))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    plain.load_state_dict(model.state_dict())
    ids = torch.arange(3, 20).unsqueeze(0)
    expected = plain.eval()(ids).logits
    assert torch.equal(model.eval()(ids).logits, expected)
    assert (model.train()(ids).logits - expected).abs().max() > 1e-3


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_learning_rates_as_deepspeed_steps_them(tiny_model, rank_pair, stage):
    """Adam's first step moves a number by its learning rate, whatever the gradient; without decay nothing else does."""
    lora = LoraArguments(4, "q_proj,down_proj", lora_learning_rate=3e-3)
    rate = {"learning_rate": 1e-3, "weight_decay": 0.0, "warmup": 0, "steps": 1, "named": True}
    for found in rank_pair.run(train, str(tiny_model), stage=stage, lora=lora, **rate):
        for name, (before, after) in found["parameters"].items():
            moved = (after - before).abs()
            if "lora_B" in name:  # A's first gradient is 0, as B is
                torch.testing.assert_close(moved, torch.full_like(moved, 3e-3), rtol=2e-2, atol=0)
            elif ".lora_A" in name or "q_proj" in name or "down_proj" in name:
                assert not moved.any(), name
            else:
                assert moved.max() == pytest.approx(1e-3, rel=2e-2), name
        assert found["rates"] == [1e-3], "what is logged is the rate of the rest"


def test_a_name_that_matches_nothing_is_said():
    with pytest.raises(UserError, match="--lora_module_name nothing matches no linear layer"):
        with_adapters(build("llama"), LoraArguments(4, "nothing"))


@pytest.mark.parametrize("rank", [0, 4])
def test_a_model_that_brings_an_adapter_is_refused(tmp_path, rank):
    """transformers loads both and freezes all; further adapters would take the place of those that it brings."""
    model = with_adapters(build("llama"), LoraArguments(2, "q_proj", True))
    build("llama").save_pretrained(tmp_path)
    check_lora(str(tmp_path), LoraArguments(rank))
    model.save_pretrained(tmp_path)
    assert not any(p.requires_grad for p in AutoModelForCausalLM.from_pretrained(tmp_path).parameters())
    with pytest.raises(UserError, match="brings an adapter"):
        check_lora(str(tmp_path), LoraArguments(rank))


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("method", ["bitsandbytes", "mxfp4", None])
def test_what_is_quantised_in_its_files_is_not_trained(tmp_path, method, rank):
    """Its codes have no gradient: embeddings and norms alone would train. What transformers makes whole may."""
    model, how = build("llama"), {"quant_method": method} if method else {"load_in_4bit": True}
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"quantization_config": how}))
    refused = pytest.raises(UserError, match="quantised weights do not train")
    with contextlib.nullcontext() if method == "mxfp4" else refused:
        check_lora(str(tmp_path), LoraArguments(rank))
    model.is_quantized = True
    with refused:
        with_adapters(model, LoraArguments(rank))
    with_adapters(model, LoraArguments(4, only_optimize_lora=True, base_bits=4))
