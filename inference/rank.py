"""Put models' answers in an order, in the browser: rankings that a reward model and DPO learn from.

    python inference/rank.py --answers answers.jsonl                       all answers to a prompt, in an order
    python inference/rank.py --answers sft.jsonl --against rlhf.jsonl      two runs against each other: a win rate

Answers are what inference/generate.py writes. Several judges may be at work at once, each under a name. Rankings, and
answers that judges write themselves, lie in a folder beside the answers and are read by training as they are. The page
listens on 127.0.0.1; another --host needs --auth USER:PASSWORD.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.append(str(Path(__file__).resolve().parents[1]))  # outside the environment, to say so

from page_guard import address_of, credentials, free_port, names_of

from training.utils.arguments import flag, parse
from training.utils.errors import UserError, run_program
from training.utils.run.environment import check_environment

if TYPE_CHECKING:
    from ranking.ledger import Ledger


@dataclass
class RankArguments:
    """Ranking"""

    answers: str = flag("", "file of prompts with their answers, as inference/generate.py writes it")
    against: str = flag("", "a second file: its answers against those of --answers, two at a time")
    output_dir: str = flag("", "folder of rankings and demonstrations (default: beside the answers)")
    judges_per_item: int = flag(1, "how many judges see each prompt", minimum=1, maximum=100)


@dataclass
class ServerArguments:
    """Server"""

    host: str = flag("127.0.0.1", "address to listen on; any but this machine's own needs --auth")
    port: int = flag(7870, "port to listen on; the next free one if it is taken", minimum=1, maximum=65535)
    auth: str = flag("", "USER:PASSWORD that visitors must give")


def output_dir(rank: RankArguments) -> Path:
    """The folder of rankings: as given, or beside the answers."""
    if rank.output_dir:
        return Path(rank.output_dir).expanduser()
    answers = Path(rank.answers).expanduser()
    against = f"_against_{Path(rank.against).stem}" if rank.against else ""
    return answers.with_name(f"{answers.stem}{against}_rankings")


def told(ledger: Ledger) -> list[str]:
    """What has been judged, in lines for the terminal."""
    from ranking.ledger import RANKINGS

    from training.utils.run.folders import shown

    progress, agreed = ledger.progress(""), ledger.agreement()
    lines = [f"{progress['done']} of {progress['asked']} judgements, {len(ledger.rankings.rows)} rankings in "
             f"{shown(ledger.folder / RANKINGS)}"]  # fmt: skip
    if agreed.alpha is not None and agreed.same is not None:
        lines.append(f"agreement: Krippendorff's alpha {agreed.alpha:.2f}, the same said of {agreed.same:.0%} of pairs "
                     f"of answers, {agreed.prompts} prompts")  # fmt: skip
    for rate in ledger.win_rates():
        low, high = rate["interval"]
        lines.append(f"{rate['models'][0]} preferred to {rate['models'][1]}: {rate['share']:.1%} "
                     f"({low:.1%} to {high:.1%}), ties {rate['ties']:.1%}, {rate['prompts']} prompts")  # fmt: skip
    return lines


def main(argv: Sequence[str]) -> int:
    """Parse, read, serve until Ctrl-C."""
    rank, server = parse([RankArguments, ServerArguments], argv, prog="rank.py", description=__doc__ or "")
    if not rank.answers:
        raise UserError("--answers: name the file that inference/generate.py has written")
    login = credentials(server.host, server.auth)
    port = free_port(server.host, server.port)
    from ranking.items import read_material

    from training.utils.run.folders import make_dir

    material = read_material(rank.answers, rank.against)
    for line in material.told:
        print(line, flush=True)
    import uvicorn
    from ranking.app import build_app
    from ranking.ledger import Ledger

    ledger = Ledger(make_dir(output_dir(rank)), material, rank.judges_per_item)
    app = build_app(ledger, names_of(server.host, password=login is not None), login)
    serving = uvicorn.Server(
        uvicorn.Config(app, host=server.host, port=port, log_level="warning", timeout_graceful_shutdown=2)
    )
    if port != server.port:
        print(f"port {server.port} is in use, taking {port}", flush=True)
    where = address_of(server.host, port)
    print(f"{len(material.items)} prompts; open http://{where}/   (Ctrl-C ends)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt):
        serving.run()
    for line in ["", *told(ledger)]:
        print(line, flush=True)
    return 0


if __name__ == "__main__":
    check_environment()
    sys.exit(run_program(main))
