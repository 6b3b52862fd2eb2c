"""Data: sources -> formats -> chat template -> tokens -> batches. docs/data.md tells it from the user's side.

The names below are imported from their modules at their first use: a program of this package, and what looks at paths
alone, must answer before torch and datasets are imported, which takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.utils.data.batches import (
        SIDES,
        batches_after,
        collate_answers,
        collate_pairs,
        collate_sft,
        distinct_answers,
        element_lengths,
        epoch_batches,
        padding_share,
        pair_micro_batches,
        rank_micro_batches,
        rankings_of,
        spread_rows,
    )
    from training.utils.data.chat import read_any, render
    from training.utils.data.prepare import StepData, prepare_data, prepare_pretraining
    from training.utils.data.template import RowError, configure_chat_template, stop_token_ids

__all__ = [
    "SIDES",
    "RowError",
    "StepData",
    "batches_after",
    "collate_answers",
    "collate_pairs",
    "collate_sft",
    "configure_chat_template",
    "distinct_answers",
    "element_lengths",
    "epoch_batches",
    "padding_share",
    "pair_micro_batches",
    "prepare_data",
    "prepare_pretraining",
    "rank_micro_batches",
    "rankings_of",
    "read_any",
    "render",
    "spread_rows",
    "stop_token_ids",
]

_MODULES = ("template", "template_file", "chat", "report", "batches", "prepare")  # where they are, the light ones first


def __getattr__(name: str) -> Any:
    for module in _MODULES if name in __all__ else ():
        found = importlib.import_module(f"{__name__}.{module}")
        if hasattr(found, name):
            return getattr(found, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
