"""The memory plans of steps 1 and 2 and of DPO: one model that trains, is evaluated and saved."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from training.utils.checkpoint.resume import resume_output_dir
from training.utils.engine.precision import settle
from training.utils.engine.zero_config import deepspeed_config, effective_stage, is_plain
from training.utils.fine_tuning import Flags
from training.utils.memory import plan as plans
from training.utils.memory.live import FakeModel, PassMemory
from training.utils.memory.zero import BYTES, RoleMemory, frozen_memory, trained_memory
from training.utils.model.forward import is_split, response_log_probs
from training.utils.run.distributed import world_size
from training.utils.run.folders import title

FLAGS = {
    "zero_stage": "--zero_stage {}",
    "offload": "--offload",
    "checkpointing": "--gradient_checkpointing",
    "batch": "--per_device_train_batch_size {} (accumulate more)",
    "other_batch": "--per_device_eval_batch_size {}",
}


def ranks_told(tensor_parallel: int) -> str:
    """The number of ranks, and how many hold a model together."""
    return str(world_size()) + (f", of which {tensor_parallel} hold a model" if tensor_parallel > 1 else "")


class SequenceCosts:
    """Forward and backward of a model without storage, each counted once.

    Args:
        model: from `training.utils.memory.plan.fake_role`.
        classifier: the model is a `TokenScorer`; else a causal LM, whose loss is on all tokens.
    """

    def __init__(self, model: FakeModel, length: int, *, classifier: bool) -> None:
        self.model, self.length, self.classifier = model, length, classifier
        self.training = functools.cache(self._training)
        self.evaluation = functools.cache(self._evaluation)

    def _outputs(self, model: Any, rows: int) -> Any:
        ids, mask = plans.fake_batch(rows, self.length)
        return model(ids, mask) if self.classifier else response_log_probs(model, model.on_device(ids), mask, mask)[0]

    def _training(self, rows: int, checkpointing: bool) -> PassMemory:
        self.model.gradient_checkpointing(checkpointing)
        return self.model.training_pass(lambda m: self._outputs(m, rows).sum())

    def _evaluation(self, rows: int) -> PassMemory:
        return self.model.forward_pass(lambda m: self._outputs(m, rows))


def sequence_plan(
    costs: SequenceCosts,
    settings: plans.Settings,
    dtype: str,
    overrides: dict[str, Any],
    *,
    per_row: int = 1,
    tensor_parallel: int = 1,
    reference: Mapping[str, Any] | None = None,
    on_cpu: bool | None = None,
) -> plans.Plan:
    """The plan of step 1 (causal LM), of DPO, or of step 2 (`TokenScorer`, reloaded at the end).

    Args:
        per_row: answers of a row, 2 of a pair.
        tensor_parallel: ranks that hold the model together; ``costs`` are those of one.
        reference: ``offload`` of DPO's frozen second model; None without one.
        on_cpu: the run is one on CPUs; None: as this machine's.
    """
    stage, on_cpu = settings.zero_stage, plans.device().type == "cpu" if on_cpu is None else on_cpu
    ranks, size = world_size() // tensor_parallel, plans.role_size(costs.model)
    shared: dict[str, Any] = {"tensor_parallel": tensor_parallel, "overrides": overrides}
    config = deepspeed_config(zero_stage=stage, dtype=dtype, offload=settings.offload, **shared)
    trains: dict[str, Any] = {"dtype": dtype, "ranks": ranks, "on_cpu": on_cpu, "accumulates": settings.accumulates}
    memory = {"model": trained_memory(size, config=config, **trains)}
    frozen = functools.partial(frozen_memory, zero_stage=stage, dtype=dtype, ranks=ranks)
    if reference is not None:
        memory["reference"] = frozen(plans.base_parameters(costs.model), **reference)
    phases = _phases(costs, settings, memory["model"], dtype, per_row)
    # at most: tensor parallelism does not cut embeddings
    phases.append(plans.saving_phase(size.parameters * tensor_parallel, BYTES[dtype]))
    if costs.classifier:
        again = frozen(size.parameters, offload=settings.offload)
        scored = costs.evaluation(per_row * settings.other_batch).peak
        reloaded = {"reloaded": again.total, "gathered parameters": again.gathered, "activations": scored}
        phases.append(plans.Phase("reward statistics", reloaded))
    checkpointing, rows = settings.checkpointing, per_row * settings.batch
    change = costs.training(rows, not checkpointing).peak - costs.training(rows, checkpointing).peak
    note = "without" if checkpointing else "with"
    notes = [f"{note} --gradient_checkpointing the backward needs {change / plans.MIB:+,.0f}"]
    if stage != effective_stage(stage) and not is_plain(config, ranks):
        notes.append("ZeRO stage 0 runs as DeepSpeed's stage 1, see docs/memory.md")
    return plans.Plan(memory, phases, on_cpu, notes)


def _phases(
    costs: SequenceCosts, settings: plans.Settings, role: RoleMemory, dtype: str, per_row: int
) -> list[plans.Phase]:
    """Evaluation and training of the step's model."""
    rows, eval_rows = per_row * settings.batch, per_row * settings.other_batch
    whole = not costs.classifier and not is_split(costs.model.module)  # all logits exist at once
    logits = {n: whole and plans.logits_bytes(costs.model, n, costs.length - 1, dtype) for n in (rows, eval_rows)}
    evaluation = {
        "gathered parameters": role.gathered,
        "logits": logits[eval_rows],
        "activations": costs.evaluation(eval_rows).peak - logits[eval_rows],
    }
    passes, more = costs.training(rows, settings.checkpointing), {"accumulates": settings.accumulates}
    more["checkpointing"] = settings.checkpointing
    return [plans.Phase("evaluation", evaluation), *plans.training_phases("model", role, passes, logits[rows], **more)]


def show_sequence_plan(step: str, flags: Flags, reference: Mapping[str, Any] | None = None) -> int:
    """Print the plan of step 1, step 2 or DPO; returns the exit code, see `training.utils.memory.plan.show_plan`.

    ``reference`` is that of `sequence_plan`.

    Raises:
        UserError: no model can be built from the flags.
    """
    path, model, train, ds, resume = flags.path, flags.model, flags.train, flags.ds, flags.reliability.resume
    settle(model, resume_output_dir(resume, flags.output.output_dir), resume)
    parts: dict[str, Any] = {"tensor_parallel": ds.tensor_parallel}
    fake = plans.fake_role(path, model.dtype, flags.attention, flags.lora, classifier=step == "step2", **parts)
    costs = SequenceCosts(fake, model.max_seq_len, classifier=step == "step2")
    settings = plans.Settings(
        zero_stage=ds.zero_stage,
        offload=ds.offload,
        checkpointing=model.gradient_checkpointing,
        batch=train.per_device_train_batch_size,
        other_batch=train.per_device_eval_batch_size,
        accumulates=train.gradient_accumulation_steps > 1,
    )
    parts |= {"per_row": 1 if step == "step1" else 2, "reference": reference}
    precision = plans.in_words(model.dtype, flags.lora)
    heading = f"{title(step)}: {path}, {precision}, ZeRO {ds.zero_stage}, ranks: {ranks_told(ds.tensor_parallel)}"
    if ds.sequence_parallel > 1:
        heading += f", {ds.sequence_parallel} to a row"
    planned = functools.partial(sequence_plan, costs, dtype=model.dtype, overrides=flags.overrides, **parts)
    return plans.show_plan(heading, settings, planned, FLAGS)
