"""What makes a run the same: which flag a refusal names, and that every flag the lists hold is one."""

import dataclasses
import importlib
import sys
from pathlib import Path

import pytest
from datasets import Dataset, concatenate_datasets

from tests.bad_inputs import STEPS
from training.step3_rlhf_finetuning.reward_functions import load_text_function
from training.utils.arguments import DeepSpeedArguments
from training.utils.checkpoint import same_run
from training.utils.errors import UserError
from training.utils.model import loading

RUN = {
    "step": "step3",
    "flags": {"data_path": ["a"], "eval_data_path": [], "unsupervised_data_path": ["t"], "seed": 1},
    "models": {"--actor_model_name_or_path": "m"},
    "data": {"training": "1", "held-out": "2", "pre-training": "3"},
    "batches": {},
    "world_size": 1,
}


def refusal(**changes):
    """What is said when parts of the run have changed."""
    now = RUN | {part: RUN[part] | changed for part, changed in changes.items()}
    with pytest.raises(UserError) as refused:
        same_run.refuse_other_run(RUN, now, Path("checkpoint"))
    return str(refused.value)


def test_the_same_run_goes_on():
    same_run.refuse_other_run(RUN, RUN, Path("checkpoint"))


@pytest.mark.parametrize(
    ("rows", "flags", "named"),
    [
        ("training", {}, "--data_path"),
        ("held-out", {}, "--data_path"),
        ("held-out", {"eval_data_path": ["b"]}, "--eval_data_path"),
        ("pre-training", {}, "--unsupervised_data_path"),
        ("pre-training", {"unsupervised_data_path": []}, "--unsupervised_data_path"),
    ],
)
def test_other_rows_are_refused_by_the_flag_they_come_from(rows, flags, named):
    said = refusal(data={rows: "other"}, flags=flags)
    assert f"other {rows} rows than {named} gives" in said and "--resume never" in said


def test_the_first_of_several_changes_is_named_where_it_was_made():
    said = refusal(data={"training": "x", "held-out": "y"}, flags={"eval_data_path": ["b"]})
    assert "--eval_data_path" in said


def test_a_deepspeed_configuration_is_compared_by_what_it_says(tmp_path):
    """Its file may be edited; what it says of ZeRO is rounding, what it says of gradients is not."""

    def described(text, name="a.json"):
        file = tmp_path / name
        file.write_text(text)
        return same_run.describe("step1", [DeepSpeedArguments(deepspeed_config=str(file) if text else "")], {}, {}, {})

    before = described('{"gradient_clipping": 0.5}')
    assert not same_run.inexact_because(before, described('{"gradient_clipping": 0.5}', "b.json"))
    for text in ('{"gradient_clipping": 0.1}', "", '{"gradient_clipping": 0.5, "fp16": {"loss_scale": 2}}'):
        with pytest.raises(UserError, match="of --deepspeed_config was .* which changes the result; give it again"):
            same_run.refuse_other_run(before, described(text), Path("checkpoint"))
    zero = described('{"gradient_clipping": 0.5, "zero_optimization": {"overlap_comm": true}}')
    same_run.refuse_other_run(before, zero, Path("checkpoint"))
    assert "--deepspeed_config" in same_run.inexact_because(before, zero)[0]
    earlier = before | {"flags": before["flags"] | {"deepspeed_config": "a.json"}}
    same_run.refuse_other_run(earlier, described(""), Path("checkpoint"))
    with pytest.raises(UserError, match="rank 1 differs from rank 0 in flags: deepspeed_config"):
        same_run.refuse_other_ranks([before, zero])
    same_run.refuse_other_run(described(""), described('{"gradient_clipping": 1.0}'), Path("checkpoint"))


def test_a_run_that_other_ranks_took_up_goes_on_with_them_again():
    """Its checkpoints keep the rows of a step that its first ranks had, which the flags no longer make."""
    flags = RUN["flags"] | {"gradient_accumulation_steps": 2}
    first, now = ({"flags": flags, "batches": {"rows per step": rows}, "data_size": rows // 4} for rows in (4, 8))
    taken_up = now | {"batches": first["batches"]}
    same_run.refuse_other_run(RUN | first, RUN | now, Path("checkpoint"))
    same_run.refuse_other_run(RUN | taken_up, RUN | now, Path("checkpoint"))
    other = now | {"flags": flags | {"gradient_accumulation_steps": 4}, "batches": {"rows per step": 16}}
    with pytest.raises(UserError, match="4 rows per step, these flags .--gradient_accumulation_steps. and"):
        same_run.refuse_other_run(RUN | taken_up, RUN | other, Path("checkpoint"))


def test_what_was_not_there_before_is_another_run():
    before = RUN | {"data": {"training": "1", "held-out": "2"}, "flags": RUN["flags"] | {"unsupervised_data_path": []}}
    with pytest.raises(UserError, match="other pre-training rows than --unsupervised_data_path gives"):
        same_run.refuse_other_run(before, RUN, Path("checkpoint"))
    assert "--critic_model_name_or_path" in refusal(models={"--critic_model_name_or_path": "r"})


def test_a_checkpoint_of_an_earlier_version(capsys):
    """A flag that came later meant its default before, one that is gone is said, and nothing is asked for in vain."""
    now = RUN | {"flags": RUN["flags"] | {"later": 3, "threads": 2}, "defaults": {"later": 3}, "threads": 2}
    before = RUN | {"flags": RUN["flags"] | {"gone": 7}}
    same_run.refuse_other_run(before, now | {"flags": RUN["flags"] | {"later": 3}}, Path("checkpoint"))
    assert "--gone (7)" in capsys.readouterr().out
    with pytest.raises(UserError, match="--later was 3"):
        same_run.refuse_other_run(before, now | {"flags": RUN["flags"] | {"later": 4}}, Path("checkpoint"))
    assert same_run.inexact_because(before | {"device": "cpu"}, now | {"device": "cpu", "versions": {}}) == []
    other = RUN | {"data": {"training": "hashed in another way"}, "models": {}}
    same_run.refuse_other_run(other, RUN | {"fingerprints": 2}, Path("checkpoint"))
    assert "is not checked" in capsys.readouterr().out


def test_a_converted_model_is_what_it_was_converted_from(tmp_path, monkeypatch):
    """Another version of transformers writes another tokenizer.json, and a run goes on after an upgrade."""
    monkeypatch.setenv("TRIPOD_CACHE", str(tmp_path / "cache"))
    gguf, found = tmp_path / "a.gguf", []

    def convert(path: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(loading.transformers.__version__)

    monkeypatch.setattr(loading, "_write_converted", convert)
    for content, version in (("one", "5.17.0"), ("one", "5.23.0"), ("two", "5.23.0")):
        gguf.write_text(content)
        monkeypatch.setattr(loading.transformers, "__version__", version)
        found.append(str(loading._convert_gguf(gguf)))
    assert len(set(found)) == 3
    before, upgraded, other = map(same_run.input_fingerprint, found)
    assert before == upgraded != other


def test_files_that_another_folder_sees_are_the_same_files(tmp_path):
    """A run that goes on from another folder names them by other paths; what they hold is compared all the same."""

    def run(folder, text, name="rules.py"):
        spec, template = f"{folder}{name}:f=0.5", f"{folder}chat.jinja"
        flags = {
            "reward_function": [spec, "model=2"],
            "eval_function": [f"{folder}{name}:g"],
            "chat_template": template,
        }
        models = {"--critic_model_name_or_path": "r", f"--reward_function {spec}": text}
        return RUN | {"flags": RUN["flags"] | flags, "models": models}

    same_run.refuse_other_run(run("", "1"), run("/work/here/", "1"), Path("checkpoint"))
    with pytest.raises(UserError, match="another model or file than --reward_function rules.py:f=0.5 names"):
        same_run.refuse_other_run(run("", "1"), run("/work/here/", "2"), Path("checkpoint"))
    with pytest.raises(UserError, match="--eval_function was rules.py:g when"):
        same_run.refuse_other_run(run("", "1"), run("", "1", "other.py"), Path("checkpoint"))


def test_an_edited_reward_function_is_refused_unless_the_checkpoint_is_named(capsys):
    """A function that failed late and was mended: the run would fail there again with the one that it began with."""
    spec = "--reward_function rules.py:f"
    before, now = (RUN | {"models": RUN["models"] | {spec: text}} for text in "12")
    checkpoint = Path("out/checkpoints/step-00000900")
    with pytest.raises(UserError, match=f"than {spec} names; .* as it is now by --resume {checkpoint}, or start over"):
        same_run.refuse_other_run(before, now, checkpoint)
    same_run.refuse_other_run(before, now, checkpoint, named=True)
    assert f"{spec} has been edited since {checkpoint} was written" in capsys.readouterr().out
    with pytest.raises(UserError, match="--actor_model_name_or_path names; give that one again, or start over"):
        same_run.refuse_other_run(before, now | {"models": {"--actor_model_name_or_path": "n"}}, checkpoint, named=True)


def test_every_value_of_the_rows_counts():
    rows = [{"ids": [1, 2, i], "kind": "a", "length": 3, "text": f"text {i}"} for i in range(3000)]
    whole = same_run.data_fingerprint(Dataset.from_list(rows))
    assert same_run.data_fingerprint(Dataset.from_list(rows).select(range(3000))) == whole
    split = concatenate_datasets([Dataset.from_list(rows[:1100]), Dataset.from_list(rows[1100:])])
    assert same_run.data_fingerprint(split) == whole, "how the rows are stored does not count"
    named = Dataset.from_list([row | {"source": "/home/a.jsonl"} for row in rows])
    assert same_run.data_fingerprint(named) == whole, "nor what their file is called"
    for change in ({"kind": "b"}, {"ids": [1, 3, 1777]}, {"ids": [1, 2, 1777, 0]}, {"text": "other"}, {"length": 4}):
        changed = [row | change if i == 1777 else row for i, row in enumerate(rows)]
        assert same_run.data_fingerprint(Dataset.from_list(changed)) != whole, change
    assert same_run.data_fingerprint(Dataset.from_list(rows).select([1, 0, *range(2, 3000)])) != whole


def test_every_byte_of_a_model_counts_but_what_generation_alone_reads(tmp_path, monkeypatch):
    monkeypatch.setenv("TRIPOD_CACHE", str(tmp_path / "cache"))
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    weights = bytearray(20 << 20)
    (model / "model.safetensors").write_bytes(weights)
    whole = same_run.input_fingerprint(str(model))
    assert same_run.input_fingerprint(str(model)) == whole and len(list((tmp_path / "cache/digests").iterdir())) == 1
    (model / "generation_config.json").write_text("{}")
    assert same_run.input_fingerprint(str(model)) == whole
    for lost in ("", "\0" * 64):  # what a loss of power may leave of the file with the hash
        next((tmp_path / "cache/digests").iterdir()).write_text(lost)
        assert same_run.input_fingerprint(str(model)) == whole
    weights[10 << 20] = 1
    (model / "model.safetensors").write_bytes(weights)
    changed = same_run.input_fingerprint(str(model))
    assert changed != whole
    (model / "tokenizer_config.json").write_text("{}")
    assert same_run.input_fingerprint(str(model)) != changed


def test_modules_that_a_function_imports_from_its_folder_count(tmp_path, monkeypatch):
    (tmp_path / "helper_of_a_reward.py").write_text("SIZE = 1\n")
    (tmp_path / "reward.py").write_text("import helper_of_a_reward\ndef f(p, r, rows):\n    return [1.0] * len(r)\n")
    monkeypatch.setattr("sys.path", [*sys.path])
    load_text_function(f"{tmp_path}/reward.py:f", "--reward_function")
    before = same_run.input_fingerprint(str(tmp_path / "reward.py"))
    (tmp_path / "helper_of_a_reward.py").write_text("SIZE = 2\n")
    assert same_run.input_fingerprint(str(tmp_path / "reward.py")) != before


def test_the_lists_hold_flags_that_exist_each_once():
    flags = {
        field.name
        for step in (1, 2, 3)
        for group in importlib.import_module(STEPS[step]).ARGUMENTS
        for field in dataclasses.fields(group)
    }
    lists = [same_run.FREE, same_run.ROUNDING, same_run.BY_CONTENT, same_run.BATCH]
    listed = [name for names in lists for name in names]
    assert len(listed) == len(set(listed))
    assert set(listed) <= flags, "a flag of these lists has gone or has another name"
    assert {name for name in flags if name.endswith(("_data_path", "_model_name_or_path"))} <= same_run.BY_CONTENT
    assert {name for names in same_run.ROWS_FROM.values() for name in names} <= same_run.BY_CONTENT


def test_every_function_that_the_docstring_names_is_there():
    text = same_run.describe.__doc__.splitlines()[0]
    names = text.split("`")[1::2]
    assert names and all(hasattr(same_run, name) for name in names)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "chatml", "--flag was not given when checkpoint was written and is chatml now, .*; leave --flag out, or"),
        (None, 3, "was not given when .* and is 3 now, .*; leave --flag out, or"),
        ([], ["a", "b"], "was not given when .* and is a b now, .*; leave --flag out, or"),
        ("chatml", "", "was chatml when .* and is not given now, .*; give --flag chatml again, or"),
        (["a", "b"], [], "was a b when .* and is not given now, .*; give --flag a b again, or"),
        (0, 1, "was 0 when .*; give --flag 0 again, or"),
        (False, True, "was False when .*; give --no-flag again, or"),
        (True, False, "was True when .*; give --flag again, or"),
    ],
)
def test_how_to_give_a_flag_as_it_was(old, new, said):
    before, now = ({**RUN, "flags": RUN["flags"] | {"flag": value}} for value in (old, new))
    with pytest.raises(UserError, match=said):
        same_run.refuse_other_run(before, now, Path("checkpoint"))
