"""A dozen model families in each part of the program; ``python -m tests.families`` prints the table of all."""

import pytest

from tests import families

REFUSED = {  # where a cell is not "ok": a piece of the line that refuses it
    ("cohere", "step 2"): "transformers has no CohereForSequenceClassification",
    ("granite", "step 2"): "transformers has no GraniteForSequenceClassification",
    ("mamba", "step 2"): "transformers has no MambaForSequenceClassification",
    ("lfm2", "step 2"): "transformers has no Lfm2ForSequenceClassification",
    ("bamba", "step 2"): "transformers has no BambaForSequenceClassification",
    ("mamba", "LoRA"): "incompatible with Mamba-based models",
}


def assert_served(family: str) -> None:
    for check, cell in families.row(family).items():
        expected = REFUSED.get((family, check))
        assert cell == "ok" if expected is None else expected in cell and "\n" not in cell, (family, check, cell)


@pytest.mark.parametrize("family", families.FEW)
def test_families(family):
    assert_served(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", sorted(set(families.FAMILIES) - set(families.FEW)))
def test_other_families(family):
    assert_served(family)


@pytest.mark.slow
@pytest.mark.parametrize("family", families.FAMILIES)
def test_families_at_zero_3_on_two_ranks(family, rank_pair):
    assert families.row(family, {"ZeRO-3": families.shards(rank_pair)}) == {"ZeRO-3": "ok"}
