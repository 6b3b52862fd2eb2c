"""Choosing the next token: scores -> one token per row, reproducible row by row.

Random numbers come from a counter, not from a stream: each one is a hash of (seed, iteration, row id, position,
slot). A row therefore draws with the same numbers whatever batch, order or rank it is decoded in: the same tokens,
where the scores do not depend on the batch (on a GPU in 16 bit their rounding does). A resumed run draws what an
uninterrupted one would have.

A token is drawn by an exponential race (equivalently Gumbel-max): with E_i independent Exponential(1) variables,
argmax_i p_i / E_i is distributed as p. A race over the whole vocabulary needs a random number for every token, and
making those costs far more than the softmax. So the race has two heats, which is just as exact: the first picks a
block of `BLOCK` tokens by the blocks' total probabilities, the second a token inside that block. That is
V / BLOCK + BLOCK numbers per row in place of V. Inverting the cumulative distribution would need a single number, but
a race is steadier: where rounding moves the probabilities a little, only about that share of the draws changes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from training.utils.errors import UserError

BLOCK = 256  # near the square root of common vocabularies (32k to 256k), where the two heats cost the least

_MASK64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15  # odd constant of SplitMix64 (Steele, Lea, Flood 2014)


@dataclass(frozen=True)
class SamplingConfig:
    """How the next token is chosen. The defaults sample from the policy itself, as PPO assumes.

    max_new_tokens: longest response, in tokens. temperature: divides the logits. top_p, top_k: truncation (1 and 0:
    none). repetition_penalty: above 1 discourages tokens seen in prompt or response (1: none). greedy: take the most
    likely token.
    """

    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    greedy: bool = False

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {self.max_new_tokens}: a response needs at least 1 token")
        if not self.temperature > 0:
            raise UserError(f"temperature is {self.temperature}: it must be above 0 (for no randomness choose greedy)")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: it must be at least 0 (0: no limit)")
        if not self.repetition_penalty > 0:
            raise UserError(f"repetition_penalty is {self.repetition_penalty}: it must be above 0 (1: none)")


def _signed(value: int) -> int:
    """The int64 with the bit pattern of an unsigned 64-bit integer (torch has no uint64 arithmetic)."""
    value &= _MASK64
    return value - (1 << 64) if value >= 1 << 63 else value


def _shift_right(bits: Tensor, count: int) -> Tensor:
    """Logical right shift of int64 bit patterns; torch's own shift copies the sign."""
    return (bits >> count) & ((1 << (64 - count)) - 1)


def _mix(bits: Tensor) -> Tensor:
    """SplitMix64's finaliser: a bijection of 64-bit words; each input bit flips each output bit half the time."""
    bits = (bits ^ _shift_right(bits, 30)) * _signed(0xBF58476D1CE4E5B9)
    bits = (bits ^ _shift_right(bits, 27)) * _signed(0x94D049BB133111EB)
    return bits ^ _shift_right(bits, 31)


def _absorb(state: Tensor, word: Tensor | int) -> Tensor:
    """Fold one more integer into a hash state. Both broadcast."""
    return _mix((state ^ word) + _signed(_GOLDEN))


def row_keys(seed: int, iteration: int, row_ids: Tensor) -> Tensor:
    """A 64-bit key for each row's random numbers.

    Args:
        seed: the run's seed. iteration: the rollout round.
        row_ids: [B] int64, unique to a (prompt, sample) within a round.

    Returns:
        [B] int64.
    """
    state = torch.full_like(row_ids, _signed(seed), dtype=torch.int64)
    return _absorb(_absorb(_mix(state + _signed(_GOLDEN)), _signed(iteration)), row_ids.to(torch.int64))


def exponentials(keys: Tensor, position: int | Tensor, slots: int) -> Tensor:
    """Exponential(1) variables, a function of (key, position, slot) alone.

    Args:
        keys: [B] from `row_keys`. position: index of the token in the response, or the tensor [] of it.
        slots: how many numbers per row.

    Returns:
        [B, slots] float64, each above 0 and finite.
    """
    counters = torch.arange(slots, device=keys.device)
    bits = _absorb(_absorb(keys, position)[:, None], counters)
    uniform = (_shift_right(bits, 12).double() + 0.5) * 2.0**-52  # 52 bits: 0 < u < 1 without rounding
    return uniform.log_().neg_()


def penalise_repetition(scores: Tensor, token_ids: Tensor, token_mask: Tensor, penalty: float) -> None:
    """Divide positive and multiply negative scores of tokens already seen, in place (CTRL, arXiv:1909.05858).

    Args:
        scores: [B, V] float, changed in place.
        token_ids: [B, T] prompt and response so far. token_mask: [B, T], 0 on padding, which is not a token seen.
        penalty: above 1 discourages repetition.
    """
    seen = torch.zeros_like(scores).scatter_reduce_(1, token_ids, token_mask.to(scores.dtype), "amax") > 0
    penalised = torch.where(scores < 0, scores * penalty, scores / penalty)
    scores.copy_(torch.where(seen, penalised, scores))


def truncate(scores: Tensor, top_k: int, top_p: float) -> None:
    """Restrict the support in place: top-k first, then the smallest set of tokens that reaches probability top_p.

    The same rules as transformers' warpers (ties at the k-th score stay; the token that crosses top_p stays;
    nucleus sampling: arXiv:1904.09751).

    Args:
        scores: [B, V] temperature-scaled; excluded tokens become -inf.
        top_k: 0 keeps all. top_p: 1 keeps all.
    """
    if 0 < top_k < scores.shape[-1]:
        threshold = scores.topk(top_k, dim=-1).values[:, -1:]
        scores.masked_fill_(scores < threshold, -math.inf)
    if top_p < 1.0:
        ascending, order = scores.sort(dim=-1)
        excluded = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        excluded[:, -1].fill_(False)
        scores.masked_fill_(torch.zeros_like(excluded).scatter_(1, order, excluded), -math.inf)


def draw(weights: Tensor, keys: Tensor, position: int | Tensor) -> Tensor:
    """One token per row, with probability proportional to its weight (two-heat exponential race, see the module).

    Args:
        weights: [B, V'] float, at least 0, V' a multiple of `BLOCK`, at least one above 0 in each row.
        keys: [B] from `row_keys`. position: index of the token in the response.

    Returns:
        [B] int64 token ids.
    """
    rows, width = weights.shape
    blocks = weights.view(rows, width // BLOCK, BLOCK)
    noise = exponentials(keys, position, width // BLOCK + BLOCK)
    block = (blocks.sum(-1) / noise[:, : width // BLOCK]).argmax(-1)
    inside = blocks[torch.arange(rows, device=weights.device), block]
    return block * BLOCK + (inside / noise[:, width // BLOCK :]).argmax(-1)


def next_tokens(
    logits: Tensor,
    keys: Tensor,
    position: int | Tensor,
    sampling: SamplingConfig,
    token_ids: Tensor,
    token_mask: Tensor,
) -> tuple[Tensor, Tensor]:
    """Choose each row's next token.

    Args:
        logits: [B, V] of the last position, any float type.
        keys: [B] from `row_keys`. position: index of the new token in the response.
        token_ids, token_mask: [B, T] prompt and response so far; read by the repetition penalty only.

    Returns:
        tokens [B] int64, and their log-probs [B] fp32 under softmax(logits / temperature): the policy that PPO
        trains, without penalty or truncation.
    """
    rows, vocabulary = logits.shape
    width = math.ceil(vocabulary / BLOCK) * BLOCK
    if width == vocabulary:
        scores = logits.to(torch.float32, copy=True)
    else:
        scores = logits.new_full((rows, width), -math.inf, dtype=torch.float32)
        scores[:, :vocabulary] = logits
    if sampling.temperature != 1.0:
        scores.div_(sampling.temperature)
    truncated = not sampling.greedy and (sampling.top_p < 1.0 or 0 < sampling.top_k < vocabulary)
    if not (sampling.greedy or truncated or sampling.repetition_penalty != 1.0):
        peak = scores.amax(-1, keepdim=True)
        weights = scores.sub_(peak).exp_()
        tokens = draw(weights, keys, position)
        normaliser = weights.sum(-1).log_() + peak[:, 0]  # the log of the sum of exponentials, without a second exp
    else:
        normaliser = scores.logsumexp(-1)
        if sampling.repetition_penalty != 1.0:  # dividing by the temperature before or after comes to the same
            penalise_repetition(scores[:, :vocabulary], token_ids, token_mask, sampling.repetition_penalty)
        if truncated:
            truncate(scores[:, :vocabulary], sampling.top_k, sampling.top_p)
        tokens = scores.argmax(-1) if sampling.greedy else draw(scores.softmax(-1), keys, position)
    chosen = logits.gather(1, tokens[:, None])[:, 0].float() / sampling.temperature
    return tokens, chosen - normaliser
