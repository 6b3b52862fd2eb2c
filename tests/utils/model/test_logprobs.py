"""Log-probs of response tokens: aligned with the token they belong to, whatever the padding."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.utils.engine.engine_checks import collate, fixed_rows
from training.utils.model import logprobs
from training.utils.model.classifiers import TokenScorer, load_classifier
from training.utils.model.logprobs import response_log_probs
from training.utils.model.reward_model import RewardStats, last_token_scores


@pytest.fixture(scope="module")
def model(tiny_model):
    return AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()


def test_equals_a_full_softmax_row_by_row(model):
    rows = fixed_rows()
    with torch.no_grad():
        ours, entropy = response_log_probs(model, **collate(rows, 20), temperature=0.7, entropy=True)
        for i, (ids, mask) in enumerate(rows):
            logits = model(torch.tensor([ids])).logits[0] / 0.7
            full = torch.log_softmax(logits, -1)
            for t, wanted in enumerate(mask):
                expected = full[t - 1, ids[t]].item() if wanted else 0.0
                assert ours[i, t].item() == pytest.approx(expected, abs=1e-4)
                spread = -(full[t - 1].exp() * full[t - 1]).sum().item() if wanted else 0.0
                assert entropy[i, t].item() == pytest.approx(spread, abs=1e-4)


def test_padding_moves_nothing(model):
    rows = fixed_rows()
    with torch.no_grad():
        right, _ = response_log_probs(model, **collate(rows, 25))
        left = {name: torch.zeros(len(rows), 25, dtype=torch.long) for name in collate(rows, 25)}
        for i, (ids, mask) in enumerate(rows):
            left["input_ids"][i, 25 - len(ids) :] = torch.tensor(ids)
            left["attention_mask"][i, 25 - len(ids) :] = 1
            left["response_mask"][i, 25 - len(ids) :] = torch.tensor(mask)
        shifted, _ = response_log_probs(model, **left)
        blind, _ = response_log_probs(model, **{**left, "attention_mask": torch.ones_like(left["attention_mask"])})
    for i, (ids, _) in enumerate(rows):
        torch.testing.assert_close(shifted[i, 25 - len(ids) :], right[i, : len(ids)], rtol=0, atol=1e-4)
    assert (blind - shifted).abs().max() > 1e-2  # the planted fault: a mask that is not there


def test_the_first_token_is_never_asked_for(model):
    batch = collate(fixed_rows(), 20)
    with torch.no_grad():
        every, _ = response_log_probs(model, **{**batch, "response_mask": batch["attention_mask"]})
        some, _ = response_log_probs(model, **batch)
    assert every[:, 0].abs().sum() == 0
    torch.testing.assert_close(every * batch["response_mask"], some, rtol=0, atol=1e-4)


def test_a_batch_without_response_tokens_still_has_a_gradient(model):
    batch = collate(fixed_rows()[:2], 20)
    batch["response_mask"].zero_()
    log_probs, _ = response_log_probs(model, **batch)
    log_probs.sum().backward()
    assert log_probs.abs().sum() == 0
    assert all(p.grad is not None and p.grad.abs().sum() == 0 for p in model.parameters())
    model.zero_grad()


def test_the_reward_is_the_score_at_the_last_response_token():
    scores = torch.arange(12.0).view(2, 6)
    mask = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 1, 1]])
    assert last_token_scores(scores, mask).tolist() == [2.0, 11.0]


def test_the_critic_speaks_in_normalised_rewards(tiny_model):
    classifier = load_classifier(str(tiny_model), dtype="fp32", pad_token_id=0, fresh_head_seed=3).eval()
    batch = collate(fixed_rows(), 20)
    with torch.no_grad():
        raw = TokenScorer(classifier)(batch["input_ids"], batch["attention_mask"])
        normal = TokenScorer(classifier, 0.3, 2.0)(batch["input_ids"], batch["attention_mask"])
    stats = RewardStats(0.3, 2.0, 5, "fp32")
    torch.testing.assert_close(normal, stats.normalise(raw))


def test_the_fresh_head_has_the_stated_spread(tiny_model):
    weight = load_classifier(str(tiny_model), dtype="fp32", pad_token_id=0, fresh_head_seed=3).score.weight
    assert weight.std().item() == pytest.approx(1 / 33, rel=0.4)
    again = load_classifier(str(tiny_model), dtype="fp32", pad_token_id=0, fresh_head_seed=3).score.weight
    assert torch.equal(weight, again)


def test_the_backward_touches_all_logits_once(model, monkeypatch):
    """However many pieces there are: each index of the logits costs a tensor of their size in the backward."""
    batch = collate(fixed_rows(), 20)
    gradients = {}
    for pieces in (1, 4):
        monkeypatch.setattr(logprobs, "CHUNK_POSITIONS", -(-int(batch["response_mask"][:, 1:].sum()) // pieces))
        model.zero_grad()
        log_probs, _ = response_log_probs(model, **batch)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            log_probs.sum().backward()
        counts = {event.key: event.count for event in profile.key_averages()}
        gradients[pieces] = (counts["IndexBackward0"], [p.grad.clone() for p in model.parameters()])
    assert gradients[1][0] == gradients[4][0]
    assert all(map(torch.equal, gradients[1][1], gradients[4][1]))
