"""Which cases of a parametrized test every run of the suite takes."""

from __future__ import annotations

from typing import Any

import pytest


def slow(*values: Any) -> Any:
    """A case that only ``make test-full`` runs: others of the same test hold the same code in every run."""
    return pytest.param(*values, marks=pytest.mark.slow)
