"""The pre-training mix: which rows, which gradient, and the whole program with it and the moving average."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.utils.engine.engine_checks import TINY_SHARDS
from training.step3_rlhf_finetuning.main import main
from training.step3_rlhf_finetuning.pretraining_mix import PretrainingMix
from training.utils.engine import engine as engines
from training.utils.engine.zero_config import deepspeed_config
from training.utils.model import loading
from training.utils.run.distributed import init_distributed


class Rows:
    """Five rows of unequal lengths, every token trained."""

    def __init__(self):
        generator = torch.Generator().manual_seed(1)
        ids = [torch.randint(3, 399, (4 + 3 * i,), generator=generator).tolist() for i in range(5)]
        self.rows = [{"input_ids": i, "response_mask": [1] * len(i), "length": len(i)} for i in ids]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, key):
        return [row[key] for row in self.rows] if isinstance(key, str) else self.rows[key]


def make_mix(rows, coefficient=2.0, micro_batch=1):
    return PretrainingMix(
        rows, coefficient, rows=4, micro_batch_size=micro_batch, pad_id=0, device=torch.device("cpu"), seed=3
    )


def gradient(path, *, stage, micro_batch):
    """The gradient norm of one step of the mix alone, and the loss's sum and tokens over this rank."""
    config = deepspeed_config(zero_stage=stage, dtype="fp32", max_grad_norm=1e9, overrides=TINY_SHARDS)
    model = loading.load_causal_lm(path, dtype="fp32", ds_config=config)
    engine = engines.initialize_engine(
        model.to(init_distributed()), config, learning_rate=1e-3, weight_decay=0, num_warmup_steps=0, total_steps=9
    )
    total, tokens = make_mix(Rows(), micro_batch=micro_batch).backward(engine, 0)
    return engines.optimizer_step(engine).grad_norm, total, tokens


def test_batches_follow_from_the_number_of_the_step():
    mix = make_mix(Rows())
    assert sorted(mix.batch(0) + mix.batch(1)) == [0, 1, 2, 3, 4]  # one epoch
    ahead = [make_mix(Rows()).batch(n) for n in (7, 2, 3)]
    assert ahead == [mix.batch(n) for n in (7, 2, 3)]


def test_the_gradient_is_that_of_the_mean_over_the_batch(tiny_model, rank_pair):
    rows = Rows()
    chosen = make_mix(rows).batch(0)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    total, count = 0.0, 0
    for i in chosen:
        ids = torch.tensor([rows[i]["input_ids"]])
        logits = plain(ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        count += ids.shape[1] - 1
    (2.0 * total / count).backward()
    norm = torch.stack([p.grad.norm() for p in plain.parameters() if p.grad is not None]).norm().item()
    for micro_batch in (1, 4):
        found, loss, tokens = gradient(str(tiny_model), stage=2, micro_batch=micro_batch)
        assert found == pytest.approx(norm, rel=1e-4)
        assert (loss / tokens, tokens) == (pytest.approx(total.item() / count, rel=1e-5), count)
    pair = rank_pair.run(gradient, str(tiny_model), stage=3, micro_batch=1)
    assert [norm_ for norm_, _, _ in pair] == pytest.approx([norm] * 2, rel=1e-4)
    assert sum(tokens for _, _, tokens in pair) == count


def test_the_program_with_the_mix_the_average_and_schedules(tiny_model, tiny_reward, tiny_data, tmp_path):
    (text := tmp_path / "text.txt").write_text("A line of plain text to remember.\nAnother one, a little longer.\n" * 3)
    flags = [
        *("--actor_model_name_or_path", str(tiny_model), "--critic_model_name_or_path", str(tiny_reward)),
        *("--data_path", str(tiny_data / "prompts.jsonl"), "--eval_data_path", str(tiny_data / "held_out.jsonl")),
        *("--output_dir", str(tmp_path / "out"), "--dtype", "fp32", "--report_to", "none", "--num_iterations", "3"),
        *("--per_device_generation_batch_size", "4", "--per_device_training_batch_size", "2"),
        *("--max_prompt_seq_len", "128", "--max_answer_seq_len", "6", "--save_every", "2"),
        *("--unsupervised_data_path", str(text), "--unsup_coef", "1", "--enable_ema", "--actor_learning_rate", "1e-3"),
        *("--lr_scheduler_type", "constant_with_warmup", "linear", "--num_warmup_steps", "3", "0"),
    ]
    assert main(flags) == 0
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").open()]
    trained = [r for r in records if "policy/loss" in r]
    assert all(0 < r["policy/pretraining_loss"] < 20 for r in trained)
    assert trained[2]["policy/pretraining_loss"] < trained[0]["policy/pretraining_loss"]
    actor, critic = ([r[f"{role}/learning_rate"] for r in trained] for role in ("policy", "critic"))
    assert actor[0] < actor[1] == actor[2] == 1e-3  # warm-up over three of six steps, then constant
    assert critic[0] > critic[1] > critic[2]
    out = tmp_path / "out"
    average, last = (AutoModelForCausalLM.from_pretrained(out / name).state_dict() for name in ("ema", "actor"))
    assert any(not torch.equal(average[name], last[name]) for name in last)
    assert "moving average" in (out / "ema" / "README.md").read_text()
    assert list((out / "checkpoints" / "step-00000002").glob("ema-rank*.safetensors"))
