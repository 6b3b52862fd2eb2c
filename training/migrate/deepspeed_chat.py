"""DeepSpeed-Chat (microsoft/DeepSpeedExamples, applications/DeepSpeed-Chat, of February 2025): flags and defaults."""

from __future__ import annotations

from training.migrate import e2e
from training.migrate.program import Constant, Predecessor, Program, Translation
from training.utils.arguments import SCHEDULES, OtherFlag

ALWAYS_FP32 = "losses and log-probs are always computed in fp32"
TEMPLATE_END = "every response ends with the template's own end token"
NO_DROPOUT = "dropout is always off, 0.0 is the one value there is: with it the first PPO ratio would not be 1"
DROPOUT_OFF = OtherFlag(bool, said="dropout is always off")
OF_2023 = "its name until August 2023"
TENSORBOARD = "TensorBoard is on by default, see --report_to"
SPEED_ONLY = "it changed the speed alone"


def same(flag: str, kind: type, default: object = None, **more: object) -> dict[str, OtherFlag]:
    """A flag that has the same name and meaning here."""
    return {f"--{flag}": OtherFlag(kind, default, f"--{flag}", **more)}  # type: ignore[arg-type]


# What all of its training programs take
COMMON: dict[str, OtherFlag] = {
    **same("data_path", str, ["Dahoas/rm-static"], many=True),
    **same("data_split", str, "2,4,4"),
    **same("data_output_path", str),
    **same("num_train_epochs", int, 1, minimum=1),
    **same("gradient_accumulation_steps", int, 1, minimum=1),
    **same("lr_scheduler_type", str, "cosine", choices=SCHEDULES),
    **same("output_dir", str),
    **same("seed", int, 1234, minimum=0),
    **same("offload", bool),
    **same("dtype", str, "fp16", choices=("fp16", "bf16", "fp32", "auto")),
    **same("only_optimize_lora", bool),
    "--local_rank": OtherFlag(int, -1, said="launchers say it in the environment too"),
    "--deepspeed": OtherFlag(bool, said="DeepSpeed is always used"),
    "--compute_fp32_loss": OtherFlag(bool, said=ALWAYS_FP32),
    "--enable_tensorboard": OtherFlag(bool, said=TENSORBOARD),
    "--tensorboard_path": OtherFlag(str, said="TensorBoard's files lie in the output folder"),
    "--add_eot_token": OtherFlag(bool, said=TEMPLATE_END),
    "--num_padding_at_beginning": OtherFlag(int, 1, said="padding is known from explicit masks", minimum=0),
}

DISABLE_DROPOUT = {"--disable_dropout": DROPOUT_OFF}  # until October 2023, then --dropout

# Steps 1 and 2, and DPO
FINE_TUNING = {
    **COMMON,
    **same("model_name_or_path", str),
    **same("per_device_train_batch_size", int, 16, minimum=1),
    **same("per_device_eval_batch_size", int, 16, minimum=1),
    **same("max_seq_len", int, 512, minimum=8),
    **same("weight_decay", float, 0.0, minimum=0),
    **same("num_warmup_steps", int, 0, minimum=0),
    **same("gradient_checkpointing", bool),
    **same("zero_stage", int, 0, choices=(0, 1, 2, 3)),
    **same("lora_dim", int, 0, minimum=0),
    **same("lora_module_name", str, "decoder.layers."),
    **same("lora_learning_rate", float, 5e-4, minimum=0),
    "--dropout": OtherFlag(float, said=NO_DROPOUT, minimum=0, maximum=1, only=(0.0,)),
}

STEP1 = {
    **FINE_TUNING,
    **DISABLE_DROPOUT,
    **same("learning_rate", float, 1e-3, minimum=0),
    **same("sft_only_data_path", str, many=True),
    "--eot_token": OtherFlag(str, said=TEMPLATE_END),
    "--print_loss": OtherFlag(bool, said="the progress bar and metrics.jsonl show it"),
}

STEP2 = {
    **FINE_TUNING,
    **DISABLE_DROPOUT,
    **same("learning_rate", float, 5e-5, minimum=0),
    **same("eval_interval", int, 0, minimum=0),
    "--eval_iters": OtherFlag(int, 100, said="every held-out pair counts; --eval_data_path NAME:N takes N", minimum=1),
}

DPO = {
    **FINE_TUNING,
    **same("learning_rate", float, 1e-3, minimum=0),
    **same("beta", float, 0.1, minimum=0),
    **same("label_smoothing", float, 0.0, minimum=0, maximum=0.5),
    **same("offload_reference_model", bool),
    "--print_loss": STEP1["--print_loss"],
}

# What the step-3 programs of DeepSpeed-Chat and of those that go on from it have in common
RLHF = {
    **COMMON,
    **same("seed", int, minimum=0),
    **same("actor_model_name_or_path", str),
    **same("critic_model_name_or_path", str),
    **same("ppo_epochs", int, 1, minimum=1),
    **same("max_prompt_seq_len", int, 256, minimum=4),
    **same("max_answer_seq_len", int, 256, minimum=1),
    **same("actor_learning_rate", float, 9.65e-6, minimum=0),
    **same("critic_learning_rate", float, 5e-6, minimum=0),
    **same("actor_weight_decay", float, 0.0, minimum=0),
    **same("critic_weight_decay", float, 0.0, minimum=0),
    **same("num_warmup_steps", int, 100, minimum=0),
    **same("offload_reference_model", bool),
    **same("actor_zero_stage", int, 0, choices=(0, 1, 2, 3)),
    **same("critic_zero_stage", int, 0, choices=(0, 1, 2, 3)),
    **same("actor_gradient_checkpointing", bool),
    **same("critic_gradient_checkpointing", bool),
    **same("actor_lora_dim", int, 0, minimum=0),
    **same("actor_lora_module_name", str, "decoder.layers."),
    **same("actor_lora_learning_rate", float, 5e-4, minimum=0),
    **same("critic_lora_dim", int, 0, minimum=0),
    **same("critic_lora_module_name", str, "decoder.layers."),
    **same("critic_lora_learning_rate", float, 5e-4, minimum=0),
    **same("enable_ema", bool),
    **same("unsup_coef", float, 27.8, minimum=0),
    "--unsupervised_dataset_name": OtherFlag(str, ours="--unsupervised_data_path", said="a name, file or folder"),
    "--unsupervised_dataset_config_name": OtherFlag(
        str, only=(), said="save that configuration as a parquet file and give its path to --unsupervised_data_path"
    ),
    "--preprocessing_num_workers": OtherFlag(int, said="rows are tokenised once and kept in a cache", minimum=0),
    "--enable_hybrid_engine": OtherFlag(bool, said="step 3 always has one engine that trains and generates"),
    "--unpin_actor_parameters": OtherFlag(bool, said="generation takes the parameters of training, no copy"),
    "--release_inference_cache": OtherFlag(bool, said="the cache of keys and values is freed after every rollout"),
    "--inference_tp_size": OtherFlag(
        int, 1, said=f"{SPEED_ONLY}; each rank answers its own prompts with the whole actor, --plan says if it fits",
        minimum=1,
    ),
    "--tp_gather_partition_size": OtherFlag(int, 8, said=f"{SPEED_ONLY}, of --inference_tp_size", minimum=1),
}  # fmt: skip

# Names that step 3 had until August 2023 -> those of later; what they count, as such names count rows of step 1
NAMES_OF_2023 = {
    "--per_device_train_batch_size": "--per_device_generation_batch_size",
    "--per_device_mini_train_batch_size": "--per_device_training_batch_size",
    "--generation_batch_numbers": "--generation_batches",
}
COUNTS = dict(zip(NAMES_OF_2023, ("rollouts", "updates", "batches of rollouts"), strict=True))
DISABLE_DROPOUTS = {"--disable_actor_dropout": DROPOUT_OFF, "--disable_critic_dropout": DROPOUT_OFF}

STEP3 = {
    **RLHF,
    **DISABLE_DROPOUTS,
    **{n: OtherFlag(int, None, ours, f"{COUNTS[n]}; {OF_2023}", minimum=1) for n, ours in NAMES_OF_2023.items()},
    **same("per_device_generation_batch_size", int, 16, minimum=1),
    **same("per_device_training_batch_size", int, 16, minimum=1),
    **same("generation_batches", int, 1, minimum=1),
    **same("offload_reward_model", bool),
    "--actor_dropout": FINE_TUNING["--dropout"],
    "--critic_dropout": FINE_TUNING["--dropout"],
    "--enable_mixed_precision_lora": OtherFlag(
        bool, said="frozen weights are gathered in --dtype, not quantised: more traffic, no rounding"
    ),
    "--align_overflow": OtherFlag(
        bool, said="with --dtype bf16 there is no loss scale; in fp16 each role skips its own overflowing steps"
    ),
    "--print_answers": OtherFlag(bool, said="samples go to samples.json and the log, --trace writes all rollouts"),
    "--print_answers_interval": OtherFlag(int, 1, said="samples go to samples.json and the log", minimum=1),
    "--enable_test_mode": OtherFlag(bool, said="--test_stop_step alone ends the run"),
    "--test_stop_step": OtherFlag(
        int, ours="--num_iterations", said="the run ends after so many iterations", minimum=0
    ),
}

PPO_CONSTANTS = {
    "--clip_reward": Constant(5.0, "clip_reward_value"),
    "--clip_ratio": Constant(0.2, "cliprange"),
    "--clip_value": Constant(0.2, "cliprange_value"),
    "--gamma": Constant(1.0, "gamma"),
    "--gae_lambda": Constant(0.95, "lam"),
    "--missing_eos_penalty": Constant(0.0, "a response without an end costs nothing there"),
    "--whiten_advantages": Constant(False, "advantages are not whitened there"),
}

GREEDY = "answers are sampled at temperature 1, to the end token; there decoded greedily to the full length"
LAST_TOKEN = "the loss takes the reward at the last token of each answer; there all tokens after the answers part"
KEPT = "the model of the lowest held-out loss is kept; there the last one"
CUT = "a row beyond --max_seq_len loses its oldest turns; there its end"
LONG = "a prompt beyond --max_prompt_seq_len loses its oldest turns; there it is left out"


def settle_lora(t: Translation, role: str = "") -> None:
    """What the LoRA flags mean there: without a rank none of them counts."""
    if t.theirs(f"--{role}lora_dim"):
        t.set("--lora_alpha", 1, "adapters count with 1 / rank there")
        return
    for flag in (f"--{role}lora_module_name", f"--{role}lora_learning_rate"):
        t.leave(flag, "there are no adapters" if flag in t.given else "")


def settle_only_lora(t: Translation, *roles: str) -> None:
    """``--only_optimize_lora`` without any adapter does nothing there, and is refused here."""
    if not any(t.theirs(f"--{role}lora_dim") for role in roles):
        t.leave("--only_optimize_lora", "there are no adapters")


def settle_dropout(t: Translation, *roles: str) -> None:
    """What a command says nothing of, as it is there."""
    for role in roles:
        if not {f"--{role}dropout", f"--disable_{role}dropout"} & t.given.keys():
            whose = f"the {role[:-1]}'s" if role else "the model's"
            t.lines.append(f"not the same: dropout is off; there {whose} own counts without --{role}dropout 0.0")


def settle_template(t: Translation) -> None:
    """How conversations are written."""
    if "--chat_template" not in t.values:
        t.lines.append("turns are written by the tokenizer's own chat template or as Human: and Assistant: in lines of "
                       "their own; what was trained there needs --chat_template hh")  # fmt: skip


def settle_fine_tuning(t: Translation) -> None:
    """Steps 1 and 2, and DPO."""
    settle_lora(t)
    settle_only_lora(t, "")
    settle_dropout(t, "")
    settle_template(t)


def settle_dpo(t: Translation) -> None:
    """DPO: its reference is moved where it is a second model at ZeRO-3."""
    settle_fine_tuning(t)
    if t.theirs("--offload_reference_model") and t.theirs("--zero_stage") < 3:
        t.leave("--offload_reference_model", "it moves the parameters of --zero_stage 3")
    elif t.theirs("--lora_dim") and t.theirs("--only_optimize_lora"):
        t.leave("--offload_reference_model", "the model with its adapters off is the reference")


def settle_accumulation(t: Translation, generation: str, training: str, batches: str) -> None:
    """Accumulation beyond the micro-batches of an iteration, as the equal number of generation batches.

    There a step of k iterations sums the gradients of their micro-batches and passes at weights that have not moved
    meanwhile; passes repeat them. One iteration of k times the responses and one pass has the same mean gradient.
    """
    steps = "--gradient_accumulation_steps"
    rows, step_rows = t.theirs(generation), t.theirs(training)
    if step_rows > rows:
        t.set("--per_device_training_batch_size", rows, f"{training} {step_rows} cut to the responses there are")
        step_rows = rows
    if rows % step_rows:
        divisor = next(n for n in range(min(rows, step_rows), 0, -1) if rows % n == 0)
        t.refused.append(f"{generation} {rows} is no multiple of {training} {step_rows}: give {training} {divisor}")
        return
    pieces, passes = rows // step_rows * t.theirs(batches), t.theirs("--ppo_epochs")
    accumulation = t.theirs(steps)
    if pieces % accumulation == 0:
        return
    iterations, rest = divmod(accumulation, pieces * passes)
    if rest:
        t.refused.append(
            f"{steps} {accumulation}: an iteration has {pieces} micro-batches in each of {passes} "
            f"passes, and a step would end within one; the nearest is {pieces * passes * max(iterations, 1)}"
        )
        return
    why = f"{steps} {accumulation}, a step over {iterations} iterations"
    if iterations > 1:
        t.set("--generation_batches", t.theirs(batches) * iterations, why)
    t.set(steps, pieces * iterations, why)
    if passes > 1:
        t.set("--ppo_epochs", 1, f"{why}: passes without a step between them repeat one gradient")


def settle_rlhf(t: Translation) -> None:
    """What every step-3 program has."""
    for role in ("actor_", "critic_"):
        settle_lora(t, role)
    settle_only_lora(t, "actor_", "critic_")
    settle_dropout(t, "actor_", "critic_")
    settle_template(t)
    if "--unsupervised_dataset_name" not in t.given:
        t.leave("--unsup_coef", "there is no pre-training mix" if "--unsup_coef" in t.given else "")
    else:
        t.lines.append("not the same: the pre-training mix counts; there with --unsupervised_dataset_config_name alone")
    for model, role in (("reference", "actor"), ("reward", "critic")):
        if t.values.get(f"--offload_{model}_model") is not None and t.theirs(f"--{role}_zero_stage") < 3:
            t.leave(f"--offload_{model}_model", f"it moves the parameters of --{role}_zero_stage 3")


def settle_step3(t: Translation) -> None:
    """DeepSpeed-Chat's step 3."""
    settle_rlhf(t)
    if {"--per_device_train_batch_size", "--per_device_mini_train_batch_size"} & t.given.keys():
        t.lines.append("kl_ctl was 0.02 until July 2023: give --kl_coef 0.02 to a command of before")
        for role in ("actor", "critic"):
            flag = f"--{role}_lora_learning_rate"
            if flag not in t.given and flag in t.values:
                t.leave(flag)
                t.lines.append(f"adapters learn at --{role}_learning_rate, as they did when step 3 had these names")
    settle_accumulation(t, *(old if old in t.given else new for old, new in NAMES_OF_2023.items()))
    if not t.theirs("--enable_test_mode"):
        t.leave("--num_iterations", "--test_stop_step counts with --enable_test_mode")


CHAT_SCRIPT = same("path", str)
CHAT = CHAT_SCRIPT | same("max_new_tokens", int, 128, minimum=1)
PROMPT_EVAL = {
    "--model_name_or_path_baseline": OtherFlag(str, ours="--base_model_name_or_path"),
    "--model_name_or_path_finetune": OtherFlag(str, ours="--path", said="the output folder of a step 1"),
}
REWARD_EVAL = {"--model_name_or_path": OtherFlag(str, ours="--path", said="the output folder of a step 2")}

EVALUATIONS = (
    Program("evaluation of step 1", ("prompt_eval.py",), "evaluate1", PROMPT_EVAL),
    Program("evaluation of step 2", ("rw_eval.py",), "evaluate2", REWARD_EVAL),
)

DEEPSPEED_CHAT = Predecessor(
    "DeepSpeed-Chat",
    (
        Program(
            "step 1, supervised fine-tuning",
            ("step1_supervised_finetuning/main.py",),
            "step1",
            STEP1,
            {"--train_on_prompts": Constant(True, "prompt tokens train there, too")},
            (KEPT, CUT),
            settle_fine_tuning,
        ),
        Program(
            "step 2, the reward model",
            ("step2_reward_model_finetuning/main.py",),
            "step2",
            STEP2,
            different=(LAST_TOKEN, CUT),
            settle=settle_fine_tuning,
        ),
        Program("step 2, DPO", ("step2_dpo_finetuning/main.py",), "dpo", DPO, different=(CUT,), settle=settle_dpo),
        Program(
            "step 3, RLHF",
            ("step3_rlhf_finetuning/main.py",),
            "step3",
            STEP3,
            {
                **PPO_CONSTANTS,
                "--kl_coef": Constant(0.1, "kl_ctl"),
                "--normalize_reward": Constant(False, "rewards are clipped as they are there"),
            },
            (GREEDY, LONG),
            settle_step3,
        ),
        e2e.PROGRAM,
        *EVALUATIONS,
        Program("the chat", ("inference/chatbot.py",), "chat", CHAT, settle=settle_template),
        Program("the chat", ("deepspeed-chat/chat.py",), "chat", CHAT_SCRIPT, settle=settle_template),
    ),
    ("deepspeed-chat", "deepspeedexamples"),
)
