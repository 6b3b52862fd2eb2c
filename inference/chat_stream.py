"""Answers, token by token: one loop that the terminal chat and the page pull from.

The loop is a generator that runs one forward per `next`. Whoever reads it decides the pace: the page takes one
token from each model in turn, so two answers grow side by side on one machine, and a reader that goes away
(Stop, Ctrl-C, a closed browser tab) ends the work because nobody pulls any more. ``generate`` with a streamer
would need a thread per answer and a flag to end it.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from chat_arguments import SamplingArguments
from chat_models import ChatModel
from chat_reasoning import Marks, is_opened, marks_of
from transformers import (
    LogitsProcessorList,
    PreTrainedTokenizerBase,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from training.utils.data.chat import read_what_fits
from training.utils.data.template import forbidden_texts, special_texts
from training.utils.errors import UserError
from training.utils.generation.cache import accepted_inputs
from training.utils.model.forward import without_adapters

Message = dict[str, str]
INCOMPLETE = "\ufffd"  # what a tokenizer decodes half a character to


def checked_sampling(values: Sequence[object]) -> SamplingArguments:
    """Options from anywhere else than the command line, in the order of the fields, held to the same ranges.

    Raises:
        UserError: a value that is not a number, not a whole one where these are, or out of range.
    """
    chosen = {}
    for option, value in zip(fields(SamplingArguments), values, strict=True):
        what = option.name.replace("_", " ")
        try:
            number = float(value)  # type: ignore[arg-type]  # whatever it is, float() judges it
        except (TypeError, ValueError) as error:
            raise UserError(f"The {what} must be a number.") from error
        low, high, above = (option.metadata[bound] for bound in ("minimum", "maximum", "above"))
        if not number <= high or (low is not None and number < low) or (above is not None and number <= above):
            bound = f"at least {low:g}" if low is not None else f"above {above:g}"
            raise UserError(f"The {what} must be {bound} and at most {high}.")
        if option.type == "int" and not number.is_integer():
            raise UserError(f"The {what} must be a whole number.")
        chosen[option.name] = int(number) if option.type == "int" else number
    return SamplingArguments(**chosen)  # type: ignore[arg-type]  # int where the field says so


@dataclass
class Answer:
    """One answer, while it grows and when it is done.

    Attributes:
        token_ids: the sampled tokens, the stop token left out.
        ended: "" while it grows; "stop" (the model ended it), "length" (the limit did) or "cancelled".
        seconds: time that the model took for all these tokens but the first, which it gives when it reads the prompt.
        dropped: messages of the conversation that no longer fit and were left out, the oldest ones.
        marks: what stands around a reasoning; without them the whole text is the answer.
        opened: the generation prompt has begun the reasoning.
    """

    tokenizer: PreTrainedTokenizerBase
    token_ids: list[int] = field(default_factory=list)
    ended: str = ""
    seconds: float = 0.0
    dropped: int = 0
    marks: Marks | None = None
    opened: bool = False
    _decoded: tuple[int, str] = field(default=(0, ""), init=False, repr=False)

    @property
    def text(self) -> str:
        """What was written so far; half a character at its end is held back until it is whole."""
        if self._decoded[0] != len(self.token_ids):
            plain = not (self.marks and self.marks.special)
            text = str(self.tokenizer.decode(self.token_ids, skip_special_tokens=plain))
            self._decoded = (len(self.token_ids), text)
        text = self._decoded[1]
        return text if self.ended else text.rstrip(INCOMPLETE)

    @property
    def parts(self) -> tuple[str, str]:
        """The reasoning, empty where there is none, and the answer proper."""
        if self.marks is None:
            return "", self.text
        return self.marks.split(self.text, self.opened, bool(self.ended))

    @property
    def reasoning_tokens(self) -> int:
        """How many of the tokens are reasoning, its closing mark included."""
        if not self.parts[0]:
            return 0
        assert self.marks is not None
        close, plain = self.marks.close, not self.marks.special
        return bisect_left(
            range(len(self.token_ids)),
            True,
            key=lambda n: close in str(self.tokenizer.decode(self.token_ids[:n], skip_special_tokens=plain)),
        )

    @property
    def message(self) -> Message:
        """For the conversation that goes on: the reasoning beside the answer where the template has a place for it."""
        reasoning, said = self.parts
        if self.marks is None or not (reasoning and self.marks.place):
            return {"role": "assistant", "content": self.text if reasoning else said}
        return {"role": "assistant", "content": said, "reasoning": reasoning}

    @property
    def tokens_per_second(self) -> float:
        """Decoding speed; reading the prompt is not part of it."""
        return (len(self.token_ids) - 1) / self.seconds if self.seconds > 0 and len(self.token_ids) > 1 else 0.0


def untrainable(messages: Sequence[Message], models: Sequence[ChatModel]) -> str:
    """A text in a conversation for which training refuses it as a row: a model's special token, or what ends its turns.

    Empty where there is none.
    """
    texts = [text for message in messages for text in (message["content"], message.get("reasoning", ""))]
    for tokenizer in (model.tokenizer for model in models):
        for token in forbidden_texts(tokenizer) if tokenizer.chat_template else special_texts(tokenizer):
            if any(token in text for text in texts):
                return token
    return ""


def prompt_ids(model: ChatModel, messages: Sequence[Message], max_new_tokens: int) -> tuple[list[int], int]:
    """Token ids of a conversation up to where the answer starts, cut to the model's context.

    The oldest turns go first, question and answer together; a system message and the last prompt stay.

    Returns:
        the ids, and how many messages were left out.

    Raises:
        UserError: the last prompt alone does not fit, or the chat template refuses the conversation.
    """
    context = model.context
    limit = None if context is None else context - min(max_new_tokens, context // 2)
    ids, dropped = read_what_fits(model.tokenizer, messages, limit, add_generation_prompt=True)
    if context is not None and len(ids) >= context:  # a shorter answer is better than none
        raise UserError(f"the prompt has {len(ids):,} tokens, the model reads at most {context - 1:,}")
    return ids, dropped


def stream_answer(model: ChatModel, messages: Sequence[Message], sampling: SamplingArguments) -> Iterator[Answer]:
    """Decode one answer; yields the same growing `Answer` after every token, at the last one with ``ended`` set.

    Closing the generator ends the work at once.

    Args:
        model: who answers.
        messages: role and content, the last one from the user.
        sampling: ``temperature`` 0 is greedy.

    Raises:
        UserError: see `prompt_ids`.
    """
    ids, dropped = prompt_ids(model, messages, sampling.max_new_tokens)
    limit = sampling.max_new_tokens if model.context is None else min(sampling.max_new_tokens, model.context - len(ids))
    marks = marks_of(model.tokenizer)
    opened = is_opened(model.tokenizer, marks, messages)
    answer = Answer(model.tokenizer, dropped=dropped, marks=marks, opened=opened)
    generator = torch.Generator(model.device).manual_seed(sampling.seed)
    sequence = torch.tensor([ids], device=model.device)
    fed, cache, processors = sequence, None, _processors(sampling)
    while not answer.ended:
        started = time.perf_counter()
        positions = torch.arange(sequence.shape[1], device=model.device)[None, -fed.shape[1] :]
        with model.weights.use(model.adapter) as network:
            options = _taken(network, logits_to_keep=1, position_ids=positions)
            output = network(input_ids=fed, past_key_values=cache, use_cache=True, **options)
        scores = processors(sequence, output.logits[:, -1].float())
        if sampling.temperature == 0:
            token = scores.argmax(-1, keepdim=True)
        else:
            token = torch.multinomial(scores.softmax(-1), 1, generator=generator)
        sequence = torch.cat([sequence, token], dim=-1)
        cache = getattr(output, "past_key_values", None)
        fed = token if cache is not None else sequence  # a family without this kind of cache reads all of it again
        if int(token) in model.stop_ids:
            answer.ended = "stop"
        else:
            answer.token_ids.append(int(token))
            if len(answer.token_ids) >= limit:
                answer.ended = "length"
        if len(answer.token_ids) > 1 and answer.ended != "stop":  # the end token is none of them
            answer.seconds += time.perf_counter() - started
        yield answer


def _processors(sampling: SamplingArguments) -> Any:
    """transformers' own, in the order in which ``generate`` applies them."""
    processors = LogitsProcessorList()
    if sampling.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature == 0:
        return processors
    if sampling.temperature != 1:
        processors.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    return processors


def _taken(network: Any, **options: Any) -> dict[str, Any]:
    """What of these a family's forward takes.

    A long prompt's logits are [1, T, V], of which the last row is enough; positions are given as ``generate`` does, as
    some families (Bamba) count them from 0 in every forward.
    """
    kind: Any = type(without_adapters(network))
    return {name: value for name, value in options.items() if name in accepted_inputs(kind)}
