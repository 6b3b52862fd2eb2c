import dataclasses
import itertools

import chat_stream
import pytest
import torch
from chat_models import LoadArguments, load_chat_models
from chat_stream import SamplingArguments, checked_sampling, prompt_ids, stream_answer
from transformers import AutoModelForCausalLM

from tests import families
from tests.inference.tiny_chat import save_chat_model, save_parrot
from training.utils.data import chat
from training.utils.errors import UserError

HELLO = [{"role": "user", "content": "tell me a story"}]


def final(model, messages=HELLO, **options):
    *_, answer = stream_answer(model, messages, SamplingArguments(**options))
    return answer


def generated(model, **options):
    """What transformers' own generate gives for the same prompt."""
    ids = torch.tensor([prompt_ids(model, HELLO, 1)[0]])
    network = AutoModelForCausalLM.from_pretrained(model.path).eval()
    output = network.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, pad_token_id=0, eos_token_id=list(model.stop_ids),
        **options,
    )  # fmt: skip
    return [t for t in output[0, ids.shape[1] :].tolist() if t not in model.stop_ids]


@pytest.mark.parametrize("penalty", [1.0, 1.7])
def test_greedy_equals_generate(load, penalty):
    [model] = load("sft")
    answer = final(model, temperature=0, repetition_penalty=penalty, max_new_tokens=40)
    assert answer.token_ids == generated(model, do_sample=False, repetition_penalty=penalty)
    assert len(answer.token_ids) > 5


def test_a_family_that_counts_no_positions_answers_as_generate_does(tmp_path):
    [model] = load_chat_models({"m": families.save("bamba", tmp_path)}, LoadArguments(), lambda line: None)
    assert final(model, temperature=0, max_new_tokens=40).token_ids == generated(model, do_sample=False)


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.5}, {"top_k": 7, "top_p": 0.8}])
def test_sampling_equals_generate(load, options):
    [model] = load("sft")
    options = {"top_p": 1.0, "top_k": 0, "temperature": 1.3, "repetition_penalty": 1.1} | options
    torch.manual_seed(77)
    expected = generated(model, do_sample=True, **options)
    assert final(model, seed=77, max_new_tokens=40, **options).token_ids == expected
    assert final(model, seed=78, max_new_tokens=40, **options).token_ids != expected


def test_a_seed_repeats_and_leaves_the_global_generator_alone(load):
    [model] = load("sft")
    state = torch.get_rng_state()
    first = final(model, seed=5, temperature=1.5)
    assert torch.equal(state, torch.get_rng_state())
    assert first.token_ids == final(model, seed=5, temperature=1.5).token_ids


def test_the_answer_grows_and_ends_at_the_stop_token(load):
    [model] = load("fox")
    texts = [(a.text, a.ended) for a in stream_answer(model, HELLO, SamplingArguments())]
    assert texts[-1] == ("the quick brown fox jumps!", "stop")
    assert len(texts) > 4 and all(ended == "" for _, ended in texts[:-1])
    assert all(later.startswith(earlier) for (earlier, _), (later, _) in zip(texts, texts[1:], strict=False))


def test_every_saved_stop_token_ends_the_answer(load):
    [model] = load("fox")
    fox = model.tokenizer.encode(" fox", add_special_tokens=False)[0]
    early = final(dataclasses.replace(model, stop_ids=model.stop_ids | {fox}))
    assert early.ended == "stop" and early.text == "the quick brown"


def test_the_limit_ends_the_answer_without_cutting_its_tail(tmp_path):
    """A predecessor cut the last two tokens of every answer, ended or not."""
    save_parrot(tmp_path / "m", "a small red house", then_stop=False)
    [model] = load_chat_models({"m": str(tmp_path / "m")}, LoadArguments(), lambda line: None)
    length = len(model.tokenizer.encode("a small red house", add_special_tokens=False))
    answer = final(model, max_new_tokens=length)
    assert (answer.text, answer.ended) == ("a small red house", "length")
    assert final(model, max_new_tokens=1).token_ids == answer.token_ids[:1]


def test_half_a_character_is_never_shown(tmp_path):
    save_parrot(tmp_path / "m", "x☃y")  # three bytes, three tokens
    [model] = load_chat_models({"m": str(tmp_path / "m")}, LoadArguments(), lambda line: None)
    shown = [a.text for a in stream_answer(model, HELLO, SamplingArguments())]
    assert shown[-1] == "x☃y"
    assert len(model.tokenizer.encode("☃", add_special_tokens=False)) > 1, "one token: the test is blind"
    assert not any("\ufffd" in text for text in shown)


def test_nobody_reads_nobody_computes(load, monkeypatch):
    """A visitor who leaves, Stop and Ctrl-C all end in a generator that is not read any further."""
    [model] = load("sft")
    calls = []
    forward = model.weights.model.forward
    monkeypatch.setattr(model.weights.model, "forward", lambda **kw: calls.append(1) or forward(**kw))
    stream = stream_answer(model, HELLO, SamplingArguments(max_new_tokens=200, temperature=0))
    for _ in range(3):
        next(stream)
    stream.close()
    assert len(calls) == 3
    assert not model.weights.lock.locked()


def test_a_model_without_a_cache_reads_everything_again(load, monkeypatch):
    [model] = load("sft")
    expected = final(model, temperature=0, max_new_tokens=12).token_ids
    forward = model.weights.model.forward

    def uncached(input_ids, logits_to_keep=0, **kwargs):
        assert kwargs["past_key_values"] is None
        output = forward(input_ids=input_ids, logits_to_keep=logits_to_keep, use_cache=False)
        output.past_key_values = None
        return output

    monkeypatch.setattr(model.weights.model, "forward", uncached)
    assert final(model, temperature=0, max_new_tokens=12).token_ids == expected


def conversation(turns, words=20):
    messages = [{"role": "system", "content": "be kind"}]
    for number in range(turns):
        messages.append({"role": "user", "content": f"{number} " + "story " * words})
        messages.append({"role": "assistant", "content": f"answer {number}"})
    return [*messages, {"role": "user", "content": "and now?"}]


def test_the_oldest_turns_leave_and_the_system_message_stays(load):
    [model] = load("sft")
    messages = conversation(40)
    ids, dropped = prompt_ids(model, messages, 64)
    text = model.tokenizer.decode(ids)
    assert len(ids) + 64 <= model.context
    assert dropped > 0 and dropped % 2 == 0
    assert "be kind" in text and "and now?" in text and "answer 39" in text and "answer 0<" not in text
    kept, none = prompt_ids(model, conversation(2, words=3), 64)
    assert none == 0 and "answer 0" in model.tokenizer.decode(kept)
    assert final(model, messages, max_new_tokens=8).dropped > 0


def test_as_many_turns_leave_as_must_and_few_conversations_are_read_for_it(load, monkeypatch):
    [model] = load("sft")
    read, asked = chat.read_any, []
    monkeypatch.setattr(chat, "read_any", lambda *a, **more: asked.append(1) or read(*a, **more))
    messages = conversation(100, words=3)
    ids, dropped = prompt_ids(model, messages, 64)
    assert len(asked) <= 9  # of 100 turns
    one_more = [messages[0], *messages[1 + dropped - 2 :]]
    assert len(ids) + 64 <= model.context < 64 + len(read(model.tokenizer, one_more, add_generation_prompt=True))


def test_a_prompt_that_does_not_fit_is_said(load):
    [model] = load("sft")
    with pytest.raises(UserError, match=r"the prompt has [\d,]+ tokens, the model reads at most 511"):
        final(model, [{"role": "user", "content": "story " * 600}])


def test_the_answer_ends_where_the_context_does(load):
    [model] = load("sft")
    one = len(model.tokenizer.encode(" story", add_special_tokens=False))
    long = [{"role": "user", "content": " story" * (480 // one)}]
    ids, _ = prompt_ids(model, long, 400)
    answer = final(dataclasses.replace(model, stop_ids=frozenset()), long, max_new_tokens=400)
    assert answer.ended == "length" and len(ids) + len(answer.token_ids) == model.context


def test_no_context_means_no_limit(load):
    [model] = load("sft")
    free = dataclasses.replace(model, context=None)
    assert prompt_ids(free, conversation(40), 64)[1] == 0


def test_a_template_that_refuses_is_said(tmp_path):
    folder = save_chat_model(tmp_path / "m", 1)
    template = (folder / "chat_template.jinja").read_text()
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system turn please') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(refusal + template)
    [model] = load_chat_models({"m": str(folder)}, LoadArguments(), lambda line: None)
    assert final(model, max_new_tokens=2).token_ids
    with pytest.raises(UserError, match="no system turn please"):
        final(model, conversation(1))


def test_a_system_message_that_the_template_loses_is_said(tmp_path):
    folder = save_chat_model(tmp_path / "m", 1)
    template = (folder / "chat_template.jinja").read_text()
    without = template.replace("{% for m in messages %}", "{% for m in messages if m['role'] != 'system' %}")
    (folder / "chat_template.jinja").write_text(without)
    [model] = load_chat_models({"m": str(folder)}, LoadArguments(), lambda line: None)
    assert final(model, max_new_tokens=2).ended
    with pytest.raises(UserError, match="the chat template loses the system turn 'Be kind.'"):
        final(model, [{"role": "system", "content": "Be kind."}, *HELLO])


def test_speed_leaves_the_prompt_out(load):
    [model] = load("sft")
    answer = final(model, temperature=0, max_new_tokens=10)
    assert answer.tokens_per_second == pytest.approx(9 / answer.seconds)
    assert final(model, temperature=0, max_new_tokens=1).tokens_per_second == 0


def test_speed_is_of_the_tokens_that_it_counts(load, monkeypatch):
    clock = itertools.count()  # a second for each forward
    monkeypatch.setattr(chat_stream.time, "perf_counter", lambda: float(next(clock)))
    for name, ended in (("sft", "length"), ("house", "stop")):
        [model] = load(name)
        answer = final(model, temperature=0, max_new_tokens=5 if name == "sft" else 50)
        assert answer.ended == ended and answer.tokens_per_second == 1


def test_options_from_a_request_are_held_to_the_flags_ranges():
    assert checked_sampling([64, 0.5, 0.9, 0, 1, 7]) == SamplingArguments(64, 0.5, 0.9, 0, 1.0, 7)
    good = [64, 0.5, 0.9, 0, 1.0, 7]
    for position, bad in [
        (0, 0), (0, 10**9), (1, -1), (1, float("nan")), (2, 0), (2, 1.5), (3, -1), (4, 0), (5, -1), (5, 2**31),
        (1, "warm"), (1, None), (0, float("inf")), (0, 9.5), (5, "7.6"),
    ]:  # fmt: skip
        values = [*good]
        values[position] = bad
        with pytest.raises(UserError, match="must be"):
            checked_sampling(values)
