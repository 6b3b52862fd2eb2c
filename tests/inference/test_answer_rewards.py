import json
import math
import shutil

import pytest
import torch
from answer_rewards import AnswerRewards
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from training.utils.data.chat import render
from training.utils.errors import UserError

TALK = [{"role": "user", "content": "tell me a story"}, {"role": "assistant", "content": "a small red house"}]


def load(path):
    rewards = AnswerRewards(str(path), [])
    rewards.load(torch.device("cpu"))
    return rewards


def plain_score(folder, messages):
    """transformers alone, on the row as it was trained."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.tensor([render(tokenizer, messages).input_ids])
    assert ids[0, -1] == tokenizer.eos_token_id
    with torch.no_grad():
        return float(model(ids).logits[0, 0])


def test_the_reward_is_the_score_at_the_last_token(chat_folders):
    model = load(chat_folders["reward"])
    assert model.score(TALK) == pytest.approx(plain_score(chat_folders["reward"], TALK), abs=1e-5)
    assert model.stats is None
    other = [*TALK[:-1], {"role": "assistant", "content": "a lost key"}]
    assert abs(model.score(other) - model.score(TALK)) > 1e-3


def test_it_is_normalised_with_step_2s_numbers(chat_folders, tmp_path):
    folder = shutil.copytree(chat_folders["reward"], tmp_path / "m")
    (folder / "reward_stats.json").write_text(json.dumps({"mean": 0.5, "std": 2.0, "count": 9, "dtype": "fp32"}))
    expected = (plain_score(folder, TALK) - 0.5) / 2.0
    assert load(folder).score(TALK) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("bf16", "loaded"), [(True, torch.bfloat16), (False, torch.float32)])
def test_step_2s_precision_is_taken_where_the_hardware_computes_in_it(
    chat_folders, tmp_path, monkeypatch, bf16, loaded
):
    folder = shutil.copytree(chat_folders["reward"], tmp_path / "m")
    (folder / "reward_stats.json").write_text(json.dumps({"mean": 0.5, "std": 2.0, "count": 9, "dtype": "bf16"}))
    monkeypatch.setattr("training.utils.engine.precision.cpu_computes_bf16", lambda: bf16)
    assert next(load(folder).model.model.parameters()).dtype == loaded


def test_pad_equal_to_eos_does_not_move_the_score(chat_folders, tmp_path):
    """Plain transformers would then score the token before the EOS."""
    folder = shutil.copytree(chat_folders["reward"], tmp_path / "m")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": config["eos_token_id"]}))
    assert load(folder).score(TALK) == pytest.approx(plain_score(chat_folders["reward"], TALK), abs=1e-5)
    assert plain_score(folder, TALK) != pytest.approx(plain_score(chat_folders["reward"], TALK), abs=1e-5)


def test_a_long_conversation_is_scored_by_its_end(chat_folders):
    model = load(chat_folders["reward"])
    history, end = [*TALK] * 40, [{"role": "user", "content": "and then?"}, TALK[1]]
    asked = [{"role": "system", "content": "be kind"}, *history, *end]
    assert len(model.model.encode(asked)) <= model.model.limit < len(render(model.model.tokenizer, asked).input_ids)
    assert model.model.encode(asked)[-8:] == render(model.model.tokenizer, end).input_ids[-8:]
    assert math.isfinite(model.score(asked))
    assert math.isfinite(model.score([{"role": "user", "content": "story " * 900}, TALK[1]]))


@pytest.mark.parametrize(
    "text",
    [
        *("{", "[]", "null", '{"mean": 1}', '{"mean": 0, "std": 0}', '{"mean": 0, "std": "x"}', "[" * 100_000),
        *(f'{{"mean": {number}, "std": 1}}' for number in ("1" + "0" * 400, "NaN", "Infinity", "[]")),
        '{"mean": 0, "std": Infinity}',
    ],
)
def test_damaged_stats_are_said(text, chat_folders, tmp_path):
    folder = shutil.copytree(chat_folders["reward"], tmp_path / "m")
    (folder / "reward_stats.json").write_text(text)
    with pytest.raises(UserError, match="reward_stats.json"):
        load(folder)


def test_no_model_there_is_said(tmp_path, chat_folders):
    with pytest.raises(UserError, match="--reward_model"):
        load(tmp_path / "nowhere")
    folder = shutil.copytree(chat_folders["reward"], tmp_path / "m")
    (folder / "model.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="--reward_model"):
        load(folder)
