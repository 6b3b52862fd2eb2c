"""ColossalChat's first lines really run: prepared data, a conversation template, a tiny model in place of theirs."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
from transformers import AutoTokenizer, GenerationConfig

from tests.data.test_template_file import CONFIG
from tests.migrate.runs import run_line, steps_of, train_line
from training.utils.data.template import stop_token_ids

TOKENS = {"input_ids": [1, 2], "labels": [-100, 2], "inputs_decode": "a b", "labels_decode": ["b"], "seq_length": 2}
PAIR_TOKENS = {f"{side}_{what}": [1, 2] for side in ("chosen", "rejected") for what in ("input_ids", "loss_mask")}
ROWS = 16


def said(who: str, text: str) -> dict[str, str]:
    return {"from": who, "content": text}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """What prepare_dataset.py leaves for each script, and the template that it was given."""
    folder = tmp_path_factory.mktemp("colossalchat")
    asked = [said("human", f"What is {n} and one?") for n in range(ROWS)]
    kinds = {
        "sft": [{"messages": [asked[n], said("assistant", f"It is {n + 1}.")]} | TOKENS for n in range(ROWS)],
        "preference": [
            {"context": [asked[n]], "chosen": [said("assistant", str(n + 1))], "rejected": [said("assistant", "No!")]}
            | PAIR_TOKENS
            for n in range(ROWS)
        ],
        "prompt": [{"messages": [ask], "input_ids": [1, 2], "seq_length": 2} for ask in asked],
    }
    for kind, rows in kinds.items():
        for part in range(2):
            data = datasets.Dataset.from_list(rows[part::2])
            data.save_to_disk(str(folder / kind / "arrow" / f"part-{part:05d}"))
    (folder / "template.json").write_text(json.dumps(CONFIG | {"stop_ids": [0]}))
    return folder


def sft_line(model: Path, files: Path, output: Path) -> str:
    """The page's first line, its variables filled in; here two ranks, fp32 and the template, which is given there
    to prepare_dataset.py."""
    return f"""
PRETRAINED_MODEL_PATH={model}
declare -a dataset=(
    {files}/sft/arrow/part-00000
    {files}/sft/arrow/part-00001
)
colossalai run --nproc_per_node 2 --master_port 28534 train_sft.py \\
    --pretrain $PRETRAINED_MODEL_PATH \\
    --tokenizer_dir $PRETRAINED_MODEL_PATH \\
    --dataset ${{dataset[@]}} \\
    --save_interval 5000 \\
    --save_path {output} \\
    --config_file {output}.json \\
    --plugin gemini \\
    --batch_size 2 \\
    --max_epochs 1 \\
    --accumulation_steps 1 \\  # the gradient accumulation has to be disabled
    --lr 2e-5 \\
    --max_len 480 \\
    --use_wandb \\
    --chat_template {files}/template.json --dtype fp32
"""


def check_sft(output: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(output)
    stops = GenerationConfig.from_pretrained(output).eos_token_id
    assert sorted(stops) == sorted(stop_token_ids(tokenizer)) == [0, 2]
    assert CONFIG["system_message"].strip() in tokenizer.apply_chat_template([said_by_user("Hi")], tokenize=False)
    assert steps_of(output) == 3  # 11 of 16 rows, 2 ranks x 2 rows a step


def said_by_user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.slow  # tests/migrate/test_first_runs.py trains by another project's in every run
def test_the_first_line_trains(tiny_model, files, tmp_path):
    train_line(sft_line(tiny_model, files, tmp_path / "sft"), 1, tmp_path / "log", ranks=2)
    check_sft(tmp_path / "sft")


@pytest.mark.slow
def test_the_lines_of_all_stages_run_one_after_the_other(tiny_model, files, tmp_path):
    sft, rm, ppo = tmp_path / "sft", tmp_path / "rm", tmp_path / "ppo"
    run_line(sft_line(tiny_model, files, sft))
    check_sft(sft)
    parts = " ".join(str(files / "{}/arrow" / f"part-{part:05d}") for part in range(2))
    run_line(
        f"colossalai run --nproc_per_node 1 --master_port 30035 train_rm.py --pretrain {sft} --tokenizer_dir {sft} "
        f"--dataset {parts.format('preference', 'preference')} --plugin zero2 --save_interval 1000 --save_dir {rm} "
        "--max_epochs 3 --accumulation_steps 1 --batch_size 8 --lr 5e-6 --grad_clip 1.0 --weight_decay 0.01 "
        "--warmup_steps 40 --grad_checkpoint --max_length 256 --dtype fp32"
    )
    told = run_line(
        f"colossalai run --nproc_per_node 1 --master_port 31312 train_ppo.py --pretrain {sft} --rm_pretrain {sft} "
        f"--tokenizer_dir {sft} --rm_checkpoint_path {rm} --prompt_dataset {parts.format('prompt', 'prompt')} "
        f"--conversation_template_config {files}/template.json --ptx_coef 0.0 --plugin zero2 --save_interval 500 "
        f"--save_path {ppo} --num_episodes 2 --num_collect_steps 2 --num_update_steps 1 --experience_batch_size 4 "
        "--train_batch_size 4 --accumulation_steps 2 --lr 9e-6 --grad_clip 0.1 --weight_decay 0.01 --warmup_steps 40 "
        "--grad_checkpoint --max_length 200 --max_seq_len 8 --dtype fp32"
    )
    assert "--generation_batches 2" in told and (ppo / "actor" / "config.json").is_file()
    assert steps_of(ppo) == 2
    stops = GenerationConfig.from_pretrained(ppo / "actor").eos_token_id
    assert sorted(stops) == [0, 2], "one stop set from the first stage to the last"
