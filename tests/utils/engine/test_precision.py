"""``--dtype auto``: the rule for each kind of hardware, ranks that differ, what a run keeps, and the warning."""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.bad_inputs import STEPS
from tests.marks import slow
from training.utils import fine_tuning
from training.utils.checkpoint import store
from training.utils.checkpoint.resume import Run
from training.utils.engine import precision
from training.utils.engine.precision import Capability, capability, choose, cpu_verdict, settle
from training.utils.errors import RunStopped, UserError, run_program
from training.utils.run.distributed import rank

CPU, BF16_CPU = Capability("this CPU", bf16=False), Capability("this CPU", bf16=True)
A100, T4 = Capability("NVIDIA A100", bf16=True, fp16=True), Capability("Tesla T4", bf16=False, fp16=True)
P100 = Capability("Tesla P100", bf16=False)
NO_BF16 = {"avx512_bf16": False, "amx": False}


@pytest.fixture(autouse=True)
def _ask_again():
    forget = precision.cpu_computes_bf16.cache_clear
    forget()
    yield
    forget()


@pytest.fixture
def cpu(monkeypatch):
    """``cpu(True)`` makes this machine's CPU one that computes in bf16, ``cpu(False)`` one that does not."""

    def _cpu(bf16):
        monkeypatch.setattr(precision, "cpu_computes_bf16", lambda: bf16)
        monkeypatch.setattr(precision, "slowdown", lambda: 12.34)

    return _cpu


@pytest.mark.parametrize(
    ("ranks", "dtype", "reason"),
    [
        ([BF16_CPU], "bf16", "this CPU computes in it"),
        ([CPU], "fp32", "this CPU does not compute in bf16"),
        ([CPU, CPU], "fp32", "this CPU does not compute in bf16"),
        ([A100, A100], "bf16", "NVIDIA A100 computes in it"),
        ([T4], "fp16", "Tesla T4 does not compute in bf16"),
        ([P100], "fp32", "Tesla P100 does not compute in bf16"),
        ([BF16_CPU, CPU], "fp32", "the CPU of rank 1 does not compute in bf16, and all ranks agree"),
        ([CPU, BF16_CPU], "fp32", "the CPU of rank 0 does not compute in bf16, and all ranks agree"),
        ([A100, T4], "fp16", "Tesla T4 of rank 1 does not compute in bf16, and all ranks agree"),
        ([A100, T4, P100], "fp32", "Tesla T4 of rank 1 does not compute in bf16, and all ranks agree"),
    ],
)
def test_the_choice(ranks, dtype, reason):
    assert choose(ranks) == (dtype, reason)


@pytest.mark.parametrize(
    ("machine", "features", "onednn", "said"),
    [
        ("x86_64", NO_BF16, False, False),  # AVX2
        ("x86_64", NO_BF16, True, False),  # AVX512 alone: oneDNN takes bf16 and emulates it
        ("x86_64", NO_BF16 | {"avx512_bf16": True}, True, True),
        ("AMD64", NO_BF16 | {"avx512_bf16": True}, True, True),
        ("x86_64", NO_BF16 | {"amx": True}, True, True),
        ("x86_64", NO_BF16 | {"amx": True}, None, True),
        ("x86_64", {"avx512_bf16": True, "amx": True}, False, False),  # ONEDNN_MAX_CPU_ISA forbids it
        ("x86_64", {}, True, True),
        ("x86_64", {}, None, None),
        ("aarch64", NO_BF16, True, True),
        ("aarch64", NO_BF16, False, False),
        ("arm64", {}, None, None),
    ],
)
def test_a_cpu_by_what_pytorch_says(machine, features, onednn, said):
    assert cpu_verdict(machine, features, onednn) is said


@pytest.mark.parametrize(("factor", "bf16"), [(0.6, True), (8.0, False)])
def test_a_pytorch_that_says_nothing_is_measured(monkeypatch, factor, bf16):
    def missing():
        raise AttributeError("no such operation")

    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported")
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", missing)
    monkeypatch.setattr(precision, "slowdown", lambda: factor)
    assert (precision.cpu_features(), precision.onednn_bf16()) == ({}, None)
    assert capability(torch.device("cpu")) == Capability("this CPU", bf16)


@pytest.mark.parametrize(("major", "bf16", "fp16"), [(8, True, True), (9, True, True), (7, False, True)])
def test_a_gpu_that_emulates_bf16_does_not_compute_in_it(monkeypatch, major, bf16, fp16):
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bf16)
    accelerator = SimpleNamespace(is_fp16_supported=lambda: major >= 7)
    monkeypatch.setattr(precision, "get_accelerator", lambda: accelerator)
    assert capability(torch.device("cuda", 0)) == Capability("a GPU", bf16, fp16)


def settled_where_ranks_differ(bf16_ranks, asked):
    """On each rank: precision, warning and lines said, where only ``bf16_ranks`` compute in bf16."""
    ours, factor = precision.cpu_computes_bf16, precision.slowdown
    precision.cpu_computes_bf16, precision.slowdown = lambda: rank() in bf16_ranks, lambda: 7.0
    try:
        flags, said = SimpleNamespace(dtype=asked), io.StringIO()
        with contextlib.redirect_stdout(said):
            settle(flags)
        return flags.dtype, said.getvalue()
    finally:
        precision.cpu_computes_bf16, precision.slowdown = ours, factor


@pytest.mark.parametrize(
    ("bf16_ranks", "dtype", "reason"),
    [
        ([0, 1], "bf16", "this CPU computes in it"),
        ([], "fp32", "this CPU does not compute in bf16"),
        ([0], "fp32", "the CPU of rank 1 does not compute in bf16, and all ranks agree"),
        ([1], "fp32", "the CPU of rank 0 does not compute in bf16, and all ranks agree"),
    ],
)
def test_two_ranks_take_what_both_can(rank_pair, bf16_ranks, dtype, reason):
    said = f"precision: {dtype}, {reason} (--dtype auto)\n"
    assert rank_pair.run(settled_where_ranks_differ, bf16_ranks, "auto") == [(dtype, said), (dtype, "")]


def test_the_warning_comes_from_the_rank_that_is_slow(rank_pair):
    (dtype, said), (other, nothing) = rank_pair.run(settled_where_ranks_differ, [0], "bf16")
    assert dtype == other == "bf16" and nothing == "" and "take 7 times as long" in said


def test_bf16_by_hand_on_a_cpu_without_it_warns_with_the_measured_factor(cpu, capsys):
    cpu(False)
    assert settle(SimpleNamespace(dtype="bf16")) == {"dtype": "bf16", "asked": "bf16"}
    assert capsys.readouterr().out == (
        "warning: this CPU does not compute in bf16: products take 12 times as long as in fp32; "
        "--dtype auto takes fp32 here\n"
    )


@pytest.mark.parametrize(("bf16", "dtype"), [(True, "bf16"), (True, "fp32"), (False, "fp32")])
def test_a_choice_by_hand_that_fits_is_silent(cpu, capsys, bf16, dtype):
    cpu(bf16)
    assert settle(SimpleNamespace(dtype=dtype))["dtype"] == dtype
    assert capsys.readouterr().out == ""


def test_the_factor_is_measured_in_a_moment():
    start = time.process_time()
    factor, threads = precision.slowdown(), torch.get_num_threads()
    assert 0.01 < factor < 1000 and time.process_time() - start < 0.5
    assert torch.get_num_threads() == threads
    if not precision.cpu_computes_bf16() and torch.backends.cpu.get_cpu_capability() == "AVX2":
        assert factor > 2


def record(output, dtype, number=4):
    """A checkpoint as far as its precision goes."""
    folder = output / store.FOLDER / store.checkpoint_name(number)
    folder.mkdir(parents=True)
    (folder / store.STATE).write_text(json.dumps({"run": {"flags": {"dtype": dtype}}}))
    return folder


def finish(folder, dtype, asked):
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps({precision.SUMMARY_KEY: {"dtype": dtype, "asked": asked}}))


@pytest.mark.parametrize(("dtype", "bf16"), [("bf16", False), ("fp32", True), ("bf16", True), ("fp32", False)])
def test_a_resumed_run_keeps_its_precision_on_any_machine(tmp_path, cpu, capsys, dtype, bf16):
    cpu(bf16)
    checkpoint = record(tmp_path / "step2", dtype)
    for resume in ("auto", str(checkpoint), str(checkpoint.parent), str(tmp_path / "step2")):
        output = tmp_path / "step2" if resume == "auto" else tmp_path / "elsewhere"
        flags = SimpleNamespace(dtype="auto")
        assert settle(flags, output, resume)["reason"] == "as in the checkpoint step-00000004"
        assert flags.dtype == dtype
        said = capsys.readouterr().out
        assert f"precision: {dtype}, as in the checkpoint step-00000004 (--dtype auto)\n" in said
        assert ("warning: " in said) == (dtype == "bf16" and not bf16)
    assert settle(SimpleNamespace(dtype="auto"), tmp_path / "step2", "never")["dtype"] == ("bf16" if bf16 else "fp32")
    by_hand = SimpleNamespace(dtype="bf16")
    settle(by_hand, tmp_path / "step2", "auto")
    assert by_hand.dtype == "bf16"  # and `Run.open` refuses it by name if the checkpoint has another


def test_a_damaged_checkpoint_does_not_hide_the_one_before(tmp_path, cpu):
    cpu(False)
    record(tmp_path, "bf16", 4)
    (record(tmp_path, "bf16", 5) / store.STATE).write_text("{")
    assert settle(SimpleNamespace(dtype="auto"), tmp_path, "auto")["reason"] == "as in the checkpoint step-00000004"


def test_fp16_of_a_gpu_is_refused_on_a_cpu_by_its_origin(tmp_path, cpu):
    cpu(False)
    record(tmp_path, "fp16")
    with pytest.raises(UserError, match="^fp16, as in the checkpoint step-00000004, does not train on a CPU"):
        settle(SimpleNamespace(dtype="auto"), tmp_path, "auto")


def test_the_steps_of_a_run_agree(tmp_path, cpu, capsys):
    cpu(False)
    finish(tmp_path / "run" / "step1", "bf16", "auto")
    assert settle(SimpleNamespace(dtype="auto"), tmp_path / "run" / "step2", "auto") == {
        "dtype": "bf16", "asked": "auto", "reason": "as in step 1 of this run"
    }  # fmt: skip
    assert "--dtype fp32 --resume never takes another" in capsys.readouterr().out
    record(tmp_path / "run" / "step3", "fp32")
    assert settle(SimpleNamespace(dtype="auto"), tmp_path / "run" / "step3", "auto")["dtype"] == "fp32"
    assert settle(SimpleNamespace(dtype="auto"), tmp_path / "run" / "other", "auto")["dtype"] == "fp32"


def test_a_choice_by_hand_is_for_its_step_alone(tmp_path, cpu):
    cpu(True)
    finish(tmp_path / "run" / "step1", "fp32", "fp32")
    (tmp_path / "run" / "step2").mkdir()
    (tmp_path / "run" / "step2" / "summary.json").write_text('{"loss_after": 1.0}')  # of an earlier version
    assert settle(SimpleNamespace(dtype="auto"), tmp_path / "run" / "step3", "auto")["dtype"] == "bf16"


def step1_arguments(model, data, output, *more):
    small = ["--per_device_train_batch_size", "2", "--max_seq_len", "480", "--report_to", "none", "--save_every", "1"]
    paths = ["--data_path", str(data / "sft.jsonl"), "--eval_data_path", str(data / "sft.jsonl:2")]
    return ["--model_name_or_path", str(model), "--output_dir", str(output), *paths, *small, *more]


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_step_1_goes_on_in_its_precision_on_another_kind_of_cpu(
    tiny_model, tiny_data, tmp_path, monkeypatch, cpu, capsys, dtype
):
    program = importlib.import_module(STEPS[1])
    after_step = Run.after_step

    def stop(run, number, progress):
        after_step(run, number, progress)
        raise RunStopped("", 143)

    argv = step1_arguments(tiny_model, tiny_data, tmp_path / "run" / "step1")
    cpu(dtype == "bf16")
    with monkeypatch.context() as patched, pytest.raises(RunStopped):
        patched.setattr(Run, "after_step", stop)
        program.main(argv)
    assert "(--dtype auto)" in capsys.readouterr().out
    cpu(dtype != "bf16")
    assert program.main(argv) == 0
    assert f"precision: {dtype}, as in the checkpoint step-00000001 (--dtype auto)" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "step1" / "summary.json").read_text())
    assert summary["precision"]["dtype"] == dtype and summary["precision"]["asked"] == "auto"
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "step1").dtype
    assert saved == {"bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    assert f", in {dtype}, from" in (tmp_path / "run" / "step1" / "README.md").read_text()


@pytest.mark.parametrize("bf16", [slow(False), True])
def test_a_plan_is_made_for_what_auto_becomes(tiny_model, tiny_data, tmp_path, monkeypatch, cpu, capsys, bf16):
    program = importlib.import_module(STEPS[1])
    monkeypatch.setattr(fine_tuning, "init_distributed", lambda *_: pytest.fail("a plan needs no process group"))
    cpu(bf16)
    program.main(step1_arguments(tiny_model, tiny_data, tmp_path / "run" / "step1", "--plan"))
    assert f", {'bf16' if bf16 else 'fp32'}, ZeRO 0, " in capsys.readouterr().out
    assert not (tmp_path / "run").exists()
    record(tmp_path / "run" / "step1", "bf16")
    program.main(step1_arguments(tiny_model, tiny_data, tmp_path / "run" / "step1", "--plan"))
    assert ", bf16, ZeRO 0, " in capsys.readouterr().out


@pytest.mark.parametrize("step", list(STEPS))
def test_auto_is_the_default_of_every_program(step):
    program = importlib.import_module(STEPS[step])
    found = [f.default for group in program.ARGUMENTS for f in dataclasses.fields(group) if f.name == "dtype"]
    assert found == ["auto"]


@pytest.mark.parametrize("step", [step for step in STEPS if step != "generate"])  # which only runs models
def test_fp16_on_a_cpu_is_one_line(step, tiny_model, tmp_path, capsys):
    if str(step).startswith("evaluate"):
        with pytest.raises(UserError, match="--dtype fp16 does not train on a CPU"):
            settle(SimpleNamespace(dtype="fp16"))
        return
    program = importlib.import_module(STEPS[step])
    assert run_program(program.main, ["--dtype", "fp16", "--output_dir", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("error: --dtype fp16 does not train on a CPU")
    assert not os.listdir(tmp_path)
