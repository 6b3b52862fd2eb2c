"""The report of a run: whole, partial, failed, damaged and hostile runs give one self-contained, valid page."""

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
from hypothesis import given, strategies as st

import train
from training.pipeline.showcase import summary_table
from training.report import advice, charts, sections
from training.report.__main__ import main
from training.report.charts import Series
from training.report.page import render_report, write_report
from training.report.run import RunRecord, StepRecord, read_run
from training.report.text import shortened
from training.utils.errors import UserError, run_program

SUMMARIES = {
    "step1": {"loss_before": 3.9, "loss_after": 3.3, "perplexity_before": 47.6, "perplexity_after": 26.1,
              "best_step": 3, "steps": 3, "seconds": 60.0,
              "phases": {"train": {"seconds": 40.0, "peak_gib": 1.25}, "save": {"seconds": 5.0, "peak_gib": 0.75}}},
    "step2": {"accuracy_before": 0.5, "accuracy_after": 0.9, "accuracy_longer": 0.45, "accuracy_shorter": 0.55,
              "accuracy_low": 0.84, "accuracy_high": 0.94, "held_out": 160, "ties": 0,
              "accuracy_by_kind": {"warm_empty": {"accuracy": 0.625, "pairs": 32}},
              "verdicts": {"accuracy above 0.6": True, "chosen positive": False}, "seconds": 90.0},
    "step3": {"prompts": 160, "reward_before": -0.1, "reward_after": 0.7, "win_rate": 0.9, "win_rate_low": 0.85,
              "win_rate_high": 0.95, "length_before": 20.0, "length_after": 24.0, "eos_rate_before": 0.9,
              "eos_rate_after": 0.97, "seconds": 300.0,
              "compared": 160, "ties": 12,
              "eval_functions": [
                  {"name": "manner", "function": "check.py:manner", "n": 160, "base": 0.6, "before": 0.7, "after": 0.9,
                   "win_rate": 0.8, "low": 0.7, "high": 0.9, "ties": 31, "difference": 0.2, "difference_low": 0.15,
                   "difference_high": 0.25, "base_to_sft": 0.1, "base_to_sft_low": 0.05, "base_to_sft_high": 0.15,
                   "base_to_rlhf": 0.3, "base_to_rlhf_low": 0.22, "base_to_rlhf_high": 0.38},
                  {"name": "content", "function": "check.py:content", "n": 160, "before": 0.5, "after": 0.5,
                   "win_rate": 0.78, "low": 0.45, "high": 0.55, "ties": 150, "difference": 0.0,
                   "difference_low": -0.02, "difference_high": 0.02}]},
}  # fmt: skip
METRICS = {
    "step1": [{"step": 0, "time": 1.0, "eval/loss": 3.9}]
    + [{"step": i, "time": 1.0 + i, "train/loss": 4.0 - i / 10, "train/grad_norm": 2.0} for i in (1, 2, 3)]
    + [{"step": 3, "time": 5.0, "eval/loss": 3.3}],
    "step2": [{"step": 0, "eval/accuracy": 0.5, "eval/chosen_mean": 0.0, "eval/rejected_mean": 0.0}]
    + [{"step": i, "train/loss": 0.6, "train/accuracy": 0.75} for i in (1, 2)]
    + [{"step": 2, "eval/accuracy": 0.9, "eval/chosen_mean": 0.7, "eval/rejected_mean": -0.3}],
    "step3": [{"step": i, "reward/mean": i / 5, "kl/per_sequence": float(i), "rollout/length": 20.0 + i,
               "rollout/eos_rate": 0.9, "policy/entropy": 1.7, "critic/explained_variance": 0.3,
               "time/generate": 3.0, "time/score": 2.0, "time/train": 5.0, "time/tokens_per_second": 190.0}
              for i in (1, 2, 3, 4)],
}  # fmt: skip
PROMPT = "Why is the sky blue?"
ANSWERS = {"base": "Um.", "sft": "It is.", "rlhf": "Air scatters blue light!"}


def save(path: Path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def make_run(path: Path, steps=("step1", "step2", "step3"), text=lambda s: s) -> Path:
    """A run as train.py leaves it; ``text`` changes every string that a user or a model may have written."""
    manifest = {
        "versions": {"python": "3.11.7", "torch": text("2.13.0")},
        "git": {"commit": text("c0ffee" * 6), "changed": True},
        "machine": {"system": "Linux", "cores": 2, "gpus": [], "memory_gib": 23.5},
        "recipe": {"name": text("demo")},
        "started_as": [["train.py", "--recipe", text("demo")]],
        "steps": {},
    }
    for name in steps:
        arguments = ["--data_path", text("my data.jsonl"), "--seed", text("77")]
        manifest["steps"][name] = {
            "command": ["deepspeed", *arguments], "arguments": arguments, "inputs": {text("my data.jsonl"): "ab" * 32},
            "started": "2026-11-21T12:19:52+00:00", "seconds": SUMMARIES[name]["seconds"] + 5, "exit_code": 0,
        }  # fmt: skip
        summary = dict(SUMMARIES[name])
        if name == "step2":
            summary["verdicts"] = {text(k): v for k, v in summary["verdicts"].items()}
        if name == "step3":
            summary["eval_functions"] = [f | {"name": text(f["name"])} for f in summary["eval_functions"]]
        save(path / name / "summary.json", summary)
        save(path / name / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in METRICS[name]))
        save(path / f"{name}.log", f"{text('demo')}: 3 rows read: 3 as messages\nother words\n")
    if "step3" in steps:
        answers = {
            text(k): {"text": text(v), "reward": 0.5, "checks": {text("manner"): 1.0}, "ended": k != "sft"}
            for k, v in ANSWERS.items()
        }
        save(path / "step3" / "samples.json",
             [{"prompt": [{"role": "user", "content": text(PROMPT)}], "answers": answers}])  # fmt: skip
    save(path / "manifest.json", manifest)
    return path


def page_of(path: Path) -> str:
    return render_report(read_run(path))


class Reader(HTMLParser):
    """Collects tags, attributes and the text that a reader sees; unclosed tags are an error."""

    VOID = {"meta", "br", "hr"}

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        if self.open[-1] == "p" and tag != "p":
            self.open.pop()
        assert self.open.pop() == tag

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("style", "title"):
            self.text += data


def test_a_whole_run_has_every_part(tmp_path):
    page = page_of(make_run(tmp_path / "demo"))
    text = Reader(page).text
    for words in (
        "What the models say", "Is it better?", "The reward model", "Curves", "Time and memory", "Health monitor",
        "What to try next", "What ran",
        PROMPT, *ANSWERS.values(), "cut at the longest allowed length",
        "47.6 → 26.1", "90% [85%, 95%]", "80% [70%, 90%]", "1.25 GiB",
        "against warm empty, 32", "90.0% [84%, 94%]", "160 pairs, 0 ties", "90.0% [85%, 95%]", "160 prompts, 12 ties",
        "80.0% [70%, 90%] by manner; 160 prompts, 31 ties", "RLHF, by content160 prompts, 150 ties",
        "+0.200 [+0.150, +0.250]", "+0.100 [+0.050, +0.150]", "+0.300 [+0.220, +0.380]", "manner 1.00",
        "2 CPU cores, no GPU",
        "torch 2.13.0", "seed 77", "deepspeed --data_path 'my data.jsonl'", "3 rows read", "c0ffeec0ffee",
    ):  # fmt: skip
        assert words in text, words
    assert "NO: chosen positive" in text and "yes: accuracy above 0.6" in text
    assert "other words" not in text


def test_nothing_is_loaded_and_nothing_runs(tmp_path):
    page = page_of(make_run(tmp_path / "demo"))
    reader = Reader(page)
    tags = {tag for tag, _ in reader.tags}
    assert not tags & {"script", "link", "img", "iframe", "object", "embed", "base", "form", "use", "image"}
    for tag, attributes in reader.tags:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "background", "xlink:href") and not name.startswith("on"), tag
            assert name != "href" or value.startswith("#")
    assert not re.search(r"url\(|@import|https?:", page)


EVIL = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&</p></div></svg><b onclick='a'>"


def test_hostile_text_is_text(tmp_path):
    """Every string that the run holds carries markup; the page shows it and has not one element more."""
    plain = Reader(page_of(make_run(tmp_path / "demo", text=lambda s: s + " plain")))
    hostile = Reader(page_of(make_run(tmp_path / "demo", text=lambda s: s + " " + EVIL)))
    count = lambda reader: sorted(tag for tag, _ in reader.tags)  # noqa: E731
    assert count(hostile) == count(plain)
    assert [set(a) for _, a in hostile.tags] == [set(a) for _, a in plain.tags]
    assert hostile.text.count(EVIL) >= 12


def test_every_drawing_is_well_formed(tmp_path):
    page = page_of(make_run(tmp_path / "demo", text=lambda s: s + EVIL))
    drawings = re.findall(r"<svg.*?</svg>", page, re.S)
    assert len(drawings) >= 12
    for drawing in drawings:
        root = ElementTree.fromstring(drawing)
        for element in root.iter():
            for key, value in element.attrib.items():
                if key in ("x", "y", "x1", "x2", "y1", "y2", "cx", "cy", "r", "width", "height"):
                    assert math.isfinite(float(value))
                if key in ("width", "height"):
                    assert float(value) >= 0


@pytest.mark.parametrize("steps", [("step1",), ("step1", "step2"), ("step2",), ("step3",)])
def test_some_steps_alone(tmp_path, steps):
    page = page_of(make_run(tmp_path / "demo", steps))
    text = Reader(page).text
    assert text.count("not run") >= 3 - len(steps)
    assert "finished" in text
    assert (PROMPT in text) == ("step3" in steps)


def test_a_step_without_train_py_has_no_manifest(tmp_path):
    run = make_run(tmp_path / "run", ("step1",))
    (run / "manifest.json").unlink()
    text = Reader(page_of(run)).text
    assert "47.6 → 26.1" in text and "Curves" in text


def test_a_run_of_an_earlier_version_shows_its_one_function(tmp_path):
    run = make_run(tmp_path / "demo")
    summary = {k: v for k, v in SUMMARIES["step3"].items() if k not in ("eval_functions", "compared", "ties")}
    old = {"name": "a/check.py:score", "before": 0.7, "after": 0.95, "win_rate": 0.8, "win_rate_low": 0.7,
           "win_rate_high": 0.9}  # fmt: skip
    save(run / "step3" / "summary.json", summary | {"eval_function": old})
    text = Reader(page_of(run)).text
    assert "80.0% [70%, 90%] by check.py:score; 160 prompts" in text and "0.950" in text


FEW = {"prompts": 6, "compared": 6, "ties": 4, "win_rate": 2 / 3, "win_rate_low": 0.3, "win_rate_high": 0.9}


def test_a_number_of_few_prompts_stands_with_what_to_beware_of(tmp_path):
    """66.7% came from six prompts, at four of which the two answers were the same."""
    run = make_run(tmp_path / "demo")
    clipped = {"step": 1, "level": "warning", "metric": "reward/clipped_share", "text": "92% beyond the clip"}
    save(run / "step3" / "health.jsonl", json.dumps(clipped) + "\n")
    save(run / "step3" / "summary.json", SUMMARIES["step3"] | FEW)
    save(run / "step2" / "summary.json", SUMMARIES["step2"] | {"held_out": 5, "accuracy_low": 0.38})
    page = page_of(run)
    cards = Reader(page[page.index('<div class="cards">') : page.index('<section id="answers">')]).text
    for words in (
        "66.7% [30%, 90%]", "6 prompts, 4 ties", "Only 6 held-out prompts. One of them moves the number by 17%.",
        "4 of 6 are ties", "The interval includes 50%: no difference is shown.", "Iteration 1: 92% beyond the clip",
        "Only 5 held-out pairs.", "The interval begins at 38%, no better than length alone or a coin (55%)",
    ):  # fmt: skip
        assert words in cards, words
    for section in ("wins", "curves"):
        body = page[page.index(f'<section id="{section}">') :]
        assert "92% beyond the clip" in body[: body.index("</section>")], section
    plain = page_of(make_run(tmp_path / "plain"))
    assert 'class="warning' not in plain, "a run that is well has none"


def failed(tmp_path, code=1):
    run = make_run(tmp_path / "demo", ("step1", "step2"))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["steps"]["step2"] |= {"exit_code": code}
    save(run / "manifest.json", manifest)
    (run / "step2" / "summary.json").unlink()
    save(run / "step2.log", "\n".join(f"line {i}" for i in range(100)) + "\nRuntimeError: <out> of memory\n")
    return run


def test_a_failed_run_shows_the_end_of_its_log_and_how_to_go_on(tmp_path):
    text = Reader(page_of(failed(tmp_path))).text
    assert "failed" in text and "RuntimeError: <out> of memory" in text and "line 50" not in text
    assert "Step 2 is not finished (failed)" in text and "--output_dir" in text
    assert "47.6 → 26.1" in text, "what is finished is still shown"
    assert "stopped" in Reader(page_of(failed(tmp_path / "b", 130))).text


def test_a_failed_runs_report_begins_with_the_failure(tmp_path):
    page = page_of(failed(tmp_path))
    start, cards = page.index('id="failure"'), page.index('class="cards"')
    assert start < cards < page.index('id="curves"') and page.index("</header>") < start
    text = Reader(page[page.rindex("<", 0, start) : cards].rsplit("<", 1)[0]).text
    assert text.startswith("Step 2 failed (exit code 1)") and "RuntimeError: <out> of memory" in text
    assert f"train.py --recipe demo --output_dir {tmp_path / 'demo'}" in text
    manifest = json.loads((tmp_path / "demo" / "manifest.json").read_text())
    manifest["started_as"].append(["train.py", "--recipe", "demo", "--resume", "never", "--output_dir", "old/place"])
    save(tmp_path / "demo" / "manifest.json", manifest)
    again = Reader(page_of(tmp_path / "demo")).text
    assert f".venv/bin/python train.py --recipe demo --output_dir {tmp_path / 'demo'}" in again
    assert page.count("Last lines of step2.log") == 1
    assert 'id="failure"' not in page_of(make_run(tmp_path / "well"))


def test_the_latest_runs_report_names_the_run_itself(tmp_path, monkeypatch):
    """The link may lead to another one when the command is used."""
    monkeypatch.setenv("TRIPOD_OUTPUT", str(tmp_path))
    failed(tmp_path)
    (tmp_path / "latest").symlink_to("demo")
    text = Reader(page_of(tmp_path / "latest")).text
    assert f"--output_dir {tmp_path / 'demo'}" in text and str(tmp_path / "latest") not in text


def test_a_killed_run_leaves_half_a_line(tmp_path):
    run = make_run(tmp_path / "demo", ("step1",))
    (run / "step1" / "summary.json").unlink()
    with (run / "step1" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "train/lo')
    record = read_run(run)
    assert record.notes == [] and len(record.steps["step1"].metrics) == 5
    manifest = json.loads((run / "manifest.json").read_text())
    del manifest["steps"]["step1"]["exit_code"]
    save(run / "manifest.json", manifest)
    assert read_run(run).steps["step1"].state == "unfinished"
    assert "unfinished" in Reader(page_of(run)).text


def test_damage_is_said_and_the_rest_is_shown(tmp_path):
    run = make_run(tmp_path / "demo")
    save(run / "step2" / "summary.json", "{")
    save(run / "step3" / "samples.json", {"not": "a list"})
    save(run / "step1" / "metrics.jsonl", 'no json\n{"step": 1, "train/loss": NaN}\n{"step": 2, "train/loss": 3.0}\n')
    record = read_run(run)
    assert len(record.notes) == 3
    text = Reader(render_report(record)).text
    for words in ("step2/summary.json can not be read", "step3/samples.json is not what", "1 lines are damaged"):
        assert words in text
    assert record.steps["step1"].curve("train/loss") == [(2, 3.0)]


def test_numbers_without_end_and_brackets_without_end_do_not_break_the_page(tmp_path):
    run = make_run(tmp_path / "demo")
    huge = "1" + "0" * 400
    for name in SUMMARIES:
        save(run / name / "summary.json", {**SUMMARIES[name], "seconds": int(huge)})
        lines = [f'{{"step": {huge}, "train/loss": 1}}', f'{{"step": 3, "train/loss": {huge}}}', "[" * 100_000]
        save(run / name / "metrics.jsonl", "\n".join([*lines, '{"step": 4, "train/loss": 2}', ""]))
    save(run / "step2" / "evaluation.json", "[" * 100_000)
    record = read_run(run)
    assert record.steps["step1"].curve("train/loss") == [(4, 2.0)]
    Reader(render_report(record))


def test_numbers_of_the_wrong_kind_do_not_break_the_page(tmp_path):
    run = make_run(tmp_path / "demo")
    for name in SUMMARIES:
        summary = dict.fromkeys(SUMMARIES[name], "text")
        save(run / name / "summary.json", summary)
        rows = [{"step": None}, {"step": 1, "eval/loss": "x", "reward/mean": [1], "train/loss": True}]
        save(run / name / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    save(
        run / "step3" / "samples.json", [{"prompt": None, "answers": None}, {}, {"prompt": ["x"], "answers": {"a": 1}}]
    )
    Reader(page_of(run))
    for sample in ({"prompt": 5, "answers": {}}, {"prompt": [], "answers": [5]}):
        save(run / "step3" / "samples.json", [sample])
        Reader(page_of(run))


@pytest.mark.parametrize("part", ["git", "recipe", "shared", "started_as", "machine", "command"])
def test_a_manifest_that_was_edited_by_hand_is_one_line(tmp_path, part, capsys):
    """So it is for train.py, which goes on by it; and no report ends in a traceback."""
    run = make_run(tmp_path / "demo")
    manifest = json.loads((run / "manifest.json").read_text())
    (manifest["steps"]["step1"] if part == "command" else manifest)[part] = 5
    save(run / "manifest.json", manifest)
    assert run_program(main, [str(run)]) == run_program(train.main, ["--output_dir", str(run)]) == 2
    assert capsys.readouterr().err.count("manifest.json is damaged: ") == 2
    manifest |= {"git": None, "machine": {"gpus": 5}, part: {}}
    del manifest["steps"], manifest[part]
    save(run / "manifest.json", manifest)
    Reader(page_of(run))


def test_a_resumed_runs_later_record_wins(tmp_path):
    run = make_run(tmp_path / "demo", ("step1",))
    rows = [{"step": 1, "train/loss": 9.0}, {"step": 2, "train/loss": 8.0}, {"step": 1, "train/loss": 4.0}]
    save(run / "step1" / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    assert read_run(run).steps["step1"].curve("train/loss") == [(1, 4.0), (2, 8.0)]


@pytest.mark.parametrize(("code", "state"), [(0, "unfinished"), (1, "failed"), (129, "stopped"), (143, "stopped")])
def test_how_a_step_without_a_summary_ended(tmp_path, code, state):
    """129: the terminal was closed. 0: it was finished, and starts over after one that it was made from."""
    assert read_run(failed(tmp_path, code)).steps["step2"].state == state


def test_a_step_that_was_made_again_shows_the_rows_of_its_last_start(tmp_path):
    run = make_run(tmp_path / "demo", ("step1",))
    command = " ".join(json.loads((run / "manifest.json").read_text())["steps"]["step1"]["command"])
    noise = "other words\n" * 600
    save(run / "step1.log", f"$ deepspeed old\nold.csv: 3 rows read: 3\n{noise}$ {command}\nmine.csv: 4 rows read: 4\n")
    assert read_run(run).steps["step1"].data == ["mine.csv: 4 rows read: 4"]


def test_the_time_of_a_resumed_run_is_that_of_all_its_starts(tmp_path):
    run = make_run(tmp_path / "demo", ("step1",))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["steps"]["step1"]["seconds"] = 9.0  # of the last one
    save(run / "manifest.json", manifest)
    assert read_run(run).steps["step1"].seconds == SUMMARIES["step1"]["seconds"] == 60.0
    assert "1 min 00 s" in summary_table(run, {"step1": 9.0})


def test_evaluations_and_health_are_shown_whatever_they_hold(tmp_path):
    run = make_run(tmp_path / "demo")
    evaluation = {
        "accuracy": 0.9125, "accuracy_interval": [0.85, 0.95], "by_source": {"mine": {"accuracy": 0.5, "pairs": 12}},
        "margins": {"edges": [-1, 0, 1], "counts": [3, 9]}, "worst": [{"prompt": "<i>why</i>", "margin": -2.5}],
    }  # fmt: skip
    save(run / "step2" / "evaluation.json", evaluation)
    models = {"SFT": {"kl": 0.0}, "best of 4": {"kl": 0.6, "win_rate_by_check": 0.75,
                                                "win_rate_by_check_interval": [0.7, 0.8]}}  # fmt: skip
    save(run / "step3" / "evaluation.json", {"models": models})
    save(
        run / "step3" / "health.jsonl",
        json.dumps({"step": 20, "level": "warning", "text": "clipped 46%: halve it"}) + "\n",
    )
    text = Reader(page := page_of(run)).text
    for words in (
        "0.91 [0.85, 0.95]",
        "evaluated: best of 4, by check",
        "75% [70%, 80%]",
        "by source",
        "mine",
        "<i>why</i>",
        "-2.50",
        "clipped 46%: halve it",
        "Margins",
    ):
        assert words in text, words
    assert page.count("0 to 1: 9") == 1, "the histogram's bar"
    save(run / "step3" / "health.jsonl", "")
    assert "Nothing left its healthy range" in Reader(page_of(run)).text


def test_of_many_remarks_those_that_are_shown_are_written(monkeypatch):
    written = []
    monkeypatch.setattr(sections, "e", lambda value: written.append(value) or str(value))
    said = [{"step": i, "level": "info", "text": f"remark {i}."} for i in range(1000)]
    steps = {"step1": StepRecord("step1"), "step3": StepRecord("step3", health=said)}
    page = sections.health(RunRecord(Path("demo"), {}, steps, [], []))
    assert "remark 59." in page and "remark 60." not in page and "940 more." in page
    assert len(written) == 3 * 60, "text is looked through for this machine's folders, which takes time"


def test_a_long_run_stays_small(tmp_path):
    run = make_run(tmp_path / "demo")
    rows = [{"step": i, "train/loss": 1 / (i + 1), "train/grad_norm": i % 7} for i in range(8_000)]
    save(run / "step1" / "metrics.jsonl", "".join(json.dumps(r) + "\n" for r in rows))
    sample = json.loads((run / "step3" / "samples.json").read_text())[0]
    for answer in sample["answers"].values():
        answer["text"] = "word " * 5000
    save(run / "step3" / "samples.json", [sample] * 500)
    page = page_of(run)
    assert len(page.encode()) < 3 * 2**20
    assert "476 more prompts are in samples.json" in Reader(page).text


@pytest.mark.parametrize("length", [1, 5, 11, 12, 13, 40])  # the start of a commit is 12 characters
@pytest.mark.parametrize("whose", ["repository_root", "Path"])
def test_paths_of_this_machine_are_shortened(tmp_path, monkeypatch, whose, length):
    """Any folder, as short or long as it may be, itself and what lies in it, even where a text is cut."""
    folder = ("/q_z" * length)[:length] + "q"  # in no word of the page
    fake = (lambda: Path(folder)) if whose == "repository_root" else SimpleNamespace(home=lambda: Path(folder))
    monkeypatch.setattr(f"training.report.text.{whose}", fake)
    run = make_run(tmp_path / "demo", text=lambda s: f"{folder}/{s} in {folder}. {' ' * 3980}{folder}/{s}")
    for part in (folder, folder.replace("_", " ")):
        assert part not in page_of(run)


def test_other_folders_and_words_are_not_shortened(monkeypatch):
    monkeypatch.setattr("training.report.text.repository_root", lambda: Path("/w"))
    monkeypatch.setattr("training.report.text.Path", SimpleNamespace(home=lambda: Path("/")))
    for text in ("/data/w/x", "and/w/x", "/words", "/w-2/x", "/w.old/x", "https://a.org/b"):
        assert shortened(text) == text
    assert shortened("--out=/w/x:/w/y, file:///w/z, cd /w. cd /w") == "--out=x:y, file://z, cd .. cd ."


def test_thinning_keeps_the_ends_and_the_mean():
    points = [(float(i), float(i * i)) for i in range(10_001)]
    thin = charts.thinned(points)
    assert len(thin) <= charts.MOST_POINTS and thin[-1] == points[-1]
    assert thin[0][0] < 50 and all(a[0] < b[0] for a, b in zip(thin, thin[1:], strict=False))
    assert charts.thinned(points[:5]) == points[:5]


@given(
    st.floats(-1e6, 1e6),
    st.floats(1e-3, 1e6),
)
def test_ticks_are_few_and_span_the_data(low, width):
    found = charts.ticks(low, low + width)
    assert 2 <= len(found) <= 8
    assert found[0] <= low + width * 1e-6 and found[-1] >= low + width * (1 - 1e-6)


def test_ticks_of_a_constant():
    assert charts.ticks(3.0, 3.0)[0] < 3.0 < charts.ticks(3.0, 3.0)[-1]
    assert charts.ticks(0.0, 0.0)[0] < 0.0 < charts.ticks(0.0, 0.0)[-1]


def test_a_curve_lies_where_its_numbers_say():
    drawing = charts.line_chart("T", "x", "y", [Series("s", [(0, 0), (10, 1)], dots=True)], zero_one=True)
    dots = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', drawing)
    left, bottom = charts.LEFT, charts.HEIGHT - charts.BOTTOM
    assert [float(v) for v in dots[0]] == [left, bottom]
    assert [float(v) for v in dots[1]] == [charts.WIDTH - charts.RIGHT, charts.TOP]
    assert charts.line_chart("T", "x", "y", [Series("s", [])]) == ""


ADVICE = [
    ("step1", {"best_step": 2}, "held-out loss was lowest at step 2 of 3"),
    ("step1", {"loss_after": 3.95}, "held-out loss is no lower than before training (3.900 to 3.950)"),
    ("step2", {"accuracy_after": 0.57}, "hardly better than always preferring the shorter"),
    ("step2", {"accuracy_after": 0.99}, "at its ceiling"),
    ("step3", {"eos_rate_after": 0.5}, "--missing_eos_penalty"),
    ("step3", {"length_after": 80.0}, "from 20 to 80 tokens"),
    ("step3", {"reward_after": -0.5}, "did not rise"),
    ("step3", {"win_rate": 0.99}, "independent check manner 80%"),
    ("step3", {"prompts": 12}, "Only 12 held-out prompts"),
]


@pytest.mark.parametrize(("step", "change", "words"), ADVICE)
def test_advice_follows_the_numbers(tmp_path, step, change, words):
    run = make_run(tmp_path / "demo")
    assert not any(words in line for line in advice.next_steps(read_run(run))), "said of a run that is well"
    save(run / step / "summary.json", SUMMARIES[step] | change)
    assert any(words in line for line in advice.next_steps(read_run(run)))


@pytest.mark.parametrize(
    ("flags", "steps", "told"),
    [
        ([], ["step1"], "Step 2 has not run yet"),
        (["--step", "1", "3", "--num_gpus", "2"], ["step1", "step3"], ""),
        (["--step", "1", "3"], ["step1"], "Step 3 has not run yet"),
        (["--step=1"], ["step1"], ""),
        (["--step1_args=--seed 3"], ["step1", "step2"], "Step 3 has not run yet"),
    ],
)
def test_a_step_that_was_not_asked_for_is_not_missed(tmp_path, flags, steps, told):
    run = make_run(tmp_path / "demo", steps)
    manifest = json.loads((run / "manifest.json").read_text())
    save(run / "manifest.json", manifest | {"started_as": [["train.py"], ["train.py", *flags]]})
    missed = [line for line in advice.next_steps(read_run(run)) if "has not run yet" in line]
    assert [line.startswith(told) for line in missed] == ([True] if told else [])


def test_advice_on_drift_and_clipping(tmp_path):
    run = make_run(tmp_path / "demo")
    row = {"step": 9, "kl/per_sequence": 25.0, "policy/clip_fraction": 0.46}
    save(run / "step3" / "metrics.jsonl", json.dumps(row) + "\n")
    lines = "\n".join(advice.next_steps(read_run(run)))
    assert "25.0 nats per response" in lines and "46% of the policy's ratios were clipped" in lines


def test_the_program(tmp_path, capsys, monkeypatch):
    run = make_run(tmp_path / "demo")
    assert main([str(run)]) == 0
    assert "report.html" in capsys.readouterr().out and (run / "report.html").stat().st_size > 10_000
    for _ in range(2):  # a page of ours may be written anew
        assert main([str(run), "--output", str(tmp_path / "own.html")]) == 0 and (tmp_path / "own.html").is_file()
    monkeypatch.setenv("TRIPOD_OUTPUT", str(tmp_path))
    (tmp_path / "latest").symlink_to("demo")
    (run / "report.html").unlink()
    assert main([]) == 0 and (run / "report.html").is_file(), "the latest run is the default"


def _no_folder(tmp_path):
    return [str(tmp_path / "none")], "no such run directory"


def _no_run(tmp_path):
    return [str(tmp_path)], "holds no run"


def _broken_manifest(tmp_path):
    save(tmp_path / "manifest.json", "{")
    return [str(tmp_path)], "not readable as JSON"


def _no_place(tmp_path):
    return [str(make_run(tmp_path / "demo")), "--output", str(tmp_path / "a" / "b.html")], "can not be written"


def _a_file_of_another(tmp_path):
    file = tmp_path / "rows.html"
    file.write_text("<!DOCTYPE html>\n<p>mine</p>")
    return [str(make_run(tmp_path / "demo")), "--output", str(file)], "rows.html: there is such a file"


def _a_page_of_another_in_the_run(tmp_path):
    run = make_run(tmp_path / "demo")
    save(run / "report.html", "<p>mine</p>")
    return [str(run)], "report.html: there is such a file"


BAD = (_no_folder, _no_run, _broken_manifest, _no_place, _a_file_of_another, _a_page_of_another_in_the_run)


@pytest.mark.parametrize("make", BAD)
def test_bad_input_is_one_line(make, tmp_path, capsys):
    argv, words = make(tmp_path)
    assert run_program(main, argv) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert all(path.read_text() == "<!DOCTYPE html>\n<p>mine</p>" for path in tmp_path.glob("*.html"))


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    run = make_run(tmp_path / "demo")
    write_report(run)
    before = (run / "report.html").read_text()
    save(run / "manifest.json", "{")
    with pytest.raises(UserError):
        write_report(run)
    assert (run / "report.html").read_text() == before
