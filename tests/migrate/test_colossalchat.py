"""ColossalChat's commands, value by value against what its own scripts would have done with them."""

import dataclasses
import json

import pytest

from tests.migrate import commands
from training.migrate.colossalchat import COLOSSALCHAT
from training.migrate.shell.command import read_command
from training.migrate.translate import OURS, translate
from training.utils.errors import UserError


def values_of(text):
    """Our flag -> its value in the translated command."""
    return commands.values_of(translate(text))


# As its page prints the lines of supervised fine-tuning, remarks included
PAGE = """colossalai run --nproc_per_node 4 --master_port 28534 --hostfile ./hostfile train_sft.py \\
    --pretrain $PRETRAINED_MODEL_PATH \\
    --tokenizer_dir $PRETRAINED_TOKENIZER_PATH \\
    --dataset ${dataset[@]} \\
    --save_interval 5000 \\
    --save_path $SAVE_DIR \\
    --config_file $CONFIG_FILE \\
    --plugin PLUGIN \\
    --batch_size 4 \\
    --max_epochs 1 \\
    --accumulation_steps 4 \\  # a remark
    --lr 2e-5 \\
    --max_len 2048 \\
    MORE
    --use_wandb
"""
# The values that such a line has there, and those of train_sft.py where it has none
SFT_MEANS = {
    "--model_name_or_path": "$PRETRAINED_MODEL_PATH",
    "--data_path": ["${dataset[@]}"],
    "--output_dir": "$SAVE_DIR",
    "--save_every": 5000,
    "--per_device_train_batch_size": 4,
    "--gradient_accumulation_steps": 4,
    "--num_train_epochs": 1,
    "--learning_rate": 2e-5,
    "--max_seq_len": 2048,
    "--dtype": "bf16",
    "--weight_decay": 0.1,
    "--num_warmup_steps": 0,
    "--lr_scheduler_type": "cosine",
    "--train_on_prompts": False,
    "--deepspeed_config": "",
    "--gradient_checkpointing": False,
    "--attn_implementation": "sdpa",
    "--lora_dim": 0,
}


@pytest.mark.parametrize(
    ("plugin", "more", "means"),
    [
        ("gemini", "", {"--zero_stage": 3, "--offload": False}),
        ("gemini_auto", "", {"--zero_stage": 3, "--offload": True}),
        ("zero2", "", {"--zero_stage": 2, "--offload": False}),
        ("zero2_cpu", "", {"--zero_stage": 2, "--offload": True}),
        ("ddp", "", {"--zero_stage": 0, "--offload": False}),
        ("3d", "--tp 1 --zero_stage 1 --zero_cpu_offload", {"--zero_stage": 1, "--offload": True}),
        ("3d", "--tp 2 --zero_stage 2", {"--zero_stage": 2, "--tensor_parallel": 2}),
        ("3d", "--tp 1 --sp 2 --sp_mode all_to_all --enable_sequence_parallelism --zero_stage 1",
         {"--zero_stage": 1, "--tensor_parallel": 1, "--sequence_parallel": 2}),
        ("3d", "--tp 2 --sp 4 --enable_sequence_parallelism", {"--tensor_parallel": 2, "--sequence_parallel": 1}),
        ("zero2", "--sp 2", {"--zero_stage": 2, "--sequence_parallel": 1}),
        ("zero2", "--grad_checkpoint", {"--zero_stage": 2, "--gradient_checkpointing": True}),
        ("zero2", "--use_flash_attn", {"--zero_stage": 2, "--attn_implementation": "flash_attention_2"}),
        ("zero2", "--grad_clip 0.5", {"--zero_stage": 2, "--deepspeed_config": '{"gradient_clipping": 0.5}'}),
        ("zero2", "--warmup_steps 7 --disable_loss_mask",
         {"--zero_stage": 2, "--num_warmup_steps": 7, "--train_on_prompts": True}),
        ("zero2", "--tp 4", {"--zero_stage": 2}),
    ],
)  # fmt: skip
def test_supervised_fine_tuning(plugin, more, means):
    text = PAGE.replace("PLUGIN", plugin).replace("MORE", f"{more} \\")
    found, wanted = values_of(text), {"--offload": False} | SFT_MEANS | means
    assert {name: found[name] for name in wanted} == wanted
    assert translate(text).launcher == ["--num_gpus", "4", "--master_port", "28534", "--hostfile", "./hostfile"]


def test_lora_by_its_rank_and_by_its_file(tmp_path):
    wanted = {"--lora_dim": 32, "--lora_alpha": 1, "--only_optimize_lora": True, "--lora_module_name": "all-linear"}
    text = "train_sft.py --pretrain A --dataset d.jsonl --plugin zero2"
    found = values_of(f"torchrun --nproc_per_node 1 {text} --lora_rank 32")
    assert {name: found[name] for name in wanted} == wanted
    config = tmp_path / "lora.json"
    config.write_text(json.dumps({"r": 8, "lora_alpha": 16, "target_modules": ["q_proj", "k_proj"]}))
    found = values_of(f"python {text} --lora_config {config}")
    names = ("--lora_dim", "--lora_alpha", "--lora_dropout", "--lora_module_name", "--only_optimize_lora")
    assert [found[name] for name in names] == [8, 16, 0.1, "q_proj,k_proj", True]


def test_the_reward_model():
    found = values_of(
        "colossalai run --nproc_per_node 8 --hostfile hostfile train_rm.py --pretrain A --tokenizer_dir A "
        "--dataset P/arrow/part-00000 P/arrow/part-00001 --plugin zero2 --save_interval 1000 --save_dir R "
        "--config_file R.json --max_epochs 3 --accumulation_steps 1 --batch_size 8 --lr 5e-6 --mixed_precision bf16 "
        "--grad_clip 1.0 --weight_decay 0.01 --warmup_steps 40 --grad_checkpoint --loss_fn log_exp"
    )
    wanted = {
        "--data_path": ["P/arrow/part-00000", "P/arrow/part-00001"], "--num_train_epochs": 3, "--loss": "log_exp",
        "--per_device_train_batch_size": 8, "--gradient_accumulation_steps": 1, "--learning_rate": 5e-6,
        "--dtype": "bf16", "--weight_decay": 0.01, "--num_warmup_steps": 40, "--gradient_checkpointing": True,
        "--max_seq_len": 2048, "--zero_stage": 2, "--output_dir": "R", "--deepspeed_config": "",
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted


PPO = (
    "colossalai run --nproc_per_node 8 --hostfile hostfile --master_port 31312 train_ppo.py --pretrain A "
    "--rm_pretrain A --tokenizer_dir T --rm_checkpoint_path R --prompt_dataset p.jsonl --num_episodes 2000 "
    "--plugin zero2 --lr 9e-6 --mixed_precision bf16"
)
# What train_ppo.py has in its code, or where such a line says nothing
PPO_MEANS = {
    "--actor_model_name_or_path": "A", "--critic_model_name_or_path": "R", "--tokenizer_name_or_path": "T",
    "--data_path": ["p.jsonl"], "--num_iterations": 2000, "--actor_zero_stage": 2, "--critic_zero_stage": 2,
    "--offload": False, "--actor_learning_rate": 9e-6, "--critic_learning_rate": 9e-6, "--dtype": "bf16",
    "--actor_weight_decay": 0.1, "--critic_weight_decay": 0.1, "--num_warmup_steps": [50], "--kl_coef": 0.1,
    "--max_answer_seq_len": 256, "--max_prompt_seq_len": 2048 - 256, "--temperature": 0.7, "--top_k": 50,
    "--top_p": 1.0, "--clip_ratio": 0.2, "--clip_value": 0.2, "--clip_reward": 5.0, "--gamma": 1.0,
    "--gae_lambda": 0.95, "--whiten_advantages": False, "--normalize_reward": False, "--missing_eos_penalty": 0.0,
    "--advantage": "gae", "--samples_per_prompt": 1, "--output_dir": "actor_checkpoint_prompts",
    "--unsupervised_data_path": [], "--entropy_coef": 0.0, "--target_kl": 0.0, "--chat_template": "",
}  # fmt: skip
BATCHES = (
    "--per_device_generation_batch_size", "--generation_batches", "--per_device_training_batch_size",
    "--gradient_accumulation_steps", "--ppo_epochs", "--num_iterations",
)  # fmt: skip


def test_ppo():
    found = values_of(PPO + " --num_collect_steps 2 --num_update_steps 1 --experience_batch_size 4 "
                      "--train_batch_size 4 --accumulation_steps 2")  # fmt: skip
    assert {name: found[name] for name in PPO_MEANS} == PPO_MEANS
    assert [found[name] for name in BATCHES] == [4, 2, 4, 2, 1, 2000]


@pytest.mark.parametrize(
    ("collect", "experience", "train", "accumulation", "passes", "means"),
    [
        (1, 8, 4, 2, 1, (8, 1, 4, 2, 1, 2000)),  # 8 = 4 x 2
        (4, 8, 4, 8, 1, (8, 4, 4, 8, 1, 2000)),  # 32 = 4 x 8
        (4, 2, 8, 1, 3, (8, 1, 8, 1, 3, 2000)),  # two steps' rollouts decoded together: 8 rows of 4 x 2
        (3, 4, 6, 2, 1, (12, 1, 6, 2, 1, 2000)),
        (2, 4, 4, 1, 2, (4, 2, 4, 1, 2, 2000)),  # two optimizer steps in a pass
        (1, 8, 8, 4, 1, (8, 4, 8, 4, 1, 500)),  # a step over four episodes
        (1, 8, 8, 4, 2, (8, 2, 8, 2, 1, 1000)),  # a step over two episodes, whose second passes repeat the first
    ],
)
def test_the_buffer_of_an_episode_is_an_iteration(collect, experience, train, accumulation, passes, means):
    found = values_of(
        f"{PPO} --num_collect_steps {collect} --num_update_steps {passes} --experience_batch_size {experience} "
        f"--train_batch_size {train} --accumulation_steps {accumulation}"
    )
    assert tuple(found[name] for name in BATCHES) == means
    decoded, batches, size, steps, epochs, iterations = means
    of_ours = decoded * batches // size * epochs // steps * iterations  # optimizer steps of a run
    assert of_ours == collect * experience // train * passes * 2000 // accumulation
    assert decoded * batches * iterations == collect * experience * 2000, "responses of a run"


def test_grpo():
    found = values_of(
        PPO.replace("train_ppo.py", "train_grpo.py").replace("zero2", "zero2_cpu") + " --num_collect_steps 8 "
        "--num_update_steps 1 --experience_batch_size 1 --train_batch_size 4 --accumulation_steps 4 --kl_coef 0.01 "
        "--warmup_steps 40 --max_length 2000 --max_seq_len 1700 --inference_batch_size 8 --grad_clip 0.1"
    )
    assert [found[name] for name in BATCHES] == [8, 8, 4, 4, 1, 2000]
    wanted = {
        "--advantage": "grpo", "--samples_per_prompt": 8, "--kl_coef": 0.01, "--max_prompt_seq_len": 300,
        "--num_warmup_steps": [40], "--offload": True, "--clip_reward": 0.0, "--temperature": 1.0,
        "--deepspeed_config": '{"gradient_clipping": 0.1}',
    }  # fmt: skip
    assert {name: found[name] for name in wanted} == wanted


@pytest.mark.parametrize("name", ["--ptx_dataset", "--pretrain_dataset"])
def test_the_pre_training_mix_has_the_same_share(name):
    steps = "--num_collect_steps 1 --num_update_steps 1 --experience_batch_size 8 --train_batch_size 8 "
    text = f"{PPO} {steps} --accumulation_steps 1 {name} mix.jsonl --ptx_coef"
    found = values_of(f"{text} 0.2")
    assert found["--unsupervised_data_path"] == ["mix.jsonl"]
    share = found["--unsup_coef"] / (1 + found["--unsup_coef"])
    assert share == pytest.approx(0.2)
    assert values_of(f"{text} 0.0")["--unsupervised_data_path"] == []


@pytest.mark.parametrize(
    ("text", "means"),
    [
        ("train_dpo.py --beta 0.2", {"--loss": "sigmoid", "--beta": 0.2, "--gradient_accumulation_steps": 1}),
        ("train_dpo.py --loss_type simpo_loss", {"--loss": "simpo", "--beta": 0.1, "--simpo_gamma": 1.4}),
        ("train_orpo.py --lam 0.5", {"--loss": "orpo", "--beta": 0.5, "--gradient_accumulation_steps": 8}),
        ("train_kto.py --auto_weight", {"--loss": "kto", "--beta": 0.1, "--learning_rate": 5e-6}),
    ],
)
def test_preference_losses(text, means):
    found = values_of(f"colossalai run --nproc_per_node 4 {text} --pretrain A --dataset p.jsonl")
    assert {name: found[name] for name in means} == means


def test_chat_programs():
    made = translate("python inference.py --model_path M --conversation_template_config c.json --max_new_tokens 64")
    assert made.ours is OURS["chat"]
    assert made.arguments == ["--path", "M", "--chat_template", "c.json", "--max_new_tokens", "64",
                              "--temperature", "0.7", "--top_p", "1"]  # fmt: skip
    made = translate("python web_chatbot/server.py M --quant 8bit --http_port 80")
    assert made.ours is OURS["page"]
    assert made.arguments == ["--path", "M", "--port", "80", "--quantize", "int8"]


def test_preparing_data_is_looking_at_it(tmp_path):
    (tmp_path / "c.json").write_text("{}")
    text = "python prepare_dataset.py --type prompt --data_input_dirs a,b --tokenizer_dir T --max_length 300 "
    made = translate(f"{text} --conversation_template_config {tmp_path}/c.json --data_jsonl_output_dir o/jsonl")
    assert made.ours is OURS["preview"] and made.arguments == [
        "--model_name_or_path", "T", "--data_path", "a", "b", "--step", "3", "--max_prompt_seq_len", "300",
        "--chat_template", f"{tmp_path}/c.json", "--write", "o/jsonl.jsonl",
    ]  # fmt: skip
    assert "is not there" in translate(f"{text} --conversation_template_config gone.json").text()
    with pytest.raises(UserError, match="--type kto"):
        translate(text.replace("prompt", "kto"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train_sft.py --pretrain A --dataset d --plugin 3d --pp 4", ["--pp 4", "no pipeline", "--batch_size 1 for 4"]),
        ("train_sft.py --pretrain A --dataset d --plugin 3d --sp 4 --pp 2", ["--pp 2: no pipeline parallelism here"]),
        ("train_rm.py --pretrain A --dataset d --plugin 3d --tp 2 --sp 3 --sp_mode all_to_all",
         ["--tp 2 --sp 3: --tensor_parallel and --sequence_parallel do not go together", "--sp 6 without --tp"]),
        (PPO + " --plugin 3d --sp 4 --pp 2", ["--pp 2 --sp 4", "no pipeline and sequence parallelism in step 3"]),
        (PPO + " --plugin 3d --pp 4 --tp 2 --experience_batch_size 8", ["--experience_batch_size 2 for 8"]),
        (PPO, ["2 x --experience_batch_size 16 = 32", "16 x --accumulation_steps 8 = 128", "nearest is "
               "--accumulation_steps 2"]),
        (PPO + " --train_batch_size 5", ["32 responses, no multiple of --train_batch_size 5", "--train_batch_size 4"]),
        (PPO + " --reward_functions gsm8k_reward_fn", ["--reward_functions gsm8k_reward_fn", "--reward_function FILE"]),
        (PPO + " --max_length 256", ["--max_length 256 leaves 0 tokens"]),
        (PPO.replace("--rm_checkpoint_path R", ""), ["--rm_checkpoint_path is missing"]),
        ("train_sft.py --dataset d", ["--pretrain is missing"]),
        ("train_sft.py --pretrain A --dataset d --tokenizer_dir B", ["--tokenizer_dir B is not the model's folder"]),
        ("train_sft.py --pretrain A --dataset d --checkpoint_path C", ["--checkpoint_path", "--resume"]),
        ("train_sft.py --pretrain A --dataset d --lora_config /no.json", ["--lora_config /no.json can not be read"]),
        ("train_sft.py --pretrain A --dataset d --batch_size 0", ["--batch_size", "at least 1"]),
        ("train_sft.py --pretrain A --dataset d --plugin zero9", ["--plugin", "zero9 is none of gemini"]),
        ("train_sft.py --OTHER_CONFIGURATIONS", ["no flag --OTHER_CONFIGURATIONS"]),
    ],
)  # fmt: skip
def test_what_can_not_be_had_is_one_line_with_the_nearest(text, words):
    with pytest.raises(UserError) as raised:
        translate(text if text.startswith("colossalai") else f"colossalai run --nproc_per_node 4 {text}")
    assert "\n" not in str(raised.value)
    for word in words:
        assert word in str(raised.value)


def test_the_nearest_to_pipeline_parallelism_has_the_same_rows_in_a_step():
    there = 1 * 4 * 4  # groups of 4 ranks x batch_size x accumulation_steps
    found = values_of(PAGE.replace("PLUGIN", "gemini").replace("MORE", "--batch_size 1 \\"))
    assert 4 * found["--per_device_train_batch_size"] * found["--gradient_accumulation_steps"] == there


def test_a_script_with_arrays():
    command = read_command(
        'PROJECT_NAME="sft"\ndeclare -a dataset=(\n    /d/part-00000\n    "/d/part-00001"  # the second\n)\n'
        "colossalai run --nproc_per_node 8 --num_nodes 1 --hostfile ./hostfile train_sft.py --dataset ${dataset[@]} "
        "--save_path $PROJECT_NAME --grad_clip 0.1\\\n    --lr 1\n"
    )
    assert command.arguments == [
        "--dataset", "/d/part-00000", "/d/part-00001", "--save_path", "sft", "--grad_clip", "0.1", "--lr", "1"
    ]  # fmt: skip


def test_every_flag_that_is_mapped_is_one_of_ours():
    for program in COLOSSALCHAT.programs:
        ours = OURS.get(program.ours)
        own = {f"--{f.name}" for group in (ours.groups if ours else ()) for f in dataclasses.fields(group)}
        for flag in [*(other.ours for other in program.flags.values()), *program.constants]:
            assert not own or not flag or flag in own, (program.title, flag)


def test_gradient_clipping_reaches_the_configuration():
    from training.utils.engine.zero_config import deepspeed_config, read_user_config

    text = values_of("python train_sft.py --pretrain A --dataset d --grad_clip 0.1")["--deepspeed_config"]
    config = deepspeed_config(zero_stage=2, dtype="fp32", overrides=read_user_config(text))
    assert config["gradient_clipping"] == 0.1
    with pytest.raises(UserError, match="line 1 column 2"):
        read_user_config("{gradient_clipping: 1}")


@pytest.mark.parametrize(
    ("rows", "width", "shares"),
    [(100, "", 2), (1001, "", 2), (1001, "--plugin 3d --tp 2", 1), (1001, "--plugin 3d --sp 2", 1)],
)
def test_the_default_warm_up_is_a_share_of_the_steps(tmp_path, rows, width, shares):
    data = tmp_path / "a.jsonl"
    data.write_text('{"prompt": "a", "response": "b"}\n' * rows)
    text = f"colossalai run --nproc_per_node 2 train_sft.py --pretrain A --dataset {data} --batch_size 1"
    found = values_of(f"{text} --accumulation_steps 4 {width}")
    assert found["--num_warmup_steps"] == int(3 * 0.025 * (rows // shares // 4))
    made = translate(f"{text} {width}".replace("train_sft", "--hostfile none train_sft"))
    assert "--num_warmup_steps" not in made.arguments
    assert any(
        "the ranks of all hosts can not be counted here: add --num_warmup_steps N" in line for line in made.lines
    )


@pytest.mark.parametrize(
    ("program", "step"),
    [
        ("train_sft.py --strategy colossalai_zero2", "step1_supervised_finetuning"),
        ("examples/train_reward_model.py --strategy=ddp", "step2_reward_model_finetuning"),
        ("train_prompts.py --model opt", "step3_rlhf_finetuning"),
    ],
)
def test_a_program_of_2023_names_the_one_here(program, step):
    with pytest.raises(UserError, match=rf"\.py of ColossalAI's applications/Chat .* flags of training/{step}/main.py"):
        translate(f"torchrun --nproc_per_node 2 {program} --pretrain m --dataset d")
