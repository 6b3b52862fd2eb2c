"""Rewards from functions, from models with another tokenizer, from other families, and several with weights."""

import json
import shutil
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertTokenizerFast,
    DebertaV2Config,
    ElectraConfig,
    RobertaConfig,
)

from tests.step3.hybrid_checks import save_tiny_reward_model
from tests.tiny import save_tiny_model, step3_flags, tiny_tokenizer
from training.step3_rlhf_finetuning import evaluate, settings
from training.step3_rlhf_finetuning.main import main
from training.step3_rlhf_finetuning.outputs import write_trace
from training.step3_rlhf_finetuning.prompts import PromptSet
from training.step3_rlhf_finetuning.reward_examples import exact_answer, last_number
from training.step3_rlhf_finetuning.reward_functions import parse_reward_functions
from training.step3_rlhf_finetuning.reward_sources import FunctionReward, RewardMix, TextReward, TokenReward
from training.utils.data.chat import render
from training.utils.errors import UserError
from training.utils.generation.engines import rollout_backend
from training.utils.generation.rollouts import RolloutBatch
from training.utils.generation.sampling import SamplingConfig
from training.utils.model.classifiers import load_classifier, scores_tokens
from training.utils.model.loading import load_causal_lm
from training.utils.model.reward_stats import RewardStats
from training.utils.model.text_reward import load_text_reward_model
from training.utils.model.tokenizer import load_tokenizer

MESSAGES = [[{"role": "user", "content": text}] for text in ("Tell me a story.", "Why is the sky blue?", "Hi")]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def other_reward(tmp_path_factory):
    """A reward model whose chat template is another one."""
    base = save_tiny_model(tmp_path_factory.mktemp("models") / "other", seed=3)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer.save_pretrained(base)
    return save_tiny_reward_model(str(base), base.parent / "other-reward")


def save_encoder_reward(family: str, folder: Path) -> Path:
    """A tiny reward model of an encoder family, pad id 1 as RoBERTa has it."""
    words = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", "[MASK]", "tell", "me", "a", "story", "good", "bad", "why", "hi", "."]
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"vocab_size": len(words), "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 16, "max_position_embeddings": 64, "num_labels": 1, "pad_token_id": 1}
    kinds = {"bert": BertConfig, "roberta": RobertaConfig, "deberta": DebertaV2Config, "electra": ElectraConfig}
    config = kinds[family]
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_config(config(**sizes, initializer_range=0.5)).save_pretrained(folder)
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bert_reward(tmp_path_factory):
    """A reward model of a family without a score head: it reads pairs of texts."""
    folder = tmp_path_factory.mktemp("models") / "bert"
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "tell", "me", "a", "story", "good", "bad", "why", "hi", "."]
    (folder / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=24, num_labels=1, initializer_range=0.5,
    )  # fmt: skip
    AutoModelForSequenceClassification.from_config(config).eval().save_pretrained(folder)
    BertTokenizerFast(vocab_file=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def prompt_set(tokenizer):
    rows = []
    for i, messages in enumerate(MESSAGES):
        ids = render(tokenizer, messages, add_generation_prompt=True).input_ids
        rows.append(
            {"prompt_ids": ids, "messages": json.dumps(messages), "row": json.dumps({"n": i}), "length": len(ids)}
        )
    return PromptSet(rows, tokenizer, (tokenizer.eos_token_id,), 0)


@pytest.fixture(scope="module")
def answered(tiny_model):
    """Prompts with texts, and responses to them."""
    tokenizer = load_tokenizer(str(tiny_model))
    asked = prompt_set(tokenizer)
    model = load_causal_lm(str(tiny_model), dtype="fp32").eval()
    rollout = rollout_backend("fast").generate(model, asked.request([2, 0, 1], CPU), SamplingConfig(9))
    return asked, [2, 0, 1], rollout


def texts_of(answered):
    asked, rows, rollout = answered
    ids = rollout.input_ids[:, rollout.response_start :]
    return [
        [
            *MESSAGES[row],
            {"role": "assistant", "content": asked.tokenizer.decode(i[m], skip_special_tokens=True).strip()},
        ]
        for row, i, m in zip(rows, ids, rollout.response_mask, strict=True)
    ]


def write(folder, text, name="f.py"):
    (folder / name).write_text(text)
    return str(folder / name)


def test_specs_have_names_and_weights(tmp_path):
    file = write(tmp_path, "def size(p, r, rows):\n    return [len(x) for x in r]\n")
    functions, weight = parse_reward_functions([f"{file}:size", f"{file}:size=-0.5", "model=2"], "--reward_function")
    assert {name: w for name, (_, w) in functions.items()} == {"size": 1.0, "size_2": -0.5}
    assert weight == 2.0


def test_a_function_called_model_is_not_the_reward_model(tmp_path):
    file = write(tmp_path, "def model(p, r, rows):\n    return [0.0]\n")
    functions, weight = parse_reward_functions([f"{file}:model=3", "model=2"], "--reward_function")
    assert ({name: w for name, (_, w) in functions.items()}, weight) == ({"model_2": 3.0}, 2.0)
    with pytest.raises(UserError, match="one name: model, model"):
        RewardMix([TokenReward(None), FunctionReward(functions["model_2"][0], "model")])


def test_an_equals_sign_in_a_path_is_no_weight(tmp_path):
    (tmp_path / "lr=1e-5").mkdir()
    file = write(tmp_path / "lr=1e-5", "def size(p, r, rows):\n    return [0.0]\n")
    functions, weight = parse_reward_functions([f"{file}:size", f"{file}:size=2", "model"], "--reward_function")
    assert {name: w for name, (_, w) in functions.items()} == {"size": 1.0, "size_2": 2.0}
    assert weight == 1.0
    found = settings.origins("actor", "", [f"{file}:size", f"{file}:size=2", "model=3"])
    assert [*found.values()] == ["actor", file, file]
    with pytest.raises(UserError, match="write it as path"):
        parse_reward_functions([file], "--reward_function")


@pytest.mark.parametrize("spec", ["f.py:size=heavy", "f.py:size=nan", "f.py:size=0", "rules", "no.py:size"])
def test_a_bad_spec_is_one_line(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "def size(p, r, rows):\n    return [0.0]\n")
    with pytest.raises(UserError, match="--reward_function"):
        parse_reward_functions([spec], "--reward_function")


def test_a_function_gets_texts_and_rows(answered):
    seen = {}

    def function(prompts, responses, rows):
        seen.update(prompts=prompts, responses=responses, rows=rows)
        return [float(row["n"]) for row in rows]

    asked, rows, rollout = answered
    total, raw = RewardMix([FunctionReward(function, "n", 0.5)]).score(rollout, rows, asked, 2)
    assert raw["n"].tolist() == [2.0, 0.0, 1.0] and total.tolist() == [1.0, 0.0, 0.5]
    assert seen["prompts"] == [MESSAGES[i] for i in rows]
    assert seen["responses"] == [turns[-1]["content"] for turns in texts_of(answered)]


def test_sources_are_normalised_weighted_and_added(answered, tiny_reward):
    asked, rows, rollout = answered
    tokenizer = asked.tokenizer
    stats = RewardStats(0.3, 2.0, 5, "fp32")
    scorer = load_text_reward_model(str(tiny_reward), dtype="fp32", device=CPU).model
    tokens = TokenReward(scorer, stats, 3.0)
    mix = RewardMix([tokens, FunctionReward(lambda p, r, rows: [1.0, 2.0, 4.0], "f", -1.0)])
    total, raw = mix.score(rollout, rows, asked, 2)
    expected = 3.0 * (raw["model"] - 0.3) / 2.0 - torch.tensor([1.0, 2.0, 4.0])
    torch.testing.assert_close(total, expected)
    # by hand: each row alone, without padding
    classifier = load_classifier(str(tiny_reward), dtype="fp32", pad_token_id=tokenizer.pad_token_id).eval()
    for i, value in enumerate(raw["model"].tolist()):
        ids = rollout.input_ids[i][rollout.attention_mask[i].bool()][None]
        with torch.no_grad():
            hidden = classifier.model(ids).last_hidden_state[0, -1]
        assert value == pytest.approx((classifier.score.weight[0] @ hidden).item(), abs=1e-4)


def test_another_template_is_rendered_anew(answered, other_reward):
    asked, rows, rollout = answered
    model = load_text_reward_model(str(other_reward), dtype="fp32", device=CPU)
    found = TextReward(model).score(rollout, rows, asked, 2)
    plain = AutoModelForSequenceClassification.from_pretrained(other_reward, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(other_reward))
    for value, messages in zip(found.tolist(), texts_of(answered), strict=True):
        text = "".join(f"{m['role']}: {m['content']}<|im_end|>" for m in messages)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            assert value == pytest.approx(plain(ids).logits[0, 0].item(), abs=1e-4)
    one_by_one = TextReward(model).score(rollout, rows, asked, 1)
    torch.testing.assert_close(found, one_by_one)


def test_another_family_serves_through_its_own_forward(answered, bert_reward, tiny_reward):
    assert scores_tokens(str(tiny_reward)) and not scores_tokens(str(bert_reward))
    asked, rows, rollout = answered
    model = load_text_reward_model(str(bert_reward), dtype="fp32", device=CPU)
    found = TextReward(model).score(rollout, rows, asked, 3)
    plain = AutoModelForSequenceClassification.from_pretrained(bert_reward, dtype=torch.float32).eval()
    tokenizer = BertTokenizerFast.from_pretrained(bert_reward)
    for value, messages in zip(found.tolist(), texts_of(answered), strict=True):
        pair = tokenizer(
            messages[0]["content"], messages[1]["content"], return_tensors="pt", truncation="only_first", max_length=24
        )
        with torch.no_grad():
            assert value == pytest.approx(plain(**pair).logits[0, 0].item(), abs=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_of_a_pair_without_room_the_prompt_is_cut_first_then_the_answer_on_its_left(bert_reward, side):
    """24 tokens, three of them the tokenizer's."""
    model = load_text_reward_model(str(bert_reward), dtype="fp32", device=CPU)
    model.tokenizer.truncation_side = side
    plain = AutoModelForSequenceClassification.from_pretrained(bert_reward, dtype=torch.float32).eval()
    words = ["tell", "me", "a", "story", "good", "bad", "why", "hi", "."]
    question, answer = words[:5], words * 4
    asked = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": " ".join(answer[:length])}]
        for text, length in ((" ".join(question), 18), (" ".join(question), 21), (" ".join(question), 30), ("", 22))
    ]
    found = model.rewards(asked, 2)
    kept = [question[-3:] if side == "left" else question[:3], [], [], []]
    ends = [answer[:18], answer[:21], answer[9:30], answer[1:22]]
    for value, *texts in zip(found.tolist(), kept, ends, strict=True):
        pair = model.tokenizer(*(" ".join(text) for text in texts), return_tensors="pt")
        assert pair["input_ids"].shape[1] == 24
        with torch.no_grad():
            assert value == pytest.approx(plain(**pair).logits[0, 0].item(), abs=1e-5)


def test_a_family_that_counts_from_behind_its_padding_has_fewer_places(bert_reward, tmp_path):
    """RoBERTa: the 24 of its table begin at 4."""
    folder = shutil.copytree(bert_reward, tmp_path / "roberta")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = RobertaConfig(vocab_size=14, max_position_embeddings=24, num_labels=1, pad_token_id=3, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(folder)
    model = load_text_reward_model(str(folder), dtype="fp32", device=CPU)
    assert model.limit == 20
    said = [[{"role": "user", "content": "why"}, {"role": "assistant", "content": "good " * n}] for n in (15, 16, 40)]
    assert model.rewards(said, 3).isfinite().all()


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("padded", [True, False], ids=["a pad token", "no pad token"])
def test_a_causal_model_without_a_template_scores_the_last_token_of_a_pair(tiny_reward, tmp_path, side, padded):
    folder = shutil.copytree(tiny_reward, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    if not padded:
        tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    model = load_text_reward_model(str(folder), dtype="fp32", device=CPU)
    assert (model.tokenizer.chat_template, model.tokenizer.pad_token is not None) == (None, padded)
    model.tokenizer.padding_side = side
    asked = [
        [*messages, {"role": "assistant", "content": "Yes. " * (5 * i + 1)}] for i, messages in enumerate(MESSAGES)
    ]
    found = model.rewards(asked, 3)
    classifier = load_classifier(str(tiny_reward), dtype="fp32", pad_token_id=0).eval()
    for value, (question, answer) in zip(found.tolist(), asked, strict=True):
        ids = torch.tensor([tokenizer(question["content"], answer["content"])["input_ids"]])
        with torch.no_grad():
            hidden = classifier.model(ids).last_hidden_state[0, -1]
        assert value == pytest.approx((classifier.score.weight[0] @ hidden).item(), abs=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("template", [True, False], ids=["a template", "pairs"])
@pytest.mark.parametrize("family", ["bert", "roberta", "deberta", "electra"])
def test_a_text_is_worth_the_same_alone_and_beside_a_longer_one(family, template, side, tmp_path):
    """Absolute positions, positions from the pad token, relative positions; whatever side the tokenizer pads."""
    folder = save_encoder_reward(family, tmp_path / family)
    model = load_text_reward_model(str(folder), dtype="fp32", device=CPU)
    model.tokenizer.padding_side = side
    if template:
        model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + ' [SEP]' }}{% endfor %}"
    asked = [
        [*messages, {"role": "assistant", "content": "good . " * (3 * i + 1)}] for i, messages in enumerate(MESSAGES)
    ]
    together = model.rewards(asked, 3)
    alone = torch.cat([model.rewards([conversation], 1) for conversation in asked])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=0)
    assert together.std() > 1e-3, "blind: all texts are worth the same"


def test_another_family_without_a_pad_token_is_not_padded(bert_reward):
    model = load_text_reward_model(str(bert_reward), dtype="fp32", device=CPU)
    asked = [[*messages, {"role": "assistant", "content": "good . " * (i + 1)}] for i, messages in enumerate(MESSAGES)]
    expected = model.rewards(asked, 3)
    model.tokenizer = AutoTokenizer.from_pretrained(bert_reward)
    model.tokenizer.pad_token = None
    torch.testing.assert_close(model.rewards(asked, 3), expected)


def test_several_outputs_are_no_reward_model(bert_reward, tmp_path):
    config = BertConfig.from_pretrained(bert_reward, num_labels=3)
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="3 outputs"):
        scores_tokens(str(tmp_path))


def records(folder):
    return [r for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "policy/loss" in r]


SIZE = "def size(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n"


def strict_json(line):
    def no_json(constant):
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(line, parse_constant=no_json)


def test_a_number_in_a_trace_that_is_not_finite_is_null(tiny_model, tmp_path):
    nan, inf = float("nan"), float("inf")
    ids, mask = torch.tensor([[9, 5, 2], [9, 5, 6]]), torch.ones(2, 2, dtype=torch.bool)
    numbers = torch.tensor([[0.5, nan], [-inf, inf]])
    batch = SimpleNamespace(
        experience=SimpleNamespace(
            input_ids=ids, response_start=1, mask=mask, rewards=numbers,
            **dict.fromkeys(("log_probs", "reference_log_probs", "values", "advantages"), torch.zeros(2, 2)),
        ),
        rollout=RolloutBatch(ids, torch.ones_like(ids), 1, mask, torch.zeros(2, 2)),
        request=SimpleNamespace(rows=[0, 1], row_ids=[0, 1], stop_ids=(2,)),
        rewards={"model": torch.tensor([nan, 1.0])},
        scores=torch.tensor([nan, inf]),
    )  # fmt: skip
    write_trace(tmp_path, [batch], prompt_set(load_tokenizer(str(tiny_model))), 1)
    first, second = map(strict_json, (tmp_path / "trace" / "iteration-000001.jsonl").read_text().splitlines())
    assert (first["sources"], first["score"], first["rewards"]) == ({"model": None}, None, [0.5, None])
    assert (second["sources"], second["score"], second["rewards"]) == ({"model": 1.0}, None, [None, None])


def test_the_program_with_functions_alone(tiny_model, tiny_data, tmp_path, monkeypatch, capsys):
    """No reward model at all: the critic starts from the SFT model with a fresh head; a trace tells every token.

    The finished step is evaluated from another folder: without a manifest, by what the step itself wrote down.
    """
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "f.py"
    file.write_text(SIZE)
    flags = ["--critic_model_name_or_path", "none", "--reward_function", "./f.py:size=0.1", "--trace", "2", "9"]
    lines = [json.dumps({"prompt": "How much is it?", "solution": solution}) for solution in "12"]
    Path("exams.jsonl").write_text("\n".join(lines))
    flags += ["--data_path", str(tiny_data / "prompts.jsonl"), "exams.jsonl"]
    assert main(step3_flags(tiny_model, tiny_data, tmp_path / "out", *flags)) == 0
    told = capsys.readouterr().out
    assert "--trace 9: the run ends after iteration 2" in told
    assert "duplicate" not in told, "a function can tell the rows of an equal prompt apart"
    made = records(tmp_path / "out")
    assert len(made) == 2 and "source/model" not in made[0]
    assert made[0]["reward/mean"] == pytest.approx(0.1 * made[0]["source/size"])
    assert abs(sum(v for k, v in made[1].items() if k.startswith("share/")) - 1) < 1e-6
    assert (tmp_path / "out" / "critic" / "config.json").is_file()
    assert [p.name for p in (tmp_path / "out" / "trace").iterdir()] == ["iteration-000002.jsonl"]
    traced = [json.loads(line) for line in (tmp_path / "out" / "trace" / "iteration-000002.jsonl").open()]
    assert [t["sample"] for t in traced] == [0, 1, 2, 3]
    for t in traced:
        assert t["sources"]["size"] == len(t["response"])
        assert t["score"] == pytest.approx(0.1 * len(t["response"]) - (not t["ended"]) * 1.0)
        lists = [t[name] for name in ("tokens", "ids", "log_probs", "reference_log_probs", "values", "advantages")]
        assert {len(values) for values in lists} == {len(t["rewards"])}
        penalties = [-0.05 * (a - b) for a, b in zip(t["log_probs"], t["reference_log_probs"], strict=True)]
        assert t["rewards"][:-1] == pytest.approx(penalties[:-1], abs=1e-5)
        assert t["rewards"][-1] == pytest.approx(penalties[-1] + t["score"], abs=1e-5)
    mean = sum(sum(t["advantages"]) for t in traced) / sum(len(t["advantages"]) for t in traced)
    assert abs(mean) < 1e-4  # whitened
    (elsewhere := tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    argv = ["--path", str(tmp_path / "out"), "--dtype", "fp32", "--max_prompts", "3", "--best_of", ""]
    assert evaluate.main(argv) == 0
    found = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (found["sft_model"], found["reward_model"], found["max_answer_seq_len"]) == (str(tiny_model), "", 6)
    for sample in found["samples"]:
        assert sample["rlhf_reward"] == pytest.approx(0.1 * len(sample["rlhf"]))


def test_the_share_of_clipped_rewards_is_logged_and_the_spread_without_penalties(tiny_model, tiny_data, tmp_path):
    (file := tmp_path / "f.py").write_text(SIZE)
    flags = ["--critic_model_name_or_path", "none", "--reward_function", f"{file}:size", "--trace", "1"]
    flags += ["--clip_reward", "9.5", "--missing_eos_penalty", "7"]
    assert main(step3_flags(tiny_model, tiny_data, tmp_path / "out", *flags)) == 0
    first = records(tmp_path / "out")[0]
    traced = [json.loads(line) for line in (tmp_path / "out" / "trace" / "iteration-000001.jsonl").open()]
    sizes = [len(t["response"]) for t in traced]
    assert 0 < first["reward/clipped_share"] < 1 and "reward/rms" not in first
    assert first["reward/clipped_share"] == sum(size > 9.5 for size in sizes) / len(sizes)
    assert first["reward/std"] == pytest.approx(statistics.pstdev(min(size, 9.5) for size in sizes), abs=1e-6)


def test_the_program_with_a_reward_model_of_another_template(tiny_model, tiny_data, other_reward, tmp_path, capsys):
    (file := tmp_path / "f.py").write_text(SIZE)
    flags = ["--critic_model_name_or_path", str(other_reward), "--reward_function", f"{file}:size", "model=2"]
    assert main(step3_flags(tiny_model, tiny_data, tmp_path / "out", *flags)) == 0
    first = records(tmp_path / "out")[0]
    stats = RewardStats.read(other_reward)
    expected = 2 * (first["source/model"] - stats.mean) / stats.std + first["source/size"]
    assert first["reward/mean"] == pytest.approx(expected, rel=1e-4)
    distance = (first["source/model"] - stats.mean) / stats.std
    assert abs(distance) <= first["reward/rms"] <= 10 * abs(distance) + 10
    assert "so it reads the text" in capsys.readouterr().out
    critic = json.loads((tmp_path / "out" / "critic" / "config.json").read_text())
    assert (critic["reward_mean"], critic["reward_std"]) == (0.0, 1.0)


class Reached(Exception):
    """The program has decided how its reward model serves."""


@pytest.mark.parametrize("flags", [["--system_message", "Be brief."], ["--chat_template", "human_assistant"], []])
def test_a_template_of_step_3_alone_is_not_that_of_the_reward_model(
    tiny_model, tiny_data, tiny_reward, tmp_path, monkeypatch, flags
):
    """Tokens of a template that the reward model was not trained with would mean nothing to it."""
    decide, seen = settings.reward_model_settings, []

    def decided(*args, **kwargs):
        seen.append((args[1], decide(*args, **kwargs).reads_text))
        raise Reached

    monkeypatch.setattr(settings, "reward_model_settings", decided)
    with pytest.raises(Reached):
        main(
            step3_flags(
                tiny_model, tiny_data, tmp_path, "--critic_model_name_or_path", str(tiny_reward), *flags, "--plan"
            )
        )
    [(tokenizer, reads_text)] = seen
    assert reads_text == bool(flags)
    assert ("Be brief." in tokenizer.chat_template) == ("--system_message" in flags)


def test_an_exception_in_a_function_ends_the_program_with_the_row(tiny_model, tiny_data, tmp_path):
    (file := tmp_path / "f.py").write_text("def bad(prompts, responses, rows):\n    return [1 / 0]\n")
    flags = ["--critic_model_name_or_path", "none", "--reward_function", f"{file}:bad"]
    with pytest.raises(UserError, match="--reward_function bad: ZeroDivisionError.*at row 0, prompt"):
        main(step3_flags(tiny_model, tiny_data, tmp_path / "out", *flags))


def on_one_rank_only(rank):
    from training.utils.run.distributed import on_all_ranks, rank as my_rank

    def work():
        if my_rank() == rank:
            raise UserError(f"rank {rank} has it")
        return my_rank()

    try:
        return on_all_ranks(work)
    except UserError as error:
        return str(error)


def test_an_error_on_one_rank_is_an_error_on_all(rank_pair):
    assert rank_pair.run(on_one_rank_only, 1) == ["rank 1 has it"] * 2
    assert rank_pair.run(on_one_rank_only, 5) == [0, 1]


def test_exact_answers():
    rows = [
        {"answer": "so 3 + 4 = 7\n#### 7"},
        {"answer": "#### 1,250"},
        {"answer": "#### -3"},
        {"answer": "no number"},
    ]
    said = ["It is 7.", "First 1250, then... #### 1250.00", "minus three", "7"]
    assert exact_answer([[]] * 4, said, rows) == [1.0, 1.0, 0.0, 0.0]
    assert last_number("costs $1,234.50 in all, about 12%") == 12.0
    assert last_number("none") is None
    assert last_number("= -8") == -8.0
    assert last_number("3-8") == 8.0
