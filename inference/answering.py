"""Prompts of the data layer, and the answers of models to them, batch by batch; what generate.py does."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from answer_rewards import AnswerRewards

from training.utils.answers import Line, prompt_id
from training.utils.arguments import DataArguments
from training.utils.data.chat import render_many
from training.utils.data.formats.columns import convert, parse_column_map
from training.utils.data.formats.conversations import demonstration
from training.utils.data.prepare import prepare_data
from training.utils.data.template import RowError
from training.utils.errors import UserError
from training.utils.generation.rollouts import RolloutRequest, has_ended, response_texts
from training.utils.generation.sampling import SamplingConfig
from training.utils.generation.vllm import VllmOptions, started_backend
from training.utils.metrics import progress_bar
from training.utils.model import loading
from training.utils.model.limits import check_length, max_positions
from training.utils.model.tokenizer import check_vocabulary, end_ids, load_tokenizer
from training.utils.run.distributed import rank, say, world_size

if TYPE_CHECKING:
    from generate import DecodingArguments

Append = Callable[[Iterable[Mapping[str, Any]]], None]
Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Prompt:
    """One prompt of the data.

    Attributes:
        id: see `training.utils.answers.prompt_id`.
        messages: what is asked, in as many turns as fit.
        source: the file or dataset that it comes from.
        row: as it stood there.
        reference: the data's own answer, empty without one.
    """

    id: str
    messages: Messages
    source: str
    row: dict[str, Any]
    reference: str


def resolved_models(models: Mapping[str, str], decoding: DecodingArguments) -> dict[str, str]:
    """Name -> folder or hub name; every model is looked at before one is loaded.

    Raises:
        UserError: no model there, one that writes no answers, or too few positions.
    """
    paths = {name: loading.resolve_policy(path, "--model") for name, path in models.items()}
    length = decoding.max_prompt_seq_len + decoding.max_answer_seq_len
    for path in paths.values():
        check_length(path, length, "--max_prompt_seq_len + --max_answer_seq_len")
    return paths


def tokenizer_of(path: str, data: DataArguments) -> Any:
    """A model's tokenizer, with its own chat template or that of the flags."""
    tokenizer = load_tokenizer(path, **data.template)
    check_vocabulary(path, tokenizer)
    return tokenizer


def read_prompts(path: str, data: DataArguments, decoding: DecodingArguments, split: str) -> list[Prompt]:
    """The prompts of the flags, each once, in the order of their sources.

    Args:
        path: the first model, whose tokenizer says what is too long; the others are asked the same.
        split: ``all``, or what training takes or holds out.

    Raises:
        UserError: a source or a row is wrong, or nothing is left.
    """
    limit: dict[str, Any] = {"max_length": decoding.max_prompt_seq_len, "seed": decoding.seed}
    prepared = prepare_data("prompts", data, tokenizer_of(path, data), hold_out=split != "all", **limit)
    say("\n".join(prepared.report.lines()))
    rows = prepared.to_judge_by() if split == "held_out" else prepared.train
    mapped, found = parse_column_map(data.column_map), dict[str, Prompt]()
    for row in rows:
        messages, original = json.loads(row["messages"]), json.loads(row["row"])
        examples = convert(original, row["source"], mapped)[1]
        asked = [e for e in examples if e.prompt[-1:] == messages[-1:]] or examples if len(examples) > 1 else examples
        answer = "".join(turn["content"] for turn in demonstration(asked[0])[1])
        prompt = Prompt(prompt_id(messages), messages, row["source"], original, answer)
        found.setdefault(prompt.id, prompt)
    if len(found) < len(rows):
        say(f"left out: {len(rows) - len(found)} prompts that are the same as others once they are cut to "
            f"--max_prompt_seq_len {decoding.max_prompt_seq_len}")  # fmt: skip
    return list(found.values())


@dataclass(eq=False)
class Answering:
    """Answers prompts by one model after another, each rank its share.

    Args:
        prompts: all of them.
        decoding: the flags.
        count: answers to a prompt by each model.
        rewards: what they are worth; may be of nothing.
        data: the flags, for templates.
        dtype, device: of the models.
    """

    prompts: Sequence[Prompt]
    decoding: DecodingArguments
    count: int
    rewards: AnswerRewards
    data: DataArguments
    dtype: str
    device: torch.device

    def __post_init__(self) -> None:
        decoding = self.decoding
        greedy = decoding.temperature == 0
        self.sampling = SamplingConfig(
            decoding.max_answer_seq_len, decoding.temperature or 1.0, decoding.top_p, decoding.top_k, greedy=greedy
        )

    def answer(self, name: str, path: str, done: Sequence[Line], append: Append) -> None:
        """Let one model answer what is left of this rank's share.

        Args:
            name: the model's.
            path: from `resolved_models`.
            done: lines that are there, of all models and ranks.
            append: takes a batch's lines.

        Raises:
            UserError: a prompt does not fit the model, or a reward function fails.
        """
        ready = {(line["id"], line["sample"]) for line in done if line["model"] == name}
        units = [(i, s) for i, p in enumerate(self.prompts) for s in range(self.count) if (p.id, s) not in ready]
        if not units:
            return
        tokenizer = tokenizer_of(path, self.data)
        ids = self._encoded(name, path, tokenizer)
        units.sort(key=lambda unit: (len(ids[unit[0]]), unit))
        mine = units[rank() :: world_size()]  # neighbours in length go to different ranks: equal work
        model = loading.load_causal_lm(path, dtype=self.dtype).to(self.device).eval()
        stops = tuple(end_ids(tokenizer, model.generation_config, f"--model {name}"))
        self.rewards.load(self.device)
        decoding, size = self.decoding, self.decoding.per_device_generation_batch_size
        length = decoding.max_prompt_seq_len + decoding.max_answer_seq_len
        options = VllmOptions(decoding.vllm_python, path, path, self.dtype, size, length)
        # vLLM is started for each model anew, as they may be of different families
        backend = started_backend(decoding.rollout_engine, options, tokenizer, self.device, together=False)
        bar = progress_bar(len(mine), f"answers of {name}")
        for start in range(0, len(mine), size):
            batch = mine[start : start + size]
            request = self._request(name, [(ids[i], self.prompts[i].id, s) for i, s in batch], tokenizer, stops)
            rollout = backend.generate(model, request, self.sampling)
            texts, ended = response_texts(rollout, tokenizer), has_ended(rollout, request.stop_ids).tolist()
            lengths = rollout.response_mask.sum(1).tolist()
            asked = [self.prompts[i] for i, _ in batch]
            worth = self.rewards.of([p.messages for p in asked], texts, [p.row for p in asked], size)
            append(
                {"id": self.prompts[i].id, "model": name, "sample": s, "response": text, "tokens": tokens,
                 "finished": finished} | reward
                for (i, s), text, tokens, finished, reward in zip(batch, texts, lengths, ended, worth, strict=True)
            )  # fmt: skip
            bar.update(len(batch))
        bar.close()

    def _encoded(self, name: str, path: str, tokenizer: Any) -> list[list[int]]:
        """Every prompt's tokens in the model's own template."""
        ids = []
        for prompt in self.prompts:
            try:
                ids.append(render_many(tokenizer, [(prompt.messages, True)])[0].input_ids)
            except RowError as error:
                raise UserError(f"--model {name}: prompt {prompt.id} of {prompt.source}: {error}") from None
        longest, limit = max(map(len, ids)), max_positions(path)
        if limit is not None and longest + self.sampling.max_new_tokens > limit:
            raise UserError(
                f"--model {name} has positions for {limit} tokens, and a prompt has {longest} of its tokens: lower "
                "--max_prompt_seq_len or --max_answer_seq_len"
            )
        return ids

    def _request(
        self, name: str, rows: Sequence[tuple[list[int], str, int]], tokenizer: Any, stops: tuple[int, ...]
    ) -> RolloutRequest:
        """(prompt's tokens, its id, number of the answer) of each row as a request."""
        noise = [hashlib.sha256(f"{name}\0{prompt}\0{sample}".encode()).digest() for _, prompt, sample in rows]
        return RolloutRequest.of(
            [ids for ids, _, _ in rows],
            [int.from_bytes(n[:8]) >> 1 for n in noise],
            tokenizer.pad_token_id,
            self.device,
            seed=self.decoding.seed,
            iteration=0,
            stop_ids=stops,
        )

    def lines(self, answers: Sequence[Line], models: Sequence[str], best_of: int) -> tuple[list[Line], dict[str, Any]]:
        """The lines of the file, in the order of the prompts, and what is to be known of them.

        Args:
            answers: all that models have given, in any order.
            models: their names, in order.
            best_of: keep the best of each prompt as a row for step 1; else all.
        """
        by_prompt: dict[str, list[Line]] = {}
        for answer in sorted(answers, key=lambda a: (models.index(a["model"]), a["sample"])):
            by_prompt.setdefault(answer["id"], []).append(answer)
        found = [(prompt, by_prompt[prompt.id]) for prompt in self.prompts]
        result: dict[str, Any] = {"prompts": len(found), "answers": len(answers), **_about(answers, models)}
        if not best_of:
            return [_line(prompt, given) for prompt, given in found], result
        rows = [row for prompt, given in found if (row := _best(prompt, given))]
        left_out = len(found) - len(rows)
        told = (
            f"without an answer that ends within --max_answer_seq_len {self.sampling.max_new_tokens} and says something"
        )
        if not rows:
            raise UserError(f"all {left_out} prompts are {told}: allow longer ones, in another --output")
        if left_out:
            say(f"left out: {left_out} prompts {told}")
        return rows, result | {"left out": left_out, "chosen from": dict(Counter(row["model"] for row in rows))}


def _about(answers: Sequence[Line], models: Sequence[str]) -> dict[str, Any]:
    """Mean length, and the share of answers that ended, of each model."""
    told = {}
    for name in models:
        own = [answer for answer in answers if answer["model"] == name]
        told[name] = {
            "answers": len(own),
            "tokens": sum(a["tokens"] for a in own) / len(own),
            "finished": sum(a["finished"] for a in own) / len(own),
        }
        if "reward" in own[0]:
            told[name]["reward"] = sum(a["reward"] for a in own) / len(own)
    return {"models": told}


def _line(prompt: Prompt, given: Sequence[Line]) -> Line:
    answers = [{key: value for key, value in answer.items() if key not in ("id", "sample")} for answer in given]
    reference = {"reference": prompt.reference} if prompt.reference else {}
    line = {"id": prompt.id, "prompt": prompt.messages, "answers": answers, "source": prompt.source, **reference}
    return line | {"row": prompt.row}


def _best(prompt: Prompt, given: Sequence[Line]) -> Line | None:
    """The best answer as a row for step 1; None if none has ended: it would teach to stop in the middle."""
    whole = [answer for answer in given if answer["finished"] and answer["response"]]
    if not whole:
        return None
    best = max(whole, key=lambda answer: answer["reward"])
    turns = [*prompt.messages, {"role": "assistant", "content": best["response"]}]
    more: Line = {key: best[key] for key in ("reward", "rewards", "model") if key in best}
    return {"id": prompt.id, "messages": turns, **more, "source": prompt.source}
