"""What a run was made from: digests of its inputs."""

from pathlib import Path

import pytest

from training.utils.run import manifest
from training.utils.run.manifest import hash_inputs


@pytest.mark.parametrize("inside", ["runs", "checkpoints"])
def test_a_folders_digest_is_of_its_files_wherever_it_lies(tmp_path: Path, inside: str) -> None:
    """But not of the checkpoints in it, by which a step that has gone on would differ."""
    model = tmp_path / inside / "step1"
    (model / "checkpoints").mkdir(parents=True)
    files = (model / "config.json", model / "checkpoints" / "latest")
    found = []
    for text in ("1", "2"):
        for file in files:
            file.write_text(text)
            found.append(hash_inputs(["--model_name_or_path", str(model)], {})[str(model)])
    assert found[0] == found[1] != found[2] == found[3]


def test_a_folder_with_a_bare_name_is_an_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("rows", "demo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.csv").write_text(name)
    monkeypatch.chdir(tmp_path)
    bundled = tmp_path / "rows"
    found = hash_inputs(
        ["--data_path", "rows", "demo", "gpt2", "--output_dir", "rows", "--dtype=demo"], {"demo": bundled}
    )
    assert found["rows"] == found["demo"] is not None and found["gpt2"] is None


def test_what_a_step_writes_to_or_may_not_be_read_is_no_hindrance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cache").mkdir()
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.csv").touch()

    def fails(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(manifest, "read_digest", fails)
    text = "Be brief. " * 40
    argv = ["--data_path", f"{tmp_path}/rows", "--data-output-path", f"{tmp_path}/cache", "--system_message", text]
    assert hash_inputs(argv, {}) == {f"{tmp_path}/rows": None}
