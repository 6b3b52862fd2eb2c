"""DeepSpeed-Chat's commands of 2023, when flags of its step 3 had other names, are its own."""

import pytest

from tests.migrate.commands import values_of
from training.migrate.translate import translate

ROLES = "--actor_model_name_or_path A --critic_model_name_or_path C"
LLAMA = (
    f"deepspeed --master_port 12346 main.py --data_path Dahoas/rm-static --data_split 2,4,4 {ROLES} "
    "--num_padding_at_beginning 1 --per_device_generation_batch_size 1 --per_device_training_batch_size 1 "
    "--generation_batch_numbers 2 --ppo_epochs 1 --max_answer_seq_len 256 --num_train_epochs 1 "
    "--disable_actor_dropout --deepspeed --seed 1234 --enable_hybrid_engine --actor_lora_dim 64 --critic_lora_dim 64"
)
OLD = (
    f"deepspeed --master_port 12346 main.py {ROLES} --per_device_train_batch_size 8 --generation_batch_numbers 3 "
    "--per_device_mini_train_batch_size 4 --disable_actor_dropout --disable_critic_dropout --actor_lora_dim 8"
)


@pytest.mark.parametrize("source", ["", "DeepSpeed-Chat"])
def test_a_script_with_names_of_both_times(source):
    made = translate(LLAMA, source)
    values = values_of(made)
    assert made.predecessor.name == "DeepSpeed-Chat"
    assert (values["--generation_batches"], values["--kl_coef"], values["--data_split"]) == (2, 0.1, "2,4,4")
    assert values["--actor_lora_learning_rate"] == 5e-4
    assert "--disable_actor_dropout: nothing to do here, dropout is always off" in made.lines
    assert not any("--source" in line for line in made.lines), "alpaca-rlhf never had its flags"


def test_a_command_that_fits_both_says_whose_it_is():
    made = translate(OLD)
    values = values_of(made)
    sizes = ("--per_device_generation_batch_size", "--per_device_training_batch_size", "--generation_batches")
    assert tuple(values[name] for name in sizes) == (8, 4, 3)
    assert (made.predecessor.name, values["--kl_coef"], values["--actor_lora_learning_rate"]) == (
        "DeepSpeed-Chat",
        0.1,
        0,
    )
    assert (
        made.lines[0]
        == "taken for DeepSpeed-Chat's, whose defaults and constants count; else give --source alpaca-rlhf"
    )
    assert any("give --kl_coef 0.02" in line for line in made.lines)
    other = translate(OLD, "alpaca-rlhf")
    assert (other.predecessor.name, values_of(other)["--kl_coef"]) == ("alpaca-rlhf", 0.02)
    by_path = translate(OLD.replace("main.py", "/x/alpaca_rlhf/training/step3_rlhf_finetuning/main.py"))
    assert by_path.predecessor.name == "alpaca-rlhf"


@pytest.mark.parametrize("step", ["step1_supervised_finetuning", "step2_reward_model_finetuning"])
def test_dropout_of_the_first_steps(step):
    made = translate(f"deepspeed training/{step}/main.py --model_name_or_path A --disable_dropout", "DeepSpeed-Chat")
    assert "--disable_dropout: nothing to do here, dropout is always off" in made.lines
