"""Convert a reward model of another project into a folder of step 2, statistics included.

    python -m training.migrate.reward_model --path THEIRS --data_path preferences.jsonl --output_dir output/converted \
        --tokenizer_name_or_path BASE

Theirs are a backbone and a head of their own in PyTorch's files: `rwtransformer.*` and `v_head.weight` of
DeepSpeed-Chat (until October 2023, and of alpaca-rlhf, `rwtranrsformer.*`), `gpt_neox.*` and `out_proj` of
OpenAssistant's Pythia models, `model.*` and `value_head` of ColossalChat. The last have no config.json: that of
--tokenizer_name_or_path is taken, and --chat_template is the conversation template that their data were prepared with.
What is written loads in plain transformers as a sequence classifier. The rewards of all pairs of --data_path give
reward_stats.json. A bias of their head moves all rewards alike; it is left out, and the statistics are of the rewards
without it.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from training.utils import arguments
from training.utils.arguments import AUTO, DTYPE_HELP, PRECISIONS, DataArguments, flag
from training.utils.errors import UserError, run_program
from training.utils.run.files import read_object
from training.utils.run.runtime import prepare_runtime


@dataclass
class ConversionArguments:
    """Conversion"""

    path: str = flag("", "the folder of the reward model to convert")
    tokenizer_name_or_path: str = flag("", "its tokenizer (default: the same folder)")
    output_dir: str = flag("", "the folder to write")
    end_token: str = flag(
        "", "what ends an answer (default: <|endoftext|> if the tokenizer has it whole, else its EOS)"
    )
    max_seq_len: int = flag(512, "longest prompt plus response of a pair, in tokens", minimum=8)
    per_device_eval_batch_size: int = flag(16, "pairs that are scored together", minimum=1)
    dtype: str = flag(AUTO, DTYPE_HELP, choices=PRECISIONS)

    def __post_init__(self) -> None:
        for name in ("path", "output_dir"):
            if not getattr(self, name):
                raise UserError(f"--{name} is missing")
        if (Path(self.output_dir) / "config.json").exists():
            raise UserError(f"--output_dir {self.output_dir}: a model is there already")


ARGUMENTS = [ConversionArguments, DataArguments]


def parse_flags(argv: Sequence[str]) -> list[Any]:
    """The flags; without torch."""
    prog = "python -m training.migrate.reward_model"
    parsed = arguments.parse(ARGUMENTS, argv, prog=prog, description=__doc__ or "")
    check_folder(parsed[0])
    return parsed


def check_folder(args: ConversionArguments) -> None:
    """Refuse a folder that is not there, or has no weights or no configuration.

    Raises:
        UserError: names the flag.
    """
    folder = Path(args.path).expanduser()
    if not folder.is_dir():
        raise UserError(f"--path {args.path}: no such folder")
    if not weight_files(folder):
        below = next((f"; give {file.parent}" for file in sorted(folder.glob("*/pytorch_model*.bin"))), "")
        raise UserError(f"--path {args.path}: no weights there (pytorch_model.bin){below}")
    config = config_folder(args) / "config.json"
    if not config.is_file():
        raise UserError(f"--path {args.path}: no config.json there; name the base model's folder, which has one, with "
                        "--tokenizer_name_or_path")  # fmt: skip
    read_object(config)


def weight_files(folder: Path) -> list[Path]:
    """The files with a model's weights."""
    return sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def config_folder(args: ConversionArguments) -> Path:
    """Where the configuration is: beside the weights, else beside the tokenizer."""
    folder, base = Path(args.path).expanduser(), Path(args.tokenizer_name_or_path).expanduser()
    return folder if (folder / "config.json").is_file() or not (base / "config.json").is_file() else base


if __name__ == "__main__":
    arguments.answer_early(parse_flags)
prepare_runtime()

import torch  # noqa: E402  threads and PATH must be set before
from safetensors.torch import load_file  # noqa: E402
from transformers import AutoConfig, AutoModelForSequenceClassification  # noqa: E402

from training.step2_reward_model_finetuning.pairs import held_out_rewards, pair_weights  # noqa: E402
from training.step2_reward_model_finetuning.preference import pair_metrics  # noqa: E402
from training.utils.data.batches import rankings_of  # noqa: E402
from training.utils.data.prepare import prepare_data  # noqa: E402
from training.utils.data.template import stop_token_ids  # noqa: E402
from training.utils.engine import precision  # noqa: E402
from training.utils.engine.frozen import load_frozen_scorer  # noqa: E402
from training.utils.metrics import write_summary  # noqa: E402
from training.utils.model.export import save_model  # noqa: E402
from training.utils.model.forward import TokenScorer  # noqa: E402
from training.utils.model.loading import reason_of, remote_code  # noqa: E402
from training.utils.model.reward_stats import RewardStats  # noqa: E402
from training.utils.model.tokenizer import load_tokenizer  # noqa: E402
from training.utils.run.distributed import init_distributed, say  # noqa: E402


@dataclass(frozen=True)
class Layout:
    """How a predecessor keeps and reads its reward models.

    Attributes:
        name: for messages.
        backbone: what the names of the backbone's weights begin with.
        head: the module with one output.
        user, assistant: what stands before a turn; an answer ends with the end token, a question with ``after_user``.
            Empty where only a template of its own says how conversations were written.
    """

    name: str
    backbone: str
    head: str
    user: str = ""
    assistant: str = ""
    after_user: str = ""


LAYOUTS = (
    Layout("DeepSpeed-Chat", "rwtransformer.", "v_head", "\n\nHuman: ", "\n\nAssistant: "),
    Layout("DeepSpeed-Chat of 2023", "rwtranrsformer.", "v_head", "\n\nHuman: ", "\n\nAssistant: "),
    Layout("OpenAssistant", "gpt_neox.", "out_proj", "<|prompter|>", "<|assistant|>", "<|endoftext|>"),
    Layout("ColossalChat", "model.", "value_head"),
)
MODEL_TYPES = {"gpt_neox_reward_model": "gpt_neox"}  # OpenAssistant's own name for the family
END_OF_TEXT = "<|endoftext|>"  # DeepSpeed-Chat's and OpenAssistant's
# Buffers that older transformers saved among the weights, which newer ones compute
COMPUTED = (".rotary_emb.inv_freq", ".attn.bias", ".attention.bias", ".masked_bias")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a model folder's files, by name; nothing but tensors is read.

    Raises:
        UserError: a file holds other things too.
    """
    weights: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        try:
            found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
        except (UnpicklingError, RuntimeError, ValueError, EOFError, OSError) as error:
            raise UserError(f"{file}: can not be read as tensors alone: {reason_of(error)}") from error
        weights |= found
    return weights


def layout_of(weights: dict[str, torch.Tensor], folder: Path) -> Layout:
    """Whose reward model it is.

    Raises:
        UserError: none that is known.
    """
    for layout in LAYOUTS:
        if f"{layout.head}.weight" in weights and any(name.startswith(layout.backbone) for name in weights):
            return layout
    known = "; ".join(f"{layout.backbone}* and {layout.head}.weight ({layout.name})" for layout in LAYOUTS)
    raise UserError(f"{folder}: not a reward model that is known here: its weights are not {known}")


def read_config(folder: Path) -> Any:
    """The backbone's configuration, with one output.

    Raises:
        UserError: it can not be read, or rewards are not of the last token.
    """
    try:
        values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        family = MODEL_TYPES.get(values["model_type"], values["model_type"])
        config = type(AutoConfig.for_model(family)).from_dict({**values, "model_type": family})
    except Exception as error:  # as in `load_config`
        raise UserError(f"{folder}: its config.json can not be used: {reason_of(error)}") from error
    if values.get("pooling", "last") != "last":
        raise UserError(f"{folder}: rewards by pooling {values['pooling']!r}; here they are of the last token")
    config.num_labels = 1
    return config


def converted(weights: dict[str, torch.Tensor], layout: Layout, config: Any, folder: Path) -> Any:
    """The sequence classifier that these weights are.

    Raises:
        UserError: weights are missing, or have no place in it.
    """
    width = weights[f"{layout.head}.weight"].shape[0]
    if width != 1:
        raise UserError(f"{folder}: its head has {width} outputs, a reward model has one")

    def bare() -> Any:
        """The model without memory for its weights."""
        with torch.device("meta"):
            return AutoModelForSequenceClassification.from_config(config, **remote_code())

    try:
        model = bare()
    except (ImportError, ValueError) as error:
        raise UserError(f"{folder}: {reason_of(error)}") from error
    prefix = f"{model.base_model_prefix}."
    state = {
        prefix + name.removeprefix(layout.backbone): tensor
        for name, tensor in weights.items()
        if name.startswith(layout.backbone) and not name.endswith(COMPUTED)
    }
    state["score.weight"] = weights[f"{layout.head}.weight"]
    widest = functools.reduce(torch.promote_types, {tensor.dtype for tensor in state.values()})
    state = {name: tensor.to(widest) for name, tensor in state.items()}
    embeddings = next(n for n, p in model.named_parameters() if p is model.get_input_embeddings().weight)
    if embeddings in state and state[embeddings].shape[0] != config.vocab_size:  # theirs are filled up to a multiple
        config.vocab_size = state[embeddings].shape[0]
        model = bare()
    places = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = sorted(name for name in state.keys() | places if name not in state or places.get(name) != state[name].shape)
    if wrong:
        raise UserError(f"{folder}: {len(wrong)} weights are not those of {type(model).__name__}, such as {wrong[0]}")
    model.load_state_dict(state, assign=True)
    return model


def their_template(tokenizer: Any, layout: Layout, end: str) -> str:
    """The chat template that writes conversations as they trained on them, with ``end`` behind each answer.

    A space before an answer belongs to it.
    """
    starts = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
    turns = {"user": (layout.user, layout.after_user), "assistant": (layout.assistant, end)}
    branches = "".join(
        f"{{%- elif message['role'] == {role!r} -%}}{{{{- {before!r} + message['content'] + {after!r} -}}}}"
        for role, (before, after) in turns.items()
    )
    return (
        (f"{{{{- {tokenizer.bos_token!r} -}}}}" if starts else "")
        + "{%- for message in messages -%}{%- if message['role'] == 'system' -%}{{- message['content'] -}}"
        + branches
        + "{%- endif -%}{%- endfor -%}"
        + f"{{%- if add_generation_prompt -%}}{{{{- {layout.assistant.rstrip(' ')!r} -}}}}{{%- endif -%}}"
    )


def load_their_tokenizer(folder: Path, layout: Layout, args: ConversionArguments, template: str) -> Any:
    """The tokenizer, with their chat template unless another one is given.

    Raises:
        UserError: the folder does not say which tokens are special, or nothing how conversations were written.
    """
    if not (template or layout.user):
        raise UserError(f"{folder}: a reward model of {layout.name}; give the template that its data were prepared "
                        "with: --chat_template FILE")  # fmt: skip
    if not args.tokenizer_name_or_path and not (folder / "tokenizer_config.json").is_file():
        raise UserError(
            f"{folder}: no tokenizer_config.json, so its special tokens are not known; name the base model's tokenizer "
            "with --tokenizer_name_or_path"
        )
    tokenizer = load_tokenizer(args.tokenizer_name_or_path or str(folder))
    if not template:
        end = args.end_token or (END_OF_TEXT if END_OF_TEXT in tokenizer.get_vocab() else tokenizer.eos_token)
        tokenizer.chat_template = their_template(tokenizer, layout, end)
        say(f"answers are read as {layout.name} wrote them, with {end} at their end; see --end_token, --chat_template")
    return tokenizer


def main(argv: Sequence[str]) -> int:
    """Convert; returns the exit code."""
    args, data = parse_flags(argv)
    folder, output = Path(args.path).expanduser(), Path(args.output_dir).expanduser()
    config, weights = read_config(config_folder(args)), read_weights(folder)
    layout = layout_of(weights, folder)
    tokenizer = load_their_tokenizer(folder, layout, args, data.chat_template)
    model = converted(weights, layout, config, folder)
    if max(tokenizer.get_vocab().values()) >= config.vocab_size:
        raise UserError(f"the tokenizer has ids above the model's {config.vocab_size} embeddings; give its own")
    pairs = prepare_data("pairs", data, tokenizer, max_length=args.max_seq_len, seed=0, hold_out=False).train
    device, settled = init_distributed(), precision.settle(args)
    output.mkdir(parents=True, exist_ok=True)
    save_model(TokenScorer(model), tokenizer, output, stop_ids=stop_token_ids(tokenizer))
    pad_id = tokenizer.pad_token_id
    scorer = load_frozen_scorer(str(output), dtype=args.dtype, pad_token_id=pad_id, device=device)
    rewards = held_out_rewards(scorer, pairs, args.per_device_eval_batch_size, pad_id, device)
    best = [rewards[mine.start] for mine in rankings_of(pairs)]  # as step 2: of a ranking its best answer counts
    stats, metrics = RewardStats.of(best, args.dtype), pair_metrics(rewards, pair_weights(pairs))
    if line := stats.line():
        say(line)
    stats.write(output)
    say(
        f"accuracy {metrics['accuracy']:.3f} on pairs of {len(best)} prompts; rewards of preferred answers: mean "
        f"{stats.mean:.3f}, standard deviation {stats.std:.3f}"
    )
    write_summary(output, {"converted_from": str(folder.resolve()), "accuracy_after": metrics["accuracy"],
                           "held_out": len(best), precision.SUMMARY_KEY: settled})  # fmt: skip
    say(f"written to {output}: a reward model for --reward_model_name_or_path")
    return 0


if __name__ == "__main__":
    sys.exit(run_program(main))
