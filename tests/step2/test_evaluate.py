"""Step 2's evaluation of rewards typed in by hand, and the order of scored pairs."""

import datasets
import pytest
import torch
from torch import nn

from training.step2_reward_model_finetuning.pairs import held_out_rewards
from training.utils.preferences import Pair, judge, length_bucket, pairs_of

PAIRS = [
    Pair(0, "a", 1.0, 0.0, 10, 5),
    Pair(1, "a", 0.0, 2.0, 20, 40),
    Pair(2, "b", 1.0, 1.0, 30, 30),
    Pair(3, "b", 3.0, 0.0, 700, 5),
]


def test_four_pairs_by_hand():
    found = judge(PAIRS)
    assert (found["pairs"], found["accuracy"]) == (4, 2.5 / 4)
    assert found["accuracy_interval"][0] < 2.5 / 4 < found["accuracy_interval"][1]
    assert found["baselines"] == {"a coin": 0.5, "always the longer": 2.5 / 4, "always the shorter": 1.5 / 4}
    assert found["margin_mean"] == (1 - 2 + 0 + 3) / 4
    assert {name: group["accuracy"] for name, group in found["by_source"].items()} == {"a": 0.5, "b": 0.75}
    assert list(found["by_length"]) == ["  1 to  16 tokens", " 17 to  32 tokens", " 33 to  64 tokens",
                                        "513 tokens and more"]  # fmt: skip
    assert found["by_length"][" 33 to  64 tokens"]["accuracy"] == 0
    assert sum(found["margins"]["counts"]) == 4
    # margins (1, -2, 0, 3) against differences in length (5, -20, 0, 695)
    x, y = torch.tensor([1.0, -2, 0, 3]), torch.tensor([5.0, -20, 0, 695])
    assert found["correlation_margin_length_difference"] == pytest.approx(torch.corrcoef(torch.stack([x, y]))[0, 1])


@pytest.mark.parametrize(("length", "name"), [(16, "  1 to  16 tokens"), (17, " 17 to  32 tokens"), (513, "513")])
def test_bucket_ends(length, name):
    assert length_bucket(Pair(0, "", 0, 0, length, 1)).startswith(name)


class LastToken(nn.Module):
    """Scores a token by its id."""

    def forward(self, input_ids, attention_mask):
        return input_ids.float()


def test_pairs_come_back_in_the_order_of_the_dataset():
    rows = datasets.Dataset.from_list(
        [
            {
                "chosen_ids": [1] * n + [50 + n],
                "chosen_mask": [0] * n + [1],
                "rejected_ids": [1, 1, 10 + n],
                "rejected_mask": [0, 1, 1],
                "length": n + 1,
                "source": f"s{n}",
                "pairs": 1,
            }
            for n in (9, 2, 5, 7)
        ]
    )
    pairs = pairs_of(rows, held_out_rewards(LastToken(), rows, 3, 0, torch.device("cpu")))
    assert [(p.row, p.source, p.chosen, p.rejected) for p in pairs] == [
        (0, "s9", 59, 19),
        (1, "s2", 52, 12),
        (2, "s5", 55, 15),
        (3, "s7", 57, 17),
    ]
    assert [(p.chosen_length, p.rejected_length) for p in pairs] == [(1, 2)] * 4
