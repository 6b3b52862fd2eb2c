"""Peak memory of two choices in step 3, each way of doing it in a process of its own.

    python benchmarks/memory.py                       # the embedded model
    python benchmarks/memory.py --json memory.json

Policies: LoRA, where the reference policy is the actor without its adapter, against full training with a reference
model of its own. Each builds actor and reference, scores a batch with both, and updates the actor twice. Logits:
log-probs of the responses with gradients, from logits of response positions only in fp32 pieces, against logits of all
positions in fp32 at once. Measured is the peak above what the process held before: tensors of the accelerator's
allocator, or resident memory on a CPU, where the C library is told to give freed memory back at once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from common import TRIMMING, flags_of, head_of, number_of, row_of, write_figures

from training.utils.run.files import new_file

LORA_DIM = 8


def make_batch(arguments: argparse.Namespace, vocabulary: int, device: Any) -> tuple[Any, Any, Any]:
    """Random rows that fill prompt and response: ids [B, T], attention mask [B, T], response mask [B, R]."""
    import torch

    shape = (arguments.rows, arguments.prompt + arguments.response)
    ids = torch.randint(3, vocabulary, shape, generator=torch.Generator().manual_seed(0)).to(device)
    return ids, torch.ones_like(ids), torch.ones_like(ids[:, arguments.prompt :], dtype=torch.bool)


def policies(arguments: argparse.Namespace, path: str, lora: bool) -> Callable[[], None]:
    """Build actor and reference, score with both, update the actor."""
    from training.step3_rlhf_finetuning.arguments import OptimizationArguments, RoleArguments, RoleZeroArguments
    from training.step3_rlhf_finetuning.roles import Build, build_actor
    from training.utils.engine import engine as engines
    from training.utils.generation.rollouts import rollout_log_probs
    from training.utils.run.distributed import init_distributed

    device = init_distributed()

    def run() -> None:
        """Build both roles, score and train once."""
        groups = (
            RoleArguments(dtype=arguments.dtype),
            OptimizationArguments(per_device_training_batch_size=arguments.rows, actor_learning_rate=1e-5),
            RoleZeroArguments(actor_lora_dim=LORA_DIM if lora else 0, only_optimize_lora=lora),
        )
        actor = build_actor(path, Build(*groups, overrides={}, total_steps=10, pad_token_id=0, device=device))
        batch = make_batch(arguments, actor.engine.module.config.vocab_size, device)
        with actor.scoring_mode() as engine:
            rollout_log_probs(engine, *batch, 1.0)
        with actor.reference_mode() as reference:
            rollout_log_probs(reference, *batch, 1.0)
        for _ in range(2):
            with actor.training_mode() as engine:
                log_probs, _ = rollout_log_probs(engine, *batch, 1.0)
                engines.backward(engine, -log_probs.sum(), batch[2].sum().item())
                engines.optimizer_step(engine)

    return run


def logits(arguments: argparse.Namespace, path: str, responses_only: bool) -> Callable[[], None]:
    """Log-probs of the responses of one batch and their gradient; the model is there before."""
    from training.utils.generation.rollouts import rollout_log_probs
    from training.utils.model.loading import load_causal_lm
    from training.utils.run.distributed import init_distributed

    device = init_distributed()
    model: Any = load_causal_lm(path, dtype=arguments.dtype).to(device)
    ids, mask, response = make_batch(arguments, model.config.vocab_size, device)

    def run() -> None:
        """One forward and backward."""
        if responses_only:
            log_probs, _ = rollout_log_probs(model, ids, mask, response, 1.0)
        else:
            everything = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1].float()
            chosen = everything.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
            log_probs = chosen[:, arguments.prompt - 1 :] * response
        (-log_probs.sum()).backward()

    return run


VARIANTS: dict[str, tuple[str, Callable[..., Callable[[], None]], bool]] = {
    "full": ("policies: full training, reference of its own", policies, False),
    "lora": (f"policies: LoRA of rank {LORA_DIM}, reference from the base", policies, True),
    "all": ("logits: all positions, fp32", logits, False),
    "responses": ("logits: responses only, fp32 pieces", logits, True),
}


def child(arguments: argparse.Namespace, path: str) -> None:
    """Run one variant in this process and print its peak above what was there before, in MiB."""
    from training.utils.run.phases import Phases

    _, make, choice = VARIANTS[arguments.child]
    run = make(arguments, path, choice)
    phases = Phases()
    phases.end("before")
    run()
    phases.end("run")
    peaks = {name: phase["peak_gib"] * 1024 for name, phase in phases.summary().items()}
    print(f"\nPEAK {peaks['run'] - peaks['before']:.0f}", flush=True)


def measure(name: str, argv: Sequence[str]) -> float:
    """The peak of one variant in MiB, from a process of its own."""
    from training.utils.run.folders import python_path

    command = [sys.executable, __file__, *argv, "--child", name]
    return number_of(command, TRIMMING | {"PYTHONPATH": python_path()}, r"\nPEAK (-?\d+)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Read the flags."""
    parser = flags_of(__doc__)
    parser.add_argument("--model_name_or_path", default="embedded")
    parser.add_argument("--dtype", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--prompt", type=int, default=256, help="tokens of each prompt")
    parser.add_argument("--response", type=int, default=256, help="tokens of each response")
    parser.add_argument("--json", type=new_file, default="", help="also write the figures to this file")
    parser.add_argument("--child", choices=sorted(VARIANTS), default="", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> None:
    """Measure the four variants and print the Markdown table."""
    arguments = parse(argv)
    from training.utils.engine.precision import settle
    from training.utils.model.loading import resolve_model

    settle(arguments)
    path = resolve_model(arguments.model_name_or_path)
    if arguments.child:
        child(arguments, path)
        return
    peaks = {}
    for name, (what, *_) in VARIANTS.items():
        peaks[name] = measure(name, argv)
        print(f"{what}: {peaks[name]:,.0f} MiB", file=sys.stderr, flush=True)
    print(
        f"{arguments.model_name_or_path}, {arguments.dtype}, {arguments.rows} rows of {arguments.prompt} prompt and "
        f"{arguments.response} response tokens, one rank, ZeRO 0; peak memory above what the process held before.\n"
    )
    print(head_of("", "MiB", "of the first"))
    for first, second in (("full", "lora"), ("all", "responses")):
        for name in (first, second):
            print(row_of(VARIANTS[name][0], f"{peaks[name]:,.0f}", f"{peaks[name] / peaks[first]:.0%}"))
    write_figures(arguments.json, {"arguments": vars(arguments), "peak_mib": peaks})


if __name__ == "__main__":
    main(sys.argv[1:])
