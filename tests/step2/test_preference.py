"""What step 2 says of a finished reward model."""

from training.step2_reward_model_finetuning.preference import accuracy_by_kind, judgement, told

PAIRS = [(1.0, 0.0), (0.0, 1.0), (2.0, 2.0), (3.0, -1.0), (0.5, 0.7)]
KINDS = ["curt", "warm_empty", "warm_empty", "warm_empty", ""]


def test_accuracy_by_kind() -> None:
    # warm_empty: one lost, one tied, one won; the pair without a kind is in none
    expected = {"curt": {"accuracy": 1.0, "pairs": 1}, "warm_empty": {"accuracy": 0.5, "pairs": 3}}
    assert accuracy_by_kind(PAIRS, KINDS, [1.0] * 5) == expected
    assert accuracy_by_kind(PAIRS, [""] * 5, [1.0] * 5) == {}


def test_judgement() -> None:
    judged = judgement(PAIRS, KINDS, 0.25, [1.0] * 5)
    assert judged["accuracy_after"] == 0.5 and judged["ties"] == 1 and judged["held_out"] == 5
    assert judged["accuracy_low"] < 0.5 < judged["accuracy_high"] and judged["accuracy_shorter"] == 0.75
    assert "0.500 of 3 pairs whose rejected answer is of the kind warm_empty" in told(judged)
