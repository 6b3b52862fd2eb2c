"""The whole way: answers of a model, a scripted judge, a reward model, and whether it has learned the judge's taste."""

import json
import sys
from pathlib import Path

import pytest

from tests.tiny import DEMO
from training.pipeline.rounds import divide
from training.step2_reward_model_finetuning import main as step2

sys.path.append(str(Path(__file__).resolve().parents[1] / "inference"))

TASTE = "def taste(prompts, responses, rows):\n    return [{} for text in responses]\n"


def way(tmp_path: Path, model: str, taste: str, sampling: list[str], training: list[str]) -> dict:
    """Answers to the demo's prompts, ranked by a function of ``text``; step 2's summary, on held-out judgements."""
    import generate
    import judge

    rules, answers, rankings = (tmp_path / name for name in ("rules.py", "answers.jsonl", "rankings.jsonl"))
    rules.write_text(TASTE.format(taste))
    asked = ["--model", f"policy={model}", "--output", str(answers), "--dtype", "fp32", "--samples_per_prompt", "4"]
    assert generate.main([*asked, *sampling]) == 0
    assert judge.main(["--answers", str(answers), "--judge", f"{rules}:taste"]) == 0
    divide(rankings, answers, tmp_path / "rankings")
    output = tmp_path / "step2"
    given = ["--model_name_or_path", model, "--data_path", str(tmp_path / "rankings"), "--output_dir", str(output)]
    assert step2.main([*given, "--dtype", "fp32", "--report_to", "none", "--save_every", "0", *training]) == 0
    return json.loads((output / "summary.json").read_text())


@pytest.mark.slow
def test_a_tiny_reward_model_learns_a_judges_taste(tiny_model, tmp_path):
    """The share of characters that are ASCII, in twelve random tokens; on prompts that were held out."""
    sampling = ["--data_path", str(DEMO / "prompts.jsonl"), "--max_answer_seq_len", "12", "--max_prompt_seq_len", "48"]
    more = ["--per_device_generation_batch_size", "64"]
    training = ["--learning_rate", "3e-3", "--per_device_train_batch_size", "8", "--num_train_epochs", "4"]
    taste = "sum(map(str.isascii, text)) / len(text) if text else 0.0"
    summary = way(tmp_path, str(tiny_model), taste, [*sampling, *more], [*training, "--max_seq_len", "96"])
    assert summary["held_out"] > 30
    # a 95% interval over prompts, each once however many pairs it has; a coin has 0.5
    assert 0.55 < summary["accuracy_low"] < summary["accuracy_after"] < summary["accuracy_high"], summary


@pytest.mark.slow
def test_the_embedded_models_reward_model_learns_a_judges_taste(tmp_path):
    """Answers of the embedded model that come to the end of a sentence, rather than being cut within one."""
    data = ["--data_path", str(DEMO / "prompts.jsonl"), "--chat_template", "chatml"]
    sampling = [*data, "--max_answer_seq_len", "40", "--per_device_generation_batch_size", "56"]
    training = ["--learning_rate", "5e-4", "--lora_dim", "16", "--only_optimize_lora", "--num_warmup_steps", "3"]
    more = ["--max_seq_len", "128", "--chat_template", "chatml"]
    summary = way(tmp_path, "embedded", "float(text.endswith(('.', '!', '?')))", sampling, [*training, *more])
    assert 0.5 < summary["accuracy_low"] < summary["accuracy_after"], summary
