"""Step 1 on rows that begin alike: behind that beginning they give the losses of a row each, in the whole program."""

import json

import pytest

from training.step1_supervised_finetuning import main as step1
from training.utils.sharing import rows


@pytest.fixture
def own_rows(tmp_path):
    """Files of a system prompt, questions and answers of unequal lengths; the held-out ones too."""

    def row(n):
        turns = [("system", "You are a calm and helpful librarian."), ("user", f"Where is book {n}?")]
        turns += [("assistant", "On the shelf." * (1 + n % 3)), ("user", "Thanks!"), ("assistant", "Gladly." * (n % 2))]
        turns = turns[: 3 if n % 4 else 5]
        return {"messages": [{"role": role, "content": text or "Yes."} for role, text in turns]}

    files = {name: tmp_path / f"{name}.jsonl" for name in ("train", "held_out")}
    for name, numbers in (("train", range(16)), ("held_out", range(16, 21))):
        files[name].write_text("".join(json.dumps(row(n)) + "\n" for n in numbers))
    return files


@pytest.mark.parametrize("micro_batch", [2, 8])
def test_losses_are_those_of_a_row_each(tiny_model, own_rows, tmp_path, monkeypatch, micro_batch):
    laid = []

    def counted(input_ids, *others):
        found = rows.behind_beginnings(input_ids, *others)
        laid.append((input_ids.numel(), found.get("shared_ids", input_ids).numel()))
        return found

    def losses(name, across):
        monkeypatch.setattr(step1, "shares_across", lambda device: across)
        monkeypatch.setattr("training.utils.data.batches.behind_beginnings", counted)
        flags = ["--model_name_or_path", str(tiny_model), "--output_dir", str(tmp_path / name), "--dtype", "fp32"]
        flags += ["--data_path", str(own_rows["train"]), "--eval_data_path", str(own_rows["held_out"])]
        flags += [
            "--per_device_train_batch_size",
            str(micro_batch),
            "--gradient_accumulation_steps",
            str(8 // micro_batch),
        ]
        flags += [
            "--learning_rate",
            "1e-2",
            "--num_train_epochs",
            "2",
            "--report_to",
            "none",
            "--data_output_path",
            str(tmp_path / "cache"),
        ]
        assert step1.main(flags) == 0
        records = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [value for record in records for key, value in record.items() if key.endswith("loss")]

    alone = losses("alone", False)
    assert not laid
    shared = losses("shared", True)
    assert len(shared) > 2 and shared == pytest.approx(alone, abs=2e-5)
    assert sum(few for _, few in laid) < 0.9 * sum(many for many, _ in laid)
