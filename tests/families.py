"""Which model families each part of the program serves: tiny random models of each, built from its configuration.

``python -m tests.families`` prints the table of docs/families.md, ``python -m tests.families llama falcon`` some rows.
A cell is ``ok``, or how the program refuses the family (in one line, before training), or ``FAILS``.
"""

from __future__ import annotations

import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from tests.rank_pair import RankPair
from tests.step3.hybrid_checks import twin_equals_engine
from tests.tiny import tiny_tokenizer
from tests.utils.engine.engine_checks import collate, fixed_rows
from training.utils.arguments import LoraArguments
from training.utils.errors import UserError
from training.utils.generation.engines import rollout_backend
from training.utils.generation.rollouts import RolloutRequest
from training.utils.generation.sampling import SamplingConfig
from training.utils.model import classifiers, export, loading
from training.utils.model.forward import TokenScorer, response_log_probs
from training.utils.model.lora import check_lora, with_adapters

VOCABULARY, PAD = 512, 0
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": PAD,
    "initializer_range": 0.3,
}
MOE = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_d_conv": 4}
# Family -> what its configuration needs beside `SIZES`
FAMILIES: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gpt_neox": {},
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},
    "qwen3": {"head_dim": 8},
    "qwen3_moe": {"head_dim": 8, **MOE},
    "qwen3_next": {
        "head_dim": 8,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "shared_expert_intermediate_size": 32,
        **MOE,
    },
    "gemma": {"head_dim": 8},
    "gemma2": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "gemma3_text": {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 6},
    "phi": {},
    "phi3": {},
    "phimoe": {"router_jitter_noise": 0.1, "input_jitter_noise": 0.1, **MOE},
    "falcon": {"new_decoder_architecture": False, "multi_query": True},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128, "expansion_ratio": 2},
    "stablelm": {},
    "starcoder2": {"sliding_window": None},
    "cohere": {},
    "olmo2": {},
    "glm": {"head_dim": 8},
    "glm4": {"head_dim": 8},
    "granite": {},
    "smollm3": {},
    "mixtral": {"router_jitter_noise": 0.1, **MOE},
    "jamba": {
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "mamba_d_state": 8,
        "use_mamba_kernels": False,
        **MOE,
    },
    "zamba2": {"layers_block_type": ["mamba", "hybrid"], "mamba_d_state": 8, "n_mamba_heads": 2, "num_mem_blocks": 1},
    "mamba": {"state_size": 8},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "bamba": {"attn_layer_indices": [1], **MAMBA},
    "gpt_oss": {"head_dim": 8, "sliding_window": 8, **MOE},
}
FEW = ("opt", "gpt2", "llama", "qwen3", "gemma2", "falcon", "mixtral", "mamba")


def build(family: str) -> Any:
    """A tiny random model of a family, so widely initialised that a wrong mask or position changes what it says."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **(SIZES | FAMILIES[family]))
    return AutoModelForCausalLM.from_config(config).eval()


def save(family: str, folder: Path) -> str:
    """The family's model and a tokenizer for it as a folder."""
    build(family).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def prompts(lengths: Sequence[int] = (3, 9, 1, 6)) -> RolloutRequest:
    """Random left-padded prompts."""
    generator, width = torch.Generator().manual_seed(5), max(lengths) + 2
    ids, mask = torch.full((len(lengths), width), PAD), torch.zeros(len(lengths), width, dtype=torch.long)
    for row, length in enumerate(lengths):
        ids[row, width - length :] = torch.randint(3, VOCABULARY, (length,), generator=generator)
        mask[row, width - length :] = 1
    return RolloutRequest(ids, mask, torch.arange(len(lengths)), 0, 0, (), PAD)


@torch.no_grad()
def uncached_greedy(model: Any, asked: RolloutRequest, steps: int) -> list[list[int]]:
    """What plain transformers says, each row alone, a whole forward for every token."""
    rows = []
    for ids, mask in zip(asked.prompt_ids, asked.prompt_mask, strict=True):
        row = ids[mask.bool()].tolist()
        start = len(row)
        for _ in range(steps):
            row.append(int(model(torch.tensor([row]), use_cache=False).logits[0, -1].argmax()))
        rows.append(row[start:])
    return rows


def decodes(engine: str) -> Callable[[str, Path], str]:
    """Greedy tokens of a rollout engine against `uncached_greedy`, rows that end at different steps among them."""

    def check(folder: str, _: Path) -> str:
        model = loading.load_causal_lm(folder, dtype="fp32").eval()
        asked, steps = prompts(), 8
        plain = uncached_greedy(model, asked, steps)
        stop = plain[0][3]
        asked = RolloutRequest(asked.prompt_ids, asked.prompt_mask, asked.row_ids, 0, 0, (stop,), PAD)
        expected = [row[: row.index(stop) + 1] if stop in row else row for row in plain]
        batch = rollout_backend(engine).generate(model, asked, SamplingConfig(steps, greedy=True))
        ids = batch.input_ids[:, batch.response_start :]
        found = [row[mask].tolist() for row, mask in zip(ids, batch.response_mask, strict=True)]
        assert found == expected, f"tokens {found} instead of {expected}"
        return "ok"

    return check


def trains(lora: bool) -> Callable[[str, Path], str]:
    """Log-probs that do not depend on padding nor on a second forward, a step that changes them, export and reload."""

    def check(folder: str, scratch: Path) -> str:
        model = loading.load_causal_lm(folder, dtype="fp32")
        if lora:
            check_lora(folder, LoraArguments(2))
            model = with_adapters(model, LoraArguments(2, "all-linear", True))  # type: ignore[assignment]
        asked = prompts((9, 5))
        rows = [ids[mask.bool()] for ids, mask in zip(asked.prompt_ids, asked.prompt_mask, strict=True)]
        width = max(map(len, rows))
        ids = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=PAD) for row in rows])
        mask = torch.stack([torch.arange(width) < len(row) for row in rows]).long()
        model.train()
        together, _ = response_log_probs(model, ids, mask, mask)
        again, _ = response_log_probs(model, ids, mask, mask)
        assert torch.equal(together, again), "two forwards of the same tokens differ"
        alone, _ = response_log_probs(model, rows[1][None], torch.ones(1, len(rows[1])), torch.ones(1, len(rows[1])))
        off = (together[1, : len(rows[1])] - alone[0]).abs().max().item()
        assert off < 1e-3, f"a row depends on its neighbours: {off:.1e}"
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
        together.sum().backward()
        optimizer.step()
        moved, _ = response_log_probs(model, ids, mask, mask)
        assert not torch.equal(moved, together), "a step changes nothing"
        export.save_model(model, tiny_tokenizer(), scratch / "saved", stop_ids=[2])
        saved = AutoModelForCausalLM.from_pretrained(scratch / "saved", dtype=torch.float32).eval()
        exported, _ = response_log_probs(saved, ids, mask, mask)
        off = (exported - moved).abs().max().item()
        assert off < 1e-3, f"the exported model is another one: {off:.1e}"
        return "ok"

    return check


def rewards(folder: str, _: Path) -> str:
    """A reward model of the family: the score of a row's last token, alone and beside a longer row."""
    classifiers.check_reward_family(folder)
    scorer = TokenScorer(classifiers.load_classifier(folder, dtype="fp32", pad_token_id=PAD, fresh_head_seed=1)).eval()
    asked = prompts((9, 5))
    rows = [ids[mask.bool()] for ids, mask in zip(asked.prompt_ids, asked.prompt_mask, strict=True)]
    ids = torch.stack([torch.nn.functional.pad(row, (0, 9 - len(row)), value=PAD) for row in rows])
    mask = torch.stack([torch.arange(9) < len(row) for row in rows]).long()
    with torch.no_grad():
        off = (scorer(ids, mask)[1, 4] - scorer(rows[1][None], torch.ones(1, 5))[0, -1]).abs().item()
    assert off < 1e-3, f"a row's reward depends on its neighbours: {off:.1e}"
    return "ok"


def shards(pair: RankPair) -> Callable[[str, Path], str]:
    """At ZeRO-3 on two ranks, after two optimizer steps: the twin's greedy tokens, of another length on each rank, and
    the engine's log-probs equal those of a plain model with the gathered weights."""

    def check(folder: str, _: Path) -> str:
        try:
            results = pair.run(twin_equals_engine, folder, stage=3)
        except AssertionError as error:
            last = str(error).strip().splitlines()[-1]
            if "UserError: " in last:
                return last.partition("UserError: ")[2]
            raise AssertionError(last) from error
        plain = loading.load_causal_lm(folder, dtype="fp32").eval()
        before = {name: parameter.clone() for name, parameter in plain.named_parameters()}
        unknown = plain.load_state_dict(results[0]["state"], strict=False).unexpected_keys
        assert not unknown, f"the gathered weights have other names: {unknown[0]}"
        assert any(not torch.equal(parameter, before[name]) for name, parameter in plain.named_parameters())
        rows = fixed_rows()
        with torch.no_grad():
            expected, _ = response_log_probs(plain, **collate(rows, max(len(ids) for ids, _ in rows)))
        for result in results:
            off = (result["engine_log_probs"] - expected).abs().max().item()
            assert off < 1e-3, f"the engine is another model than its weights: {off:.1e}"
            tokens = rollout_backend("hf").generate(plain, result["request"], result["sampling"]).input_ids
            for name, found in result["tokens"].items():
                assert found.tolist() == tokens.tolist(), f"`{name}` on the twin gives other tokens"
        return "ok"

    return check


CHECKS: dict[str, Callable[[str, Path], str]] = {
    "step 1": trains(lora=False),
    "LoRA": trains(lora=True),
    "step 2": rewards,
    "fast": decodes("fast"),
    "hf": decodes("hf"),
}


def row(family: str, checks: Mapping[str, Callable[[str, Path], str]] = CHECKS) -> dict[str, str]:
    """The cells of a family."""
    cells = {}
    with tempfile.TemporaryDirectory() as name:
        (scratch := Path(name) / "model").mkdir()
        folder = save(family, scratch)
        for check, holds in checks.items():
            try:
                cells[check] = holds(folder, Path(name) / check.replace(" ", ""))
            except UserError as error:
                cells[check] = str(error).replace(folder, "MODEL")
            except Exception as error:
                cells[check] = f"FAILS: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                if "TRACE" in os.environ:
                    traceback.print_exc()
    return cells


def main(families: Sequence[str]) -> int:
    """Print the table; returns 1 if a cell fails."""
    pair = RankPair()
    checks = CHECKS | {"ZeRO-3": shards(pair)}
    print(f"| family | {' | '.join(checks)} |\n|{'---|' * (len(checks) + 1)}")
    failed = False
    try:
        for family in families or FAMILIES:
            cells = row(family, checks)
            failed |= any(cell.startswith("FAILS") for cell in cells.values())
            print(f"| {family} | {' | '.join(cells.values())} |", flush=True)
    finally:
        pair.close()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
