"""The whole program without a critic: what it builds, logs and writes."""

import json

import pytest

from tests.tiny import step3_flags
from training.step3_rlhf_finetuning.main import main


@pytest.mark.parametrize("advantage", ["rloo", "grpo"])
def test_without_a_critic_nothing_of_it_is_built_or_written(tiny_model, tiny_reward, tiny_data, tmp_path, advantage):
    flags = ["--critic_model_name_or_path", str(tiny_reward), "--advantage", advantage, "--samples_per_prompt", "2"]
    assert main(step3_flags(tiny_model, tiny_data, tmp_path / "out", *flags)) == 0
    assert (tmp_path / "out" / "actor" / "config.json").is_file()
    assert not (tmp_path / "out" / "critic").exists()
    records = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    trained = [record for record in records if "policy/loss" in record]
    assert len(trained) == 2
    assert trained[0]["policy/first_ratio"] == 1.0
    assert trained[0]["kl/per_sequence"] == 0.0
    assert abs(trained[0]["advantage/mean"]) < 10
    assert not [name for record in records for name in record if name.startswith("critic/")]
