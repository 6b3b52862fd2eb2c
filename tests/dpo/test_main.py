"""The program on a tiny model: what it writes, what it logs and remarks, with every loss; and its plan."""

import json

import pytest
from transformers import AutoModelForCausalLM

from tests.glossary import never_logged, unexplained
from tests.marks import slow
from training.step2_dpo_finetuning import evaluate
from training.step2_dpo_finetuning.main import main
from training.utils.health import HealthMonitor
from training.utils.health_rules import DPO_RULES
from training.utils.model.card import read_front_matter


@pytest.fixture
def dpo(tiny_model, tmp_path):
    """Runs DPO on some pairs of the demo; gives its summary and its metrics."""

    def run(*more: str, name: str = "run") -> tuple[dict, list[dict]]:
        output = tmp_path / name / "dpo"
        argv = ["--model_name_or_path", str(tiny_model), "--data_path", "demo:20", "--eval_data_path", "demo:6"]
        argv += ["--output_dir", str(output), "--dtype", "fp32", "--report_to", "none", "--max_seq_len", "480", *more]
        assert main(argv) == 0
        lines = (output / "metrics.jsonl").read_text().splitlines()
        return json.loads((output / "summary.json").read_text()), [json.loads(line) for line in lines]

    return run


def test_what_is_left_behind(dpo, tmp_path, tiny_model):
    summary, metrics = dpo("--learning_rate", "3e-3", "--num_train_epochs", "4", "--eval_interval", "5")
    assert not unexplained("dpo", metrics) and not never_logged("dpo", metrics)
    first, *_, last = [record for record in metrics if "eval/loss" in record]
    assert first["eval/loss"] == pytest.approx(0.693147, abs=1e-6) and first["eval/kl"] == 0.0
    assert [record["step"] for record in metrics if "eval/loss" in record] == [0, 5, 10, 12]
    trained = [record["train/loss"] for record in metrics if "train/loss" in record]
    assert trained[0] == pytest.approx(0.693147, abs=1e-6), "policy and reference are one before the first step"
    assert sum(trained[-3:]) / 3 < 0.5 < trained[0]
    assert summary["held_out"] == 6 and summary["loss_after"] == last["eval/loss"]
    assert summary["accuracy_low"] <= summary["accuracy_after"] <= summary["accuracy_high"]
    folder = tmp_path / "run" / "dpo"
    saved = AutoModelForCausalLM.from_pretrained(folder)
    assert not (saved.lm_head.weight == AutoModelForCausalLM.from_pretrained(tiny_model).lm_head.weight).all()
    assert "dpo" in read_front_matter(folder / "README.md")["tags"]


def test_the_fall_of_chosen_answers_is_said_in_words(tmp_path):
    monitor = HealthMonitor(tmp_path, DPO_RULES)
    for step in range(1, 5):
        monitor.observe(step, {"train/chosen_change": -0.05 * step, "train/loss": 0.5})
    monitor.observe(4, {"eval/chosen_change": -0.3, "eval/kl": 0.2, "eval/margin": 2.0})
    (remark,) = [json.loads(line) for line in (tmp_path / "health.jsonl").read_text().splitlines()]
    assert (remark["step"], remark["metric"]) == (4, "eval/chosen_change")
    assert "held out" in remark["text"] and "less likely than before training (-0.30 nats" in remark["text"]
    assert "--beta" in remark["text"]
    monitor.observe(5, {"train/chosen_change": -0.4})
    assert monitor.remarks[-1].metric == "train/chosen_change", "the third step in a row below -0.1"


@pytest.mark.parametrize("loss", [slow("ipo"), slow("hinge"), "kto", slow("simpo"), slow("orpo")])
def test_every_loss_learns(dpo, loss):
    _, metrics = dpo("--loss", loss, "--learning_rate", "3e-3", "--num_train_epochs", "4")
    losses = [record["train/loss"] for record in metrics if "train/loss" in record]
    assert sum(losses[-3:]) < sum(losses[:3])
    assert ("eval/kl" in metrics[0]) == (loss not in ("simpo", "orpo"))


def test_adapters_need_no_second_model(dpo, capsys):
    adapters = ["--lora_dim", "4", "--only_optimize_lora", "--learning_rate", "1e-2"]
    _, metrics = dpo(*adapters, "--loss", "simpo")
    assert "eval/kl" in metrics[-1], "the model with its adapters off is there to measure it by"
    dpo(*adapters, name="other")
    assert "adapters off, no second model" in capsys.readouterr().out


def test_the_plan_has_the_second_model_or_not(dpo, tiny_model, capsys):
    argv = ["--model_name_or_path", str(tiny_model), "--plan", "--dtype", "fp32", "--max_seq_len", "32"]

    def planned(*more: str) -> str:
        assert main([*argv, *more]) in (0, 1)
        return capsys.readouterr().out

    assert "DPO: " in (full := planned()) and "reference" in full
    assert "reference" not in planned("--lora_dim", "4", "--only_optimize_lora")
    assert "reference" not in planned("--loss", "orpo")


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_it_is_evaluated_from_disk(dpo, tmp_path, loss):
    summary, metrics = dpo("--learning_rate", "3e-3", "--loss", loss)
    folder = tmp_path / "run" / "dpo"
    rows = ["--data_path", "demo:20", "--eval_data_path", "demo:6"]
    (folder.parent / "manifest.json").write_text(json.dumps({"steps": {"dpo": {"arguments": ["--loss", loss, *rows]}}}))
    reference = ["--reference_model_name_or_path", str(summary["base_model"])]
    assert (
        evaluate.main(["--path", str(folder), "--dtype", "fp32", "--per_device_eval_batch_size", "4", *reference]) == 0
    )
    found = json.loads((folder / "evaluation.json").read_text())
    assert found["accuracy"] == summary["accuracy_after"] and found["loss"] == pytest.approx(
        summary["loss_after"], abs=1e-4
    )
    assert found["margin_mean"] == pytest.approx(summary["margin_after"], abs=1e-4)
    assert found["kl"] == pytest.approx(summary.get("kl", found["kl"]), abs=1e-4) and found["kl"] > 0
    assert len(found["worst_pairs"]) == 5 and sum(found["margins"]["counts"]) == 6
