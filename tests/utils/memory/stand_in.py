"""Passes of the plan on a device that is not the CPU: PyTorch's own stand-in for one, which has no kernel at all.

Started as a process, because a stand-in is for a whole process and for ever. Prints one line for each pass.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch.utils import backend_registration

import training.utils.memory.plan as plans
from training.step3_rlhf_finetuning.plan import RoleCosts
from training.utils.arguments import LoraArguments
from training.utils.memory.live import FakeModel
from training.utils.memory.training import SequenceCosts

ROWS, PROMPT, RESPONSE = 2, 8, 8


def loss_device(model: FakeModel, outputs: Callable[[FakeModel, int], torch.Tensor]) -> str:
    """Where a loss with gradients ends up (a stand-in has no thread for the backward itself)."""
    with model.counting():
        return str(outputs(model, ROWS).sum().device)


def main(path: str) -> None:
    """Build the roles of all steps on the stand-in and pass rows through them."""
    backend_registration._setup_privateuseone_for_python_backend("standin")
    plans.device = lambda: torch.device("standin", 0)
    none = LoraArguments()
    for classifier in (False, True):
        model = plans.fake_role(path, "fp32", "sdpa", none, classifier=classifier)
        costs = SequenceCosts(model, PROMPT + RESPONSE, classifier=classifier)
        print("sequence", loss_device(model, costs._outputs), costs.evaluation(ROWS).peak > 0)
    actor, critic = (plans.fake_role(path, "fp32", "sdpa", none, classifier=c) for c in (False, True))
    roles = RoleCosts(actor, critic, None, PROMPT, RESPONSE, 0)
    for role, model in (("actor", actor), ("critic", critic)):
        place = loss_device(model, lambda m, rows, role=role: roles._outputs(role, m, rows))
        print(role, place, roles.scoring(role, ROWS).peak > 0)
    print("prefill", place, roles.prefill(ROWS, PROMPT).peak > 0)  # transformers fills no cache there


if __name__ == "__main__":
    main(sys.argv[1])
