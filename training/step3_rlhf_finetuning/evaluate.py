"""Evaluate step 3: the SFT model, the RLHF model, best-of-n of the SFT model and DPO's on the same held-out prompts.

    python training/step3_rlhf_finetuning/evaluate.py
    python training/step3_rlhf_finetuning/evaluate.py --path output/run/step3 --best_of 1,4 --max_prompts 0 \
        --eval_function my_rules.py:score --judge_model_name_or_path another/reward-model

The reward model that step 3 was trained with can not judge alone: training has learned to please it. Give a different
judge: --eval_function (rules; the run's own if it had one) or another reward model. Answers are sampled as in training.
Win rates are against one answer of the SFT model to each prompt, a tie half, with 95% intervals over prompts.
KL to the SFT model is measured for the RLHF and the DPO model and log n - (n - 1) / n for best-of-n. All models are
loaded from disk. Writes evaluation.json into the step's folder; benchmarks/plot_reward_kl.py draws it.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from training.step3_rlhf_finetuning import arguments as rlhf_arguments
from training.utils import arguments
from training.utils.errors import UserError, run_program
from training.utils.generation.vllm_python import check_vllm
from training.utils.run.folders import is_finished, step_folder
from training.utils.run.runtime import prepare_runtime


@dataclass
class StepArguments:
    """Step 3"""

    sft_model_name_or_path: str = arguments.flag("", "the SFT model (default: the run's own)")
    reward_model_name_or_path: str = arguments.flag("", "the reward model, none for none (default: the run's own)")
    reward_function: list[str] = arguments.flag(
        [], "file.py:name=WEIGHT, the functions that step 3 was trained with (default: the run's own)"
    )
    dpo_model_name_or_path: str = arguments.flag("", "a DPO model beside them (default: the run's, if it has one)")
    judge_model_name_or_path: str = arguments.flag("", "a different reward model to judge by")
    eval_function: list[str] = arguments.flag([], "file.py:name ..., rules to judge by (default: the run's own)")
    best_of: str = arguments.flag("1,4,16", "draw best-of-n from the SFT model for these n, empty for none")
    max_answer_seq_len: int | None = arguments.flag(None, "longest answer in tokens (default: the run's)", minimum=1)
    temperature: float | None = arguments.flag(None, "sampling temperature (default: the run's)", above=0)
    rollout_engine: str = arguments.flag("fast", "how tokens are decoded", choices=arguments.ROLLOUT_ENGINES)
    vllm_python: str = arguments.flag("", "interpreter that has vLLM (default: that of make setup-vllm, else this one)")


ARGUMENTS = [arguments.EvaluationArguments, StepArguments, arguments.DataArguments]


def parse_counts(text: str) -> list[int]:
    """``--best_of``: ``1,4,16`` -> [1, 4, 16], in rising order and each once; empty text gives none.

    Raises:
        UserError: not whole numbers from 1 on, or the largest is no multiple of another.
    """
    try:
        counts = sorted({int(part) for part in text.split(",")}) if text.strip() else []
    except ValueError:
        counts = [0]
    if any(n < 1 for n in counts):
        raise UserError(f"--best_of {text}: write whole numbers from 1 on with commas between them, such as 1,4,16")
    for n in counts:
        if counts[-1] % n:
            raise UserError(
                f"--best_of {text}: {n} does not divide {counts[-1]}; all share the same {counts[-1]} answers to a "
                "prompt"
            )
    return counts


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags, by `ARGUMENTS`; without torch, so that ``--help`` and mistakes answer at once."""
    groups = arguments.parse(ARGUMENTS, argv, prog="step3/evaluate.py", description=__doc__)
    parse_counts(groups[1].best_of)
    check_vllm(groups[1].rollout_engine, groups[1].vllm_python)
    step_folder(groups[0].path, "step3")
    return groups


if __name__ == "__main__":
    arguments.answer_early(parse_flags)
prepare_runtime()

import torch  # noqa: E402  threads and PATH must be set before
from transformers import set_seed  # noqa: E402

from training.step3_rlhf_finetuning import main as step3, settings  # noqa: E402
from training.step3_rlhf_finetuning.comparison import (  # noqa: E402
    Answer,
    Asking,
    EvalFunction,
    best_of_kl,
    checks,
    chosen_of,
    decoding,
    load_eval_functions,
)
from training.step3_rlhf_finetuning.prompts import PromptSet  # noqa: E402
from training.step3_rlhf_finetuning.reward_functions import (  # noqa: E402
    MODEL,
    NONE,
    TextFunction,
    check_without_model,
    parse_reward_functions,
    split_weight,
)
from training.step3_rlhf_finetuning.reward_sources import RewardMix  # noqa: E402
from training.step3_rlhf_finetuning.roles import RewardModelSettings, build_rewards  # noqa: E402
from training.utils import evaluation_programs, intervals  # noqa: E402
from training.utils.data.batches import spread_rows  # noqa: E402
from training.utils.data.prepare import prepare_data  # noqa: E402
from training.utils.data.template import stop_token_ids  # noqa: E402
from training.utils.engine import precision  # noqa: E402
from training.utils.generation.sampling import SamplingConfig  # noqa: E402
from training.utils.generation.vllm import VllmBackend, VllmOptions, started_backend  # noqa: E402
from training.utils.metrics import progress_bar  # noqa: E402
from training.utils.model import classifiers, loading  # noqa: E402
from training.utils.model.limits import check_length  # noqa: E402
from training.utils.model.reward_stats import STATS_FILE  # noqa: E402
from training.utils.model.text_reward import load_text_reward_model  # noqa: E402
from training.utils.model.tokenizer import load_tokenizer, same_tokenizer  # noqa: E402
from training.utils.run.distributed import init_distributed, say  # noqa: E402

TITLES = {"sft": "SFT", "rlhf": "RLHF", "dpo": "DPO"}
Draws = Sequence[Sequence[Answer]]  # [prompt][draw]
Values = Sequence[Sequence[float]]  # of such answers
DRAW_SEED = 7_919  # best-of-n draws under other noise than the answers that it is held against


def of_the_run(given: str, recorded: str, trained_in: str, folder: Path, step: str, flag: str) -> str:
    """The model that step 3 took from an earlier step.

    Args:
        given: the flag's value, which wins.
        recorded: what step 3 was started with, empty if that is not known. The run may have moved since, so where it
            was step ``step`` of the run itself, or is gone, that step is taken where it lies now.
        trained_in: what step 3's output folder was then, empty if that is not known.
        folder: step 3's output folder.
        step: ``step1`` or ``step2``.
        flag: named in messages.

    Raises:
        UserError: it is not there.
    """
    if given:
        return loading.resolve_model(given, flag)
    beside, path = folder.parent / step, Path(recorded).expanduser()
    own = path.name == step and (not trained_in or path.parent.name == Path(trained_in).parent.name)
    is_path = recorded.startswith((".", "/", "~")) or recorded.count("/") > 1  # a hub name has one slash at most
    if is_finished(beside) and (not recorded or own or (is_path and not path.exists())):
        return loading.resolve_model(str(beside), flag)
    if not recorded:
        or_none = f" ({NONE}, with --reward_function)" if step == "step2" else ""
        raise UserError(f"the run has no finished {step} beside {folder}: give {flag}{or_none}")
    return loading.resolve_model(recorded, flag)


@dataclass(frozen=True)
class Sources:
    """What a run was made from: its SFT model, and its rewards.

    Attributes:
        sft: folder or hub name of the SFT model.
        reward_model: likewise; empty without one.
        functions: further rewards with their weights, by name.
        weight: the reward model's.
    """

    sft: str
    reward_model: str
    functions: dict[str, tuple[TextFunction, float]]
    weight: float


def sources_of_the_run(step: StepArguments, recorded: Mapping[type, Any], folder: Path) -> Sources:
    """The flags', else what step 3 was trained with.

    Raises:
        UserError: something is not there, or no reward is left.
    """
    roles, trained_in = recorded[rlhf_arguments.RoleArguments], recorded[arguments.OutputArguments].output_dir
    sft = of_the_run(step.sft_model_name_or_path, roles.actor_model_name_or_path, trained_in, folder, "step1",
                     "--sft_model_name_or_path")  # fmt: skip
    specs, flag = step.reward_function, "--reward_model_name_or_path"
    without_model = (step.reward_model_name_or_path or roles.critic_model_name_or_path) == NONE
    if not specs:
        trained_with = recorded[rlhf_arguments.PPOArguments].reward_function
        specs = [spec for spec in trained_with if not without_model or split_weight(spec)[0] != MODEL]
    if without_model:
        check_without_model(specs, flag)
    functions, weight = parse_reward_functions(specs, "--reward_function")
    if without_model:
        return Sources(sft, "", functions, weight)
    named = step.reward_model_name_or_path, roles.critic_model_name_or_path
    return Sources(sft, of_the_run(*named, trained_in, folder, "step2", flag), functions, weight)


def reward_of_the_run(sources: Sources, tokenizer: Any, *, normalize: bool) -> RewardModelSettings | None:
    """The reward model, its rewards normalised as in the run where its folder has step 2's statistics; None without."""
    normalize = normalize and (Path(sources.reward_model) / STATS_FILE).is_file()
    return settings.reward_model_settings(
        sources.reward_model, tokenizer, normalize=normalize, weight=sources.weight, plan=False
    )


def dpo_of_the_run(given: str, folder: Path) -> dict[str, str]:
    """``dpo`` and where the flag's DPO model lies, else that beside step 3's folder; empty where there is none."""
    beside = folder.parent / "dpo"
    path = given or (str(beside) if is_finished(beside) else "")
    return {"dpo": loading.resolve_model(path, "--dpo_model_name_or_path")} if path else {}


def shared_tokenizer(actor_path: str, sft_path: str, *flags: arguments.DataArguments) -> Any:
    """The tokenizer of both models, with the chat template in which both are asked.

    Args:
        actor_path, sft_path: the models.
        flags: data flags, the first of which are in force. If any of them set a template or a system message, that
            was put over both models, and the SFT model's own may differ.

    Raises:
        UserError: the models have different ones.
    """
    data = flags[0]
    tokenizer = load_tokenizer(actor_path, **data.template)
    other = load_tokenizer(sft_path)
    if any(any(data.template.values()) for data in flags):
        other.chat_template = tokenizer.chat_template
    if not same_tokenizer(tokenizer, other):
        raise UserError(f"--sft_model_name_or_path {sft_path} has another tokenizer or chat template than {actor_path}")
    return tokenizer


@dataclass(frozen=True)
class Evaluator:
    """Answers prompts by models from disk and judges the answers.

    Args:
        asking: how answers are asked for, sampled as in training.
        rows: of the prompts.
        dtype: of every model.
    """

    asking: Asking
    rows: Sequence[int]
    dtype: str

    def model(self, path: str) -> Any:
        """A causal LM from disk."""
        return loading.load_causal_lm(path, dtype=self.dtype).to(self.asking.device).eval()

    def answers(self, model: Any, rewards: RewardMix, seed: int, reference: Any | None = None) -> list[Answer]:
        """One answer to each prompt; with ``reference`` its KL too."""
        asking = replace(self.asking, prompts=replace(self.asking.prompts, seed=seed))
        server = asking.backend if isinstance(asking.backend, VllmBackend) else None
        beside = contextlib.nullcontext(reference) if reference is not None else None
        with torch.no_grad():
            return asking.answers(self.rows, decoding(model, server), rewards, beside)


def judged_by(
    judge: Callable[[Sequence[Answer]], list[float]], tables: Mapping[str, Draws]
) -> dict[str, list[list[float]]]:
    """Call a judge once for all models' answers, the same one once.

    Beside other rows a judge's numbers are rounded otherwise, and an answer would win or lose against itself.
    """
    asked = {answer.said: answer for table in tables.values() for row in table for answer in row}
    values = dict(zip(asked, judge(list(asked.values())), strict=True))
    return {name: [[values[answer.said] for answer in row] for row in table] for name, table in tables.items()}


def per_prompt(values: Values, chosen: Sequence[Sequence[int]]) -> list[float]:
    """Mean over each prompt's chosen answers."""
    return [intervals.mean([row[i] for i in picks]) for row, picks in zip(values, chosen, strict=True)]


def draw(
    evaluator: Evaluator, rewards: RewardMix, sft_path: str, tuned: Mapping[str, str], draws_per_prompt: int, seed: int
) -> dict[str, list[list[Answer]]]:
    """Answers of ``sft``, of the ``tuned`` models and, if there are draws, of ``best_of``."""
    sft = evaluator.model(sft_path)
    say(f"answering {len(evaluator.rows)} held-out prompts with the SFT model, {draws_per_prompt} times more for "
        f"best-of-n, and with the {' and the '.join(TITLES[name] for name in tuned)} model ...")  # fmt: skip
    bar = progress_bar(draws_per_prompt + 1 + len(tuned), "answers")
    rounds = []
    for number in range(draws_per_prompt + 1):  # round 0 is what everything is held against
        rounds.append(evaluator.answers(sft, rewards, seed + DRAW_SEED * number))
        bar.update()
    drawn = {"sft": [[a] for a in rounds[0]]}
    for name, path in tuned.items():
        drawn[name] = [[a] for a in evaluator.answers(evaluator.model(path), rewards, seed, reference=sft)]
        bar.update()
    bar.close()
    return drawn | ({"best_of": [list(row) for row in zip(*rounds[1:], strict=True)]} if draws_per_prompt else {})


def all_judges(
    evaluator: Evaluator, drawn: Mapping[str, Draws], functions: Sequence[EvalFunction], judge_path: str
) -> dict[str, dict[str, list[list[float]]]]:
    """Values of all models' answers by the training reward (known) and by each different judge given."""
    prompts = evaluator.asking.prompts
    judged = {"reward": judged_by(lambda answers: [a.reward for a in answers], drawn)}
    for function in functions:
        judged[function.name] = judged_by(partial(checks, prompts, function=function), drawn)
    if judge_path:
        judge = load_text_reward_model(judge_path, dtype=evaluator.dtype, device=evaluator.asking.device)

        def judge_answers(answers: Sequence[Answer]) -> list[float]:
            """The judge model's rewards of the conversations that end with these answers."""
            said = [[*prompts.messages(a.row), {"role": "assistant", "content": a.text}] for a in answers]
            return judge.rewards(said, evaluator.asking.scored).tolist()

        judged["judge"] = judged_by(judge_answers, drawn)
    return judged


def judge_model(name: str) -> str:
    """The folder of a second reward model that judges; empty without one.

    Raises:
        UserError: there is none, or no reward model.
    """
    path = loading.resolve_model(name, "--judge_model_name_or_path") if name else ""
    if path:
        classifiers.check_reward_head(path)
    return path


def main(argv: Sequence[str]) -> int:
    """Evaluate; returns the exit code. See the module's docstring for what it writes."""
    args, step, data = parse_flags(argv)
    counts = parse_counts(step.best_of)
    folder = step_folder(args.path, "step3")
    recorded = evaluation_programs.recorded_arguments(folder, step3.ARGUMENTS, step3.OTHERS | step3.ALIASES)
    rollout, ppo = recorded[rlhf_arguments.RolloutArguments], recorded[rlhf_arguments.PPOArguments]
    seed = recorded[rlhf_arguments.OptimizationArguments].seed
    specs = step.eval_function or recorded[rlhf_arguments.EvaluationArguments].eval_function
    functions = load_eval_functions(specs)
    actor_path = loading.resolve_model(str(folder / "actor"), "--path")
    sources = sources_of_the_run(step, recorded, folder)
    tuned = {"rlhf": actor_path} | dpo_of_the_run(step.dpo_model_name_or_path, folder)
    judge_path = judge_model(step.judge_model_name_or_path)
    longest = step.max_answer_seq_len or rollout.max_answer_seq_len
    whole, rows_together = rollout.max_prompt_seq_len + longest, args.per_device_eval_batch_size
    chosen_data = evaluation_programs.data_arguments(data, recorded[arguments.DataArguments], folder)
    flags = chosen_data, recorded[arguments.DataArguments]
    *_, tokenizer = [shared_tokenizer(path, sources.sft, *flags) for path in reversed(tuned.values())]
    reward = reward_of_the_run(sources, tokenizer, normalize=ppo.normalize_reward)
    for path in (*tuned.values(), sources.sft, *([reward.path] if reward and not reward.reads_text else [])):
        check_length(path, whole, "--max_prompt_seq_len + --max_answer_seq_len")
    if not functions and not judge_path:
        say("warning: the only judge is the reward model that training has learned to please; give --eval_function or "
            "--judge_model_name_or_path")  # fmt: skip
    rows = prepare_data(
        "prompts",
        chosen_data,
        tokenizer,
        max_length=whole,
        max_prompt_length=rollout.max_prompt_seq_len,
        seed=seed,
        whole_rows=bool(sources.functions),
    ).to_judge_by()
    device = init_distributed()
    set_seed(seed)  # a user's function may draw from Python's or numpy's numbers
    settled = precision.settle(args)
    sampling = SamplingConfig(longest, temperature=step.temperature or rollout.temperature, top_p=rollout.top_p,
                              top_k=rollout.top_k)  # fmt: skip
    prompts = PromptSet(rows, tokenizer, tuple(stop_token_ids(tokenizer)), seed)
    asked = spread_rows(len(rows), args.max_prompts or len(rows))
    options = VllmOptions(step.vllm_python, sources.sft, sources.sft, args.dtype, rows_together, whole)
    backend = started_backend(step.rollout_engine, options, tokenizer, device)  # vLLM serves all models alike
    asking = Asking(prompts, backend, sampling, rows_together, rows_together, device)
    evaluator = Evaluator(asking, asked, args.dtype)
    rewards = build_rewards(
        reward, sources.functions, pad_token_id=tokenizer.pad_token_id, dtype=args.dtype, device=device
    )
    drawn = draw(evaluator, rewards, sources.sft, tuned, counts[-1] if counts else 0, seed)
    judged = all_judges(evaluator, drawn, functions, judge_path)
    content = assemble(drawn, judged, counts, seed)
    say("\n" + result_table(content["models"]))
    say(f"in brackets: 95% intervals over {len(evaluator.rows)} prompts; win rates are against one SFT answer each")
    facts = {"prompts": len(evaluator.rows), "temperature": sampling.temperature, "max_answer_seq_len": longest,
             "sft_model": sources.sft, "dpo_model": tuned.get("dpo", ""), "reward_model": sources.reward_model,
             "eval_function": ", ".join(specs),
             "judge_model": judge_path, precision.SUMMARY_KEY: settled}  # fmt: skip
    evaluation_programs.write_evaluation(folder, facts | content | {"samples": samples_of(evaluator, drawn)})
    return 0


def samples_of(evaluator: Evaluator, drawn: Mapping[str, Draws]) -> list[dict[str, str | float]]:
    """The entry ``samples`` of evaluation.json: each prompt with the first answer of each model and its reward."""
    return [
        {
            "prompt": evaluator.asking.prompts.messages(row)[-1]["content"],
            **{name: drawn[name][i][0].text for name in TITLES if name in drawn},
            **{f"{name}_reward": drawn[name][i][0].reward for name in TITLES if name in drawn},
        }
        for i, row in enumerate(evaluator.rows)
    ]


def assemble(
    drawn: Mapping[str, Draws], judged: Mapping[str, Mapping[str, Values]], counts: Sequence[int], seed: int
) -> dict[str, Any]:
    """The entry ``models`` of evaluation.json, from each model's answers and what each judge says of them."""
    only = [[0]] * len(drawn["sft"])

    def entry(name: str, chosen: Sequence[Sequence[int]], kl: float) -> dict[str, Any]:
        """Of a policy: ``chosen`` are the draws that it answers each prompt with, of which the mean is taken."""
        lengths = per_prompt([[float(a.length) for a in row] for row in drawn[name]], chosen)
        ended = per_prompt([[float(a.ended) for a in row] for row in drawn[name]], chosen)
        found: dict[str, Any] = {"kl": kl, "length": intervals.mean(lengths), "eos_rate": intervals.mean(ended)}
        for judge, tables in judged.items():
            means = per_prompt(tables[name], chosen)
            found[judge] = intervals.mean(means)
            found[f"{judge}_interval"] = intervals.bootstrap_interval(means, seed=seed)
            if name != "sft":
                shares = [  # of wins over the SFT model's first answer, a tie half
                    intervals.mean([intervals.half_ties(row[i], sft[0]) for i in picks])
                    for row, picks, sft in zip(tables[name], chosen, tables["sft"], strict=True)
                ]
                found[f"win_rate_by_{judge}"] = intervals.mean(shares)
                found[f"win_rate_by_{judge}_interval"] = intervals.share_interval(shares, seed=seed)
        return found

    models = {"SFT": entry("sft", only, 0.0)}
    for name in ("rlhf", "dpo"):
        if name in drawn:
            models[TITLES[name]] = entry(name, only, intervals.mean([row[0].kl or 0.0 for row in drawn[name]]))
    for n in counts:
        chosen = [chosen_of(row, n) for row in judged["reward"]["best_of"]]
        models[f"best of {n}"] = entry("best_of", chosen, best_of_kl(n))
    return {"models": models}


def result_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Policies as rows; a number and its interval share a cell."""
    keys = [key for key in found["RLHF"] if not key.endswith("_interval")]
    lines: list[list[Any]] = [["", *(key.replace("_", " ") for key in keys)]]
    for name, entry in found.items():
        cells = [
            " ".join(evaluation_programs.cell_text(entry[k]) for k in (key, f"{key}_interval") if k in entry)
            for key in keys
        ]
        lines.append([name, *cells])
    return evaluation_programs.table(lines)


if __name__ == "__main__":
    sys.exit(run_program(main))
