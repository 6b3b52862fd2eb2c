"""ChatGPT-style training in three steps on DeepSpeed; from Python: `from training import PPO` (docs/library.md)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.library import PPO, STRATEGIES

__all__ = ["PPO", "STRATEGIES"]


def __getattr__(name: str) -> Any:
    if name in __all__:  # at its first use: torch takes seconds, and flags are checked without it
        from training import library

        return getattr(library, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
