"""What makes a run the same run: flags, inputs and versions, compared when a checkpoint is taken up."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import training
from training.utils.arguments import default_of
from training.utils.checkpoint.digests import CONVERTED_FROM, file_digest
from training.utils.engine.zero_config import MAX_GRAD_NORM, user_config
from training.utils.errors import UserError
from training.utils.run.distributed import data_size, say, world_size

# Flags that change where and how a run is watched, and nothing in its result
FREE = frozenset({
    "output_dir", "report_to", "data_output_path", "save_every", "keep_last", "resume",
    "distributed_timeout", "hang_timeout", "max_shard_size", "plan", "trace", "vllm_python",
})  # fmt: skip
# Flags under which the same mathematics is summed up in another order: a run goes on, not bit for bit
ROUNDING = frozenset({
    "zero_stage", "actor_zero_stage", "critic_zero_stage", "offload", "offload_reference_model", "offload_reward_model",
    "gradient_checkpointing", "actor_gradient_checkpointing", "critic_gradient_checkpointing", "deepspeed_config",
    "attn_implementation", "per_device_eval_batch_size", "tensor_parallel", "sequence_parallel",
    "vllm_tensor_parallel", "per_device_scoring_batch_size",
})  # fmt: skip
# Of --deepspeed_config, which is compared by what it says: what changes the result nevertheless, as it is without
DEEPSPEED_RESULT = {"gradient_clipping": MAX_GRAD_NORM, "fp16": None}
# Compared by what they lead to: models and data by content, batches by the rows of an optimizer step
BY_CONTENT = frozenset({
    "model_name_or_path", "actor_model_name_or_path", "critic_model_name_or_path", "tokenizer_name_or_path",
    "data_path", "eval_data_path", "sft_only_data_path", "unsupervised_data_path",
})  # fmt: skip
# Compared by what the files are called: what a function does is compared with the models, or judged anew where it only
# evaluates, what a template does shows in the rows
NAMED_FILES = frozenset({"reward_function", "eval_function", "chat_template"})
BATCH = frozenset({
    "per_device_train_batch_size", "per_device_training_batch_size", "per_device_generation_batch_size",
    "generation_batches", "gradient_accumulation_steps",
})  # fmt: skip
# Which flags rows come from: the first that is given
ROWS_FROM = {
    "training": ("data_path", "sft_only_data_path"),
    "held-out": ("eval_data_path", "data_path"),
    "pre-training": ("unsupervised_data_path",),
}
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "tokenizers", "datasets")
# What of a model's folder decides a run's result, besides its weights. generation_config.json does not: answers are
# decoded by the run's own flags, and end where the tokenizer and the template say.
MODEL_FILES = (
    "config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
    "tokenizer.model", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "reward_stats.json",
)  # fmt: skip
FINGERPRINTS = 4  # how models and rows are hashed; those of another number can not be compared
_BATCH_ROWS = 1000


def describe(
    step: str, groups: Sequence[Any], models: Mapping[str, str], data: Mapping[str, Any], batches: Mapping[str, int]
) -> dict[str, Any]:
    """A run as JSON, to be compared by `refuse_other_run`, `refuse_other_ranks` and `inexact_because`.

    Args:
        models: flag -> folder or hub name of what the run starts from.
        data: name -> dataset.
        batches: what an optimizer step (step 3: an iteration) consists of over all ranks.
    """
    fields = [(group, field) for group in groups for field in dataclasses.fields(group)]
    flags = {field.name: getattr(group, field.name) for group, field in fields}
    if "deepspeed_config" in flags:
        flags["deepspeed_config"] = user_config(flags["deepspeed_config"]) or ""
    return {
        "step": step,
        "flags": flags,
        "defaults": {field.name: default_of(field) for _, field in fields},
        "fingerprints": FINGERPRINTS,
        "models": {flag: input_fingerprint(path) for flag, path in models.items()},
        "data": {name: data_fingerprint(rows) for name, rows in data.items()},
        "batches": dict(batches),
        "world_size": world_size(),
        "data_size": data_size(),
        "threads": torch.get_num_threads(),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def input_fingerprint(path: str) -> str:
    """A hash over a model folder's configuration, tokenizer, weights and own code; or over a Python file.

    Of a Python file the modules count too that it has imported from its own folder; of a model that was converted the
    file that it was made of, as another version of transformers writes another tokenizer.json.
    """
    folder = Path(path).expanduser()
    if folder.is_file():
        return _files_digest([folder, *_imported_from(folder.resolve().parent)])
    if not folder.is_dir():
        return path  # a hub name
    if (source := folder / CONVERTED_FROM).is_file():
        return source.read_text(encoding="ascii")
    named = [folder / name for name in MODEL_FILES if (folder / name).is_file()]
    return _files_digest(
        [*named, *(file for kind in ("safetensors", "bin", "py") for file in folder.glob(f"*.{kind}"))]
    )


def _imported_from(folder: Path) -> list[Path]:
    """Files of the modules that are loaded from a folder, but for installed packages and this program's own."""
    named = [getattr(module, "__file__", None) for module in list(sys.modules.values())]
    files = {Path(name).resolve() for name in named if isinstance(name, str) and Path(name).is_absolute()}
    others = [Path(sys.prefix).resolve(), Path(training.__file__).resolve().parent]
    return [f for f in files if f.is_relative_to(folder) and not any(f.is_relative_to(other) for other in others)]


def _files_digest(files: Sequence[Path]) -> str:
    digest = hashlib.sha256()
    for name, file in sorted({(file.name, file.resolve()) for file in files}):
        digest.update(f"{name}\0{file_digest(file)}\n".encode())
    return digest.hexdigest()


def data_fingerprint(rows: Any) -> str:
    """A hash over every value of a dataset, in order, but for the path by which its source is named."""
    digest = hashlib.sha256(f"{len(rows)}\n".encode())
    for batch in rows.with_format("arrow").iter(_BATCH_ROWS):
        for name in sorted(set(batch.column_names) - {"source"}):
            digest.update(f"{name}\n".encode())
            for part in _plain(batch[name].combine_chunks()):
                digest.update(part)
    return digest.hexdigest()


def _plain(column: Any) -> Iterator[bytes]:
    """An Arrow column's values as bytes: the same for the same values, however Arrow stores them."""
    import pyarrow.compute as pc
    from pyarrow import types

    if types.is_list(column.type) or types.is_large_list(column.type):
        yield from _plain(pc.list_value_length(column))
        yield from _plain(pc.list_flatten(column))
    elif types.is_integer(column.type) and not column.null_count:
        yield column.to_numpy(zero_copy_only=False).astype("int64").tobytes()
    else:
        yield json.dumps(column.to_pylist(), sort_keys=True, default=str).encode()


def refuse_other_run(
    before: Mapping[str, Any], now: Mapping[str, Any], checkpoint: Path, *, named: bool = False
) -> None:
    """Refuse a checkpoint of a run whose result would be another one.

    Args:
        before, now: from `describe`, of the checkpoint's run and of this one.
        named: whether the user has named it: then reward functions may have been edited.

    Raises:
        UserError: names the flag that has changed.
    """
    over = "or start over with --resume never"
    if before["step"] != now["step"]:
        raise UserError(f"{checkpoint} is a checkpoint of {before['step']}, this is {now['step']}")
    for name in sorted(before["flags"].keys() | now["flags"].keys()):
        if name in FREE | ROUNDING | BY_CONTENT | BATCH:
            continue
        if name not in now["flags"]:
            say(f"{checkpoint} was written by a version that had --{name} ({_shown(before['flags'][name])}); this one "
                "has not")  # fmt: skip
            continue
        # a flag that came later had its default's meaning before
        old, new = before["flags"].get(name, now.get("defaults", {}).get(name)), now["flags"][name]
        if _wherever(name, old) != _wherever(name, new):
            raise UserError(
                f"--{name} was {_shown(old)} when {checkpoint} was written and is {_shown(new)} now, which changes the "
                f"result; {_as_before(name, old)}, {over}"
            )
    old, new = (run["flags"].get("deepspeed_config") or {} for run in (before, now))
    for name, usual in DEEPSPEED_RESULT.items() if isinstance(old, dict) else ():  # an earlier version kept its name
        if old.get(name, usual) != new.get(name, usual):
            raise UserError(
                f"{name} of --deepspeed_config was {_shown(old.get(name, usual))} when {checkpoint} was written and is "
                f"{_shown(new.get(name, usual))} now, which changes the result; give it again, {over}"
            )
    if before.get("fingerprints") != now.get("fingerprints"):
        say(f"{checkpoint} was written by another version, which compared models and rows in another way: that they "
            "are the same is not checked")  # fmt: skip
        before = {**before, "models": now["models"], "data": now["data"]}
    _refuse_other_models(_contents(before["models"]), _contents(now["models"]), checkpoint, named, over)
    for name in sorted(before["data"].keys() | now["data"].keys()):
        if now["data"].get(name) != before["data"].get(name):
            raise UserError(
                f"{checkpoint} belongs to other {name} rows than {_rows_from(name, before, now)} gives; give those "
                f"again, {over}"
            )
    same_flags = all(before["flags"].get(name) == now["flags"].get(name) for name in BATCH)
    if before["batches"] != now["batches"] and not same_flags:  # the same make others on other ranks, now or earlier
        name, old = next((n, v) for n, v in before["batches"].items() if now["batches"].get(n) != v)
        changed = [f"--{n}" for n in sorted(BATCH) if before["flags"].get(n) != now["flags"].get(n)]
        raise UserError(
            f"{checkpoint} has {old} {name}, these flags ({', '.join(changed)}) and {now['world_size']} ranks make "
            f"{now['batches'].get(name)}, which changes the result; keep the product, {over}"
        )


def _refuse_other_models(
    before: set[tuple[str, str]], now: set[tuple[str, str]], checkpoint: Path, named: bool, over: str
) -> None:
    """Refuse another model or file. One that failed late and was mended is for the user to go on with, by name."""
    for flag in sorted({flag for flag, _ in before ^ now}):
        edited = flag.startswith("--reward_function ") and flag in dict(before) and flag in dict(now)
        if edited and named:
            say(f"{flag} has been edited since {checkpoint} was written: from here on it rewards as it is now, and "
                "what was answered before, such as by the SFT model, keeps its rewards")  # fmt: skip
            continue
        instead = f"go on with it as it is now by --resume {checkpoint}, " if edited else ""
        raise UserError(
            f"{checkpoint} belongs to another model or file than {flag} names; give that one again, {instead}{over}"
        )


def refuse_other_ranks(descriptions: Sequence[Mapping[str, Any]]) -> None:
    """Refuse to train together what is not the same run on all ranks, such as hosts with other files or versions.

    Raises:
        UserError: names a rank and what differs.
    """
    for rank, description in enumerate(descriptions):
        for part in ("flags", "models", "data", "versions"):
            skipped = FREE | BY_CONTENT if part == "flags" else frozenset()
            for name in sorted(descriptions[0][part].keys() - skipped):
                if description[part].get(name) != descriptions[0][part][name]:
                    raise UserError(
                        f"rank {rank} differs from rank 0 in {part}: {name}; all hosts need the same command, files "
                        f"and packages, see docs/several_machines.md"
                    )


def inexact_because(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Why a resumed run equals an uninterrupted one only up to rounding; empty if it does so bit for bit."""
    reasons = []
    for name in ("world_size", "device", "threads"):
        if before.get(name, now[name]) != now[name]:
            reasons.append(f"{name.replace('_', ' ')} {before[name]} -> {now[name]}")
    for name in sorted(ROUNDING | BATCH):
        new = now["flags"].get(name)
        old = before["flags"].get(name, new)
        if old != new:
            reasons.append(f"--{name} {_shown(old)} -> {_shown(new)}")
    for name, old in before.get("versions", {}).items():
        if now["versions"].get(name) != old:
            reasons.append(f"{name} {old} -> {now['versions'].get(name)}")
    return reasons


def _wherever(name: str, value: Any) -> Any:
    """A flag's value without the folders of the files that it names: another folder sees them under other paths."""
    if name not in NAMED_FILES or not value:
        return value
    return [Path(text).name for text in (value if isinstance(value, list) else [value])]


def _contents(models: Mapping[str, str]) -> set[tuple[str, str]]:
    """(flag, hash) of each model and file, a file in the flag likewise without its folder."""
    parted = ((flag.partition(" "), digest) for flag, digest in models.items())
    return {(f"{flag}{space}{Path(file).name}", digest) for (flag, space, file), digest in parted}


def _rows_from(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The flag to look at where rows differ: the one that has changed, else the one that they come from."""
    flags = ROWS_FROM[name]
    changed = [flag for flag in flags if before["flags"].get(flag) != now["flags"].get(flag)]
    given = [flag for flag in flags if now["flags"].get(flag)]
    return f"--{[*changed, *given, *flags][0]}"


def _shown(value: Any) -> str:
    if value in ("", None, []):
        return "not given"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _as_before(name: str, old: Any) -> str:
    """How to give a flag the value that it had."""
    if isinstance(old, bool):
        return f"give --{name if old else f'no-{name}'} again"
    return f"leave --{name} out" if old in ("", None, []) else f"give --{name} {_shown(old)} again"
