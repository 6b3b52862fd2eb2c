"""Tokenised rows on disk: memory-mapped Arrow files under a key that names everything they were made from.

No pickle, no collective: whoever comes first, of all ranks and programs, tokenises under a file lock into a folder
beside the final one and renames it; the others wait at the lock and find it ready.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import pyarrow

from training.utils.data.kinds import Kind
from training.utils.errors import UserError
from training.utils.run.files import read_object
from training.utils.run.phases import beat

_NOT_CODE = ("__init__.py", "preview.py", "preview_page.py", "batches.py")  # they change no token
_PATIENCE = 10.0  # seconds at a lock between two signs of life
_BATCH = 1000  # rows, and
_MOST_VALUES = 8 << 20  # characters and tokens that are written at once: a batch of long rows would take gigabytes


def code_version() -> str:
    """A hash of the code that turns files into tokens, and of the libraries that do it."""
    import tokenizers
    import transformers

    digest = hashlib.sha256(f"{tokenizers.__version__} {transformers.__version__}".encode())
    room = Path(__file__).parent
    for path in sorted(room.rglob("*.py")):
        if path.name not in _NOT_CODE:
            digest.update(f" {path.relative_to(room)} ".encode() + path.read_bytes())
    return digest.hexdigest()


def tokenizer_version(tokenizer: Any) -> str:
    """A hash of all that decides how the tokenizer makes ids: vocabulary, merges, added tokens, template."""
    if tokenizer.is_fast:
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        state.pop("padding", None)  # the state of the last call, not of the tokenizer
        state.pop("truncation", None)
    else:
        state = {"class": type(tokenizer).__name__, "vocabulary": tokenizer.get_vocab()}
    # The pad token is left out: it is in no row, and programs choose another one where it equals EOS.
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    state = [state, tokenizer.chat_template, named]
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def cached(root: Path, key: str, build: Callable[[Path], None]) -> tuple[Path, bool]:
    """The folder of ``key``, built if it is not there; and whether it was there.

    Raises:
        UserError: the cache folder can not be written.
    """
    folder = root / key
    try:
        if _whole(folder):
            return folder, True
        root.mkdir(parents=True, exist_ok=True)
        with _alone(root / f"{key}.lock"):
            if _whole(folder):
                return folder, True
            for broken in root.glob(f"{key}*"):  # of a run that was killed: nobody else holds the lock
                if broken.is_dir():
                    shutil.rmtree(broken)
            scratch = root / f"{key}.new"
            scratch.mkdir()  # of mkdtemp's folders nobody else could read
            try:
                build(scratch)
                sizes = {path.name: path.stat().st_size for path in sorted(scratch.iterdir())}
                (scratch / "sizes.json").write_text(json.dumps(sizes), encoding="utf-8")
                for path in scratch.iterdir():  # else a power cut may leave files of the right size without content
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                os.replace(scratch, folder)
            finally:
                shutil.rmtree(scratch, ignore_errors=True)
    except OSError as error:  # of reading a source `build` makes a UserError
        where = error.filename or root
        raise UserError(
            f"--data_output_path: {where} can not be written ({error.strerror or error}); name another folder"
        ) from None
    return folder, False


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock at ``path``; who waits for it moves, too, for the watchdog, which the holder has as well."""
    lock = filelock.FileLock(path)
    while not lock.is_locked:
        with contextlib.suppress(filelock.Timeout):
            lock.acquire(timeout=_PATIENCE)
        beat()
    try:
        yield
    finally:
        lock.release()


def _whole(folder: Path) -> bool:
    sizes = folder / "sizes.json"
    if not sizes.is_file():
        return False
    try:
        wanted = read_object(sizes)
    except UserError:  # damaged: it is made again
        return False
    return all((folder / n).is_file() and (folder / n).stat().st_size == size for n, size in wanted.items())


_INTS, _BITS, _WORDS = pyarrow.list_(pyarrow.int32()), pyarrow.list_(pyarrow.int8()), pyarrow.string()
_COMMON = [("length", pyarrow.int32()), ("source", _WORDS)]
SCHEMAS = {
    "demonstrations": pyarrow.schema([("input_ids", _INTS), ("response_mask", _BITS), *_COMMON]),
    "pairs": pyarrow.schema(
        [("chosen_ids", _INTS), ("chosen_mask", _BITS), ("rejected_ids", _INTS), ("rejected_mask", _BITS)]
        # How many rows, this one among them, are the pairs of one ranking; they stand together
        + [*_COMMON, ("rejected_kind", pyarrow.string()), ("pairs", pyarrow.int32())]
    ),
    # The row as it stood in its file goes with a prompt alone: only the rewards of PPO read further columns.
    "prompts": pyarrow.schema([("prompt_ids", _INTS), ("messages", _WORDS), *_COMMON, ("row", _WORDS)]),
}


class ArrowWriter:
    """Writes rows of one kind to an Arrow stream file, a batch at a time."""

    def __init__(self, path: Path, kind: Kind) -> None:
        self.schema = SCHEMAS[kind]
        self.file = pyarrow.OSFile(str(path), "wb")
        self.stream = pyarrow.ipc.new_stream(self.file, self.schema)
        self.rows: list[Mapping[str, Any]] = []
        self.values = 0  # characters and tokens of these rows

    def write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Add rows; they need not be on disk before `close`."""
        for row in rows:
            self.rows.append(row)
            self.values += sum(len(value) for value in row.values() if isinstance(value, (str, list)))
            if len(self.rows) >= _BATCH or self.values >= _MOST_VALUES:
                self._flush()

    def _flush(self) -> None:
        self.stream.write_batch(pyarrow.RecordBatch.from_pylist(self.rows, schema=self.schema))
        self.rows, self.values = [], 0

    def close(self) -> None:
        """Write what is left and close the file."""
        if self.rows:
            self._flush()
        self.stream.close()
        self.file.close()
