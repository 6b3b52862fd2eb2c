"""The examples' recipes: their flags, their data, and a run of each with a tiny model."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import DistilBertConfig, DistilBertForSequenceClassification

from tests.marks import slow
from tests.tiny import tiny_tokenizer
from training.utils.arguments import DataArguments
from training.utils.data.kinds import KINDS
from training.utils.data.prepare import prepare_data
from training.utils.run.recipes import flags_of, read_recipe

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
PROGRAMS = {
    "step1": "training.step1_supervised_finetuning.main",
    "step2": "training.step2_reward_model_finetuning.main",
    "step3": "training.step3_rlhf_finetuning.main",
}
MODELS = {"step1": ("model",), "step2": ("model",), "step3": ("actor_model", "critic_model")}
PAGES = {"tldr": "tldr.md", "sentiment": "sentiment.md", "stackexchange": "stackexchange.md"}

SLOW_PLANS = ("tldr_sample", "stackexchange_sample")  # of the same programs as the third sample's


@pytest.fixture(autouse=True)
def _in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def sections(name: str) -> dict[str, list[str]]:
    """The flags of each step of a recipe of the examples."""
    _, found = read_recipe(str(EXAMPLES / f"{name}.yaml"))
    return {step: flags_of(section, [ROOT]) for step, section in found.items()}


def parsed(step: str, argv: list[str]) -> list:
    return importlib.import_module(PROGRAMS[step]).parse_flags(argv)


def names() -> list[str]:
    return [f"{name}{kind}" for name in PAGES for kind in ("", "_sample")]


def test_every_recipe_is_tested_and_has_its_page():
    assert {path.stem for path in EXAMPLES.glob("*.yaml")} == set(names())
    for name, page in PAGES.items():
        text = (ROOT / "docs" / "examples" / page).read_text(encoding="utf-8")
        for recipe in (name, f"{name}_sample"):
            command = re.search(rf"train\.py --recipe examples/{recipe}\.yaml[^\n`]*", text)
            assert command, recipe
            assert command[0].strip() in (EXAMPLES / f"{recipe}.yaml").read_text(encoding="utf-8"), (
                "the recipe says how"
            )


@pytest.mark.parametrize("name", [slow(name) if name in SLOW_PLANS else name for name in names()])
def test_flags_and_plan(name, tiny_model, tmp_path, monkeypatch, capsys):
    """Each section is accepted by its program; a plan of it can be made, with a tiny model in place of its own."""
    monkeypatch.setenv("TRIPOD_OUTPUT", str(tmp_path))
    for step, argv in sections(name).items():
        parsed(step, [part.replace("examples/data", str(EXAMPLES / "data")) for part in argv])
        if not name.endswith("_sample"):
            continue  # the same flags with other numbers
        models = [part for role in MODELS[step] for part in (f"--{role}_name_or_path", str(tiny_model))]
        if "--reward_function" in argv:
            models[-1] = "none"
        # The tiny model has positions for 512 tokens
        short = [min(argv[i], "96", key=int) if "_seq_len" in argv[i - 1] else argv[i] for i in range(len(argv))]
        program = importlib.import_module(PROGRAMS[step])
        assert program.main([*short, *models, "--dtype", "fp32", "--plan"]) == 0
        assert "MiB" in capsys.readouterr().out


@pytest.mark.parametrize("name", [f"{name}_sample" for name in PAGES])
def test_the_sample_feeds_every_step(name):
    for step, argv in sections(name).items():
        groups = parsed(step, argv)
        data = next(group for group in groups if isinstance(group, DataArguments))
        kind = KINDS[int(step[-1]) - 1]
        rows = prepare_data(kind, data, tiny_tokenizer(), max_length=512, seed=1234)
        assert len(rows.train) >= 4 and len(rows.held_out) >= 1 and not rows.report.dropped, (
            step,
            "\n".join(rows.report.lines()),
        )


def test_samples_say_whose_they_are():
    text = (EXAMPLES / "data" / "README.md").read_text(encoding="utf-8")
    assert "written for this project" in text
    for path in (EXAMPLES / "data").glob("*.jsonl"):
        rows = path.read_text(encoding="utf-8").splitlines()
        assert 20 <= len(rows) <= 40 and len(set(rows)) == len(rows) and f"`{path.name}`" in text


def sentiment() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sentiment_example", EXAMPLES / "sentiment.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_words_tell_the_reviews_apart():
    rows = [json.loads(line) for line in (EXAMPLES / "data" / "imdb.jsonl").read_text(encoding="utf-8").splitlines()]
    module = sentiment()
    rewards = module.words([[]] * len(rows), [row["text"] for row in rows], rows)
    right = [(reward > 0) == bool(row["label"]) for reward, row in zip(rewards, rows, strict=True)]
    assert sum(right) >= 20
    assert module.words([[]], ["Good, GOOD and bad: a waste."], [{}]) == [-1.0]


@pytest.fixture(scope="module")
def tiny_classifier(tmp_path_factory) -> Path:
    """Two classes, the first of them the positive one."""
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    tokenizer = tiny_tokenizer()
    config = DistilBertConfig(vocab_size=len(tokenizer), dim=32, hidden_dim=64, n_layers=1, n_heads=2, num_labels=2,
                              initializer_range=0.3, max_position_embeddings=64)  # fmt: skip
    config.id2label, config.label2id = {0: "POSITIVE", 1: "NEGATIVE"}, {"POSITIVE": 0, "NEGATIVE": 1}
    DistilBertForSequenceClassification(config).save_pretrained(folder)
    tokenizer.model_max_length = 64
    tokenizer.save_pretrained(folder)
    return folder


def test_a_classifier_is_a_reward(tiny_classifier):
    module = sentiment()
    module.MODEL = str(tiny_classifier)
    prompts = [[{"role": "user", "content": f"Text {n}"}] for n in range(40)]
    responses = [f"went on {'and on ' * n}" for n in range(40)]
    rewards = module.classifier(prompts, responses, [{}] * 40)
    model = DistilBertForSequenceClassification.from_pretrained(tiny_classifier).eval()
    tokenizer = tiny_tokenizer()
    for n in (0, 7, 39):
        ids = tokenizer(f"Text {n} {responses[n]}", return_tensors="pt", truncation=True, max_length=64)
        with torch.no_grad():
            logits = model(input_ids=ids["input_ids"], attention_mask=ids["attention_mask"]).logits[0]
        assert rewards[n] == pytest.approx((logits[0] - logits[1]).item(), abs=1e-4)


@pytest.mark.parametrize("name", [page if page == "sentiment" else slow(page) for page in PAGES])
def test_a_run_with_a_tiny_model(name, tiny_model, tiny_classifier, tmp_path):
    """Every step of the recipe on its sample, each from the one before; sentiment with a classifier."""
    shorter = {
        "step1": ["--model_name_or_path", str(tiny_model), "--num_train_epochs", "1"],
        "step2": ["--model_name_or_path", str(tmp_path / "step1"), "--num_train_epochs", "1"],
        "step3": ["--actor_model_name_or_path", str(tmp_path / "step1"), "--num_iterations", "2"],
    }
    shorter["step3"] += ["--max_answer_seq_len", "8", "--critic_model_name_or_path"]
    shorter["step3"].append("none" if name == "sentiment" else str(tmp_path / "step2"))
    if name == "sentiment":
        code = (EXAMPLES / "sentiment.py").read_text(encoding="utf-8")
        (tmp_path / "mine.py").write_text(re.sub(r"MODEL = .*", f"MODEL = {str(tiny_classifier)!r}", code), "utf-8")
        shorter["step3"] += ["--reward_function", f"{tmp_path / 'mine.py'}:classifier"]
    for step, argv in sections(f"{name}_sample").items():
        program = importlib.import_module(PROGRAMS[step])
        common = ["--output_dir", str(tmp_path / step), "--dtype", "fp32", "--report_to", "none"]
        assert program.main([*argv, *shorter[step], *common]) == 0
    lines = (tmp_path / "step1" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert ("eval/rouge" in json.loads(lines[0])) == (name == "tldr")
    assert json.loads((tmp_path / "step3" / "summary.json").read_text(encoding="utf-8"))["iterations"] == 2
    assert (tmp_path / "step3" / "actor" / "adapter").is_dir() == (name == "stackexchange")
