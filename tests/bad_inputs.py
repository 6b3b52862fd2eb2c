"""One table of bad inputs: what a user types, and what the one line says. It grows with every issue."""

from __future__ import annotations

import gzip
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

sys.path.append(str(Path(__file__).resolve().parents[1] / "inference"))

STEPS = {
    1: "training.step1_supervised_finetuning.main",
    2: "training.step2_reward_model_finetuning.main",
    "dpo": "training.step2_dpo_finetuning.main",
    3: "training.step3_rlhf_finetuning.main",
    "evaluate 1": "training.step1_supervised_finetuning.evaluate",
    "evaluate 2": "training.step2_reward_model_finetuning.evaluate",
    "evaluate dpo": "training.step2_dpo_finetuning.evaluate",
    "evaluate 3": "training.step3_rlhf_finetuning.evaluate",
    "generate": "generate",
}


class World(NamedTuple):
    """What a case may refer to."""

    model: Path
    reward: Path
    other_reward: Path
    data: Path
    tmp: Path


class Case(NamedTuple):
    """A bad input: the step, its arguments, and words that the error line must hold."""

    name: str
    step: int | str
    arguments: Callable[[World], list[str]]
    words: list[str]


def _write(path: Path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def _bytes(path: Path, data: bytes) -> str:
    path.write_bytes(data)
    return str(path)


def _twice(value: Path, *flags: str) -> list[str]:
    return [part for flag in flags for part in (flag, str(value))]


def _sft(w: World, *more: str) -> list[str]:
    return ["--model_name_or_path", str(w.model), "--output_dir", str(w.tmp / "out"), "--data_path", "demo", *more]


def _rl(w: World, *more: str) -> list[str]:
    roles = ["--actor_model_name_or_path", str(w.model), "--critic_model_name_or_path", str(w.reward)]
    return [*roles, "--output_dir", str(w.tmp / "out"), "--data_path", "demo", *more]


def _generate(w: World, *more: str) -> list[str]:
    return ["--model", f"one={w.model}", "--output", str(w.tmp / "a.jsonl"), "--data_path", "demo:8", *more]


def _their_reward_model(w: World) -> str:
    """As DeepSpeed-Chat saves one: it is known by its names, which lie in the pickle's text."""
    folder = Path(shutil.copytree(w.model, w.tmp / "theirs"))
    (folder / "model.safetensors").unlink()
    _bytes(folder / "pytorch_model.bin", b"\x80\x02}X rwtransformer.embed_tokens.weight")
    return str(folder)


def _with_statistics(w: World, text: str) -> str:
    folder = Path(_without_statistics(w))
    _write(folder / "reward_stats.json", text)
    return str(folder)


def _without_statistics(w: World) -> str:
    return str(shutil.copytree(w.reward, w.tmp / "reward", ignore=shutil.ignore_patterns("reward_stats.json")))


def _without(w: World, name: str = "model.safetensors", text: str = "") -> str:
    """A model whose folder lacks a file, or has another one in its place."""
    folder = Path(shutil.copytree(w.model, w.tmp / "damaged"))
    (folder / name).unlink(missing_ok=True)
    if text:
        _write(folder / name, text)
    return str(folder)


def _sharded(w: World, index: str) -> str:
    folder = Path(_without(w))
    _write(folder / "model.safetensors.index.json", index)
    return str(folder)


def _short_reward(w: World) -> str:
    folder = shutil.copytree(w.reward, w.tmp / "short")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    return str(folder)


def _more_tokens(w: World) -> str:
    folder = shutil.copytree(w.model, w.tmp / "more")
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        {"id": 5000, "content": "<|new|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return str(folder)


def _rows(w: World, *rows: dict) -> str:
    return _write(w.tmp / "rows.jsonl", "".join(json.dumps(r) + "\n" for r in rows))


def _finished(w: World, step: str, model: str = "") -> str:
    """A finished step's folder in a run of its own; its model lies in ``model``, or in the folder itself."""
    folder = w.tmp / "run" / step
    shutil.copytree(w.model, folder / model)
    _write(folder / "summary.json", json.dumps({"run_with": {"arguments": [], "folder": "."}}))
    return str(folder)


SUMMARY = "summary.json"
GOOD = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]}

CASES = [
    Case(
        "a named model without data",
        2,
        lambda w: ["--model_name_or_path", str(w.model), "--output_dir", str(w.tmp / "out")],
        ["--model_name_or_path", "name the data too, --data_path FILE"],
    ),
    Case("missing data", 1, lambda w: _sft(w, "--data_path", str(w.tmp / "no.jsonl")), ["no.jsonl"]),
    Case(
        "empty data",
        1,
        lambda w: _sft(w, "--data_path", _write(w.tmp / "empty.jsonl", "")),
        ["empty.jsonl", "0 rows read"],
    ),
    Case(
        "a row without its fields",
        1,
        lambda w: _sft(w, "--data_path", _rows(w, GOOD, {"messages": []})),
        ["rows.jsonl", "2"],
    ),
    Case("no preference columns", 2, lambda w: _sft(w, "--data_path", _rows(w, GOOD)), ["rows.jsonl", "no chosen"]),
    Case("a row without a pair, for DPO", "dpo", lambda w: _sft(w, "--data_path", _rows(w, GOOD)), ["no chosen"]),
    Case(
        "a prompt alone, for DPO",
        "dpo",
        lambda w: _sft(w, "--data_path", _rows(w, {"prompt": "Hi?"})),
        ["rows.jsonl", "no pairs to train on", "no chosen and rejected"],
    ),
    Case(
        "a reward model as DPO's policy and reference",
        "dpo",
        lambda w: ["--model_name_or_path", str(w.reward), "--output_dir", str(w.tmp / "out"), "--data_path", "demo:8"],
        ["--model_name_or_path", "a reward model that writes no answers"],
    ),
    Case(
        "a reward model where step 1 starts",
        1,
        lambda w: _sft(w, "--model_name_or_path", str(w.reward)),
        ["--model_name_or_path", "a reward model that writes no answers"],
    ),
    Case(
        "a reward model as actor",
        3,
        lambda w: _rl(w, "--actor_model_name_or_path", str(w.reward)),
        ["--actor_model_name_or_path", "a reward model that writes no answers"],
    ),
    Case("DPO without any step 1", "dpo", lambda w: ["--output_dir", str(w.tmp / "out")], ["has finished step 1"]),
    Case(
        "more ranks to a model than there are",
        1,
        lambda w: _sft(w, "--tensor_parallel", "2"),
        ["--tensor_parallel 2", "number of ranks, 1"],
    ),
    Case(
        "adapters on a model that ranks hold together",
        2,
        lambda w: _sft(w, "--tensor_parallel", "2", "--lora_dim", "4"),
        ["--tensor_parallel 2", "--lora_dim"],
    ),
    Case(
        "a critic's adapters on one",
        3,
        lambda w: _rl(w, "--tensor_parallel", "2", "--critic_lora_dim", "4"),
        ["--critic_lora_dim"],
    ),
    Case(
        "a user's own configuration of it",
        "dpo",
        lambda w: _sft(w, "--deepspeed_config", '{"tensor_parallel": {"autotp_size": 2}}'),
        ["use --tensor_parallel"],
    ),
    Case(
        "a reference that is no second model",
        "dpo",
        lambda w: _sft(w, "--zero_stage", "3", "--offload_reference_model", "--lora_dim", "4", "--only_optimize_lora"),
        ["--offload_reference_model", "no second model"],
    ),
    Case("a gamma for DPO", "dpo", lambda w: _sft(w, "--simpo_gamma", "1"), ["--simpo_gamma", "--loss sigmoid"]),
    Case("smoothing half and more", "dpo", lambda w: _sft(w, "--label_smoothing", "0.6"), ["at most 0.5"]),
    Case("beta 0", "dpo", lambda w: _sft(w, "--beta", "0"), ["--beta", "above 0"]),
    Case(
        "missing model", 1, lambda w: _sft(w)[2:] + ["--model_name_or_path", str(w.tmp / "none")], ["none", "no such"]
    ),
    Case(
        "missing gguf", 1, lambda w: _sft(w)[2:] + ["--model_name_or_path", "none.gguf"], ["none.gguf", "no such file"]
    ),
    *(
        Case(
            f"a model without weights in {step}",
            step,
            lambda w, flags=flags: flags(w, _without(w)),
            [f"{name} ", "damaged: the folder holds no weights (model.safetensors)"],
        )
        for step, name, flags in (
            (1, "--model_name_or_path", lambda w, model: [*_sft(w)[2:], "--model_name_or_path", model]),
            (2, "--model_name_or_path", lambda w, model: [*_sft(w)[2:], "--model_name_or_path", model]),
            ("dpo", "--model_name_or_path", lambda w, model: [*_sft(w)[2:], "--model_name_or_path", model]),
            (3, "--actor_model_name_or_path", lambda w, model: _rl(w, "--actor_model_name_or_path", model)),
            ("generate", "--model", lambda w, model: [*_generate(w)[2:], "--model", f"one={model}"]),
        )
    ),
    *(
        Case(
            f"a model with {text} as its index of weights",
            1,
            lambda w, text=text: [*_sft(w)[2:], "--model_name_or_path", _sharded(w, text)],
            words,
        )
        for text, words in (
            ('{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}', ["2 of its files", "1.safetensors among"]),
            ("{}", ["model.safetensors.index.json is damaged"]),
            ('{"weight_map": {"a": 3}}', ["model.safetensors.index.json is damaged"]),
            ("[]", ["model.safetensors.index.json is damaged"]),
            ("{", ["model.safetensors.index.json is not readable as JSON"]),
        )
    ),
    *(
        Case(
            f"a model with {text} as its {file}",
            1,
            lambda w, file=file, text=text: [*_sft(w)[2:], "--model_name_or_path", _without(w, file, text)],
            [word],
        )
        for file, text, word in (
            *(("tokenizer.json", text, "tokenizer.json is damaged: ") for text in ("{}", "[]", "null", "3", '"x"')),
            ("tokenizer.json", '{"added_tokens": 3}', "tokenizer.json is damaged: "),
            *(
                (f"{name}.json", text, f"{name}.json is damaged: it holds no JSON object")
                for name in ("config", "generation_config", "tokenizer_config", "special_tokens_map", "added_tokens")
                for text in ("[]", "null", "3")
            ),
            ("config.json", "{}", "its configuration can not be used: Unrecognized model"),
            ("config.json", '{"model_type": "llama", "hidden_size": "x"}', "'hidden_size' expected int, got str"),
            ("config.json", '{"model_type": "llama", "architectures": 3}', "architectures"),
            ("tokenizer_config.json", '{"eos_token": 3}', "TypeError: Special token eos_token has to be"),
            ("tokenizer_config.json", '{"tokenizer_class": []}', "no tokenizer can be loaded from it (TypeError"),
            ("tokenizer_config.json", '{"eos_token": "<|im_end|>", "model_max_length": "x"}', "no tokenizer can be"),
        )
    ),
    Case(
        "a page instead of a GGUF file",
        1,
        lambda w: [*_sft(w)[2:], "--model_name_or_path", _write(w.tmp / "a.gguf", "<html>")],
        ["a.gguf", "no GGUF file, or damaged"],
    ),
    Case(
        "a cut GGUF file",
        1,
        lambda w: [*_sft(w)[2:], "--model_name_or_path", _bytes(w.tmp / "a.gguf", b"GGUF" + bytes(40))],
        ["a.gguf", "can not be converted"],
    ),
    Case("empty folder as model", 2, lambda w: _sft(w)[2:] + ["--model_name_or_path", str(w.tmp)], ["no config.json"]),
    Case(
        "LoRA matches nothing",
        1,
        lambda w: _sft(w, "--lora_dim", "4", "--lora_module_name", "c_attn"),
        ["c_attn", "q_proj"],
    ),
    Case(
        "the critic's LoRA matches nothing",
        3,
        lambda w: _rl(w, "--critic_lora_dim", "4", "--critic_lora_module_name", "c_attn"),
        ["c_attn", "q_proj"],
    ),
    *(
        Case(
            f"one row and nothing to judge step {step} by",
            step,
            lambda w, start=start: start(w, "--data_path", _rows(w, {"prompt": "a", "chosen": "b", "rejected": "c"})),
            ["no row is held out", "--eval_data_path"],
        )
        for step, start in ((1, _sft), (2, _sft), (3, _rl))
    ),
    Case("unknown flag", 1, lambda w: _sft(w, "--learning_rates", "1"), ["--learning_rates", "--learning_rate"]),
    Case("unknown flag of step 3", 3, lambda w: _rl(w, "--ppo_epoch", "1"), ["--ppo_epoch", "--ppo_epochs"]),
    Case("a word for a number", 2, lambda w: _sft(w, "--learning_rate", "fast"), ["--learning_rate", "fast"]),
    Case("negative rate", 1, lambda w: _sft(w, "--learning_rate", "-1"), ["--learning_rate", "above 0"]),
    Case("a rate that is no number", 1, lambda w: _sft(w, "--learning_rate", "nan"), ["--learning_rate"]),
    Case("top_p out of range", 3, lambda w: _rl(w, "--top_p", "1.5"), ["--top_p", "at most 1"]),
    Case(
        "no interpreter for vLLM",
        3,
        lambda w: _rl(w, "--rollout_engine", "vllm", "--vllm_python", str(w.tmp / "python")),
        ["--vllm_python", "no such interpreter"],
    ),
    Case(
        "vLLM beside ranks that hold a model together",
        3,
        lambda w: _rl(w, "--rollout_engine", "vllm", "--tensor_parallel", "2"),
        ["--rollout_engine vllm", "--tensor_parallel"],
    ),
    Case(
        "vLLM processes that one rank does not have",
        3,
        lambda w: _rl(w, "--rollout_engine", "vllm", "--vllm_tensor_parallel", "2", "--plan"),
        ["--vllm_tensor_parallel 2", "does not divide the 1 ranks"],
    ),
    Case(
        "vLLM processes without vLLM",
        3,
        lambda w: _rl(w, "--vllm_tensor_parallel", "2"),
        ["--vllm_tensor_parallel", "--rollout_engine vllm"],
    ),
    Case(
        "an interpreter without vLLM",
        "generate",
        lambda w: _generate(w, "--rollout_engine", "vllm", "--vllm_python", sys.executable),
        ["has no vLLM", "make setup-vllm"],
    ),
    Case(
        "an interpreter that nothing uses",
        3,
        lambda w: _rl(w, "--vllm_python", sys.executable),
        ["--vllm_python", "--rollout_engine vllm"],
    ),
    Case("unknown choice", 1, lambda w: _sft(w, "--zero_stage", "4"), ["--zero_stage", "4"]),
    Case("fp16 on a CPU", 1, lambda w: _sft(w, "--dtype", "fp16"), ["fp16", "bf16"]),
    Case(
        "rows on more ranks than there are",
        1,
        lambda w: _sft(w, "--sequence_parallel", "2"),
        ["--sequence_parallel 2", "number of ranks, 1"],
    ),
    Case(
        "rows and models divided",
        2,
        lambda w: _sft(w, "--sequence_parallel", "2", "--tensor_parallel", "2"),
        ["--sequence_parallel", "--tensor_parallel", "do not go together"],
    ),
    Case(
        "rollouts in pieces",
        3,
        lambda w: _rl(w, "--sequence_parallel", "2"),
        ["--sequence_parallel", "can not be had here", "padded on the left"],
    ),
    Case("longer than the positions", 1, lambda w: _sft(w, "--max_seq_len", "4096"), ["--max_seq_len", "4096", "512"]),
    Case(
        "responses longer than the positions",
        3,
        lambda w: _rl(w, "--max_answer_seq_len", "4096"),
        ["--max_answer_seq_len", "512"],
    ),
    Case(
        "training batch does not divide",
        3,
        lambda w: _rl(w, "--per_device_generation_batch_size", "6", "--per_device_training_batch_size", "4"),
        ["6", "--per_device_training_batch_size 4"],
    ),
    Case(
        "accumulation does not divide",
        3,
        lambda w: _rl(w, "--gradient_accumulation_steps", "3"),
        ["--gradient_accumulation_steps 3"],
    ),
    Case(
        "samples do not divide",
        3,
        lambda w: _rl(w, "--samples_per_prompt", "3"),
        ["--samples_per_prompt 3"],
    ),
    Case("one answer has no siblings", 3, lambda w: _rl(w, "--advantage", "rloo"), ["rloo", "--samples_per_prompt"]),
    Case("unknown advantage", 3, lambda w: _rl(w, "--advantage", "ppo"), ["--advantage", "gae"]),
    Case(
        "nothing to merge",
        3,
        lambda w: _rl(w, "--merge_lora_for_generation"),
        ["--merge_lora_for_generation", "--actor_lora_dim"],
    ),
    Case(
        "a reward model whose tokenizer is not its own",
        3,
        lambda w: _rl(w)[:2] + ["--critic_model_name_or_path", str(w.other_reward)],
        ["tokenizer has ids above", "embeddings"],
    ),
    Case(
        "no reward at all",
        3,
        lambda w: _rl(w)[:2] + ["--critic_model_name_or_path", "none"],
        ["--critic_model_name_or_path none", "--reward_function"],
    ),
    Case(
        "a weight for a reward model that is left out",
        3,
        lambda w: [
            *(*_rl(w)[:2], "--critic_model_name_or_path", "none", "--reward_function"),
            *(_write(w.tmp / "f.py", "def f(p, r, x): return []") + ":f", "model=2"),
        ],
        ["--reward_function model=2", "--critic_model_name_or_path none"],
    ),
    Case(
        "a reward function that is not there in a folder with an equals sign",
        3,
        lambda w: _rl(w, "--reward_function", "runs/lr=1e-5/rules.py:f"),
        ["--reward_function runs/lr=1e-5/rules.py:f", "no such file"],
    ),
    Case(
        "a weight that is no number",
        3,
        lambda w: _rl(w, "--reward_function", _write(w.tmp / "f.py", "def f(p, r, x): return []") + ":f=much"),
        ["--reward_function", "much", "no number"],
    ),
    Case(
        "a weight of nothing", 3, lambda w: _rl(w, "--reward_function", "model=0"), ["--reward_function", "weight of 0"]
    ),
    Case(
        "two weights for the reward model",
        3,
        lambda w: _rl(w, "--reward_function", "model=0.5", "model=2"),
        ["--reward_function model=0.5 model=2", "once"],
    ),
    Case(
        "a reward function that is not there",
        3,
        lambda w: _rl(w, "--reward_function", "rules.py:f"),
        ["--reward_function rules.py:f", "no such file"],
    ),
    Case(
        "a reward function whose file fails",
        3,
        lambda w: _rl(w, "--reward_function", _write(w.tmp / "f.py", "import unheard_of") + ":f"),
        ["--reward_function", "ModuleNotFoundError", "unheard_of"],
    ),
    Case(
        "three schedules for two roles",
        3,
        lambda w: _rl(w, "--lr_scheduler_type", "cosine", "linear", "constant"),
        ["--lr_scheduler_type", "the actor's and the critic's"],
    ),
    Case("unknown schedule", 1, lambda w: _sft(w, "--lr_scheduler_type", "sine"), ["--lr_scheduler_type", "cosine"]),
    Case("a size without its unit", 1, lambda w: _sft(w, "--max_shard_size", "5"), ["--max_shard_size", "5GB"]),
    Case("wandb that is not installed", 1, lambda w: _sft(w, "--report_to", "wandb"), ["wandb", "pip install"]),
    Case("resume from nowhere", 1, lambda w: _sft(w, "--resume", str(w.tmp / "none")), ["--resume", "none"]),
    Case(
        "no reward statistics",
        3,
        lambda w: _rl(w)[:2] + ["--critic_model_name_or_path", _without_statistics(w)],
        ["reward_stats.json", "--no-normalize_reward"],
    ),
    *(
        Case(
            f"reward statistics with {name}",
            3,
            lambda w, text=text: [*_rl(w)[:2], "--critic_model_name_or_path", _with_statistics(w, text)],
            ["reward_stats.json", "--no-normalize_reward"],
        )
        for name, text in (
            ("a mean of 400 digits", '{"mean": 1' + "0" * 400 + ', "std": 1, "count": 8, "dtype": "fp32"}'),
            ("a std of 5000 digits", '{"mean": 0, "std": ' + "9" * 5000 + ', "count": 8, "dtype": "fp32"}'),
            ("no number of them", '{"mean": 0, "std": 1, "count": Infinity, "dtype": "fp32"}'),
            ("a mean that is no number", '{"mean": NaN, "std": 1, "count": 8, "dtype": "fp32"}'),
            ("an infinite part", '{"mean": 0, "std": 1, "count": 8, "dtype": "fp32", "std_all": Infinity}'),
            ("a list in their place", "[]"),
            ("nothing in their place", "null"),
            ("too many brackets", "[" * 100_000),
        )
    ),
    Case(
        "a language model as reward model",
        3,
        lambda w: _rl(w, "--no-normalize_reward", "--critic_model_name_or_path", str(w.model)),
        ["a language model without a reward head"],
    ),
    Case(
        "a tokenizer with more tokens than the model",
        3,
        lambda w: _rl(w, "--tokenizer_name_or_path", _more_tokens(w)),
        ["ids above the model's"],
    ),
    Case(
        "a reward model with fewer positions",
        3,
        lambda w: _rl(
            w, "--critic_model_name_or_path", _short_reward(w), "--advantage", "rloo", "--samples_per_prompt", "2"
        ),
        ["--max_prompt_seq_len + --max_answer_seq_len", "positions for 64"],
    ),  # fmt: skip
    Case(
        "LoRA alone without LoRA", 1, lambda w: _sft(w, "--only_optimize_lora"), ["--only_optimize_lora", "--lora_dim"]
    ),
    Case(
        "a reward model of DeepSpeed-Chat",
        3,
        lambda w: _rl(w)[:2] + ["--critic_model_name_or_path", _their_reward_model(w)],
        ["--critic_model_name_or_path", "python -m training.migrate.reward_model --path"],
    ),
    Case("4 bits without adapters", 1, lambda w: _sft(w, "--base_bits", "4"), ["--base_bits", "--lora_dim"]),
    Case(
        "4 bits where more than adapters would train",
        "dpo",
        lambda w: _sft(w, "--base_bits", "4", "--lora_dim", "4"),
        ["--base_bits 4", "--only_optimize_lora"],
    ),
    Case(
        "another number of bits",
        2,
        lambda w: _sft(w, "--base_bits", "8", "--lora_dim", "4", "--only_optimize_lora"),
        ["--base_bits", "8", "choose from 0, 4"],
    ),
    Case(
        "4 bits without adapters in PPO", 3, lambda w: _rl(w, "--base_bits", "4"), ["--base_bits", "--actor_lora_dim"]
    ),
    Case(
        "adapters merged into 4 bits",
        3,
        lambda w: _rl(
            w, "--base_bits", "4", "--actor_lora_dim", "4", "--only_optimize_lora", "--merge_lora_for_generation"
        ),
        ["--merge_lora_for_generation", "--base_bits 4"],
    ),
    Case("a scale without adapters", 2, lambda w: _sft(w, "--lora_alpha", "4"), ["--lora_alpha", "--lora_dim"]),
    Case(
        "a learning rate of no adapters",
        3,
        lambda w: _rl(w, "--actor_lora_dim", "4", "--critic_lora_learning_rate", "1e-3"),
        ["--critic_lora_learning_rate", "--critic_lora_dim"],
    ),
    Case(
        "dropout in PPO",
        3,
        lambda w: _rl(w, "--actor_lora_dim", "4", "--lora_dropout", "0.1"),
        ["--lora_dropout", "ratio would not be 1"],
    ),
    Case(
        "adapters alone without adapters",
        3,
        lambda w: _rl(w, "--only_optimize_lora"),
        ["--only_optimize_lora", "--actor_lora_dim"],
    ),
    Case(
        "offload of what is not sharded",
        3,
        lambda w: _rl(w, "--offload_reward_model", "--actor_zero_stage", "3"),
        ["--offload_reward_model", "--critic_zero_stage 3"],
    ),
    Case("an infinite weight", 3, lambda w: _rl(w, "--kl_coef", "inf"), ["--kl_coef is inf", "finite"]),
    Case("a wait of ages", 1, lambda w: _sft(w, "--distributed_timeout", "9" * 15), ["_timeout is 9", "at most"]),
    Case("a seed beyond 32 bits", 2, lambda w: _sft(w, "--seed", "9" * 23), ["--seed", "at most 4294967295"]),
    Case(
        "no such evaluation function", 3, lambda w: _rl(w, "--eval_function", "no.py:f"), ["--eval_function", "no.py"]
    ),
    Case(
        "a file without the function",
        3,
        lambda w: _rl(w, "--eval_function", _write(w.tmp / "f.py", "x = 1") + ":g"),
        ["no function g"],
    ),
    Case(
        "a precision in the DeepSpeed JSON",
        1,
        lambda w: _sft(w, "--deepspeed_config", _write(w.tmp / "ds.json", '{"bf16": {"enabled": true}}')),
        ["bf16.enabled", "--dtype"],
    ),
    *(
        Case(
            f"DeepSpeed JSON with {text}",
            1,
            lambda w, text=text: _sft(w, "--deepspeed_config", _write(w.tmp / "ds.json", text)),
            words,
        )
        for text, words in (
            ('{"zero_optimization": {"stage": "two"}}', ["--deepspeed_config", "stage"]),
            ('{"zero_optimization": {"no_such": 1}}', ["--deepspeed_config", "no_such"]),
            ('{"zero_optimization": []}', ["--deepspeed_config", "list"]),
            ('{"gradient_clipping": "x"}', ["--deepspeed_config", "gradient_clipping"]),
            ('{"zero_optimisation": {"stage": 2}}', ["--deepspeed_config", "zero_optimisation"]),
        )
    ),
    *(
        Case(
            f"DeepSpeed JSON that is {name}",
            1,
            lambda w, text=text: _sft(w, "--deepspeed_config", _write(w.tmp / "ds.json", text)),
            ["--deepspeed_config", "ds.json", words],
        )
        for name, text, words in (
            ("one key twice", '{"gradient_clipping": 1.0, "gradient_clipping": 2.0}', "gradient_clipping stands twice"),
            ("a nested key twice", '{"zero_optimization": {"a": 1, "b": 2, "a": 3}}', "a stands twice in one object"),
            ("a number without an end", '{"gradient_clipping": ' + "9" * 5000 + "}", "digits"),
            ("nested too deeply", '{"a": ' * 100_000, "recursion"),
        )
    ),
    *(
        Case(
            f"states on NVMe, which no checkpoint of step {step} holds",
            step,
            lambda w, base=base: base(
                w, "--deepspeed_config", '{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}'
            ),
            ["--deepspeed_config", "NVMe", "--save_every 0"],
        )
        for step, base in ((1, _sft), (2, _sft), ("dpo", _sft), (3, _rl))
    ),
    Case(
        "a moving average of weights on NVMe",
        3,
        lambda w: _rl(
            w,
            "--enable_ema",
            "--save_every",
            "0",
            "--deepspeed_config",
            '{"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}',
        ),
        ["--enable_ema", "NVMe", "--offload"],
    ),
    Case("DeepSpeed JSON missing", 1, lambda w: _sft(w, "--deepspeed_config", "no.json"), ["no.json"]),
    Case(
        "DeepSpeed JSON broken",
        1,
        lambda w: _sft(w, "--deepspeed_config", _write(w.tmp / "ds.json", '{"a": ')),
        ["ds.json", "line 1"],
    ),
    Case(
        "DeepSpeed JSON sets what is ours",
        1,
        lambda w: _sft(w, "--deepspeed_config", _write(w.tmp / "ds.json", '{"train_batch_size": 8}')),
        ["train_batch_size", "own flags for batch sizes"],
    ),
    Case(
        "unwritable output",
        1,
        lambda w: _sft(w, "--output_dir", _write(w.tmp / "file", "") + "/x"),
        ["--output_dir", "file"],
    ),
    Case(
        "the model itself as output",
        1,
        lambda w: _sft(w, *_twice(shutil.copytree(w.model, w.tmp / "base"), "--model_name_or_path", "--output_dir")),
        ["--output_dir", "base holds config.json", "write over", "another folder"],
    ),
    Case(
        "the actor within the output",
        3,
        lambda w: _rl(
            w,
            "--actor_model_name_or_path",
            str(shutil.copytree(w.model, w.tmp / "p" / "actor")),
            "--output_dir",
            str(w.tmp / "p"),
        ),
        ["--output_dir", "holds actor/config.json", "write over"],
    ),
    Case(
        "a project as output",
        2,
        lambda w: _sft(w, "--output_dir", str(Path(_write(w.tmp / "README.md", "mine")).parent)),
        ["--output_dir", "holds README.md", "write over"],
    ),
    Case("no source behind the flag", 2, lambda w: _sft(w, "--eval_data_path"), ["--eval_data_path", "at least one"]),
    Case("an empty source", 2, lambda w: _sft(w, "--eval_data_path", ""), ["--eval_data_path: an empty value"]),
    Case(
        "finished output",
        1,
        lambda w: _sft(w, "--output_dir", str(Path(_write(w.tmp / "summary.json", "{}")).parent)),
        ["already holds a finished run"],
    ),
    Case(
        "step 2 before step 1",
        2,
        lambda w: ["--output_dir", str(w.tmp / "out")],
        ["step 1", "step1_supervised_finetuning"],
    ),
    Case(
        "step 3 before step 1",
        3,
        lambda w: ["--output_dir", str(w.tmp / "out")],
        ["step 1", "step1_supervised_finetuning"],
    ),
    Case(
        "half a gzip",
        1,
        lambda w: _sft(w, "--data_path", _bytes(w.tmp / "a.jsonl.gz", gzip.compress(b'{"text": "a"}' * 999)[:30])),
        ["a.jsonl.gz", "cut off or damaged"],
    ),
    Case(
        "another separator",
        2,
        lambda w: _sft(w, "--data_path", _write(w.tmp / "a.csv", "prompt;chosen;rejected\na;b;c\n")),
        ["a.csv:1", "semicolons, not commas"],
    ),
    Case(
        "UTF-16",
        3,
        lambda w: _rl(w, "--data_path", _bytes(w.tmp / "a.jsonl", '{"prompt": "a"}'.encode("utf-16"))),
        ["a.jsonl", "UTF-16"],
    ),
    Case(
        "a column map of no format",
        1,
        lambda w: _sft(w, "--column_map", "promt=question"),
        ["--column_map", "did you mean prompt"],
    ),
    Case(
        "a template that loses a turn",
        1,
        lambda w: _sft(w, "--chat_template", _write(w.tmp / "a.jinja", "{{ messages[-1].content }}<|im_end|>")),
        ["loses the user turn"],
    ),
    Case(
        "a conversation template that is cut off",
        1,
        lambda w: _sft(w, "--chat_template", _write(w.tmp / "a.json", '{"chat_template": "x", ')),
        ["--chat_template", "a.json", "broken JSON in line 1"],
    ),
    Case(
        "a stop id that stands inside texts",
        1,
        lambda w: _sft(w, "--stop_ids", "70"),
        ["stop id 70", "inside texts"],
    ),
    Case(
        "a name for the user's own files",
        1,
        lambda w: _sft(w, "--sft_only_data_path", "MultiTurnAlpaca"),
        ["MultiTurnAlpaca", "give the path of the folder"],
    ),
    Case(
        "evaluation before step 1",
        "evaluate 1",
        lambda w: [],
        ["no run", "step 1", "step1_supervised_finetuning"],
    ),
    Case(
        "evaluation of nothing", "evaluate 2", lambda w: ["--path", str(w.tmp / "none")], ["--path", "no such folder"]
    ),
    Case(
        "evaluation of a step that has not finished", "evaluate 2", lambda w: ["--path", str(w.data)], ["not finished"]
    ),
    Case(
        "evaluation without the base model's name",
        "evaluate 1",
        lambda w: ["--path", _finished(w, "step1")],
        ["--base_model_name_or_path"],
    ),
    *(
        Case(
            f"a summary that is {text[:9]}",
            "evaluate 1",
            lambda w, text=text: ["--path", str(Path(_write(Path(_finished(w, "step1")) / SUMMARY, text)).parent)],
            ["summary.json", words],
        )
        for text, words in (("[]", "is damaged"), ("{", "not readable as JSON"), ("[" * 100_000, "not readable"))
    ),
    Case("best of no number", "evaluate 3", lambda w: ["--best_of", "1,four"], ["--best_of", "1,4,16"]),
    Case("best of numbers that do not divide", "evaluate 3", lambda w: ["--best_of", "3,16"], ["--best_of", "3"]),
    Case(
        "evaluation without the SFT model",
        "evaluate 3",
        lambda w: ["--path", _finished(w, "step3", "actor")],
        ["--sft_model_name_or_path"],
    ),
    Case(
        "evaluation without any reward",
        "evaluate 3",
        lambda w: [
            *("--path", _finished(w, "step3", "actor"), "--sft_model_name_or_path", str(w.model)),
            *("--reward_model_name_or_path", "none"),
        ],
        ["--reward_model_name_or_path none", "--reward_function"],
    ),
    Case(
        "a judge that is not there",
        "evaluate 3",
        lambda w: [
            *("--path", _finished(w, "step3", "actor"), "--sft_model_name_or_path", str(w.model)),
            *("--reward_model_name_or_path", str(w.reward), "--judge_model_name_or_path", str(w.tmp / "judge")),
        ],
        ["--judge_model_name_or_path", "no such"],
    ),
    Case(
        "evaluation rules that are not there",
        "evaluate 3",
        lambda w: ["--path", _finished(w, "step3", "actor"), "--eval_function", "rules.py:f"],
        ["--eval_function", "rules.py"],
    ),
    Case(
        "evaluation by a reward model whose tokenizer is not its own",
        "evaluate 3",
        lambda w: [
            *("--path", _finished(w, "step3", "actor"), "--sft_model_name_or_path", str(w.model)),
            *("--reward_model_name_or_path", str(w.other_reward)),
        ],
        ["tokenizer has ids above", "embeddings"],
    ),
    Case(
        "evaluation data missing",
        "evaluate 2",
        lambda w: ["--path", _finished(w, "step2"), "--data_path", str(w.tmp / "no.jsonl")],
        ["no.jsonl"],
    ),
    Case("models of one name", "generate", lambda w: _generate(w, "--model", f"one={w.model}"), ["called one"]),
    Case("answers by a reward model", "generate", lambda w: _generate(w, f"--model={w.reward}"), ["writes no answers"]),
    Case("answers by nothing", "generate", lambda w: _generate(w, "--model", "a="), ["--model 'a='", "NAME=PATH"]),
    Case(
        "answers of one's own model to nothing",
        "generate",
        lambda w: ["--model", str(w.model), "--output", str(w.tmp / "a.jsonl")],
        ["--model", "name the data too"],
    ),
    Case("the best by nothing", "generate", lambda w: _generate(w, "--best_of", "4"), ["--best_of", "--reward_model"]),
    Case(
        "two numbers of answers",
        "generate",
        lambda w: _generate(w, "--best_of", "4", "--samples_per_prompt", "2", "--reward_model", str(w.reward)),
        ["--best_of", "leave --samples_per_prompt out"],
    ),
    Case("the same answer again", "generate", lambda w: _generate(w, "--temperature", "0"), ["--samples_per_prompt 1"]),
    Case(
        "the best by a language model",
        "generate",
        lambda w: _generate(w, "--best_of", "2", "--reward_model", str(w.model)),
        ["without a reward head"],
    ),
    Case(
        "the best by a weight alone",
        "generate",
        lambda w: _generate(w, "--best_of", "2", "--reward_function", "model=2"),
        ["--reward_function model=2"],
    ),
    Case(
        "answers longer than the positions",
        "generate",
        lambda w: _generate(w, "--max_answer_seq_len", "4096"),
        ["--max_prompt_seq_len + --max_answer_seq_len", "512"],
    ),
    Case(
        "answers into a file of something else",
        "generate",
        lambda w: _generate(w, "--output", _write(w.tmp / "mine.jsonl", "mine")),
        ["--output", "there is such a file"],
    ),
    Case(
        "answers into a folder that can not be made",
        "generate",
        lambda w: _generate(w, "--output", _write(w.tmp / "file", "") + "/x/a.jsonl"),
        ["--output", "can not be made"],
    ),
    Case(
        "prompts that are none",
        "generate",
        lambda w: _generate(w, "--data_path", _rows(w, {"text": "a"})),
        ["no prompt"],
    ),
]
