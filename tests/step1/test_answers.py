"""Step 1 may choose its model by ROUGE: the figure by another way, on one rank and on two; the model that is kept."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.step1.rouge_checks import TEXTS, held_out_rows, judged
from tests.tiny import tiny_tokenizer
from training.step1_supervised_finetuning import main as step1
from training.step1_supervised_finetuning.answers import RougeJudge, last_turn
from training.step1_supervised_finetuning.rouge import rouge_scores
from training.utils.data.template import stop_token_ids
from training.utils.errors import UserError


@pytest.fixture(scope="module")
def by_hand(tiny_model) -> float:
    """Plain greedy decoding, a prompt at a time, without a cache."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval(), tiny_tokenizer()
    turns = [last_turn(row["input_ids"], row["response_mask"]) for row in held_out_rows()]
    longest, answers = max(len(response) for _, response in turns), []
    for prompt, _ in turns[:4]:
        ids = torch.tensor([prompt])
        for _ in range(longest):
            with torch.no_grad():
                ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
            if ids[0, -1].item() in stop_token_ids(tokenizer):
                break
        answers.append(tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True).strip())
    kinds = rouge_scores(answers, TEXTS[:4]).values()
    found = sum(sum(values) / 4 for values in kinds) / 3
    assert found > 0.1, "the texts have words of the model's noise"
    return found


@pytest.mark.parametrize("batch_size", [1, 3])
def test_rouge_of_an_engine(tiny_model, by_hand, batch_size):
    assert judged(str(tiny_model), stage=2, batch_size=batch_size) == (pytest.approx(by_hand), True)


@pytest.mark.parametrize("stage", [1, 3])
def test_rouge_on_two_ranks(tiny_model, by_hand, rank_pair, stage):
    """Four prompts, three to a batch: the ranks' batches are unequal, and at ZeRO-3 decoded in step."""
    first, second = rank_pair.run(judged, str(tiny_model), stage=stage, batch_size=3)
    assert first == second == (pytest.approx(by_hand), True)


@pytest.mark.parametrize(("best_by", "rate", "worse"), [("rouge", "3e-3", False), ("loss", "2", True)])
def test_the_best_of_the_trained_models_is_kept(tiny_model, tiny_data, tmp_path, capsys, best_by, rate, worse):
    """Also where the untrained one is better than any of them, which is said."""
    flags = ["--model_name_or_path", str(tiny_model), "--output_dir", str(tmp_path), "--dtype", "fp32"]
    flags += ["--data_path", str(tiny_data / "sft.jsonl"), "--eval_data_path", str(tiny_data / "held_out.jsonl")]
    flags += [
        "--best_by",
        best_by,
        "--eval_interval",
        "1",
        "--per_device_train_batch_size",
        "4",
        "--max_seq_len",
        "480",
    ]
    assert step1.main([*flags, "--learning_rate", rate, "--num_train_epochs", "1"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    score = {line["step"]: line.get("eval/rouge", -line["eval/loss"]) for line in lines if "eval/loss" in line}
    loss = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    assert list(score) == list(range(4)), "before training, and after every step"
    summary = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert summary["best_step"] == max(range(1, 4), key=score.__getitem__), "the first of equal ones"
    none_better = all(score[step] <= score[0] for step in range(1, 4))
    assert ("no trained model is better than the untrained one" in capsys.readouterr().out) == none_better
    assert none_better or not worse
    assert summary["loss_after"] == loss[summary["best_step"]]


def test_no_room_for_an_answer_is_said():
    with pytest.raises(UserError, match="--best_by rouge: no held-out prompt leaves room for an answer of 10 tokens"):
        RougeJudge(held_out_rows(), tiny_tokenizer(), 10, 1)
