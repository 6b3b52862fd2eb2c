"""What `benchmarks/gpu_check.py` measures: each function is a stage, run in a process of its own, and returns figures.

Models are OPT-1.3B and OPT-350M by their shapes, with weights drawn at random: speed and memory do not depend on what a
model says, and no hub is needed. Replies are 256 tokens long because nothing ends them, as in DeepSpeed-Chat's own
benchmark.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar
from xml.etree import ElementTree

import rollout as rollouts
import torch
from common import ROOT
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, OPTConfig, PreTrainedTokenizerFast

from training.step2_reward_model_finetuning.pairs import score_pairs
from training.step2_reward_model_finetuning.preference import bradley_terry_loss
from training.step3_rlhf_finetuning.arguments import (
    OptimizationArguments,
    PPOArguments,
    RoleArguments,
    RoleZeroArguments,
    RolloutArguments,
)
from training.step3_rlhf_finetuning.experience import Scoring
from training.step3_rlhf_finetuning.ppo_trainer import PPOTrainer
from training.step3_rlhf_finetuning.prompts import PromptSet
from training.step3_rlhf_finetuning.roles import Build, RewardModelSettings, build_actor, build_roles
from training.utils.data.batches import SIDES
from training.utils.engine import engine as engines
from training.utils.engine.frozen import load_frozen_causal_lm
from training.utils.engine.precision import for_device
from training.utils.engine.states import resting_bytes, states_on_host
from training.utils.engine.zero_config import DTYPES, deepspeed_config
from training.utils.errors import UserError
from training.utils.generation.engines import FastBackend, HfBackend
from training.utils.generation.rollouts import RolloutRequest
from training.utils.generation.sampling import SamplingConfig
from training.utils.model import classifiers, loading
from training.utils.model.forward import TokenScorer, response_log_probs
from training.utils.model.language_modelling import negative_log_likelihood
from training.utils.model.reward_stats import RewardStats
from training.utils.run.distributed import init_distributed
from training.utils.run.folders import python_path
from training.utils.run.phases import Phases
from training.utils.run.runtime import available_cores

T = TypeVar("T")
NO_GRAPHS = "fast without graphs"
FLAGS = (RoleArguments, OptimizationArguments, RoleZeroArguments, PPOArguments, RolloutArguments)  # of step 3
PAD, FIRST_ID = 1, 10  # OPT's pad; prompts are drawn from the ids above those that mean something


@dataclass(frozen=True)
class Sizes:
    """How much a check does.

    Attributes:
        actor, reward: OPT's shapes.
        prompt, response: tokens.
        rows: answers of an iteration, decoded together, and rows of steps 1 and 2.
        micro_batch: rows of a backward.
        steps: measured, after one that is not.
        tests: what pytest takes beside the folder.
    """

    actor: dict[str, int]
    reward: dict[str, int]
    prompt: int
    response: int
    rows: int
    micro_batch: int
    steps: int
    tests: tuple[str, ...]


_OPT_1B3 = {"hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "ffn_dim": 8192}
_POST_NORM = {"word_embed_proj_dim": 512, "do_layer_norm_before": False}
_OPT_350M = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "ffn_dim": 4096} | _POST_NORM
_TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "ffn_dim": 64, "vocab_size": 512}
FULL = Sizes(_OPT_1B3, _OPT_350M, prompt=256, response=256, rows=64, micro_batch=8, steps=3, tests=("-m", "gpu"))
TINY = Sizes(
    _TINY, _TINY | _POST_NORM | {"word_embed_proj_dim": 16}, prompt=12, response=8, rows=4, micro_batch=2, steps=1,
    tests=("-m", "not gpu", "-k", "products or segments or phases"),
)  # fmt: skip


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, with OPT's ids of the special tokens: data for the steps' programs without a download."""
    special = ["<s>", "<pad>", "</s>", "<unk>"]
    alphabet = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = dict(zip(("bos_token", "pad_token", "eos_token", "unk_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def save_model(shape: dict[str, int], folder: Path, dtype: str, device: torch.device) -> str:
    """A random OPT of that shape with a tokenizer, made on the device, where that is quick."""
    if not (folder / "config.json").is_file():
        config = OPTConfig(**({"vocab_size": 50272, "word_embed_proj_dim": shape["hidden_size"]} | shape))
        torch.manual_seed(0)
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
        model.save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
    return str(folder)


class Bench:
    """One stage's device, precision and models.

    Args:
        sizes: how much.
        folder: where models are kept from stage to stage.
    """

    def __init__(self, sizes: Sizes, folder: Path) -> None:
        self.sizes, self.folder = sizes, folder
        self.device = init_distributed()
        self.dtype, _ = for_device("auto", self.device)

    def actor(self) -> str:
        """Folder of the large model."""
        return save_model(self.sizes.actor, self.folder / "actor", self.dtype, self.device)

    def reward(self) -> str:
        """Folder of the small one, as a reward model with statistics."""
        path = self.folder / "reward"
        if not path.is_dir():
            plain = save_model(self.sizes.reward, self.folder / "small", self.dtype, self.device)
            model = classifiers.load_classifier(plain, dtype=self.dtype, pad_token_id=PAD, fresh_head_seed=0)
            model.save_pretrained(path)
            byte_tokenizer().save_pretrained(path)
            RewardStats(0.0, 1.0, 100, self.dtype).write(path)
        return str(path)

    def ids(self, rows: int, length: int, seed: int = 0) -> torch.Tensor:
        """Random tokens ``[rows, length]`` on the device."""
        generator = torch.Generator().manual_seed(seed)
        vocabulary = self.sizes.actor.get("vocab_size", 50272)
        return torch.randint(FIRST_ID, vocabulary, (rows, length), generator=generator).to(self.device)

    def request(self, number: int, stop_ids: tuple[int, ...] = ()) -> RolloutRequest:
        """Prompts of one length; without ``stop_ids`` every answer has the longest length."""
        ids = self.ids(self.sizes.rows, self.sizes.prompt, number)
        rows = torch.arange(len(ids), device=self.device) + number * len(ids)
        return RolloutRequest(ids, torch.ones_like(ids), rows, 0, number, stop_ids, PAD)

    def timed(self, work: Callable[[], T]) -> tuple[T, float]:
        """What a call returns, and its seconds until the device has done it."""
        self.wait()
        started = time.perf_counter()
        result = work()
        self.wait()
        return result, time.perf_counter() - started

    def wait(self) -> None:
        """Until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def peak_gib(self) -> float:
        """The most that tensors held on the GPU in this process so far; 0 on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.device.type == "cuda" else 0.0


def tests(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """The tests marked gpu; on a CPU a few of their twins."""
    report = folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--junitxml={report}", "tests/gpu"]
    if find_spec("xdist"):  # a tiny model leaves a GPU idle, and most of a test is its own processor's work
        command += ["-n", str(max(2, min(8, available_cores() // 2)))]
    done = subprocess.run(
        [*command, *sizes.tests], cwd=ROOT, env=os.environ | {"PYTHONPATH": python_path()}, check=False
    )
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    counts = {name: int(suite.get(name, "0")) for name in ("tests", "failures", "errors", "skipped")}
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    failed = [case.get("name") for case in suite.iter("testcase") if case.find("failure") is not None]
    figures = counts | {"failed": failed, "pytest": done.returncode}
    if done.returncode or not counts["passed"]:
        raise StageFailed(f"{counts['failures'] + counts['errors']} failed, {counts['passed']} passed", figures)
    return figures


class StageFailed(UserError):
    """A stage that found something wrong, with the figures that it has nevertheless."""

    def __init__(self, text: str, figures: dict[str, Any]) -> None:
        super().__init__(text)
        self.figures = figures


def rollout(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """`fast`, with CUDA graphs and without, against `hf`: answers of one length, and of lengths that differ."""
    bench = Bench(sizes, folder)
    model = loading.load_causal_lm(bench.actor(), dtype=bench.dtype).eval().to(bench.device)
    compared: dict[str, rollouts.Engine] = {
        "hf": functools.partial(HfBackend().generate, model),
        "fast": functools.partial(FastBackend().generate, model),
        NO_GRAPHS: functools.partial(FastBackend(graphs=False).generate, model),
    }
    vocabulary = sizes.actor.get("vocab_size", 50272)
    often = tuple(range(FIRST_ID, vocabulary, max(2, sizes.response * 2 // 5)))  # a mean length of two fifths
    bounds = rollouts.machine_bounds(DTYPES[bench.dtype], bench.device)
    weights = sum(parameter.nbytes for parameter in model.parameters())
    parameters = sum(parameter.numel() for parameter in model.parameters())
    figures: dict[str, Any] = {"bandwidth": bounds[0], "operations": bounds[1], "dtype": bench.dtype}
    figures["rows"] = sizes.rows
    for name, stops in {"one length": (), "mixed lengths": often}.items():
        request = bench.request(0, stops)
        measured = rollouts.measure(compared, request, SamplingConfig(sizes.response), sizes.steps, time.perf_counter)
        rows = rollouts.summarise(measured, request, weights, parameters, bounds)
        figures[name] = [{k: v for k, v in row.items() if k != "lengths"} for row in rows]
    return figures | {"peak_gib": bench.peak_gib()}


def _engine(model: Any, bench: Bench) -> Any:
    config = deepspeed_config(zero_stage=0, dtype=bench.dtype, micro_batch_size=bench.sizes.micro_batch)
    rates: dict[str, Any] = {"learning_rate": 1e-5, "weight_decay": 0.0, "num_warmup_steps": 0, "total_steps": 100}
    return engines.initialize_engine(model.to(bench.device), config, **rates)


def _train(bench: Bench, engine: Any, loss: Callable[[int], torch.Tensor], count: float) -> list[float]:
    """Seconds of each optimizer step, the first one left out; ``loss(i)`` is micro-batch i's sum."""
    engine.train()

    def step() -> None:
        for start in range(0, bench.sizes.rows, bench.sizes.micro_batch):
            engines.backward(engine, loss(start), count)
        engines.optimizer_step(engine)

    return [bench.timed(step)[1] for _ in range(1 + bench.sizes.steps)][1:]


def step1(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Supervised fine-tuning: tokens per second, all weights, loss on the response half."""
    bench, length = Bench(sizes, folder), sizes.prompt + sizes.response
    engine = _engine(loading.load_causal_lm(bench.actor(), dtype=bench.dtype), bench)
    ids = bench.ids(sizes.rows, length)
    mask = torch.ones_like(ids)
    answer = mask.clone()
    answer[:, : sizes.prompt] = 0

    def loss(start: int) -> torch.Tensor:
        """The summed loss of the micro-batch of rows that begins there."""
        rows = slice(start, start + sizes.micro_batch)
        batch = {"input_ids": ids[rows], "attention_mask": mask[rows], "response_mask": answer[rows]}
        return negative_log_likelihood(engine, batch)

    seconds = _train(bench, engine, loss, float(answer.sum()))
    speed = [sizes.rows * length / taken for taken in seconds]
    return {"dtype": bench.dtype, "seconds": seconds, "tokens_per_second": speed, "peak_gib": bench.peak_gib()}


def step2(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """The reward model: pairs per second, all weights."""
    bench, length = Bench(sizes, folder), sizes.prompt + sizes.response
    model = classifiers.load_classifier(bench.reward(), dtype=bench.dtype, pad_token_id=PAD)
    engine = _engine(TokenScorer(model), bench)
    prompts = bench.ids(sizes.rows, sizes.prompt).repeat(2, 1)
    ids = torch.cat([prompts, bench.ids(2 * sizes.rows, sizes.response, 1)], dim=1)
    mask = torch.ones_like(ids)
    answer = mask.clone()
    answer[:, : sizes.prompt] = 0

    def loss(start: int) -> torch.Tensor:
        """The summed loss of the micro-batch of pairs that begins there."""
        rows = torch.arange(start, start + sizes.micro_batch, device=ids.device)
        both = torch.cat([rows, rows + sizes.rows])
        batch = {"input_ids": ids[both], "attention_mask": mask[both], "response_mask": answer[both]}
        batch |= dict(zip(SIDES, torch.arange(2 * sizes.micro_batch, device=ids.device).chunk(2), strict=True))
        return bradley_terry_loss(*score_pairs(engine, batch), "log_sig").sum()

    seconds = _train(bench, engine, loss, float(sizes.rows))
    speed = [sizes.rows / taken for taken in seconds]
    figures = {"dtype": bench.dtype, "seconds": seconds, "pairs_per_second": speed, "tokens_per_pair": 2 * length}
    return figures | {"peak_gib": bench.peak_gib()}


def _groups(bench: Bench, **flags: Any) -> list[Any]:
    """Step 3's flags by their groups, see `FLAGS`; all weights train at ZeRO-0 unless ``flags`` say otherwise."""
    values: dict[str, Any] = {
        "dtype": bench.dtype,
        "per_device_generation_batch_size": bench.sizes.rows,
        "per_device_training_batch_size": bench.sizes.micro_batch,
        "gradient_accumulation_steps": bench.sizes.rows // bench.sizes.micro_batch,
        "missing_eos_penalty": 0.0,
        "actor_learning_rate": 1e-7,
        "critic_learning_rate": 1e-7,
    } | flags
    return [group(**{f.name: values[f.name] for f in dataclasses.fields(group) if f.name in values}) for group in FLAGS]


def _build(bench: Bench, groups: Sequence[Any], shares: bool = False) -> Build:
    role, train, zero, *_ = groups
    return Build(role, train, zero, {}, 100, PAD, bench.device, shares)


def _trainer(bench: Bench, critic: bool, shares: bool = False, **flags: Any) -> PPOTrainer:
    groups = _groups(bench, **flags)
    reward = RewardModelSettings(bench.reward(), RewardStats(0.0, 1.0, 100, bench.dtype), 1.0, reads_text=False)
    roles = build_roles(bench.actor(), reward, {}, _build(bench, groups, shares), critic=critic)
    prompts = PromptSet(None, None, (), 0)  # the reward reads tokens alone
    scoring = Scoring(roles, prompts, groups[3], groups[4], groups[1])
    return PPOTrainer(roles, scoring, FastBackend(), SamplingConfig(bench.sizes.response), bench.dtype, Phases())


def step3(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """An iteration of PPO with all five models: answers per second, and where the time goes."""
    bench = Bench(sizes, folder)
    trainer = _trainer(bench, critic=True)
    records, seconds = [], []
    for number in range(1 + sizes.steps):
        metrics, taken = bench.timed(functools.partial(trainer.iteration, [bench.request(number)], number))
        seconds.append(taken)
        records.append({name: v for name, v in metrics.items() if name.split("/")[0] in ("time", "rollout", "policy")})
    assert records[0]["rollout/tokens"] == sizes.rows * sizes.response, "an answer ended before its length"
    speed = [sizes.rows / taken for taken in seconds[1:]]
    figures = {"dtype": bench.dtype, "seconds": seconds[1:], "answers_per_second": speed}
    return figures | {"records": records, "phases": trainer.phases.summary()}


def shared(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """Leave-one-out with several answers to a prompt: scoring and training with the answers behind it, and apart.

    At the check's lengths, and with prompts three times as long and answers half as long.
    """
    bench, samples = Bench(sizes, folder), min(8, sizes.rows)
    flags: dict[str, Any] = {"advantage": "rloo", "samples_per_prompt": samples}
    ways = {"together": True, "apart": False}
    trainers = {name: _trainer(bench, critic=False, shares=shares, **flags) for name, shares in ways.items()}
    assert trainers["together"].roles.actor.sharing is not None, "this family's answers can share their prompt"
    lengths = []
    for prompt, response in ((sizes.prompt, sizes.response), (3 * sizes.prompt, sizes.response // 2)):
        bench.sizes = dataclasses.replace(sizes, prompt=prompt, response=response)
        found = {name: _shared_seconds(bench, trainer, samples) for name, trainer in trainers.items()}
        lengths.append({"prompt": prompt, "response": response} | found)
    return {"dtype": bench.dtype, "samples_per_prompt": samples, "lengths": lengths}


def _shared_seconds(bench: Bench, trainer: PPOTrainer, samples: int) -> dict[str, list[float]]:
    """Seconds of scoring and of training in each iteration, the first one left out."""
    trainer.sampling = SamplingConfig(bench.sizes.response)
    first = torch.arange(bench.sizes.rows, device=bench.device) // samples * samples
    found: dict[str, list[float]] = {"score": [], "train": []}
    for number in range(1 + bench.sizes.steps):
        asked = bench.request(number)
        asked = dataclasses.replace(asked, prompt_ids=asked.prompt_ids[first])
        metrics = trainer.iteration([asked], number)
        for phase, seconds in found.items():
            seconds += [metrics[f"time/{phase}"]] * bool(number)
    return found


def host(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """ZeRO-3 on one card: what rests or stays in host memory, in seconds.

    The actor's optimizer states there and back, and the log-probs of all rows by a reference on the card and by one in
    host memory, for a training batch and for all rows in each forward.
    """
    bench = Bench(sizes, folder)
    ids = bench.ids(sizes.rows, sizes.prompt + sizes.response)
    mask = torch.ones_like(ids)
    answer = (torch.arange(ids.shape[1], device=ids.device) >= sizes.prompt).expand_as(ids)
    reference: dict[str, list[float]] = {}
    load = functools.partial(load_frozen_causal_lm, bench.actor(), zero_stage=3, dtype=bench.dtype)

    @torch.no_grad()
    def score(model: Any, rows: int) -> None:
        """The log-probs of all rows, so many in each forward."""
        for part in zip(ids.split(rows), mask.split(rows), answer.split(rows), strict=True):
            response_log_probs(model, *part)

    for place in ("card", "host"):
        frozen = load(attn_implementation="sdpa", offload=place == "host", device=bench.device)
        for rows in (sizes.micro_batch, sizes.rows):
            times = [bench.timed(functools.partial(score, frozen, rows))[1] for _ in range(1 + sizes.steps)]
            reference[f"{place}, {rows} rows"] = times[1:]
    actor = build_actor(bench.actor(), _build(bench, _groups(bench, actor_zero_stage=3))).engine
    freed, taken = resting_bytes(actor)
    away, back = [], []
    for _ in range(1 + sizes.steps):
        resting = states_on_host(actor)
        away.append(bench.timed(resting.__enter__)[1])
        back.append(bench.timed(functools.partial(resting.__exit__, None, None, None))[1])
    states = {"freed_gib": freed / 2**30, "host_gib": taken / 2**30, "away": away, "back": back}
    return {"dtype": bench.dtype, "states": states, "reference": reference, "peak_gib": bench.peak_gib()}


def memory(sizes: Sizes, folder: Path) -> dict[str, Any]:
    """``--plan`` against the allocator's peak, steps 1 and 3 as programs; a GPU's must agree within 15%."""
    bench = Bench(sizes, folder)
    path = save_model(sizes.reward, folder / "small", bench.dtype, bench.device)
    command = [sys.executable, str(ROOT / "benchmarks" / "memory_plan.py"), "--model_name_or_path", path]
    command += ["--step", "1", "3", "--zero_stage", "0", "--dtype", "auto"]
    command += ["--length", str(max(64, sizes.prompt + sizes.response)), "--batch", str(sizes.micro_batch)]
    environment = os.environ | {"PYTHONPATH": python_path()}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    found = re.findall(r"\| (\d) \| (\d) \| ([\d,]+) \| ([\d,]+) \| ([\d.]+) \|", done.stdout)
    rows = [
        {"step": int(s), "planned_mib": int(p.replace(",", "")), "measured_mib": int(m.replace(",", ""))}
        for s, _, p, m, _ in found
    ]
    if len(rows) != 2:
        raise StageFailed((done.stdout + done.stderr)[-3000:], {"rows": rows})
    off = [r["step"] for r in rows if not 0.85 <= r["planned_mib"] / max(r["measured_mib"], 1) <= 1.15]
    if off and bench.device.type == "cuda":  # a CPU's resident memory of a tiny model says nothing
        raise StageFailed(f"the plan of step {off[0]} is off by more than 15%", {"rows": rows})
    return {"rows": rows}


_ALL: tuple[Callable[[Sizes, Path], dict[str, Any]], ...] = (rollout, step1, step2, step3, shared, host, tests, memory)
STAGES = {stage.__name__: stage for stage in _ALL}
