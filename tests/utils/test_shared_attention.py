"""Attention block by block: what torch's own gives under the whole mask, values and gradients."""

from random import Random

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.integrations.sdpa_attention import repeat_kv

from training.utils.sharing import attention
from training.utils.sharing.rows import tree_mask, ways_back

HEADS, KEY_HEADS, SIZE = 6, 2, 8


def tree_at_random(random, start, width, depth):
    """Seen until, of a run of tokens from ``start`` on and the trees behind it, which begin at any of its tokens."""
    size = min(random.choice((1, 2, 5, 20, 40)), width - start)
    until, end = [0] * size, start + size
    behind = []
    for token in reversed(range(size)):
        while end < width and depth and random.random() < 3 / size:
            behind += tree_at_random(random, end, width, depth - 1)
            end = start + size + len(behind)
        until[token] = end
    return until + behind


def trees_at_random(random, rows, width):
    """``[rows, width]``, see `tree_mask`: trees of several roots, of branches at any token, and padding."""
    made = []
    for _ in range(rows):
        row = []
        for _ in range(random.randint(1, 3)):
            if len(row) < width:
                row += tree_at_random(random, len(row), width, random.randint(0, 3))
        made.append((row + [0] * width)[:width])
    return torch.tensor(made)


def test_ways_back_say_what_the_mask_says():
    random = Random(2)
    for _ in range(50):
        trees = trees_at_random(random, 2, 60)
        seen = torch.zeros(2, 60, 60, dtype=torch.bool)
        for *before, own in ways_back(trees):
            for token in own:
                columns = [column % 60 for run in before for column in run] + [t % 60 for t in own if t <= token]
                seen[token // 60, token % 60, columns] = True
        assert torch.equal(seen | (torch.eye(60) > 0), tree_mask(trees)[:, 0])


def inputs(rows, width, dtype, value_size=SIZE):
    """Query, key and value, as a model has them, and weights that make a number of the output."""
    sizes = ((HEADS, SIZE), (KEY_HEADS, SIZE), (KEY_HEADS, value_size), (HEADS, value_size))
    made = [torch.randn(rows, width, *size).to(dtype).transpose(1, 2) for size in sizes]
    return [tensor.requires_grad_() for tensor in made[:3]], made[3].transpose(1, 2)


def under_the_mask(query, key, value, mask):
    key, value = (repeat_kv(tensor, HEADS // KEY_HEADS) for tensor in (key, value))
    return scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2)


def by_blocks(*tensors_and_mask):
    return attention.shared_attention(torch.nn.Module(), *tensors_and_mask)[0]


def compared(trees, dtype, value_size=SIZE):
    """Output and gradients by blocks, by torch in the same precision, and by torch in fp64; padding says nothing."""
    real, masks = (trees > 0)[..., None, None], (attention.block_mask(trees), tree_mask(trees))
    tensors, weights = inputs(*trees.shape, dtype, value_size)
    for ours, kind in ((True, dtype), (False, dtype), (False, torch.float64)):
        own = [tensor.detach().to(kind).requires_grad_() for tensor in tensors]
        out = (by_blocks(*own, masks[0]) if ours else under_the_mask(*own, masks[1])) * real
        yield [out.detach().double(), *(grad.double() for grad in torch.autograd.grad((out * weights).sum(), own))]


@pytest.mark.parametrize("kept_keys", [0, 999])
@pytest.mark.parametrize("piece", [1, 200, attention.PIECE])
def test_values_and_gradients_are_those_of_the_whole_mask(monkeypatch, piece, kept_keys):
    """In one piece and in many, weights kept or made again."""
    monkeypatch.setattr(attention, "PIECE", piece)
    monkeypatch.setattr(attention, "KEPT_KEYS", kept_keys)
    torch.manual_seed(0)
    random = Random(0)
    for _ in range(12):
        found, _, expected = compared(trees_at_random(random, random.randint(1, 3), 90), torch.float32, 4)
        for one, other in zip(found, expected, strict=True):
            assert torch.allclose(one, other, atol=2e-6, rtol=2e-6)


def test_bf16_is_as_near_to_the_truth_as_torchs_own():
    torch.manual_seed(0)
    for ours, torchs, exact in zip(*compared(trees_at_random(Random(3), 2, 90), torch.bfloat16), strict=True):
        off, allowed = ((found - exact).norm() / exact.norm() for found in (ours, torchs))
        assert 5e-4 < off < 1.5 * allowed < 0.02


@pytest.mark.parametrize("flags", [{}, {"dropout": 0.1}, {"position_bias": torch.ones(1)}])
def test_what_it_does_not_know_goes_to_the_sdpa_function(monkeypatch, flags):
    """Under the whole mask then: the other one is a name only."""
    trees = torch.tensor([[5, 5, 5, 4, 5]])
    tensors, _ = inputs(1, 5, torch.float32)
    asked = []
    monkeypatch.setattr(attention, "sdpa_attention_forward", lambda *args, **_: asked.append(args[4]))
    for mask in (attention.block_mask(trees), tree_mask(trees)):
        attention.shared_attention(torch.nn.Module(), *tensors, mask, **flags)
    assert len(asked) == 1 + bool(flags)
    assert all(torch.equal(mask, tree_mask(trees)) for mask in asked)


def test_few_scores_exist_at_once(monkeypatch):
    """Of long rows: pieces of bounded size, in which every token asks once, and sees as many keys as it is deep."""
    monkeypatch.setattr(attention, "PIECE", 1 << 14)
    trees = torch.tensor([[900] * 100 + [until for until in (300, 500, 700, 900) for _ in range(200)]])
    mask = attention.block_mask(trees)
    assert mask.shape == (1, 1, 900, 900) and mask.untyped_storage().nbytes() == 1
    blocks = attention._rows_of[mask][1]
    pieces, slots = blocks.pieces, blocks.slots(1)
    assert len(pieces) > 10 and all(piece.bias.numel() <= 64 * 300 for piece in pieces)
    asked = torch.cat([piece.queries.flatten() for piece in pieces])
    assert torch.equal(asked[slots], torch.arange(900))
    seen = torch.cat([(piece.bias == 0).sum(-1).flatten() for piece in pieces])[slots]
    assert seen.tolist() == [*range(1, 101), *[*range(101, 301)] * 4]
