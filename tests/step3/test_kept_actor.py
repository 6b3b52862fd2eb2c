"""The evaluation during step 3: which actor is kept, what is logged, the KL, and a resumed run."""

import contextlib
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.step3.hybrid_checks import prompts, request
from training.step3_rlhf_finetuning import kept_actor, outputs
from training.step3_rlhf_finetuning.comparison import (
    Answer,
    EvalFunction,
    checks,
    compare,
    compare_rewards,
    sequence_kl,
    values_of,
)
from training.step3_rlhf_finetuning.kept_actor import RUNNING_PROMPTS, HeldOutEvaluation, Kept
from training.step3_rlhf_finetuning.prompts import PromptSet, sample_rows
from training.utils.checkpoint.resume import BEST
from training.utils.data.batches import spread_rows
from training.utils.engine.zero_config import DTYPES
from training.utils.errors import UserError
from training.utils.generation.engines import rollout_backend
from training.utils.generation.sampling import SamplingConfig
from training.utils.health_rules import MAX_KL
from training.utils.model.forward import response_log_probs


def answers_of_the_base(base, roles, rows, tokenizer, answer=None):
    asking, prompts = SimpleNamespace(answers=answer), SimpleNamespace(tokenizer=tokenizer)
    evaluation = SimpleNamespace(base=base, roles=roles, prompts=prompts, asking=asking)
    return HeldOutEvaluation._answers_of_the_base_model(evaluation, rows)


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_models_from_disk_answer_in_the_runs_precision(tmp_path, monkeypatch, dtype):
    """The base model and the kept actor are held against answers of the engine."""
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "summary.json").write_text(json.dumps({"base_model": str(tmp_path)}))
    assert kept_actor.base_model_of(str(tmp_path)) == str(tmp_path)
    assert kept_actor.base_model_of(str(tmp_path / "none")) == ""
    loaded = []
    monkeypatch.setattr(kept_actor, "check_vocabulary", lambda *_: None)
    monkeypatch.setattr(
        kept_actor.loading, "load_causal_lm", lambda _, dtype: loaded.append(dtype) or torch.nn.Identity()
    )
    rewarded = {}

    def answer(rows, generation, rewards):
        rewarded.update(dict.fromkeys(rows, rewards))
        return [Answer(row, "", 0.0, True, 1) for row in rows]

    monkeypatch.setattr(kept_actor, "sample_rows", lambda _: [2, 0])
    engine = SimpleNamespace(device=torch.device("cpu"), module=torch.nn.Linear(1, 1).to(DTYPES[dtype]))
    actor = SimpleNamespace(engine=engine, another_fits=lambda: True, server=None)
    roles = SimpleNamespace(actor=actor, rewards="mix")
    answers = answers_of_the_base(str(tmp_path), roles, [0, 1, 2, 3], None, answer)
    assert [answer.row for answer in answers] == [0, 1, 2, 3]
    assert rewarded == {0: "mix", 1: None, 2: "mix", 3: None}, "rewards of the answers that are shown alone"
    with HeldOutEvaluation._saved_actor(SimpleNamespace(roles=roles, actor_dir=tmp_path)):
        assert loaded == [dtype, dtype]


def test_a_base_model_that_can_not_be_loaded_is_said_and_left_out(tmp_path, tiny_model, capsys):
    engine = SimpleNamespace(device=torch.device("cpu"), module=torch.nn.Linear(1, 1))
    room = SimpleNamespace(actor=SimpleNamespace(engine=engine, another_fits=lambda: True), rewards=None)
    full = SimpleNamespace(actor=SimpleNamespace(engine=engine, another_fits=lambda: False), rewards=None)
    larger = SimpleNamespace(get_vocab=lambda: {"new": 10_000})
    for base, roles, words in (
        (tmp_path / "gone", room, "no such folder"),
        (tiny_model, room, "ids above the model's"),
        (tiny_model, full, "no room"),
    ):
        assert answers_of_the_base(str(base), roles, [0], tokenizer=larger) == []
        assert f"the base model {base} does not answer: " in (said := capsys.readouterr().out) and words in said


ROWS = RUNNING_PROMPTS + 8


class Log:
    """A logger that remembers."""

    def __init__(self):
        self.records = []

    def log(self, step, values):
        self.records.append((step, dict(values)))


class Scripted:
    """Stands for models: each policy has one reward and one KL for all prompts; policy 0 is the SFT model."""

    def __init__(self, policies, monkeypatch, every=2, iterations=6):
        self.policies = policies
        self.now = 0
        self.saved = []
        self.room = True
        self.log = Log()
        actor = SimpleNamespace(
            engine=SimpleNamespace(device=torch.device("cpu")),
            generation_mode=lambda: contextlib.nullcontext(self.now),
            reference_mode=lambda: contextlib.nullcontext("reference"),
            another_fits=lambda: self.room,
        )
        dataset = [{"messages": '[{"role": "user", "content": "q"}]', "row": "{}"}] * ROWS
        monkeypatch.setattr(HeldOutEvaluation, "_answers_of_the_base_model", self.base_answers)
        monkeypatch.setattr(HeldOutEvaluation, "_saved_actor", lambda _: contextlib.nullcontext(self.saved[-1]))
        self.evaluation = HeldOutEvaluation(
            SimpleNamespace(prompts=PromptSet(dataset, None, (2,), 0), answers=lambda *asked: self.answer(*asked)),
            SimpleNamespace(actor=actor, rewards=None),
            self.log,
            every=every,
            iterations=iterations,
            functions=[
                EvalFunction("size", "f.py:size", lambda prompts, responses, rows: [len(text) for text in responses]),
                EvalFunction("one", "f.py:one", lambda prompts, responses, rows: [1.0] * len(responses)),
            ],
            base="base",
            actor_dir=None,
            save=lambda: self.saved.append(self.now),
        )

    def answer(self, rows, generation, reward, reference):
        with generation as policy:
            value, kl = self.policies[policy]
        return [Answer(row, "x" * policy, value, True, policy, kl if reference else None) for row in rows]

    def folder(self, path):
        (path / BEST).mkdir()
        return path

    def base_answers(self, rows):
        return [Answer(row, "xxx" if row % 2 else "x", -1.0, True, 3) for row in rows]

    def train(self, first=1, last=6):
        for self.now in range(first, last + 1):
            self.evaluation.after_iteration(self.now)


def test_the_best_reward_within_the_bound_is_kept_and_summarised(monkeypatch):
    """Iteration 4 is best; 6 has more reward beyond the bound."""
    world = Scripted({0: (0, 0), 2: (0.1, 3), 4: (0.5, MAX_KL), 6: (0.9, MAX_KL + 1)}, monkeypatch)
    world.evaluation.begin()
    world.train()
    summary = world.evaluation.finish()
    assert world.saved == [2, 4]
    assert {k: summary["kept"][k] for k in ("iteration", "reward", "kl", "within_bound")} == {
        "iteration": 4,
        "reward": pytest.approx(0.5),
        "kl": MAX_KL,
        "within_bound": True,
    }
    assert summary["reward_after"] == pytest.approx(0.5)  # of the actor on disk, not of the last one
    assert (summary["prompts"], summary["length_after"]) == (ROWS, 4)
    assert json.loads(json.dumps(summary)) == summary
    curve = {step: values for step, values in world.log.records if "eval/kl" in values}
    assert sorted(curve) == [0, 2, 4, 6]
    assert (curve[0]["eval/kl"], curve[0]["eval/win_rate"]) == (0.0, 0.5)
    assert (curve[6]["eval/reward"], curve[6]["eval/win_rate"]) == (pytest.approx(0.9), 1.0)
    assert (curve[4]["eval/size/mean"], curve[4]["eval/size/win_rate"]) == (4.0, 1.0)
    assert (curve[4]["eval/one/mean"], curve[4]["eval/one/win_rate"]) == (1.0, 0.5)
    assert curve[4]["eval/size/error"] == 0.0  # each answer of a policy has the same length
    assert all(values["eval/seconds"] >= 0 for values in curve.values())
    assert any("final/win_rate" in values for _, values in world.log.records)


def test_each_function_holds_base_sft_and_rlhf_against_each_other(monkeypatch, tmp_path):
    """On all prompts, whatever the model; the base model has one or three characters, in turn."""
    world = Scripted({0: (0, 0), 6: (1, 2)}, monkeypatch, every=0)
    world.evaluation.begin()
    world.train()
    size, one = world.evaluation.finish()["eval_functions"]
    assert (size["name"], size["function"], size["n"]) == ("size", "f.py:size", ROWS)
    assert (size["base"], size["before"], size["after"]) == (2.0, 0.0, 6.0)
    assert (size["base_to_sft"], size["base_to_rlhf"], size["difference"]) == (-2.0, 4.0, 6.0)
    assert 3.5 < size["base_to_rlhf_low"] < 4.0 < size["base_to_rlhf_high"] < 4.5
    assert (size["difference_low"], size["difference_high"], size["ties"]) == (6.0, 6.0, 0)
    assert (one["win_rate"], one["ties"], one["difference"]) == (0.5, ROWS, 0.0)

    outputs.publish_actor(world.folder(tmp_path))
    outputs.write_answers(world.folder(tmp_path), world.evaluation)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [a["row"] for a in answers] == list(range(ROWS))
    assert (answers[1]["base"], answers[1]["sft"], answers[1]["rlhf"]) == ("xxx", "", "xxxxxx")
    assert answers[1]["scores"]["size"] == {"base": 3.0, "sft": 0.0, "rlhf": 6.0}
    assert answers[1]["reward"] == {"base": -1.0, "sft": 0, "rlhf": 1}
    shown = json.loads((tmp_path / "samples.json").read_text())
    assert shown[0]["answers"]["rlhf"]["checks"] == {"size": 6.0, "one": 1.0}


def test_of_a_large_set_a_spread_sample_is_answered_and_said(monkeypatch, tmp_path, capsys):
    """By every model, the running and the shown prompts among them; the summary says how many of how many."""
    monkeypatch.setattr(kept_actor, "MOST_PROMPTS", RUNNING_PROMPTS)
    world = Scripted({0: (0, 0), 2: (0.9, 3), 4: (0.5, 3), 6: (0.2, 3)}, monkeypatch)
    world.evaluation.begin()
    rows = [answer.row for answer in world.evaluation.before]
    assert (
        rows
        == world.evaluation.rows
        == sorted({*spread_rows(ROWS, RUNNING_PROMPTS), *sample_rows(world.evaluation.prompts)})
    )
    assert RUNNING_PROMPTS <= len(rows) < ROWS
    assert f"{len(rows)} (evenly spread) of {ROWS} held-out prompts" in capsys.readouterr().out
    world.train()
    summary = world.evaluation.finish()
    assert (summary["prompts"], summary["held_out_prompts"]) == (len(rows), ROWS)
    assert [answer.row for answer in world.evaluation.after] == rows, "the actor of iteration 2, which is kept"
    assert summary["eval_functions"][0]["n"] == len(rows) and "base" in summary["eval_functions"][0]
    outputs.publish_actor(world.folder(tmp_path))
    outputs.write_answers(world.folder(tmp_path), world.evaluation)
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == len(rows)
    assert all(
        set(shown["answers"]) == {"base", "sft", "rlhf"}
        for shown in json.loads((tmp_path / "samples.json").read_text())
    )


@pytest.mark.parametrize("count", [1024, 5000, 13_211, 264_001])
def test_the_running_prompts_are_among_those_of_a_large_set(count):
    assert kept_actor.MOST_PROMPTS % RUNNING_PROMPTS == 0
    assert {*spread_rows(count, RUNNING_PROMPTS)} <= {*spread_rows(count, kept_actor.MOST_PROMPTS)}


def test_without_functions_the_base_model_answers_what_is_shown(monkeypatch, tmp_path):
    world = Scripted({0: (0, 0), 6: (float("nan"), 2)}, monkeypatch, every=0)
    world.evaluation.functions = []
    world.evaluation.begin()
    world.train()
    assert "eval_functions" not in world.evaluation.finish()
    outputs.publish_actor(world.folder(tmp_path))
    outputs.write_answers(world.folder(tmp_path), world.evaluation)
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [a["row"] for a in answers if a["base"] is not None] == [0, 1, 2]
    assert (answers[9]["scores"], answers[9]["reward"]) == ({}, {"sft": 0, "rlhf": None})


def test_the_last_actor_is_answered_for_once(monkeypatch):
    world = Scripted({0: (0, 0), 6: (1, 2)}, monkeypatch, every=0)
    world.evaluation.begin()
    world.train()
    summary = world.evaluation.finish()
    assert (world.saved, summary["kept"]["iteration"], summary["reward_after"]) == ([6], 6, 1)


def test_beyond_the_bound_the_lowest_kl_is_kept(monkeypatch):
    world = Scripted({0: (0, 0), 2: (1, 90), 4: (0.5, 40), 6: (2, 60)}, monkeypatch)
    world.evaluation.begin()
    world.train()
    kept = world.evaluation.finish()["kept"]
    assert (kept["iteration"], kept["within_bound"]) == (4, False)
    assert "lowest KL" in kept["chosen_by"]


def test_without_room_for_the_kept_actor_its_own_evaluation_counts(monkeypatch, capsys):
    """Its answers outlast a resume, and are held against the SFT model's to the same prompts."""
    policies = {0: (0, 0), 2: (0.9, 3), 4: (0.5, 3), 6: (0.2, 3)}
    first, second = Scripted(policies, monkeypatch), Scripted(policies, monkeypatch)
    first.evaluation.begin()
    first.train(last=3)
    second.evaluation.load_state_dict(json.loads(json.dumps(first.evaluation.state_dict())))
    second.room = False
    second.train(first=4)
    summary = second.evaluation.finish()
    assert (summary["kept"]["iteration"], summary["reward_after"]) == (2, pytest.approx(0.9))
    assert (summary["prompts"], summary["length_after"], summary["win_rate"]) == (RUNNING_PROMPTS, 2, 1.0)
    assert f"those of its {RUNNING_PROMPTS} prompts" in capsys.readouterr().out


def test_a_reward_that_is_not_finite_is_never_kept(monkeypatch, capsys):
    """Neither as the first that is evaluated, nor by its KL."""
    world = Scripted({0: (0, 0), 2: (float("nan"), 3), 4: (0.5, 3), 6: (0.9, float("nan"))}, monkeypatch)
    world.evaluation.begin()
    world.train()
    summary = world.evaluation.finish()
    assert world.saved == [2, 4] and summary["kept"]["iteration"] == 4
    assert summary["reward_after"] == pytest.approx(0.5)
    assert f"not finite: {RUNNING_PROMPTS} of {RUNNING_PROMPTS}" in capsys.readouterr().out


def test_an_answer_whose_reward_is_not_finite_is_left_out():
    before = [Answer(i, "", value, True, 1) for i, value in enumerate([0.0, 1.0, float("inf"), 0.0])]
    after = [Answer(i, "", value, True, 1) for i, value in enumerate([1.0, float("nan"), 5.0, -1.0])]
    found = compare_rewards(after, before, seed=0)
    assert (found["reward_after"], found["reward_before"], found["win_rate"]) == (0.0, 0.0, 0.5)


def test_an_answer_does_not_win_against_itself(monkeypatch):
    """Its reward depends on the rows beside it in the last digits."""
    world = Scripted({0: (0.0, 0), 2: (1e-7, 0), 4: (-1e-7, 0), 6: (1e-7, 0)}, monkeypatch)
    answer = world.answer
    world.answer = lambda *asked: [replace(a, text="the same", length=3) for a in answer(*asked)]
    world.evaluation.begin()
    world.train()
    summary = world.evaluation.finish()
    assert [values["eval/win_rate"] for _, values in world.log.records if "eval/win_rate" in values] == [0.5] * 4
    assert (summary["win_rate"], summary["ties"]) == (0.5, ROWS)


def test_functions_over_the_prompts_that_both_answered():
    """The kept actor may have answered fewer prompts than the base and the SFT model."""
    function = EvalFunction("f", "f.py:f", lambda prompts, responses, rows: [float(r) for r in responses])
    asked = SimpleNamespace(messages=lambda row: [], original=lambda row: {})
    base, sft, rlhf = ([Answer(i, str(v), 0.0, True, 1) for i, v in given] for given in (
        [(0, 1), (1, 9), (2, 2)], [(0, 2), (2, 2)], [(0, 4), (2, 3)]))  # fmt: skip
    values = values_of(asked, {"base": base, "sft": sft, "rlhf": rlhf}, [function])
    (found,) = compare(sft, rlhf, [function], values, 0)["eval_functions"]
    assert (found["n"], found["base"], found["before"], found["after"]) == (2, 1.5, 2.0, 3.5)
    assert (found["base_to_sft"], found["difference"], found["win_rate"]) == (0.5, 1.5, 1.0)
    assert found["low"] < 0.5  # two prompts prove little, however sure the bootstrap is
    values["f"]["base"] = {}
    (without,) = compare(sft, rlhf, [function], values, 0)["eval_functions"]
    assert "base" not in without and "base_to_sft" not in without


def judged(texts):
    """What a function is asked on this rank, and what it says of all answers, or why not."""
    asked = []

    def function(prompts, responses, rows):
        asked.extend(responses)
        return [float(text) for text in responses]

    answers = [Answer(i, text, 0.0, True, 1) for i, text in enumerate(texts)]
    prompts = SimpleNamespace(messages=lambda row: [{"content": ""}], original=lambda row: {})
    try:
        return asked, checks(prompts, answers, EvalFunction("f", "f.py:f", function))
    except UserError as error:
        return asked, str(error)


def test_ranks_share_the_answers_that_a_function_judges(rank_pair):
    assert rank_pair.run(judged, ["4", "5", "6"]) == [(["4"], [4, 5, 6]), (["5", "6"], [4, 5, 6])]
    assert rank_pair.run(judged, ["4"]) == [([], [4]), (["4"], [4])]
    (_, first), (_, second) = rank_pair.run(judged, ["4", "bad"])
    assert first == second and "response 'bad'" in first


def test_a_resumed_evaluation_goes_on(monkeypatch):
    policies = {0: (0, 0), 2: (0.9, 3), 4: (0.5, 3), 6: (0.2, 3)}
    first = Scripted(policies, monkeypatch)
    first.evaluation.begin()
    first.train(last=3)
    state = json.loads(json.dumps(first.evaluation.state_dict()))
    second = Scripted(policies, monkeypatch)
    second.saved = list(first.saved)  # on disk
    second.evaluation.load_state_dict(state)
    second.train(first=4)
    summary = second.evaluation.finish()
    assert second.saved == [2]
    assert (summary["kept"]["iteration"], summary["reward_before"]) == (2, 0)


def test_functions_judge_the_sft_models_answers_once_before_the_end(monkeypatch):
    """Which are the actor's before the first update; a resumed run has what they said, and an older checkpoint asks."""
    asked = []

    def size(prompts, responses, rows):
        asked.append(set(responses))
        return [len(text) for text in responses]

    policies = dict.fromkeys((0, 2, 4, 6), (0, 0))
    first, second, older = (Scripted(policies, monkeypatch) for _ in range(3))
    for world in (first, second, older):
        world.evaluation.functions = [EvalFunction("size", "f.py:size", size)]
    first.evaluation.begin()
    first.train(last=3)
    assert asked == [{""}, {"xx"}]
    state = json.loads(json.dumps(first.evaluation.state_dict()))
    second.evaluation.load_state_dict(state)
    second.train(first=4)
    assert asked[2:] == [{"xxxx"}]
    older.evaluation.load_state_dict({key: value for key, value in state.items() if key != "sft_values"})
    older.train(first=4)
    assert asked[3:] == [{""}, {"xxxx"}]


def test_a_function_that_was_edited_judges_the_sft_models_answers_again(monkeypatch, tmp_path):
    """Else the actor's answers would be held against what another function said."""
    monkeypatch.chdir(tmp_path)
    policies, states = {0: (0, 0), 2: (0, 0)}, []
    for text in ("first", "first", "edited"):
        (tmp_path / "f.py").write_text(text)
        world = Scripted(policies, monkeypatch)
        if not states:
            world.evaluation.begin()
        else:
            world.evaluation.load_state_dict(states[0])
        states.append(json.loads(json.dumps(world.evaluation.state_dict())))
    assert [state["sft_values"].keys() for state in states] == [{"size", "one"}, {"size", "one"}, set()]


def test_critic_and_average_of_an_earlier_run_with_other_flags_go(tmp_path):
    for name in ("critic", "ema", "actor"):
        (tmp_path / name).mkdir()
    outputs.save_critic_and_ema(SimpleNamespace(critic=None, ema=None), None, tmp_path, (), "5GB")
    assert [folder.name for folder in tmp_path.iterdir()] == ["actor"]


def test_kept_order():
    inside, better, outside, further = (
        Kept(1, 0.1, 1, True),
        Kept(2, 0.2, 5, True),
        Kept(3, 9, 20, False),
        Kept(4, 99, 30, False),
    )
    ranks = [further, outside, inside, better]
    for i, low in enumerate(ranks):
        assert low.better_than(None)
        for high in ranks[i + 1 :]:
            assert high.better_than(low) and not low.better_than(high)


def test_kl_is_the_log_ratio_of_the_sampled_tokens(tiny_model):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    other = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    with torch.no_grad():
        other.model.norm.weight.mul_(0.7)
    rollout = rollout_backend("fast").generate(
        model, request(prompts(3), [0, 1, 2]), SamplingConfig(5, temperature=0.8)
    )
    assert sequence_kl(model, rollout, 0.8, 2).abs().max() < 1e-4
    expected = []
    for i in range(3):  # each row alone, without padding
        kept = rollout.attention_mask[i].bool()
        ids = rollout.input_ids[i][kept][None]
        mask = torch.zeros_like(ids)
        mask[0, -int(rollout.response_mask[i].sum()) :] = 1
        values = [
            response_log_probs(m, ids, torch.ones_like(ids), mask, temperature=0.8)[0].sum() for m in (model, other)
        ]
        expected.append((values[0] - values[1]).item())
    assert sequence_kl(other, rollout, 0.8, 2).tolist() == pytest.approx(expected, abs=1e-4)
    assert max(map(abs, expected)) > 0.1
