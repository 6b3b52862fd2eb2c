"""Data: sources -> formats -> chat template -> tokens -> batches. docs/data.md tells it from the user's side."""

from training.utils.data.batches import (
    batches_after,
    collate_pairs,
    collate_prompts,
    collate_sft,
    epoch_batches,
    padding_share,
    rank_micro_batches,
)
from training.utils.data.chat import (
    Rendered,
    RowError,
    configure_chat_template,
    render,
    stop_token_ids,
    template_names,
)
from training.utils.data.prepare import StepData, prepare_data, prepare_pretraining
from training.utils.data.report import DataReport

__all__ = [
    "DataReport",
    "Rendered",
    "RowError",
    "StepData",
    "batches_after",
    "collate_pairs",
    "collate_prompts",
    "collate_sft",
    "configure_chat_template",
    "epoch_batches",
    "padding_share",
    "prepare_data",
    "prepare_pretraining",
    "rank_micro_batches",
    "render",
    "stop_token_ids",
    "template_names",
]
