"""The hybrid engine: one actor that alternates between generation and training.

Before DeepSpeed sees the model, `make_twin` copies its modules but not its parameters: the twin owns no weights, it
shares the actor's Parameter objects. Training runs on the DeepSpeed engine, with its hooks; generation runs on the
twin, which has none. Every optimizer step is visible to the twin at once and nothing is copied. At ZeRO-3, where a
rank holds only a part of each parameter, one gather surrounds a whole round of rollouts: no collective runs while
tokens are decoded, so ranks may stop at different lengths.

Where the gathered model does not fit beside the optimizers' states, these rest in host memory while it is whole. Where
it does not fit without them either, generation goes through the engine's own hooks instead, which gather each layer at
each token: the same tokens, much slower, and the ranks decode in step.

Where ranks hold the model together (tensor parallelism) there is no twin: DeepSpeed cuts the layers of the model that
it is given, and a copy made before would use the cut weights without the sums over ranks. Generation then runs on the
engine's own module in evaluation mode, and the ranks of a group decode the same tokens in step.

Train and eval mode, gradient checkpointing and the KV cache belong to one module or the other and never leak.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch import nn

from training.utils.engine.engine import gathered
from training.utils.engine.states import resting_bytes, states_on_host
from training.utils.generation.vllm import VllmBackend, awake_bytes
from training.utils.memory.generation import decoding_bytes, fits, free_bytes, generation_bytes, saved_bytes
from training.utils.model.forward import reference_policy
from training.utils.model.lora import adapters_merged
from training.utils.run.distributed import ranks_of_a_row, say
from training.utils.sharing.rows import Sharing


def make_twin(model: nn.Module) -> nn.Module:
    """A module tree of its own over the same parameters and buffers, in evaluation mode.

    Call it before `deepspeed.initialize` and before gradient checkpointing is enabled, whose hooks a later copy
    would carry along.
    """
    scales = [module.quant_state for module in model.modules() if hasattr(module, "quant_state")]  # of 4-bit layers
    memo: dict[int, Any] = {id(shared): shared for shared in [*model.parameters(), *model.buffers(), *scales]}
    return copy.deepcopy(model, memo).eval()


class HybridEngine:
    """The actor's DeepSpeed engine and its twin.

    Args:
        engine: the actor's engine, after `deepspeed.initialize`.
        twin: from `make_twin` of the same model; None where ranks hold the model together.
        reference: a frozen causal LM, or None if the twin with its adapter disabled is the reference policy:
            that needs LoRA, adapters made fresh on the SFT weights, and no other trained parameter.
        merge_lora: generate from weights with the adapters added, see `training.utils.model.lora.adapters_merged`.

    Attributes:
        gather_seconds: time spent gathering (and merging) parameters and undoing it, since it was last reset.
        hooked: generation goes through the engine's ZeRO-3 hooks, as the whole model does not fit on a rank, or there
            is no twin; ranks must then decode in step (``rollout_backend(..., synced=True)``).
        resting: engines whose optimizers' states are in host memory while the actor is whole.
        server: what decodes with weights of its own, None where the twin does.
        sharing: how answers to a prompt may go through engine and reference behind it, None for a row each.
    """

    def __init__(
        self,
        engine: Any,
        twin: Any,
        reference: nn.Module | None,
        *,
        merge_lora: bool = False,
        sharing: Sharing | None = None,
    ) -> None:
        self.engine = engine
        self.reference = reference
        self.gather_seconds = 0.0
        self.hooked = False
        self.resting: Sequence[Any] = ()
        self.server: VllmBackend | None = None
        self.sharing = sharing
        self._round = {"rows": 0, "length": 0}  # what is decoded together
        self._packed = False
        self._merge_lora = merge_lora
        self._has_twin = twin is not None
        self._twin = twin if self._has_twin else engine.module.eval()
        self._relink_buffers()

    def _relink_buffers(self) -> None:
        """Moving a module to a device keeps its Parameter objects but replaces its buffers: share them anew."""
        for name, buffer in self.engine.module.named_buffers():
            owner, _, leaf = name.rpartition(".")
            self._twin.get_submodule(owner)._buffers[leaf] = buffer

    def choose_generation(self, *, rows: int, length: int, packed: bool, trained: Iterable[Any] = ()) -> None:
        """Decide, once every role is built, how the actor generates, and say so if the easy way does not fit.

        At ZeRO-3 the whole actor is gathered for generation. Where it does not fit beside the other roles, optimizer
        states wait in the host's memory meanwhile (`resting`), or each layer is gathered at each token (`hooked`). A
        collective.

        Args:
            rows, length, packed: see `training.utils.memory.generation.generation_bytes`.
            trained: engines whose optimizers' states may rest meanwhile, beside the actor's.
        """
        self._round, self._packed = {"rows": rows, "length": length}, packed
        if not any(hasattr(parameter, "ds_id") for parameter in self._twin.parameters()):
            return  # below ZeRO-3 every rank holds the whole model, or its part of every layer, anyway
        if self.server is not None and self.reference is not None:
            return  # nothing is gathered whole
        if not self._has_twin:
            self.hooked = True
            say("ranks hold the actor together at ZeRO-3: generating through its hooks, which is slow; ZeRO 2 is not")
            return
        needed = generation_bytes(self._twin, packed=packed, merged=self._merge_lora, **self._round)
        engines = list(dict.fromkeys([self.engine, *trained]))
        states, on_host = map(sum, zip(*map(resting_bytes, engines), strict=True))  # and makes moments: they count
        if fits(needed, self.engine.device):
            return
        what = "generating" if self.server is None else "scoring by the reference"
        short = (
            f"the whole actor does not fit on a rank (a rollout needs {needed / 1e9:.2f} GB, {free_bytes() / 1e9:.2f} "
            f"are free): {what} "
        )
        if states and fits(needed - states, self.engine.device, on_host=on_host):
            self.resting = engines
            say(f"{short}while {states / 1e9:.2f} GB of optimizer states are in host memory")
            return
        self.hooked = True
        merge = "; --merge_lora_for_generation has no effect then" if self._merge_lora else ""
        slow = ", which gather each layer at each token and are slow" if self.server is None else ""
        say(f"{short}through the ZeRO-3 hooks{slow}{merge}")

    def another_fits(self) -> bool:
        """Whether every rank has room for one more whole model, in --dtype, that decodes a round; a collective."""
        weights = saved_bytes(self._twin) * ranks_of_a_row()
        needed = weights * (1 + self._packed) + decoding_bytes(self._twin, **self._round)
        if self.server is not None and self.engine.device.type != "cpu":  # there it never gives its memory back
            needed += awake_bytes(weights, self.server.options)
        return fits(needed, self.engine.device)

    @contextlib.contextmanager
    def _gathered_twin(self) -> Iterator[Any]:
        with contextlib.ExitStack() as stack:
            for engine in self.resting:
                stack.enter_context(states_on_host(engine))
            stack.enter_context(gathered(list(self._twin.parameters())))
            stack.enter_context(torch.no_grad())
            yield self._twin

    @contextlib.contextmanager
    def _hooked_module(self) -> Iterator[Any]:
        """The engine's module, whose hooks gather and free; what they still hold at the end is freed."""
        try:
            with torch.no_grad():
                yield self.engine.module
        finally:
            self.engine.empty_partition_cache()

    @contextlib.contextmanager
    def generation_mode(self) -> Iterator[Any]:
        """Inside, what a backend generates with; leaving frees gathered parameters and caches. A collective at ZeRO-3.

        That is the twin, the hooked module, or, where a server decodes, the engine.
        """
        start = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if self.server is not None:
                engine = stack.enter_context(self.scoring_mode())
                get_accelerator().empty_cache()  # what training has reserved: the server maps its memory again
                self.server.take(engine)
                self.gather_seconds += time.perf_counter() - start
                yield engine
                self.server.rest()
                return
            module = stack.enter_context(self._hooked_module() if self.hooked else self._gathered_twin())
            if self._merge_lora and not self.hooked:
                stack.enter_context(adapters_merged(module))
            self.gather_seconds += time.perf_counter() - start
            yield module
            start = time.perf_counter()
        self.gather_seconds += time.perf_counter() - start
        get_accelerator().empty_cache()  # blocks of the KV cache's sizes, which training can not use

    @contextlib.contextmanager
    def training_mode(self) -> Iterator[Any]:
        """Inside, the engine trains; outside it is in evaluation mode, so that scoring has no side effects."""
        self.engine.train()
        try:
            yield self.engine
        finally:
            self.engine.eval()

    @contextlib.contextmanager
    def scoring_mode(self) -> Iterator[Any]:
        """Inside, the engine's forward gives the log-probs that the first minibatch will see again."""
        self.engine.eval()
        with torch.no_grad():
            yield self.engine

    @contextlib.contextmanager
    def reference_mode(self) -> Iterator[nn.Module]:
        """Inside, a module that gives the reference policy's log-probs. A collective at ZeRO-3."""
        if self.reference is not None:
            whole: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        else:
            whole = self._hooked_module() if self.hooked else self._gathered_twin()
        with whole as module, reference_policy(module, self.reference) as reference:
            yield reference
