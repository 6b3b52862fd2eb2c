"""What the hybrid engine's modes do and leave behind, on tiny models; callable here and on the rank pair."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from tests.step3.hybrid_checks import build, prompts, request, train_two_steps
from training.step3_rlhf_finetuning import hybrid_engine
from training.step3_rlhf_finetuning.hybrid_engine import HybridEngine
from training.step3_rlhf_finetuning.roles import build_actor, generation_backend
from training.utils.checkpoint.engine_state import parts as parts_of
from training.utils.engine.engine import gathered
from training.utils.engine.states import adam_of, flat_partitions
from training.utils.generation import decode_loop
from training.utils.generation.engines import rollout_backend
from training.utils.generation.rollouts import score_log_probs
from training.utils.generation.sampling import SamplingConfig
from training.utils.memory import generation
from training.utils.model.lora import lora_layers
from training.utils.run.distributed import rank


def _base_weights(actor: HybridEngine) -> dict[str, torch.Tensor]:
    """Copies of all parameters, whole."""
    with gathered(list(actor.engine.module.parameters())):
        return {name: p.detach().clone() for name, p in actor.engine.module.named_parameters()}


def unmerge_by_subtraction(peft_model: Any) -> Any:
    """The planted fault: PEFT's own merge and unmerge."""

    @contextlib.contextmanager
    def merged() -> Any:
        peft_model.merge_adapter()
        try:
            yield
        finally:
            peft_model.unmerge_adapter()

    return merged()


def merge_and_restore(
    path: str, *, stage: int, dtype: str, raises: bool = False, subtract: bool = False
) -> dict[str, Any]:
    """Generate from merged adapters after two training steps; what changed, and the tokens merged and unmerged."""
    torch.manual_seed(0)
    actor = build_actor(path, build(stage, 3e-2, 4, dtype=dtype, merge_lora_for_generation=True))
    train_two_steps(actor)
    before = _base_weights(actor)
    flags = {name: p.requires_grad for name, p in actor.engine.module.named_parameters()}
    asked, sampling = request(prompts(6)[rank() :: 2], list(range(3))), SamplingConfig(8, greedy=True)
    tokens: list[list[int]] = []
    weights_differ = adapters_passed_over = False
    original = hybrid_engine.adapters_merged
    if subtract:
        hybrid_engine.adapters_merged = unmerge_by_subtraction
    try:
        with actor.generation_mode() as twin:
            now = dict(twin.named_parameters())
            weights_differ = any(not torch.equal(now[name], p) for name, p in before.items())
            adapters_passed_over = all(layer.merged for layer in lora_layers(twin).values())
            if raises:
                raise RuntimeError("out of memory while decoding")
            tokens = rollout_backend("fast").generate(twin, asked, sampling).input_ids.tolist()
    except RuntimeError as error:
        if str(error) != "out of memory while decoding":
            raise
    finally:
        hybrid_engine.adapters_merged = original
    after = _base_weights(actor)
    with actor._gathered_twin() as twin:
        unmerged = rollout_backend("fast").generate(twin, asked, sampling).input_ids.tolist()
    return {
        "changed": [name for name, p in before.items() if not torch.equal(p, after[name])],
        "flags_kept": flags == {name: p.requires_grad for name, p in actor.engine.module.named_parameters()},
        "weights_differ": weights_differ,
        "adapters_passed_over": adapters_passed_over,
        "adapters_back": not any(layer.merged for layer in lora_layers(actor._twin).values()),
        "tokens": tokens,
        "unmerged": unmerged,
    }


def hooked_and_twin(path: str, *, lora: int, backend: str, stale: bool = False) -> dict[str, Any]:
    """Sample through the ZeRO-3 hooks and from the twin, ranks stopping at different lengths; then train on.

    ``stale`` plants a fault: the hooked round comes one training step later.
    """
    torch.manual_seed(0)
    actor = build_actor(path, build(3, 1e-2, lora))
    train_two_steps(actor)
    asked = request(prompts(6)[rank() :: 2], [10 * rank() + i for i in range(3)])
    sampling = SamplingConfig(3 if rank() else 9)
    with actor.generation_mode() as twin:
        expected = rollout_backend(backend).generate(twin, asked, sampling)
    with actor.reference_mode() as reference:
        expected_reference, _ = score_log_probs(reference, expected, 2, 1.0)
    if stale:
        train_two_steps(actor)
    actor.hooked = True
    held = []
    for _ in range(2):  # twice: the first round records the order of the layers, the second follows it
        with actor.generation_mode() as module:
            got = rollout_backend(backend, synced=True).generate(module, asked, sampling)
        held.append(sum(p.numel() for p in actor.engine.module.parameters()))
    with actor.reference_mode() as reference:
        got_reference, _ = score_log_probs(reference, expected, 2, 1.0)
    train_two_steps(actor)
    return {
        "expected": expected,
        "got": got,
        "reference": (expected_reference, got_reference),
        "held": held,
        "flags": (actor.engine.module.training, actor._twin.training),
    }


def modes(path: str, *, stage: int, lora: int = 0, checkpointing: bool = False) -> dict[str, Any]:
    """What generation and training leave behind: flags, gathered parameters, keys and values."""
    torch.manual_seed(0)
    actor = build_actor(path, build(stage, 1e-2, lora, actor_gradient_checkpointing=checkpointing))
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in actor.engine.module.parameters())
    held = lambda: sum(p.numel() for p in actor.engine.module.parameters())  # noqa: E731
    gathers, caches = [], []
    original_gathered, original_cache = hybrid_engine.gathered, decode_loop.make_cache
    hybrid_engine.gathered = lambda parameters: (gathers.append(len(parameters)), original_gathered(parameters))[1]

    def watched(*args: Any) -> Any:
        cache = original_cache(*args)
        caches.extend(weakref.ref(layer) for layer in cache.layers)
        return cache

    decode_loop.make_cache = watched
    asked, result = request(prompts(3), list(range(3))), {"whole": whole, "before": held()}
    try:
        with actor.training_mode() as engine:
            result["training"] = (engine.module.training, actor._twin.training)
            with actor.generation_mode() as twin:
                for _ in range(2):
                    rollout_backend("fast").generate(twin, asked, SamplingConfig(4))
                result["inside"] = (held(), len(gathers), engine.module.training, twin.training)
        with contextlib.suppress(RuntimeError), actor.generation_mode():
            raise RuntimeError("an exception inside")
    finally:
        hybrid_engine.gathered, decode_loop.make_cache = original_gathered, original_cache
    train_two_steps(actor)
    return result | {
        "after": held(),
        "evaluating": (actor.engine.module.training, actor._twin.training),
        "caches": len(caches),
        "caches_alive": sum(ref() is not None for ref in caches),
        "checkpointing": tuple(
            any(getattr(m, "gradient_checkpointing", False) for m in tree.modules())
            for tree in (actor.engine.module, actor._twin)
        ),
    }


def decision(path: str, *, stage: int, free: int | None, states: int = 0) -> tuple[bool, bool, bool]:
    """Whether the actor chose the hooks, its backend decodes in step, and the optimizer's states make room.

    Args:
        free: bytes that rank 1 would have; None for what it has.
        states: bytes that each rank would have in optimizer states on an accelerator.
    """
    actor = build_actor(path, build(stage))
    originals = generation.free_bytes, hybrid_engine.resting_bytes
    hybrid_engine.resting_bytes = lambda engine: (states, states)
    if free is not None and rank() == 1:
        generation.free_bytes = lambda: free
    try:
        backend: Any = generation_backend(actor, "fast", rows=4, length=32, trained=[actor.engine])
    finally:
        generation.free_bytes, hybrid_engine.resting_bytes = originals
    return actor.hooked, backend.synced, list(actor.resting) == [actor.engine]


def moments_at_the_decision(path: str) -> list[bool]:
    """Whether Adam's moments, which no step has made yet, take their memory before the memory is looked at."""
    actor, seen = build_actor(path, build(3)), []
    original, zero = generation.free_bytes, actor.engine.optimizer

    def looked() -> int:
        seen.append(all(adam_of(zero).state.get(flat) for flat in flat_partitions(zero)))
        return original()

    generation.free_bytes = looked
    try:
        generation_backend(actor, "fast", rows=4, length=32)
    finally:
        generation.free_bytes = original
    return seen


def rested(path: str, *, rests: bool) -> dict[str, Any]:
    """Four optimizer steps of an actor at ZeRO-3 with two rounds of generation after the first two, and what it held.

    ``rests`` keeps its optimizer's states elsewhere meanwhile.
    """
    torch.manual_seed(0)
    actor = build_actor(path, build(3, 1e-2))
    train_two_steps(actor)
    if rests:
        actor.resting = [actor.engine]
    zero = actor.engine.optimizer
    states = [
        *flat_partitions(zero),
        *(t for s in adam_of(zero).state.values() for t in (s["exp_avg"], s["exp_avg_sq"])),
    ]
    before, storages = [s.detach().clone() for s in states], [StorageWeakRef(s.untyped_storage()) for s in states]
    asked, tokens, gone = request(prompts(6)[rank() :: 2], [3 * rank() + i for i in range(3)]), [], []
    for _ in range(2):
        with actor.generation_mode() as twin:
            gone.append([storage.expired() for storage in storages])
            tokens.append(rollout_backend("fast").generate(twin, asked, SamplingConfig(6)).input_ids.tolist())
    same = [torch.equal(old, new) for old, new in zip(before, states, strict=True)]
    train_two_steps(actor)
    with gathered(list(actor.engine.module.parameters())):
        weights = [p.detach().clone() for p in actor.engine.module.parameters()]
    parts = {
        part.name: {k: v.detach().clone() for k, v in part.values.items()}
        for part in parts_of(actor.engine, moments=True)
    }
    return {"gone": gone, "same": same, "tokens": tokens, "weights": weights, "parts": parts}
