"""open-chatgpt's commands, value by value against what transformers' Trainer and its own scripts have."""

import json
import math

import pytest

from tests.migrate.test_colossalchat import values_of
from training.migrate.open_chatgpt import OPEN_CHATGPT
from training.migrate.translate import OURS, translate
from training.utils.errors import UserError

VICUNA = (
    "torchrun --nproc_per_node=4 --master_port=20001 fastchat/train/train_mem.py --model_name_or_path DIR/llama-7b "
    "--data_path DATA --bf16 True --output_dir output_vicuna_7b --num_train_epochs 3 --per_device_train_batch_size 2 "
    "--per_device_eval_batch_size 16 --gradient_accumulation_steps 16 --evaluation_strategy steps --eval_steps 1500 "
    "--save_strategy steps --save_steps 1500 --save_total_limit 8 --learning_rate 2e-5 --weight_decay 0. "
    "--warmup_ratio 0.04 --lr_scheduler_type cosine --logging_steps 1 --fsdp 'full_shard auto_wrap' "
    "--fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer --tf32 True --model_max_length 2048 "
    "--gradient_checkpointing True --lazy_preprocess True"
)
VICUNA_MEANS = {
    "--model_name_or_path": "DIR/llama-7b", "--dtype": "bf16", "--output_dir": "output_vicuna_7b",
    "--num_train_epochs": 3, "--per_device_train_batch_size": 2, "--per_device_eval_batch_size": 16,
    "--gradient_accumulation_steps": 16, "--eval_interval": 1500, "--save_every": 1500, "--keep_last": 8,
    "--learning_rate": 2e-5, "--weight_decay": 0.0, "--lr_scheduler_type": "cosine", "--zero_stage": 3,
    "--offload": False, "--max_seq_len": 2048, "--gradient_checkpointing": True, "--chat_template": "vicuna",
    "--train_on_prompts": False, "--seed": 42, "--deepspeed_config": "", "--lora_dim": 0,
}  # fmt: skip


@pytest.mark.parametrize("rows", [127, 128, 1000, 100_001])
def test_vicuna_and_its_warm_up(tmp_path, rows):
    data = tmp_path / "sharegpt.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n' * rows)
    found = values_of(VICUNA.replace("DATA", str(data)))
    assert {name: found[name] for name in VICUNA_MEANS} == VICUNA_MEANS
    # Trainer: an epoch has ceil(rows / (batch x ranks)) batches and a step takes 16 of them, at least one a epoch
    steps = 3 * max(math.ceil(rows / 8) // 16, 1)
    assert found["--num_warmup_steps"] == math.ceil(0.04 * steps)
    assert translate(VICUNA).launcher == ["--num_gpus", "4", "--master_port", "20001"]


@pytest.mark.parametrize(("steps", "means"), [(0, math.ceil(0.04 * 3 * 7)), (5, 5)])
def test_a_share_counts_where_the_steps_of_the_warm_up_are_none(tmp_path, steps, means):
    data = tmp_path / "sharegpt.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n' * 1000)
    assert values_of(f"{VICUNA.replace('DATA', str(data))} --warmup_steps {steps}")["--num_warmup_steps"] == means


def test_a_warm_up_that_can_not_be_counted_is_said_with_its_arithmetic():
    made = translate(VICUNA.replace("DATA", "some/hub-name"))
    assert any("N = 0.04 x 3 x rows / 128" in line for line in made.lines)


def test_alpaca_with_the_trainer_s_defaults():
    found = values_of("python train_alpaca.py --data_path tatsu-lab/alpaca --evaluation_strategy no --save_steps 2000 "
                      "--overwrite_output_dir")  # fmt: skip
    wanted = {
        "--model_name_or_path": "facebook/opt-125m", "--dtype": "fp32", "--num_train_epochs": 3, "--seed": 42,
        "--per_device_train_batch_size": 8, "--per_device_eval_batch_size": 8, "--gradient_accumulation_steps": 1,
        "--learning_rate": 5e-5, "--weight_decay": 0.0, "--lr_scheduler_type": "linear", "--num_warmup_steps": 0,
        "--max_seq_len": 512, "--save_every": 2000, "--eval_interval": 0, "--chat_template": "alpaca",
        "--gradient_checkpointing": False, "--zero_stage": 0, "--resume": "never",
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize(
    ("flags", "means"),
    [
        ("--fsdp 'shard_grad_op offload'", (2, True)),
        ("--fsdp 'full_shard auto_wrap'", (3, False)),
        ("--deepspeed FILE", (3, True)),
    ],
)
def test_sharding(tmp_path, flags, means):
    config = tmp_path / "ds.json"
    config.write_text(json.dumps({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}))
    found = values_of(f"python train_alpaca.py --data_path a/b {flags}".replace("FILE", str(config)))
    assert (found["--zero_stage"], found["--offload"]) == means


def test_alpaca_with_lora():
    found = values_of("torchrun --nproc_per_node=8 train_alpaca_lora.py --data_path a/b --fp16")
    names = ("--lora_dim", "--lora_alpha", "--lora_dropout", "--lora_module_name", "--only_optimize_lora", "--dtype")
    assert [found[name] for name in names] == [8, 16, 0.05, "q_proj,v_proj", True, "fp16"]


def test_pre_training():
    text = "python openr1/train/pt/train.py --data_path w/m --train_data_split"
    found = values_of(f"{text} 'train[:20]' --bf16 False --eval_data_path w/m --eval_data_split test")
    assert (found["--data_path"], found["--eval_data_path"]) == (["w/m:20"], ["w/m"])
    assert (found["--train_on_prompts"], found["--dtype"]) == (True, "fp32")
    with pytest.raises(UserError, match=r"train\[10:20\]: .* nearest is --train_data_split 'train\[:10\]'"):
        translate(f"{text} 'train[10:20]'")


def test_scripts_without_flags():
    found = values_of("python train_fintune_summarize.py")
    assert (found["--learning_rate"], found["--num_train_epochs"], found["--eval_interval"]) == (2e-5, 5, 5)
    assert (found["--data_path"], found["--max_seq_len"]) == (["CarperAI/openai_summarize_tldr"], 512)
    found = values_of("python train_reward_model.py")
    assert (found["--learning_rate"], found["--num_train_epochs"], found["--max_seq_len"]) == (1e-5, 10, 550)
    found = values_of("python train_ppo_rlhf.py --critic_model_name_or_path R --max_epochs 2")
    assert (found["--ppo_epochs"], found["--actor_learning_rate"], found["--clip_value"]) == (2, 1e-7, 0.4)
    found = values_of("python gpt2-sentiment.py --data_path prompts.jsonl")
    assert found["--critic_model_name_or_path"] == "lvwerra/distilbert-imdb"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train_ppo_rlhf.py", ["random head", "--critic_model_name_or_path"]),
        ("gpt2-sentiment.py", ["first 3 to 12 tokens", "--data_path FILE"]),
        ("train_alpaca.py", ["--data_path is missing"]),
        ("train_alpaca.py --data_path a/b --deepspeed no.json", ["no.json can not be read", "--zero_stage N"]),
        ("train_alpaca.py --data_path a/b --num_train_epochs 2.5", ["--num_train_epochs", "no whole number"]),
        ("train_alpaca.py --data_path a/b --max_steps 10", ["--max_steps", "10 can not be had"]),
        ("train_alpaca.py --data_path a/b --optim adafactor", ["--optim", "adafactor can not be had"]),
        ("train_alpaca.py --data_path a/b --bf16 maybe", ["--bf16", "maybe is none of True, False"]),
    ],
)
def test_what_can_not_be_had_is_one_line(text, words):
    with pytest.raises(UserError) as raised:
        translate(f"python {text}")
    assert "\n" not in str(raised.value) and all(word in str(raised.value) for word in words)


def test_every_flag_that_is_mapped_is_one_of_ours():
    import dataclasses

    for program in OPEN_CHATGPT.programs:
        own = {f"--{f.name}" for group in OURS[program.ours].groups for f in dataclasses.fields(group)}
        for flag in [*(other.ours for other in program.flags.values()), *program.constants]:
            assert not flag or flag in own, (program.title, flag)
