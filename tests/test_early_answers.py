"""``--help`` and mistakes answer in a fraction of a second: in real processes, in which torch can not be imported."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from training.utils.run import environment, runtime

ROOT = Path(__file__).resolve().parents[1]
CPU_SECONDS = 2.0  # of a process; about 0.2 on a quiet machine, and 8 if it imports what it must not
HEAVY = ("torch", "transformers", "deepspeed", "datasets", "gradio")

STEP1, STEP2, DPO, STEP3 = (
    f"training/{name}/main.py"
    for name in (
        "step1_supervised_finetuning",
        "step2_reward_model_finetuning",
        "step2_dpo_finetuning",
        "step3_rlhf_finetuning",
    )
)
EVALUATE1, EVALUATE2, EVALUATE3 = (step.replace("main", "evaluate") for step in (STEP1, STEP2, STEP3))
PREVIEW, REPORT = "-m training.utils.data.preview", "-m training.report"
CONVERT = "-m training.migrate.reward_model"
GENERATE, JUDGE, SERVE = (f"inference/{name}.py" for name in ("generate", "judge", "serve"))
PROGRAMS = [
    *(STEP1, STEP2, DPO, STEP3, EVALUATE1, EVALUATE2, EVALUATE3, PREVIEW, REPORT, "train.py"),
    *("inference/chatbot.py", "inference/gradio_chatbot.py", "inference/rank.py", "benchmarks/memory_plan.py"),
    *(GENERATE, JUDGE, SERVE),
]

MISTAKES = [
    (STEP1, "--learning_rates 1", ["--learning_rates", "did you mean --learning_rate?"]),
    (STEP2, "--learning_rate fast", ["--learning_rate", "fast"]),
    (STEP1, "--learning_rate -1", ["--learning_rate", "above 0"]),
    (STEP2, "--only_optimize_lora", ["--only_optimize_lora", "--lora_dim"]),
    (STEP2, "--base_bits 4 --lora_dim 4", ["--base_bits 4", "--only_optimize_lora"]),
    (DPO, "--offload_reference_model", ["--offload_reference_model", "--zero_stage 3"]),
    (DPO, "--loss orpo --label_smoothing 0.1", ["--label_smoothing", "--loss orpo"]),
    (STEP3, "--advantage rloo", ["rloo", "--samples_per_prompt"]),
    (STEP3, "--gradient_accumulation_steps 3", ["--gradient_accumulation_steps 3"]),
    (STEP3, "--offload_reward_model", ["--offload_reward_model", "--critic_zero_stage 3"]),
    (STEP3, "--lr_scheduler_type cosine linear constant", ["--lr_scheduler_type", "the actor's and the critic's"]),
    (STEP1, "--model_name_or_path ./none", ["--model_name_or_path ./none", "no such folder"]),
    (STEP2, "--model_name_or_path training", ["--model_name_or_path training", "no config.json"]),
    (STEP3, "--critic_model_name_or_path ./none", ["--critic_model_name_or_path ./none", "no such folder"]),
    (STEP1, "--data_path none.jsonl", ["--data_path none.jsonl", "no such file"]),
    (STEP3, "--eval_data_path demo none.csv:5", ["--eval_data_path none.csv", "no such file"]),
    (STEP3, "--reward_function none.py:f=2", ["--reward_function none.py:f=2", "no such file"]),
    (STEP3, "--unsupervised_data_path none.txt", ["--unsupervised_data_path none.txt", "no such file"]),
    (STEP1, "--sft_only_data_path none.txt", ["--sft_only_data_path none.txt", "no such file"]),
    *(
        (program, f"--data_split {split}", [f"--data_split {split}", "for example 2,4,4"])
        for program, split in (
            (STEP1, "2:4:4"),
            (STEP2, "1,2"),
            (DPO, "0,0,0"),
            (STEP3, "1,-1,1"),
            (EVALUATE1, "1,2,nan"),
            (EVALUATE2, "inf,1,1"),
            (EVALUATE3, ","),
            (PREVIEW, "1,2,x"),
            ("train.py", "2:4:4"),
            (GENERATE, "2:4:4"),
        )
    ),
    *(
        (program, f"--column_map {pair}", [f"--column_map {pair}", word])
        for program, pair, word in (
            (STEP1, "prompt:question", "NAME=COLUMN"),
            (STEP2, "promt=q", "did you mean prompt?"),
            (DPO, "=q", "NAME=COLUMN"),
            (STEP3, "prompt=", "NAME=COLUMN"),
            (PREVIEW, "zzz=q", "no format has a column zzz"),
            (GENERATE, "prompt", "NAME="),
            ("train.py", "prompt:question", "NAME=COLUMN"),
        )
    ),
    (STEP1, "--deepspeed_config none.json", ["--deepspeed_config none.json", "no such file"]),
    (EVALUATE1, "--path none", ["--path none", "no such folder"]),
    (EVALUATE2, "", ["has finished step 2", "step2_reward_model_finetuning"]),
    (EVALUATE3, "--best_of 1,four", ["--best_of", "1,4,16"]),
    (PREVIEW, "--step 4", ["--step", "4"]),
    (GENERATE, "", ["has finished step 1"]),
    (GENERATE, "--model ./none", ["--model ./none", "no such folder"]),
    (GENERATE, "--model embedded --data_path none.jsonl", ["none.jsonl", "no such file"]),
    (GENERATE, "--model embedded --best_of 4", ["--best_of", "--reward_model"]),
    (JUDGE, "--answers README.md --judge none.py:f", ["--judge none.py:f", "no such file"]),
    ("inference/chatbot.py", "--path /none", ["--path /none: no such folder"]),
    ("inference/chatbot.py", "--path README.md", ["--path README.md: no such folder"]),
    ("inference/chatbot.py", "--path embedded --chat_template none.jinja", ["--chat_template none.jinja", "no such"]),
    ("inference/gradio_chatbot.py", "--path A=/none", ["--path /none: no such folder"]),
    ("inference/gradio_chatbot.py", "--path a=embedded a=embedded", ["--path: two models are called a"]),
    ("inference/gradio_chatbot.py", "--path =embedded", ["expected NAME=PATH"]),
    ("inference/gradio_chatbot.py", "--path a=/1 b=/2 c=/3 d=/4 e=/5", ["--path: at most 4 models"]),
    ("inference/gradio_chatbot.py", "--path embedded --reward_model /none", ["--reward_model /none: no such folder"]),
    (SERVE, "--path /none", ["--path /none: no such folder"]),
    (CONVERT, "--path /none --output_dir out", ["--path /none: no such folder"]),
    (CONVERT, "--path training --output_dir out", ["--path training: no weights there"]),
    *(
        (JUDGE, f"--answers a --judge_model m --judge_url {url}", ["--judge_url", "http://HOST:PORT/v1"])
        for url in (
            *("http://localhost:99999/v1", "http://localhost:0/v1", "http://localhost:/v1", "http://a:b/v1", "a:80/v1"),
            *(
                "http://300.1.1.1/v1",
                "http://[::g]/v1",
                "http://a..b/v1",
                "http://-a/v1",
                "http://a,b/v1",
                "http:///v1",
            ),
        )
    ),
    (JUDGE, "--answers none.jsonl", ["give a judge"]),
    (JUDGE, "--answers none.jsonl --judge train.py:main", ["--answers none.jsonl", "No such file"]),
    (JUDGE, "--answers README.md --judge train.py:main", ["--answers README.md:1", "not JSON"]),
    (JUDGE, "--answers a --judge_url http://u:p@h/v1 --judge_model m", ["--judge_url", "TRIPOD_JUDGE_KEY"]),
]


@pytest.fixture
def answer(tmp_path):
    """Run a program where importing a heavy library is an error; returns the process, ended within its CPU time."""
    for name in HEAVY:
        (tmp_path / f"{name}.py").write_text(f"raise AssertionError('{name} was imported')\n", encoding="utf-8")

    def run(program: str, flags: str, **environment: str) -> subprocess.CompletedProcess[str]:
        paths = {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}", "TRIPOD_OUTPUT": str(tmp_path / "output")}
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        result = subprocess.run(
            [sys.executable, *program.split(), *flags.split()],
            **{"cwd": ROOT, "env": os.environ | paths | environment, "capture_output": True, "text": True},
            timeout=120,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_SECONDS
        return result

    return run


@pytest.mark.parametrize("program", PROGRAMS)
def test_help(program, answer):
    result = answer(program, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert "--help" in result.stdout


@pytest.mark.parametrize("program", [p for p in PROGRAMS if not p.startswith("benchmarks")])
def test_a_typo(program, answer):
    result = answer(program, "--hellp 1")
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ") and "--hellp" in line


@pytest.mark.parametrize(("program", "flags", "words"), MISTAKES)
def test_a_mistake(program, flags, words, answer):
    result = answer(program, flags)
    assert result.returncode == 2
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    for word in words:
        assert word in line


def test_rank_0_alone_speaks(answer):
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    for flags in ("--hellp 1", "--data_path none.jsonl"):
        said = [answer(STEP1, flags, RANK=rank, **ranks) for rank in ("0", "1")]
        assert [result.returncode for result in said] == [2, 2]
        assert [len(result.stderr.splitlines()) for result in said] == [1, 0]


def test_a_path_that_one_of_several_hosts_may_lack_is_left_to_the_run(answer):
    """There the rank that lacks it tells the others, which have begun to wait for it."""
    result = answer(STEP1, "--data_path none.jsonl", RANK="3", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2")
    assert "torch was imported" in result.stderr


@pytest.mark.parametrize(
    "program",
    [STEP1, STEP2, STEP3, "train.py", "inference/chatbot.py", "inference/gradio_chatbot.py", GENERATE, JUDGE, SERVE],
)
def test_outside_the_environment_says_what_to_use(program, tmp_path):
    """Without the packages of the environment (-S), before a folder is made; ``--help`` needs none of them."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    bare["TRIPOD_OUTPUT"] = str(tmp_path / "output")
    call = {"cwd": ROOT, "env": bare, "capture_output": True, "text": True, "check": False}
    result = subprocess.run([sys.executable, "-S", program], **call)
    [line] = result.stderr.splitlines()
    assert result.returncode == 2 and line.startswith("error: ") and "torch" in line
    assert ".venv/bin/python" in line or "make setup" in line
    assert not (tmp_path / "output").exists()
    if program != "inference/chatbot.py":  # whose flags are in modules that need them
        assert subprocess.run([sys.executable, "-S", program, "--help"], **call).returncode == 0


WRONG_VARIABLES = [
    *(({name: text}, f"{name} is '{text}' in the environment: a number is needed")
      for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMP_NUM_THREADS",
                   "MASTER_PORT") for text in ("abc", "1.5")),
    ({"OMP_NUM_THREADS": "2,x"}, "OMP_NUM_THREADS is '2,x' in the environment: a number is needed"),
    ({"OMP_NUM_THREADS": "2,0"}, "OMP_NUM_THREADS is 2,0 in the environment: it must be at least 1"),
    *(({name: ""}, f"{name} is '' in the environment") for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")),
    *(({name: text}, f"{name} is {text} in the environment: it must be at least {least}")
      for name, text, least in (("WORLD_SIZE", "0", 1), ("WORLD_SIZE", "-2", 1), ("RANK", "-1", 0),
                                ("LOCAL_RANK", "-1", 0), ("LOCAL_WORLD_SIZE", "0", 1), ("LOCAL_SIZE", "-1", 1),
                                ("OMP_NUM_THREADS", "0", 1), ("OMP_NUM_THREADS", "-4", 1))),
    ({"MASTER_PORT": "70000"}, "MASTER_PORT is 70000 in the environment: it must be from 0 to 65535"),
    ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK is 2 in the environment and WORLD_SIZE is 2: ranks are counted from 0"),
    ({"RANK": "1"}, "RANK is 1 in the environment and WORLD_SIZE is not set, so there is one rank"),
    ({"LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, "LOCAL_RANK is 2 in the environment and LOCAL_WORLD_SIZE is 2"),
]  # fmt: skip


@pytest.mark.parametrize(("variables", "said"), WRONG_VARIABLES)
def test_a_variable_that_no_program_could_use_is_named(variables, said, monkeypatch, capsys):
    for name in environment.NUMBERS:
        monkeypatch.delenv(name, raising=False)
    for name, text in variables.items():
        monkeypatch.setenv(name, text)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    with pytest.raises(SystemExit) as ended:
        environment.check_environment()
    assert ended.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {said}")
    with pytest.raises(SystemExit) as ended:
        runtime.prepare_runtime()  # as the library calls it
    assert ended.value.code == 2
    monkeypatch.setattr(sys, "argv", ["main.py", "--help"])
    environment.check_environment()


@pytest.mark.parametrize("threads", ["4", "4,2", ""])
def test_threads_of_each_level_are_openmps(threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", threads)
    assert not environment.wrong_variable()


def test_a_user_without_a_home_folder_is_told(monkeypatch):
    """As a container's, whose number no one has entered."""
    monkeypatch.delenv("HOME")
    assert not environment.wrong_variable()
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert environment.wrong_variable().endswith("set HOME")


@pytest.mark.parametrize("program", [p for p in PROGRAMS if p not in (REPORT, "benchmarks/memory_plan.py")])
def test_every_program_looks_at_the_variables_first(program, answer):
    result = answer(program, "", WORLD_SIZE="abc")
    assert result.returncode == 2
    assert result.stderr.startswith("error: WORLD_SIZE is 'abc'") and len(result.stderr.splitlines()) == 1


def test_a_wrong_number_that_all_ranks_have_is_said_by_the_first(answer):
    ranks = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "OMP_NUM_THREADS": "many"}
    said = [answer(STEP1, "", RANK=rank, **ranks) for rank in ("0", "1")]
    assert [result.returncode for result in said] == [2, 2]
    assert [len(result.stderr.splitlines()) for result in said] == [1, 0]
