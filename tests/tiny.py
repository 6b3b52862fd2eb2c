"""Builds the tiny models of the tests: random weights large enough that a wrong mask shows in the log-probs."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
VOCABULARY = 400
DEMO = Path(__file__).resolve().parents[1] / "training" / "data" / "demo"


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 400 tokens trained on the demo prompts; pad is EOS."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((DEMO / "prompts.jsonl").read_text(encoding="utf-8").splitlines(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = CHATML
    return fast


def save_tiny_model(folder: Path, *, tie: bool = True, seed: int = 0, head_width: int = 8) -> Path:
    """Save a two-layer Llama (fp32, weights of standard deviation 0.3) with its tokenizer."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=head_width,
        max_position_embeddings=512,
        initializer_range=0.3,
        tie_word_embeddings=tie,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def step3_flags(model: Path, data: Path, folder: Path, *more: str) -> list[str]:
    """Flags of step 3 for two iterations from the tiny model on the tiny data."""
    return [
        *("--actor_model_name_or_path", str(model), "--output_dir", str(folder), "--dtype", "fp32"),
        *("--data_path", str(data / "prompts.jsonl"), "--eval_data_path", str(data / "held_out.jsonl")),
        *("--per_device_generation_batch_size", "4", "--per_device_training_batch_size", "2"),
        *("--max_prompt_seq_len", "128", "--max_answer_seq_len", "6", "--num_iterations", "2"),
        *("--report_to", "none", *more),
    ]
