import json
import shutil
import sys

import pytest
import torch
from chat_arguments import latest_models, named_models
from chat_models import LoadArguments, load_chat_models
from chat_stream import SamplingArguments, stream_answer
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GenerationConfig

from tests.inference.tiny_chat import save_chat_model
from training.utils.errors import UserError

GREEDY = SamplingArguments(max_new_tokens=24, temperature=0)
HELLO = [{"role": "user", "content": "tell me a story"}]


def ids_of(model, sampling=GREEDY):
    *_, answer = stream_answer(model, HELLO, sampling)
    return answer.token_ids


def interleaved(models):
    streams = {m.name: stream_answer(m, HELLO, GREEDY) for m in models}
    answers = {}
    while streams:
        for name, stream in list(streams.items()):
            answers[name] = next(stream)
            if answers[name].ended:
                del streams[name]
    return {name: answer.token_ids for name, answer in answers.items()}


def merged_ids(chat_folders, adapter):
    """What the adapter says when PEFT alone loads and merges it."""
    base = AutoModelForCausalLM.from_pretrained(chat_folders["sft"])
    model = PeftModel.from_pretrained(base, chat_folders[adapter]).merge_and_unload().eval()
    return model


def test_names_come_from_the_flag_or_the_folder():
    assert named_models(["SFT=a/b", "c/actor", "x=y=z"], "--path") == {"SFT": "a/b", "actor": "c/actor", "x": "y=z"}
    assert named_models(["out=1/a"], "--path") == {"out": "1/a"}
    assert named_models(["/runs/a=b/actor"], "--path") == {"actor": "/runs/a=b/actor"}


@pytest.mark.parametrize("values", [["a/x", "b/x"], ["N=a", "N=b"], ["N="], ["=a"], [""]])
def test_bad_names_are_refused(values):
    with pytest.raises(UserError, match="--path"):
        named_models(values, "--path")


def test_models_load_one_after_another_with_a_line_each(chat_folders):
    lines: list[str] = []
    paths = {"A": str(chat_folders["sft"]), "B": str(chat_folders["rlhf"]), "C": str(chat_folders["adapter"])}
    models = load_chat_models(paths, LoadArguments(), lines.append)
    assert [m.name for m in models] == ["A", "B", "C"]
    assert lines.pop(0) == "precision: fp32, this CPU does not compute in bf16 (--dtype auto)"
    assert [line.split()[0] for line in lines] == ["[1/3]", "[1/3]", "[2/3]", "[2/3]", "[3/3]", "[3/3]"]
    assert "loading A from" in lines[0] and "MiB on cpu" in lines[1]
    assert "weights shared" in lines[5]


def test_adapters_share_their_base_and_do_not_disturb_each_other(chat_folders, load):
    models = load("sft", "adapter", "adapter2", "rlhf")
    weights = [m.weights for m in models]
    assert weights[0] is weights[1] is weights[2] is not weights[3]
    together = interleaved(models)
    for name in ("sft", "adapter", "adapter2", "rlhf"):
        assert together[name] == ids_of(load(name)[0]), name
    assert len({tuple(ids) for ids in together.values()}) == 4, "the adapters change nothing: the test is blind"


def test_an_adapter_answers_like_its_merged_model(chat_folders, load):
    [model] = load("adapter2")
    merged = merged_ids(chat_folders, "adapter2")
    ids = torch.randint(5, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), model.weights.use(model.adapter) as network:
        torch.testing.assert_close(network(ids).logits, merged(ids).logits, atol=1e-4, rtol=1e-4)
        other = network.base_model.model  # the same call with the adapter off is a planted fault
    with model.weights.use(None):
        assert not torch.allclose(other(ids).logits, merged(ids).logits, atol=1e-2)


def test_the_same_folder_twice_is_loaded_once(chat_folders):
    paths = {"A": str(chat_folders["sft"]), "B": str(chat_folders["sft"])}
    first, second = load_chat_models(paths, LoadArguments(), lambda line: None)
    assert first.weights is second.weights


def test_an_answer_ends_where_template_or_generation_settings_say(tmp_path):
    folder = save_chat_model(tmp_path / "m", 1)
    GenerationConfig(eos_token_id=[2, 7]).save_pretrained(folder)
    [model] = load_chat_models({"m": str(folder)}, LoadArguments(), lambda line: None)
    assert model.stop_ids == {2, 7}
    GenerationConfig(eos_token_id=9).save_pretrained(folder)
    [model] = load_chat_models({"m": str(folder)}, LoadArguments(), lambda line: None)
    assert model.stop_ids == {2, 9}
    (folder / "generation_config.json").unlink()
    [model] = load_chat_models({"m": str(folder)}, LoadArguments(), lambda line: None)
    assert model.stop_ids == {2}


def test_models_with_different_tokenizers_work_side_by_side(tmp_path, chat_folders):
    other = save_chat_model(tmp_path / "other", 7, vocab_size=300)
    models = load_chat_models({"A": str(chat_folders["sft"]), "B": str(other)}, LoadArguments(), lambda line: None)
    assert len(models[0].tokenizer) != len(models[1].tokenizer)
    assert all(interleaved(models).values())


def test_a_reward_model_is_refused(chat_folders):
    with pytest.raises(UserError, match="--path .* a reward model that writes no answers"):
        load_chat_models({"A": str(chat_folders["reward"])}, LoadArguments(), lambda line: None)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    small, large = save_chat_model(tmp_path / "small", 1, vocab_size=300), save_chat_model(tmp_path / "large", 1)
    shutil.copy(large / "tokenizer.json", small / "tokenizer.json")
    with pytest.raises(UserError, match="embeddings"):
        load_chat_models({"m": str(small)}, LoadArguments(), lambda line: None)


def _no_folder(tmp_path, folders):
    return str(tmp_path / "nowhere"), "no such folder"


def _no_model(tmp_path, folders):
    (tmp_path / "empty").mkdir()
    return str(tmp_path / "empty"), "holds no model"


def _no_weights(tmp_path, folders):
    shutil.copytree(folders["sft"], tmp_path / "m")
    (tmp_path / "m" / "model.safetensors").unlink()
    return str(tmp_path / "m"), "the folder holds no weights"


def _cut_weights(tmp_path, folders):
    shutil.copytree(folders["sft"], tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    return str(tmp_path / "m"), "can not be loaded"


def _adapter(tmp_path, folders):
    shutil.copytree(folders["adapter"], tmp_path / "a")
    return tmp_path / "a"


def _adapter_bad_json(tmp_path, folders):
    (_adapter(tmp_path, folders) / "adapter_config.json").write_text("{")
    return str(tmp_path / "a"), "adapter_config.json is damaged"


def _adapter_cut(tmp_path, folders):
    file = _adapter(tmp_path, folders) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:200])
    return str(tmp_path / "a"), "adapter can not be loaded"


def _adapter_no_weights(tmp_path, folders):
    (_adapter(tmp_path, folders) / "adapter_model.safetensors").unlink()
    return str(tmp_path / "a"), "no weights"


def _adapter_config(tmp_path, folders, **changes):
    file = _adapter(tmp_path, folders) / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return str(tmp_path / "a")


def _adapter_of_a_wrong_kind(tmp_path, folders):
    return _adapter_config(tmp_path, folders, peft_type=3), "adapter can not be loaded"


def _adapter_stops_at_a_word(tmp_path, folders):
    (_adapter(tmp_path, folders) / "generation_config.json").write_text('{"eos_token_id": ["stop"]}')
    return str(tmp_path / "a"), "generation_config.json is damaged: eos_token_id is"


def _adapter_generates_by_a_list(tmp_path, folders):
    (_adapter(tmp_path, folders) / "generation_config.json").write_text("[]")
    return str(tmp_path / "a"), "generation_config.json is damaged"


def _stops_at_a_word(tmp_path, folders):
    folder = shutil.copytree(folders["sft"], tmp_path / "m")
    (folder / "generation_config.json").write_text('{"eos_token_id": {"stop": 3}}')
    return str(folder), "generation_config.json is damaged: eos_token_id is"


def _config_of_a_wrong_kind(tmp_path, folders):
    folder = shutil.copytree(folders["sft"], tmp_path / "m")
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | {"head_dim": {}}))
    return str(folder), "its configuration can not be used: .*head_dim"


def _other_sizes(tmp_path, folders):
    folder = shutil.copytree(folders["sft"], tmp_path / "m")
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"hidden_size": 2 * values["hidden_size"]}))
    return str(folder), r"weight is \[.*\] in its files and \[.*\] by its config.json"


def _layer_without_weights(tmp_path, folders):
    folder = shutil.copytree(folders["sft"], tmp_path / "m")
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder), "holds no weights for model.layers.0.mlp.up_proj.weight"


def _tokenizer_of_nothing(tmp_path, folders):
    folder = shutil.copytree(folders["sft"], tmp_path / "m")
    (folder / "tokenizer.json").write_text("{}")
    return str(folder), "tokenizer.json is damaged"


def _adapter_lost_base(tmp_path, folders):
    return _adapter_config(tmp_path, folders, base_model_name_or_path="/gone/base"), "base model can not be found"


def _adapter_no_base(tmp_path, folders):
    return _adapter_config(tmp_path, folders, base_model_name_or_path=None), "does not name the base"


def _adapter_other_rank(tmp_path, folders):
    return _adapter_config(tmp_path, folders, r=8), "adapter can not be loaded"


def _adapter_lacks_layers(tmp_path, folders):
    return _adapter_config(tmp_path, folders, target_modules=["q_proj", "v_proj", "o_proj"]), "lacks weights"


def _adapter_foreign_base(tmp_path, folders):
    return _adapter_config(tmp_path, folders, target_modules=["query_key_value"]), "adapter can not be loaded"


def _adapter_of_virtual_tokens(tmp_path, folders):
    return _adapter_config(tmp_path, folders, peft_type="PROMPT_TUNING", num_virtual_tokens=4), "virtual tokens"


@pytest.mark.parametrize(
    "make",
    [
        _no_folder, _no_model, _no_weights, _cut_weights, _adapter_bad_json, _adapter_cut, _adapter_no_weights,
        _adapter_of_a_wrong_kind, _adapter_stops_at_a_word, _adapter_generates_by_a_list, _stops_at_a_word,
        _config_of_a_wrong_kind, _tokenizer_of_nothing, _other_sizes, _layer_without_weights,
        _adapter_lost_base, _adapter_no_base, _adapter_other_rank, _adapter_lacks_layers, _adapter_foreign_base,
        _adapter_of_virtual_tokens,
    ],
)  # fmt: skip
def test_what_can_not_be_loaded_is_said_in_one_line(make, tmp_path, chat_folders):
    path, message = make(tmp_path, chat_folders)
    with pytest.raises(UserError, match=message) as caught:
        load_chat_models({"m": path}, LoadArguments(), lambda line: None)
    assert path in str(caught.value) and "--path" in str(caught.value)


def test_a_bad_second_path_is_said_before_the_first_model_loads(tmp_path, chat_folders):
    lines: list[str] = []
    with pytest.raises(UserError):
        load_chat_models({"A": str(chat_folders["sft"]), "B": str(tmp_path / "x")}, LoadArguments(), lines.append)
    assert lines == []


@pytest.mark.parametrize("device_map", ["gpu0", "cuda:99"])
def test_an_unknown_device_is_refused(device_map, chat_folders):
    with pytest.raises(UserError, match="--device_map"):
        load_chat_models({"m": str(chat_folders["sft"])}, LoadArguments(device_map=device_map), lambda line: None)


def test_device_map_auto_and_cpu_answer_alike(load):
    assert ids_of(load("sft", device_map="auto")[0]) == ids_of(load("sft", device_map="cpu")[0])


def test_dtype_is_taken(load, monkeypatch):
    assert load("sft", dtype="bf16")[0].weights.model.dtype == torch.bfloat16
    assert load("sft", dtype="auto")[0].weights.model.dtype == torch.float32
    monkeypatch.setattr("training.utils.engine.precision.cpu_computes_bf16", lambda: True)
    assert load("sft", dtype="auto")[0].weights.model.dtype == torch.bfloat16


def test_bf16_by_hand_on_a_cpu_without_it_is_warned_of(chat_folders):
    lines: list[str] = []
    load_chat_models({"A": str(chat_folders["sft"])}, LoadArguments(dtype="bf16"), lines.append)
    assert lines[0].startswith("warning: this CPU does not compute in bf16: products take ")


def test_quantize_without_its_package_names_it(load, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(UserError, match="pip install bitsandbytes"):
        load("sft", quantize="int8")


@pytest.mark.parametrize(("bits", "tolerance"), [("int8", 0.1), ("int4", 0.5)])
def test_quantized_weights_are_smaller_and_answer_nearly_alike(bits, tolerance, tmp_path):
    pytest.importorskip("bitsandbytes")
    folder = save_chat_model(tmp_path / "m", 1, hidden_size=128, intermediate_size=256, initializer_range=0.05)
    plain, small = (
        load_chat_models({"m": str(folder)}, LoadArguments(quantize=bits), lambda line: None)[0]
        for bits in ("none", bits)
    )
    assert small.weights.model.get_memory_footprint() < 0.75 * plain.weights.model.get_memory_footprint()
    ids = torch.randint(5, 300, (1, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        exact, near = plain.weights.model(ids).logits, small.weights.model(ids).logits.float()
    assert (exact - near).norm() < tolerance * exact.norm()
    assert ids_of(small)


def test_an_adapter_works_on_a_quantized_base(load):
    pytest.importorskip("bitsandbytes")
    base, adapter = load("sft", "adapter", quantize="int8")
    assert ids_of(base) != ids_of(adapter)


def test_the_latest_run_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPOD_OUTPUT", str(tmp_path))
    with pytest.raises(UserError, match="or name models with --path"):
        latest_models()
    for step in ("step1", "step2", "step3"):
        (tmp_path / "run" / step).mkdir(parents=True)
        (tmp_path / "run" / step / "summary.json").write_text("{}")
    (tmp_path / "run-2" / "step1").mkdir(parents=True)
    (tmp_path / "run-2" / "step1" / "summary.json").write_text("{}")
    (tmp_path / "latest").symlink_to("run-2")
    run = tmp_path / "run"
    models, judge = latest_models()
    assert models == {"SFT": str(run / "step1"), "RLHF": str(run / "step3" / "actor")}, "of one run, not of two"
    assert judge == str(run / "step2")
    (run / "step2" / "summary.json").unlink()
    assert latest_models()[1] == ""


def test_another_template_brings_its_own_stop_set(chat_folders, tmp_path):
    path = tmp_path / "conversation.json"
    path.write_text(json.dumps({"chat_template": "alpaca", "system_message": "Be brief.", "stop_ids": [0]}))
    paths = {"A": str(chat_folders["sft"])}
    [saved] = load_chat_models(paths, LoadArguments(), lambda line: None)
    [model] = load_chat_models(paths, LoadArguments(chat_template=str(path)), lambda line: None)
    assert 0 not in saved.stop_ids and model.stop_ids == saved.stop_ids | {0}
    text = model.tokenizer.apply_chat_template(HELLO, tokenize=False)
    assert "### Instruction:" in text and "Be brief." in text
