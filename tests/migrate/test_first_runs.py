"""The first lines of DeepSpeed-Chat, alpaca-rlhf and open-chatgpt really run, each step on what the one before it left.

Lines stand as in their scripts and pages but for models, data and folders. At their ends, for a test on a CPU: fp32 in
place of fp16, and their hub data set by the path of a small clone of the same columns.
"""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tokenizers import processors
from transformers import AutoConfig, AutoModelForCausalLM, OPTConfig

from tests.migrate.runs import free_port, logged, run_line, steps_of, train_line
from tests.tiny import VOCABULARY, save_tiny_model, tiny_tokenizer

BEGINNING, PAD, END = "<|im_start|>", "<|endoftext|>", "<|im_end|>"
SETS = ("rm-static", "full-hh-rlhf", "synthetic-instruct-gptj-pairwise", "rlhf-reward-datasets")
SCRIPTS = {
    1: "training/step1_supervised_finetuning/main.py",
    2: "training/step2_reward_model_finetuning/main.py",
    3: "training/step3_rlhf_finetuning/main.py",
}


def save_tiny_opt(folder: Path, **config: object) -> Path:
    """An OPT as the hub has them: a base model without a chat template, a pad token of its own, and a tokenizer that
    puts the beginning of a text before every text."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "init_std": 0.3}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    made = OPTConfig(vocab_size=VOCABULARY, max_position_embeddings=2048, dropout=0.1, **sizes | tokens | config)
    AutoModelForCausalLM.from_config(made).save_pretrained(folder)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template, tokenizer.pad_token = None, PAD
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGINNING} $A", special_tokens=[(BEGINNING, 1)]
    )
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def opt(tmp_path_factory) -> dict[str, Path]:
    """facebook/opt-1.3b, and -350m with what only it has: narrow embeddings and norms behind the blocks."""
    folder = tmp_path_factory.mktemp("opt")
    narrow = {"word_embed_proj_dim": 16, "do_layer_norm_before": False}
    return {"1.3b": save_tiny_opt(folder / "opt-1.3b"), "350m": save_tiny_opt(folder / "opt-350m", **narrow)}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Clones of the hub's data sets, with their columns, and alpaca-rlhf's own file of dialogues."""
    folder = tmp_path_factory.mktemp("data")
    for number, name in enumerate(SETS):
        for split, count in (("train", 700 if name == "rm-static" else 40), ("test", 8)):
            rows = [pair(n + 1000 * number + (5000 if split == "test" else 0)) for n in range(count)]
            (folder / name / "data").mkdir(parents=True, exist_ok=True)
            datasets.Dataset.from_list(rows).to_parquet(folder / name / "data" / f"{split}-00000-of-00001.parquet")
    (folder / "MultiTurnAlpaca").mkdir()
    for part, count in (("train", 140), ("test", 8)):
        lines = [json.dumps(dialogue(n + (5000 if part == "test" else 0))) for n in range(count)]
        (folder / "MultiTurnAlpaca" / f"training_data.txt.{part}").write_text("\n".join(lines) + "\n")
    return folder


def pair(n: int) -> dict[str, str]:
    return {
        "prompt": f"\n\nHuman: What is {n} and one?\n\nAssistant:",
        "response": f" It is {n + 1}.",
        "chosen": f" It is {n + 1}.",
        "rejected": " Who can tell?",
    }


def dialogue(n: int) -> dict[str, str]:
    return {"instruction": f"User: Hi\nAssistant: Hello\nUser: What is {n} and one?", "output": f"It is {n + 1}."}


def chat_line(step: int, flags: str, data: Path, *, ranks: int = 1) -> str:
    """As DeepSpeed-Chat's scripts have it, in the folder of its step; its default data set is given by its path."""
    script = Path(SCRIPTS[step])
    given = flags if "--data_path" in flags else f"{flags} --data_path {data}/rm-static"
    return (
        f"cd DeepSpeed-Chat/{script.parent}\n"
        f"deepspeed --num_gpus {ranks} --master_port {free_port()} {script.name} {given} --dtype fp32"
    )


def alpaca_line(step: int, flags: str) -> str:
    """As seed 004 has it; a port, since other tests may start a launcher meanwhile, and fp32."""
    root = "/tmp/pycharm_project_227/alpaca_rlhf/deepspeed_chat"
    return f"--num_gpus 2 --master_port {free_port()} {root}/{SCRIPTS[step]} {flags} --dtype fp32"


def chat_sft(opt: dict[str, Path], data: Path, output: Path) -> str:
    """single_gpu/run_1.3b.sh"""
    return chat_line(
        1,
        f"--model_name_or_path {opt['1.3b']} --gradient_accumulation_steps 8 --lora_dim 128 --zero_stage 0 "
        f"--enable_tensorboard --tensorboard_path {output} --deepspeed --output_dir {output}",
        data,
    )


def check_chat_sft(base: Path, output: Path) -> None:
    """Two tenths of 700 rows are one step of 8 x 16; adapted weights have moved by their adapters, and the rest of the
    model has trained with them, as without --only_optimize_lora there."""
    assert steps_of(output) in (1, 2)
    moved = changed(base, output)
    assert any("decoder.layers.0.self_attn.q_proj.weight" in name for name in moved)
    assert any("embed_positions" in name for name in moved)


def check_first_iteration(output: Path) -> None:
    """Before the first update the actor is the SFT model that it came from."""
    kl = [row["kl/per_token"] for row in logged(output) if "kl/per_token" in row]
    assert len(kl) == 2 and abs(kl[0]) < 1e-6


def changed(base: Path, output: Path) -> set[str]:
    """Names of the weights in which two folders of a model differ."""
    before, after = load_file(base / "model.safetensors"), load_file(output / "model.safetensors")
    assert before.keys() == after.keys()
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_deepspeed_chats_first_line_trains(opt, data, tmp_path):
    train_line(chat_sft(opt, data, tmp_path / "sft"), 1, tmp_path / "log")
    check_chat_sft(opt["1.3b"], tmp_path / "sft")


@pytest.mark.slow
def test_deepspeed_chats_lines_for_one_gpu(opt, data, tmp_path):
    sft, rm, rlhf = tmp_path / "actor", tmp_path / "reward", tmp_path / "step3"
    run_line(chat_sft(opt, data, sft))
    check_chat_sft(opt["1.3b"], sft)
    # single_gpu/run_350m.sh
    run_line(
        chat_line(
            2,
            f"--model_name_or_path {opt['350m']} --num_padding_at_beginning 1 --weight_decay 0.1 --dropout 0.0 "
            "--gradient_accumulation_steps 4 --zero_stage 0 --enable_tensorboard "
            f"--tensorboard_path {rm} --deepspeed --output_dir {rm}",
            data,
        )
    )
    assert AutoConfig.from_pretrained(rm).word_embed_proj_dim == 16 and (rm / "reward_stats.json").is_file()
    # single_gpu/run_1.3b.sh of step 3; their own flags end it after two iterations
    told = run_line(
        chat_line(
            3,
            f"--actor_model_name_or_path {sft} --critic_model_name_or_path {rm} --actor_zero_stage 0 "
            "--critic_zero_stage 0 --num_padding_at_beginning 1 --gradient_accumulation_steps 2 --deepspeed "
            "--actor_lora_dim 128 --enable_hybrid_engine --actor_gradient_checkpointing --actor_dropout 0.0 "
            f"--output_dir {rlhf} --enable_test_mode --test_stop_step 2",
            data,
        )
    )
    assert "--generation_batches 2" in told, "a step over two iterations there"
    assert steps_of(rlhf) == 2
    check_first_iteration(rlhf)
    assert (rlhf / "actor" / "model.safetensors").is_file() and (rlhf / "critic" / "model.safetensors").is_file()


@pytest.mark.slow
def test_open_chatgpts_line(tmp_path):
    """train_vicuna.sh on two of its GPUs, and ShareGPT's conversations."""
    base, output = save_tiny_model(tmp_path / "llama-7b", tie=False), tmp_path / "vicuna"
    rows = [
        {"id": str(n), "conversations": [{"from": "human", "value": f"What is {n} and one?"},
                                         {"from": "gpt", "value": f"It is {n + 1}."}]}
        for n in range(160)
    ]  # fmt: skip
    (tmp_path / "sharegpt.json").write_text(json.dumps(rows))
    told = run_line(
        f"torchrun --nproc_per_node=2 --master_port={free_port()} fastchat/train/train_mem.py "
        f"--model_name_or_path {base} --data_path {tmp_path}/sharegpt.json --bf16 True --output_dir {output} "
        "--num_train_epochs 3 --per_device_train_batch_size 2 --per_device_eval_batch_size 16 "
        "--gradient_accumulation_steps 16 --evaluation_strategy steps --eval_steps 1500 --save_strategy steps "
        "--save_steps 1500 --save_total_limit 8 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.04 "
        "--lr_scheduler_type cosine --logging_steps 1 --fsdp 'full_shard auto_wrap' "
        "--fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer --tf32 True --model_max_length 512 "
        "--gradient_checkpointing True --lazy_preprocess True --dtype fp32"
    )
    assert "--chat_template vicuna" in told and "--zero_stage 3" in told
    assert steps_of(output) == 9  # nine tenths of 160 rows in steps of 2 ranks x 2 rows x 16, three times
    assert "model.layers.0.mlp.down_proj.weight" in changed(base, output)


@pytest.mark.slow
def test_seed_004s_lines(data, tmp_path):
    base = save_tiny_model(tmp_path / "llama-7b-hf", tie=False)
    folder = tmp_path / "rlhf"
    run_line(
        alpaca_line(
            1,
            f"--sft_only_data_path {data}/MultiTurnAlpaca --data_output_path {folder}/tmp/ --model_name_or_path {base} "
            "--per_device_train_batch_size 8 --per_device_eval_batch_size 8 --max_seq_len 512 --learning_rate 3e-4 "
            "--num_train_epochs 1 --gradient_accumulation_steps 8 --num_warmup_steps 100 "
            f"--output_dir {folder}/actor --lora_dim 8 --lora_module_name q_proj,k_proj --only_optimize_lora "
            f"--deepspeed --zero_stage 2 --data_path {data}/rm-static",
        )
    )
    assert steps_of(folder / "actor") == 4  # 140 dialogues and their four tenths of 700 rows, 2 ranks x 8 rows x 8
    adapted = {f"model.layers.{n}.self_attn.{name}.weight" for n in range(2) for name in ("q_proj", "k_proj")}
    assert changed(base, folder / "actor") == adapted
    run_line(
        alpaca_line(
            2,
            f"--data_output_path {folder}/tmp/ --model_name_or_path {base} --num_padding_at_beginning 0 "
            "--per_device_train_batch_size 4 --per_device_eval_batch_size 64 --learning_rate 5e-4 "
            "--num_train_epochs 1 --gradient_accumulation_steps 1 --num_warmup_steps 0 --zero_stage 2 --deepspeed "
            f"--output_dir {folder}/critic --lora_dim 8 --lora_module_name q_proj,k_proj --only_optimize_lora "
            f"--data_path {data}/rm-static",
        )
    )
    run_line(
        alpaca_line(
            3,
            f"--data_output_path {folder}/tmp/ --actor_model_name_or_path {folder}/actor/ "
            f"--tokenizer_name_or_path {base} --critic_model_name_or_path {folder}/critic --actor_zero_stage 2 "
            "--critic_zero_stage 2 --num_padding_at_beginning 0 --per_device_train_batch_size 4 "
            "--per_device_mini_train_batch_size 4 --ppo_epochs 2 --actor_learning_rate 9.65e-6 "
            "--critic_learning_rate 5e-6 --gradient_accumulation_steps 1 --deepspeed --actor_lora_dim 8 "
            "--actor_lora_module_name q_proj --critic_lora_dim 8 --critic_lora_module_name q_proj,k_proj "
            f"--only_optimize_lora --output_dir {folder}/final --data_path {data}/rm-static --num_iterations 2",
        )
    )
    assert steps_of(folder / "final") == 2
    check_first_iteration(folder / "final")
    only_q = {f"model.layers.{n}.self_attn.q_proj.weight" for n in range(2)}
    assert changed(folder / "actor", folder / "final" / "actor") == only_q
