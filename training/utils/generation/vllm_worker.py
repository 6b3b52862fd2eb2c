"""vLLM in a process of its own, under an interpreter of its own: the far end of `training.utils.generation.vllm`.

A rank starts this file with the interpreter of ``--vllm_python``, which has vLLM (with other packages than ours) and
not this project: what is imported here is the standard library, torch and vLLM. The rank passes on one end of a pair
of sockets, a piece of shared memory without a name, and its own process number; all three end with it.

A message is its length in 8 bytes, then JSON. The rank asks, this process answers:

    hello     model, tokenizer, text        -> version, tokens; or problem, where the model can not be served here
    start     the engine's options, among them the place in a group, its size and its port where several of these
              processes hold the model together; all are then asked the same
                                            -> started
    weights   (nothing)                     then for each bucket, which lies in the shared memory:
              bucket, size                  -> taken; an empty bucket ends them -> loaded
    generate  prompts, seeds, sampling      -> ids, logprobs: of each row; before that `moving` from time to time
    score     rows                          -> logprobs: of each token of a row but its first
    sleep     (nothing)                     -> slept: memory is given back, weights are gone

An answer ``error`` ends this process: what it held is not known any more. Another engine that speaks this is served by
`serve`, see docs/architecture.md.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import mmap
import os
import signal
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules would hide libraries of the same names

import torch

MOVING_EVERY = 1.0  # seconds between two signs of life while tokens are decoded
LOOK_EVERY = 1.0  # seconds between two looks whether the rank still lives


class Channel:
    """Messages over a socket; both ends use it."""

    def __init__(self, end: socket.socket) -> None:
        self.end = end
        self._read = b""

    def send(self, message: dict[str, Any]) -> None:
        """Send one message."""
        text = json.dumps(message).encode()
        self.end.sendall(struct.pack("!Q", len(text)) + text)

    def receive(self, wait: float | None = None) -> dict[str, Any] | None:
        """The next message; None if none is complete after ``wait`` seconds (None: however long it takes).

        Raises:
            EOFError: the other end is closed.
        """
        self.end.settimeout(wait)
        try:
            while (size := self._size()) is None or len(self._read) < 8 + size:
                if not (more := self.end.recv(1 << 20)):
                    raise EOFError
                self._read += more
        except TimeoutError:
            return None
        except ConnectionError as error:
            raise EOFError from error
        finally:
            self.end.settimeout(None)
        text, self._read = self._read[8 : 8 + size], self._read[8 + size :]
        return dict(json.loads(text))

    def _size(self) -> int | None:
        return struct.unpack("!Q", self._read[:8])[0] if len(self._read) >= 8 else None


class SharedMemory:
    """Memory of a descriptor, grown by the rank, in which tensors lie one after the other."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def __len__(self) -> int:
        return self._bytes.numel()

    def resize(self, size: int, grow: bool = False) -> None:
        """Map ``size`` bytes; with ``grow`` the memory is made that large first."""
        if size == len(self):
            return
        if grow:
            os.ftruncate(self.descriptor, size)
        self._bytes = torch.frombuffer(mmap.mmap(self.descriptor, size), dtype=torch.uint8)

    def at(self, offset: int, size: int) -> torch.Tensor:
        """``size`` bytes from ``offset``, as they lie there."""
        return self._bytes[offset : offset + size]


def join_group(group: Sequence[int]) -> tuple[int, int]:
    """Say in the environment, as a launcher would, where the processes that hold a model together meet.

    Args:
        group: this process's place in it, its size, and a port of this machine.

    Returns:
        Place and size.
    """
    place, size, port = group
    told = {"RANK": place, "LOCAL_RANK": place, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "127.0.0.1"})
    return place, size


@contextlib.contextmanager
def own_shared_memory(group: Sequence[int]) -> Iterator[None]:
    """Inside, vLLM's processes of a group on a CPU name what they share by the group's port; after it, not at all.

    vLLM 0.32 names it alike in all groups that a launcher has started: two of a machine would meet in it, and none
    could start where a killed one has left its own.
    """
    from vllm.distributed.device_communicators.cpu_communicator import _CPUSHMDistributed as Shared

    place, _, port = group
    made, given = [], Shared.make_group_name

    def name_of(communicator: Any) -> str:
        """The name of what a group of ranks shares; each of them adds its place."""
        made.append(f"tripod-{port}-{given(communicator).strip('/-')}")
        return made[-1]

    Shared.make_group_name = staticmethod(name_of)
    try:
        yield
    finally:
        Shared.make_group_name = staticmethod(given)
        for name in made:  # all have mapped it: it ends with the processes, however they end
            Path(f"/dev/shm/{name}_{place}").unlink(missing_ok=True)


class VllmModel:
    """vLLM's engine in this process. `serve` asks any model for these methods; what they take is the messages'."""

    def __init__(self) -> None:
        self.engine: Any = None
        self.asleep = False
        self._requests = 0

    def hello(self, model: str, tokenizer: str, text: str) -> dict[str, Any]:
        """Whether this vLLM knows the model's architecture, and the tokens of a text as read here."""
        import vllm
        from transformers import AutoConfig, AutoTokenizer

        remote = {"trust_remote_code": os.environ.get("TRIPOD_TRUST_REMOTE_CODE") == "1"}
        try:
            names = AutoConfig.from_pretrained(model, **remote).architectures or []
            tokens = AutoTokenizer.from_pretrained(tokenizer, **remote)(text, add_special_tokens=False).input_ids
        except (OSError, ValueError, KeyError, ImportError) as error:
            return {"problem": f"it can not read {model}: {str(error).strip().splitlines()[0]}"}
        known = set(vllm.ModelRegistry.get_supported_archs())
        if not known.intersection(names):
            return {"problem": f"it has no {' or '.join(names) or 'architecture of this model'}"}
        return {"version": vllm.__version__, "tokens": list(tokens)}

    def start(self, options: dict[str, Any]) -> None:
        """Build the engine, with random weights: the rank's come before the first request."""
        on_cpu = options["device"] == "cpu"
        more: dict[str, Any] = {}
        place = 0
        if options["group"]:
            place, size = join_group(options["group"])
            more |= {"tensor_parallel_size": size, "distributed_executor_backend": "external_launcher"}
        if on_cpu:
            more["enforce_eager"] = True
            os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(-(-options["cache_bytes"] // (1 << 30)))
        else:
            free, total = torch.cuda.mem_get_info(place)
            more["kv_cache_memory_bytes"] = options["cache_bytes"]
            more["gpu_memory_utilization"] = 0.9 * free / total  # only so much is asked for; the cache's size is given
            more["enable_sleep_mode"] = True
        apart = own_shared_memory(options["group"]) if on_cpu and options["group"] else contextlib.nullcontext()
        with apart:
            llm = self._build(options, more)
        self.llm, self.engine = llm, llm.llm_engine

    def _build(self, options: dict[str, Any], more: dict[str, Any]) -> Any:
        from vllm import LLM

        return LLM(
            model=options["model"],
            dtype=options["dtype"],
            skip_tokenizer_init=True,
            load_format="dummy",
            max_model_len=options["length"],
            max_num_seqs=options["rows"],
            seed=0,
            logprobs_mode="processed_logprobs",
            generation_config="vllm",
            disable_log_stats=True,
            trust_remote_code=os.environ.get("TRIPOD_TRUST_REMOTE_CODE") == "1",
            **more,
        )

    def load(self, weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Put in weights under Hugging Face names; what was computed with others is forgotten."""
        if self.asleep:
            self.llm.wake_up(tags=["weights"])
        self.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights})
        if self.asleep:
            self.llm.wake_up(tags=["kv_cache"])
            self.asleep = False
        if self.llm.reset_prefix_cache() is False:
            raise RuntimeError("keys and values of the weights before could not be dropped")

    def _run(self, prompts: Sequence[list[int]], settings: Sequence[Any], moving: Any) -> list[Any]:
        """Outputs of all prompts, in order."""
        found: dict[str, Any] = {}
        names = [str(self._requests + i) for i in range(len(prompts))]
        self._requests += len(prompts)
        for name, prompt, setting in zip(names, prompts, settings, strict=True):
            self.engine.add_request(name, {"prompt_token_ids": prompt}, setting)
        while self.engine.has_unfinished_requests():
            found |= {output.request_id: output for output in self.engine.step() if output.finished}
            moving()
        return [found[name] for name in names]

    def generate(self, prompts: list[list[int]], seeds: list[int], sampling: dict[str, Any], moving: Any) -> Any:
        """Continue each prompt; greedy where the sampling says so, else each row by its own seed."""
        from vllm import SamplingParams

        greedy = sampling["greedy"]
        alike = {
            "temperature": 0.0 if greedy else sampling["temperature"],
            "top_p": 1.0 if greedy else sampling["top_p"],
            "top_k": 0 if greedy else sampling["top_k"],
            "repetition_penalty": sampling["repetition_penalty"],
            "max_tokens": sampling["max_new_tokens"],
            "stop_token_ids": sampling["stop_ids"],
            "ignore_eos": True,
            "logprobs": 0,
            "detokenize": False,
        }
        settings = [SamplingParams(seed=seed & (2**63 - 1), **alike) for seed in seeds]
        outputs = [output.outputs[0] for output in self._run(prompts, settings, moving)]
        ids = [list(output.token_ids) for output in outputs]
        steps = [zip(tokens, output.logprobs, strict=True) for tokens, output in zip(ids, outputs, strict=True)]
        return {"ids": ids, "logprobs": [[at[token].logprob for token, at in row] for row in steps]}

    def score(self, rows: list[list[int]]) -> list[list[float]]:
        """Log-probs of each row's tokens but the first."""
        from vllm import SamplingParams

        settings = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        outputs = self._run(rows, [settings] * len(rows), lambda: None)
        return [
            [at[token].logprob for token, at in zip(row[1:], output.prompt_logprobs[1:], strict=True)]
            for row, output in zip(rows, outputs, strict=True)
        ]

    def sleep(self) -> None:
        """Give memory back; on the CPU vLLM can not."""
        if torch.cuda.is_available():
            self.llm.sleep(level=2)  # the weights are dropped: the next come before the next request
            self.asleep = True


def bucket_tensors(channel: Channel, memory: SharedMemory) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that the rank sends, bucket by bucket; each tensor is a copy, as its bucket is filled again."""
    while (message := channel.receive()) is not None and message["bucket"]:
        memory.resize(message["size"])
        for name, dtype, shape, offset, size in message["bucket"]:
            yield name, memory.at(offset, size).clone().view(getattr(torch, dtype)).view(shape)
        channel.send({"taken": len(message["bucket"])})


def answer(model: Any, message: dict[str, Any], channel: Channel, memory: SharedMemory) -> dict[str, Any]:
    """What a message is answered with."""
    asked, told = message.pop("do"), 0.0

    def moving() -> None:
        """Tell the trainer now and then that work goes on, so that its time limit does not run out."""
        nonlocal told
        if time.monotonic() - told > MOVING_EVERY:
            told = time.monotonic()
            channel.send({"moving": True})

    if asked == "hello":
        return model.hello(**message)
    if asked == "start":
        model.start(message)
        return {"started": True}
    if asked == "weights":
        weights = bucket_tensors(channel, memory)
        model.load(weights)
        for _ in weights:  # what the model does not ask for is taken all the same
            pass
        return {"loaded": True}
    if asked == "generate":
        return dict(model.generate(**message, moving=moving))
    if asked == "score":
        return {"logprobs": model.score(**message)}
    if asked == "sleep":
        model.sleep()
        return {"slept": True}
    raise ValueError(f"what is {asked!r}?")


def _end_with(parent: int) -> None:
    """End this process when the rank has ended, whatever this process is doing."""
    while os.getppid() == parent:
        time.sleep(LOOK_EVERY)
    os._exit(0)


def serve(model: Any, arguments: Sequence[str]) -> int:
    """Answer messages until the rank has ended or closes its end; returns the exit code.

    Args:
        model: what answers.
        arguments: descriptors of the socket and of the shared memory, and the rank's process number.
    """
    descriptor, memory, parent = map(int, arguments)
    faulthandler.enable()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the rank decides when it stops: it may need these answers before
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    channel, shared = Channel(socket.socket(fileno=descriptor)), SharedMemory(memory)
    try:
        while (message := channel.receive()) is not None:
            channel.send(answer(model, message, channel, shared))
    except EOFError:
        return 0
    except Exception as error:
        traceback.print_exc()
        sys.stderr.flush()
        channel.send({"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"})
        return 1
    return 0


if __name__ == "__main__":
    code = serve(VllmModel(), sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)  # vLLM's own ending takes seconds, and nothing is left to be done
