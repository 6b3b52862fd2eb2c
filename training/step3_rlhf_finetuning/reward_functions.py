"""Users' functions of responses, ``file.py:name``: loaded, weighed, called and checked."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import itertools
import math
import os
import sys
import textwrap
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from training.utils.errors import UserError

MODEL = "model"  # names the reward model among the sources of --reward_function
LARGEST = 3.4028234e38  # in fp32
NONE = "none"  # --critic_model_name_or_path none: there is no reward model

Messages = list[dict[str, str]]
TextFunction = Callable[[Sequence[Messages], Sequence[str], Sequence[dict[str, Any]]], Sequence[float]]

_loaded = itertools.count(1)


def load_text_function(spec: str, flag: str) -> TextFunction:
    """Load ``file.py:name``, a function of (prompts, responses, rows) that returns a float for each response.

    The file may import modules that lie beside it, while it is run and when its functions are called.

    Args:
        spec: the flag's value.
        flag: named in messages.

    Raises:
        UserError: no such file, no such function, or the file can not be run.
    """
    file, _, name = spec.rpartition(":")
    path = Path(file).expanduser().resolve()
    if not file or not path.is_file():
        raise UserError(f"{flag} {spec}: no such file; write it as path/to/file.py:function")
    # A name of its own: the file may be called json.py, and dataclasses and pickle look a class's module up by name
    module_name = f"_text_functions_{next(_loaded)}"
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    if module_spec is None or module_spec.loader is None:
        raise UserError(f"{flag} {spec}: not a Python file")
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last: what lies there shadows nothing
    module = sys.modules[module_name] = importlib.util.module_from_spec(module_spec)
    try:
        with no_exit():
            module_spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        sys.modules.pop(module_name, None)
        raise UserError(f"{flag} {spec}: the file fails with {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise UserError(f"{flag} {spec}: the file has no function {name}")
    return function


@contextlib.contextmanager
def no_exit() -> Iterator[None]:
    """Inside, ``os._exit`` raises `SystemExit`, as ``sys.exit`` does: no user code ends a run without a word.

    A process that the user's code forks, as multiprocessing does, ends as any other.
    """
    original, this = os._exit, os.getpid()

    def leave(code: int) -> None:
        """In place of ``os._exit``."""
        if os.getpid() != this:
            original(code)
        raise SystemExit(code)

    os._exit = leave  # type: ignore[assignment]
    try:
        yield
    finally:
        os._exit = original


def split_weight(spec: str) -> tuple[str, str]:
    """``file.py:name=0.5`` -> ``file.py:name`` and ``0.5``; ``1`` where there is no weight.

    The weight stands behind the function's name, so a folder's name may have an equals sign of its own.
    """
    file, colon, rest = spec.rpartition(":")
    name, equals, weight = rest.partition("=")
    return file + colon + name, weight if equals else "1"


def check_without_model(specs: Sequence[str], flag: str) -> None:
    """Refuse values of ``--reward_function`` that do not do without a reward model.

    Args:
        specs: the flag's values.
        flag: the one that says `NONE`.

    Raises:
        UserError: there is no function among them, or the reward model is given a weight.
    """
    for spec in specs:
        if split_weight(spec)[0] == MODEL:
            raise UserError(f"--reward_function {spec} weighs the reward model, and {flag} {NONE} leaves it out: "
                            "give one of the two")  # fmt: skip
    if not specs:
        raise UserError(f"{flag} {NONE} leaves no reward: give --reward_function")


def parse_reward_functions(specs: Sequence[str], flag: str) -> tuple[dict[str, tuple[TextFunction, float]], float]:
    """``--reward_function a.py:f b.py:g=0.5 model=2`` -> functions and weights by name, and the reward model's weight.

    Args:
        specs: the flag's values: ``file.py:name`` or ``model``, a weight behind ``=`` (default 1).
        flag: named in messages.

    Returns:
        Name -> (function, weight), a second function of the same name, or one called ``model``, as ``name_2``; and the
        weight of the model.

    Raises:
        UserError: no function is named, a weight that is no number, the model's twice, or what `load_text_function`
            raises.
    """
    functions: dict[str, tuple[TextFunction, float]] = {}
    if len(of_model := [spec for spec in specs if split_weight(spec)[0] == MODEL]) > 1:
        raise UserError(f"{flag} {' '.join(of_model)}: give the reward model's weight once")
    model_weight = 1.0
    for spec in specs:
        source, text = split_weight(spec)
        if source != MODEL and ":" not in source:
            raise UserError(f"{flag} {spec}: write it as path/to/file.py:function, a weight behind =")
        weight = float(text) if _is_finite(text) else math.nan
        if not weight:
            raise UserError(f"{flag} {spec}: a weight of 0 leaves the reward out; leave the source out instead")
        if not math.isfinite(weight):
            raise UserError(f"{flag} {spec}: the weight {text!r} is no number; write file.py:function=0.5")
        if source == MODEL:
            model_weight = weight
            continue
        function = load_text_function(source, flag)
        functions[unused_name(source, [MODEL, *functions])] = (function, weight)
    return functions, model_weight


def unused_name(spec: str, taken: Collection[str]) -> str:
    """The function's name in ``file.py:name``, as ``name_2`` and so on where it is taken."""
    stem = name = spec.rpartition(":")[2]
    number = 1
    while name in taken:
        number += 1
        name = f"{stem}_{number}"
    return name


def call_text_function(
    function: TextFunction,
    prompts: Sequence[Messages],
    responses: Sequence[str],
    rows: Sequence[dict[str, Any]],
    flag: str,
) -> list[float]:
    """Call a user's function, which may change what it is given, and check what it returns.

    Raises:
        UserError: it raises, or returns the wrong number of values, something that is no number, or one that
            is not finite in fp32; the first such row is named.
    """
    try:
        with no_exit():
            returned = function(*copy.deepcopy((list(prompts), list(responses), list(rows))))
            values = list(returned) if _is_in_order(returned) else None
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise UserError(
            f"{flag}: {type(error).__name__}: {error}; {_failing_row(function, prompts, responses, rows)}"
        ) from error
    if inspect.iscoroutine(returned):
        returned.close()
        raise UserError(f"{flag}: an async function; name one that returns asyncio.run(...) of it")
    if values is None:
        short = textwrap.shorten(repr(returned), 80)
        raise UserError(f"{flag}: returned {short} for {len(responses)} responses, not a number for each")
    if len(values) != len(responses):
        raise UserError(f"{flag}: returned {len(values)} values for {len(responses)} responses")
    for i, value in enumerate(values):
        if isinstance(value, (str, bytes)) or not _is_finite(value):
            raise UserError(f"{flag}: returned {value!r} for row {i}, response {responses[i]!r}")
    return [float(v) for v in values]


def _failing_row(
    function: TextFunction, prompts: Sequence[Messages], responses: Sequence[str], rows: Sequence[dict[str, Any]]
) -> str:
    """Call the function row by row to name the one it fails on."""
    for i in range(len(responses)):
        try:
            with no_exit():
                function(*copy.deepcopy(([prompts[i]], [responses[i]], [rows[i]])))
        except (Exception, SystemExit):  # looked for: the row that raises
            return f"at row {i}, prompt {prompts[i][-1]['content']!r}, response {responses[i]!r}"
    return "not at any single row"


def _is_in_order(values: Any) -> bool:
    """Whether these can be a number for each response: of a dictionary or a set nobody knows which is whose."""
    return isinstance(values, Iterable) and not isinstance(values, (Mapping, Set)) and getattr(values, "ndim", 1) > 0


def _is_finite(value: Any) -> bool:
    try:
        return abs(float(value)) <= LARGEST
    except (TypeError, ValueError, OverflowError):
        return False
