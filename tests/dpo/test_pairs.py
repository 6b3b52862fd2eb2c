"""Policy, reference and their KL on a tiny model: against plain softmaxes, row by row, and over the loss's settings."""

import contextlib

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM

from training.step2_dpo_finetuning.pairs import Preferences, answer_log_probs, answer_tokens, means
from training.utils.arguments import DPOArguments, LoraArguments
from training.utils.data.batches import pair_micro_batches
from training.utils.model.forward import response_kl
from training.utils.model.lora import with_adapters

PAD = 2


class Engine(torch.nn.Module):
    """What `Preferences` takes of DeepSpeed's engine."""

    def __init__(self, model):
        super().__init__()
        self.module, self.device = model, torch.device("cpu")

    def forward(self, **inputs):
        return self.module(**inputs)


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def rows():
    """Five pairs of different lengths; of the first the prompt is three tokens."""
    found = []
    for n in range(5):
        prompt, chosen, rejected = [10 + n, 11, 12], [50 + n] * (2 + n), [90 + n] * (6 - n)
        row = {"length": 3 + max(2 + n, 6 - n), "pairs": 1}
        for name, answer in (("chosen", chosen), ("rejected", rejected)):
            row |= {f"{name}_ids": [*prompt, *answer], f"{name}_mask": [0] * 3 + [1] * len(answer)}
        found.append(row)
    return Dataset.from_list(found)


def micro_batches(data, size):
    """All rows in one optimizer step of this one rank."""
    return list(pair_micro_batches(data, [range(n, n + 1) for n in range(5)], size, PAD, torch.device("cpu")))


@pytest.fixture
def changed(tiny_model):
    """A policy that has left the model that it started from."""
    model = load(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def plain(model, ids, start):
    """The log-prob of ids from ``start`` on, and the log-softmaxes there, one row without padding."""
    with torch.no_grad():
        full = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)[start - 1 : -1]
    return sum(full[i, token].item() for i, token in enumerate(ids[start:])), full


def test_held_out_against_plain_softmaxes(tiny_model, changed):
    frozen, data = load(tiny_model), rows()
    preferences = Preferences(Engine(changed), frozen, DPOArguments(beta=0.3))
    found = preferences.held_out(data, 2, PAD)
    for n, row in enumerate(data):
        ratios = {}
        for side in ("chosen", "rejected"):
            own, base = (plain(model, row[f"{side}_ids"], 3)[0] for model in (changed, frozen))
            ratios[side] = own - base
            assert found[f"{side}_log_prob"][n].item() == pytest.approx(own, abs=2e-4)
            assert found[f"{side}_reward"][n].item() == pytest.approx(0.3 * (own - base), abs=1e-4)
        margin = torch.tensor(0.3 * (ratios["chosen"] - ratios["rejected"]))
        assert found["loss"][n].item() == pytest.approx(-torch.nn.functional.logsigmoid(margin).item(), abs=1e-4)
        assert found["accuracy"][n].item() == (margin > 0)
        assert found["chosen_change"][n].item() == pytest.approx(ratios["chosen"] / (2 + n), abs=1e-4)
    assert means(found)["margin"] == pytest.approx(found["margin"].mean().item())


def test_kl_against_plain_softmaxes(tiny_model, changed):
    frozen, data = load(tiny_model), rows()
    preferences = Preferences(Engine(changed), frozen, DPOArguments())
    expected, tokens = 0.0, 0
    for row in data:
        own, base = (plain(model, row["chosen_ids"], 3)[1] for model in (changed, frozen))
        expected += (own.exp() * (own - base)).sum().item()
        tokens += len(own)
    assert preferences.kl(data, 2, PAD) == pytest.approx(expected / tokens, abs=1e-5)
    assert expected > 0.1


def test_the_kl_of_a_model_from_itself_is_zero_and_a_filler_adds_nothing(tiny_model):
    model = load(tiny_model)
    ids = torch.tensor([[5, 6, 7], [5, 8, 2]])
    mask = torch.tensor([[0, 1, 1], [0, 0, 0]])
    found = response_kl(model, contextlib.nullcontext(model), ids, torch.ones_like(ids), mask)
    assert found.tolist() == [0.0, 0.0]
    assert response_kl(model, contextlib.nullcontext(model), ids, torch.ones_like(ids), mask * 0).numel() == 0


def test_adapters_off_are_the_reference_and_come_back(tiny_model):
    torch.manual_seed(0)
    model = with_adapters(load(tiny_model), LoraArguments(4, "q_proj", True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    engine = Engine(model)
    data = rows()
    (batch,) = micro_batches(data, 5)
    preferences = Preferences(engine, None, DPOArguments())
    before = answer_log_probs(engine, batch)
    reference = preferences.reference(batch)
    assert torch.equal(reference, answer_log_probs(load(tiny_model), batch)) and not reference.requires_grad
    after = answer_log_probs(engine, batch)
    assert torch.equal(before, after) and not torch.allclose(after, reference, atol=1e-2)
    after.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora_B" in name)


def test_losses_without_a_reference_ask_for_none(changed):
    preferences = Preferences(Engine(changed), None, DPOArguments(loss="orpo"))
    found = preferences.held_out(rows(), 2, PAD)
    assert "chosen_change" not in found and torch.isfinite(found["loss"]).all()


def test_held_out_of_kto_does_not_depend_on_batches(tiny_model, changed):
    preferences = Preferences(Engine(changed), load(tiny_model), DPOArguments(loss="kto"))
    one, two = preferences.held_out(rows(), 1, PAD), preferences.held_out(rows(), 5, PAD)
    assert torch.allclose(one["loss"], two["loss"], atol=1e-6)


def test_kto_drift_is_a_mean_over_all_pairs_at_least_zero(tiny_model, changed):
    data, preferences = rows(), Preferences(Engine(changed), load(tiny_model), DPOArguments(loss="kto"))
    batches = micro_batches(data, 2)
    references = [preferences.reference(batch) for batch in batches]
    differences = [answer_log_probs(changed, batch) - r for batch, r in zip(batches, references, strict=True)]
    expected = torch.cat(differences, 1).mean(1).clamp(min=0)
    assert preferences.drift(batches, references, 5) == pytest.approx(expected.tolist(), abs=1e-5)
    assert Preferences(Engine(changed), None, DPOArguments()).drift(batches, references, 5) == [0.0, 0.0]


def test_tokens_count_what_has_a_log_prob():
    sides = {"chosen": torch.tensor([0]), "rejected": torch.tensor([1])}
    batch = {"response_mask": torch.tensor([[1, 1, 0], [0, 1, 1]])} | sides
    assert answer_tokens(batch).tolist() == [[1], [2]]
