"""Builds tiny models that answer in milliseconds; some of them say what a test wants to hear."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TEXT = [
    "the quick brown fox jumps over the lazy dog while the sun shines on a small red house by the sea",
    "tell me a short story about a keeper of bees and a lost key user assistant system hello world",
    "<script>alert('x')</script> <img src=x onerror=alert(1)> 0123456789 Why? Yes! No, thanks: äöü €",
]


def make_tokenizer(vocab_size: int = 400) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a few lines; every text can be encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT * 20, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    fast.chat_template = CHATML
    return fast


def make_config(tokenizer: PreTrainedTokenizerFast, **changes: object) -> LlamaConfig:
    """Two layers, 32 wide, and weights large enough that the next token depends on the text."""
    settings: dict[str, object] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    return LlamaConfig(**(settings | changes))


def save_chat_model(folder: Path, seed: int, *, vocab_size: int = 400, **changes: object) -> Path:
    """A tiny causal LM as the steps save one: weights, tokenizer with template, generation config."""
    tokenizer = make_tokenizer(vocab_size)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(make_config(tokenizer, **changes))
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_parrot(folder: Path, sentence: str, *, then_stop: bool = True, one_token: bool = False) -> Path:
    """A model that answers every prompt with ``sentence``: after a token, the next one of the sentence.

    Only the last token matters to it. The sentence's tokens must differ from each other, and the newline that
    ends the generation prompt must not be among them. ``one_token`` makes the whole sentence one token.
    """
    tokenizer = make_tokenizer()
    if one_token:
        tokenizer.add_tokens([sentence, "<unused>"])  # two, because rotary embeddings want an even width
    newline = tokenizer.encode("\n", add_special_tokens=False)[-1]
    chain = [newline, *tokenizer.encode(sentence, add_special_tokens=False)]
    assert len(set(chain)) == len(chain), "a token comes twice"
    chain.append(tokenizer.eos_token_id if then_stop else chain[1])
    size = len(tokenizer)
    config = make_config(tokenizer, hidden_size=size, num_attention_heads=1, num_key_value_heads=1, num_hidden_layers=1,
                         head_dim=size, intermediate_size=4)  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.fill_(1.0)
        model.model.embed_tokens.weight.copy_(torch.eye(size))  # layers of zeros pass it on unchanged
        for token, following in zip(chain, chain[1:], strict=False):
            model.lm_head.weight[following, token] = 30.0
    model.generation_config = GenerationConfig(
        eos_token_id=[tokenizer.eos_token_id], pad_token_id=tokenizer.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_reward_model(folder: Path, seed: int) -> Path:
    """A tiny reward model in step 2's layout, without ``reward_stats.json``."""
    tokenizer = make_tokenizer()
    torch.manual_seed(seed)
    LlamaForSequenceClassification(make_config(tokenizer, num_labels=1)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def save_adapter(folder: Path, base: Path, seed: int) -> Path:
    """A LoRA adapter on ``base`` whose weights are not zero, so that it changes answers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(folder)
    return folder
