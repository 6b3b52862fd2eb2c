"""DPO's losses against values worked out by hand, in double precision and by their gradients."""

import math

import pytest
import torch
from hypothesis import given, strategies as st

from training.step2_dpo_finetuning.dpo import pair_loss, scores


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


CHOSEN, REJECTED, BETA = -1.5, -2.5, 0.5  # scores: a margin of 1, of rewards 0.5
BY_HAND = {
    "sigmoid": -math.log(sigmoid(0.5)),  # 0.4741
    "hinge": 0.5,  # 1 - 0.5
    "ipo": 0.0,  # (1 - 1 / (2 x 0.5)) squared
    "simpo": -math.log(sigmoid(0.5 - 0.3)),  # gamma 0.3
    # log-odds: log(e^-1.5 / (1 - e^-1.5)) = -1.2475, log(e^-2.5 / (1 - e^-2.5)) = -2.4139
    "orpo": 1.5 - 0.5 * math.log(sigmoid(-1.5 - math.log(1 - math.exp(-1.5)) + 2.5 + math.log(1 - math.exp(-2.5)))),
    # chosen against the rejected answers' drift of 0.2, rejected against the chosen answers' of 0.1
    "kto": 1 - (sigmoid(0.5 * (-1.5 - 0.2)) + sigmoid(0.5 * (0.1 + 2.5))) / 2,
}


@pytest.mark.parametrize("loss", sorted(BY_HAND))
def test_by_hand(loss):
    pair = torch.tensor([CHOSEN], dtype=torch.float64), torch.tensor([REJECTED], dtype=torch.float64)
    found = pair_loss(loss, *pair, beta=BETA, gamma=0.3, drift=(0.1, 0.2))
    assert found.shape == (1,) and found.item() == pytest.approx(BY_HAND[loss], abs=1e-12)


def test_figures_of_the_comments():
    assert BY_HAND["sigmoid"] == pytest.approx(0.4741, abs=5e-5)
    assert BY_HAND["orpo"] == pytest.approx(1.5 - 0.5 * math.log(sigmoid(-1.2475 + 2.4139)), abs=1e-4)


@pytest.mark.parametrize("loss", ["sigmoid", "simpo"])
def test_smoothed_labels_are_the_mean_over_both_orders(loss):
    pair = torch.tensor([CHOSEN]), torch.tensor([REJECTED])
    found = pair_loss(loss, *pair, beta=BETA, label_smoothing=0.1, gamma=0.3)
    margin = 0.5 - (0.3 if loss == "simpo" else 0)
    assert found.item() == pytest.approx(-0.9 * math.log(sigmoid(margin)) - 0.1 * math.log(sigmoid(-margin)), abs=1e-6)


def test_without_a_margin_dpo_is_a_coin_and_pulls_by_half_of_beta():
    chosen, rejected = (torch.zeros(1, requires_grad=True) for _ in range(2))
    loss = pair_loss("sigmoid", chosen, rejected, beta=0.2)
    loss.sum().backward()
    assert loss.item() == pytest.approx(math.log(2))
    assert chosen.grad is not None and rejected.grad is not None
    assert (chosen.grad.item(), rejected.grad.item()) == pytest.approx((-0.1, 0.1))


def test_scores_by_loss():
    log_probs, reference, tokens = (torch.tensor(x) for x in ([-6.0, -8.0], [-4.0, -9.0], [2, 4]))
    assert scores("sigmoid", log_probs, reference, tokens).tolist() == [-2.0, 1.0]
    assert scores("ipo", log_probs, reference, tokens).tolist() == [-1.0, 0.25]
    assert scores("simpo", log_probs, None, tokens).tolist() == [-3.0, -2.0]


@given(st.floats(-60, -1e-4), st.floats(-60, -1e-4))
def test_orpo_keeps_its_digits_at_both_ends(chosen, rejected):
    """In fp32 against the same formula in double precision, where 1 - p does not vanish."""

    def log_odds(x: float) -> float:
        return x - math.log(-math.expm1(x))

    expected = -chosen + 0.1 * math.log1p(math.exp(min(log_odds(rejected) - log_odds(chosen), 700)))
    found = pair_loss("orpo", torch.tensor([chosen]), torch.tensor([rejected]), beta=0.1)
    assert found.item() == pytest.approx(expected, rel=2e-5, abs=2e-5)


@pytest.mark.parametrize("loss", sorted(BY_HAND))
def test_far_scores_have_finite_losses_and_gradients(loss):
    chosen = torch.tensor([-900.0, -1e-9, 0.0], requires_grad=True)
    rejected = torch.tensor([-1e-9, -900.0, 0.0], requires_grad=True)
    found = pair_loss(loss, chosen, rejected, beta=1.0)
    found.sum().backward()
    for tensor in (found, chosen.grad, rejected.grad):
        assert tensor is not None and torch.isfinite(tensor).all()
