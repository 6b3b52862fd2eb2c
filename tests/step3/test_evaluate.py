"""Best-of-n and step 3's evaluation on tiny cases, by hand."""

import json
import math
import shutil
from pathlib import Path

import pytest
from common import kl_to_reach

from tests.tiny import save_tiny_model
from training.step3_rlhf_finetuning import evaluate, main as step3, settings
from training.step3_rlhf_finetuning.comparison import Answer, best_of_kl, chosen_of
from training.step3_rlhf_finetuning.evaluate import (
    StepArguments,
    assemble,
    judged_by,
    of_the_run,
    parse_counts,
    sources_of_the_run,
)
from training.utils import arguments, evaluation_programs, intervals
from training.utils.errors import UserError
from training.utils.generation import vllm

FLAG = "--reward_model_name_or_path"


def test_kl_of_best_of_n():
    assert best_of_kl(1) == 0
    assert best_of_kl(4) == pytest.approx(math.log(4) - 0.75)
    # n equally likely, equally good answers: the best of n is the first; P(best) of the top of m answers by counting
    m, n = 1000, 4
    top = [((i / m) ** n - ((i - 1) / m) ** n) for i in range(1, m + 1)]  # P(the i-th best of m is the maximum of n)
    exact = sum(p * math.log(p * m) for p in top)
    assert best_of_kl(n) == pytest.approx(exact, abs=5e-3)


def test_counts():
    assert parse_counts("16,1,4,4") == [1, 4, 16]
    assert parse_counts(" ") == []
    for text in ("1,x", "0", "-2", "4,", "3,4"):
        with pytest.raises(UserError, match="--best_of"):
            parse_counts(text)


@pytest.mark.parametrize("flag", ["--temperature", "--max_answer_seq_len"])
def test_nothing_that_is_given_stands_for_the_runs_own(flag):
    with pytest.raises(UserError, match=f"{flag} is 0"):
        evaluate.parse_flags([flag, "0"])


def test_groups_of_n_choose_by_reward():
    rewards = [0.1, 0.9, 0.5, 0.5]
    assert chosen_of(rewards, 1) == [0, 1, 2, 3]
    assert chosen_of(rewards, 2) == [1, 2]
    assert chosen_of(rewards, 4) == [1]


def test_kl_at_which_a_reward_is_reached():
    curve = [(0.0, 0.0), (2.0, 0.4), (6.0, 0.8), (9.0, 0.7)]
    assert kl_to_reach(curve, 0.6) == pytest.approx(4.0)
    assert kl_to_reach(curve, 0.4) == pytest.approx(2.0)
    assert kl_to_reach(curve, 0.9) is None
    assert kl_to_reach(curve, -1) == 0.0


def table(lengths, kl=None):
    return [[Answer(i, "", 0.0, True, n, kl) for n in row] for i, row in enumerate(lengths)]


def test_entries_by_hand():
    drawn = {"sft": table([[10], [20]]), "rlhf": table([[30], [40]], kl=2.0), "best_of": table([[1, 2], [3, 4]])}
    judged = {
        "reward": {"sft": [[0.0], [1.0]], "rlhf": [[1.0], [1.0]], "best_of": [[0.5, -1.0], [0.0, 2.0]]},
        "function": {"sft": [[0.5], [0.5]], "rlhf": [[0.0], [1.0]], "best_of": [[0.5, 1.0], [1.0, 0.0]]},
    }
    found = assemble(drawn, judged, [1, 2], seed=0)["models"]
    assert list(found) == ["SFT", "RLHF", "best of 1", "best of 2"]
    assert found["SFT"] == {
        "kl": 0.0,
        "length": 15,
        "eos_rate": 1.0,
        "reward": 0.5,
        "reward_interval": [0.0, 1.0],
        "function": 0.5,
        "function_interval": [0.5, 0.5],
    }
    rlhf = found["RLHF"]
    assert (rlhf["kl"], rlhf["reward"], rlhf["win_rate_by_reward"], rlhf["win_rate_by_function"]) == (2, 1, 0.75, 0.5)
    assert rlhf["win_rate_by_reward_interval"] == intervals.wilson_interval(0.75, 2)  # two prompts prove little
    one, two = found["best of 1"], found["best of 2"]
    assert (one["length"], one["reward"], one["kl"]) == (2.5, 0.375, 0)
    assert one["win_rate_by_reward"] == ((1 + 0) / 2 + (0 + 1) / 2) / 2
    # best of 2 takes draw 0 of the first prompt and draw 1 of the second
    assert (two["length"], two["reward"], two["function"]) == (2.5, 1.25, 0.25)
    assert (two["win_rate_by_reward"], two["win_rate_by_function"]) == (1.0, 0.25)
    assert two["kl"] == pytest.approx(math.log(2) - 0.5)


def test_a_judge_is_called_once_with_all_answers():
    calls = []

    def judge(answers):
        calls.append(len(answers))
        return [float(a.length) for a in answers]

    assert judged_by(judge, {"a": table([[1], [2]]), "b": table([[3, 4], [5, 6]])}) == {
        "a": [[1.0], [2.0]],
        "b": [[3.0, 4.0], [5.0, 6.0]],
    }
    assert calls == [6]
    assert judged_by(judge, {"a": table([[1], [2]]), "b": table([[1], [3]])})["b"] == [[1.0], [3.0]]
    assert calls == [6, 3], "the same answer of another model is not asked for again, as its rounding may be another"


def model_folder(path):
    """What is taken for a finished step, or any model, before it is loaded."""
    path.mkdir(parents=True)
    for name, text in {"config.json": '{"model_type": "llama"}', "summary.json": "{}", "model.safetensors": ""}.items():
        (path / name).write_text(text)
    return path


def taken(folder, recorded, trained_in="", given=""):
    return of_the_run(str(given), str(recorded), str(trained_in), folder, "step2", FLAG)


def test_the_runs_own_step_2_is_taken_where_it_lies_now(tmp_path):
    """A run that was copied or renamed, whether or not what it was copied from is still there."""
    old, own = model_folder(tmp_path / "old" / "step2"), model_folder(tmp_path / "moved" / "step2")
    folder = own.with_name("step3")
    assert taken(folder, "") == taken(folder, old) == taken(folder, old, tmp_path / "old" / "step3") == str(own)
    assert taken(folder, "output/old/step2", "output/old/step3") == str(own)
    assert taken(folder, tmp_path / "gone" / "reward") == str(own)  # whatever it was: it is not there


def test_a_reward_model_from_elsewhere_is_taken_from_there(tmp_path):
    other, own = model_folder(tmp_path / "other" / "step2"), model_folder(tmp_path / "run" / "step2")
    reward, folder = model_folder(tmp_path / "reward"), own.with_name("step3")
    assert taken(folder, other, tmp_path / "run" / "step3") == str(other)
    assert taken(folder, reward) == str(reward)
    assert taken(folder, reward, given=other) == str(other)
    with pytest.raises(UserError, match=f"{FLAG} some/where/else: no such folder"):
        taken(tmp_path / "elsewhere" / "step3", "some/where/else")
    with pytest.raises(UserError, match=rf"no finished step2 .* give {FLAG} \(none, with --reward_function\)"):
        taken(tmp_path / "elsewhere" / "step3", "")


SIZE = "def size(prompts, responses, rows):\n    return [float(len(r)) for r in responses]\n"


def recorded_in(run, *argv):
    (run / "manifest.json").write_text(json.dumps({"steps": {"step3": {"arguments": argv}}}))
    return evaluation_programs.recorded_arguments(run / "step3", step3.ARGUMENTS, step3.OTHERS | step3.ALIASES)


def test_relative_paths_of_a_run_are_found_from_another_folder(tmp_path, monkeypatch):
    """From the repository, from the folders around the run, and from where step 3 says that it was started."""
    started = tmp_path / "started"
    run = model_folder(started / "output" / "run" / "step3").parent
    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    reward = model_folder(started / "models" / "reward")
    (started / "rules.py").write_text(SIZE)
    check = "training/data/demo/manner.py"
    flags = ["--critic_model_name_or_path", "models/reward", "--reward_function", "rules.py:size=2", "model=3"]
    flags += [f"--eval_function={check}:manner", "--data_path", "demo:20", "org/hub-name", "gone/rows.jsonl:5"]
    flags += ["--actor_model_name_or_path", str(model_folder(tmp_path / "sft")), "--temperature", "0.7"]
    root = Path(step3.__file__).resolve().parents[2]
    for folder in (run, model_folder(tmp_path / "moved" / "run" / "step3").parent):
        if folder != run:
            made = {"run_with": {"arguments": flags, "folder": str(started)}}
            (folder / "step3" / "summary.json").write_text(json.dumps(made))
        found = recorded_in(folder, *(flags if folder == run else ["--temperature", "0.1"]))
        assert found[settings.RolloutArguments].temperature == 0.7
        assert found[evaluate.rlhf_arguments.EvaluationArguments].eval_function == [f"{root / check}:manner"]
        assert found[arguments.DataArguments].data_path == ["demo:20", "org/hub-name", "gone/rows.jsonl:5"]
        sources = sources_of_the_run(StepArguments(), found, folder / "step3")
        assert (sources.reward_model, sources.weight) == (str(reward), 3.0)
        assert sources.functions["size"][1] == 2.0
        assert sources.sft == str(tmp_path / "sft")


def test_flags_of_the_evaluation_win_over_the_runs_rewards(tmp_path):
    run = model_folder(tmp_path / "run" / "step3").parent
    model_folder(run / "step1"), model_folder(run / "step2")
    (file := tmp_path / "f.py").write_text(SIZE)
    found = recorded_in(run, "--reward_function", f"{file}:size", "model=3")

    def sources(**flags):
        return sources_of_the_run(StepArguments(**flags), found, run / "step3")

    assert (sources().sft, sources().reward_model) == (str(run / "step1"), str(run / "step2"))
    assert (sources().weight, [*sources().functions]) == (3.0, ["size"])
    given = sources(reward_function=[f"{file}:size=0.5"])
    assert (given.weight, given.functions["size"][1], given.reward_model) == (1.0, 0.5, str(run / "step2"))
    without = sources(reward_model_name_or_path="none")
    assert (without.reward_model, [*without.functions]) == ("", ["size"])
    with pytest.raises(UserError, match="model=2 weighs the reward model"):
        sources(reward_model_name_or_path="none", reward_function=[f"{file}:size", "model=2"])
    found = recorded_in(run)
    with pytest.raises(UserError, match=f"{FLAG} none leaves no reward: give --reward_function"):
        sources(reward_model_name_or_path="none")


def test_a_run_without_a_manifest_is_evaluated_by_functions_alone(tiny_model, tiny_data, tmp_path):
    """As its step 3 may have been started by hand, by a version that wrote nothing down; the template is its own."""
    shutil.copytree(tiny_model, tmp_path / "step3" / "actor")
    (tmp_path / "step3" / "summary.json").write_text("{}")
    (file := tmp_path / "f.py").write_text(SIZE)
    argv = ["--path", str(tmp_path / "step3"), "--sft_model_name_or_path", str(tiny_model), "--dtype", "fp32"]
    argv += ["--data_path", str(tiny_data / "prompts.jsonl"), "--eval_data_path", str(tiny_data / "held_out.jsonl")]
    argv += ["--max_answer_seq_len", "4", "--max_prompts", "3", "--best_of", "", "--system_message", "Be brief."]
    argv += ["--reward_function", f"{file}:size=2", FLAG]
    assert evaluate.main([*argv, "none"]) == 0
    found = json.loads((tmp_path / "step3" / "evaluation.json").read_text())
    assert found["reward_model"] == ""
    for sample in found["samples"]:
        assert sample["sft_reward"] == 2 * len(sample["sft"])


def test_a_dpo_model_is_judged_beside_the_other_two(tiny_model, tiny_data, tmp_path, monkeypatch):
    """The run's own, once it is finished, or the flag's; RLHF's is a copy of the SFT model, which is no difference."""
    run = tmp_path / "run"
    shutil.copytree(tiny_model, run / "step3" / "actor")
    (run / "step3" / "summary.json").write_text("{}")
    own = save_tiny_model(run / "dpo", seed=1)
    assert evaluate.dpo_of_the_run("", run / "step3") == {}, "it is not finished"
    (own / "summary.json").write_text("{}")
    (file := tmp_path / "f.py").write_text(SIZE)
    argv = ["--path", str(run / "step3"), "--sft_model_name_or_path", str(tiny_model), "--dtype", "fp32", FLAG, "none"]
    argv += ["--data_path", str(tiny_data / "prompts.jsonl"), "--eval_data_path", str(tiny_data / "held_out.jsonl")]
    argv += ["--max_answer_seq_len", "6", "--max_prompts", "4", "--best_of", "1,2", "--system_message", "Be brief."]
    argv += ["--reward_function", f"{file}:size=2", "--eval_function", f"{file}:size"]

    def judged(*more):
        assert evaluate.main([*argv, *more]) == 0
        return json.loads((run / "step3" / "evaluation.json").read_text())

    found = judged()
    models, samples = found["models"], found["samples"]
    assert found["dpo_model"] == str(own) and [*models] == ["SFT", "RLHF", "DPO", "best of 1", "best of 2"]
    assert models["DPO"].keys() == models["RLHF"].keys()
    assert models["RLHF"]["kl"] == pytest.approx(0.0, abs=1e-4) and models["RLHF"]["win_rate_by_size"] == 0.5
    assert models["DPO"]["kl"] > 1
    sizes = {name: [len(sample[name]) for sample in samples] for name in ("sft", "rlhf", "dpo")}
    assert sizes["rlhf"] == sizes["sft"] != sizes["dpo"], "the other model gives other answers to the same prompts"
    for name in ("sft", "dpo"):
        assert [sample[f"{name}_reward"] for sample in samples] == [2 * size for size in sizes[name]]
    assert models["DPO"]["size"] == intervals.mean([float(size) for size in sizes["dpo"]])
    won = [(dpo > sft) + 0.5 * (dpo == sft) for dpo, sft in zip(sizes["dpo"], sizes["sft"], strict=True)]
    assert models["DPO"]["win_rate_by_size"] == models["DPO"]["win_rate_by_reward"] == intervals.mean(won)

    given = judged("--dpo_model_name_or_path", str(tiny_model))
    assert given["dpo_model"] == str(tiny_model) and given["models"]["DPO"] == given["models"]["RLHF"]
    assert {name: given["models"][name] for name in ("SFT", "RLHF")} == {name: models[name] for name in ("SFT", "RLHF")}
    with pytest.raises(UserError, match="--dpo_model_name_or_path gone/model"):
        evaluate.main([*argv, "--dpo_model_name_or_path", "gone/model/here"])

    monkeypatch.setenv("TRIPOD_ROLLOUT_WORKER", str(Path(__file__).with_name("stand_in_worker.py")))
    asked, rest = [], vllm.VllmBackend.rest
    monkeypatch.setattr(
        vllm.VllmBackend, "rest", lambda backend: asked.append(backend._held is not None) or rest(backend)
    )
    served = judged("--rollout_engine", "vllm")  # each model's weights in turn, best-of-n included
    assert asked == [True] * 5, "it rests before the answers are scored: of three draws of SFT, of RLHF and of DPO"
    assert served["samples"] == samples
    assert served["models"]["best of 2"] == models["best of 2"]
    assert served["models"]["DPO"]["kl"] == pytest.approx(models["DPO"]["kl"], abs=1e-3)


def test_a_template_that_step_3_put_over_both_models_is_no_difference(tiny_model, tmp_path):
    actor = shutil.copytree(tiny_model, tmp_path / "actor")
    own, none = arguments.DataArguments(system_message="Be brief."), arguments.DataArguments()
    evaluate.shared_tokenizer(str(actor), str(tiny_model), none, none)
    changed = evaluate.shared_tokenizer(str(actor), str(tiny_model), own, none)
    assert "Be brief." in changed.chat_template
    changed.save_pretrained(actor)
    assert evaluate.shared_tokenizer(str(actor), str(tiny_model), none, own).chat_template == changed.chat_template
    with pytest.raises(UserError, match="another tokenizer or chat template"):
        evaluate.shared_tokenizer(str(actor), str(tiny_model), none, none)
