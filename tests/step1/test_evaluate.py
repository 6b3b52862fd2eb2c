"""Step 1's evaluation: ROUGE as the library has it, perplexity by hand, prompts cut out of conversations."""

import json
import math
import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.step1_supervised_finetuning import evaluate
from training.step1_supervised_finetuning.evaluate import greedy_answers, last_turn, likelihoods
from training.step1_supervised_finetuning.rouge import normalise, rouge_scores
from training.utils.data.template import stop_token_ids


def test_rouge_equals_the_librarys_own_example():
    # torchmetrics' documentation of ROUGEScore
    scores = rouge_scores(["My name is John"], ["Is your name John"])
    assert {kind: round(values[0], 4) for kind, values in scores.items()} == {
        "rouge1": 0.75,
        "rouge2": 0.0,
        "rougeL": 0.5,
    }


def test_rouge_by_hand():
    scores = rouge_scores(["the cat sat", "", "Grüße, Welt!"], ["the cat sat on the mat", "a", "grüße welt"])
    assert scores["rouge1"] == pytest.approx([2 * 1 * 0.5 / 1.5, 0, 1])  # precision 3/3, recall 3/6
    assert scores["rouge2"] == pytest.approx([2 * 1 * 0.4 / 1.4, 0, 1])  # 2/2, 2/5
    assert scores["rougeL"] == pytest.approx([2 * 1 * 0.5 / 1.5, 0, 1])
    assert normalise("Don't  PANIC_now: 3,14") == "don t panic now 3 14"


def test_the_last_response_is_cut_off():
    assert last_turn([5, 6, 7, 8, 9], [0, 1, 0, 1, 1]) == ([5, 6, 7], [8, 9])
    assert last_turn([5, 6, 7, 8, 9], [0, 1, 1, 0, 0]) == ([5], [6, 7]), "an answer that is not trained ends it"
    assert last_turn([5, 6], [0, 0]) == ([], [])


def test_of_plain_texts_it_tells_the_perplexity_alone(tiny_model, tmp_path):
    step1 = shutil.copytree(tiny_model, tmp_path / "step1")
    (step1 / "summary.json").write_text(json.dumps({"base_model": str(tiny_model)}))
    rows = [json.dumps({"text": f"the fox {n} slept until the morning came"}) for n in range(5)]
    (tmp_path / "texts.jsonl").write_text("\n".join(rows))
    assert evaluate.main(["--path", str(step1), "--eval_data_path", str(tmp_path / "texts.jsonl")]) == 0
    found = json.loads((step1 / "evaluation.json").read_text())
    assert (found["rows"], found["prompts"]) == (5, 0) and "rouge1" not in found["models"]["sft"]
    assert found["models"]["sft"]["perplexity"] == found["models"]["base"]["perplexity"]


def test_likelihood_and_answers_do_not_depend_on_the_batch(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    rows = [
        {"input_ids": [5, 9, 11, 40, 2], "response_mask": [0, 0, 1, 1, 1]},
        {"input_ids": [5, 77, 2], "response_mask": [0, 1, 1]},
    ]
    expected = []
    for row in rows:
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"]])).logits[0].log_softmax(-1)
        expected.append(
            -sum(logits[t - 1, i].item() for t, i in enumerate(row["input_ids"]) if row["response_mask"][t])
        )
    for batch_size in (1, 2):
        sums, counts = likelihoods(model, rows, batch_size, 2, "test")
        assert counts == [3, 2]
        assert sums == pytest.approx(expected, abs=1e-4)
    assert math.isfinite(sum(sums))
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, __, given: seen.append(given["input_ids"].numel()), with_kwargs=True
    )
    likelihoods(model, rows, 2, 2, "test")
    hook.remove()
    assert seen[-1] == 7, "what the rows begin with goes through the model once, and no padding"
    prompts = [[5, 9, 11], [5, 77], [8, 30, 31, 32, 33]]
    alone = greedy_answers(model, prompts, tokenizer, 1, 6, "test")
    assert greedy_answers(model, prompts, tokenizer, 3, 6, "test") == alone
    ids = torch.tensor([prompts[2]])
    for _ in range(6):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
        if ids[0, -1].item() in stop_token_ids(tokenizer):
            break
    assert alone[2] == tokenizer.decode(ids[0, 5:], skip_special_tokens=True).strip()
