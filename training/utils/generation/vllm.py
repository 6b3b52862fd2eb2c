"""The `vllm` backend: rollouts by vLLM, in a process beside each rank that holds weights of its own.

vLLM needs other packages than training does, so it runs under another interpreter (``--vllm_python``); that process is
`training.utils.generation.vllm_worker`. A round of rollouts begins with the weights: the policy's tensors go over under
their Hugging Face names, adapters merged and ZeRO-3's shards gathered on the way, through a bounded piece of shared
memory. Requests carry token ids, each row's own seed, the stop ids and the sampling settings; tokens and log-probs come
back.

Does it hold the weights it was sent? The log-probs of a fixed batch say so, after the first push and then every
`VERIFY_EVERY`-th. Does it still live? Its end closes the socket, and silence has a limit: either ends the run, on all
ranks together, with the last lines of its log.
"""

from __future__ import annotations

import os
import socket
import subprocess
import tempfile
import time
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.utils.errors import UserError, print_last
from training.utils.generation import vllm_worker
from training.utils.generation.engines import FastBackend
from training.utils.generation.requests import RolloutBatch, RolloutRequest, RolloutsLost, assemble
from training.utils.generation.sampling import SamplingConfig, row_keys
from training.utils.generation.vllm_python import WORKER, other_interpreter
from training.utils.memory.generation import cache_bytes
from training.utils.model.export import plain_weights, tied_names, unwrap
from training.utils.model.forward import without_adapters
from training.utils.model.loading import load_config
from training.utils.model.logprobs import response_log_probs
from training.utils.run.distributed import gather_objects, on_all_ranks, rank, say
from training.utils.run.processes import last_lines
from training.utils.run.watchdog import beat

BUCKET_BYTES = 64 << 20  # of weights in shared memory at a time; a larger tensor goes alone
START_LIMIT = 1800.0  # seconds for vLLM to import, to compile, to record its CUDA graphs
SILENCE = 300.0  # seconds without a sign of life after which it is given up
LOG_LINES = 8  # of its log, in the message of a run that ends because of it
VERIFY_EVERY = 16
VERIFIED_ROWS, VERIFIED_TOKENS = 4, 64
RESCORED_ROWS = 8  # in one forward
# Of |vLLM - trainer| in nats: largest in fp32, mean in 16 bit. Weights that did not arrive are off by whole nats.
MOST_DIFFERENCE = {"fp32": 1e-3, "bf16": 0.1, "fp16": 0.1}
BLOCK_TOKENS = 128  # of a sequence's keys and values; vLLM's own on CPUs, more than on GPUs
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_PROBE = "The quick brown fox: 12,345 + ünïcode\n  and two lines."


@dataclass(frozen=True)
class VllmOptions:
    """What a rank's vLLM is started with.

    Attributes:
        python: the interpreter that has it, from `training.utils.generation.vllm_python.find_vllm`.
        model, tokenizer: folders or hub names: configuration and tokenizer are read, no weights.
        dtype: of weights and cache.
        rows: decoded together at most. length: longest prompt plus response, in tokens.
        folder: where its log goes; None for a new temporary one.
    """

    python: str
    model: str
    tokenizer: str
    dtype: str
    rows: int
    length: int
    folder: Path | None = None


def cache_tokens(rows: int, length: int) -> int:
    """Tokens whose keys and values vLLM needs room for: rows at their full length, handed out in blocks."""
    return rows * (-(-length // BLOCK_TOKENS) + 1) * BLOCK_TOKENS


def _environment() -> dict[str, str]:
    """The worker's: of several GPUs it sees this rank's."""
    mine = other_interpreter() | {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # weights come from an iterator, which no process can be sent
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
    if torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", "0"))
        visible = [v for v in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if v]
        mine["CUDA_VISIBLE_DEVICES"] = visible[local] if visible else str(local)
    return mine


class Worker:
    """The process, from the rank's side; it ends with the last reference to this.

    Args:
        python: its interpreter.
        log: the file that its output goes to.
    """

    def __init__(self, python: str, log: Path) -> None:
        self.log = log
        script = os.environ.get(WORKER) or vllm_worker.__file__
        ours, theirs = socket.socketpair()
        descriptor = os.memfd_create("weights")
        with log.open("ab") as output, theirs:
            self.process = subprocess.Popen(
                [python, script, str(theirs.fileno()), str(descriptor), str(os.getpid())],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs.fileno(), descriptor),
                start_new_session=True,  # Ctrl-C is the rank's, which may need answers until its checkpoint is written
                env=_environment(),
            )
        self.channel, self.memory = vllm_worker.Channel(ours), vllm_worker.SharedMemory(descriptor)
        self.close = weakref.finalize(self, _end, self.process, ours, descriptor)

    def ask(self, message: dict[str, Any], limit: float = SILENCE, *, patient: bool = False) -> dict[str, Any]:
        """Send a message and wait for its answer.

        Args:
            message: see `training.utils.generation.vllm_worker`.
            limit: seconds without a sign of life.
            patient: tell the watchdog that this rank moves while it waits, up to the limit.

        Raises:
            RolloutsLost: it has ended, says that it failed, or is silent.
        """
        self._send(message)
        return self._receive(limit, patient)

    def _send(self, message: dict[str, Any]) -> None:
        try:
            self.channel.send(message)
        except OSError as error:
            raise self._lost(self._how_it_ended()) from error

    def _receive(self, limit: float = SILENCE, patient: bool = False) -> dict[str, Any]:
        heard = time.monotonic()
        while True:
            try:
                message = self.channel.receive(wait=1.0)
            except (EOFError, OSError) as error:
                raise self._lost(self._how_it_ended()) from error
            if message is None and time.monotonic() - heard > limit:
                raise self._lost(f"has not answered for {limit:.0f} s")
            if patient or message is not None:
                beat()
            if message is None:
                continue
            if "error" in message:
                raise self._lost(f"failed: {message['error']}")
            if "moving" not in message:
                return message
            heard = time.monotonic()

    def _how_it_ended(self) -> str:
        try:
            code = self.process.wait(timeout=5.0)
        except subprocess.TimeoutExpired:
            return "closed the connection"
        return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def _lost(self, what: str) -> RolloutsLost:
        self.close()
        lines = "\n".join(f"  | {line}" for line in last_lines(self.log, LOG_LINES))
        print_last(f"the last lines of {self.log}:\n{lines}")
        return RolloutsLost(f"vLLM (process {self.process.pid}) {what}; its log is {self.log}")

    def push(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Send weights, a bucket at a time.

        All of them are asked for, also when the process is lost on the way: at ZeRO-3 the other ranks take part.

        Raises:
            RolloutsLost: see `ask`.
        """
        lost: RolloutsLost | None = None
        bucket: list[list[Any]] = []
        offset = 0
        try:
            self._send({"do": "weights"})
        except RolloutsLost as error:
            lost = error
        for name, tensor in weights:
            beat()
            if lost is not None:
                continue
            size = tensor.numel() * tensor.element_size()
            try:
                if bucket and offset + size > BUCKET_BYTES:
                    self._send_bucket(bucket)
                    bucket, offset = [], 0
                self.memory.resize(max(len(self.memory), BUCKET_BYTES, size), grow=True)
                raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
                self.memory.at(offset, size).copy_(raw)
                bucket.append([name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), offset, size])
                offset += -(-size // 64) * 64  # tensors begin where any type may
            except RolloutsLost as error:
                lost = error
        if lost is not None:
            raise lost
        self._send_bucket(bucket)
        self.ask({"bucket": []})

    def _send_bucket(self, bucket: list[list[Any]]) -> None:
        self.ask({"bucket": bucket, "size": len(self.memory)})


def _end(process: subprocess.Popen, end: socket.socket, descriptor: int) -> None:
    """End the process, which holds nothing that is worth waiting for."""
    end.close()
    os.close(descriptor)
    process.kill()
    process.wait()


class VllmBackend:
    """Rollouts by a `Worker`; see `training.utils.generation.requests.RolloutBackend`.

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
        self.worker = Worker(options.python, folder / f"vllm-rank{rank()}.log")
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
        options = {k: v for k, v in asdict(self.options).items() if k not in ("python", "tokenizer", "folder")}
        message = {"do": "start", "device": device.type} | options
        tokens = cache_tokens(self.options.rows, self.options.length)
        room = cache_bytes(load_config(self.options.model), tokens, 4 if self.options.dtype == "fp32" else 2)
        message |= {"dtype": _DTYPES[self.options.dtype], "cache_bytes": room}
        self._on_all(lambda: self.worker.ask(message, START_LIMIT, patient=True))

    def _on_all(self, work: Any) -> Any:
        """Do something at which a worker may be lost; then it is on all ranks."""
        result, problem = None, ""
        try:
            result = work()
        except RolloutsLost as lost:
            problem = str(lost)
        if problems := [text for text in (gather_objects([problem]) if self.together else [problem]) if text]:
            raise RolloutsLost(problems[0])
        return result

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
        """See `RolloutBackend`. The noise hangs on each row's (seed, iteration, row id), as vLLM makes it.

        Args:
            model: engine or model, whose weights are taken if they are not those that were last.
            request, sampling: as of every backend.

        Raises:
            RolloutsLost: on every rank, where ranks work together.
        """
        if without_adapters(unwrap(model)).config.vocab_size != self._vocabulary:
            return self._decoded_here(model, request, sampling)
        if self._held is None or self._held() is not model:
            self.take(model)
        if self._to_verify:
            self._verify(model, request)
            self._to_verify = False
        found = self._on_all(lambda: self.worker.ask(_message(request, sampling)))
        rollout = _rollout(request, sampling, found)
        changed = sampling.top_p < 1 or sampling.top_k > 0 or sampling.repetition_penalty != 1
        if changed or (sampling.greedy and sampling.temperature != 1):  # vLLM's are of the distribution it drew from
            return _rescored(model, rollout, sampling.temperature)
        return rollout

    def _decoded_here(self, model: nn.Module, request: RolloutRequest, sampling: SamplingConfig) -> RolloutBatch:
        """A model with other embeddings, such as a base model to which step 1 has added tokens."""
        if not self._said:
            say("vLLM was started for another vocabulary than this model's: --rollout_engine fast decodes it")
            self._said = True
        return FastBackend().generate(model, request, sampling)

    def rest(self) -> None:
        """The round is over: weights may change, and training may have the memory."""
        self._held = None
        self._on_all(lambda: self.worker.ask({"do": "sleep"}))

    def _verify(self, model: nn.Module, request: RolloutRequest) -> None:
        """Hold log-probs of a fixed batch against the model's own.

        Raises:
            RolloutsLost: the weights that vLLM has are not the policy's.
        """
        if not self._fixed:
            rows = _prompts(request)[:VERIFIED_ROWS]
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


def _weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """`plain_weights`, tied ones under each of their names: vLLM on a CPU keeps a copy for each."""
    tied = tied_names(model)
    for name, tensor in plain_weights(model):
        for each in (name, *tied.get(name, ())):
            yield each, tensor


def _prompts(request: RolloutRequest) -> list[list[int]]:
    """The prompts' tokens, without their padding."""
    return [ids[mask.bool()].tolist() for ids, mask in zip(request.prompt_ids, request.prompt_mask, strict=True)]


def _message(request: RolloutRequest, sampling: SamplingConfig) -> dict[str, Any]:
    """What the worker is asked."""
    seeds = row_keys(request.seed, request.iteration, request.row_ids).tolist()
    how = asdict(sampling) | {"stop_ids": list(request.stop_ids)}
    return {"do": "generate", "prompts": _prompts(request), "seeds": seeds, "sampling": how}


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
