"""Put the answers of generate.py in an order, by a function or by a model behind an OpenAI-compatible endpoint.

    python inference/judge.py --answers output/answers.jsonl --judge my_rules.py:score
    TRIPOD_JUDGE_KEY=... python inference/judge.py --answers output/answers.jsonl \
        --judge_url http://127.0.0.1:8000/v1 --judge_model my-judge --rubric rubric.txt

Writes rankings.jsonl beside the answers (--output), which step 2 and DPO read as it is (--data_path): a line for each
prompt, its answers with a rank, 1 the best, equal ones tied, and the judge's name.

A function is one of step 3's, f(prompts, responses, rows) -> a number for each, called once for each prompt with all
its answers: the higher number is the better answer; of several functions it is the sum. An endpoint is asked about each
two answers (a round robin), both ways round; where its two verdicts differ the two are tied, and an answer's rank is by
its wins, a tie half. The key is read from TRIPOD_JUDGE_KEY alone and sent to no other place than --judge_url. A run
that was killed goes on.
"""

from __future__ import annotations

import ipaddress
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

sys.path.append(str(Path(__file__).resolve().parents[1]))  # outside the environment, to say so

from training.utils import arguments
from training.utils.answers import Line, PartFile, read_answers
from training.utils.arguments import LONGEST_WAIT, flag
from training.utils.errors import UserError, run_resumable
from training.utils.run.folders import shown, with_python
from training.utils.run.inputs import check_function

if TYPE_CHECKING:
    from judge_endpoint import Endpoint

UNREADABLE = "unreadable"  # a verdict that is none
BATCH = 100  # prompts between two writes, where a function judges


@dataclass
class JudgeArguments:
    """Judging"""

    answers: str = flag("", "the file of generate.py")
    output: str = flag("", "the file to write (default: rankings.jsonl beside the answers)")
    judge: list[str] = flag(
        [],
        "file.py:name=WEIGHT, functions of (prompts, responses, rows), as in step 3; their sum is an answer's number",
    )

    @property
    def path(self) -> Path:
        """The file to write."""
        return Path(self.output).expanduser() if self.output else Path(self.answers).expanduser().with_name(DEFAULT)


DEFAULT = "rankings.jsonl"


@dataclass
class EndpointArguments:
    """Judging by an endpoint"""

    judge_url: str = flag("", "where the API is, such as http://127.0.0.1:8000/v1; nothing is sent without it")
    judge_model: str = flag("", "the model's name there")
    rubric: str = flag(
        "", "a text file: what makes an answer better (default: helpful, honest, harmless, to the point)"
    )
    requests_per_minute: int = flag(0, "at most so many requests a minute, 0 for no limit", minimum=0)
    parallel_requests: int = flag(4, "requests that are under way at a time", minimum=1, maximum=256)
    request_timeout: float = flag(
        60.0, "seconds that an endpoint may be silent before it is asked again", above=0, maximum=LONGEST_WAIT
    )


ARGUMENTS = [JudgeArguments, EndpointArguments]


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags, by `ARGUMENTS`; mistakes answer at once."""
    groups = arguments.parse(ARGUMENTS, argv, prog="judge.py", description=__doc__)
    options, endpoint = groups
    if not options.answers:
        raise UserError("--answers FILE: give what inference/generate.py has written")
    if bool(options.judge) == bool(endpoint.judge_url):
        raise UserError("give a judge: --judge file.py:name, or --judge_url and --judge_model" if not options.judge
                        else "--judge and --judge_url: one judge at a time, each into a file of its own")  # fmt: skip
    if not endpoint.judge_url and (endpoint.judge_model or endpoint.rubric):
        raise UserError("--judge_model and --rubric belong to --judge_url, which is not given")
    if endpoint.judge_url:
        _check_endpoint(endpoint)
    for spec in options.judge:
        check_function(spec, "--judge")
    return groups


def _check_endpoint(endpoint: EndpointArguments) -> None:
    try:
        url = urlsplit(endpoint.judge_url)
        port = url.port  # a ValueError where it is no number, or above 65535; its text may hold a password
    except ValueError:
        url, port = urlsplit(""), 0
    lacks_port = port == 0 or url.netloc.endswith(":")
    if url.scheme not in ("http", "https") or not _is_host(url.hostname or "") or lacks_port:
        raise UserError("--judge_url: expected http://HOST:PORT/v1 or https://HOST/v1, a port from 1 to 65535")
    if url.username or url.password or url.query or url.fragment:
        raise UserError("--judge_url: no user, password or query in it; a key is read from TRIPOD_JUDGE_KEY")
    if not endpoint.judge_model:
        raise UserError("--judge_url needs --judge_model, the model's name there")
    if endpoint.rubric and not Path(endpoint.rubric).expanduser().is_file():
        raise UserError(f"--rubric {endpoint.rubric}: no such file")


def _is_host(name: str) -> bool:
    """Whether a host can be called so: an address, or a name of letters, digits and - (_ in those of containers)."""
    if ":" in name or re.fullmatch(r"[\d.]+", name):
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
    try:
        parts = name.removesuffix(".").encode("idna").decode("ascii").split(".")
    except UnicodeError:  # an empty or too long part, too
        return False
    return all(re.fullmatch(r"[A-Za-z0-9_]([A-Za-z0-9_-]*[A-Za-z0-9_])?", part) for part in parts)


def to_compare(line: Line) -> list[int]:
    """Which answers of a line are compared: those that say something, of equal ones the first."""
    first: dict[str, int] = {}
    for i, answer in enumerate(line["answers"]):
        if answer["response"].strip():
            first.setdefault(answer["response"], i)
    return sorted(first.values())


def ranked(line: Line, scores: Mapping[int, float], judge: str) -> Line:
    """A line of rankings: answers with ``rank`` and ``score``, 1 the best; empty answers are left out.

    Args:
        line: of answers.
        scores: of those in `to_compare`, higher is better.
        judge: its name.
    """
    by_text = {line["answers"][i]["response"]: score for i, score in scores.items()}
    levels = sorted(set(by_text.values()), reverse=True)
    answers = [
        {**answer, "rank": 1 + levels.index(by_text[answer["response"]]), "score": by_text[answer["response"]]}
        for answer in line["answers"]
        if answer["response"] in by_text
    ]
    kept: Line = {key: line[key] for key in ("source", "reference") if key in line}
    return {"id": line["id"], "prompt": line["prompt"], "answers": answers, "judge": judge, **kept}


def judge_by_functions(specs: Sequence[str], lines: Sequence[Line], file: PartFile, done: Sequence[Line]) -> str:
    """Let functions score what is left; returns the judge's name.

    Raises:
        UserError: no such function, one raises, or gives no numbers.
    """
    from training.step3_rlhf_finetuning.reward_functions import (
        MODEL,
        call_text_function,
        parse_reward_functions,
        split_weight,
    )

    if any(split_weight(spec)[0] == MODEL for spec in specs):
        raise UserError(f"--judge {MODEL}: functions judge here, no reward model")
    functions, _ = parse_reward_functions(specs, "--judge")
    ready = {line["id"] for line in done}
    left = [line for line in lines if line["id"] not in ready]
    with file.part() as append:
        for start in range(0, len(left), BATCH):
            found: list[Line] = []
            try:
                for line in left[start : start + BATCH]:
                    texts = [line["answers"][i]["response"] for i in to_compare(line)]
                    prompts, rows = [line["prompt"]] * len(texts), [line.get("row", {})] * len(texts)
                    scores = [0.0] * len(texts)
                    for name, (function, weight) in functions.items():
                        where = f"--judge {name}, prompt {line['id']}"
                        values = call_text_function(function, prompts, texts, rows, where)
                        scores = [score + weight * value for score, value in zip(scores, values, strict=True)]
                    found.append({"id": line["id"], "scores": scores})
            finally:
                append(found)
    return "+".join(functions)


def judge_by_endpoint(endpoint: Endpoint, lines: Sequence[Line], file: PartFile, done: Sequence[Line]) -> None:
    """Ask about every two answers, both ways round, as far as that has not been done.

    Raises:
        UserError: the endpoint refuses, or does not answer however often it is asked.
    """
    ready = {(line["id"], line["a"], line["b"]) for line in done if line["verdict"] != UNREADABLE}
    pairs = [(line, a, b) for line in lines for a in to_compare(line) for b in to_compare(line) if a != b]
    asked = [(line, a, b) for line, a, b in pairs if (line["id"], a, b) not in ready]
    unread: Counter[str] = Counter()
    endpoint.has_judged = bool(ready)
    with file.part() as append:
        for (line, a, b), verdict in endpoint.verdicts(asked):
            append([{"id": line["id"], "a": a, "b": b, "verdict": verdict}])
            unread[line["id"]] += verdict == UNREADABLE
    if unread.total() > len(pairs) / 2:
        raise UserError(f"--judge_url {endpoint.url}: {unread.total()} of {len(pairs)} answers hold no verdict, such "
                        f"as {endpoint.unread!r}: give another --judge_model or --rubric; started again, these are "
                        "asked again")  # fmt: skip
    if names := [name for name, count in unread.items() if count]:
        more = f" and {len(names) - 5} other prompts" if len(names) > 5 else ""
        print(f"no verdict about the prompt {', '.join(names[:5])}{more}, the last: {endpoint.unread!r}", flush=True)


def points(verdicts: Mapping[tuple[int, int], str], answers: Sequence[int]) -> dict[int, float]:
    """Wins of each answer against the others, a tie half: a pair is won where both of its verdicts say so.

    Args:
        verdicts: (the one shown first, the other) -> ``A``, ``B`` or ``tie``, or anything else for none.
        answers: all of them.
    """
    wins = dict.fromkeys(answers, 0.0)
    for a in answers:
        for b in answers:
            if a < b:
                both = verdicts[a, b], verdicts[b, a]
                share = 1.0 if both == ("A", "B") else 0.0 if both == ("B", "A") else 0.5
                wins[a] += share
                wins[b] += 1 - share
    return wins


def settings_of(groups: Sequence[Any], judge: Mapping[str, Any]) -> dict[str, Any]:
    """What the rankings depend on: the answers, and the judge."""
    from training.utils.checkpoint.digests import read_digest

    options, _ = groups
    path = Path(options.answers).expanduser()
    return {"answers": str(path.absolute()), "content of the answers": read_digest(path), **judge}


def rankings_of(lines: Sequence[Line], done: Sequence[Line], judge: str) -> tuple[list[Line], dict[str, Any]]:
    """The lines of the file, in the order of the answers, and what is to be known of them."""
    found: dict[str, Any] = {}
    for line in done:
        if "scores" in line:
            found[line["id"]] = line["scores"]
        else:
            found.setdefault(line["id"], {})[line["a"], line["b"]] = line["verdict"]
    rankings = []
    for line in lines:
        answers = to_compare(line)
        if len(answers) > 1 or len([a for a in line["answers"] if a["response"].strip()]) > 1:
            said = found.get(line["id"], {})
            scores = dict(zip(answers, said, strict=True)) if isinstance(said, list) else points(said, answers)
            rankings.append(ranked(line, scores, judge))
    ties = sum(len({a["rank"] for a in ranking["answers"]}) == 1 for ranking in rankings)
    result: dict[str, Any] = {"prompts": len(rankings), "all tied": ties, "left out": len(lines) - len(rankings)}
    verdicts = {(i, *pair): v for i, said in found.items() if isinstance(said, dict) for pair, v in said.items()}
    if verdicts:
        counts, opposite = Counter(verdicts.values()), {"A": "B", "B": "A"}
        pairs = [(verdict, verdicts[i, b, a]) for (i, a, b), verdict in verdicts.items() if a < b]
        result["verdicts"] = {name: counts[name] for name in ("A", "B", "tie", UNREADABLE)}
        same = sum(one != UNREADABLE and one == opposite.get(other, other) for one, other in pairs)
        result["verdicts"]["same both ways round"] = same / len(pairs)
    return rankings, result


def tell(result: Mapping[str, Any], path: Path) -> None:
    """Say what has been written, and what to know of it."""
    print(f"{result['prompts']} rankings written to {shown(path)}, {result['all tied']} of them with all answers tied")
    if result["left out"]:
        print(f"left out: {result['left out']} prompts with fewer than two answers that say something")
    if said := result.get("verdicts"):
        print(f"the first answer was called better {said['A']} times, the second {said['B']}, a tie {said['tie']}; "
              f"{said['same both ways round']:.0%} of the pairs got one verdict both ways round")  # fmt: skip
        if said["unreadable"]:
            print(f"warning: {said['unreadable']} answers of the judge held no verdict and count as ties")
    look = with_python("-m", "training.utils.data.preview", "--step", "2", "--data_path", shown(path))
    print(f"next: {look}", flush=True)


def main(argv: Sequence[str]) -> int:
    """Judge every prompt that has not been judged; returns the exit code."""
    groups = parse_flags(argv)
    options, asked = groups
    lines = read_answers(Path(options.answers).expanduser(), "--answers")
    from training.utils.data.formats.rankings import MOST_ANSWERS

    if (most := max(len(line["answers"]) for line in lines)) > MOST_ANSWERS:
        raise UserError(f"--answers {options.answers}: {most} answers to one prompt, training reads {MOST_ANSWERS}")
    endpoint = None
    if options.judge:
        from training.utils.checkpoint.digests import read_digest

        sources = [Path(spec.rpartition(":")[0]).expanduser() for spec in options.judge]
        contents = [read_digest(source) if source.is_file() else "" for source in sources]
        judge: dict[str, Any] = {"judge": options.judge, "content of the judge": contents}
    else:
        from judge_endpoint import Endpoint

        endpoint = Endpoint(asked)
        judge = endpoint.settings()
    file = PartFile(options.path, "--output", settings_of(groups, judge))
    if file.is_finished():
        file.clear()
        print(f"{shown(file.path)} is finished already, with these settings", flush=True)
        return 0
    with file.opened():
        done = file.lines()
        if done:
            print(f"going on: {len(done)} {'verdicts' if endpoint else 'prompts'} are there", flush=True)
        if endpoint is None:
            name = judge_by_functions(options.judge, lines, file, done)
        else:
            judge_by_endpoint(endpoint, lines, file, done)
            name = endpoint.model
        rankings, result = rankings_of(lines, file.lines(), name)
        file.finish(rankings, result)
    tell(result, file.path)
    return 0


if __name__ == "__main__":
    arguments.answer_early(parse_flags)
    sys.exit(run_resumable(main))
