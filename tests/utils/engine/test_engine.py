"""The optimizer step does not depend on how a batch is divided, on the ZeRO stage, or on one bad rank."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.families import FAMILIES, build
from tests.hardware import need_fp16
from tests.marks import slow
from tests.utils.engine.engine_checks import collate, fixed_rows, train
from training.utils.arguments import SCHEDULES, LoraArguments
from training.utils.engine import engine as engines
from training.utils.engine.engine import ADAM_BETAS
from training.utils.engine.zero_config import DTYPES, MAX_GRAD_NORM, deepspeed_config
from training.utils.model.export import full_state_dict
from training.utils.model.forward import response_log_probs
from training.utils.model.lora import with_adapters
from training.utils.run.distributed import init_distributed

FP32 = {"rtol": 0, "atol": 1e-5}


def assert_same(a, b, *, atol=2e-5):
    assert a["losses"] == pytest.approx(b["losses"], abs=atol)
    assert a["norms"] == pytest.approx(b["norms"], abs=10 * atol)
    for name, tensor in a["state"].items():
        torch.testing.assert_close(tensor, b["state"][name], rtol=0, atol=10 * atol)


def three_plain_steps(model, groups):
    """Losses and gradient norms of the same three steps in plain PyTorch: no DeepSpeed, full-sequence cross-entropy."""
    optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=ADAM_BETAS)
    peaks = [group["lr"] for group in optimizer.param_groups]
    rows = fixed_rows()
    batch = collate(rows, max(len(ids) for ids, _ in rows))
    labels = batch["input_ids"].masked_fill(batch["response_mask"] == 0, -100)
    losses, norms = [], []
    for step in range(3):
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            # one warm-up step, then a cosine over the nine that are left
            group["lr"] = peak * (step if step < 1 else 0.5 * (1 + math.cos(math.pi * (step - 1) / 9)))
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item())
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "norms": norms}


@pytest.fixture(scope="module")
def plain(tiny_model):
    """Every parameter trained: matrices with weight decay, norms without."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    steps = three_plain_steps(model, groups)
    return steps | {"state": {n: p.detach() for n, p in model.named_parameters()}}


MIXED = LoraArguments(4, "q_proj,down_proj", lora_alpha=2, lora_learning_rate=3e-2)  # the rest trains too


@pytest.fixture(scope="module")
def plain_lora(tiny_model):
    """Adapters at three times the learning rate, beside embeddings, norms and the layers without an adapter."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(0)
    model = with_adapters(model, MIXED)
    free = {name: p for name, p in model.named_parameters() if ".base_layer." not in name}
    groups = [
        {"params": [p for n, p in free.items() if "lora_" in n], "weight_decay": 0.1, "lr": 3e-2},
        {"params": [p for n, p in free.items() if "lora_" not in n and "norm" not in n], "weight_decay": 0.1},
        {"params": [p for n, p in free.items() if "norm" in n], "weight_decay": 0.0},
    ]
    return three_plain_steps(model, groups) | {"state": full_state_dict(model)}


@pytest.mark.parametrize(
    ("family", "more", "spared"),
    [
        ("gpt_oss", {}, ("experts.gate_up_proj_bias", "experts.down_proj_bias")),  # a row for each expert
        ("cohere", {"use_qk_norm": True}, ("q_norm.weight", "k_norm.weight")),  # a row for each head
    ],
)
def test_biases_and_norms_do_not_decay_whatever_their_shape(monkeypatch, family, more, spared):
    monkeypatch.setitem(FAMILIES, family, FAMILIES[family] | more)
    model = build(family)
    decays, rest = (group["params"] for group in engines.parameter_groups(model, 0.1))
    named = dict(model.named_parameters())
    assert {id(p) for p in rest} == {id(p) for n, p in named.items() if p.dim() < 2 or n.endswith(spared)}
    assert len(decays) + len(rest) == len(named)


def test_what_stands_in_a_block_of_norms_decays():
    """DBRX calls the block of its attention so."""
    model = torch.nn.ModuleDict({"norm_attn_norm": torch.nn.ModuleDict({"Wqkv": torch.nn.Linear(2, 2, bias=False)})})
    assert [group["weight_decay"] for group in engines.parameter_groups(model, 0.1)] == [0.1]


@pytest.mark.parametrize("stage", [0, slow(1), 2, 3])
def test_every_stage_equals_plain_pytorch(plain, tiny_model, stage):
    ours = train(str(tiny_model), stage=stage, micro_batch=2)
    assert_same({**plain, "state": {n: t for n, t in plain["state"].items() if n in ours["state"]}}, ours)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_two_ranks_equal_plain_pytorch(plain, tiny_model, rank_pair, stage):
    first, second = rank_pair.run(train, str(tiny_model), stage=stage, micro_batch=2)
    assert first["losses"] == second["losses"]
    torch.testing.assert_close(first["log_probs"], second["log_probs"])
    assert_same({**plain, "state": {n: t for n, t in plain["state"].items() if n in first["state"]}}, first)


@pytest.mark.parametrize("stage", [slow(0), slow(1), 2, 3])
def test_adapters_beside_the_rest_equal_plain_pytorch(plain_lora, tiny_model, rank_pair, stage):
    for ours, _ in (
        (train(str(tiny_model), stage=stage, lora=MIXED), None),
        rank_pair.run(train, str(tiny_model), stage=stage, lora=MIXED, micro_batch=2),
    ):
        assert_same({**plain_lora, "state": {n: t for n, t in plain_lora["state"].items() if n in ours["state"]}}, ours)


@pytest.mark.parametrize("options", [{}, {"lora": MIXED}, {"micro_batch": 2}, {"poison": 1}, {"learning_rate": 0.5}])
@pytest.mark.parametrize(("stage", "dtype"), [slow(1, "fp32"), (2, "fp32"), (2, "bf16")])
def test_one_rank_steps_as_zero_does_bit_for_bit(tiny_model, monkeypatch, stage, dtype, options):
    """One rank flattens and copies nothing; ``stage`` is what ZeRO does where it is not spared that."""
    plain = train(str(tiny_model), stage=stage, dtype=dtype, steps=5, **options)
    assert min(plain["norms"]) > MAX_GRAD_NORM, "clipping is part of it"
    monkeypatch.setattr(engines, "is_plain", lambda config, ranks: False)
    zero = train(str(tiny_model), stage=stage, dtype=dtype, steps=5, **options)
    for name in ("losses", "norms", "skips", "failures", "rates"):
        assert plain[name] == pytest.approx(zero[name], abs=0, rel=0, nan_ok=True), name
    assert plain["skips"] == [step == options.get("poison") for step in range(5)]
    assert all(torch.equal(tensor, zero["state"][name]) for name, tensor in plain["state"].items())


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_one_rank_in_bf16_steps_closely_as_stage_1_does(tiny_model, monkeypatch, micro_batch):
    """DeepSpeed's BF16_Optimizer takes the norm in fp32, and rounds the sum of several gradients to bf16."""
    plain = train(str(tiny_model), stage=1, dtype="bf16", micro_batch=micro_batch)
    monkeypatch.setattr(engines, "is_plain", lambda config, ranks: False)
    zero = train(str(tiny_model), stage=1, dtype="bf16", micro_batch=micro_batch)
    assert plain["norms"][:2] == pytest.approx(zero["norms"][:2], rel=1e-6 if micro_batch == 8 else 1e-3)
    assert plain["losses"] == pytest.approx(zero["losses"], abs=0.02)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("used", [True, False])
def test_a_parameter_without_a_gradient_decays_as_in_zero(monkeypatch, used, dtype):
    """Such as an expert that no token went to."""
    init_distributed()

    def weights(plain):
        monkeypatch.setattr(engines, "is_plain", lambda config, ranks: plain)
        torch.manual_seed(0)
        model = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
        model.forward = lambda rows: model[0](rows).sum() + (model[1](rows).sum() if used else 0.0)
        kind = {"learning_rate": 0.1, "weight_decay": 0.5, "num_warmup_steps": 0, "total_steps": 9}
        model = model.to(DTYPES[dtype])
        engine = engines.initialize_engine(model, deepspeed_config(zero_stage=2, dtype=dtype), **kind)
        for _ in range(2):
            engines.backward(engine, engine(torch.ones(2, 3, dtype=DTYPES[dtype])), 1.0)
            engines.optimizer_step(engine)
        return [p.detach().clone() for p in engine.module.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(weights(True), weights(False), strict=True))


def built(**schedule):
    init_distributed()
    config = deepspeed_config(zero_stage=0, dtype="fp32")
    given = {"learning_rate": 1e-3, "weight_decay": 0.0, "num_warmup_steps": 0, "total_steps": 9} | schedule
    return engines.initialize_engine(torch.nn.Linear(3, 3), config, **given)


def test_every_schedule_starts_at_a_low_learning_rate():
    """In transformers polynomial ends at 1e-7, and is refused below it."""
    for kind in SCHEDULES:
        assert built(learning_rate=1e-8, lr_scheduler_type=kind).get_lr()[0] == 1e-8


def test_a_warm_up_that_is_not_done_or_does_not_end_is_said(capsys):
    built(num_warmup_steps=8)
    built(num_warmup_steps=3, lr_scheduler_type="constant_with_warmup")
    assert "warning" not in capsys.readouterr().out
    for _ in range(2):  # roles
        built(num_warmup_steps=9)
        built(num_warmup_steps=2, lr_scheduler_type="constant")
    told = capsys.readouterr().out
    assert told.count("--num_warmup_steps 9 is the whole run, which has 9 optimizer steps") == 1
    assert told.count("--num_warmup_steps has no effect with --lr_scheduler_type constant") == 1


def test_a_mean_per_micro_batch_would_not_pass(plain, tiny_model):
    faulty = train(str(tiny_model), stage=1, micro_batch=2, per_micro_batch_mean=True)
    with pytest.raises(AssertionError):
        assert_same(plain, faulty)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_bad_gradient_on_one_rank_changes_no_weights(tiny_model, rank_pair, stage):
    kept, _ = rank_pair.run(train, str(tiny_model), stage=stage, steps=2)
    poisoned, other = rank_pair.run(train, str(tiny_model), stage=stage, steps=3, poison=2)
    assert poisoned["skips"] == [False, False, True] == other["skips"]
    for name, tensor in kept["state"].items():
        torch.testing.assert_close(tensor, poisoned["state"][name], rtol=0, atol=0)


@pytest.mark.parametrize("stage", [1, 3])
def test_fp16_looks_for_its_loss_scale_before_a_step_counts_as_failed(tiny_model, stage):
    """DeepSpeed starts at 2^12 and halves; at 1 a gradient that is not finite is the model's own fault."""
    need_fp16()
    found = train(str(tiny_model), stage=stage, dtype="fp16", steps=16, poison=range(16))
    assert found["skips"] == [True] * 16
    assert found["failures"] == sorted(found["failures"]) and found["failures"][0] is False
    assert 1 <= sum(found["failures"]) <= 4
    assert not any(train(str(tiny_model), stage=stage, dtype="fp16", steps=4)["failures"])


@pytest.mark.parametrize("stage", [1, 3])
def test_bf16_stays_close_to_fp32(plain, tiny_model, rank_pair, stage):
    ours, _ = rank_pair.run(train, str(tiny_model), stage=stage, dtype="bf16", micro_batch=2)
    assert ours["losses"] == pytest.approx(plain["losses"], abs=0.1)


def test_gradient_checkpointing_changes_nothing(plain, tiny_model):
    ours = train(str(tiny_model), stage=2, micro_batch=4, checkpointing=True)
    assert ours["losses"] == pytest.approx(plain["losses"], abs=2e-5)


@pytest.mark.parametrize(("stage", "dtype"), [slow(1, "fp32"), (1, "bf16"), (3, "fp32"), slow(3, "bf16")])
def test_saved_model_is_the_engine(tiny_model, rank_pair, tmp_path, stage, dtype):
    first, _ = rank_pair.run(train, str(tiny_model), stage=stage, dtype=dtype, save_to=str(tmp_path / "m"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    assert loaded.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    rows = fixed_rows()
    with torch.no_grad():
        again, _ = response_log_probs(loaded, **collate(rows, max(len(ids) for ids, _ in rows)))
    torch.testing.assert_close(again, first["log_probs"], rtol=0, atol=1e-5)
    assert loaded.generation_config.eos_token_id == [2]


@pytest.mark.parametrize(("stage", "alpha"), [(1, 0), (3, 3)])
def test_merged_lora_is_the_adapted_engine(tiny_model, rank_pair, tmp_path, stage, alpha):
    lora = LoraArguments(4, "q_proj,down_proj", True, alpha)
    first, _ = rank_pair.run(train, str(tiny_model), stage=stage, lora=lora, save_to=str(tmp_path / "m"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype="auto")
    rows = fixed_rows()
    batch = collate(rows, max(len(ids) for ids, _ in rows))
    with torch.no_grad():
        merged, _ = response_log_probs(loaded, **batch)
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        untrained, _ = response_log_probs(base, **batch)
        adapted, _ = response_log_probs(PeftModel.from_pretrained(base, tmp_path / "m" / "adapter"), **batch)
    torch.testing.assert_close(merged, first["log_probs"], rtol=0, atol=1e-4)
    torch.testing.assert_close(adapted, first["log_probs"], rtol=0, atol=1e-4)
    assert (untrained - merged).abs().max() > 0.1
    if stage == 3:  # the embeddings; with all layers at once a model that fits in pieces could never be saved
        assert first["gathered"] == max(p.numel() for p in loaded.parameters())


def test_only_optimize_lora_decides_whether_the_rest_trains(tiny_model):
    frozen = train(str(tiny_model), stage=1, lora=LoraArguments(4, "q_proj,down_proj", True))
    free = train(str(tiny_model), stage=1, lora=MIXED)
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).state_dict()
    name = "model.layers.0.self_attn.k_proj.weight"
    torch.testing.assert_close(frozen["state"][name], base[name], rtol=0, atol=0)
    assert (free["state"][name] - base[name]).abs().max() > 1e-3
