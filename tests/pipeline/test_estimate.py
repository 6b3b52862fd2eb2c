"""How long a run will take: the arithmetic of each step, counted by hand."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from training.pipeline import estimate
from training.pipeline.estimate import Rows, Shape, Speeds, Work
from training.pipeline.shared_flags import GROUPS
from training.step3_rlhf_finetuning import arguments as rlhf_arguments
from training.utils import arguments

# body 1 layer x (2 x 2 q, 2 x 1 k, 2 x 1 v, 2 x 2 o, 3 x 2 x 3) = 30, head 2 x 5 = 10
SHAPE = Shape(layers=1, hidden=2, intermediate=3, queries=2, keys=1, vocabulary=5)
BODY, HEAD = 30, 10


def fine_tuning(step: str, *argv: str, ranks: int = 1, held_out: int = 5) -> Work:
    groups = arguments.parse(GROUPS[step], argv, prog="test", description="")
    return estimate.fine_tuning_work(step, groups, SHAPE, Rows(20, 6, 4), Rows(held_out, 6, 2), ranks)


def rlhf(*argv: str, ranks: int = 1) -> Work:
    groups = arguments.parse(rlhf_arguments.ARGUMENTS, argv, prog="test", description="")
    return estimate.rlhf_work(groups, SHAPE, Rows(32, 6, 0), Rows(40, 8, 0), 4, ranks)


def test_shape_is_that_of_the_configuration() -> None:
    config = {"num_hidden_layers": 30, "hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9}
    shape = Shape.of(config | {"num_key_value_heads": 3, "vocab_size": 49152})
    assert shape.body == 30 * (2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536) and shape.head == 49152 * 576
    assert (SHAPE.body, SHAPE.head) == (BODY, HEAD)


def test_step_1() -> None:
    # 20 rows in batches of 8 are 3 steps an epoch; evaluations: 0, 2, 3, 4, 6
    row, held_out = 2 * (10 * BODY + 4 * HEAD), 2 * (8 * BODY + 2 * HEAD)
    work = fine_tuning("step1", "--num_train_epochs", "2", "--eval_interval", "2")
    assert work == Work(2 * 20 * 3 * row + 5 * 5 * held_out, updated=6 * (BODY + HEAD))
    adapters = ("--lora_dim", "8", "--only_optimize_lora")
    assert fine_tuning("step1", *adapters) == Work(20 * 2 * row + 2 * 5 * held_out)
    rest_too = fine_tuning("step1", "--lora_dim", "8")
    assert rest_too == Work(20 * 2 * row + 2 * 5 * held_out, updated=3 * HEAD), "adapted weights are frozen"
    again = fine_tuning("step1", *adapters, "--gradient_checkpointing", "--train_on_prompts").training
    assert again == 20 * 3 * 2 * 10 * (BODY + HEAD) + 2 * 5 * 2 * 8 * (BODY + HEAD)
    assert fine_tuning("step1", ranks=2).updated == 2 * (BODY + HEAD), "two ranks take 16 rows in a step"


def test_dpo_has_two_answers_with_logits_and_a_reference() -> None:
    row, held_out = 2 * 2 * (10 * BODY + 4 * HEAD), 2 * 2 * (8 * BODY + 2 * HEAD)
    assert fine_tuning("dpo").training == 20 * (3 + 1) * row + 2 * 2 * 5 * held_out
    assert fine_tuning("dpo", "--loss", "kto").training == 20 * (3 + 2) * row + 2 * 2 * 5 * held_out
    assert fine_tuning("dpo", "--loss", "orpo").training == 20 * 3 * row + 2 * 5 * held_out


def test_step_2_has_two_answers_and_no_output_layer() -> None:
    row, held_out = 2 * 2 * 10 * BODY, 2 * 2 * 8 * BODY
    # steps 1, 2, 3; evaluations: 0, 1, 2, and the saved model after 3
    assert fine_tuning("step2", "--eval_interval", "1").training == 20 * 3 * row + 4 * 5 * held_out
    assert fine_tuning("step2").training == 20 * 3 * row + 2 * 5 * held_out
    few, many = (fine_tuning("step2", held_out=n).training for n in (64, 100))
    assert many - few == 36 * held_out, "before training 64 are enough"


def test_step_3_without_a_critic() -> None:
    flags = ("--advantage", "rloo", "--samples_per_prompt", "4", "--per_device_generation_batch_size", "16")
    flags += ("--max_answer_seq_len", "5", "--num_iterations", "6", "--eval_every", "2", "--eval_function", "a.py:b")
    work = rlhf(*flags)
    # a prompt of 6 tokens once for its four answers of 4
    log_probs, reward, token = 2 * (5.5 * BODY + 4 * HEAD), 2 * 5.5 * BODY, 2 * (BODY + HEAD)
    iterations = 6 * 16 * (2 * 6 * BODY / 4 + 2 * log_probs + reward + 3 * log_probs)
    # evaluations during training: 2, 4, of 32 prompts; base, SFT and RLHF answer 40, half a time more the kept one
    tuned = 2 * 32 + 2.5 * 40
    answers = tuned * (2 * 8 * BODY + 2 * 12 * BODY) + 40 * (2 * 8 * BODY + 2 * 13 * BODY)
    kl = 3.5 * 32 * 2 * 2 * (12 * BODY + 4 * HEAD)
    assert work.training == pytest.approx(iterations + answers + kl)
    assert work.decoding == (6 * 16 * 4 + tuned * 4 + 40 * 5) * token
    assert work.updated == 6 * 2 * (BODY + HEAD)
    lora = rlhf(*flags, "--actor_lora_dim", "8", "--only_optimize_lora")
    assert work.training - lora.training == pytest.approx(6 * 16 * log_probs) and lora.updated == 0


def test_step_3_with_a_critic() -> None:
    flags = ("--eval_every", "0", "--num_iterations", "1", "--samples_per_prompt", "2")
    with_critic, without = rlhf(*flags), rlhf(*flags, "--advantage", "rloo")
    assert with_critic.training - without.training == pytest.approx(16 * (1 + 3) * 2 * 7 * BODY)
    assert with_critic.updated - without.updated == 2 * BODY
    # 32 prompts twice over, 8 prompts an iteration
    assert rlhf("--num_train_epochs", "2", "--samples_per_prompt", "2").updated == 8 * 2 * (2 * BODY + HEAD)


def test_seconds_and_sentence() -> None:
    speeds = Speeds(training=10.0, decoding=4.0)
    work = Work(training=55.0, decoding=18.0, updated=1e9)
    assert estimate.estimate(speeds, work) == pytest.approx(
        estimate.START_SECONDS + 5.5 + 4.5 + 1e9 * estimate.SECONDS_PER_UPDATED_PARAMETER
    )
    copies = (estimate.ZERO_COPIES - 1) * 1e9 * estimate.SECONDS_PER_UPDATED_PARAMETER
    assert estimate.estimate(speeds, work, ranks=2) - estimate.estimate(speeds, work) == pytest.approx(copies)
    said = estimate.sentence({"step1": 170.0, "step2": 245.0, "step3": 600.0})
    assert said == "this machine will take about 17 minutes (step 1: 3, step 2: 4, step 3: 10)"


def test_rows_are_counted_from_the_data(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    row = {"messages": [{"role": "user", "content": "a" * 40}, {"role": "assistant", "content": "b" * 20}]}
    path.write_text((json.dumps(row) + "\n") * 20)
    (data,) = arguments.parse([arguments.DataArguments], ["--data_path", str(path)], prog="test", description="")
    found = estimate.rows_of("demonstrations", data, [], 7, 512)
    assert found == (Rows(18, 22, 10), Rows(2, 22, 10)), "a tenth is held out"
    data.data_path = [f"{path}:10"]
    assert estimate.rows_of("demonstrations", data, [str(path)], 0, 512) == (Rows(27, 15, 10), Rows(3, 15, 10))


def test_a_row_has_no_more_tokens_than_the_limit(tmp_path: Path) -> None:
    """The prompt is what is cut; of pairs beside each answer."""
    path = tmp_path / "rows.jsonl"
    path.write_text((json.dumps({"prompt": "a" * 400, "chosen": "b" * 20, "rejected": "c" * 60}) + "\n") * 10)
    (data,) = arguments.parse([arguments.DataArguments], ["--data_path", str(path)], prog="test", description="")
    assert estimate.rows_of("demonstrations", data, [], 7, 30)[0] == Rows(9, 20, 10)
    assert estimate.rows_of("pairs", data, [], 7, 30)[0] == Rows(9, (20 + 10) / 2, (10 + 20) / 2)
    assert estimate.rows_of("prompts", data, [], 7, 30)[0] == Rows(9, 30, 0)
    step = ["--model_name_or_path", "embedded", "--data_path", str(path)]
    found = {limit: estimate.works({"step1": [*step, "--max_seq_len", limit]}, SHAPE, 1) for limit in ("30", "512")}
    assert found["30"]["step1"][1].training < found["512"]["step1"][1].training / 2


def test_the_demo_is_the_embedded_model_from_start_to_end() -> None:
    first = ["--model_name_or_path", "embedded", "--output_dir", "r/step1"]
    second = ["--model_name_or_path", "r/step1", "--output_dir", "r/step2"]
    third = ["--actor_model_name_or_path", "r/step1", "--critic_model_name_or_path", "r/step2", "--output_dir", "r/3"]
    assert estimate.of_embedded_model({"step1": first, "step2": second, "step3": third})
    assert not estimate.of_embedded_model({"step1": ["--model_name_or_path", "my/model", "--output_dir", "r/step1"]})
    assert not estimate.of_embedded_model({"step1": first, "step2": ["--model_name_or_path", "x", *second[2:]]})
    assert not estimate.of_embedded_model({"step2": second})


def test_constants_of_programs_that_import_torch() -> None:
    from training.step2_reward_model_finetuning import pairs
    from training.step3_rlhf_finetuning import kept_actor

    assert kept_actor.RUNNING_PROMPTS == estimate.RUNNING_PROMPTS
    assert pairs.PAIRS_BEFORE == estimate.PAIRS_BEFORE


def test_a_measurement() -> None:
    speeds = estimate.measure(Shape(1, 64, 128, 64, 32, 512), "auto")
    assert 1e6 < speeds.training < 1e15 and 1e6 < speeds.decoding < 1e15


def test_a_measurement_that_fails_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Speeds:
        raise subprocess.TimeoutExpired("python", 1)

    monkeypatch.setattr(estimate, "measure", fail)
    monkeypatch.setattr(estimate, "embedded_shape", lambda: SHAPE)
    monkeypatch.setattr(estimate, "has_accelerator", lambda: False)
    said = estimate.line({"step1": ["--model_name_or_path", "embedded", "--output_dir", "r/step1"]}, ["step1"], 1)
    assert said == "how long this machine will take is not known: the measurement failed (TimeoutExpired)"
