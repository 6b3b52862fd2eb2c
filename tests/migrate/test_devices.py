"""A command's ranks take the devices that its ``CUDA_VISIBLE_DEVICES`` names, as its own launcher would have it."""

import sys

import pytest

from training.migrate.__main__ import start
from training.migrate.shell.command import read_command
from training.migrate.translate import ranks_of, translate
from training.utils.errors import UserError
from training.utils.run.folders import shown

STEP1 = "training/step1_supervised_finetuning/main.py"
GPUS = "CUDA_VISIBLE_DEVICES=8,9"


@pytest.mark.parametrize(
    ("text", "environment", "launcher"),
    [
        (f"{GPUS} torchrun --nproc_per_node=2", [], ["--include", "localhost:8,9"]),
        (f"export {GPUS}; torchrun --nproc_per_node=2 --master_port 9", [],
         ["--include", "localhost:8,9", "--master_port", "9"]),
        (f"{GPUS},10 A=1 accelerate launch --num_processes 2", ["A=1"], ["--include", "localhost:8,9"]),
        (f"{GPUS} colossalai run --nproc_per_node 1", [], ["--include", "localhost:8"]),
        (f"{GPUS} python", [], ["--include", "localhost:8"]),
        ("sh run_inference.sh 1", [], ["--include", "localhost:1"]),
        ("CUDA_VISIBLE_DEVICES=$G torchrun --nproc_per_node=2", [], ["--include", "localhost:$G"]),
        (f"{GPUS} torchrun --nproc_per_node gpu", [], ["--include", "localhost:8,9"]),
        (f"{GPUS} deepspeed", [GPUS], []),
        (f"{GPUS} deepspeed --master_port 9", [GPUS], ["--master_port", "9"]),
        ("accelerate launch --gpu_ids 2,3 --num_processes 2", [], ["--include", "localhost:2,3"]),
        ("accelerate launch --gpu_ids all --num_processes 2", [], ["--num_gpus", "2"]),
    ],
)  # fmt: skip
def test_devices_are_named(text, environment, launcher):
    made = translate(f"{text} {STEP1} --seed 1")
    assert (made.environment, made.starter, made.launcher) == (environment, "deepspeed", launcher)


@pytest.mark.parametrize("flags", ["--num_gpus 2", "--num_gpus=2", "--include localhost:0,1", "--hostfile h"])
def test_deepspeed_ignores_them_as_there(flags):
    made = translate(f"{GPUS} deepspeed {flags} {STEP1} --seed 1")
    assert made.environment == [GPUS] and made.launcher == flags.split()
    name = flags.split("=")[0].split()[0]
    assert any(line.startswith(f"deepspeed ignores {GPUS} beside {name}, as there") for line in made.lines)
    assert not any("ignores" in line for line in translate(f"deepspeed {flags} {STEP1} --seed 1").lines)


def test_a_hostfile_names_its_hosts_devices():
    made = translate(f"{GPUS} colossalai run --nproc_per_node 2 --hostfile h {STEP1} --seed 1")
    assert made.launcher == ["--num_gpus", "2", "--hostfile", "h"]
    assert any(line.startswith(f"deepspeed ignores {GPUS} beside --hostfile, and takes the") for line in made.lines)


@pytest.mark.parametrize(
    ("text", "ranks"),
    [("CUDA_VISIBLE_DEVICES= torchrun --nproc_per_node=2", "2"), ("CUDA_VISIBLE_DEVICES= python", "1"),
     ("accelerate launch --cpu", "1"), ("accelerate launch --cpu --num_processes 3", "3")],
)  # fmt: skip
def test_ranks_without_devices_get_none(text, ranks):
    """deepspeed's launcher would give its first rank GPU 0."""
    made = translate(f"{text} {STEP1} --seed 1")
    assert made.environment == ["CUDA_VISIBLE_DEVICES="]
    assert (made.starter, made.launcher) == ("torchrun", ["--nproc_per_node", ranks])


def test_devices_without_numbers_go_to_torchrun(monkeypatch):
    entry = "CUDA_VISIBLE_DEVICES=GPU-a,MIG-b"
    made = translate(f"{entry},GPU-c torchrun --nproc_per_node=2 --master_port 9 {STEP1} --seed 1")
    assert (made.environment, made.starter) == ([f"{entry},GPU-c"], "torchrun")
    assert made.launcher == ["--nproc_per_node", "2", "--master_port", "9"]
    python = f"{shown(sys.executable)} -m torch.distributed.run"
    assert f"\n{entry},GPU-c {python} --nproc_per_node 2 --master_port 9 " in made.text()
    called = []
    monkeypatch.setattr("os.execvpe", lambda program, words, environment: called.append((words, environment)))
    start(made)
    [(words, environment)] = called
    assert words[1:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "GPU-a,MIG-b,GPU-c"


def test_more_ranks_than_devices_are_refused():
    with pytest.raises(UserError, match="4 ranks: CUDA_VISIBLE_DEVICES=8,9 names 2"):
        translate(f"{GPUS} torchrun --nproc_per_node=4 {STEP1}")


def test_programs_of_one_process_keep_the_variable():
    made = translate(f"{GPUS} python training/step2_reward_model_finetuning/rw_eval.py --model_name_or_path a")
    assert made.text().splitlines()[-2].startswith(f"{GPUS} {shown(sys.executable)} ")


@pytest.mark.parametrize(
    ("text", "ranks"),
    [
        (f"{GPUS} deepspeed", 2),
        ("deepspeed --include localhost:0,1,2", 3),
        ("deepspeed --num_gpus=4", 4),
        ("python", 1),
    ],
)
def test_ranks(text, ranks):
    assert ranks_of(read_command(f"{text} {STEP1}")) == ranks
