"""SFT, reward model with PPO, and DPO of several seeds side by side, on the same held-out prompts.

    python benchmarks/demo_seeds.py --seeds 1 2 3 --output_root output/seeds       first: SFT, reward model, PPO
    python benchmarks/dpo_seeds.py --seeds 1 2 3 --output_root output/seeds

Adds DPO to each run (``train.py --pipeline sft,dpo``, from the run's own step 1 and on its step 2's pairs), then judges
all three models by the demo's checks (step 3's evaluate.py). What is finished is not repeated.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import ROOT, flags_of, head_of, row_of

MODELS = ("SFT", "RLHF", "DPO")
CHECKS = ("manner", "content")


def run(seed: int, folder: Path) -> None:
    """Train DPO in a run of the demo and judge its models, unless that has been done."""
    if not (folder / "dpo" / "summary.json").is_file():
        of_dpo = f"--dpo_args=--seed {seed}"
        command = [sys.executable, str(ROOT / "train.py"), "--output_dir", str(folder), "--pipeline", "sft,dpo", of_dpo]
        subprocess.run(command, check=True)
    judged = folder / "step3" / "evaluation.json"
    if not judged.is_file() or "DPO" not in json.loads(judged.read_text())["models"]:
        program = ROOT / "training" / "step3_rlhf_finetuning" / "evaluate.py"
        options = ["--path", str(folder / "step3"), "--best_of", "", "--max_prompts", "0"]
        subprocess.run([sys.executable, str(program), *options], check=True)


def cell(entry: dict[str, Any], key: str) -> str:
    """A number with its interval."""
    if key not in entry:
        return ""
    low, high = entry[f"{key}_interval"]
    return f"{entry[key]:.3f} [{low:.3f}, {high:.3f}]"


def model_row(seed: int, name: str, folder: Path) -> str:
    """One model of one run."""
    entry = json.loads((folder / "step3" / "evaluation.json").read_text())["models"][name]
    step = {"SFT": "step1", "RLHF": "step3", "DPO": "dpo"}[name]
    minutes = json.loads((folder / step / "summary.json").read_text())["seconds"] / 60
    cells = [str(seed), name, f"{entry['kl']:.1f}", f"{entry['length']:.0f}"]
    cells += [text for check in CHECKS for text in (cell(entry, check), cell(entry, f"win_rate_by_{check}"))]
    return row_of(*cells, f"{minutes:.1f}")


def pairs_row(seed: int, folder: Path) -> str:
    """What DPO's own numbers say of one run."""
    found = json.loads((folder / "dpo" / "summary.json").read_text())
    cells = [
        str(seed),
        f"{found['loss_before']:.3f} -> {found['loss_after']:.3f}",
        f"{found['accuracy_after']:.3f} [{found['accuracy_low']:.3f}, {found['accuracy_high']:.3f}]",
        f"{found['margin_after']:.2f}",
        f"{found['chosen_change']:+.2f}",
        f"{found['kl']:.2f}",
    ]
    return row_of(*cells)


def main() -> int:
    """Parse flags, run what is missing, print the tables."""
    parser = flags_of(__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output_root", type=Path, default=ROOT / "output" / "seeds")
    args = parser.parse_args()
    folders = {seed: args.output_root / f"seed-{seed}" for seed in args.seeds}
    for seed, folder in folders.items():
        run(seed, folder)
    names = ("held-out loss", "held-out accuracy", "margin", "chosen, nats a token", "KL on held-out pairs")
    print(head_of("seed", *names))
    for seed, folder in folders.items():
        print(pairs_row(seed, folder))
    checks = [name for check in CHECKS for name in (check, "win rate over SFT")]
    print("\n" + head_of("seed", "model", "KL, nats", "tokens", *checks, "minutes of its step"))
    for seed, folder in folders.items():
        for name in MODELS:
            print(model_row(seed, name, folder))
    return 0


if __name__ == "__main__":
    sys.exit(main())
