"""train.py takes the flags of DeepSpeed-Chat's e2e_rlhf.py, and flags of its step programs are said or refused."""

import pytest

import train
from training.migrate import e2e
from training.migrate.e2e_scripts import SCRIPTS
from training.migrate.predecessors import others_of
from training.migrate.translate import OURS, translate
from training.utils import arguments
from training.utils.errors import UserError
from training.utils.run.recipes import flags_of, read_recipe


@pytest.fixture(autouse=True)
def _own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(e2e, "HOSTFILE", tmp_path / "hostfile")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")


def test_models_ranks_stages_and_folder():
    argv = "--actor-model facebook/opt-1.3b --reward-model=350m --deployment-type single_node --output-dir o --step 1 2"
    options, inputs, *_ = train.parse_flags([*argv.split(), "--actor-zero-stage", "1", "--reward-zero-stage", "3"])
    assert inputs.actor_model_name_or_path == "facebook/opt-1.3b"
    assert inputs.reward_model_name_or_path == "facebook/opt-350m"
    assert (options.num_gpus, options.output_dir, options.step) == (3, "o", [1, 2])
    assert inputs.step1_args == "--zero_stage 1" and inputs.step2_args == "--zero_stage 3"
    assert inputs.step3_args == "--actor_zero_stage 1 --critic_zero_stage 3"


def test_own_flags_beside_them_win():
    argv = ["--actor-zero-stage", "1", "--step1_args", "--zero_stage 2 --seed 3", "--deployment-type", "single_gpu"]
    options, inputs, *_ = train.parse_flags([*argv, "--num_gpus", "2"])
    assert options.num_gpus == 2
    assert inputs.step1_args == "--zero_stage 1 --zero_stage 2 --seed 3"


def test_several_hosts_are_named(tmp_path):
    with pytest.raises(UserError, match="--deployment-type multi_node: name the hosts: --hostfile HOSTS"):
        train.parse_flags(["--deployment-type", "multi_node"])
    options, *_ = train.parse_flags(["--deployment-type", "multi_node", "--hostfile", "mine"])
    assert (options.hostfile, options.num_gpus) == ("mine", None)
    e2e.HOSTFILE.write_text("a slots=1\n")
    assert train.parse_flags(["--deployment-type", "multi_node"])[0].hostfile == str(e2e.HOSTFILE)


def test_step_3_alone_takes_what_an_earlier_run_has_made(tmp_path):
    argv = ["--step", "3", "--actor-model", "125m"]
    with pytest.raises(UserError, match="--actor-model 125m is what an earlier step1 has made: give its folder"):
        train.parse_flags(argv)
    (tmp_path / "output" / "actor-models" / "125m").mkdir(parents=True)
    assert train.parse_flags(argv)[1].actor_model_name_or_path == "output/actor-models/125m"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--deployment-type", "cloud"], "--deployment-type cloud is none of single_gpu"),
        (["--actor-zero-stage", "4"], "--actor-zero-stage 4 is none of"),
        (["--actor-model"], "--actor-model: expected one value"),
        (["--actor_model", "--step", "1"], "--actor_model: expected one value"),
    ],
)
def test_values_out_of_range(argv, words):
    with pytest.raises(UserError, match=words):
        train.parse_flags(argv)


def test_its_command_is_translated_with_the_data_of_its_scripts():
    made = translate("python3 e2e_rlhf.py --actor-model facebook/opt-1.3b --deployment-type single_gpu")
    _, inputs, _, every = train.parse_flags(made.arguments)
    assert (inputs.actor_model_name_or_path, every.data_path) == ("facebook/opt-1.3b", ["Dahoas/rm-static"])
    assert inputs.reward_model_name_or_path == "facebook/opt-350m", "its default"
    assert any("single_gpu/run_1.3b.sh" in line for line in made.lines)


def parse(step, *argv):
    groups = {"step1": arguments.STEP1, "step2": arguments.STEP2}[step]
    return arguments.parse(groups, argv, prog="main.py", description="", others=others_of(step))


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--dropout", "0.1"], ["--dropout", "0.1 can not be had", "always off"]),
        (["--dropout"], ["--dropout", "expected one argument"]),
        (["--num_padding_at_beginning", "x"], ["--num_padding_at_beginning", "'x' is no whole number"]),
        (["--num_padding_at_beginning", "--seed", "1"], ["--num_padding_at_beginning", "expected one argument"]),
        (
            ["--foo", "1", "--learning_rates", "2", "--bar"],
            ["unknown flags --foo", "--learning_rate?", "--bar", "migrate"],
        ),
        (["--deepspeed", "x"], ["unexpected argument 'x'"]),
    ],
)
def test_bad_flags_of_theirs_in_our_programs(argv, words):
    with pytest.raises(UserError) as raised:
        parse("step1", *argv)
    for word in words:
        assert word in str(raised.value)


def test_every_flag_of_theirs_is_taken_and_said():
    line = "--dropout 0.0 --deepspeed --local_rank=0 --learning-rate 1e-4 --tensorboard_path x --print_loss"
    line += " --seed 1 --seed 2"
    groups = parse("step1", *line.split())
    values = {name: value for group in groups for name, value in vars(group).items()}
    assert (values["learning_rate"], values["seed"]) == (1e-4, 2)
    told = arguments.told_others(line.split(), others_of("step1"))
    assert [line.split()[1] for line in told[:-1]] == ["--dropout", "--tensorboard_path", "--print_loss"]
    assert "python -m training.migrate" in told[-1]
    assert not arguments.told_others(["--seed", "1", "--local_rank=0"], others_of("step1"))
    assert len(arguments.told_others(["--deepspeed"], others_of("step1"))) == 1


@pytest.mark.parametrize(
    ("step", "deployment", "size"), [(step, *key) for step, scripts in SCRIPTS.items() for key in scripts]
)
def test_a_script_s_step_is_what_its_own_command_would_be(step, deployment, size):
    """train.py's flags of a step, those of its recipe before them, against the translation of the script's command."""
    models = {"--actor-model": "facebook/opt-1.3b", "--reward-model": "350m"}
    models["--reward-model" if step == 2 else "--actor-model"] = size
    e2e.HOSTFILE.write_text("a slots=3\n")
    given = " ".join(f"{flag} {name}" for flag, name in models.items())
    found = translate(f"python e2e_rlhf.py {given} --deployment-type {deployment}")
    values = dict(zip(found.arguments, found.arguments[1:], strict=False))
    ours, roles = OURS[f"step{step}"], {3: "--actor_model_name_or_path A --critic_model_name_or_path C"}
    start = [*flags_of(read_recipe("start")[1][f"step{step}"], []), *roles.get(step, "--model_name_or_path M").split()]
    parsed = [
        arguments.parse(ours.groups, argv, prog="p", description="")
        for argv in (
            [*start, "--data_path", values["--data_path"], "--data_split", values["--data_split"],
             *values[f"--step{step}_args"].split()],
            translate(
                f"deepspeed --num_gpus {values.get('--num_gpus', '1')} "
                f"{ours.script} {roles.get(step, '--model_name_or_path M')} {SCRIPTS[step][deployment, size]}",
                "DeepSpeed-Chat",
            ).arguments,
        )
    ]  # fmt: skip
    assert parsed[0] == parsed[1]


def test_stages_of_e2e_rlhf_count_before_a_script_s_and_an_unknown_script_is_named():
    command = "python e2e_rlhf.py --actor-model 13b --reward-model 350m --deployment-type single_node"
    found = translate(f"{command} --actor-zero-stage 2")
    args = dict(zip(found.arguments, found.arguments[1:], strict=False))
    assert (
        args["--step3_args"].endswith(" --actor_zero_stage 2") and "--actor_learning_rate 5e-4" in args["--step3_args"]
    )
    found = translate(command.replace("13b", "30b"))
    assert "--step1_args" not in found.arguments and "--step2_args" in found.arguments
    assert any("single_node/run_30b.sh of step 1: translate it" in line for line in found.lines)
    assert "--step1_args '" in translate(command).text()


def test_alpaca_rlhf_s_steps_have_its_own_constants_there():
    line = "python alpaca_rlhf/deepspeed_chat/train.py --actor-model 1.3b --deployment-type"
    made = translate(f"{line} single_gpu")
    args = dict(zip(made.arguments, made.arguments[1:], strict=False))
    assert "--kl_coef 0.02" in args["--step3_args"] and "normalize_reward" not in args["--step3_args"]
    assert args["--data_split"] == "4,4,2" and "lora_learning_rate" not in args["--step1_args"]
    assert "2,4,4" in translate(f"{line} single_node").arguments, "its scripts for more GPUs say so"
