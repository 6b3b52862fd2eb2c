"""Answers behind what they begin with, forwarded once: the same numbers and gradients as a row for each answer."""

import functools
import math
import sys
from random import Random

import datasets
import pytest
import torch

from tests import families
from tests.step2.ranking_checks import PAD, RATE, fixed_rankings
from tests.utils.engine.engine_checks import TINY_SHARDS
from training.step2_dpo_finetuning.pairs import Preferences, answer_log_probs, answer_tokens
from training.step2_reward_model_finetuning.pairs import held_out_rewards
from training.utils.arguments import DPOArguments, LoraArguments
from training.utils.data.batches import collate_answers, collate_pairs, collate_sft, pair_micro_batches, rankings_of
from training.utils.engine import engine as engines
from training.utils.engine.frozen import load_reference
from training.utils.engine.zero_config import deepspeed_config
from training.utils.model import classifiers, loading
from training.utils.model.forward import TokenScorer, answer_rewards, enable_gradient_checkpointing
from training.utils.model.lora import with_adapters
from training.utils.run.distributed import init_distributed, reduce_sums
from training.utils.sharing import attention, trial as sharings
from training.utils.sharing.rows import Sharing, behind_beginnings, tree_mask, tree_size, ways_back

ANY = Sharing(sys.maxsize, 1 << 20)  # so wide that attention costs nothing
ACROSS = Sharing(sys.maxsize, 1 << 20, across=True)
SHARES = {"opt", "gpt2", "gpt_neox", "llama", "qwen3", "phi", "falcon", "mixtral"}
OWN_ROWS = {  # why the others do not; gpt_neo and gemma2 once their windows hold a row
    "bloom": "places tokens by itself",
    "mpt": "places tokens by itself",
    "mistral": "does not reach across a row",
    "mamba": "keep a state",
    "lfm2": "keep a state",
}


@functools.cache
def saved(family, folder):
    folder.mkdir()
    return families.save(family, folder)


@pytest.fixture
def model_of(tmp_path_factory):
    """A tiny language model or reward model of a family."""

    def build(family, kind, dtype="fp32"):
        path = saved(family, tmp_path_factory.getbasetemp() / f"family-{family}")
        if kind == "language":
            return loading.load_causal_lm(path, dtype=dtype)
        load = {"dtype": dtype, "pad_token_id": PAD, "fresh_head_seed": 1}
        return TokenScorer(classifiers.load_classifier(path, **load))

    return build


def pair(beginning, chosen, rejected):
    row = {}
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        row |= {f"{name}_ids": beginning + answer, f"{name}_mask": [0] * len(beginning) + [1] * len(answer)}
    return row


def assert_every_answer_is_there(batch):
    """Its tokens, its positions, and that each of them sees those before it and nothing else."""
    real = batch["attention_mask"] == 1
    own = batch["shared_row"][:, None], batch["shared_columns"]
    assert torch.equal(batch["shared_ids"][own][real], batch["input_ids"][real])
    places = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    assert torch.equal(batch["shared_positions"][own][real], places[real]), "positions go on behind the beginning"
    seen = tree_mask(batch["shared_seen_until"])[:, 0]
    for row, columns, tokens in zip(batch["shared_row"], batch["shared_columns"], real, strict=True):
        columns = columns[tokens].tolist()
        for i, column in enumerate(columns):
            assert seen[row, column].nonzero().flatten().tolist() == columns[: i + 1]


@pytest.mark.parametrize(("sharing", "rows"), [(ANY, 5), (ACROSS, 1)])
def test_shared_rows_hold_every_answer(sharing, rows):
    pairs = fixed_rankings()
    batch, alone = collate_pairs(pairs, PAD, sharing), collate_pairs(pairs, PAD)
    assert all(torch.equal(tensor, batch[name]) for name, tensor in alone.items())
    assert len(batch["shared_ids"]) == rows
    assert (batch["shared_seen_until"] > 0).sum() < batch["attention_mask"].sum()
    assert_every_answer_is_there(batch)


def test_answers_part_where_they_differ():
    batch = collate_pairs([pair([5, 6, 7], [8, 9, 1], [8, 4, 4])], 0, ANY)
    assert batch["shared_ids"].tolist() == [[5, 6, 7, 8, 4, 4, 9, 1]]
    assert batch["shared_seen_until"].tolist() == [[8, 8, 8, 8, 6, 6, 8, 8]]
    assert batch["shared_positions"].tolist() == [[0, 1, 2, 3, 4, 5, 4, 5]]
    cut = collate_pairs([{**pair([5, 6, 7], [8], [9]), "rejected_ids": [5, 1, 7, 9]}], 0, Sharing(99, 99))
    assert cut["shared_ids"].tolist() == [[5, 1, 7, 9, 6, 7, 8]], "beginnings that were cut differ"


def test_an_answer_may_be_the_beginning_of_another_or_be_given_twice():
    answers = [{"input_ids": [5, 6, *own], "response_mask": [0, 0, *[1] * len(own)]} for own in ([7, 8], [7], [7, 8])]
    batch = collate_answers(answers, [[0, 1, 2]], 0, ANY)
    assert batch["shared_ids"].tolist() == [[5, 6, 7, 8]] and batch["shared_seen_until"].tolist() == [[4] * 4]
    assert batch["shared_columns"].tolist() == [[0, 1, 2, 3], [0, 1, 2, 0], [0, 1, 2, 3]]


def test_prompts_stand_behind_what_they_have_in_common():
    rows = [pair([5, 6, 7], [8, 9], [1]), pair([5, 6, 4, 4], [3], [2]), pair([5, 6, 4, 5], [1], [1, 2])]
    batch = collate_pairs(rows, 0, ACROSS)
    assert batch["shared_ids"].tolist() == [[5, 6, 4, 4, 2, 3, 5, 1, 2, 7, 1, 8, 9]]
    assert batch["shared_seen_until"].tolist() == [[13, 13, 9, 6, 5, 6, 9, 9, 9, 13, 11, 13, 13]]
    assert batch["shared_positions"].tolist() == [[0, 1, 2, 3, 4, 4, 3, 4, 5, 2, 3, 3, 4]]
    assert batch["shared_row"].tolist() == [0] * 6, "chosen, then rejected"
    assert len(collate_pairs(rows, 0, ANY)["shared_ids"]) == 3


def beginnings(texts):
    """The nodes of the tree of these texts: what any of them begins with."""
    return {tuple(text[: n + 1]) for text in texts for n in range(len(text))}


def answers_at_random(random, most):
    """Answers to prompts that are cut, some of no token, in any order, and their prompts' numbers."""
    answers, prompts = [], []
    start = random.choices((1, 2), k=random.randint(0, 3))
    for number in range(random.randint(1, most)):
        prompt = start + random.choices((1, 2), k=random.randint(1, 6))
        for _ in range(random.randint(1, 3)):
            text, own = [*prompt[:-1], random.choice((prompt[-1], 3))], random.choices((4, 5), k=random.randint(0, 4))
            answers.append({"input_ids": text + own, "response_mask": [0] * len(text) + [1] * len(own)})
            prompts.append(number)
    order = random.sample(range(len(answers)), len(answers))
    return [answers[i] for i in order], [prompts[i] for i in order]


def padded_on_both_sides(random, answers):
    """As rows of `collate_sft` that are moved to the right by up to three columns."""
    left = [random.randint(0, 3) for _ in answers]
    moved = {name: torch.nn.functional.pad(tensor, (3, 0)) for name, tensor in collate_sft(answers, PAD).items()}
    return {n: torch.stack([row.roll(-by) for row, by in zip(t, left, strict=True)]) for n, t in moved.items()}


@pytest.mark.parametrize("sharing", [ANY, ACROSS, Sharing(14, 1 << 20, across=True)])
def test_shared_rows_hold_every_answer_and_nothing_twice(sharing):
    random, shapes = Random(1), set()
    for _ in range(200):
        answers, prompts = answers_at_random(random, 9)
        groups = [[i for i, n in enumerate(prompts) if n == number] for number in dict.fromkeys(prompts)]
        moved = padded_on_both_sides(random, answers)
        shared = behind_beginnings(moved["input_ids"], moved["attention_mask"], groups, PAD, sharing)
        texts = [answer["input_ids"] for answer in answers]
        apart = len(texts) * max(map(len, texts))
        of_groups = [tree_size([texts[i] for i in members]) for members in groups]
        assert of_groups == [len(beginnings(texts[i] for i in members)) for members in groups]
        if not shared:
            shapes_tried = [(len(groups), max(of_groups))] + [(1, len(beginnings(texts)))] * (sharing is not ANY)
            assert all(rows * width >= apart or width > sharing.longest for rows, width in shapes_tried)
            continue
        assert_every_answer_is_there(moved | shared)
        ids, row_of = shared["shared_ids"], shared["shared_row"].tolist()
        assert ids.numel() < apart and ids.shape[1] <= sharing.longest
        for row in range(len(ids)):
            mine = [text for text, at in zip(texts, row_of, strict=True) if at == row]
            assert (shared["shared_seen_until"][row] > 0).sum() == tree_size(mine) == len(beginnings(mine))
        for members in groups:
            assert len({row_of[i] for i in members}) == 1
        if sharing is ACROSS:
            one = behind_beginnings(moved["input_ids"], moved["attention_mask"], groups, PAD, ANY)
            assert len(ids) == 1 and ids.numel() <= one.get("shared_ids", moved["input_ids"]).numel()
        shapes.add((len(groups), len(ids)))
    assert len(shapes) > 5


def test_rows_are_shared_where_that_is_cheaper():
    prompt, answer, other = [3] * 20, [4] * 20, [5] * 20
    assert "shared_ids" in collate_pairs([pair(prompt, answer, other)], 0, Sharing(60, 64))
    assert "shared_ids" not in collate_pairs([pair(prompt, answer, other)], 0, Sharing(59, 64)), "too long a row"
    short = pair([3], [4] * 200, [5] * 200)
    assert "shared_ids" not in collate_pairs([short], 0, Sharing(999, 64)), "attention would cost more than a token"
    assert "shared_ids" in collate_pairs([short], 0, ANY)
    assert "shared_ids" not in collate_pairs([pair([], [4, 4], [5, 5])], 0, ANY), "nothing in common"
    even = [pair([3] * 30, [4] * 18, [5] * 2)] * 3
    assert "shared_ids" in collate_pairs(even, 0, Sharing(999, 64))
    uneven = [*even, pair([3] * 2, [4] * 48, [5] * 48)]
    assert "shared_ids" not in collate_pairs(uneven, 0, Sharing(999, 64)), "padding is counted"


def test_rows_are_as_many_as_is_cheapest_and_equally_long():
    def rows(sizes, longest):
        answers = [
            {"input_ids": [3] * 300 + [n] * size, "response_mask": [0] * 300 + [1] * size}
            for n, size in enumerate(sizes)
        ]
        groups, sharing = [[n] for n in range(len(sizes))], Sharing(longest, 64, across=True)
        return collate_answers(answers, groups, 0, sharing)["shared_ids"].shape

    assert rows([20] * 5, 340) == (3, 340), "not four"
    assert rows([60, 10, 10, 50, 20, 10], 999) == (1, 460)
    assert rows([60, 10, 50, 10, 20, 10], 380) == (2, 380), "each as it comes would take rows of 300 + 130"


def test_rows_grow_across_prompts_as_long_as_they_may():
    rows = [pair([3] * 20 + [n], [4] * 10, [5] * 10) for n in range(8)]
    for longest, expected in ((999, 1), (150, 2), (60, 8)):
        batch = collate_pairs(rows, 0, Sharing(longest, 64, across=True))
        assert len(batch["shared_ids"]) == expected, longest
    for count in (2, 3, 5, 6, 7):
        answers = [{"input_ids": [3] * 20 + [n] * 10, "response_mask": [0] * 20 + [1] * 10} for n in range(count)]
        batch = collate_answers(answers, [[n] for n in range(count)], 0, ACROSS)
        assert batch["shared_ids"].shape == (1, 20 + 10 * count)


def assert_equal_with_gradients(model, answers_of, batch, tolerance):
    alone = {name: tensor for name, tensor in batch.items() if not name.startswith("shared_")}
    found = []
    for each in (batch, alone):
        numbers = answers_of(model, each)
        (numbers * torch.linspace(0.5, 1.5, numbers.numel()).view_as(numbers)).sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad(set_to_none=True)
        found.append((numbers.detach(), grads))
    (numbers, grads), (expected, others) = found
    assert torch.allclose(numbers, expected, atol=tolerance, rtol=tolerance)
    assert grads.keys() == others.keys() and grads
    whole = torch.cat([grad.flatten() for grad in others.values()]).norm()
    off = torch.cat([(grads[name] - others[name]).flatten() for name in grads]).norm() / whole
    assert off < 10 * tolerance, off


KINDS = {"language": answer_log_probs, "reward": answer_rewards}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", sorted(SHARES))
def test_families_give_the_same_numbers_and_gradients(model_of, monkeypatch, family, kind):
    model, pieces, made = model_of(family, kind), attention._pieces, []
    monkeypatch.setattr(attention, "_pieces", lambda *args: (made.append(1), pieces(*args))[1])
    by_blocks = family != "falcon"  # whose attention is its own
    assert sharings.find_sharing(model, KINDS[kind], PAD) == Sharing(128, 32, across=by_blocks)
    for sharing in (ANY, ACROSS):
        assert_equal_with_gradients(model.train(), KINDS[kind], collate_pairs(fixed_rankings(), PAD, sharing), 2e-5)
    assert bool(made) == by_blocks


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_with_adapters_recomputed_activations_and_any_attention(tiny_model, kind, attention):
    load = {"dtype": "fp32", "attn_implementation": attention}
    made = loading.load_causal_lm(str(tiny_model), **load)
    if kind == "reward":
        made = classifiers.load_classifier(str(tiny_model), pad_token_id=PAD, fresh_head_seed=1, **load)
    torch.manual_seed(0)
    model = with_adapters(made, LoraArguments(4, "q_proj,v_proj", True))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    enable_gradient_checkpointing(model)
    model = TokenScorer(model) if kind == "reward" else model
    assert sharings.find_sharing(model, KINDS[kind], PAD) is not None
    assert_equal_with_gradients(model.train(), KINDS[kind], collate_pairs(fixed_rankings(), PAD, ACROSS), 2e-5)


def train_preferences(path, *, shares):
    """Losses of three steps of DPO at ZeRO-3 on this process's ranks, and how many rows went through the model."""
    device = init_distributed()
    config = deepspeed_config(zero_stage=3, dtype="fp32", micro_batch_size=2, overrides=TINY_SHARDS)
    model = loading.load_causal_lm(path, dtype="fp32", ds_config=config)
    engine = engines.initialize_engine(model.to(device), config, **RATE)
    frozen = load_reference(
        path, adapters_only=False, zero_stage=3, offload=False, device=device, dtype="fp32", attn_implementation="sdpa"
    )
    sharing = sharings.find_sharing(engine, answer_log_probs, PAD) if shares else None
    preferences = Preferences(engine, frozen, DPOArguments(), sharing)
    dataset = datasets.Dataset.from_list(fixed_rankings())
    losses, rows = [], 0
    for _ in range(3):
        batches = list(pair_micro_batches(dataset, rankings_of(dataset), 2, PAD, device, sharing))
        references = [preferences.reference(batch) for batch in batches]
        engine.train()
        total = 0.0
        for batch, reference in zip(batches, references, strict=True):
            judged = preferences.judge(answer_log_probs(engine, batch), reference, answer_tokens(batch), (0.0, 0.0))
            loss = (batch["weights"] * judged["loss"]).sum()
            engines.backward(engine, loss, 5)
            total += loss.item()
            rows += len(batch.get("shared_ids", batch["input_ids"]))
        engines.optimizer_step(engine)
        losses.append(reduce_sums({"loss": total}, device)["loss"] / 5)
    return losses, rows


def test_dpo_at_zero_3_on_two_ranks(tiny_model, rank_pair):
    (shared, few), _ = rank_pair.run(train_preferences, str(tiny_model), shares=True)
    (alone, many), _ = rank_pair.run(train_preferences, str(tiny_model), shares=False)
    assert shared == pytest.approx(alone, abs=1e-5) and shared[0] == pytest.approx(math.log(2), abs=1e-6)
    assert shared[2] < shared[0] and few < many


def test_a_leak_between_answers_would_not_pass(model_of):
    model, batch = model_of("llama", "reward"), collate_pairs(fixed_rankings(), PAD, ACROSS)
    counting = torch.arange(batch["shared_ids"].shape[1]).expand_as(batch["shared_ids"])
    until = batch["shared_seen_until"]
    to_the_end = torch.full_like(until, until.shape[1])
    to_siblings = until.clone()
    for *_, before, own in filter(lambda way: len(way) > 1, ways_back(until)):
        to_siblings[0, own.start : own.stop] = until[0, before.stop - 1]
    assert not torch.equal(to_siblings, until) and not torch.equal(to_siblings, to_the_end)
    leaks = to_the_end, to_siblings
    for fault in (*({"shared_seen_until": leak} for leak in leaks), {"shared_positions": counting}):
        with pytest.raises(AssertionError):
            assert_equal_with_gradients(model, answer_rewards, batch | fault, 2e-5)


@pytest.mark.parametrize("family", sorted(OWN_ROWS))
def test_families_that_need_a_row_for_each_answer(model_of, family, capsys):
    assert sharings.find_sharing(model_of(family, "language"), answer_log_probs, PAD) is None
    assert OWN_ROWS[family] in capsys.readouterr().out


def test_the_environment_can_give_each_answer_a_row_of_its_own(model_of, monkeypatch, capsys):
    model = model_of("llama", "language")
    assert sharings.find_sharing(model, answer_log_probs, PAD) is not None
    monkeypatch.setenv("TRIPOD_SHARED_ROWS", "0")
    assert sharings.find_sharing(model, answer_log_probs, PAD) is None
    assert "answers go through the model each by itself: TRIPOD_SHARED_ROWS=0" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_family_is_tried_whatever_its_configuration_says(model_of, monkeypatch, capsys, dtype):
    """Windows shorter than the trial's rows, were they not known by name; and a forward that fails."""
    monkeypatch.setattr(sharings, "LIMITS", ())
    assert sharings.find_sharing(model_of("llama", "reward", dtype), answer_rewards, PAD) is not None
    assert sharings.find_sharing(model_of("mistral", "reward", dtype), answer_rewards, PAD) is None
    assert "its numbers are others" in capsys.readouterr().out
    monkeypatch.setattr(sharings, "_why_never", lambda _: "")
    assert sharings.find_sharing(model_of("bloom", "language", dtype), answer_log_probs, PAD) is None
    assert "its numbers are others" in (told := capsys.readouterr().out) or "refuses" in told


def test_a_head_that_says_nothing_does_not_hide_that_rows_may_be_shared(model_of):
    """A fresh one may be nearly blind to a leak: in bf16 rounding then looks as large, for one seed in four."""
    model = model_of("llama", "reward", "bf16")
    torch.nn.init.zeros_(model.classifier.score.weight)
    assert sharings.find_sharing(model, answer_rewards, PAD) is not None


def test_single_tokens_that_rounding_moves_do_not_hide_that_rows_may_be_shared(model_of):
    """As the second token of a conversation in SmolLM2 does, after some training in bf16."""
    model, forwards = model_of("llama", "language", "bf16"), []

    def move(_, __, output):
        forwards.append(1)
        output.last_hidden_state[:, 1] *= len(forwards)

    model.model.register_forward_hook(move)
    assert sharings.find_sharing(model, answer_log_probs, PAD) is not None
    assert len(forwards) == 3


def test_a_family_whose_hidden_states_are_not_to_be_seen_gets_a_row_for_each_answer(model_of, monkeypatch, capsys):
    model = model_of("llama", "language")
    assert sharings.find_sharing(model, answer_log_probs, PAD) is not None
    monkeypatch.setattr(sharings, "hasattr", lambda *_: False, raising=False)  # no output has any
    assert sharings.find_sharing(model, answer_log_probs, PAD) is None
    assert "hidden states can not be compared" in capsys.readouterr().out


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_held_out_rewards_with_shared_rows(model_of, batch_size):
    scorer, dataset = model_of("llama", "reward"), datasets.Dataset.from_list(fixed_rankings())
    device = torch.device("cpu")
    shared, alone = (held_out_rewards(scorer, dataset, batch_size, PAD, device, how) for how in (ANY, None))
    for found, expected in zip(shared, alone, strict=True):
        assert found == pytest.approx(expected, abs=1e-5)
