"""Model cards: their code runs with plain transformers and gives what the project's own code gives."""

import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from tests import templates
from tests.step3.hybrid_checks import save_tiny_reward_model
from training.utils.data.chat import render
from training.utils.model import classifiers
from training.utils.model.card import read_front_matter, write_model_card
from training.utils.model.forward import TokenScorer

TALK = [
    {"role": "user", "content": "Why is the sky blue?"},
    {"role": "assistant", "content": "Because air scatters blue light more than red."},
]
RESULTS = {"loss_after": 1.23456, "steps": 7, "base_model": "/somewhere", "verdicts": {"it | holds": True}}


def write(folder, kind, base, **more):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    made = {"argv": ["--data_path", "my file.jsonl"], "data": ["demo: 3 rows"], "results": RESULTS} | more
    write_model_card(folder, kind, base, tokenizer=tokenizer, **made)
    return (folder / "README.md").read_text()


def run_code(card, folder, monkeypatch, capsys):
    """Run the card's Python as a reader would, in the folder; returns what it printed and its variables."""
    [code] = re.findall(r"```python\n(.*?)```", card, re.S)
    monkeypatch.chdir(folder)
    variables: dict = {}
    capsys.readouterr()
    exec(compile(code, "README.md", "exec"), variables)
    return capsys.readouterr().out.strip(), variables


@pytest.fixture
def chat(tiny_model, tmp_path):
    return shutil.copytree(tiny_model, tmp_path / "run" / "step1")


def test_the_chat_models_code_answers(chat, monkeypatch, capsys):
    card = write(chat, "sft", ("embedded", str(chat)))
    _, found = run_code(card, chat, monkeypatch, capsys)
    ids = found["inputs"]["input_ids"]
    assert ids[0].tolist() == render(found["tokenizer"], TALK[:1], add_generation_prompt=True).input_ids
    assert found["output"].shape[1] > ids.shape[1]


def test_the_reward_models_code_gives_the_projects_score(tiny_model, tmp_path, monkeypatch, capsys):
    """The template ends a turn with a line break, at which a plain call would read the score."""
    folder = save_tiny_reward_model(str(tiny_model), tmp_path / "step2")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = "<|endoftext|>"  # as saved by step 2: pad is not EOS
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": tokenizer.pad_token_id}))
    card = write(folder, "reward", (str(tiny_model), str(tiny_model)))
    printed, found = run_code(card, folder, monkeypatch, capsys)
    ids = torch.tensor([render(tokenizer, TALK).input_ids])
    scorer = TokenScorer(classifiers.load_classifier(str(folder), dtype="fp32", pad_token_id=0)).eval()
    with torch.no_grad():
        expected = scorer(ids, torch.ones_like(ids))[0]
        whole = tokenizer.apply_chat_template(TALK, return_tensors="pt", return_dict=True)
        planted_fault = found["model"](**whole).logits[0, 0].item()
    assert float(printed) == pytest.approx(expected[-1].item(), abs=1e-5)
    assert planted_fault != pytest.approx(expected[-1].item(), abs=1e-3)


@pytest.mark.parametrize("family", ["glm4", "llama2", "gpt-oss"])
def test_the_reward_models_code_reads_the_whole_answer_in_any_template(family, chat, monkeypatch, capsys):
    """GLM-4's leaves the last answer open: the token that ends it stands before the question, too."""
    tokenizer, model = templates.tokenizer_of(family), lambda **_: SimpleNamespace(logits=torch.zeros(1, 1))
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda _: tokenizer)
    monkeypatch.setattr(AutoModelForSequenceClassification, "from_pretrained", lambda _: model)
    _, found = run_code(write(chat, "reward", ("embedded", str(chat))), chat, monkeypatch, capsys)
    assert found["inputs"]["input_ids"][0].tolist() == render(tokenizer, TALK).input_ids


def test_what_it_says(chat):
    card = write(chat, "actor", ("embedded", str(chat)))
    assert "# run/step1: RLHF model" in card
    assert "| loss after | 1.235 |" in card and "| steps | 7 |" in card and "| verdicts: it / holds | yes |" in card
    assert "training/step3_rlhf_finetuning/main.py --data_path 'my file.jsonl'" in card
    assert "- demo: 3 rows" in card
    front = read_front_matter(chat / "README.md")
    assert front["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct" and front["license"] == "apache-2.0"
    assert front["pipeline_tag"] == "text-generation" and front["tags"] == ["tripod", "actor"]


def test_licence_and_origin_pass_from_step_to_step(chat, tiny_model, tmp_path):
    write(chat, "sft", ("embedded", str(chat)))
    next_ = shutil.copytree(tiny_model, tmp_path / "run" / "actor")
    card = write(next_, "actor", ("output/run/step1", str(chat)))
    assert "from `output/run/step1`, which goes back to HuggingFaceTB/SmolLM2-135M-Instruct" in card
    assert "which is under apache-2.0" in card
    other = shutil.copytree(tiny_model, tmp_path / "run" / "other")
    (other / "README.md").write_text("---\nlicense: other\nlicense_name: own-terms\nbase_model: x/y\n---\n# Mine\n")
    card = write(next_, "sft", (str(other), str(other)))
    assert "derive from the model that training started from, which is under own-terms" in card, "x/y is not its origin"
    card = write(next_, "sft", ("somebody/model", "somebody/model"))
    assert "derive from somebody/model; see there for its terms" in card


@pytest.mark.parametrize("text", ["no block", "---\n{[\n---\n", "---\n- a list\n---\n", "---\nonly an opening"])
def test_a_foreign_card_without_facts_is_no_error(chat, text):
    (chat / "README.md").write_text(text)
    assert read_front_matter(chat / "README.md") == {}


@pytest.mark.parametrize("kind", ["sft", "reward"])
def test_the_adapters_own_card_loads_it(kind, chat, tiny_model, monkeypatch, capsys):
    """Of a reward model on the language model that it began from."""
    from peft import LoraConfig, get_peft_model

    scores = kind == "reward"
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS" if scores else "CAUSAL_LM",
                        modules_to_save=["score"] if scores else None, init_lora_weights=False)  # fmt: skip
    if scores:
        model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    else:
        model = AutoModelForCausalLM.from_pretrained(tiny_model)
    get_peft_model(model, config).save_pretrained(chat / "adapter")
    write(chat, kind, (str(tiny_model), str(tiny_model)))
    card = (chat / "adapter" / "README.md").read_text()
    _, found = run_code(card, chat / "adapter", monkeypatch, capsys)
    loaded = dict(found["model"].named_parameters())
    assert any("lora" in name for name in loaded)
    saved = {name: value for name, value in loaded.items() if "modules_to_save" in name}
    assert bool(saved) == scores and all(value.equal(model.score.weight) for value in saved.values())
