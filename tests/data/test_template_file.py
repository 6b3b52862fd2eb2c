"""--chat_template with a conversation template in JSON, and --stop_ids."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from transformers import AutoTokenizer

from tests.data import families
from tests.data.test_chat import chat_of
from tests.data.test_prepare import prepare, sft, write
from training.utils.data.chat import render
from training.utils.data.report import IGNORED
from training.utils.data.template import configure_chat_template, stop_token_ids
from training.utils.errors import UserError
from training.utils.run.distributed import say_once

# As a user of ColossalChat writes it: the turns end with a token of the tokenizer's own
JINJA = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG = {
    "chat_template": JINJA,
    "system_message": "A chat between a human and an assistant.\n\n",
    "end_of_assistant": "<|im_end|>",
    "stop_ids": [2],
}


def saved(folder, **changes) -> str:
    path = folder / "conversation.json"
    path.write_text(json.dumps({key: value for key, value in (CONFIG | changes).items() if value is not ...}))
    return str(path)


def trained_of(rendered) -> list[str]:
    return [rendered.text[a:b] for a, b in rendered.spans]


def no_end_token(eos: str = "<|endoftext|>"):
    """A tokenizer for which <|im_end|> is text of several tokens, as phi-2's."""
    raw = families.byte_bpe()
    state = json.loads(raw.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] == eos]
    from tokenizers import Tokenizer

    return families.PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token=eos)


def test_all_four_keys_reach_the_text_the_mask_and_the_stop_set(tmp_path):
    tok = families._fast(families.byte_bpe(), eos_token="<|endoftext|>")
    configure_chat_template(tok, saved(tmp_path, stop_ids=[1]))
    rendered = render(tok, chat_of("Hi", "Hello", "And?", "Well"))
    turns = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello<|im_end|>\n"
    turns += "<|im_start|>user\nAnd?<|im_end|>\n<|im_start|>assistant\nWell<|im_end|>"
    assert rendered.text == f"<|im_start|>system\n{CONFIG['system_message']}<|im_end|>\n{turns}"
    assert trained_of(rendered) == ["Hello<|im_end|>", "Well<|im_end|>"]
    assert stop_token_ids(tok) == [0, 2, 1], "EOS, the template's end, the file's stop id"
    again = tok.chat_template
    configure_chat_template(tok, saved(tmp_path, stop_ids=[1]))
    assert tok.chat_template == again
    configure_chat_template(tok, "", "Be brief.", [1, 0])
    assert stop_token_ids(tok) == [0, 2, 1] and render(tok, chat_of("Hi", "Ho")).text.count("system\nBe brief.") == 1


def test_stop_ids_travel_with_the_saved_tokenizer_and_change_no_text(tmp_path):
    tok = families.smol_like()
    plain = render(tok, chat_of("Hi", "Hello"))
    configure_chat_template(tok, stop_ids=[0])
    assert render(tok, chat_of("Hi", "Hello")) == plain
    tok.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert stop_token_ids(again) == stop_token_ids(tok) == [2, 0]
    configure_chat_template(again, "", "Be kind.", [0])
    assert stop_token_ids(again) == [2, 0] and "Be kind." in render(again, chat_of("Hi", "Hello")).text
    configure_chat_template(again, "chatml")
    assert stop_token_ids(again) == [2], "another template has its own ends"


def test_a_system_message_of_the_flag_replaces_the_file_s(tmp_path):
    tok = families.smol_like()
    configure_chat_template(tok, saved(tmp_path), "Be brief.")
    text = render(tok, chat_of("Hi", "Hello")).text
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user") and "A chat" not in text


def test_every_key_may_be_absent_or_null(tmp_path):
    tok = families.smol_like()
    own = render(tok, chat_of("Hi", "Hello"))
    configure_chat_template(tok, saved(tmp_path, chat_template=..., system_message=None, end_of_assistant=...))
    assert render(tok, chat_of("Hi", "Hello")) == own
    configure_chat_template(tok, saved(tmp_path, chat_template="alpaca", system_message=None, stop_ids=[[2]]))
    assert "### Instruction:" in render(tok, chat_of("Hi", "Hello")).text


def test_the_template_may_be_another_model_s(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    other = families.smol_like()
    other.save_pretrained(model)
    tok = families._fast(families.byte_bpe(), "alpaca", eos_token="<|endoftext|>")
    configure_chat_template(tok, saved(tmp_path, chat_template=str(model), system_message=None))
    assert tok.chat_template == f"{{# stop ids: 2 #}}\n{families.SMOL}"
    (model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match="has no chat template"):
        configure_chat_template(tok, saved(tmp_path, chat_template=str(model)))
    with pytest.raises(UserError, match="chat_template /no/such: no such folder|chat_template .*no such"):
        configure_chat_template(tok, saved(tmp_path, chat_template="/no/such"))


def test_an_end_of_several_tokens_is_written_as_eos_and_said(tmp_path, capsys):
    say_once.cache_clear()
    tok = no_end_token()
    pieces = tok("<|im_end|>")["input_ids"]
    assert len(pieces) > 1
    path = saved(tmp_path, system_message=None, stop_ids=pieces)  # chatglm2's file lists the pieces
    for _ in range(2):  # where the tokenizer is loaded, and where the data are prepared
        configure_chat_template(tok, path)
        rendered = render(tok, chat_of("Hi", "Hello"))
        assert trained_of(rendered) == ["Hello<|endoftext|>"] and "<|im_end|>" not in rendered.text
        assert stop_token_ids(tok) == [tok.eos_token_id]
    assert capsys.readouterr().out.count("every answer ends with '<|endoftext|>' in its place") == 1


def test_an_end_that_the_template_does_not_write(tmp_path, capsys):
    say_once.cache_clear()
    tok = families._fast(families.byte_bpe(), eos_token="<|endoftext|>")
    configure_chat_template(tok, saved(tmp_path, end_of_assistant="<|endoftext|>"))  # EOS ends a response anyway
    assert "'<|endoftext|>' ends a response, too" in capsys.readouterr().out
    with pytest.raises(UserError, match="end_of_assistant is '<|im_start|>'.*write the same in both"):
        configure_chat_template(tok, saved(tmp_path, end_of_assistant="<|im_start|>"))
    with pytest.raises(UserError, match="end_of_assistant 'STOP' is 3 tokens .* so name that"):
        configure_chat_template(tok, saved(tmp_path, end_of_assistant="STOP"))


BAD = {
    "[1, 2]": "no conversation template; it is a JSON object with chat_template, system_message",
    '{"template": "x"}': "no conversation template",
    '{"chat_template": "x"': "broken JSON in line 1",
    '{"chat_template": ["x"]}': "chat_template must be a text",
    '{"stop_ids": 2}': "stop_ids must be a list of token ids",
    '{"stop_ids": [2, "x"]}': 'stop_ids must be a list of token ids, not "x"',
    '{"stop_ids": [[1, 2]]}': "stop_ids must be a list of token ids",
    '{"stop_ids": [true]}': "not true",
    '{"stop_ids": [-1]}': "not -1",
    '{"stop_ids": [2], "bos_token": "a"}': "unknown keys bos_token",
    '{"stop_ids": [999999]}': "stop id 999999: the tokenizer has no such token, its ids end at",
    '{"stop_ids": [70]}': "stop id 70 is .*, which stands inside texts",
    '{"system_message": "Be kind.", "chat_template": "{% for m in messages if m.role != \'system\' %}{{ m.role }}: '
    '{{ m.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"}': "no system turn",
}


@pytest.mark.parametrize("content", BAD)
def test_a_bad_file_is_one_clear_line(tmp_path, content):
    path = tmp_path / "bad.json"
    path.write_text(content)
    with pytest.raises(UserError, match=BAD[content]) as error:
        configure_chat_template(families.smol_like(), str(path))
    assert "\n" not in str(error.value)


def test_a_row_with_a_stop_token_in_it_is_refused(tmp_path):
    tok = families._fast(families.byte_bpe(), "alpaca", eos_token="<|im_end|>")
    tok.add_tokens(["<stop>"])
    rows = [*sft(4), {"prompt": "Where?", "response": "Here <stop> or there."}]
    prepare(1, tok, write(tmp_path / "a.jsonl", rows))
    with pytest.raises(UserError, match="a.jsonl:5: the text contains '<stop>'"):
        prepare(1, tok, write(tmp_path / "a.jsonl", rows), stop_ids=[tok.convert_tokens_to_ids("<stop>")])


def test_a_bad_file_is_told_before_torch_is_imported(tmp_path):
    path = tmp_path / "bad.json"
    path.write_text("{")
    code = "import sys; sys.argv = ['main.py', '--chat_template', sys.argv[1]]\nimport runpy\n"
    code += "try: runpy.run_module('training.step1_supervised_finetuning.main', run_name='__main__')\n"
    code += "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.split() == ["2", "False"] and "broken JSON in line 1" in done.stderr


PREPARED = {"input_ids": [1, 2], "labels": [-100, 2], "inputs_decode": "a b", "labels_decode": ["b"], "seq_length": 2}


def test_colossalchat_s_prepared_rows_are_read_by_their_conversations(tmp_path):
    """prepare_dataset.py leaves the conversation beside the tokens, in the jsonl and in the arrow folder alike."""
    import datasets

    turns = [[("human", f"Hi {i}"), ("assistant", f"Hello {i}")] for i in range(6)]
    rows = [{"messages": [{"from": who, "content": text} for who, text in pair]} for pair in turns]
    datasets.Dataset.from_list([row | PREPARED for row in rows]).save_to_disk(str(tmp_path / "part-00000"))
    tok = families.smol_like()
    raw = prepare(1, tok, write(tmp_path / "raw.jsonl", rows))
    for path in (str(tmp_path / "part-00000"), write(tmp_path / "b.jsonl", [row | PREPARED for row in rows])):
        data = prepare(1, tok, path)
        assert data.train["input_ids"][:] == raw.train["input_ids"][:]
        assert "input_ids 6" in next(iter(data.report.sources.values())).told_columns(IGNORED)


@pytest.mark.parametrize("row", [PREPARED, {"prompt": [1], "completion": [2], "label": True, "input_id_decode": "a b"}])
def test_rows_of_tokens_alone_are_refused_with_what_to_do(tmp_path, row):
    with pytest.raises(UserError, match="a.jsonl:1: the row holds tokens .*give the conversations .*--data_input_dirs"):
        prepare(1, families.smol_like(), write(tmp_path / "a.jsonl", [row] * 4))
