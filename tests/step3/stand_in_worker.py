"""A worker as `training.utils.generation.vllm_worker` is one, which decodes with transformers: for tests.

It draws with the project's own random numbers, so a run with it equals a run with `fast`, and its log-probs are of the
distribution that it draws from, as vLLM's are.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path[0] = str(Path(__file__).resolve().parents[2])

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from torch import Tensor  # noqa: E402

from training.utils.generation import vllm_worker  # noqa: E402
from training.utils.generation.sampling import (  # noqa: E402
    SamplingConfig,
    next_tokens,
    penalise_repetition,
    truncate,
)

DIES_AT = int(os.environ.get("TRIPOD_STAND_IN_DIES_AT", "0"))  # which request it does not survive, 0 for none


class StandIn:
    """transformers in this process."""

    def __init__(self) -> None:
        self.model: Any = None
        self.requests = 0
        self.group = 1

    def hello(self, model: str, tokenizer: str, text: str) -> dict[str, Any]:
        """As vLLM's, of what transformers knows."""
        import transformers

        name = transformers.AutoConfig.from_pretrained(model).architectures[0]
        if not hasattr(transformers, name):
            return {"problem": f"it has no {name}"}
        read = transformers.AutoTokenizer.from_pretrained(tokenizer)
        return {"version": "stand-in", "tokens": read(text, add_special_tokens=False).input_ids}

    def start(self, options: dict[str, Any]) -> None:
        """Random weights, others than the model's own."""
        from transformers import AutoConfig, AutoModelForCausalLM

        if options["group"]:
            _, self.group = vllm_worker.join_group(options["group"])
            dist.init_process_group("gloo")
        torch.set_num_threads(1)
        torch.manual_seed(99)
        config = AutoConfig.from_pretrained(options["model"])
        self.model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, options["dtype"])).eval()
        print("the stand-in is ready", flush=True)

    def load(self, weights: Iterator[tuple[str, Tensor]]) -> None:
        """Every tensor must be known, and none be missing."""
        found = dict(weights)
        self.model.load_state_dict(found)  # tied weights under each of their names too

    def in_step(self, asked: Any) -> None:
        """Processes that hold a model together have a collective in every layer: all must be asked the same."""
        if self.group > 1:
            heard: list[Any] = [None] * self.group
            dist.all_gather_object(heard, asked)
            assert heard == [asked] * self.group, "asked differently"

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: dict[str, Any], moving: Any) -> Any:
        """A forward of the whole row for each token."""
        self.requests += 1
        if self.requests == DIES_AT:
            print("the stand-in dies here", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        self.in_step((prompts, seeds, sampling))
        stops = set(sampling.pop("stop_ids"))
        how, keys = SamplingConfig(**sampling), torch.tensor(seeds)
        ids: list[list[int]] = [[] for _ in prompts]
        logprobs: list[list[float]] = [[] for _ in prompts]
        for step in range(how.max_new_tokens):
            going = [row for row in range(len(prompts)) if not stops.intersection(ids[row][-1:])]
            if not going:
                break
            moving()
            seen, mask = padded([prompts[row] + ids[row] for row in going])
            logits = self.logits(seen, mask)[:, -1]
            tokens, _ = next_tokens(logits, keys[going], step, how, seen, mask)
            drawn = drawn_from(logits, how, seen, mask).gather(1, tokens[:, None])[:, 0]
            for row, token, value in zip(going, tokens.tolist(), drawn.tolist(), strict=True):
                ids[row].append(token)
                logprobs[row].append(value)
        return {"ids": ids, "logprobs": logprobs}

    @torch.no_grad()
    def logits(self, ids: Tensor, mask: Tensor) -> Tensor:
        """``[B, T, V]`` in fp32."""
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        return self.model(input_ids=ids, attention_mask=mask, position_ids=positions).logits.float()

    def score(self, rows: list[list[int]]) -> list[list[float]]:
        """Row by row."""
        self.in_step(rows)
        found = []
        for row in rows:
            ids = torch.tensor([row])
            log_probs = self.logits(ids, torch.ones_like(ids))[0, :-1].log_softmax(-1)
            found.append(log_probs.gather(1, ids[0, 1:, None])[:, 0].tolist())
        return found

    def sleep(self) -> None:
        """Nothing to give back."""


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Left-padded ids and their mask."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def drawn_from(logits: Tensor, how: SamplingConfig, seen: Tensor, mask: Tensor) -> Tensor:
    """Log-probs ``[B, V]`` of the distribution that a token is drawn from; of a greedy one at temperature 1."""
    scores = logits / (1.0 if how.greedy else how.temperature)
    if how.repetition_penalty != 1.0:
        penalise_repetition(scores, seen, mask, how.repetition_penalty)
    if not how.greedy:
        truncate(scores, how.top_k, how.top_p)
    return scores.log_softmax(-1)


if __name__ == "__main__":
    sys.exit(vllm_worker.serve(StandIn(), sys.argv[1:]))
