"""Users' functions: loaded, called, and what is said of those that fail."""

import copy
import os
import pickle
import sys
from multiprocessing import get_context

import pytest
import torch

from training.step3_rlhf_finetuning.reward_functions import call_text_function, load_text_function
from training.utils.errors import UserError

PROMPTS = [[{"role": "user", "content": f"p{i}"}] for i in range(3)]
ANSWERS = ["a", "bb", "ccc"]


def test_a_function_is_loaded_and_called(tmp_path):
    (tmp_path / "f.py").write_text("def size(prompts, responses, rows):\n    return [len(r) for r in responses]\n")
    function = load_text_function(f"{tmp_path}/f.py:size", "--eval_function")
    assert call_text_function(function, PROMPTS, ANSWERS, [{}] * 3, "--eval_function") == [1.0, 2.0, 3.0]


DATACLASS = """from __future__ import annotations
from dataclasses import dataclass
import json
import lies_beside_{0}

@dataclass
class Length:
    value: float

def size(prompts, responses, rows):
    import lies_beside_too_{0}
    assert json.loads("1") == 1
    return [Length(lies_beside_{0}.times * lies_beside_too_{0}.times * len(r)).value for r in responses]
"""


def test_a_function_file_may_define_dataclasses_and_import_what_lies_beside_it(tmp_path, monkeypatch):
    """Under a name of its own: the files may be called like modules of Python and of the project."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    before, functions = {name: sys.modules[name] for name in ("json", "training")}, []
    for name, times in (("json", 2), ("training", 3)):
        (tmp_path / f"{name}.py").write_text(DATACLASS.format(name))
        (tmp_path / f"lies_beside_{name}.py").write_text(f"times = {times}\n")
        (tmp_path / f"lies_beside_too_{name}.py").write_text("times = 1\n")
        functions.append(load_text_function(f"{tmp_path}/{name}.py:size", "--eval_function"))
    for function, times in zip(functions, (2, 3), strict=True):
        assert call_text_function(function, PROMPTS, ANSWERS, [{}] * 3, "--eval_function") == [
            times,
            times * 2,
            times * 3,
        ]
        length = function.__globals__["Length"](1.0)
        assert pickle.loads(pickle.dumps(length)) == length
    assert sys.path[-1] == str(tmp_path) and sys.path.count(str(tmp_path)) == 1
    assert {name: sys.modules[name] for name in before} == before


def test_a_file_that_fails_leaves_no_module(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "f.py").write_text("1 / 0\n")
    before = set(sys.modules)
    with pytest.raises(UserError, match="ZeroDivisionError"):
        load_text_function(f"{tmp_path}/f.py:size", "--eval_function")
    assert set(sys.modules) == before


async def asynchronous(prompts, responses, rows):
    return [1.0] * len(responses)


def broken_at_two(prompts, responses, rows):
    return [1 / (len(r) - 2) for r in responses]


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda p, r, rows: [1.0], "1 values for 3"),
        (lambda p, r, rows: [1.0, float("nan"), 1.0], "row 1"),
        (lambda p, r, rows: [1.0, 1.0, "good"], "row 2"),
        (lambda p, r, rows: [None, 1.0, 1.0], "row 0"),
        (lambda p, r, rows: [1.0, 1e39, 1.0], "returned 1e\\+39 for row 1"),
        (lambda p, r, rows: [1.0, 10**400, 1.0], "for row 1, response"),
        (lambda p, r, rows: None, "returned None for 3 responses, not a number for each"),
        (lambda p, r, rows: 1.0, "returned 1.0 for 3 responses"),
        (lambda p, r, rows: torch.tensor(1.0), r"returned tensor\(1.\) for 3 responses"),
        (lambda p, r, rows: {0: 1.0, 1: 2.0, 2: 0.5}, "returned {0: 1.0, 1: 2.0, 2: 0.5} for 3 responses"),
        (lambda p, r, rows: {1.0, 2.0, 3.0}, "for 3 responses, not a number for each"),
        (asynchronous, "an async function; name one that returns asyncio.run"),
        (broken_at_two, "at row 1, prompt 'p1', response 'bb'"),
    ],
)
def test_a_bad_function_is_one_line_that_names_the_row(function, words):
    with pytest.raises(UserError, match=words):
        call_text_function(function, PROMPTS, ANSWERS, [{}] * 3, "--eval_function")


def test_a_function_may_change_what_it_is_given():
    def spoils(prompts, responses, rows):
        prompts[0][0]["content"], rows[0]["a"] = "", [1]
        responses.clear()
        return torch.tensor([1.0, 2.0, 3.0])

    prompts, answers, rows = copy.deepcopy(PROMPTS), [*ANSWERS], [{"a": []} for _ in ANSWERS]
    assert call_text_function(spoils, prompts, answers, rows, "--reward_function") == [1.0, 2.0, 3.0]
    assert (prompts, answers, rows) == (PROMPTS, ANSWERS, [{"a": []} for _ in ANSWERS])


@pytest.mark.parametrize("call", ["sys.exit(0)", "os._exit(0)", "raise SystemExit", "exit()"])
@pytest.mark.parametrize("where", ["function", "file"])
def test_a_function_that_ends_the_process_does_not_end_the_run_without_a_word(tmp_path, call, where):
    """Exit code 0 would say that the step is done."""
    head, body = ("", call) if where == "function" else (call, "return [1.0] * len(responses)")
    (tmp_path / "f.py").write_text(f"import os, sys\n{head}\ndef size(prompts, responses, rows):\n    {body}\n")
    leave = os._exit
    with pytest.raises(UserError, match="SystemExit"):
        function = load_text_function(f"{tmp_path}/f.py:size", "--reward_function")
        call_text_function(function, PROMPTS, ANSWERS, [{}] * 3, "--reward_function")
    assert os._exit is leave


def test_a_function_may_have_processes_of_its_own():
    """A forked child that did not end would go on with the run, beside it."""

    def ended(prompts, responses, rows):
        (child := get_context("fork").Process(target=int)).start()
        child.join()
        return [float(child.exitcode)] * len(responses)

    here = os.getpid()
    try:
        assert call_text_function(ended, PROMPTS, ANSWERS, [{}] * 3, "--eval_function") == [0.0] * 3
    finally:
        if os.getpid() != here:
            os._exit(1)
