"""Reward models of other projects: converted, they give the scores that their own forward gives."""

import json
import pickle

import pytest
import torch
from transformers import AutoModel, AutoTokenizer, GPT2Config, GPTNeoXConfig, LlamaConfig, OPTConfig

from tests.tiny import VOCABULARY, tiny_tokenizer
from training.migrate import reward_model
from training.utils.errors import UserError, run_program
from training.utils.model.classifiers import load_classifier
from training.utils.model.forward import TokenScorer
from training.utils.model.reward_stats import RewardStats
from training.utils.run.inputs import check_model_path

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": VOCABULARY + 8}
FAMILIES = {
    "llama": LlamaConfig(**SMALL, intermediate_size=64, initializer_range=0.3),
    "opt": OPTConfig(**SMALL, ffn_dim=64, word_embed_proj_dim=16, init_std=0.3),  # as OPT-350m: narrower at the ends
    "gpt2": GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY + 8, initializer_range=0.3),
}
WRITTEN = {"system": "{}", "user": "\n\nHuman: {}", "assistant": "\n\nAssistant: {}<|endoftext|>"}


def save_theirs(folder, config, backbone="rwtransformer.", head="v_head", bias=False, outputs=1, **more):
    """A tiny backbone and its head as DeepSpeed-Chat's ``save_hf_format`` leaves them; returns both."""
    torch.manual_seed(0)
    base = AutoModel.from_config(config).eval()
    width = getattr(config, "word_embed_proj_dim", config.hidden_size)
    top = torch.nn.Linear(width, outputs, bias=bias)
    state = {backbone + name: tensor for name, tensor in base.state_dict().items()}
    state |= {f"{head}.{name}": tensor.detach() for name, tensor in top.state_dict().items()}
    folder.mkdir(parents=True)
    torch.save(state | more.pop("state", {}), folder / "pytorch_model.bin")
    values = config.to_dict() | {"architectures": ["TheirsForCausalLM"], "vocab_size": VOCABULARY} | more
    (folder / "config.json").write_text(json.dumps(values))
    tiny_tokenizer().save_pretrained(folder.parent / "tokenizer")
    return base, top


def convert(folder, data, *more):
    return run_program(
        reward_model.main,
        [
            *("--path", str(folder), "--data_path", str(data / "preferences.jsonl"), "--dtype", "fp32"),
            *("--tokenizer_name_or_path", str(folder.parent / "tokenizer"), "--max_seq_len", "480"),
            *("--output_dir", str(folder.parent / "ours"), *more),
        ],
    )


def check_scores(base, head, folder, offset=0.0):
    """Every token's score against the hidden state times the head."""
    scorer = TokenScorer(load_classifier(str(folder), dtype="fp32", pad_token_id=0)).eval()
    ids = torch.randint(3, VOCABULARY, (3, 20), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = head(base(ids).last_hidden_state).squeeze(-1) - offset
        ours = scorer(ids, torch.ones_like(ids))
    assert theirs.std() > 0.1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_deepspeed_chats_reward_models(tmp_path, tiny_data, family):
    base, head = save_theirs(tmp_path / "theirs", FAMILIES[family])
    assert convert(tmp_path / "theirs", tiny_data) == 0
    check_scores(base, head, tmp_path / "ours")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    rows = [json.loads(line) for line in (tiny_data / "preferences.jsonl").read_text().splitlines()]
    rewards = []
    for row in rows:
        for side in ("chosen", "rejected"):
            turns = [*row["prompt"], {"role": "assistant", "content": row[side]}]
            text = "".join(WRITTEN[turn["role"]].format(turn["content"]) for turn in turns)
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            with torch.no_grad():
                rewards.append(head(base(ids).last_hidden_state[:, -1]).item())
    expected = RewardStats.of(list(zip(rewards[::2], rewards[1::2], strict=True)), "fp32")
    found = RewardStats.read(tmp_path / "ours")
    assert (found.mean, found.std) == pytest.approx((expected.mean, expected.std), abs=1e-4)
    assert found.count == len(rows)


def test_of_a_ranking_the_best_answer_makes_the_statistics(tmp_path):
    """As in step 2: a prompt counts once, however many answers it has."""
    rows = [
        {"prompt": "Say a word.", "ranking": ["one", "two words", "and three words"]},
        {"prompt": "Say hi.", "ranking": ["Hi!", "Bye, and never come back."]},
    ]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    base, head = save_theirs(tmp_path / "theirs", FAMILIES["llama"])
    assert convert(tmp_path / "theirs", tmp_path) == 0
    tokenizer, best = AutoTokenizer.from_pretrained(tmp_path / "ours"), []
    for row in rows:
        text = WRITTEN["user"].format(row["prompt"]) + WRITTEN["assistant"].format(row["ranking"][0])
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            best.append(head(base(ids).last_hidden_state[:, -1]).item())
    found = RewardStats.read(tmp_path / "ours")
    assert (found.mean, found.count) == (pytest.approx(sum(best) / 2, abs=1e-4), 2)
    assert json.loads((tmp_path / "ours" / "summary.json").read_text())["held_out"] == 2


def test_openassistants_pythia_reward_models(tmp_path, tiny_data, capsys):
    config = GPTNeoXConfig(**SMALL, intermediate_size=64, initializer_range=0.3)
    kept = {"gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9)}  # older transformers saved it
    more = {"model_type": "gpt_neox_reward_model", "pooling": "last", "state": kept}
    base, head = save_theirs(tmp_path / "theirs", config, "gpt_neox.", "out_proj", bias=True, **more)
    assert convert(tmp_path / "theirs", tiny_data) == 0
    check_scores(base, head, tmp_path / "ours", offset=head.bias.item())
    assert "OpenAssistant" in capsys.readouterr().out
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    text = tokenizer.apply_chat_template(turns, tokenize=False)
    assert text == "<|prompter|>Hi<|endoftext|><|assistant|>Hello.<|endoftext|>"


def test_colossalchats_reward_models(tmp_path, tiny_data, capsys):
    """As ``booster.save_model`` leaves them: no config.json, and files of several parts."""
    base, head = save_theirs(tmp_path / "theirs", FAMILIES["llama"], "model.", "value_head", bias=True)
    (tmp_path / "theirs" / "config.json").rename(tmp_path / "tokenizer" / "config.json")
    (tmp_path / "theirs" / "pytorch_model.bin").rename(tmp_path / "theirs" / "pytorch_model-00001.bin")
    assert convert(tmp_path, tiny_data) == 2, "as --save_dir, in which they lie in modeling/"
    assert f"no weights there (pytorch_model.bin); give {tmp_path / 'theirs'}" in capsys.readouterr().err
    assert convert(tmp_path / "theirs", tiny_data) == 2
    assert "--chat_template FILE" in capsys.readouterr().err
    template = {"system_message": "Be kind.", "end_of_assistant": "<|im_end|>", "stop_ids": [0]}
    (tmp_path / "conversation.json").write_text(json.dumps(template))
    assert convert(tmp_path / "theirs", tiny_data, "--chat_template", str(tmp_path / "conversation.json")) == 0
    check_scores(base, head, tmp_path / "ours", offset=head.bias.item())
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    turns = [{"role": "user", "content": "Hi"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False).startswith("<|im_start|>system\nBe kind.<|im_end|>")


def test_alpaca_rlhfs_reward_models(tmp_path, tiny_data):
    """As DeepSpeed-Chat's of before October 2023 they have a slip of the pen in their names."""
    base, head = save_theirs(tmp_path / "theirs", FAMILIES["llama"], "rwtranrsformer.")
    assert convert(tmp_path / "theirs", tiny_data) == 0
    check_scores(base, head, tmp_path / "ours")


@pytest.mark.parametrize("backbone", ["rwtransformer.", "rwtranrsformer."])
@pytest.mark.parametrize("legacy", [False, True])
def test_such_a_folder_is_known_by_its_names_alone(tmp_path, legacy, backbone):
    save_theirs(tmp_path / "theirs", FAMILIES["llama"], backbone)
    if legacy:
        file = tmp_path / "theirs" / "pytorch_model.bin"
        torch.save(torch.load(file, weights_only=True), file, _use_new_zipfile_serialization=False)
    with pytest.raises(UserError, match=r"--critic_model_name_or_path .*python -m training.migrate.reward_model"):
        check_model_path(str(tmp_path / "theirs"), "--critic_model_name_or_path")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"outputs": 2}, "2 outputs, a reward model has one"),
        ({"pooling": "mean"}, "pooling 'mean'"),
        ({"backbone": "other."}, "not a reward model that is known here"),
        ({"num_hidden_layers": 3}, "weights are not those of LlamaForSequenceClassification, such as model.layers.2"),
        ({"state": {"rwtransformer.extra": torch.zeros(2)}}, "such as model.extra"),
        ({"state": {"more": pickle.PickleBuffer}}, "can not be read as tensors alone"),
    ],
)
def test_what_can_not_be_converted_is_said_in_one_line(tmp_path, tiny_data, capsys, changes, words):
    save_theirs(tmp_path / "theirs", FAMILIES["llama"], **changes)
    assert convert(tmp_path / "theirs", tiny_data) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert words in line
    assert not (tmp_path / "ours").exists()


def test_special_tokens_are_not_guessed(tmp_path, tiny_data, capsys):
    save_theirs(tmp_path / "theirs", FAMILIES["llama"])
    assert convert(tmp_path / "theirs", tiny_data, "--tokenizer_name_or_path", "") == 2
    assert "--tokenizer_name_or_path" in capsys.readouterr().err
