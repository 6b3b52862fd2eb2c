"""Log-probs of response tokens: aligned with the token they belong to, whatever the padding."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.utils.engine.engine_checks import collate, fixed_rows
from training.utils.memory.live import LiveMemory
from training.utils.model import forward
from training.utils.model.classifiers import load_classifier
from training.utils.model.forward import TokenScorer, last_token_scores, response_kl, response_log_probs
from training.utils.model.reward_stats import RewardStats


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


def test_ids_that_no_text_has_are_read_by_a_model_of_fewer_embeddings(tiny_model):
    """Qwen 2.5's 7B has 128 more than its 0.5B, of one tokenizer, and may draw them."""
    scorer = TokenScorer(load_classifier(str(tiny_model), dtype="fp32", pad_token_id=2, fresh_head_seed=0)).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        plain = scorer(ids, torch.ones_like(ids))
        beyond = scorer(torch.tensor([[5, 6, 463, 8]]), torch.ones_like(ids))
    assert torch.equal(beyond[:, :2], plain[:, :2]) and beyond.isfinite().all()


def test_the_fresh_head_has_the_stated_spread(tiny_model):
    weight = load_classifier(str(tiny_model), dtype="fp32", pad_token_id=0, fresh_head_seed=3).score.weight
    assert weight.std().item() == pytest.approx(1 / 33, rel=0.4)
    again = load_classifier(str(tiny_model), dtype="fp32", pad_token_id=0, fresh_head_seed=3).score.weight
    assert torch.equal(weight, again)


class Output(torch.nn.Module):
    """A language model of one layer, from token to logits."""

    def __init__(self, vocabulary, width=8, last=None):
        super().__init__()
        torch.manual_seed(0)
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.head = torch.nn.Linear(width, vocabulary, bias=False)
        self.last = last

    def forward(self, input_ids, attention_mask, use_cache, logits_to_keep):
        logits = self.head(torch.nn.functional.normalize(self.embed(input_ids), dim=-1)[:, logits_to_keep])
        return SimpleNamespace(logits=self.last(logits) if self.last else logits)


def batch_of(rows, columns, vocabulary):
    """Random tokens; every second row's response is half as long."""
    ids = torch.randint(vocabulary, (rows, columns + 1), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[:, 0] = mask[1::2, columns // 2 :] = 0
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "response_mask": mask}


def plainly(model, batch, temperature):
    """Log-probs and entropies by autograd alone."""
    ids, mask = batch["input_ids"], batch["response_mask"]
    columns = torch.arange(ids.shape[1] - 1)
    logits = model(ids, None, use_cache=False, logits_to_keep=columns).logits.float() / temperature
    full = torch.log_softmax(logits, -1)
    log_probs = full.gather(-1, ids[:, 1:, None])[..., 0] * mask[:, 1:]
    return log_probs, -(full.exp() * full).sum(-1) * mask[:, 1:]


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("last", [None, torch.tanh])
@pytest.mark.parametrize("pieces", [1, 7, 1000])
def test_gradients_are_those_of_autograd(monkeypatch, entropy, dtype, last, pieces):
    """In pieces of any size; with an output layer whose own backward needs what it said (tanh), too."""
    monkeypatch.setattr(forward, "CHUNK_POSITIONS", pieces)
    model, batch = Output(50, last=last).to(dtype), batch_of(4, 9, 50)
    weights = torch.linspace(-1, 2, 36).view(4, 9)
    gradients = []
    for found in (response_log_probs(model, **batch, temperature=0.7, entropy=entropy), plainly(model, batch, 0.7)):
        log_probs, spread = (part if part is None else part[:, -9:] for part in found)
        objective = (weights * log_probs).sum() + ((weights * spread).sum() if entropy else 0.0)
        objective.backward()
        gradients.append((objective.item(), [p.grad.float() for p in model.parameters()]))
        model.zero_grad()
    (value, found), (expected, wanted) = gradients
    assert value == pytest.approx(expected, abs=1e-4)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **({"atol": 2e-6, "rtol": 1e-5} if dtype == torch.float32 else
                                                    {"atol": 2e-2, "rtol": 2e-2}))  # fmt: skip


def test_a_backward_that_is_made_twice_is_refused():
    """The first one's gradient stands where the logits were."""
    log_probs, _ = response_log_probs(Output(50), **batch_of(2, 5, 50))
    log_probs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        log_probs.sum().backward()


def test_there_is_no_second_copy_of_the_logits(monkeypatch):
    """Forward and backward: the logits, their width in fp32 for a piece, and what the layers' weights take."""
    vocabulary, columns = 20_000, 64
    monkeypatch.setattr(forward, "CHUNK_POSITIONS", 8)
    model, batch = Output(vocabulary, width=2), batch_of(4, columns, vocabulary)
    logits = 4 * columns * vocabulary * 4
    peaks = []
    for compute in (lambda: response_log_probs(model, **batch)[0], lambda: plainly(model, batch, 1.0)[0]):
        with LiveMemory([*model.parameters()]) as memory:
            compute().sum().backward()
        peaks.append(memory.peak / logits)
        model.zero_grad()
    assert 1.0 <= peaks[0] < 1.35
    assert peaks[1] > 2.5  # as it is without; what the bound would not let pass


def test_a_kl_takes_the_logits_of_both_and_no_more(monkeypatch):
    """Twice those of the answers, which is what a pair's two answers take in the rest of an evaluation."""
    vocabulary, columns = 20_000, 64
    monkeypatch.setattr(forward, "CHUNK_POSITIONS", 8)
    model, batch = Output(vocabulary, width=2), batch_of(4, columns, vocabulary)
    with LiveMemory([*model.parameters()]) as memory:
        response_kl(model, contextlib.nullcontext(model), **batch)
    assert 2.0 <= memory.peak / (4 * columns * vocabulary * 4) < 2.4
