"""Which prompts a step trains on and which are held out: pure functions of the prompts' seeded hashes.

A prompt's own hash says where it belongs, whatever other rows, sources or steps there are: what one step holds out no
other step trains on, and two sources never put one prompt into two steps. Only where a side would stay empty (a handful
of prompts) the prompt next to it goes there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

HELD_OUT_SHARE = 0.1
_HALF = 32  # bits: the upper half of a hash decides the step, the lower one what is held out


def hash_of(value: Any, salt: str = "") -> int:
    """64 bits of a JSON value, the same on every machine."""
    data = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, key=salt.encode()).digest(), "little")


def split_prompts(prompts: Sequence[np.ndarray], shares: Sequence[float]) -> list[np.ndarray]:
    """Divide examples over SFT (0), preferences for the reward model or DPO (1) and prompts (2), by their prompts.

    A use with a share that would get no prompt at all takes one from the use with the most: that of the lowest hash.

    Args:
        prompts: the hashes of every example's prompt, one array for each source.
        shares: of the three, together 1.

    Returns:
        The use of every example, in arrays as those in ``prompts``.
    """
    known = np.unique(np.concatenate([*prompts, np.zeros(0, np.uint64)]))
    places = np.searchsorted(np.cumsum(shares)[:2], _unit(known >> np.uint64(_HALF)), side="right")
    for place, share in enumerate(shares):
        counts = np.bincount(places, minlength=len(shares))
        richest = int(counts.argmax())
        if share and not counts[place] and counts[richest] > 1:
            places[np.flatnonzero(places == richest)[0]] = place
    return [places[np.searchsorted(known, of_source)].astype(np.uint8) for of_source in prompts]


def hold_out(prompts: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Which examples are held out: those of about a tenth of the prompts.

    Of two or more prompts one at least is held out (that with the lowest hash) and one at least is trained on.

    Args:
        prompts: the hashes of every example's prompt, one array for each source.

    Returns:
        Arrays of booleans as those in ``prompts``.
    """
    known = np.unique(np.concatenate([*prompts, np.zeros(0, np.uint64)]))
    place = _unit(known & np.uint64((1 << _HALF) - 1))
    held = place < HELD_OUT_SHARE
    if len(known) > 1 and not held.any():
        held[place.argmin()] = True
    if held.all() and len(known):
        held[place.argmax()] = False
    return [held[np.searchsorted(known, of_source)] for of_source in prompts]


def _unit(halves: np.ndarray) -> np.ndarray:
    return halves.astype(np.float64) / 2.0**_HALF


def duplicates(identities: np.ndarray, chosen: np.ndarray, seen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which chosen examples were seen before, and ``seen`` grown by the others; 8 bytes for each of them."""
    rows = np.flatnonzero(chosen)
    values, first = np.unique(identities[rows], return_index=True)
    again = chosen.copy()
    again[rows[first[~np.isin(values, seen)]]] = False
    return again, np.union1d(seen, values)
