"""Which prompts a step trains on, which it holds out, and that no two steps, sources or sides share one."""

from __future__ import annotations

import itertools
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from tests.data import families
from tests.data.real_data import path_of
from tests.data.test_prepare import prepare, prompts_of, write
from training.utils.data.division import duplicates, hash_of, hold_out, split_prompts
from training.utils.data.kinds import KINDS
from training.utils.errors import UserError
from training.utils.run.distributed import rank


def rows_for_all_steps(prompts) -> list[dict]:
    return [{"prompt": f"Prompt {n}?", "response": "Yes.", "chosen": f"Good {n}.", "rejected": "No."} for n in prompts]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("data_split", ["", "2,4,4", "1,1,1"])
def test_no_prompt_is_shared_by_two_sources_steps_or_sides(tok, tmp_path, seed, data_split):
    """Two sources with a hundred prompts in common; what step 2 can not use must not move the others."""
    a, b = rows_for_all_steps(range(200)), rows_for_all_steps(range(100, 300))
    for row in b[::3]:
        row["rejected"] = row["chosen"]
    paths = [write(tmp_path / "a.jsonl", a), write(tmp_path / "b.jsonl", b)]
    trained, held = {}, {}
    for step in (1, 2, 3):
        data = prepare(step, tok, *paths, data_split=data_split, seed=seed, run_dir=tmp_path / f"step{step}")
        trained[step], held[step] = prompts_of(data.train), prompts_of(data.held_out)
        assert data.report.shared_prompts == 0
    assert not set().union(*trained.values()) & set().union(*held.values())
    if data_split:
        for one, other in itertools.combinations((1, 2, 3), 2):
            assert not (trained[one] | held[one]) & (trained[other] | held[other])
        assert len((trained[1] | held[1]) | (trained[3] | held[3])) > 100


@pytest.mark.parametrize("text", ["", "{", "{}", "[]", "3", '{"rows": []}', '{"rows": {"a": 3}}'])
def test_a_damaged_record_of_the_division_is_named(tok, tmp_path, text):
    path = write(tmp_path / "a.jsonl", rows_for_all_steps(range(30)))
    prepare(1, tok, path, data_split="2,4,4", run_dir=tmp_path / "step1")
    record = tmp_path / "step1" / "data_split.json"
    known = json.loads(record.read_text())
    record.write_text(text.replace('"a"', json.dumps(next(iter(known["rows"])))))
    with pytest.raises(UserError, match=r"step1/data_split\.json .*(damaged|not readable)"):
        prepare(2, tok, path, data_split="2,4,4", run_dir=tmp_path / "step2")


def test_what_one_step_holds_out_of_real_solutions_no_other_step_trains_on(tok):
    """Step 2 can not use a question without a wrong solution, step 1 can."""
    path = str(path_of("gsm8k_model_solutions.jsonl"))
    data = [prepare(step, tok, path, max_length=4096) for step in (1, 2, 3)]
    trained, held = ([prompts_of(getattr(d, part)) for d in data] for part in ("train", "held_out"))
    assert all(held) and not set().union(*trained) & set().union(*held)


@pytest.mark.parametrize("data_split", ["", "2,4,4"])
def test_the_turns_of_a_conversation_stay_together_where_each_is_a_row(tok, tmp_path, data_split):
    """As in Anthropic's hh: the prompt of a later turn holds the earlier ones, and with them their answers."""
    rows = []
    for n in range(120):
        said = [{"role": "user", "content": f"Question {n}?"}]
        for turn in range(3):
            rows.append({"prompt": list(said), "response": "Yes.", "chosen": f"Good {turn}.", "rejected": "No."})
            said += [{"role": "assistant", "content": f"Good {turn}."}, {"role": "user", "content": f"More {turn}?"}]
    path, found = write(tmp_path / "a.jsonl", rows), []
    for step in (1, 2, 3):
        data = prepare(step, tok, path, data_split=data_split, run_dir=tmp_path / f"step{step}")
        assert len(data.train) % 3 == 0 < len(data.held_out)
        found += [prompts_of(data.train), prompts_of(data.held_out)]
    trained, held = set().union(*found[::2]), set().union(*found[1::2])
    assert not trained & held and len(trained) + len(held) == 120
    assert not data_split or sum(map(len, found)) == 120, "of no conversation two steps have a part"


def hashes(count: int, seed: int = 0) -> np.ndarray:
    return np.array([hash_of(f"prompt {n}", str(seed)) for n in range(count)], np.uint64)


@pytest.mark.parametrize("seed", range(3))
def test_shares_of_many_prompts(seed):
    """Within four standard deviations, and a step's prompts are held out as often as those of the others."""
    count, shares = 20_000, (0.2, 0.4, 0.4)
    prompts = hashes(count, seed)
    (steps,), (held,) = split_prompts([prompts], shares), hold_out([prompts])
    for step, share in enumerate(shares):
        of_step = steps == step
        assert abs(of_step.mean() - share) < 4 * (share * (1 - share) / count) ** 0.5
        assert abs(held[of_step].mean() - 0.1) < 4 * (0.09 / of_step.sum()) ** 0.5


def test_a_prompt_stays_where_it_is_whatever_stands_beside_it():
    prompts = hashes(500)
    (steps,), (held,) = split_prompts([prompts], (0.2, 0.4, 0.4)), hold_out([prompts])
    parts = [prompts[:300], np.repeat(prompts[100:], 3)]
    for told, alone in ((steps, split_prompts(parts, (0.2, 0.4, 0.4))), (held, hold_out(parts))):
        assert (alone[0] == told[:300]).all() and (alone[1] == np.repeat(told[100:], 3)).all()


def test_a_handful_of_prompts_leaves_no_side_empty():
    for seed in range(200):
        for count in (1, 2, 3, 5):
            (steps,) = split_prompts([hashes(count, seed)], (0.2, 0.4, 0.4))
            assert len(set(steps.tolist())) >= min(count, 3)
            (held,) = hold_out([hashes(count, seed)])
            assert held.any() == (count > 1) and not held.all()
    assert set(split_prompts([hashes(3)], (0.5, 0.0, 0.5))[0].tolist()) == {0, 2}
    assert [len(part) for part in split_prompts([hashes(0), hashes(2)], (1, 0, 0))] == [0, 2]
    assert [len(part) for part in hold_out([hashes(0)])] == [0] and hold_out([]) == []


@pytest.mark.parametrize("seed", range(4))
def test_a_row_is_held_out_although_those_that_were_are_too_long(tok, tmp_path, seed):
    rows = [{"prompt": f"Question {n}?", "chosen": f"Good {n}.", "rejected": f"Bad {n}."} for n in range(30)]
    path = write(tmp_path / "a.jsonl", rows)
    held = prompts_of(prepare(2, tok, path, seed=seed).held_out)
    long = [{**row, "chosen": "word " * 99} if row["prompt"] in held else row for row in rows]
    data = prepare(2, tok, write(tmp_path / "b.jsonl", long), seed=seed, max_length=99)
    assert len(data.held_out) == 1 and len(data.train) == 29 - len(held)
    assert not prompts_of(data.train) & (held | prompts_of(data.held_out))
    assert data.report.dropped["no room: the response alone is too long"].count == len(held)
    assert data.report.held_out_rows == 1 and data.report.train_rows == len(data.train)


def test_a_file_given_twice_is_recorded_whole(tok, tmp_path):
    path = write(tmp_path / "a.jsonl", rows_for_all_steps(range(60)))
    for step, paths in ((1, [path, f"{path}:20"]), (2, [f"{path}:30"]), (3, [f"{path}:20", path])):
        prepare(step, tok, *paths, data_split="1,1,1", run_dir=tmp_path / "run" / f"step{step}")
    for step, count in ((1, 60), (2, 30), (3, 60)):
        record = json.loads((tmp_path / "run" / f"step{step}" / "data_split.json").read_text())["rows"][path]
        assert sorted(sum(record.values(), [])) == list(range(count))


def test_held_out_rows_share_no_prompt_with_training(tok, tmp_path):
    rows = [{"prompt": f"Question {n % 10}?", "response": f"Answer {n}"} for n in range(100)]
    data = prepare(1, tok, write(tmp_path / "a.jsonl", rows))
    assert not prompts_of(data.train) & prompts_of(data.held_out)
    assert len(data.train) + len(data.held_out) == 100 and len(data.held_out) % 10 == 0 and len(data.held_out)


def split_of(path: str, folder: str) -> dict:
    """The record of ``--data_split`` on this rank, made from its own copy of the file in its own cache."""
    own = Path(folder) / f"machine{rank()}"
    own.mkdir(parents=True)
    copy = own / Path(path).name
    copy.write_bytes(Path(path).read_bytes())
    prepare(
        1, families.smol_like(), str(copy), data_split="2,4,4", data_output_path=str(own / "cache"), run_dir=own / "run"
    )
    return json.loads((own / "run" / "data_split.json").read_text())["rows"][str(copy)]


# Pinned: the same on every machine, Python and release. Ten of the prompts stand twice.
PINNED_SPLIT = {
    "demonstrations": [2, 3, 4, 22, 23, 24],
    "pairs": [5, 6, 7, 8, 10, 11, 12, 13, 18, 19, 25, 26, 27, 28],
    "prompts": [0, 1, 9, 14, 15, 16, 17, 20, 21, 29],
}


def test_data_split_is_the_same_on_every_rank_and_machine(tmp_path, rank_pair):
    rows = [{"prompt": f"Question {n % 20}?", "response": f"Answer {n}."} for n in range(30)]
    path = write(tmp_path / "a.jsonl", rows)
    one, two = rank_pair.run(split_of, path, str(tmp_path))
    assert one == two == PINNED_SPLIT
    assert sorted(sum(one.values(), [])) == list(range(30))
    prompts = [{rows[n]["prompt"] for n in one[step]} for step in KINDS]
    assert not prompts[0] & prompts[1] and not prompts[1] & prompts[2] and not prompts[0] & prompts[2]


def test_duplicates_against_a_plain_count_and_in_little_memory():
    """Arrays take a few times 8 bytes a row while they are sorted; a set of Python numbers takes about 100."""
    chance = np.random.default_rng(0)
    parts = [chance.integers(0, 300_000, 200_000, dtype=np.uint64) for _ in range(2)]
    usable = [chance.random(200_000) < 0.9 for _ in parts]
    small = [(identities[:2000] % 700, chosen[:2000]) for identities, chosen in zip(parts, usable, strict=True)]
    seen: np.ndarray = np.zeros(0, np.uint64)
    known: set[int] = set()
    for identities, chosen in small:
        again, seen = duplicates(identities, chosen, seen)
        for i, identity in enumerate(identities.tolist()):
            assert again[i] == (bool(chosen[i]) and identity in known), "the first of equal rows is kept"
            known.update([identity] if chosen[i] else [])
    tracemalloc.start()
    seen = np.zeros(0, np.uint64)
    for identities, chosen in zip(parts, usable, strict=True):
        _, seen = duplicates(identities, chosen, seen)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * 2**20 and len(seen) == len(
        np.unique(np.concatenate([p[u] for p, u in zip(parts, usable, strict=True)]))
    )
