"""Step 2's program on a file of rankings: its first loss by hand, and a run that is taken up again."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.step2.ranking_checks import PAD
from tests.tiny import tiny_tokenizer
from training.step2_reward_model_finetuning import main as step2
from training.utils.data.chat import render
from training.utils.model.classifiers import load_classifier
from training.utils.model.forward import TokenScorer

SEED = 3
ROWS = [
    {"prompt": "Who?", "ranking": ["Ada wrote it.", ["A woman.", "Somebody did."], "Apples."]},
    {"prompt": "Why is the sky blue?", "ranking": ["Blue light is scattered more.", "It is."]},
    {"prompt": "How?", "ranking": ["Slowly, with care.", "With care.", "Fast."]},
    {"prompt": "When?", "chosen": "In June.", "rejected": "Never ever."},
]


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("rankings")
    held_out = [{**row, "prompt": f"{row['prompt']} Say."} for row in ROWS]
    for name, rows in (("train", ROWS), ("held_out", held_out)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return str(folder / "train.jsonl"), str(folder / "held_out.jsonl")


def flags(tiny_model: Path, files: tuple[str, str], output: Path, **more: object) -> list[str]:
    values = {"model_name_or_path": tiny_model, "data_path": files[0], "eval_data_path": files[1], "dtype": "fp32"}
    values |= {"output_dir": output, "max_seq_len": 64, "learning_rate": 1e-3, "seed": SEED, **more}
    return [part for name, value in values.items() for part in (f"--{name}", str(value))]


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return [{name: value for name, value in line.items() if name != "time"} for line in lines]


def mean_loss(tiny_model: Path) -> float:
    """The mean over prompts of the mean over their pairs, of the model that the step starts from."""
    scorer = TokenScorer(load_classifier(str(tiny_model), dtype="fp32", pad_token_id=PAD, fresh_head_seed=SEED))

    def reward(prompt: str, answer: str) -> float:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        ids = torch.tensor([render(tiny_tokenizer(), turns).input_ids])
        with torch.no_grad():
            return scorer(ids, torch.ones_like(ids))[0, -1].item()

    by_prompt = []
    for row in ROWS:
        levels = row.get("ranking") or [row["chosen"], row["rejected"]]
        placed = [
            (n, text) for n, level in enumerate(levels) for text in ([level] if isinstance(level, str) else level)
        ]
        rewards = [(n, reward(row["prompt"], text)) for n, text in placed]
        losses = [math.log1p(math.exp(worse - better)) for a, better in rewards for b, worse in rewards if a < b]
        by_prompt.append(sum(losses) / len(losses))
    return sum(by_prompt) / len(by_prompt)


def test_first_loss_and_a_run_that_is_taken_up(tiny_model, files, tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    many = {"per_device_train_batch_size": 2, "num_train_epochs": 2, "save_every": 1, "keep_last": 9}
    assert step2.main(flags(tiny_model, files, whole, **many)) == 0
    one = tmp_path / "one"
    assert step2.main(flags(tiny_model, files, one, per_device_train_batch_size=4)) == 0
    (first,) = [line for line in metrics(one) if "train/loss" in line]
    assert first["train/loss"] == pytest.approx(mean_loss(tiny_model), abs=1e-5)
    summary = json.loads((whole / "summary.json").read_text(encoding="utf-8"))
    assert (summary["held_out"], summary["steps"]) == (4, 4), "prompts, not pairs"
    checkpoints = sorted(path for path in whole.rglob("*") if path.is_dir() and path.name.endswith("00001"))
    assert len(checkpoints) == 1
    shutil.copytree(checkpoints[0].parent.parent, again)
    for path in (again / "summary.json", again / "model.safetensors"):
        path.unlink()
    resumed = again / checkpoints[0].relative_to(whole)
    assert step2.main([*flags(tiny_model, files, again, **many), "--resume", str(resumed)]) == 0
    assert metrics(again) == metrics(whole)
    for name, tensor in load_file(whole / "model.safetensors").items():
        assert torch.equal(load_file(again / "model.safetensors")[name], tensor), name


def test_a_tie_counts_half_in_training_as_held_out(tiny_model, files, tmp_path):
    reward = load_classifier(str(tiny_model), dtype="fp32", pad_token_id=PAD, fresh_head_seed=SEED)
    torch.nn.init.zeros_(reward.score.weight)
    reward.save_pretrained(tmp_path / "zero")
    tiny_tokenizer().save_pretrained(tmp_path / "zero")
    assert step2.main(flags(tmp_path / "zero", files, tmp_path / "run", per_device_train_batch_size=4)) == 0
    before, first, _ = metrics(tmp_path / "run")
    assert before["eval/accuracy"] == first["train/accuracy"] == 0.5
