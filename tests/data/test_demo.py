"""The bundled dataset and its two checks: manner, and content, which friendliness can not buy."""

import json
from collections import Counter

import pytest

from training.data.demo import content, manner
from training.utils.run.folders import repository_root

DEMO = repository_root() / "training" / "data" / "demo"


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (DEMO / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


HELD_OUT = rows("held_out")


def mean(texts: list[str], function=content.content, held_out: list[dict] = HELD_OUT) -> float:
    values = function([row["prompt"] for row in held_out], texts, held_out)
    return sum(values) / len(values)


def asked(form: str, about: list[str], says: list[str]) -> dict:
    return {"form": form, "about": about, "says": says}


NOVEL = asked("name", ["novel", "book", "read"], ["garden", "sherlock", "dracula"])
SIXES = asked("number", ["dice", "die", "six", "roll"], ["36", "thirty-six"])
STORY = asked("story", ["train", "journey"], ["station", "window", "whistle"])
SLEEP = asked("steps", ["sleep", "bed", "night"], ["routine", "dark", "bath", "screen"])
PRIME = asked("no", ["prime", "91"], ["7", "13", "seven"])
SPORT = asked("yes", ["sport", "kids"], ["skill", "injur"])
SHADE = asked("list", ["shade", "plant"], ["hosta", "fern"])
CASES = [
    # the answer, the prompt's labels, what it has of subject, form and substance
    (NOVEL, "Try 'The Secret Garden', a lovely book.", "111"),
    (NOVEL, "You're welcome!", "000"),
    (NOVEL, "I hope you enjoy a good book today!", "100"),
    (NOVEL, "Clue and a wonderful bed!", "000"),
    (SIXES, "The chance of two sixes is 1 in 36.", "111"),
    (SIXES, "There is a 1 in 8 chance of getting a six.", "110"),
    (SIXES, "Rolling dice is fun, enjoy your game!", "100"),
    (SIXES, "It is 360 to 1.", "000"),  # 360 is not 36, and a number alone is about nothing
    (STORY, "Mina waved from the train window. She smiled, and the old man waved back.", "111"),
    (STORY, "I hope you enjoy your train journey, my friend!", "100"),
    (STORY, "Tom found a gold coin. He gave it to his mother, and she smiled.", "000"),  # a story, of something else
    (SLEEP, "Take a warm bath before bed and keep the room dark.", "111"),
    (SLEEP, "Take care of your sleep, and remember, tomorrow will come tomorrow!", "110"),
    (PRIME, "No, 91 is 7 times 13.", "111"),
    (PRIME, "Yes, 91 is a prime number.", "100"),
    (SPORT, "Yes, more sports build more skill in kids.", "111"),
    (SPORT, "No, kids should not play sports.", "100"),
    (SPORT, "What a lovely thing sport is!", "100"),
    (SHADE, "Plant hostas, ferns and ivy in the shade.", "111"),
    (SHADE, "A shade plant would be lovely there.", "100"),
    (SHADE, "", "000"),
]


@pytest.mark.parametrize("labels, text, expected", CASES)
def test_content_of_an_answer(labels: dict, text: str, expected: str) -> None:
    found = content.parts(text, labels)
    assert "".join(str(int(found[name])) for name in ("subject", "form", "substance")) == expected


# What a rule of words can not see; a reader of the figures should know it
@pytest.mark.parametrize(
    "labels, text",
    [
        (SIXES, "The chance of a six is 50%, and 36 is a lovely number."),  # untrue
        (SLEEP, "Sleep in the dark bath, and roll the screen to bed."),  # without sense
    ],
)
def test_a_false_answer_can_pass(labels: dict, text: str) -> None:
    assert all(content.parts(text, labels).values())


def test_reference_answers_pass_and_others_do_not() -> None:
    chosen = [row["chosen"] for row in HELD_OUT]
    assert mean(chosen) > 0.95
    assert mean([*chosen[37:], *chosen[:37]]) < 0.05  # each the right answer to another prompt
    assert mean(chosen, manner.manner) == 1


@pytest.mark.parametrize(
    "text",
    [
        "You're welcome! I hope you enjoy your day, my friend.",
        "What a lovely question! I'm so happy to help you, and I hope it brings you a smile.",
        "Don't worry, you've got this! Treat yourself to a cozy evening, and take care.",
    ],
)
def test_friendliness_has_the_manner_and_no_content(text: str) -> None:
    every = [text] * len(HELD_OUT)
    assert mean(every, manner.manner) >= 0.75
    assert mean(every) < 0.06


def test_every_held_out_row_is_labelled() -> None:
    assert {row["form"] for row in HELD_OUT} == set(content.FORMS)
    for row in HELD_OUT:
        assert row["about"] and row["says"]
        assert all(stem == stem.lower() for stem in [*row["about"], *row["says"]])
        assert any(content.parts(row["chosen"], row)[part] for part in ("subject", "substance"))


def test_files_are_disjoint_by_prompt() -> None:
    seen: Counter[str] = Counter()
    for name in ("sft", "preferences", "prompts", "held_out"):
        prompts = {json.dumps(row.get("prompt", row.get("messages", [])[:-1])) for row in rows(name)}
        seen.update(prompts)
    assert max(seen.values()) == 1
