"""Every line of DeepSpeed-Chat's and alpaca-rlhf's scripts and pages means here what it meant there, value by value."""

import pytest

from tests.migrate.commands import CHAT, NAMES, cases, lines_of, outcome, values_of
from training.migrate.predecessors import PREDECESSORS
from training.migrate.translate import Translated, translate

TRAINING = ("1", "2", "dpo", "3")
# Lines as their scripts and pages have them, one or more of each kind; all are in the file that `cases` reads, too
LINES = [
    ("DeepSpeed-Chat", "1", "--data_path Dahoas/rm-static Dahoas/full-hh-rlhf --data_split 2,4,4 --model_name_or_path "
     "facebook/opt-13b --per_device_train_batch_size 4 --learning_rate 1e-4 --num_train_epochs 16 --zero_stage 3 "
     "--gradient_checkpointing --lora_dim 128 --lora_module_name decoder.layers. --deepspeed --output_dir out"),
    ("DeepSpeed-Chat", "1", "--model_name_or_path facebook/opt-1.3b --gradient_accumulation_steps 8 --deepspeed"),
    ("DeepSpeed-Chat", "1", "--model_name_or_path m --lora_dim 8 --only_optimize_lora --lora_learning_rate 1e-3"),
    ("DeepSpeed-Chat", "2", "--model_name_or_path facebook/opt-350m --num_padding_at_beginning 1 --weight_decay 0.1 "
     "--dropout 0.0 --gradient_accumulation_steps 4 --zero_stage 0 --enable_tensorboard --tensorboard_path t"),
    ("DeepSpeed-Chat", "dpo", "--model_name_or_path facebook/opt-350m --weight_decay 0.1 --dropout 0.0 --beta 0.2 "
     "--zero_stage 3 --offload_reference_model --learning_rate 5e-5 --deepspeed --print_loss"),
    ("DeepSpeed-Chat", "dpo", "--model_name_or_path m --label_smoothing 0.1 --offload_reference_model --deepspeed"),
    ("DeepSpeed-Chat", "3", "--actor_model_name_or_path A --critic_model_name_or_path C --num_padding_at_beginning 1 "
     "--gradient_accumulation_steps 2 --deepspeed --actor_lora_dim 128 --enable_hybrid_engine --actor_dropout 0.0"),
    ("DeepSpeed-Chat", "3", "--actor_model_name_or_path A --critic_model_name_or_path C --actor_zero_stage 3 "
     "--critic_zero_stage 3 --offload_reference_model --per_device_generation_batch_size 1 --print_answers "
     "--per_device_training_batch_size 1 --enable_mixed_precision_lora --inference_tp_size 8 --seed 1234"),
    ("DeepSpeed-Chat", "3", "--actor_model_name_or_path A --critic_model_name_or_path C --offload_reward_model "
     "--per_device_generation_batch_size 8 --gradient_accumulation_steps 16 --ppo_epochs 2 --only_optimize_lora"),
    ("alpaca-rlhf", "1", "--sft_only_data_path MultiTurnAlpaca --data_output_path /tmp/x --model_name_or_path llama "
     "--gradient_accumulation_steps 8 --num_warmup_steps 100 --lora_dim 8 --lora_module_name q_proj,k_proj "
     "--only_optimize_lora --deepspeed --zero_stage 2"),
    ("alpaca-rlhf", "2", "--model_name_or_path llama --num_padding_at_beginning 0 --per_device_train_batch_size 4 "
     "--disable_dropout --lora_dim 8 --lora_module_name q_proj,k_proj --only_optimize_lora --deepspeed"),
    ("alpaca-rlhf", "3", "--actor_model_name_or_path A --tokenizer_name_or_path llama --critic_model_name_or_path C "
     "--per_device_train_batch_size 4 --per_device_mini_train_batch_size 4 --ppo_epochs 2 --only_optimize_lora "
     "--actor_lora_dim 8 --actor_lora_module_name q_proj --critic_lora_dim 8 --generation_batch_numbers 2 "
     "--disable_actor_dropout --unsupervised_dataset_name text.jsonl --unsup_coef 3"),
]  # fmt: skip
# Their names of what decides the rows of an optimizer step, in step 3
SIZES = {
    "DeepSpeed-Chat": ("per_device_generation_batch_size", "per_device_training_batch_size", "generation_batches"),
    "alpaca-rlhf": ("per_device_train_batch_size", "per_device_mini_train_batch_size", "generation_batch_numbers"),
}
STEP_SIZE = {f"--{name}" for name in (*SIZES["DeepSpeed-Chat"], "gradient_accumulation_steps", "ppo_epochs")}


def flags_of(text):
    """A line as the file has it: flag -> value, True for a switch."""
    found: dict[str, object] = {}
    for word in text.split():
        if word.startswith("--"):
            found[last := word] = True
        else:
            found[last] = word if found[last] is True else f"{found[last]} {word}"
    return found


def program_of(predecessor, step):
    found = next(p for p in PREDECESSORS if p.name == predecessor)
    return next(program for program in found.programs if CHAT[step].endswith(program.paths))


def theirs(other, flags, name):
    """The value that a line has there: parsed as their program does, else its default."""
    if name not in flags:
        return bool(other.default) if other.kind is bool else other.default
    if other.kind is bool:
        return True
    return [other.kind(word) for word in str(flags[name]).split()] if other.many else other.kind(str(flags[name]))


def check_same(predecessor, step, flags):
    """Compare every value that a line has there with what the translated command has here."""
    program = program_of(predecessor, step)
    made = translate(lines_of(predecessor, step, flags)[0])
    assert made.predecessor.name == predecessor
    ours = values_of(made)
    there = {name: theirs(other, flags, name) for name, other in program.flags.items()}
    passed_over = set(STEP_SIZE) if step == "3" else set()
    for role in ("", "actor_", "critic_"):
        if not there.get(f"--{role}lora_dim"):
            passed_over |= {f"--{role}lora_module_name", f"--{role}lora_learning_rate"}
    adapters = any(there.get(f"--{role}lora_dim") for role in ("", "actor_", "critic_"))
    passed_over |= set() if adapters else {"--only_optimize_lora"}
    for model, role in (("reference", "actor"), ("reward", "critic")):
        passed_over |= {f"--offload_{model}_model"} if step == "3" and there[f"--{role}_zero_stage"] < 3 else set()
    if step == "dpo" and there["--zero_stage"] < 3:
        passed_over |= {"--offload_reference_model"}
    passed_over |= {"--unsup_coef"} if not there.get("--unsupervised_dataset_name") else set()
    passed_over |= {"--num_iterations"}
    compared = 0
    for name, other in program.flags.items():
        value = there[name]
        if other.ours and other.ours not in passed_over and value is not None:
            here = ours[other.ours]
            assert here == (value if other.many or not isinstance(here, list) else [value]), (name, value, here)
            compared += 1
    for flag, constant in program.constants.items():
        assert ours[flag] == constant.value, flag
    assert compared > 10
    if adapters:
        assert ours["--lora_alpha"] == 1
    if step == "3":
        check_optimizer_steps(predecessor, there, ours)


def check_optimizer_steps(predecessor, there, ours):
    """Rows of an optimizer step, and steps for a number of responses, are those that they were there."""
    generated, trained, batches = (there[f"--{name}"] for name in SIZES[predecessor])
    trained = min(trained, generated)
    rows = generated * batches
    steps_there = rows // trained * there["--ppo_epochs"] / there["--gradient_accumulation_steps"] / rows
    rows_here = ours["--per_device_generation_batch_size"] * ours["--generation_batches"]
    micro = ours["--per_device_training_batch_size"]
    steps_here = rows_here // micro // ours["--gradient_accumulation_steps"] * ours["--ppo_epochs"] / rows_here
    assert steps_here == pytest.approx(steps_there, rel=1e-12), "optimizer steps for each response"
    if ours["--ppo_epochs"] == there["--ppo_epochs"]:
        assert micro * ours["--gradient_accumulation_steps"] == trained * there["--gradient_accumulation_steps"]


@pytest.mark.parametrize(("predecessor", "step", "line"), LINES)
def test_a_line_of_each_kind(predecessor, step, line):
    check_same(predecessor, step, flags_of(line))


def test_a_changed_value_is_seen():
    predecessor, step, line = LINES[1]
    flags = flags_of(line)
    there = {name: theirs(other, flags, name) for name, other in program_of(predecessor, step).flags.items()}
    assert there["--learning_rate"] == 1e-3
    made = translate(lines_of(predecessor, step, flags)[0] + " --learning_rate 1e-4")
    assert values_of(made)["--learning_rate"] != there["--learning_rate"]


@pytest.mark.skipif(not cases(), reason="commands.jsonl is not here (TRIPOD_CASES, or ../shared/cases)")
def test_every_line_of_the_file_is_translated_or_refused_in_one_line():
    same = 0
    for predecessor, step, flags in cases():
        found = outcome(predecessor, step, flags)
        assert isinstance(found, Translated) or (found and "\n" not in found), (predecessor, step, flags)
        if predecessor in SIZES and step in TRAINING:
            assert isinstance(found, Translated), found
            check_same(predecessor, step, flags)
            same += 1
    assert same >= 70
    assert set(NAMES.values()) == {predecessor for predecessor, _, _ in cases()}
