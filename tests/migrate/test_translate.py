"""Commands of other projects become commands here with the same values; what can not be had is one line."""

import dataclasses
import os

import pytest

from tests.migrate import commands
from tests.tiny import tiny_tokenizer
from training.migrate.__main__ import filled
from training.migrate.deepspeed_chat import DEEPSPEED_CHAT
from training.migrate.program import as_text
from training.migrate.shell.command import read_command
from training.migrate.shell.words import quoted
from training.migrate.translate import OURS, ranks_of, translate
from training.utils.data.template import configure_chat_template, render_text
from training.utils.errors import UserError
from training.utils.run.folders import deepspeed_launcher

STEP1, STEP2, STEP3 = (
    f"training/{name}/main.py"
    for name in ("step1_supervised_finetuning", "step2_reward_model_finetuning", "step3_rlhf_finetuning")
)
ROLES = "--actor_model_name_or_path A --critic_model_name_or_path C"


def values_of(text, source=""):
    """Our flag -> its value in the translated command."""
    return commands.values_of(translate(text, source))


def test_given_values_their_defaults_and_their_constants():
    values = values_of(f"deepspeed {STEP3} {ROLES} --generation_batches 2 --critic_learning_rate 1e-5 --deepspeed")
    assert values["--critic_learning_rate"] == 1e-5
    assert values["--generation_batches"] == 2
    assert (values["--data_path"], values["--data_split"]) == (["Dahoas/rm-static"], "2,4,4")
    assert values["--num_warmup_steps"] == [100]
    assert values["--per_device_training_batch_size"] == 16
    assert (values["--kl_coef"], values["--whiten_advantages"], values["--normalize_reward"]) == (0.1, False, False)
    assert (values["--missing_eos_penalty"], values["--dtype"]) == (0.0, "fp16")


def test_alpaca_rlhf_has_names_defaults_and_constants_of_its_own():
    text = f"deepspeed --num_gpus 2 /x/alpaca_rlhf/{STEP3} {ROLES} --per_device_mini_train_batch_size 4"
    values = values_of(text)
    assert values["--per_device_generation_batch_size"] == 16 and values["--per_device_training_batch_size"] == 4
    assert (values["--kl_coef"], values["--data_split"], values["--normalize_reward"]) == (0.02, "4,4,2", True)
    assert translate(text).launcher == ["--num_gpus", "2"]


def test_adapters_have_their_scale_and_their_learning_rate():
    names = ("--actor_lora_learning_rate", "--critic_lora_learning_rate", "--lora_alpha")
    line = f"deepspeed {STEP3} {ROLES} --actor_lora_dim 128 --critic_lora_learning_rate 1e-3"
    values = values_of(line)
    assert tuple(values[name] for name in names) == (5e-4, 0.0, 1), "no adapters of the critic: no rate of theirs"
    one = values_of(f"deepspeed {STEP1} --model_name_or_path A --lora_dim 8 --lora_learning_rate 3e-4")
    assert (one["--lora_learning_rate"], one["--lora_alpha"], one["--only_optimize_lora"]) == (3e-4, 1, False)
    before = values_of(f"deepspeed /x/alpaca_rlhf/{STEP1} --model_name_or_path A --lora_dim 8 --learning_rate 3e-4")
    assert (before["--lora_learning_rate"], before["--lora_alpha"]) == (0.0, 1), "one rate for all in May 2023"
    assert values_of(f"deepspeed {STEP1} --model_name_or_path A")["--lora_alpha"] == 0


@pytest.mark.parametrize(
    ("given", "generation", "accumulation", "passes"),
    [
        ("--gradient_accumulation_steps 16", 16, 16, 1),
        ("--gradient_accumulation_steps 4 --ppo_epochs 2", 2, 2, 1),
        ("--gradient_accumulation_steps 2 --per_device_training_batch_size 4", 1, 2, 1),
        ("--gradient_accumulation_steps 4 --ppo_epochs 2 --generation_batches 2", 2, 2, 1),
        ("--gradient_accumulation_steps 1 --ppo_epochs 3", 1, 1, 3),
    ],
)
def test_accumulation_over_iterations_becomes_larger_iterations(given, generation, accumulation, passes):
    values = values_of(
        f"deepspeed {STEP3} {ROLES} --per_device_generation_batch_size 8 --per_device_training_batch_size 8 {given}"
    )
    names = ("--generation_batches", "--gradient_accumulation_steps", "--ppo_epochs")
    assert tuple(values[name] for name in names) == (generation, accumulation, passes)


def test_a_step_that_would_end_within_an_iteration_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="--gradient_accumulation_steps 3: an iteration has 1 .* nearest is 2"):
        translate(f"deepspeed {STEP3} {ROLES} --gradient_accumulation_steps 3 --ppo_epochs 2")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            f"deepspeed {STEP3} {ROLES} --actor_dropout 0.1",
            ["--actor_dropout", "0.1 can not be had", "dropout is always off"],
        ),
        (f"deepspeed {STEP3} {ROLES} --actor_zero_stage 4", ["--actor_zero_stage", "4 is none of 0, 1, 2, 3"]),
        (f"deepspeed {STEP3} {ROLES} --inference_tp_size 0", ["--inference_tp_size", "at least 1"]),
        (f"deepspeed {STEP3} {ROLES} --print_answers_interval --seed 1", ["--print_answers_interval", "expected 1"]),
        (
            f"deepspeed {STEP1} --foo --learning_rates 1 --bar 2",
            ["no flag --foo, --learning_rates (did you mean", "--bar"],
        ),
        (f"deepspeed {STEP1} --learning_rate nan", ["--learning_rate", "not finite"]),
        (f"deepspeed {STEP1} --model_name_or_path a b", ["unexpected argument 'b'"]),
        ("deepspeed main.py --model_name_or_path a", ["may be several steps' program"]),
        ("python other.py", ["other.py", "no program of DeepSpeed-Chat"]),
        ("ls -l", ["starts no Python program"]),
        ("python a.py; python b.py", ["starts 2 programs, a.py, b.py: give one"]),
        ("python -m verl.trainer.main_ppo --a", ["verl/trainer/main_ppo.py: no program of"]),
        (f"M=; deepspeed {STEP1} --model_name_or_path $M --seed 1", ["--model_name_or_path $M: that is empty there"]),
        (f"set --; deepspeed {STEP1} --seed 1 --data_path ${{1}}", ["--data_path ${1}: that is empty there"]),
        (f"deepspeed {STEP1} --eot_token 'a", ["No closing quotation"]),
        ("bash nowhere.sh out", ["nowhere.sh: no such file"]),
        (f"for s in 1 2; do deepspeed {STEP1} --seed $s; done", ["is started by a loop, 'for s in 1 2'"]),
        (f"for ((s=0; s<3; s++))\ndo\n  deepspeed {STEP1} --seed $s\ndone", ["is started by a loop"]),
        (f"while true; do if [ -f a ]; then deepspeed {STEP1}; fi; done", ["is started by a loop, 'while true'"]),
        (f"run() {{ deepspeed {STEP1} --seed $1; }}; run 1; run 2", ["run() is no launcher"]),
        (f"mpirun -np 4 python {STEP1}", ["mpirun is no launcher that is known here", "deepspeed --num_gpus"]),
        (f"accelerate launch --num_processes 8 --num_machines 2 {STEP1}", ["--num_machines 2", "--hostfile HOSTS"]),
        (f"accelerate launch --config_file a.yaml {STEP1}", ["--config_file a.yaml", "give --num_processes N"]),
        (f"colossalai run --nproc_per_node 4 --host a,b {STEP1}", ["--host a,b: name the hosts", "--hostfile HOSTS"]),
        (f"colossalai run --hostfile h --exclude a {STEP1}", ["--exclude a: name the hosts"]),
        (
            f"accelerate launch --num_processes 4 --mixed_precision bf16 {STEP1}",
            ["--mixed_precision bf16", "--dtype bf16"],
        ),
        (
            f"accelerate launch --num_processes 4 --use_deepspeed --zero-stage=3 --offload_param_device cpu {STEP1}",
            ["--use_deepspeed, --zero_stage 3, --offload_param_device cpu of accelerate", "--zero_stage 2, --offload"],
        ),
        (
            f"accelerate launch --num_processes 4 --use_fsdp --fsdp_offload_params true {STEP1}",
            ["--use_fsdp, --fsdp_of"],
        ),
        (f"torchrun --nproc_per_node cpu {STEP1}", ["--nproc_per_node cpu: give the number of ranks"]),
    ],
)
def test_what_can_not_be_had_is_one_line(text, words):
    with pytest.raises(UserError) as raised:
        translate(text)
    for word in words:
        assert word in str(raised.value)


def test_a_shells_line():
    command = read_command(
        "cd training/step1_supervised_finetuning && CUDA_VISIBLE_DEVICES=0 nohup deepspeed --master_port=1 "
        "--no_local_rank main.py --a 1 \\\n  --b=$HERE --c 'x y'  > log.txt 2>&1 &"
    )
    assert command.script == "training/step1_supervised_finetuning/main.py"
    assert command.environment == ["CUDA_VISIBLE_DEVICES=0"]
    assert command.launcher == ["--master_port=1", "--no_local_rank"]
    assert command.arguments == ["--a", "1", "--b=$HERE", "--c", "x y"]
    assert any("log.txt" in note for note in command.notes) and any("$HERE" in note for note in command.notes)


@pytest.mark.parametrize(
    ("text", "launcher", "environment"),
    [
        ("--num_gpus 2 x/main.py --a", ["--num_gpus", "2"], []),
        ("nohup sh run.sh --num_gpus 2 x/main.py --a > 1.log 2>&1 &", ["--num_gpus", "2"], []),
        ("sh run_inference.sh 1 x/main.py --a", [], ["CUDA_VISIBLE_DEVICES=1"]),
        ("python -u -m x.main --a", [], []),
        ("python -m torch.distributed.run --nproc_per_node 2 -m x.main --a", ["--num_gpus", "2"], []),
        ("deepspeed --num_gpus 2 --module x.main --a", ["--num_gpus", "2"], []),
        ("python -m nltk.downloader punkt; python -m pip install -e .; deepspeed x/main.py --a", [], []),
        ("python alpaca_rlhf/my_deepspeed.py --num_gpus 2 x/main.py --a", ["--num_gpus", "2"], []),
        ("torchrun --standalone --nproc_per_node=4 x/main.py --a", ["--num_gpus", "4"], []),
        ("python -m torch.distributed.run --nproc-per-node 4 x/main.py --a", ["--num_gpus", "4"], []),
        ("torchrun --master_port 9 x/main.py --a", ["--num_gpus", "1", "--master_port", "9"], []),
        ("python3 -u -m torch.distributed.launch --nproc_per_node=4 x/main.py --a", ["--num_gpus", "4"], []),
        ("accelerate launch --num_processes 4 --num_machines 1 x/main.py --a", ["--num_gpus", "4"], []),
        ("accelerate launch --num-processes=4 --config_file c x/main.py --a", ["--num_gpus", "4"], []),
        ("accelerate-launch --num_processes 4 x/main.py --a", ["--num_gpus", "4"], []),
        ("colossalai run --host localhost --nproc_per_node 4 x/main.py --a", ["--num_gpus", "4"], []),
        ("deepspeed -H h -i a:0,1 x/main.py --a", ["--hostfile", "h", "--include", "a:0,1"], []),
        ("accelerate launch --multi_gpu --num_processes 4 --mixed_precision no x/main.py --a", ["--num_gpus", "4"], []),
        ("python -m accelerate.commands.launch --num_processes 4 x/main.py --a", ["--num_gpus", "4"], []),
        ("sudo poetry run deepspeed --num_gpus 2 x/main.py --a", ["--num_gpus", "2"], []),
        ("A=1 uv run accelerate launch --num_processes 4 x/main.py --a", ["--num_gpus", "4"], ["A=1"]),
        ("for i in 1; do echo $i; done; deepspeed --num_gpus 2 x/main.py --a", ["--num_gpus", "2"], []),
        ("colossalai run --nproc_per_node 4 --hostfile h --master_port 9 x/main.py --a",
         ["--num_gpus", "4", "--hostfile", "h", "--master_port", "9"], []),
        ("deepspeed --include localhost:0,1 --bind_cores_to_rank x/main.py --a",
         ["--include", "localhost:0,1", "--bind_cores_to_rank"], []),
    ],
)  # fmt: skip
def test_launchers(text, launcher, environment):
    command = read_command(text, ["main.py"])
    assert (command.launcher, command.environment) == (launcher, environment)
    assert (command.script, command.arguments) == ("x/main.py", ["--a"])


def test_a_configuration_of_accelerate_s_counts(tmp_path):
    path, line = tmp_path / "a.yaml", f"accelerate launch --config_file {tmp_path / 'a.yaml'} {{}} x/main.py --a"
    path.write_text(
        "distributed_type: MULTI_GPU\ngpu_ids: 2,3\nmixed_precision: 'no'\nnum_processes: 2\nuse_cpu: false\n"
    )
    command = read_command(line.format(""))
    assert (command.launcher, command.environment) == (["--num_gpus", "2"], ["CUDA_VISIBLE_DEVICES=2,3"])
    assert read_command(line.format("--num_processes 1")).launcher == ["--num_gpus", "1"]
    for content, said in [
        ("mixed_precision: bf16\nnum_processes: 2", "--mixed_precision bf16 of accelerate"),
        ("deepspeed_config:\n  zero_stage: 3\nnum_processes: 2", "--deepspeed_config zero_stage of accelerate"),
        ("num_processes: 2\nnum_machines: 2", "--num_machines 2: on several hosts"),
        ("- 1", "a.yaml: not a configuration of accelerate's"),
    ]:
        path.write_text(content)
        with pytest.raises(UserError, match=said):
            read_command(line.format("--num_processes 2"))


def test_ranks_of_all_hosts_count(tmp_path):
    (tmp_path / "h").write_text("a slots=4\n# b\nc slots=4\n")
    for flags, ranks in [("", 4), ("--num_nodes 3", 12), (f"--hostfile {tmp_path / 'h'}", 8), ("--hostfile none", 0)]:
        assert ranks_of(read_command(f"deepspeed --num_gpus 4 {flags} x/main.py")) == ranks


@pytest.mark.parametrize("text", ["accelerate launch x/main.py", "torchrun --nproc-per-node=gpu x/main.py"])
def test_launchers_that_take_all_gpus(text):
    command = read_command(text)
    assert (command.launcher, command.all_gpus) == ([], True)
    assert any("--num_processes" in note for note in command.notes) == text.startswith("accelerate")


def test_a_script_with_variables(tmp_path):
    (tmp_path / "run.sh").write_text(
        "#!/bin/bash\n# it isn't much\nOUTPUT=$1\nZERO_STAGE=$2\n"
        'if [ "$OUTPUT" == "" ]; then\n    OUTPUT=./output\nfi\n'
        'if [ "$ZERO_STAGE" == "" ]; then\n    ZERO_STAGE=3\nfi\nmkdir -p $OUTPUT\nLr=5e-4\n'
        "deepspeed --num_gpus 1 main.py --actor_model_name_or_path A --critic_model_name_or_path C \\\n"
        "   --actor_learning_rate ${Lr} --actor_zero_stage $ZERO_STAGE --output_dir $OUTPUT &> $OUTPUT/training.log\n"
    )
    values = values_of(f"bash {tmp_path}/run.sh")
    assert (values["--actor_learning_rate"], values["--actor_zero_stage"]) == (5e-4, 3)
    assert values["--output_dir"] == "./output"


def test_words_for_the_shell():
    assert [quoted(word) for word in ("a", "$X/y", "a b", "$X y", "<|e|>", "~/x")] == [
        "a", "$X/y", "'a b'", '"$X y"', "'<|e|>'", "~/x"
    ]  # fmt: skip


def test_what_a_script_does_before_its_step_is_left_out():
    made = translate(f"python prepare.py --n 3\nX=\ndeepspeed {STEP1} --seed 1 --deepspeed $X \\\r\n --lora_dim 8")
    assert "prepare.py is left out: it is none of their steps" in made.lines
    assert {"--seed", "--lora_dim"} < set(made.arguments), "lines of a file of Windows' go on, too"


def test_a_flag_twice_dashes_and_our_own_flags():
    values = values_of(
        f"deepspeed {STEP1} --seed 1 --learning-rate=2e-5 --eval_data_path x.jsonl y.jsonl --seed 2 --no-offload"
    )
    assert (values["--seed"], values["--learning_rate"]) == (2, 2e-5)
    assert values["--eval_data_path"] == ["x.jsonl", "y.jsonl"]


def test_flags_of_ours_in_their_command_win_over_what_is_made_of_theirs():
    text = f"deepspeed {STEP1} --lora_dim 8"
    assert values_of(text)["--lora_alpha"] == 1
    assert values_of(f"{text} --lora_alpha 32")["--lora_alpha"] == 32


def test_two_names_of_a_flag_agree_or_are_refused():
    text = f"deepspeed {STEP3} --actor_model_name_or_path a --critic_model_name_or_path b --unsupervised_dataset_name x"
    with pytest.raises(UserError, match="_dataset_name x and --unsupervised_data_path y are the same flag"):
        translate(f"{text} --unsupervised_data_path y")
    assert values_of(f"{text} --unsupervised_data_path x")["--unsupervised_data_path"] == ["x"]


def test_a_number_that_others_hang_on_must_be_known():
    for text in (
        f"deepspeed {STEP1} --lora_dim $RANK",
        f"deepspeed {STEP3} {ROLES} --per_device_training_batch_size $RANK",
    ):
        with pytest.raises(UserError, match="\\$RANK: other flags depend on it, so write its value"):
            translate(text)
    assert "--seed $SEED" in translate(f"deepspeed {STEP1} --seed $SEED").text()


def test_deepspeed_without_flags_takes_all_gpus(monkeypatch):
    launcher = deepspeed_launcher()
    assert os.path.isfile(launcher[0]), "a command that is printed can be started where no environment is active"
    assert translate(f"deepspeed {STEP1}").start() == [*launcher, STEP1]
    assert translate(f"python {STEP1}").start() == [*launcher, "--num_gpus", "1", STEP1]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert ranks_of(read_command(f"deepspeed {STEP1}")) == 3
    assert ranks_of(read_command(f"python {STEP1}")) == 1


def test_what_the_shell_fills_in_is_filled_in_where_it_is_started(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("RUN", "first")
    monkeypatch.delenv("NOT_SET", raising=False)
    assert [filled(word) for word in ("~/$RUN", "a~", "1e-5")] == ["/home/me/first", "a~", "1e-5"]
    with pytest.raises(UserError, match="\\$NOT_SET is not set here"):
        filled("out/$NOT_SET")


def test_every_flag_that_is_mapped_is_one_of_ours():
    for program in DEEPSPEED_CHAT.programs:
        ours = OURS.get(program.ours)
        own = {f"--{f.name}" for group in (ours.groups if ours else ()) for f in dataclasses.fields(group)}
        for flag in [*(other.ours for other in program.flags.values()), *program.constants]:
            assert not own or not flag or flag in own, (program.title, flag)


def test_numbers_are_not_rounded():
    assert as_text([9.65e-6, 1, "a", 0.1 + 0.2]) == ["9.65e-06", "1", "a", "0.3"]


def test_what_theirs_does_without_being_asked_is_said():
    dropout = "not the same: dropout is off; there the model's own counts without --dropout 0.0"
    assert dropout in translate(f"deepspeed {STEP1} --seed 1").lines
    for given in ("--dropout 0.0", "--disable_dropout"):
        assert dropout not in translate(f"deepspeed {STEP1} {given}").lines
    lines = translate(f"deepspeed {STEP3} {ROLES} --actor_dropout 0.0 --unsupervised_dataset_name a").lines
    assert [line for line in lines if "dropout is off" in line] == [
        "not the same: dropout is off; there the critic's own counts without --critic_dropout 0.0"
    ]
    assert any("the pre-training mix counts; there with --unsupervised_dataset_config_name" in line for line in lines)


def test_conversations_can_be_written_as_there():
    """The text of a row of rm-static, and the prompt that its answer is sampled from."""
    assert any("needs --chat_template hh" in line for line in translate("python chat.py --path m").lines)
    given = translate(f"deepspeed {STEP2} --chat_template hh")
    assert "hh" in given.arguments and not any("chat_template" in line for line in given.lines)
    tokenizer = tiny_tokenizer()
    configure_chat_template(tokenizer, "hh")
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    written = render_text(tokenizer, turns)
    assert written.removeprefix(tokenizer.bos_token or "") == f"\n\nHuman: Hi\n\nAssistant: Hello{tokenizer.eos_token}"
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert written.startswith(prompt) and prompt.endswith("\n\nHuman: Hi\n\nAssistant:")
