"""A base in 4 bits under adapters: equal over ZeRO and ranks, exported as what the engine computes with, resumed."""

import importlib
import json
from dataclasses import replace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    BloomConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    OPTConfig,
)

from tests.bad_inputs import STEPS
from tests.equality import FOUR_BIT, TOLERANCE, Case, Matrix
from tests.marks import slow
from tests.reliability.tiny_runs import WEIGHTS, make_inputs, step_arguments
from tests.step3.hybrid_checks import PAD, build, twin_equals_engine
from tests.step3.test_hybrid_engine import check_twin
from tests.tiny import save_tiny_model, tiny_tokenizer
from tests.utils.checkpoint.resume_checks import ADAPTERS, interrupted
from training.step3_rlhf_finetuning.hybrid_engine import make_twin
from training.step3_rlhf_finetuning.roles import build_actor
from training.utils.arguments import LoraArguments
from training.utils.engine import four_bit
from training.utils.errors import UserError
from training.utils.memory import plan as plans
from training.utils.memory.generation import saved_bytes, weight_bytes
from training.utils.memory.zero import BYTES
from training.utils.model import classifiers, loading
from training.utils.model.export import save_model
from training.utils.model.forward import response_log_probs
from training.utils.model.lora import check_lora, with_adapters

bnb = pytest.importorskip("bitsandbytes", reason="requirements-optional.txt")

LORA = LoraArguments(4, "all-linear", True, base_bits=4)
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 400}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=64, initializer_range=0.3),
    "tied": LlamaConfig(**SMALL, intermediate_size=64, initializer_range=0.3, tie_word_embeddings=True),
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=400, initializer_range=0.3),
    "opt": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=32, init_std=0.3),
    "neox": GPTNeoXConfig(**SMALL, intermediate_size=64, initializer_range=0.3),
    "bloom": BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=400, initializer_range=0.3),
}
IDS = torch.arange(3, 20).unsqueeze(0)
MASK = torch.ones_like(IDS)


def save_family(family, folder):
    torch.manual_seed(1)
    config = FAMILIES[family]
    config.pad_token_id = PAD
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def load(path, classifier=False, dtype="fp32", lora=LORA):
    """With adapters that count; in evaluation mode."""
    made = {"dtype": dtype, "base_bits": 4}
    if classifier:
        bare = classifiers.load_classifier(path, pad_token_id=PAD, fresh_head_seed=1, **made)
        with torch.no_grad():
            bare.score.weight.mul_(30)
    else:
        bare = loading.load_causal_lm(path, **made)
    torch.manual_seed(0)
    model = with_adapters(bare, lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model.eval()


def packed(model):
    """The layers in 4 bits, by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def matrix(tiny_model, tiny_reward, rank_pair):
    return Matrix(tiny_model, tiny_reward, rank_pair)


STAGES = {1: 3, 2: 2, "dpo": 1, 3: 3}  # of a step's case in the default run


@pytest.mark.parametrize("step", [1, 2, "dpo", slow(3)])
def test_losses_over_zero_ranks_and_accumulation(matrix, step):
    case = Case(step, STAGES[step], 2, 2, lora=True, dtype="fp32", offload=False, base_bits=4)
    assert case in FOUR_BIT and matrix.difference(case) <= TOLERANCE["fp32"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("step", [1, 2, "dpo", 3])
def test_whole_matrix(matrix, step, dtype):
    cases = [case for case in FOUR_BIT if (case.step, case.dtype) == (step, dtype)]
    assert len(cases) == 32
    different = {case: d for case in cases if (d := matrix.difference(case)) > TOLERANCE[dtype]}
    assert not different


def test_four_bits_are_another_model_than_sixteen(matrix):
    """Else the matrix would hold with a flag that does nothing."""
    case = Case(1, 3, 2, 2, lora=True, dtype="fp32", offload=False, base_bits=4).baseline()
    pairs = zip(matrix.losses(case), matrix.losses(replace(case, base_bits=0)), strict=True)
    assert all(abs(a - b) > 1e-3 for a, b in pairs)


@pytest.mark.parametrize("stage", [slow(0), 3])
def test_the_twin_gives_the_tokens_of_the_exported_model(tiny_model, rank_pair, stage):
    results = rank_pair.run(twin_equals_engine, str(tiny_model), stage=stage, lora=4, base_bits=4)
    check_twin(tiny_model, results)
    assert not results[0]["own_reference"]


def test_the_twin_shares_codes_and_scales(tiny_model):
    model = load(str(tiny_model))
    twin = make_twin(model)
    assert all(a is b for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    pairs = list(zip(packed(model).values(), packed(twin).values(), strict=True))
    assert len(pairs) == 14 and all(a is not b and a.quant_state is b.quant_state for a, b in pairs)
    sixteen = with_adapters(loading.load_causal_lm(str(tiny_model), dtype="fp32"), LORA)
    assert saved_bytes(twin) == weight_bytes(sixteen) > weight_bytes(twin), "what evaluation must find room for"


def test_the_reference_is_the_base_with_its_adapters_off(tiny_model):
    actor = build_actor(str(tiny_model), build(2, 1e-2, 4, base_bits=4))
    with actor.scoring_mode() as engine:
        policy, _ = response_log_probs(engine, IDS, MASK, MASK)
    with actor.reference_mode() as reference:
        assert torch.equal(response_log_probs(reference, IDS, MASK, MASK)[0], policy), "B is 0 before the first step"
    plain = loading.load_causal_lm(str(tiny_model), dtype="fp32", base_bits=4).eval()
    with torch.no_grad():
        for name, parameter in actor.engine.module.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
        expected, _ = response_log_probs(plain, IDS, MASK, MASK)
    with actor.reference_mode() as reference:
        assert torch.equal(response_log_probs(reference, IDS, MASK, MASK)[0], expected)
    assert actor.reference is None


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_export_is_what_the_engine_computes(tmp_path, family, classifier):
    model = load(save_family(family, tmp_path / "base"), classifier)
    expected = model(IDS, attention_mask=MASK).logits
    save_model(model, tiny_tokenizer(), tmp_path / "m", stop_ids=[2])
    factory = AutoModelForSequenceClassification if classifier else AutoModelForCausalLM
    written = factory.from_pretrained(tmp_path / "m", dtype="auto").eval()
    assert written.dtype == torch.float32 and not packed(written)
    torch.testing.assert_close(written(IDS, attention_mask=MASK).logits, expected, rtol=1e-5, atol=1e-4)
    assert "quant" not in (tmp_path / "m" / "config.json").read_text()
    assert not any("absmax" in name or "quant" in name for name in load_file(tmp_path / "m" / "model.safetensors"))
    kept = {name.rpartition(".")[2] for name, m in written.named_modules() if isinstance(m, torch.nn.Linear)}
    kept -= {name.removesuffix(".base_layer").rpartition(".")[2] for name in packed(model)}
    assert kept == {"score"} if classifier else kept <= {"lm_head", "embed_out"}
    assert all(layer.weight.quant_state.nested for layer in packed(model).values()), "scales in 8 bits"


def test_a_16_bit_run_exports_16_bits(tiny_model, tmp_path):
    model = load(str(tiny_model), dtype="bf16").bfloat16()
    assert {layer.compute_dtype for layer in packed(model).values()} == {torch.bfloat16}
    with torch.no_grad():
        expected, _ = response_log_probs(model, IDS, MASK, MASK)
        save_model(model, tiny_tokenizer(), tmp_path / "m", stop_ids=[2])
        written = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto").eval()
        found, _ = response_log_probs(written, IDS, MASK, MASK)
    assert json.loads((tmp_path / "m" / "config.json").read_text())["dtype"] == "bfloat16"
    torch.testing.assert_close(found, expected, rtol=0, atol=0.15)  # merged weights are rounded once more


def test_the_adapter_folder_belongs_on_the_base_in_4_bits(tiny_model, tmp_path, capsys):
    model = load(str(tiny_model))
    expected = model(IDS).logits
    save_model(model, tiny_tokenizer(), tmp_path / "m", stop_ids=[2])
    assert "belongs on the base in 4 bits" in capsys.readouterr().out
    for bits, near in ((4, True), (0, False)):
        base = loading.load_causal_lm(str(tiny_model), dtype="fp32", base_bits=bits)
        found = PeftModel.from_pretrained(base, tmp_path / "m" / "adapter").eval()(IDS).logits
        assert torch.allclose(found, expected, rtol=0, atol=1e-5) == near


@pytest.mark.parametrize(("stage", "offload"), [(1, False), (3, True)])
def test_two_ranks_go_on_bit_for_bit(tiny_model, rank_pair, tmp_path, stage, offload):
    lora = replace(ADAPTERS, base_bits=4)
    kind = {"stage": stage, "dtype": "fp32", "lora": lora, "offload": offload}
    for result in rank_pair.run(interrupted, str(tiny_model), str(tmp_path / "c"), **kind):
        assert result["resumed"] == result["rest"] and result["rest"] != result["first"]
        assert all(torch.equal(result["resumed_state"][name], tensor) for name, tensor in result["state"].items())


def test_an_evaluation_on_a_processor_with_bf16_leaves_the_codes(tiny_model, monkeypatch):
    """There bitsandbytes would rearrange them in the first forward without gradients, and never train again."""
    modules = bnb.nn.modules
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: True)

    def rearrange(*_):
        raise AssertionError("the codes are rearranged")

    monkeypatch.setattr(modules, "_convert_weight_packed_for_cpu", rearrange)
    model = load(str(tiny_model))
    with torch.no_grad():
        model(IDS)
    next(iter(packed(model).values())).support_avx512bf16_for_cpu = True
    with torch.no_grad(), pytest.raises(AssertionError, match="rearranged"):
        model(IDS)


@pytest.mark.parametrize("step", [1, 2, "dpo", 3])
def test_the_programs_keep_the_base_in_4_bits(inputs, tmp_path, monkeypatch, step):
    loaded = []
    settle = four_bit.settle
    monkeypatch.setattr(four_bit, "settle", lambda model, path: loaded.append(path) or settle(model, path))
    adapters = ["--lora_dim", "4"] if step != 3 else ["--actor_lora_dim", "4", "--critic_lora_dim", "4"]
    arguments = step_arguments(step, inputs, tmp_path, *adapters, "--only_optimize_lora", "--base_bits", "4")
    assert importlib.import_module(STEPS[step]).main([*arguments, "--save_every", "0"]) == 0
    assert len(loaded) == (2 if step == 3 else 1), "and no reference"
    for folder in WEIGHTS[step]:
        assert "quant" not in (tmp_path / folder / "config.json").read_text()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    path = save_tiny_model(tmp_path / "m")
    weights = load_file(path / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = value
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"up_proj.* not finite"):
        loading.load_causal_lm(str(path), dtype="fp32", base_bits=4)


def test_files_that_are_quantised_already_are_refused(tiny_model, tmp_path):
    load(str(tiny_model)).get_base_model().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="quantised already"):
        loading.load_causal_lm(str(tmp_path), dtype="fp32", base_bits=4)


@pytest.mark.parametrize("doubly", [True, False])
def test_a_model_that_is_quantised_in_its_files_can_be_run(tiny_model, tmp_path, doubly):
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=doubly)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, quantization_config=how, device_map="cpu")
    model.save_pretrained(tmp_path)
    assert len(packed(loading.load_causal_lm(str(tmp_path), dtype="fp32"))) == 14


@pytest.mark.parametrize(
    ("section", "name"),
    [({"offload_param": {"device": "nvme"}}, "nvme"), ({"zero_quantized_weights": True}, "zero_quantized_weights")],
)
def test_what_would_change_the_codes_is_refused(tiny_model, section, name):
    with pytest.raises(UserError, match=name):
        loading.load_causal_lm(str(tiny_model), dtype="fp32", base_bits=4, ds_config={"zero_optimization": section})


@pytest.mark.parametrize("classifier", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_plan_counts_the_weights_byte_by_byte(tmp_path, family, classifier):
    path = save_family(family, tmp_path)
    size = plans.role_size(plans.fake_role(path, "fp32", "sdpa", LORA, classifier=classifier))
    held = {id(p): p.nbytes for p in load(path, classifier).parameters()}
    scales = 0
    for layer in packed(load(path, classifier)).values():
        state = layer.weight.quant_state
        parts = (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)
        scales += sum(part.nbytes for part in parts)
    assert (size.weights(BYTES["fp32"]), size.scales) == (sum(held.values()), scales)


def test_a_model_without_linear_layers_is_refused_before_it_is_loaded(tiny_model, monkeypatch):
    check_lora(str(tiny_model), LORA)
    monkeypatch.setattr(four_bit, "packable", lambda model: [])
    with pytest.raises(UserError, match="no linear layer that --base_bits 4 could round"):
        check_lora(str(tiny_model), LORA)
