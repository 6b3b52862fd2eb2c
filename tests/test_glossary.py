"""docs/metrics.md: ranges as the health monitor has them; tests/test_programs.py holds it against what is logged."""

import math

import pytest

from tests.glossary import glossary, never_logged, unexplained
from training.utils.health_rules import DPO_RULES, HEALTHY


def written(low, high):
    """A range as the glossary writes it."""
    if low == high:
        return f"{low:g}"
    return f"at least {low:g}" if math.isinf(high) else f"{low:g} to {high:g}"


@pytest.mark.parametrize("metric", sorted(HEALTHY))
def test_ranges_are_those_of_the_monitor(metric):
    assert glossary(3)[metric][1] == written(*HEALTHY[metric])


@pytest.mark.parametrize("rule", DPO_RULES, ids=lambda rule: rule.metric)
def test_ranges_of_dpo(rule):
    assert glossary("dpo")[rule.metric][1] == written(rule.low, rule.high)


def test_a_metric_without_explanation_and_one_that_nothing_logs_are_found():
    assert unexplained(1, [{"step": 1, "time": 0.1, "train/loss": 1, "train/lost": 2}]) == {"train/lost"}
    assert unexplained(3, [{"eval/manner/mean": 1, "eval/manner/median": 1}]) == {"eval/manner/median"}
    assert never_logged(1, [dict.fromkeys(glossary(1), 0.0)]) == set()
    assert "eval/NAME/mean" not in never_logged(3, [])
    assert "reward/mean" in never_logged(3, [])
