"""Flags: the predecessors' command lines parse, ranges hold, --help is grouped and short enough to read."""

import dataclasses
import importlib
import json
import re

import pytest

from tests.bad_inputs import STEPS
from training.migrate.predecessors import others_of
from training.step3_rlhf_finetuning import arguments as rlhf_arguments
from training.utils import arguments
from training.utils.engine import zero_config
from training.utils.engine.zero_config import deepspeed_config, merge
from training.utils.errors import UserError

# alpaca-rlhf's README, with its machine's paths shortened
SEED_LINES = {
    1: "--sft_only_data_path MultiTurnAlpaca --data_output_path /rlhf/tmp/ "
    "--model_name_or_path decapoda-research/llama-7b-hf "
    "--per_device_train_batch_size 8 --per_device_eval_batch_size 8 --max_seq_len 512 --learning_rate 3e-4 "
    "--num_train_epochs 1 --gradient_accumulation_steps 8 --num_warmup_steps 100 --output_dir /rlhf/actor --lora_dim 8 "
    "--lora_module_name q_proj,k_proj --only_optimize_lora --deepspeed --zero_stage 2",
    2: "--data_output_path /rlhf/tmp/ --model_name_or_path decapoda-research/llama-7b-hf --num_padding_at_beginning 0 "
    "--per_device_train_batch_size 4 --per_device_eval_batch_size 64 --learning_rate 5e-4 --num_train_epochs 1 "
    "--gradient_accumulation_steps 1 --num_warmup_steps 0 --zero_stage 2 --deepspeed --output_dir /rlhf/critic "
    "--lora_dim 8 --lora_module_name q_proj,k_proj --only_optimize_lora",
    3: "--data_output_path /rlhf/tmp/ --actor_model_name_or_path /rlhf/actor/ --tokenizer_name_or_path "
    "decapoda-research/llama-7b-hf --critic_model_name_or_path /rlhf/critic --actor_zero_stage 2 --critic_zero_stage 2 "
    "--num_padding_at_beginning 0 --per_device_train_batch_size 4 --per_device_mini_train_batch_size 4 --ppo_epochs 2 "
    "--actor_learning_rate 9.65e-6 --critic_learning_rate 5e-6 --gradient_accumulation_steps 1 --deepspeed "
    "--actor_lora_dim 8 --actor_lora_module_name q_proj --critic_lora_dim 8 --critic_lora_module_name q_proj,k_proj "
    "--only_optimize_lora --output_dir /rlhf/final",
}
# DeepSpeed-Chat's flags about data, with its own dataset names and defaults, and those that have nothing left to do
CHAT_DATA = (
    "--data_path Dahoas/rm-static Dahoas/full-hh-rlhf yitingxie/rlhf-reward-datasets --data_split 2,4,4 "
    "--data_output_path /tmp/data_files/ --num_padding_at_beginning 1 --add_eot_token --enable_tensorboard "
    "--tensorboard_path logs --compute_fp32_loss --seed 1234 --deepspeed"
)
CHAT_STEP_1 = " --sft_only_data_path MultiTurnAlpaca --eot_token <|endoftext|> --print_loss"
MOST_FLAGS = {1: 48, 2: 46, "dpo": 50, 3: 86}


def parse(step, line):
    groups = importlib.import_module(STEPS[step]).ARGUMENTS
    others = others_of(f"step{step}") | (rlhf_arguments.ALIASES if step == 3 else {})
    parsed = arguments.parse(groups, line.split(), prog="main.py", description="d", others=others)
    return {f.name: getattr(g, f.name) for g in parsed for f in dataclasses.fields(g)}


@pytest.mark.parametrize("step", [1, 2, 3])
def test_deepspeed_chat_data_flags_parse(step):
    values = parse(step, CHAT_DATA + (CHAT_STEP_1 if step == 1 else ""))
    names = ["Dahoas/rm-static", "Dahoas/full-hh-rlhf", "yitingxie/rlhf-reward-datasets"]
    assert (values["data_path"], values["data_split"]) == (names, "2,4,4")
    assert values["data_output_path"] == "/tmp/data_files/"
    assert step != 1 or values["sft_only_data_path"] == ["MultiTurnAlpaca"]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_alpaca_rlhf_command_lines_parse(step):
    values = parse(step, SEED_LINES[step])
    assert values["only_optimize_lora"] is True
    if step == 3:
        assert values["per_device_generation_batch_size"] == values["per_device_training_batch_size"] == 4
        assert values["critic_lora_module_name"] == "q_proj,k_proj"
    else:
        assert (values["lora_dim"], values["zero_stage"]) == (8, 2)


def test_a_name_that_means_something_else_in_another_step_is_told():
    argv = ["--per_device_train_batch_size=4", "--ppo_epochs", "1"]
    line, defaults = arguments.told_others(argv, others_of("step3"))
    assert "--per_device_train_batch_size is --per_device_generation_batch_size here: rollouts" in line
    assert "training.migrate" in defaults
    assert not arguments.told_others(["--per_device_generation_batch_size", "4"], others_of("step3"))


def test_step_3_takes_the_reward_model_by_the_name_of_the_other_programs():
    assert parse(3, "--reward_model_name_or_path none")["critic_model_name_or_path"] == "none"


def test_two_names_of_a_flag_agree_or_are_refused():
    reward, critic = "--reward_model_name_or_path", "--critic_model_name_or_path"
    with pytest.raises(UserError, match=f"^{reward} a and {critic} b are the same flag here, with different values"):
        parse(3, f"{reward} a {critic} b")
    assert parse(3, f"{critic} b {reward}=b")["critic_model_name_or_path"] == "b"
    assert parse(3, f"{critic} a {critic} b")["critic_model_name_or_path"] == "b"
    with pytest.raises(UserError, match="--num_iterations 3 and --test_stop_step 4 are the same flag"):
        parse(3, "--num_iterations 3 --test-stop-step 4")


@pytest.mark.parametrize("step", [1, 2, 3])
def test_help_is_grouped_and_not_endless(step, capsys):
    with pytest.raises(SystemExit) as stop:
        parse(step, "--help")
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "\nData:" in text and "\nOutput:" in text
    groups = importlib.import_module(STEPS[step]).ARGUMENTS
    flags = [f.name for g in groups for f in dataclasses.fields(g) if f.name != "local_rank"]  # the launcher's
    assert len(flags) <= MOST_FLAGS[step]


def test_accepted_flags_take_their_value_with_them():
    values = parse(1, "--num_padding_at_beginning 1 --seed 7")
    assert values["seed"] == 7


def test_a_name_is_never_abbreviated():
    with pytest.raises(UserError, match="--learning_rate"):
        parse(1, "--learning 1e-3")


def test_the_users_json_wins_and_nested_keys_stay():
    ours = deepspeed_config(zero_stage=3, dtype="bf16", overrides={"zero_optimization": {"reduce_bucket_size": 7}})
    assert ours["zero_optimization"]["stage"] == 3
    assert ours["zero_optimization"]["reduce_bucket_size"] == 7
    assert merge({"a": {"b": 1}}, {"a": 2}) == {"a": 2}


def test_stage_0_runs_as_stage_1_and_bf16_accumulates_in_fp32():
    config = deepspeed_config(zero_stage=0, dtype="bf16")
    assert config["zero_optimization"]["stage"] == 1
    assert config["data_types"]["grad_accum_dtype"] == "fp32"


@pytest.mark.parametrize("key", sorted(zero_config._OWNED))
def test_what_a_deepspeed_file_may_not_set_is_refused_by_flags_that_every_step_has(key):
    with pytest.raises(UserError, match=f"{key} is not for the file") as refused:
        zero_config.read_user_config(json.dumps({key: 1}))
    for step in (1, 2, "dpo", 3):
        groups = importlib.import_module(STEPS[step]).ARGUMENTS
        known = {field.name for group in groups for field in dataclasses.fields(group)}
        assert set(re.findall(r"--(\w+)", str(refused.value))) - {"deepspeed_config"} <= known, step


def test_states_on_nvme_are_warned_of_where_no_checkpoint_is_asked_for(capsys):
    asked = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/tmp"}}}
    assert zero_config.read_user_config(json.dumps(asked)) == asked
    assert "warning: optimizer states on NVMe can not be saved" in capsys.readouterr().out


def test_a_tilde_behind_an_equals_sign_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    words = ["--output_dir=~/run", "--model_name_or_path=~/m", "--system_message=~", "--data_output_path", "~/d"]
    values = vars_of(arguments.parse(arguments.STEP1, words, prog="", description=""))
    assert [values[name] for name in ("output_dir", "model_name_or_path", "system_message", "data_output_path")] == [
        f"{tmp_path}/run", f"{tmp_path}/m", "~", "~/d"
    ]  # fmt: skip


@pytest.mark.parametrize("words", [["--system_message", "\udcff a"], ["--data_path", "demo", "no\ud800"]])
def test_half_a_character_is_no_text_of_a_flag(words):
    with pytest.raises(UserError, match=rf"{words[0]} holds half a character, \\ud"):
        arguments.parse(arguments.STEP1, words, prog="", description="")


def vars_of(groups):
    return {name: value for group in groups for name, value in vars(group).items()}


def test_of_a_list_that_is_given_twice_it_is_said_that_the_last_counts(capsys):
    arguments._note.cache_clear()
    line = "--data_path a b --eval_data_path c --learning_rate 1 --data-path d.json --learning_rate 2"
    for _ in range(2):  # programs parse early, and again
        assert parse(1, line)["data_path"] == ["d.json"]
    said = capsys.readouterr().out
    assert said == "note: --data_path is given more than once, and the last one counts: --data_path d.json\n"
