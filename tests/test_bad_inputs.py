"""Bad input: one line, exit code 2, before a model is loaded, nothing written over."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.bad_inputs import CASES, STEPS, World, _rl, _sft
from tests.step3.hybrid_checks import save_tiny_reward_model
from tests.tiny import tiny_tokenizer
from training.utils.errors import run_program
from training.utils.model import classifiers, loading
from training.utils.run import inputs
from training.utils.run.folders import python_path

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def reward_models(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("rewards")
    good = save_tiny_reward_model(str(tiny_model), folder / "good")
    other = Path(shutil.copytree(good, folder / "other"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["unheard-of"])
    tokenizer.save_pretrained(other)
    return good, other


@pytest.fixture
def world(tiny_model, reward_models, tiny_data, tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPOD_OUTPUT", str(tmp_path / "runs"))
    return World(tiny_model, *reward_models, tiny_data, tmp_path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name.replace(" ", "-"))
def test_one_line_and_exit_code_2(case, world, capsys, monkeypatch):
    def no_model(*_args, **_kwargs):
        raise AssertionError("a model was loaded before the input was checked")

    monkeypatch.setattr(loading, "load_causal_lm", no_model)
    monkeypatch.setattr(classifiers, "load_classifier", no_model)
    program = importlib.import_module(STEPS[case.step])
    assert run_program(program.main, case.arguments(world)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    for word in case.words:
        assert word in lines[0], (word, lines[0])


@pytest.mark.parametrize("step", [1, 3])
def test_4_bits_without_their_package_name_it(step, world, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    flags = [f"--{'actor_' if step == 3 else ''}lora_dim", "4", "--only_optimize_lora", "--base_bits", "4"]
    arguments = (_rl if step == 3 else _sft)(world, *flags)
    program = importlib.import_module(STEPS[step])
    for check in (program.main, lambda argv: inputs.check_inputs(program.parse_flags(argv))):
        assert run_program(check, arguments) == 2
        assert "-m pip install bitsandbytes -c " in capsys.readouterr().err
    assert not list(world.tmp.iterdir())
    inputs.check_inputs(program.parse_flags([*arguments, "--plan"]))  # a plan needs none


def test_two_ranks_both_end(world):
    """Under the real launcher: the message once, code 2, no rank hangs."""
    script = ROOT / "training" / "step1_supervised_finetuning" / "main.py"
    command = [
        str(Path(sys.executable).parent / "deepspeed"),
        "--num_gpus",
        "2",
        "--master_port",
        "29641",
        str(script),
        "--model_name_or_path",
        str(world.model),
        "--data_path",
        str(world.tmp / "no.jsonl"),
        "--output_dir",
        str(world.tmp / "out"),
    ]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=180,
        env=os.environ | {"PYTHONPATH": python_path()},
        check=False,
    )
    assert result.returncode == 2, result.stderr[-2000:]
    errors = [line for line in (result.stdout + result.stderr).splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert "Traceback" not in result.stdout + result.stderr
