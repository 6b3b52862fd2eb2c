"""Tokenizers: with a chat template, a pad token that no text contains, and ids that fit their model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from training.utils.data.template import configure_chat_template, stop_token_ids
from training.utils.errors import UserError
from training.utils.model.loading import load_config, reason_of, remote_code

UNUSUAL_TEXT = "\u2603 \u0f3a \U0001f9ff \u4e2d \u0627 \x07"  # what only byte fallback knows


def load_tokenizer(
    path: str, *, chat_template: str = "", system_message: str = "", stop_ids: Sequence[int] = (), named: str = ""
) -> PreTrainedTokenizerBase:
    """Load a tokenizer with a chat template and a pad token, see `_choose_pad_token`.

    Args:
        chat_template: a file or a name; the tokenizer's own, or the project's default, when empty.
        named: what the user has called it, for messages; ``path`` when empty.

    Raises:
        UserError: no tokenizer there, no EOS token or not the model's, or a template that can not be used.
    """
    tokenizer = read_tokenizer(path, named)
    if tokenizer.eos_token_id is None:
        raise UserError(f"{named or path}: the tokenizer has no EOS token, so a model could never stop")
    _check_vocabulary_alone(tokenizer, Path(path), named or path)
    configure_chat_template(tokenizer, chat_template, system_message, stop_ids)
    _choose_pad_token(tokenizer)
    return tokenizer


def read_tokenizer(path: str, named: str = "") -> PreTrainedTokenizerBase:
    """A tokenizer as its files have it.

    Args:
        named: what the user has called it, for messages; ``path`` when empty.

    Raises:
        UserError: no tokenizer there, or its files are damaged.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **remote_code())
        tokenizer(UNUSUAL_TEXT)  # some settings of a wrong kind show at the first use only
    except MemoryError:
        raise
    except Exception as error:  # the Rust library raises plain ones, and Python's stumble over damaged files anyhow
        if (Path(path) / "config.json").is_file():
            load_config(path, named)  # read along with the tokenizer; it may be what is wrong
        kind = type(error).__name__
        why = _damage(Path(path) / "tokenizer.json") or (
            kind if isinstance(error, OSError) else f"{kind}: {reason_of(error)}"
        )
        raise UserError(f"{named or path}: no tokenizer can be loaded from it ({why})") from error
    return tokenizer


def _check_vocabulary_alone(tokenizer: PreTrainedTokenizerBase, folder: Path, named: str) -> None:
    """Refuse another EOS than the model's where a vocabulary is all that was saved, as DeepSpeed-Chat does.

    Raises:
        UserError: transformers took the family's usual special tokens, which are not the model's.
    """
    names = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model")
    if not (folder / "vocab.json").is_file() or any((folder / name).is_file() for name in names):
        return
    found = load_config(str(folder), named).eos_token_id
    ends = found if isinstance(found, list) else [found]
    if found is not None and tokenizer.eos_token_id not in ends:
        raise UserError(
            f"{named}: without tokenizer_config.json its EOS is taken for {tokenizer.eos_token!r} (id "
            f"{tokenizer.eos_token_id}), the model's is id {ends[0]}: copy the tokenizer files of the model it was "
            "made from into the folder"
        )


def _damage(file: Path) -> str:
    """What is wrong with a ``tokenizer.json``; empty if it can be read, or is not there."""
    try:
        if file.is_file():
            Tokenizer.from_file(str(file))
    except Exception as error:
        return f"{file.name} is damaged: {error}"
    return ""


def _choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token that is never part of a text, and if it can be had none that ends a row.

    Training does not need it (padding is an explicit mask), but plain transformers finds the end of a
    row of a reward model by looking for the last token that is not pad. A token that occurs in text must never become
    special: texts would lose it when they are decoded. So: an added special token called padding; the unknown token
    where no text gives it; an added special token that the template does not use; the beginning-of-sequence token,
    which starts rows and so never ends one; else the end token itself.
    """
    ends = set(stop_token_ids(tokenizer))
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in ends:
        return
    template, named = str(tokenizer.chat_template or ""), {tokenizer.bos_token, tokenizer.unk_token}
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    free = [name for name in added if name not in template and name not in named]
    padding = [name for name in free if "pad" in name.lower()]
    unknown = [tokenizer.unk_token] if tokenizer.unk_token_id not in tokenizer(UNUSUAL_TEXT)["input_ids"] else []
    for candidate in (*padding, *unknown, *free, tokenizer.bos_token):
        if candidate is not None and tokenizer.convert_tokens_to_ids(candidate) not in ends:
            tokenizer.pad_token = candidate
            return
    tokenizer.pad_token = tokenizer.eos_token


def end_ids(tokenizer: PreTrainedTokenizerBase, generation: Any, named: str) -> list[int]:
    """The tokens that end a model's answer: the tokenizer's and its template's, and those of its generation settings.

    What the steps save has the same in both; other models name some of them in one place alone.

    Args:
        generation: the model's ``generation_config``; None where it has none.

    Raises:
        UserError: the settings name something else than tokens.
    """
    eos = getattr(generation, "eos_token_id", None)
    ends = [] if eos is None else [eos] if isinstance(eos, int) else eos
    if not isinstance(ends, list) or not all(isinstance(end, int) for end in ends):
        raise UserError(f"{named}: generation_config.json is damaged: eos_token_id is {eos}")
    return list(dict.fromkeys([*stop_token_ids(tokenizer), *ends]))


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every text the same ids under the same chat template."""
    probe = "Hello, wörld! 12 345\n\tdef f(x): return x"
    return (
        a.get_vocab() == b.get_vocab()
        and a(probe, add_special_tokens=False)["input_ids"] == b(probe, add_special_tokens=False)["input_ids"]
        and a.chat_template == b.chat_template
    )


def check_vocabulary(model_path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer with ids that the model has no embeddings for.

    Raises:
        UserError: names the model.
    """
    rows = getattr(load_config(model_path).get_text_config(), "vocab_size", None)
    if rows is not None and max(tokenizer.get_vocab().values(), default=0) >= rows:
        raise UserError(
            f"{model_path}: the tokenizer has ids above the model's {rows} embeddings; they do not belong together"
        )
