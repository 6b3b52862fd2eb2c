"""vLLM itself as rollout engine, on a CPU: slow, and skipped where ``make setup-vllm`` was not run."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from tests.reliability.conftest import inputs, launcher  # noqa: F401
from tests.reliability.test_kills import assert_same, uninterrupted
from tests.reliability.test_vllm import workers_of
from tests.reliability.tiny_runs import step_arguments
from tests.step3.test_toy_task import BOUND, ITERATIONS
from tests.step3.toy import learn, recent, save_toy_models
from tests.step3.vllm_checks import before_and_after, sampled, server
from tests.tiny import save_tiny_model, tiny_tokenizer
from training.utils.errors import UserError
from training.utils.generation.vllm_python import find_vllm


def interpreter() -> str:
    """One with vLLM, or why there is none behind a colon."""
    try:
        return find_vllm(os.environ.get("TRIPOD_TEST_VLLM_PYTHON", ""))
    except UserError as error:
        return f": {error}"


PYTHON = interpreter()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(PYTHON.startswith(":"), reason=PYTHON)]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """As tests/tiny.py's, with heads as wide as vLLM's kernels for CPUs want them."""
    return str(save_tiny_model(tmp_path_factory.mktemp("wide") / "model", head_width=32))


@pytest.fixture(scope="module")
def served(launcher, inputs, model, tmp_path_factory):  # noqa: F811
    """The folder of a run that nothing interrupted, and its flags."""
    flags = ("--rollout_engine", "vllm", "--vllm_python", PYTHON, "--actor_model_name_or_path", model)
    flags += ("--importance_cap", "2")
    return uninterrupted(launcher, inputs, 3, tmp_path_factory.mktemp("served"), flags)[0], flags


@pytest.mark.parametrize(
    ("stage", "lora", "ranks", "bits"),
    [
        *((0, 0, 1, 0), (0, 4, 1, 0), (3, 0, 1, 0), (3, 4, 1, 0), (0, 0, 2, 0), (3, 4, 2, 0)),
        *((0, 4, 1, 4), (3, 4, 2, 4)),
    ],
)
def test_greedy_tokens_equal_before_and_after_steps_on_two_ranks(model, rank_pair, stage, lora, ranks, bits):
    if bits:
        pytest.importorskip("bitsandbytes", reason="requirements-optional.txt")
    settings = {"stage": stage, "lora": lora, "base_bits": bits, "ranks": ranks}
    for first, second in rank_pair.run(before_and_after, model, python=PYTHON, **settings):
        before, after = first["logprobs"]["vllm"], second["logprobs"]["vllm"]
        assert before.shape != after.shape or (before - after).abs().max() > 1e-3, "the steps moved nothing"
        for seen in (first, second):
            assert not list(Path("/dev/shm").glob("*cpushm*")), "a killed one would leave it to the next"
            assert seen["tokens"]["vllm"] == seen["tokens"]["fast"] == seen["tokens"]["hf"]
            torch.testing.assert_close(seen["logprobs"]["vllm"], seen["logprobs"]["fast"], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "how", [{}, {"temperature": 0.6}, {"temperature": 1.5, "top_k": 5}, {"top_p": 0.7}, {"repetition_penalty": 1.7}]
)
def test_kept_log_probs_are_the_policys_whatever_it_draws_from(model, how):
    from training.utils.model.forward import response_log_probs
    from training.utils.model.loading import load_causal_lm

    rollout = sampled(model, PYTHON, **how)["vllm"]
    assert sampled(model, PYTHON, **how)["vllm"].input_ids.tolist() == rollout.input_ids.tolist()  # by its seeds
    plain, start = load_causal_lm(model, dtype="fp32").eval(), rollout.response_start
    whole = torch.cat([torch.zeros_like(rollout.input_ids[:, :start], dtype=torch.bool), rollout.response_mask], 1)
    with torch.no_grad():
        expected, _ = response_log_probs(
            plain, rollout.input_ids, rollout.attention_mask, whole, temperature=how.get("temperature", 1.0)
        )
    torch.testing.assert_close(rollout.logprobs, expected[:, start:], rtol=0, atol=1e-4)
    assert not rollout.response_mask.all()  # some met a stop token, which counts
    ends = rollout.input_ids[:, start:].gather(1, rollout.response_mask.sum(1, keepdim=True) - 1)[:, 0]
    assert all(end < 60 for end, n in zip(ends.tolist(), rollout.response_mask.sum(1).tolist(), strict=True) if n < 12)


def test_ninety_five_percent_of_the_optimum(tmp_path):
    models = save_toy_models(tmp_path)
    tiny_tokenizer().save_pretrained(models[0])  # vLLM reads one to compare; prompts are tokens
    backend = server(models[0], PYTHON, rows=128, fresh=True)
    history = learn(models, seed=0, iterations=ITERATIONS["full"], ppo_epochs=4, advantage="grpo", enough=BOUND,
                    server=backend)  # fmt: skip
    assert history[0] < 0.2
    assert recent(history) >= BOUND, [round(x, 2) for x in history]


@pytest.mark.parametrize("victim", ["the run", "vLLM"])
def test_a_run_that_is_killed_resumes(launcher, inputs, model, served, tmp_path, victim):  # noqa: F811
    whole, flags = served
    output = tmp_path / "killed"
    arguments, log = step_arguments(3, inputs, output, *flags), tmp_path / "log"
    run = launcher.start(3, arguments, log)
    run.wait_for(lambda: (output / "checkpoints" / "step-00000002").is_dir())
    if victim == "the run":
        run.kill()
    else:
        for process in workers_of(output):
            os.kill(int(process), signal.SIGKILL)
        assert run.wait() == 1
        assert "was ended by signal 9; its log is" in log.read_text() and "checkpoint: " in log.read_text()
    assert launcher.start(3, arguments, log).wait() == 0, log.read_text()[-3000:]
    assert_same(3, whole, output)


def test_importance_weights_are_one_in_fp32(served):
    """Sampler and trainer round alike there; a token's weight is their ratio, at most the cap."""
    lines = (served[0] / "metrics.jsonl").read_text().splitlines()
    found = [record for record in map(json.loads, lines) if "rollout/importance" in record]
    assert found
    assert all(abs(record["rollout/importance"] - 1) < 1e-3 and record["rollout/capped"] == 0 for record in found)
