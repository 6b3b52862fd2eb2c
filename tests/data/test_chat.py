"""The renderer: which tokens are trained, for every assistant turn, with tokenizers of every family."""

from __future__ import annotations

import errno
import os
import time

import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st

from tests import templates
from tests.data import families
from training.utils.data import chat, template
from training.utils.data.chat import read_any, render
from training.utils.data.template import RowError, configure_chat_template, stop_token_ids
from training.utils.data.template_file import template_names
from training.utils.errors import UserError

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"


def chat_of(*turns: str, system: str = "") -> list[dict[str, str]]:
    roles = (USER, ASSISTANT) * len(turns)
    messages = [{"role": r, "content": c} for r, c in zip(roles, turns, strict=False)]
    return [{"role": SYSTEM, "content": system}, *messages] if system else messages


def tokenizer(name: str):
    found = families.tokenizer(name)
    if found is None:
        pytest.skip("the embedded model's package is not installed")
    return found


text = st.text(
    st.one_of(
        st.characters(codec="utf-8", exclude_categories=("Cs", "Cc", "Cn", "Co")), st.sampled_from("  \n\n\t.,!aeT")
    ),
    min_size=1,
    max_size=25,
).filter(lambda s: s.strip() and "<" not in s and "[" not in s and "\u2581" not in s)


@pytest.mark.parametrize("name", families.BUILDERS)
@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    turns=st.lists(st.tuples(text, text), min_size=1, max_size=3).map(lambda t: [c for pair in t for c in pair]),
    system=text,
)
@example(turns=["Hi", "\nHello there"], system="")
@example(turns=["Hi", " Hello there ", "  more", "\n\n1. yes\n"], system="Be kind.")
def test_trained_tokens_are_the_assistant_turns(name, turns, system):
    tok = tokenizer(name)
    messages = chat_of(*turns, system=system if len(system) % 2 else "")
    rendered = render(tok, messages)
    structure = template.structure_of(tok)
    end_id = tok.convert_tokens_to_ids(structure.end_token)
    answers = [m["content"] for m in messages if m["role"] == ASSISTANT]
    assert len(rendered.spans) == len(answers)
    assert len(rendered.input_ids) == len(rendered.response_mask) == len(rendered.offsets)

    # The characters: each span is the template's lead, the text (some templates trim it), and the end token once.
    for (start, end), answer in zip(rendered.spans, answers, strict=True):
        span = rendered.text[start:end]
        assert span.endswith(structure.end_token) and span.count(structure.end_token) == 1
        assert span[: -len(structure.end_token)].strip() == answer.strip()
        if name in families.BYTE_LEVEL:
            assert span == answer + structure.end_token

    # The tokens: trained runs and spans are the same in number, inside the spans, and the ids say the same text.
    runs, previous = [], 0
    for i, bit in enumerate(rendered.response_mask):
        if bit and not previous:
            runs.append([])
        if bit:
            runs[-1].append(i)
        previous = bit
    assert len(runs) == len(answers)
    for run, (start, end), answer in zip(runs, rendered.spans, answers, strict=True):
        covered = [rendered.offsets[i] for i in run]
        assert min(a for a, _ in covered) >= start and max(b for _, b in covered) == end
        inside = {c for a, b in covered for c in range(a, b)}
        missing = [c for c in range(start, end) if c not in inside and not rendered.text[c].isspace()]
        if name not in ("wordpiece", "unigram"):
            assert not missing
        assert rendered.input_ids[run[-1]] == end_id
        assert [rendered.input_ids[i] for i in run].count(end_id) == 1
        if name in families.BYTE_LEVEL:
            decoded = tok.decode([rendered.input_ids[i] for i in run], clean_up_tokenization_spaces=False)
            assert decoded == answer + structure.end_token

    # The ids before each span are the generation prompt's own rendering: what a rollout sees.
    for run, index in zip(runs, (i for i, m in enumerate(messages) if m["role"] == ASSISTANT), strict=True):
        prompt = render(tok, messages[:index], add_generation_prompt=True)
        assert rendered.input_ids[: run[0]] == prompt.input_ids
    first = next(i for i, m in enumerate(messages) if m["role"] == ASSISTANT)
    plain = tok.apply_chat_template(messages[:first], add_generation_prompt=True, tokenize=False)
    assert rendered.input_ids[: runs[0][0]] == tok(plain, add_special_tokens=False)["input_ids"]
    assert rendered.response_mask[-1] == 1 and rendered.input_ids[-1] == end_id


@pytest.mark.parametrize(
    ("name", "answer"), [("gpt2-like", "\n\nHello"), ("llama-legacy", "The capital"), ("llama-never", "The capital")]
)
def test_these_tokenizers_do_merge_across_the_boundary(name, answer):
    """The property above would mean little if no token crossed the boundary where nothing cuts it."""
    tok = tokenizer(name)
    rendered = render(tok, chat_of("What is it?", answer))
    whole = tok(rendered.text, add_special_tokens=False, return_offsets_mapping=True)
    start = rendered.spans[0][0]
    assert any(a < start < b for a, b in whole["offset_mapping"])
    assert not any(a < start < b for a, b in rendered.offsets)


@pytest.mark.parametrize("name", ["llama-legacy", "llama-first", "llama-never", "unigram"])
def test_no_space_is_invented_inside_a_text(name):
    """A SentencePiece tokenizer puts a space before any text; cut pieces must not get one in the middle."""
    tok = tokenizer(name)
    rendered = render(tok, chat_of("Hello", "The capital", "Yes", "Paris"))
    trained = [i for i, bit in zip(rendered.input_ids, rendered.response_mask, strict=True) if bit]
    told = "".join(tok.convert_ids_to_tokens(trained)).replace("\u2581", " ")
    assert told == "".join(rendered.text[a:b] for a, b in rendered.spans)


@pytest.mark.parametrize("scheme", ["legacy", "first", "never", ""])
def test_white_space_that_a_token_takes_in_gives_no_token(scheme):
    """Phi-3's tokens do: cut behind one, the newline of its template would be a token that the model never saw."""
    tok = families.phi_like(scheme)
    messages = chat_of("Hello", "The capital is Paris.", "Yes", "Paris", system="Be brief.")
    rendered = render(tok, messages)
    assert rendered.input_ids == tok(rendered.text, add_special_tokens=False)["input_ids"]
    trained = [i for i, bit in zip(rendered.input_ids, rendered.response_mask, strict=True) if bit]
    told = tok.decode(trained, clean_up_tokenization_spaces=False)
    assert [text.strip() for text in told.split("<|end|>")] == ["The capital is Paris.", "Paris", ""]
    indented = render(tok, chat_of("Hello", "\n  def f", "Yes", "  Paris"))
    first = indented.response_mask.index(1)
    assert indented.input_ids[:first] == render(tok, chat_of("Hello"), add_generation_prompt=True).input_ids
    assert tok.decode(indented.input_ids[first:]).startswith("\n  def f"), "an answer keeps its own"


def test_smollm2_arrangement():
    tok = tokenizer("smollm2-like")
    rendered = render(tok, chat_of("Hi", "Hello"))
    assert rendered.text.endswith("<|im_start|>assistant\nHello<|im_end|>"), "the newline after it is cut"
    assert "named SmolLM" in rendered.text
    assert stop_token_ids(tok) == [tok.eos_token_id]


def test_stop_tokens_are_eos_and_the_turn_end():
    tok = families._fast(families.byte_bpe(), "chatml", eos_token="<|endoftext|>")
    ids = [tok.convert_tokens_to_ids(t) for t in ("<|endoftext|>", "<|im_end|>")]
    assert stop_token_ids(tok) == ids


@pytest.mark.parametrize("template", template_names())
def test_every_named_template(template):
    marks = {"llama3": ["<|eot_id|>"], "gemma": ["<end_of_turn>"], "chatml": []}.get(template, [])
    raw = families.byte_bpe()
    raw.add_special_tokens(marks)
    tok = families._fast(raw, template, bos_token="<|im_start|>", eos_token="<|endoftext|>")
    end = (marks or {"chatml": ["<|im_end|>"]}.get(template) or ["<|endoftext|>"])[0]
    messages = chat_of("One?", "Uno", "Two?", "Dos", system="Be brief.")
    rendered = render(tok, messages)
    spans = [rendered.text[a:b].strip() for a, b in rendered.spans]
    assert [s.removesuffix(end).strip() for s in spans] == ["Uno", "Dos"] and all(s.endswith(end) for s in spans)
    assert "Be brief." in rendered.text
    assert render(tok, messages[:2], True).text in rendered.text


def test_a_template_with_generation_marks_is_masked_alike():
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tok = families.smol_like()
    tok.chat_template = template
    messages = chat_of("One?", "Uno", "Two?", "Dos")
    theirs = tok.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    ours = render(tok, messages)
    assert ours.input_ids == theirs["input_ids"][: len(ours.input_ids)]
    assert ours.response_mask == theirs["assistant_masks"][: len(ours.input_ids)]


def with_template(template: str):
    tok = families.smol_like()
    tok.chat_template = template
    return tok


BROKEN = {
    "not valid Jinja": "{% for m in messages %}",
    "loses the user turn": "{% for m in messages %}{{ m.content if m.role == 'assistant' }}<|im_end|>{% endfor %}",
    "loses the assistant turn": "{% for m in messages %}{{ m.content if m.role == 'user' }}<|im_end|>{% endfor %}",
    "does not end an assistant turn": "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "is not a prefix": "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}",
    "different tokens": "{% for m in messages %}{{ m.role }}: {{ m.content }}"
    "{{ '<|im_end|>' if loop.index0 < 2 else '<|endoftext|>' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}",
    "what a template must not do": "{{ messages.__class__.__mro__ }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "fails on a plain conversation": "{{ raise_exception('I am out') }}",
}


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}",
    "a text": "{{ 'a' * 10 ** 11 }}",
    "a list": "{{ [0] * 10 ** 11 }}",
}


@pytest.mark.parametrize("kind", ENDLESS)
def test_a_template_without_end_is_refused_in_time(kind, monkeypatch):
    monkeypatch.setattr(template, "_MOST_SECONDS", 1)
    start = time.process_time()
    with pytest.raises(UserError, match="the chat template takes more than"):
        configure_chat_template(with_template(ENDLESS[kind] + families.SMOL))
    assert time.process_time() - start < 5


def test_a_process_that_can_not_fork_takes_the_template_untried(monkeypatch):
    def refuse():
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr(os, "fork", refuse)
    tok = with_template(families.SMOL)
    configure_chat_template(tok)
    assert stop_token_ids(tok)


@pytest.mark.parametrize("reason", BROKEN)
def test_a_template_that_can_not_be_masked_is_an_error(reason):
    with pytest.raises(UserError, match=reason):
        configure_chat_template(with_template(BROKEN[reason]))


def test_a_turn_that_only_one_row_loses_is_an_error_of_that_row():
    template = families.SMOL.replace("+ message['content'] +", "+ message['content'].split('</think>')[-1] +")
    tok = with_template(template)
    configure_chat_template(tok)
    with pytest.raises(RowError, match="loses the assistant turn"):
        render(tok, chat_of("Hi", "I think</think>Hello"))


def test_refused_roles_are_an_error_of_the_row():
    tok = with_template(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system turns here') }}{% endif %}" + families.SMOL
    )
    configure_chat_template(tok)
    with pytest.raises(RowError, match="no system turns here"):
        render(tok, chat_of("Hi", "Hello", system="x"))


@given(system=st.text(min_size=1, max_size=40).filter(lambda s: s.strip()))
@settings(max_examples=60, deadline=None, derandomize=True)
@example(system='say "hi" \\n {% raw %} {{ 7 * 7 }} -%} 😀 \u2028')
def test_system_message_is_baked_into_the_template(system):
    system = system.encode("utf-8", "ignore").decode()
    if not system.strip():
        return
    tok = families.smol_like()
    configure_chat_template(tok, "", system)
    assert template.render_text(tok, chat_of("Hi")).startswith(f"<|im_start|>system\n{system}<|im_end|>")
    own = template.render_text(tok, chat_of("Hi", system="Mine"))
    assert own.startswith("<|im_start|>system\nMine<|im_end|>")
    once = tok.chat_template
    configure_chat_template(tok, "", system)
    assert tok.chat_template == once, "steps 2 and 3 get the tokenizer with it, and the flag again"


def test_a_template_without_system_turns_does_not_lose_the_system_message():
    plain = (
        "{% for m in messages if m.role != 'system' %}{{ m.role }}: {{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    configure_chat_template(with_template(plain))
    with pytest.raises(UserError, match="--system_message: the chat template writes no system turn"):
        configure_chat_template(with_template(plain), "", "Be kind.")
    refusing = families.SMOL.replace(
        "{% for", "{% if messages[0].role == 'system' %}{{ raise_exception('none') }}{% endif %}{% for", 1
    )
    with pytest.raises(UserError, match="fails on a plain conversation: .*none"):
        configure_chat_template(with_template(refusing), "", "Be kind.")


def test_template_is_saved_with_the_tokenizer(tmp_path):
    from transformers import AutoTokenizer

    tok = families.gpt2_like()
    configure_chat_template(tok, "alpaca", "Be kind.")
    tok.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    messages = chat_of("Hi", "Hello")
    assert render(again, messages) == render(tok, messages)


def test_template_flag(tmp_path):
    tok = families.smol_like()
    with pytest.raises(UserError, match="alpaca, chatml"):
        configure_chat_template(tok, "chatlm")
    path = tmp_path / "mine.jinja"
    path.write_text(
        "{% for m in messages %}|{{ m.role }}|{{ m.content }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}|assistant|{% endif %}"
    )
    configure_chat_template(tok, str(path))
    assert render(tok, chat_of("a", "b")).text == "|user|a<|im_end|>|assistant|b<|im_end|>"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="mine.jinja"):
        configure_chat_template(tok, str(path))


# Qwen 3's kind: what stands before </think> in an answer is dropped, in the last one too if it is not the first
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'].split('</think>')[-1].lstrip('\n') if m['role'] == 'assistant' else m['content'] }}"
    "{{ '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("answer", ["Hm.</think>Yes.", "</think>", "a <think> b", "", "  Yes.  ", "two\n\nlines"])
def test_any_answer_can_be_scored_and_continued(answer):
    """One sampled answer that training could not mask must not end PPO, nor the chat's second turn."""
    tok = families.smol_like()
    plain = tok.chat_template
    ask, said = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": answer}
    for form in (plain, THINKING):
        tok.chat_template = form
        ids = read_any(tok, [ask, said])
        assert ids[-1] == tok.convert_tokens_to_ids("<|im_end|>")
        going = read_any(tok, [ask, said, ask], add_generation_prompt=True)
        assert "<|im_start|>assistant" in tok.decode(going[-16:])
    tok.chat_template = plain
    assert (
        read_any(tok, [ask, {**said, "content": "Yes."}]) == render(tok, [ask, {**said, "content": "Yes."}]).input_ids
    )


def test_an_answer_that_the_template_leaves_open_is_read_whole_without_the_reasoning_that_it_loses():
    tok, (ask, said) = templates.tokenizer_of("glm4"), chat_of("Why?", "So.")
    assert read_any(tok, [ask, said | {"reasoning": "Hm."}]) == render(tok, [ask, said]).input_ids


@pytest.mark.parametrize("system", ["", "Be kind."])
@pytest.mark.parametrize("asked", [True, False])
def test_the_oldest_turns_go_as_far_as_they_must_and_few_conversations_are_read_for_it(tok, monkeypatch, system, asked):
    messages = chat_of(*("Why? " * (1 + n % 5) for n in range(41 if asked else 40)), system=system)
    start, reads = bool(system), []
    left = [[*messages[:start], *messages[start + dropped :]] for dropped in range(0, len(messages) - start, 2)]
    rendered = [read_any(tok, kept, add_generation_prompt=asked) for kept in left]
    monkeypatch.setattr(chat, "read_any", lambda *given: reads.append(1) or read_any(*given))
    for limit in (None, 1, 25, 100, 200, len(rendered[0]) - 1, len(rendered[0])):
        turns = next((n for n, ids in enumerate(rendered) if limit is None or len(ids) <= limit), len(rendered) - 1)
        reads.clear()
        assert chat.read_what_fits(tok, messages, limit, asked) == (rendered[turns], 2 * turns), limit
        assert len(reads) <= 7  # of 20 turns
