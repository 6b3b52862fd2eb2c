"""Starts the step programs quickly: imports them once and forks a process of its own for each run.

Importing torch, DeepSpeed and transformers takes several times as long as a tiny run. A forked child is a process like
any other: it runs the program to its end, can be killed at any moment, and shares nothing with the next one.

As a program it reads one JSON object per line, ``{"step", "argv", "log", "env", "fault"}``, answers with the process
id, and with ``{"pid", "code"}`` when asked by ``{"wait": pid}``. A fault is planted by `tests.reliability.faults`.
"""

from __future__ import annotations

import importlib
import json
import os
import sys

MODULES = {
    1: "training.step1_supervised_finetuning.main",
    2: "training.step2_reward_model_finetuning.main",
    "dpo": "training.step2_dpo_finetuning.main",
    3: "training.step3_rlhf_finetuning.main",
}


def _child(request: dict) -> None:
    """The life of one run; does not return."""
    code = 70
    try:
        os.setsid()
        null, log = os.open(os.devnull, os.O_RDONLY), os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.environ.update(request["env"])
        from tests.reliability import faults
        from training.utils.run.runtime import prepare_runtime
        from training.utils.run.watchdog import run_training

        prepare_runtime()  # as each program does: a run that was killed may have left the lock of a compilation
        program = importlib.import_module(MODULES[request["step"]])
        sys.argv = [program.__file__ or "", *request["argv"]]
        if request["fault"]:
            faults.plant(**request["fault"])
        code = run_training(program.main)
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve() -> None:
    """Answer requests until the input ends."""
    for module in MODULES.values():
        importlib.import_module(module)
    import peft  # noqa: F401  what a run would import later
    import torch._dynamo  # noqa: F401

    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            _, status = os.waitpid(request["wait"], 0)
            print(json.dumps({"code": os.waitstatus_to_exitcode(status)}), flush=True)
            continue
        pid = os.fork()
        if pid == 0:
            _child(request)
        print(json.dumps({"pid": pid}), flush=True)


if __name__ == "__main__":
    serve()
