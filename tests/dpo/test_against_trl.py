"""Our losses and gradients beside TRL's on the same batch; skipped where TRL is missing (requirements-optional.txt)."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.dpo.test_pairs import Engine
from training.step2_dpo_finetuning.dpo import pair_loss
from training.step2_dpo_finetuning.pairs import Preferences, answer_log_probs, answer_tokens
from training.utils.arguments import DPOArguments
from training.utils.data.batches import SIDES

pytest.importorskip("trl")


def load(path):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


@pytest.mark.parametrize(("loss", "beta"), [("sigmoid", 0.1), ("sigmoid", 0.5), ("hinge", 0.1), ("ipo", 0.2)])
def test_losses_and_gradients_of_dpo_trainer(tiny_model, tmp_path, loss, beta):
    from trl import DPOConfig, DPOTrainer

    policy, reference = load(tiny_model), load(tiny_model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    pairs = [
        {"prompt": f"What is {n} and one?", "chosen": f" It is {n + 1}.", "rejected": " No idea, " * (n + 1)}
        for n in range(4)
    ]
    config = DPOConfig(
        output_dir=str(tmp_path), loss_type=[loss], beta=beta, per_device_train_batch_size=4, report_to="none",
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_dropout=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    trainer = DPOTrainer(
        policy, ref_model=reference, args=config, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer
    )
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    gradients = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()

    mine = {"response_mask": batch["completion_mask"]} | {k: batch[k] for k in ("input_ids", "attention_mask")}
    mine |= dict(zip(SIDES, torch.arange(8).chunk(2), strict=True))
    preferences = Preferences(Engine(policy), reference, DPOArguments(loss=loss, beta=beta))
    before = preferences.reference(mine)
    ours = preferences.judge(answer_log_probs(policy, mine), before, answer_tokens(mine), (0.0, 0.0))["loss"].mean()
    ours.backward()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5, abs=1e-5)
    assert abs(ours.item() - {"sigmoid": 0.6931, "hinge": 1.0, "ipo": 6.25}[loss]) > 1e-3, "the policy has moved"
    for name, parameter in policy.named_parameters():
        assert torch.allclose(parameter.grad, gradients[name], rtol=1e-4, atol=1e-5), name


PER_TOKEN = torch.tensor([-0.4, -2.0, -5.0]), torch.tensor([-1.0, -1.9, -0.2])
OF_TRL = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=2.0)


def test_simpo_of_cpo_trainer():
    from trl.experimental.cpo import CPOTrainer

    theirs = SimpleNamespace(**vars(OF_TRL), alpha=0.0, loss_type="simpo", simpo_gamma=0.7, label_smoothing=0.1)
    losses, *_ = CPOTrainer.cpo_loss(theirs, *PER_TOKEN)
    ours = pair_loss("simpo", *PER_TOKEN, beta=2.0, gamma=0.7, label_smoothing=0.1)
    assert torch.allclose(losses, ours, rtol=1e-5, atol=1e-6)


def test_odds_of_orpo_trainer():
    from trl.experimental.orpo import ORPOTrainer

    losses, *_ = ORPOTrainer.odds_ratio_loss(OF_TRL, *PER_TOKEN)  # to be subtracted from the supervised loss
    ours = pair_loss("orpo", *PER_TOKEN, beta=2.0)
    assert torch.allclose(-PER_TOKEN[0] - losses, ours, rtol=1e-5, atol=1e-6)
