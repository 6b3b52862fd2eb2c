"""Rollouts by a process with weights of its own: the protocol, against a stand-in that decodes with transformers."""

import contextlib
import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, MambaConfig, OPTConfig

from tests.marks import slow
from tests.step3.hybrid_checks import prompts, request, trajectory
from tests.step3.vllm_checks import (
    asked_differently,
    before_and_after,
    drawn_together,
    killed_on_rank_1,
    sampled,
    server,
)
from training.step3_rlhf_finetuning import comparison
from training.utils.errors import UserError
from training.utils.generation import vllm, vllm_process, vllm_python
from training.utils.generation.rollouts import RolloutsLost
from training.utils.generation.sampling import SamplingConfig
from training.utils.model.loading import load_causal_lm, load_config
from training.utils.model.tokenizer import load_tokenizer

STAND_IN = str(Path(__file__).with_name("stand_in_worker.py"))


@pytest.fixture(autouse=True)
def stand_in(monkeypatch):
    """Workers are the stand-in."""
    monkeypatch.setenv("TRIPOD_ROLLOUT_WORKER", STAND_IN)


def log_probs_agree(one, other):
    torch.testing.assert_close(one.logprobs, other.logprobs, rtol=0, atol=1e-4)
    return one.input_ids.tolist() == other.input_ids.tolist()


@pytest.mark.parametrize(
    ("stage", "lora", "ranks"),
    [
        (3, 4, 2),
        *(slow(*case) for case in ((3, 0, 1), (0, 4, 1), (3, 4, 1), (0, 0, 1), (1, 4, 1), (2, 0, 1), (0, 0, 2))),
    ],
)
def test_greedy_tokens_equal_before_and_after_steps_on_two_ranks(tiny_model, rank_pair, stage, lora, ranks):
    results = rank_pair.run(before_and_after, str(tiny_model), stage=stage, lora=lora, ranks=ranks)
    for first, second in results:
        assert first["tokens"]["vllm"] != second["tokens"]["vllm"]
        for seen in (first, second):
            assert seen["tokens"]["vllm"] == seen["tokens"]["fast"] == seen["tokens"]["hf"]
            torch.testing.assert_close(seen["logprobs"]["vllm"], seen["logprobs"]["fast"], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "ranks"), [(3, 1), (0, 1), (3, 2)])
def test_a_base_in_4_bits_is_served_as_it_would_be_saved(tiny_model, rank_pair, stage, ranks):
    pytest.importorskip("bitsandbytes", reason="requirements-optional.txt")
    settings = {"stage": stage, "lora": 4, "base_bits": 4, "ranks": ranks}
    for first, second in rank_pair.run(before_and_after, str(tiny_model), **settings):
        assert first["tokens"]["vllm"] != second["tokens"]["vllm"]
        for seen in (first, second):
            assert seen["tokens"]["vllm"] == seen["tokens"]["fast"] == seen["tokens"]["hf"]
            torch.testing.assert_close(seen["logprobs"]["vllm"], seen["logprobs"]["fast"], rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "lora"), [(3, 4), (2, 0)])
def test_ppo_is_the_same_as_with_fast(tiny_model, tiny_reward, rank_pair, stage, lora):
    own, served = (
        rank_pair.run(trajectory, str(tiny_model), str(tiny_reward), stage=stage, lora=lora, engine=engine)[0]
        for engine in ("fast", "vllm")
    )
    for a, b in zip(own, served, strict=True):
        computed = [name for name in a if not name.startswith(("time/", "share/"))]
        assert {name: b[name] for name in computed} == pytest.approx({name: a[name] for name in computed}, abs=2e-5)
        assert b["time/gather"] > 0
    assert own[0]["policy/loss"] != own[-1]["policy/loss"]


@pytest.mark.parametrize(
    "how",
    [{}, {"temperature": 0.6}, {"temperature": 1.5, "top_k": 5}, {"top_p": 0.7}, {"repetition_penalty": 1.7},
     {"greedy": True, "temperature": 0.5}],
)  # fmt: skip
def test_the_sampling_contract_is_that_of_fast(tiny_model, how):
    found = sampled(str(tiny_model), **how)
    assert log_probs_agree(found["vllm"], found["fast"])
    assert found["vllm"].response_mask.tolist() == found["fast"].response_mask.tolist()
    assert not found["vllm"].response_mask.all()  # some have met a stop token


def test_another_seed_or_row_draws_other_tokens(tiny_model):
    model, backend = load_causal_lm(str(tiny_model), dtype="fp32").eval(), server(str(tiny_model))
    asked = request([prompts(1)[0]] * 4, [0, 1, 2, 0])
    ids = backend.generate(model, asked, SamplingConfig(8)).input_ids.tolist()
    assert ids[0] == ids[3] and ids[0] != ids[1] != ids[2]
    assert backend.generate(model, replace(asked, seed=2), SamplingConfig(8)).input_ids.tolist() != ids


def test_large_tensors_and_several_buckets(tiny_model, monkeypatch):
    monkeypatch.setattr(vllm_process, "BUCKET_BYTES", 3000)  # the embeddings alone are 51,200
    found = sampled(str(tiny_model))
    assert log_probs_agree(found["vllm"], found["fast"])


def test_weights_that_do_not_arrive_are_noticed(tiny_model, monkeypatch):
    model, backend = load_causal_lm(str(tiny_model), dtype="fp32").eval(), server(str(tiny_model))
    asked, sampling = request(prompts(3), [0, 1, 2]), SamplingConfig(3)
    backend.take(model)
    backend.generate(model, asked, sampling)
    with torch.no_grad():
        model.model.norm.weight.mul_(1.1)
    monkeypatch.setattr(backend.worker, "push", lambda weights: None)
    for backend.pushes in (vllm.VERIFY_EVERY - 2, vllm.VERIFY_EVERY - 1):  # those in between are taken on trust
        backend.take(model)
        backend.generate(model, asked, sampling)
    backend.take(model)
    with pytest.raises(RolloutsLost, match="does not hold the policy's weights: after push 17 .* differ by .*allowed"):
        backend.generate(model, asked, sampling)
    backend._to_verify = False


def test_what_it_can_not_serve_is_one_line(tiny_model, tmp_path, monkeypatch):
    backend = server(str(tiny_model))
    monkeypatch.setattr(vllm, "Worker", lambda *_: backend.worker)
    options, tokenizer = backend.options, load_tokenizer(str(tiny_model))
    config = json.loads((tiny_model / "config.json").read_text()) | {"architectures": ["NewForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="can not serve this model: it has no NewForCausalLM"):
        vllm.VllmBackend(replace(options, model=str(tmp_path)), tokenizer)
    tokenizer.add_tokens(["quick"])
    with pytest.raises(UserError, match="has another tokenizer than .* the same text gives other tokens"):
        vllm.VllmBackend(options, tokenizer)


def test_a_model_with_other_embeddings_is_decoded_here(tiny_model):
    backend = server(str(tiny_model))
    model = load_causal_lm(str(tiny_model), dtype="fp32").eval()
    model.resize_token_embeddings(420)
    asked, sampling = request(prompts(3), [0, 1, 2]), SamplingConfig(6)
    before = backend.pushes
    assert backend.generate(model, asked, sampling).input_ids.shape[0] == 3
    assert backend.pushes == before


def test_the_server_rests_when_a_model_beside_the_roles_has_answered(tiny_model, monkeypatch):
    """Its memory is for the scoring that follows; where it has not decoded there is nothing to give back."""
    backend = server(str(tiny_model))
    model, asked, ask = load_causal_lm(str(tiny_model), dtype="fp32").eval(), [], backend.worker.ask
    monkeypatch.setattr(
        backend.worker, "ask", lambda message, *how: asked.append(message.get("do")) or ask(message, *how)
    )
    for decodes in (True, False):
        with comparison.decoding(model, backend):
            if decodes:
                backend.generate(model, request(prompts(3), [0, 1, 2]), SamplingConfig(6))
    assert asked.count("sleep") == 1 and asked[-1] == "sleep"


def test_processes_that_hold_a_model_together_draw_each_row_as_one_would(tiny_model, rank_pair):
    for found in rank_pair.run(drawn_together, str(tiny_model), 2):
        assert log_probs_agree(found["vllm"], found["fast"])
    for told in rank_pair.run(asked_differently, str(tiny_model)):
        assert "ranks that share a vLLM ask differently" in told


@pytest.mark.parametrize(
    ("ranks", "size", "on_host", "words"),
    [
        (2, 3, 3, "2 does not divide the 3 ranks"),
        (4, 8, 2, "4 does not divide the 2 ranks of this machine, which a model may not leave"),
        (3, 3, 3, "3 does not divide the 4 attention and 2 key-value heads"),
        (4, 4, 4, ""),  # two processes hold the same key-value head
        (2, 4, 2, ""),
    ],
)
def test_processes_that_can_not_hold_a_model_together(tiny_model, monkeypatch, ranks, size, on_host, words):
    monkeypatch.setattr(vllm, "world_size", lambda: size)
    monkeypatch.setattr(vllm, "local_ranks", lambda: on_host)
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        vllm.check_division(ranks, str(tiny_model))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (LlamaConfig(num_attention_heads=4, intermediate_size=63), r"63 units of an MLP .* \(intermediate_size\)"),
        (OPTConfig(num_attention_heads=4, ffn_dim=63), r"63 units of an MLP .* \(ffn_dim\)"),
        (MambaConfig(), r"divides attention heads, and .* \(mamba\) has none"),
        (GPT2Config(), ""),
    ],
)
def test_layers_that_processes_can_not_divide(tmp_path, monkeypatch, config, words):
    config.save_pretrained(tmp_path)
    monkeypatch.setattr(vllm, "world_size", lambda: 2)
    monkeypatch.setattr(vllm, "local_ranks", lambda: 2)
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        vllm.check_division(2, str(tmp_path))


def test_what_a_process_of_a_group_is_given(tiny_model, monkeypatch):
    options = vllm.VllmOptions("python", str(tiny_model), str(tiny_model), "bf16", 8, 200)
    config = load_config(str(tiny_model))
    of_one = vllm.cache_room(config, options)
    assert of_one == 8 * 3 * 128 * 2 * 2 * 2 * 8 * 2  # rows of three blocks; layers, k and v, heads of 8, two bytes
    of_two, of_four = (vllm.cache_room(config, replace(options, ranks=ranks)) for ranks in (2, 4))
    assert (of_two, of_four) == (of_one, 2 * of_one)  # twice the rows and half the heads; of two heads no quarter
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    seen = [vllm_process._environment(ranks)["CUDA_VISIBLE_DEVICES"] for ranks in (1, 2, 4)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,5,GPU-3a,1")
    seen += [vllm_process._environment(ranks)["CUDA_VISIBLE_DEVICES"] for ranks in (1, 2)]
    assert seen == ["3", "2,3", "0,1,2,3", "1", "GPU-3a,1"]


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_worker_killed_on_one_rank_is_lost_on_both(tiny_model, rank_pair, ranks):
    first, second = rank_pair.run(killed_on_rank_1, str(tiny_model), ranks=ranks)
    assert first == second and len(first) == 2
    if ranks == 2:  # of the other process, whose collective fails, may be told first
        assert all("vLLM (process " in told and "its log is" in told for told in first)
        return
    assert "was ended by signal 9; its log is" in first[0] and "vllm-rank1.log" in first[0]


def test_errors_silence_and_the_end_of_the_rank(tiny_model, capsys):
    backend = server(str(tiny_model), fresh=True)
    worker = backend.worker
    os.kill(worker.process.pid, signal.SIGSTOP)
    with pytest.raises(RolloutsLost, match="has not answered for 1 s"):
        worker.ask({"do": "sleep"}, 1.0)
    assert worker.process.poll() is not None  # it was ended
    assert "| the stand-in is ready" in capsys.readouterr().err


def test_a_worker_that_fails_says_why(tiny_model, monkeypatch):
    worker = vllm_process.Worker(sys.executable, server(str(tiny_model)).worker.log.with_name("other.log"))
    with pytest.raises(RolloutsLost, match="failed: ValueError: what is 'nonsense'?"):
        worker.ask({"do": "nonsense"})


def test_a_worker_ends_with_its_rank(tiny_model):
    worker = vllm_process.Worker(sys.executable, server(str(tiny_model)).worker.log.with_name("other.log"))
    process = worker.process
    del worker
    assert process.wait(10) != 0


@pytest.mark.parametrize(
    ("prints", "words"),
    [("", "has no vLLM; make setup-vllm brings it"), ("0.9.2", "has vLLM 0.9.2, and 0.32 or newer is needed")],
)
def test_an_interpreter_without_vllm_or_an_old_one(tmp_path, monkeypatch, prints, words):
    monkeypatch.delenv("TRIPOD_ROLLOUT_WORKER")
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho {prints}\n")
    python.chmod(0o755)
    with pytest.raises(UserError, match=words):
        vllm_python.find_vllm(str(python))
    with pytest.raises(UserError, match="there is no such interpreter"):
        vllm_python.find_vllm(str(tmp_path / "none"))
    python.write_text("#!/bin/sh\necho 0.33.1+cpu\n")
    assert vllm_python.find_vllm(str(python)) == str(python)
