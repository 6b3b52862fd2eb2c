"""The `vllm` backend: rollouts by vLLM, in a process beside each rank that holds weights of its own.

vLLM needs other packages than training does, so it runs under another interpreter (``--vllm_python``); that process is
`training.utils.generation.vllm_worker`. A round of rollouts begins with the weights: the policy's tensors go over under
their Hugging Face names, adapters merged and ZeRO-3's shards gathered on the way, through a bounded piece of shared
memory. Requests carry token ids, each row's own seed, the stop ids and the sampling settings; tokens and log-probs come
back.

With ``--vllm_tensor_parallel`` neighbouring ranks' processes hold the model together, a part of every layer each.
Every rank still sends its process all weights, of which vLLM keeps that process's part; and all processes of a group
are asked the same, the rows of all its ranks, which keeps them in step (vLLM's "external launcher").

Does it hold the weights it was sent? The log-probs of a fixed batch say so, after the first push and then every
`VERIFY_EVERY`-th. Does it still live? Its end closes the socket, and silence has a limit: either ends the run, on all
ranks together, with the last lines of its log.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.utils.errors import UserError
from training.utils.generation.engines import FastBackend, rollout_backend
from training.utils.generation.rollouts import RolloutBackend, RolloutBatch, RolloutRequest, RolloutsLost, assemble
from training.utils.generation.sampling import SamplingConfig, row_keys
from training.utils.generation.vllm_process import Worker
from training.utils.generation.vllm_python import find_vllm
from training.utils.memory.generation import cache_bytes, cache_share, key_heads
from training.utils.model.export import plain_weights, tied_names, unwrap
from training.utils.model.forward import response_log_probs, without_adapters
from training.utils.model.loading import load_config
from training.utils.run.distributed import gather_objects, on_all_ranks, rank, say, world_size
from training.utils.run.phases import beat
from training.utils.run.processes import unused_port
from training.utils.run.runtime import local_ranks

START_LIMIT = 1800.0  # seconds for vLLM to import, to compile, to record its CUDA graphs
VERIFY_EVERY = 16
VERIFIED_ROWS, VERIFIED_TOKENS = 4, 64
RESCORED_ROWS = 8  # in one forward
# Of |vLLM - trainer| in nats: largest in fp32, mean in 16 bit. Weights that did not arrive are off by whole nats.
MOST_DIFFERENCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}
BLOCK_TOKENS = 128  # of a sequence's keys and values; vLLM's own on CPUs, more than on GPUs
MLP_WIDTHS = ("intermediate_size", "moe_intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")  # configs' names
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_PROBE = "The quick brown fox: 12,345 + ünïcode\n  and two lines."


@dataclass(frozen=True)
class VllmOptions:
    """What a rank's vLLM is started with.

    Attributes:
        python: the interpreter that has it, from `training.utils.generation.vllm_python.find_vllm`.
        model, tokenizer: folders or hub names: configuration and tokenizer are read, no weights.
        dtype: of weights and cache.
        rows: decoded together at most, of each rank. length: longest prompt plus response, in tokens.
        folder: where its log goes; None for a new temporary one.
        ranks: neighbours whose processes hold the model together.
    """

    python: str
    model: str
    tokenizer: str
    dtype: str
    rows: int
    length: int
    folder: Path | None = None
    ranks: int = 1


def cache_tokens(rows: int, length: int) -> int:
    """Tokens whose keys and values vLLM needs room for: rows at their full length, handed out in blocks."""
    return rows * (-(-length // BLOCK_TOKENS) + 1) * BLOCK_TOKENS


def cache_room(config: Any, options: VllmOptions) -> int:
    """Bytes of the keys and values that one process holds: of its heads, which are whole ones, for all ranks' rows."""
    tokens = cache_tokens(options.rows * options.ranks, options.length)
    return cache_share(cache_bytes(config, tokens, 4 if options.dtype == "fp32" else 2), options.ranks, config)


def awake_bytes(weights: int, options: VllmOptions) -> int:
    """Bytes of an accelerator that one process takes while it decodes a model of ``weights`` bytes."""
    return weights // options.ranks + cache_room(load_config(options.model), options)


def check_division(ranks: int, model: str) -> None:
    """Refuse processes that can not hold a model together.

    Args:
        ranks: ``--vllm_tensor_parallel``.
        model: folder or hub name.

    Raises:
        UserError: they do not divide the ranks, a host's ranks or the model's layers.
    """
    if ranks == 1:
        return
    name = f"--vllm_tensor_parallel {ranks}"
    for count, what in ((world_size(), "ranks"), (local_ranks(), "ranks of this machine, which a model may not leave")):
        if count % ranks:
            raise UserError(f"{name} does not divide the {count} {what}")
    config = load_config(model)
    text = config.get_text_config()
    if not getattr(text, "num_attention_heads", 0):
        raise UserError(f"{name} divides attention heads, and {model} ({text.model_type}) has none")
    heads, keys = text.num_attention_heads, key_heads(config)
    if heads % ranks or (keys % ranks and ranks % keys):  # of fewer heads than processes each has one
        raise UserError(f"{name} does not divide the {heads} attention and {keys} key-value heads of {model}")
    for kind in MLP_WIDTHS:
        width = getattr(text, kind, None)
        if isinstance(width, int) and width % ranks:
            raise UserError(f"{name} does not divide the {width} units of an MLP of {model} ({kind})")


class VllmBackend:
    """Rollouts by a `Worker`; see `training.utils.generation.rollouts.RolloutBackend`.

    It is started in two parts: built, it has found out whether vLLM knows the model, before any weight is loaded;
    `start` takes the memory, when all roles hold theirs.

    Args:
        options: what it is started with.
        tokenizer: the run's, which vLLM's packages must read alike.
        together: all ranks call alike, so what one has lost ends all; else each rank works for itself.

    Raises:
        UserError: this vLLM can not serve the model, or reads its tokenizer differently.
    """

    def __init__(self, options: VllmOptions, tokenizer: Any, *, together: bool = True) -> None:
        self.options = options
        self.together = together
        self.pushes = 0
        self._held: Any = None  # a weak reference: a model that was loaded to be asked may go
        self._said = self._to_verify = False
        self._vocabulary = load_config(options.model).get_text_config().vocab_size
        self._fixed: list[list[int]] = []
        folder = options.folder or Path(tempfile.mkdtemp(prefix="vllm-"))
        self.worker = Worker(options.python, folder / f"vllm-rank{rank()}.log", options.ranks)
        version = on_all_ranks(lambda: self._hello(tokenizer)) if together else self._hello(tokenizer)
        say(f"{version} decodes, in a process of its own whose output goes to {self.worker.log}")

    def _hello(self, tokenizer: Any) -> str:
        asked = {"model": self.options.model, "tokenizer": self.options.tokenizer, "text": _PROBE}
        try:
            found = self.worker.ask({"do": "hello"} | asked, START_LIMIT, patient=True)
        except RolloutsLost as lost:
            raise UserError(f"--rollout_engine vllm does not start: {lost}") from lost
        name = f"vLLM of {self.options.python}"
        if problem := found.get("problem"):
            raise UserError(f"--rollout_engine vllm: {name} can not serve this model: {problem}")
        if found["tokens"] != list(tokenizer(_PROBE, add_special_tokens=False).input_ids):
            raise UserError(f"--rollout_engine vllm: {name} has another tokenizer than {self.options.tokenizer} here: "
                            "the same text gives other tokens")  # fmt: skip
        return f"vLLM {found['version']}"

    def start(self, device: torch.device) -> None:
        """Build vLLM's engine on this rank's device; a collective where ranks work together."""
        if device.type == "cpu":
            say("on a CPU vLLM is no faster than --rollout_engine fast")
        options, config = self.options, load_config(self.options.model)
        message = {
            "do": "start",
            "device": device.type,
            "model": options.model,
            "dtype": _DTYPES[options.dtype],
            "rows": options.rows * options.ranks,
            "length": options.length,
            "cache_bytes": cache_room(config, options),
            "group": self._group(),
        }
        self._on_all(lambda: self.worker.ask(message, START_LIMIT, patient=True))

    def _group(self) -> list[int] | None:
        """This process's place in its group, the group's size, and the port where it meets."""
        place, size = rank() % self.options.ranks, self.options.ranks
        return [place, size, gather_objects([unused_port()])[rank() - place]] if size > 1 else None

    def _of_group(self, rows: list[Any], alike: Any = None) -> tuple[list[Any], slice]:
        """The rows of all ranks of the group, and which of them are this rank's; a collective where it has several.

        Args:
            rows: of this rank.
            alike: what must be the same on all of them, as their processes work in step.
        """
        if self.options.ranks == 1:
            return rows, slice(0, len(rows))
        place = rank() % self.options.ranks
        group = gather_objects([(rows, alike)])[rank() - place :][: self.options.ranks]
        if any(other != alike for _, other in group):
            raise ValueError(f"ranks that share a vLLM ask differently: {[other for _, other in group]}")
        start = sum(len(others) for others, _ in group[:place])
        return [row for others, _ in group for row in others], slice(start, start + len(rows))

    def _on_all(self, work: Any) -> Any:
        """Do something at which a worker may be lost; then it is on all ranks."""
        try:
            return on_all_ranks(work) if self.together else work()
        except UserError as lost:  # of another rank, perhaps
            raise RolloutsLost(str(lost)) from None

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Push an engine's or a model's weights as they are now; a collective at ZeRO-3 and where ranks work together.

        Raises:
            RolloutsLost: see `generate`.
        """
        self._on_all(lambda: self.worker.push(_weights(model)))
        self._held = weakref.ref(model)
        self.pushes += 1
        self._to_verify = self._to_verify or self.pushes % VERIFY_EVERY == 1

    @torch.no_grad()
    def generate(self, model: nn.Module, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """See `RolloutBackend`. The noise depends on each row's (seed, iteration, row id), as vLLM makes it.

        Args:
            model: engine or model, whose weights are taken if they are not those that were last.
            request, sampling: as of every backend.

        Raises:
            RolloutsLost: on every rank, where ranks work together.
        """
        if without_adapters(unwrap(model)).config.vocab_size != self._vocabulary:  # as where step 1 has added tokens
            if not self._said:
                say("vLLM was started for another vocabulary than this model's: --rollout_engine fast decodes it")
                self._said = True
            return FastBackend().generate(model, request, sampling)
        if self._held is None or self._held() is not model:
            self.take(model)
        if self._to_verify:
            self._verify(model, request)
            self._to_verify = False
        how = asdict(sampling) | {"stop_ids": list(request.stop_ids)}
        seeds = row_keys(request.seed, request.iteration, request.row_ids).tolist()
        rows, mine = self._of_group(list(zip(_prompts(request), seeds, strict=True)), how)
        asked = {"prompts": [prompt for prompt, _ in rows], "seeds": [seed for _, seed in rows], "sampling": how}
        answers = self._on_all(lambda: self.worker.ask({"do": "generate"} | asked))
        found = {name: answers[name][mine] for name in ("ids", "logprobs")}
        rollout = _rollout(request, sampling, found)
        changed = sampling.top_p < 1 or sampling.top_k > 0 or sampling.repetition_penalty != 1
        if changed or (sampling.greedy and sampling.temperature != 1):  # vLLM's are of the distribution it drew from
            return _rescored(model, rollout, sampling.temperature)
        return rollout

    def rest(self) -> None:
        """The round is over: weights may change, and training may have the memory; nothing if it rests already."""
        if self._held is None:
            return
        self._held = None
        self._on_all(lambda: self.worker.ask({"do": "sleep"}))

    def _verify(self, model: nn.Module, request: RolloutRequest) -> None:
        """Hold log-probs of a fixed batch against the model's own.

        Raises:
            RolloutsLost: the weights that vLLM has are not the policy's.
        """
        if not self._fixed:
            rows = self._of_group(_prompts(request))[0][:VERIFIED_ROWS]
            self._fixed = [(row if len(row) > 1 else row * 2)[:VERIFIED_TOKENS] for row in rows]
        device = request.prompt_ids.device
        width = max(map(len, self._fixed))
        ids = torch.tensor([row + [0] * (width - len(row)) for row in self._fixed], device=device)
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in self._fixed], device=device)
        own, _ = response_log_probs(model, ids, mask, mask)

        def compare() -> None:
            """Ask this rank's vLLM, and hold its answer against ``own``."""
            found = self.worker.ask({"do": "score", "rows": self._fixed})["logprobs"]
            theirs = torch.tensor([value for row in found for value in row])
            difference = (theirs - own[:, 1:][mask[:, 1:].bool()].cpu()).abs()
            off = difference.max() if self.options.dtype == "fp32" else difference.mean()
            if not off <= MOST_DIFFERENCE[self.options.dtype]:  # NaN is off too
                raise RolloutsLost(
                    f"vLLM does not hold the policy's weights: after push {self.pushes} its log-probs of "
                    f"{len(theirs)} tokens differ by {off:.2e} (allowed in {self.options.dtype}: "
                    f"{MOST_DIFFERENCE[self.options.dtype]})"
                )

        self._on_all(compare)


def started_backend(
    name: str, options: VllmOptions, tokenizer: Any, device: torch.device, *, together: bool = True
) -> RolloutBackend:
    """The backend of a program that trains nothing, ready to decode.

    Args:
        name: ``hf``, ``fast`` or ``vllm``.
        options: of vLLM; ``python`` as the flag ``--vllm_python`` has it.
        tokenizer, together: see `VllmBackend`.
        device: this rank's.

    Raises:
        UserError: no vLLM there, or one that can not serve the model.
    """
    if name != "vllm":
        return rollout_backend(name)
    backend = VllmBackend(replace(options, python=find_vllm(options.python)), tokenizer, together=together)
    backend.start(device)
    return backend


def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """`plain_weights`, tied ones under each of their names: vLLM on a CPU keeps a copy for each."""
    tied = tied_names(model)
    for name, tensor in plain_weights(model):
        for each in (name, *tied.get(name, ())):
            yield each, tensor


def _prompts(request: RolloutRequest) -> list[list[int]]:
    """The prompts' tokens, without their padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(request.prompt_ids, request.prompt_mask, strict=True)]


def _rollout(request: RolloutRequest, sampling: SamplingConfig, found: dict[str, Any]) -> RolloutBatch:
    """The worker's answer in the common layout; a response ends with its first stop token."""
    rows, limit, device = len(request.prompt_ids), sampling.max_new_tokens, request.prompt_ids.device
    ids = torch.full((rows, limit), request.pad_id, dtype=torch.long)
    logprobs, lengths = torch.zeros(rows, limit), torch.zeros(rows, dtype=torch.long)
    for row, (tokens, values) in enumerate(zip(found["ids"], found["logprobs"], strict=True)):
        end = next((i + 1 for i, token in enumerate(tokens) if token in request.stop_ids), len(tokens))
        ids[row, :end], logprobs[row, :end] = torch.tensor(tokens[:end]), torch.tensor(values[:end])
        lengths[row] = end
    return assemble(request, ids.to(device), lengths.to(device), logprobs.to(device), 0.0)


def _rescored(model: nn.Module, rollout: RolloutBatch, temperature: float) -> RolloutBatch:
    """The rollout with log-probs of the untruncated policy at its temperature, by the model's own forward."""
    start, parts = rollout.response_start, []
    whole = torch.cat([torch.zeros_like(rollout.input_ids[:, :start], dtype=torch.bool), rollout.response_mask], 1)
    for at in range(0, len(whole), RESCORED_ROWS):
        piece = slice(at, at + RESCORED_ROWS)
        beat()
        inputs = rollout.input_ids[piece], rollout.attention_mask[piece], whole[piece]
        parts.append(response_log_probs(model, *inputs, temperature=temperature)[0][:, start:])
    return replace(rollout, logprobs=torch.cat(parts))
