"""The three programs on two ranks, each fed by the one before; outputs reloaded.

Step 1 runs under the real `deepspeed`; importing torch in its processes takes most of the time, so the ranks of steps
2 and 3 are forked from one process that has imported all, with the environment that `deepspeed` gives them. A program
of its own is tested per step in `tests/test_early_answers.py`, and over two hosts in `tests/reliability`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests.glossary import never_logged, unexplained
from tests.reliability.tiny_runs import SCRIPTS, Launcher, deepspeed_command
from training.utils.data.chat import render
from training.utils.engine.precision import cpu_computes_bf16
from training.utils.model.forward import TokenScorer
from training.utils.model.reward_stats import RewardStats

ROOT = Path(__file__).resolve().parents[1]
CHECK = f"{ROOT / 'training' / 'data' / 'demo' / 'manner.py'}:manner"
SIZE = f"{ROOT / 'tests' / 'rules.py'}:size"


def run(command: list[str], cwd: Path = ROOT) -> str:
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def trained(tiny_model, tiny_data, tmp_path_factory):
    """All three steps on two ranks; ZeRO 2, 3 with accumulation, and LoRA on ZeRO 3."""
    base = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TRIPOD_CACHE", str(base / "cache"))
        launcher = Launcher()
        try:
            yield base, train_all(tiny_model, tiny_data, base, launcher)
        finally:
            launcher.close()


def train_all(tiny_model: Path, tiny_data: Path, base: Path, launcher: Launcher) -> dict[int, str]:
    def forked(step: int, *arguments: str) -> str:
        ranks = launcher.start_ranks(step, list(arguments), base / f"step{step}.log", 2)
        codes = [rank.wait() for rank in ranks]
        assert codes == [0, 0], ranks[0].text()[-6000:]
        return ranks[0].text()

    small = ["--max_seq_len", "480", "--per_device_train_batch_size", "2", "--dtype", "fp32"]
    logs = {}
    arguments = [
        *("--model_name_or_path", str(tiny_model), "--output_dir", str(base / "step1"), "--deepspeed"),
        *("--data_path", str(tiny_data / "sft.jsonl"), "--eval_data_path", str(tiny_data / "held_out.jsonl")),
        *("--zero_stage", "2", "--learning_rate", "1e-3", *small),
    ]
    logs[1] = run(deepspeed_command(1, arguments, 2))
    logs[2] = forked(
        2,
        *("--model_name_or_path", str(base / "step1"), "--output_dir", str(base / "step2")),
        *("--data_path", str(tiny_data / "preferences.jsonl"), "--eval_data_path", str(tiny_data / "held_out.jsonl")),
        *("--zero_stage", "3", "--gradient_accumulation_steps", "2", "--learning_rate", "1e-3", *small),
        *("--num_padding_at_beginning", "0"),
    )
    logs[3] = forked(
        3,
        *("--actor_model_name_or_path", str(base / "step1"), "--critic_model_name_or_path", str(base / "step2")),
        *("--data_path", str(tiny_data / "prompts.jsonl"), "--eval_data_path", str(tiny_data / "held_out.jsonl")),
        *("--output_dir", str(base / "step3"), "--dtype", "fp32", "--eval_function", CHECK, SIZE),
        *("--actor_zero_stage", "3", "--critic_zero_stage", "3", "--gradient_accumulation_steps", "2"),
        *("--actor_lora_dim", "4", "--actor_lora_module_name", "q_proj,v_proj", "--only_optimize_lora"),
        *("--per_device_train_batch_size", "4", "--per_device_mini_train_batch_size", "2"),
        *("--max_prompt_seq_len", "128", "--max_answer_seq_len", "8", "--num_iterations", "2", "--ppo_epochs", "2"),
        *("--eval_every", "1"),
    )
    return logs


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_steps_leave_finished_folders(trained):
    base, _ = trained
    for step in (1, 2, 3):
        folder = base / f"step{step}"
        assert (folder / "summary.json").is_file()
        assert list((folder / "tensorboard").iterdir())
        assert not list(base.rglob(".*saving"))
    page = (ROOT / "docs" / "report.md").read_text(encoding="utf-8")
    of_models = {path.name for path in (base / "step3" / "actor").iterdir()}
    left = {path.name for step in (1, 2, 3) for path in (base / f"step{step}").glob("[!.]*")} - of_models
    assert [name for name in sorted(left) if f"{name}`" not in page and f"{name}/`" not in page] == []
    assert metrics(base / "step1")[0]["eval/loss"] > 0
    summary = json.loads((base / "step3" / "summary.json").read_text())
    assert summary["prompts"] == 6
    manner, size = summary["eval_functions"]
    assert (manner["name"], manner["function"], manner["n"], size["name"]) == ("manner", CHECK, 6, "size")
    answered = [json.loads(line) for line in (base / "step3" / "answers.jsonl").read_text().splitlines()]
    assert [a["row"] for a in answered] == list(range(6))
    assert all(isinstance(a[model], str) for a in answered for model in ("base", "sft", "rlhf"))
    for model, key in (("base", "base"), ("sft", "before"), ("rlhf", "after")):
        assert sum(len(a[model]) for a in answered) / 6 == pytest.approx(size[key])
        assert all(a["scores"]["size"][model] == len(a[model]) for a in answered)
    shifts = [size["base_to_sft"], size["difference"], size["base_to_rlhf"]]
    assert shifts[0] + shifts[1] == pytest.approx(shifts[2])
    evaluations = [m for m in metrics(base / "step3") if "eval/kl" in m]
    assert [m["step"] for m in evaluations] == [0, 1, 2]
    best = max(evaluations[1:], key=lambda m: m["eval/reward"])
    assert summary["kept"]["iteration"] == best["step"]
    assert summary["reward_after"] == pytest.approx(best["eval/reward"], abs=1e-4)  # six prompts: all are running ones


def test_every_model_has_its_card_and_every_step_its_phases(trained):
    base, _ = trained
    for folder, words in {"step1": "tuned", "step2": "reward", "step3/actor": "RLHF", "step3/critic": "value"}.items():
        card = (base / folder / "README.md").read_text()
        assert words in card and "## How to load it" in card and "rows to train on" in card, folder
    assert "LoRA adapter" in (base / "step3" / "actor" / "adapter" / "README.md").read_text()
    for step, inside in (("step1", "train"), ("step2", "train"), ("step3", "generate")):
        phases = json.loads((base / step / "summary.json").read_text())["phases"]
        assert {"data", "load", inside, "evaluate", "save"} <= set(phases)
        assert all(phase["peak_gib"] > 0.01 for phase in phases.values())


@pytest.mark.parametrize("step", [1, 2, 3])
def test_every_logged_metric_is_explained_and_every_explained_one_logged(trained, step):
    base, _ = trained
    records = metrics(base / f"step{step}")
    assert unexplained(step, records) == set()
    assert never_logged(step, records) == set()


def test_step_3_starts_at_the_reference(trained):
    base, logs = trained
    first = next(m for m in metrics(base / "step3") if m["step"] == 1)
    assert first["policy/first_ratio"] == 1.0
    assert first["kl/per_sequence"] == 0.0
    assert first["ppo/optimizer_steps"] == 2  # 8 rows x 2 epochs in minibatches of 2 rows x 2 ranks x 2
    assert "adapters off" in logs[3]


def test_every_output_loads_with_plain_transformers(trained):
    base, _ = trained
    for folder in (base / "step1", base / "step3" / "actor"):
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
        assert "<|im_start|>user" in prompt
    assert (base / "step3" / "actor" / "adapter" / "adapter_model.safetensors").is_file()
    critic = AutoModelForSequenceClassification.from_pretrained(base / "step3" / "critic")
    stats = RewardStats.read(base / "step2")
    assert (critic.config.reward_mean, critic.config.reward_std) == (stats.mean, stats.std)


@pytest.mark.parametrize("folder", ["step2", "step3/critic"])
def test_plain_transformers_on_padded_batches_gives_our_rewards(trained, folder):
    base, _ = trained
    model = AutoModelForSequenceClassification.from_pretrained(base / folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base / folder)
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert model.config.pad_token_id == tokenizer.pad_token_id
    answers = ["No.", "Yes, with a lot more words than the other answer has.", "Perhaps"]
    rows = [
        render(tokenizer, [{"role": "user", "content": "Is it?"}, {"role": "assistant", "content": a}]).input_ids
        for a in answers
    ]
    width = max(map(len, rows))
    ids = torch.tensor([r + [tokenizer.pad_token_id] * (width - len(r)) for r in rows])
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows])
    with torch.no_grad():
        plain = model(input_ids=ids, attention_mask=mask).logits.squeeze(-1)
        ours = TokenScorer(model)(ids, mask)
    for i, row in enumerate(rows):
        assert row[-1] == tokenizer.eos_token_id
        assert ours[i, len(row) - 1].item() == pytest.approx(plain[i].item(), abs=1e-5)
    assert plain.std() > 0


def test_reward_stats_are_those_of_the_saved_model(trained, tiny_data):
    base, logs = trained
    model = TokenScorer(AutoModelForSequenceClassification.from_pretrained(base / "step2", dtype=torch.float32)).eval()
    tokenizer = AutoTokenizer.from_pretrained(base / "step2")
    pairs = []
    for line in (tiny_data / "held_out.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rewards = []
        for side in ("chosen", "rejected"):
            ids = torch.tensor(
                [render(tokenizer, [*row["prompt"], {"role": "assistant", "content": row[side]}]).input_ids]
            )
            with torch.no_grad():
                rewards.append(model(ids, torch.ones_like(ids))[0, -1].item())
        pairs.append(tuple(rewards))
    expected, stats = RewardStats.of(pairs, "fp32"), RewardStats.read(base / "step2")
    numbers = [(s.mean, s.std, s.std_chosen, s.std_all) for s in (stats, expected)]
    assert numbers[0] == pytest.approx(numbers[1], abs=1e-5)
    assert (stats.count, stats.dtype) == (6, "fp32")
    for step in (2, 3):  # once each, whatever the ranks
        assert logs[step].count("6 preferred rewards, fewer than 30: their standard deviation") == 1


def test_plain_python_from_inside_the_steps_folder(tiny_model, tiny_data, tmp_path, monkeypatch):
    """Without a launcher, without --output_dir: a new run that `latest` points to."""
    monkeypatch.setenv("TRIPOD_OUTPUT", str(tmp_path))
    run(
        [
            *(sys.executable, "main.py", "--model_name_or_path", str(tiny_model), "--report_to", "none"),
            *("--data_path", str(tiny_data / "sft.jsonl"), "--per_device_train_batch_size", "4", "--lora_dim", "4"),
            *("--lora_module_name", "q_proj,k_proj", "--only_optimize_lora"),
        ],
        cwd=SCRIPTS[1].parent,
    )
    assert (tmp_path / "latest").resolve() == tmp_path / "run"
    assert (tmp_path / "run" / "step1" / "adapter" / "adapter_config.json").is_file()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "step1").dtype
    assert saved == (torch.bfloat16 if cpu_computes_bf16() else torch.float32)  # --dtype auto


def evaluate(base: Path, step: int, data: Path, *arguments: str) -> tuple[dict, str]:
    program = SCRIPTS[step].with_name("evaluate.py")
    rows = ["--data_path", str(data / "prompts.jsonl"), "--eval_data_path", str(data / "held_out.jsonl")]
    said = run(
        [sys.executable, str(program), "--path", str(base / f"step{step}"), "--dtype", "fp32", *rows, *arguments]
    )
    return json.loads((base / f"step{step}" / "evaluation.json").read_text()), said


def test_step_1_is_evaluated_from_disk(trained, tiny_data):
    base, _ = trained
    sft = ["--data_path", str(tiny_data / "sft.jsonl")]
    found, said = evaluate(base, 1, tiny_data, "--max_prompts", "2", "--max_answer_seq_len", "8", *sft)
    summary = json.loads((base / "step1" / "summary.json").read_text())
    for name, key in (("base", "loss_before"), ("sft", "loss_after")):
        model = found["models"][name]
        assert model["loss"] == pytest.approx(summary[key], abs=1e-4)
        assert model["perplexity_interval"][0] <= model["perplexity"] <= model["perplexity_interval"][1]
    assert (found["rows"], found["prompts"], len(found["samples"])) == (6, 2, 2)
    assert "rougeL" in said


def test_step_2_is_evaluated_from_disk(trained, tiny_data):
    base, _ = trained
    pairs = ["--data_path", str(tiny_data / "preferences.jsonl")]
    found, said = evaluate(base, 2, tiny_data, *pairs)
    summary = json.loads((base / "step2" / "summary.json").read_text())
    stats = RewardStats.read(base / "step2")
    assert found["accuracy"] == summary["accuracy_after"]
    assert found["baselines"]["always the longer"] == summary["accuracy_longer"]
    assert found["reward_mean_chosen"] == pytest.approx(stats.mean, abs=1e-5)
    assert found["reward_std_chosen"] == pytest.approx(stats.std_chosen, abs=1e-5)
    assert len(found["worst_pairs"]) == 5 and "always the longer" in said


def test_step_3_is_evaluated_from_disk_and_drawn(trained, tiny_data, tmp_path):
    base, _ = trained
    more = ["--best_of", "1,2", "--max_answer_seq_len", "8", "--eval_function", CHECK]
    found, said = evaluate(base, 3, tiny_data, *more, "--judge_model_name_or_path", str(base / "step2"))
    assert list(found["models"]) == ["SFT", "RLHF", "best of 1", "best of 2"]
    rlhf = found["models"]["RLHF"]
    summary = json.loads((base / "step3" / "summary.json").read_text())  # and the run's flags, without a manifest
    for model, when in (("SFT", "before"), ("RLHF", "after")):
        assert found["models"][model]["reward"] == pytest.approx(summary[f"reward_{when}"], abs=1e-3)
    stats = RewardStats.read(base / "step2")  # the judge is the same model, given the text without its tokens
    assert rlhf["judge"] == pytest.approx(rlhf["reward"] * stats.std + stats.mean, abs=0.2)
    assert found["models"]["best of 2"]["reward"] >= found["models"]["best of 1"]["reward"]
    assert "win rate by manner" in said
    program = ROOT / "benchmarks" / "plot_reward_kl.py"
    assert "| best of 2 |" in run([sys.executable, str(program), str(base), str(tmp_path / "kl.png")])
    assert (tmp_path / "kl.png").stat().st_size > 5000


@pytest.mark.parametrize(
    "program",
    [
        ["training.migrate", "deepspeed training/step1_supervised_finetuning/main.py"],
        pytest.param(["training.utils.data.preview", "--data_path", "demo", "--step", "1"], marks=pytest.mark.slow),
    ],
)
def test_programs_that_print_end_well_when_nobody_reads_on(program, tmp_path, monkeypatch):
    """As behind ``| head``."""
    monkeypatch.setenv("TRIPOD_CACHE", str(tmp_path))
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", *program]
    result = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, check=False)
    os.close(writer)
    assert result.returncode == 0 and "Traceback" not in result.stderr, result.stderr[-2000:]
