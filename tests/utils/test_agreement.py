"""Agreement between judges, held against Krippendorff's published example and against brute force."""

import itertools
import random

import pytest

from training.utils.agreement import Agreement, agreement, krippendorff_alpha

# Krippendorff 2011, section C: four observers, twelve units, missing values; interval alpha is 0.849 there
PUBLISHED = [
    "1 2 3 3 2 1 4 1 2 . . .",
    "1 2 3 3 2 2 4 1 2 5 . 3",
    ". 3 3 3 2 3 4 2 2 5 1 .",
    "1 2 3 3 2 4 4 1 2 5 1 .",
]


def test_the_published_example():
    columns = zip(*(line.split() for line in PUBLISHED), strict=True)
    alpha = krippendorff_alpha([[float(value) for value in column if value != "."] for column in columns])
    assert alpha == pytest.approx(0.849, abs=5e-4)


def test_against_brute_force():
    draw = random.Random(3)
    units = [[draw.choice((-1.0, 0.0, 1.0)) for _ in range(draw.randint(1, 4))] for _ in range(50)]
    compared = [unit for unit in units if len(unit) > 1]
    values = [value for unit in compared for value in unit]
    observed = sum(
        (a - b) ** 2 / (len(unit) - 1) for unit in compared for a, b in itertools.permutations(unit, 2)
    ) / len(values)
    expected = sum((a - b) ** 2 for a, b in itertools.permutations(values, 2)) / (len(values) * (len(values) - 1))
    assert krippendorff_alpha(units) == pytest.approx(1 - observed / expected)


def test_agreement_of_rankings():
    one, two, reverse = [1, 2, 3], [1, 2, 2], [3, 2, 1]
    assert agreement([[one, one], [two, two]]) == Agreement(alpha=1, same=1, prompts=2)
    assert agreement([[one, reverse]]).alpha < -0.3 and agreement([[one, reverse]]).same == 0
    assert agreement([[one, two]]).same == pytest.approx(2 / 3)
    assert agreement([[one], [two]]) == agreement([]) == Agreement(alpha=None, same=None, prompts=0)
    assert agreement([[[1, 1], [1, 1]]]).alpha is None, "all tied: nothing varies"


def test_the_order_of_answers_and_judges_means_nothing():
    draw = random.Random(5)
    prompts = [[draw.choices((1, 2, 3), k=3) for _ in range(3)] for _ in range(40)]
    turned = [[ranks[::-1] for ranks in judges[::-1]] for judges in prompts]
    assert agreement(turned).alpha == pytest.approx(agreement(prompts).alpha)
    assert agreement(turned).same == pytest.approx(agreement(prompts).same)
    assert abs(agreement(prompts).alpha) < 0.2, "they were drawn by chance"
