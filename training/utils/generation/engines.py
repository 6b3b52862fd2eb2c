"""How responses are decoded: two small backends behind one Protocol.

`hf` is transformers' own ``generate``: the reference. `fast` is a loop of our own over the same model
(`training.utils.generation.decode_loop`), which does no work that a rollout does not need.

Both return the layout of `training.utils.generation.rollouts`. Kept log-probs are those of the temperature-scaled
distribution before any truncation or penalty, because that is the policy which the training forward sees. The model
arrives in eval mode with its parameters in place; a backend changes neither its flags nor its configuration.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicCache, DynamicLayer

from training.utils.errors import UserError
from training.utils.generation.cuda_graphs import SWITCH, why_not
from training.utils.generation.decode_attention import decode_attention_enabled
from training.utils.generation.decode_loop import decode, keep_company, seconds_since
from training.utils.generation.packed_linear import packed_linear
from training.utils.generation.rollouts import Responses, RolloutBackend, RolloutBatch, RolloutRequest, assemble
from training.utils.generation.sampling import SamplingConfig, penalise_repetition, row_keys
from training.utils.model.forward import without_adapters
from training.utils.run.distributed import agree, ranks_of_a_row, say
from training.utils.run.phases import beat

# Rearranging the weights takes about as long as ten decoding steps save.
MIN_STEPS_TO_PACK = 16


def rollout_backend(name: str, synced: bool = False) -> RolloutBackend:
    """The backend of that name, ``hf`` or ``fast``.

    Args:
        name: see the module's docstring.
        synced: the model's forward is a collective (hooked ZeRO-3), so ranks must decode in step.

    Raises:
        UserError: for any other name.
    """
    if name == "hf":
        return HfBackend(synced)
    if name == "fast":
        return FastBackend(synced)
    raise UserError(f"unknown rollout engine {name!r}: choose hf or fast (vllm is built with its options: `vllm.py`)")


class _KeepPolicy(LogitsProcessor):
    """Keeps log-probs while ``generate`` runs, and applies the repetition penalty to real tokens only.

    At each step a processor sees the tokens chosen so far and the next raw scores, so the log-prob of a chosen token
    is looked up one step later, and only one [B, V] tensor is alive at a time. transformers' own penalty counts the
    padding of left-padded prompts as seen tokens, which would make a row depend on its neighbours' lengths.
    """

    def __init__(self, prompt_mask: Tensor, sampling: SamplingConfig) -> None:
        self.mask = prompt_mask
        self.sampling = sampling
        self.logprobs: list[Tensor] = []
        self.prefill_seconds = 0.0
        self._started = time.perf_counter()
        self._scaled: Tensor | None = None

    def look_up(self, token_ids: Tensor) -> None:
        """Record the log-probs of the tokens just chosen, the last column of token_ids [B, T]."""
        if self._scaled is not None:
            chosen = self._scaled.gather(1, token_ids[:, -1:])
            self.logprobs.append(chosen[:, 0] - self._scaled.logsumexp(-1))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        beat()
        if self._scaled is None:  # the first scores are there when the prompts have been computed
            self.prefill_seconds = seconds_since(self._started, scores.device)
        self.look_up(input_ids)
        scores = agree(scores.contiguous())  # type: ignore[assignment]
        self._scaled = scores.float() / self.sampling.temperature
        if self.sampling.repetition_penalty == 1.0:
            return scores
        grown = input_ids.shape[1] - self.mask.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), grown)], dim=1)
        scores = scores.clone()  # type: ignore[assignment]
        penalise_repetition(scores, input_ids, mask, self.sampling.repetition_penalty)
        return scores


@dataclass(eq=False)
class HfBackend:
    """transformers' ``generate``, with every default that would shape the distribution switched off.

    synced_gpus: set it when the model's parameters are gathered layer by layer (hooked ZeRO-3), so that ranks which
    have ended go on taking part in the gathers.
    """

    synced_gpus: bool = False

    @torch.no_grad()
    def generate(self, model: nn.Module, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """See `RolloutBackend`. The sampling noise is a stream seeded by (seed, iteration, row ids of the batch)."""
        inner = without_adapters(model)
        ids, mask = request.prompt_ids, request.prompt_mask
        keep = _KeepPolicy(mask, sampling)
        config = GenerationConfig(
            max_new_tokens=sampling.max_new_tokens,
            do_sample=not sampling.greedy,
            **({} if sampling.greedy else {"temperature": sampling.temperature, "top_p": sampling.top_p}),
            top_k=None if sampling.greedy else sampling.top_k,  # None would mean 50 when sampling
            eos_token_id=list(request.stop_ids) or None,
            pad_token_id=request.pad_id,
            use_cache=True,
        )
        # ``generate`` fills whatever the config leaves open from the model's own generation_config, which on the hub
        # often holds top_k, a repetition penalty or a system of forced tokens.
        saved, inner.generation_config = inner.generation_config, GenerationConfig()
        try:
            with torch.random.fork_rng(devices=[ids.device] if ids.is_cuda else []):
                torch.manual_seed(int(row_keys(request.seed, request.iteration, request.row_ids).sum()) & (2**63 - 1))
                sequences = inner.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    generation_config=config,
                    logits_processor=LogitsProcessorList([keep]),
                    synced_gpus=self.synced_gpus,
                )
        finally:
            inner.generation_config = saved
        keep.look_up(sequences)
        responses = sequences[:, ids.shape[1] :]
        stopped = torch.isin(responses, torch.tensor(request.stop_ids, device=ids.device, dtype=ids.dtype))
        lengths = torch.where(stopped.any(1), stopped.int().argmax(1) + 1, responses.shape[1])
        return assemble(request, responses, lengths, torch.stack(keep.logprobs, dim=1), keep.prefill_seconds)


def _keeps_keys_and_values_alone(model: Any) -> bool:
    """Whether the model's memory of a text is transformers' key-value cache, from which rows can leave."""
    if getattr(model, "_is_stateful", False) or "past_key_values" not in inspect.signature(model.forward).parameters:
        return False
    kinds = [type(layer) for layer in DynamicCache(config=model.config).layers]
    linear = (base.__name__.startswith("LinearAttention") for kind in kinds for base in kind.__mro__)
    return all(issubclass(kind, DynamicLayer) for kind in kinds) and not any(linear)


@dataclass(eq=False)
class FastBackend:
    """Our own decode loop over the model; `training.utils.generation.decode_loop` says what it saves.

    synced: set it when the model's parameters are gathered layer by layer (hooked ZeRO-3): all ranks then make the same
    number of forwards. pack_weights: on the CPU, keep a second copy of the linear weights while decoding, laid out for
    its matrix kernels (`packed_linear`). decode_attention: on the CPU, answer single queries with `decode_attention`.
    graphs: start a token's kernels at once (`cuda_graphs`), unless a repetition penalty or the family forbids it;
    None: on a GPU. On a CPU the same steps without a graph.
    """

    synced: bool = False
    pack_weights: bool = True
    decode_attention: bool = True
    graphs: bool | None = None

    def __post_init__(self) -> None:
        self._said = False

    @torch.no_grad()
    def generate(self, model: nn.Module, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """See `RolloutBackend`. The noise depends on (seed, iteration, row id, position) only.

        A family that keeps more than keys and values from token to token (Mamba, Jamba) is decoded by `HfBackend`.
        """
        inner = without_adapters(model)
        if not _keeps_keys_and_values_alone(inner):
            name = type(inner).__name__
            self._say_once(f"{name} keeps a state of its own while it decodes: --rollout_engine hf does it")
            return HfBackend(self.synced).generate(model, request, sampling)
        rows, limit, device = len(request.prompt_ids), sampling.max_new_tokens, request.prompt_ids.device
        out = Responses(
            ids=torch.full((rows, limit), request.pad_id, dtype=torch.long, device=device),
            logprobs=torch.zeros(rows, limit, device=device),
            lengths=torch.full((rows,), limit, dtype=torch.long, device=device),
        )
        still = sampling.repetition_penalty == 1.0 and self._by_graphs(inner, device)
        with contextlib.ExitStack() as stack:
            if self.pack_weights and not self.synced and rows and limit >= MIN_STEPS_TO_PACK:
                stack.enter_context(packed_linear(inner, rows))
            own_attention = self.decode_attention and not (self.synced or still)
            own_attention = own_attention and stack.enter_context(decode_attention_enabled(inner))
            # DeepSpeed counts a step at the outermost module's forward, so the hooked model is called as a whole
            callee = model if self.synced else inner
            if rows:
                decode(callee, request, sampling, out, transposed_keys=own_attention, synced=self.synced, still=still)
            if self.synced:
                keep_company(callee, device)
        return assemble(request, out.ids, out.lengths, out.logprobs, out.prefill_seconds)

    def _by_graphs(self, model: nn.Module, device: torch.device) -> bool:
        """Whether a token's kernels are started at once: wanted, no ranks meet in a step, the family allows it."""
        wanted = device.type == "cuda" if self.graphs is None else self.graphs
        if not wanted or self.synced or ranks_of_a_row() > 1:
            return False
        if self.graphs is None and os.environ.get(SWITCH) == "0":
            self._say_once(f"{SWITCH}=0: tokens are decoded without CUDA graphs")
            return False
        reason = why_not(model)
        if reason:
            self._say_once(f"{type(model).__name__} is decoded without CUDA graphs: {reason}")
        return not reason

    def _say_once(self, line: str) -> None:
        if not self._said:
            say(line)
            self._said = True
