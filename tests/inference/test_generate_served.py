"""generate.py with answers from a process with weights of its own."""

import generate
import pytest

from tests.inference.conftest import INFERENCE
from tests.tiny import save_tiny_model
from training.utils.errors import run_program


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("policies")
    return {name: save_tiny_model(root / name, seed=seed) for name, seed in (("one", 0), ("two", 7))}


@pytest.mark.slow  # vLLM against fast is in every run: tests/step3/test_vllm.py
def test_it_answers_as_fast_does(models, tiny_data, tmp_path, monkeypatch):
    def asked(name, *flags):
        argv = [f"--model={name}={path}" for name, path in models.items()]
        argv += ["--data_path", str(tiny_data / "prompts.jsonl"), "--output", str(tmp_path / name), "--dtype", "fp32"]
        argv += ["--max_answer_seq_len", "12", "--max_prompt_seq_len", "64", "--samples_per_prompt", "2", *flags]
        assert run_program(generate.main, argv) == 0
        return (tmp_path / name).read_bytes()

    own = asked("a.jsonl")
    monkeypatch.setenv("TRIPOD_ROLLOUT_WORKER", str(INFERENCE.parent / "tests" / "step3" / "stand_in_worker.py"))
    assert asked("b.jsonl", "--rollout_engine", "vllm") == own
