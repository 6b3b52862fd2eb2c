"""Where a step writes: nothing that it has not made is written over, and a tilde is the user's home."""

import errno
import fcntl
import multiprocessing
import os
import shlex
import shutil
from pathlib import Path

import pytest

from training.utils.errors import UserError
from training.utils.run import folders, inputs


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", folders.WRITTEN)
def test_what_no_step_has_made_is_not_written_over(home, name):
    file = home / "out" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match=f"holds {name}, which no run of this step made"):
        folders.prepare_output_dir("out", "step3")
    assert file.read_text() == "mine" and not (home / "out" / folders.LOCK).exists()


def test_a_step_is_not_evaluated_where_nothing_can_be_written(home, monkeypatch):
    (home / "summary.json").write_text("{}")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(UserError, match="--path .* can not be written"):
        folders.step_folder(str(home), "step1")


@pytest.mark.parametrize("mark", [folders.LOCK, folders.CHECKPOINTS])
def test_a_steps_own_folder_goes_on(home, mark):
    (home / "out").mkdir()
    (home / "out" / mark).touch() if mark == folders.LOCK else (home / "out" / mark).mkdir()
    (home / "out" / "metrics.jsonl").touch()
    assert folders.prepare_output_dir("out", "step1") == home / "out"


def test_a_log_alone_is_no_hindrance(home):
    (home / "out").mkdir()
    (home / "out" / "training.log").touch()
    assert folders.prepare_output_dir("out", "step1") == home / "out"


def test_a_tilde_that_the_shell_left_is_the_users_home(home):
    assert folders.prepare_output_dir("~/run/step1", "step1") == home / "run" / "step1"
    (home / "run" / "step1" / "summary.json").write_text("{}")
    assert folders.step_folder("~/run/step1", "step1") == home / "run" / "step1"
    assert not (home / "~").exists()


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EACCES])
def test_a_folder_that_can_not_be_locked_is_one_line(home, monkeypatch, number):
    def fails(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(*((Path, "open") if number == errno.EACCES else (fcntl, "flock")), fails)
    with pytest.raises(UserError, match=f"out can not be locked against another run: {os.strerror(number)}"):
        folders.prepare_output_dir("out", "step1")


def test_commands_in_messages_can_be_pasted(home, monkeypatch):
    """No environment need be active for them, and their words are quoted."""
    monkeypatch.setenv("TRIPOD_OUTPUT", str(home / "output"))
    (home / "a folder").mkdir()
    (home / "a folder" / "config.json").write_text('{"architectures": ["gpt_neox_reward_model"]}')
    with pytest.raises(UserError) as none:
        folders.latest_output("step1")
    with pytest.raises(UserError) as theirs:
        inputs.check_model_path("a folder", "--model_name_or_path")
    for error, word in ((none, str(folders.repository_root() / folders.STEPS["step1"])), (theirs, "a folder")):
        program, *words = shlex.split(str(error.value).rpartition(": ")[2])
        assert Path(program).is_file() and word in words
    assert Path(shlex.split(folders.installing("x"))[-1]).is_file()


def test_what_is_optional_is_installed_beside_the_torch_that_set_up_has_kept(home, monkeypatch):
    monkeypatch.setattr("sys.prefix", str(home))
    assert Path(shlex.split(folders.installing("x"))[-1]) == folders.repository_root() / "constraints.txt"
    (home / "constraints.txt").touch()
    assert Path(shlex.split(folders.installing("x"))[-1]).absolute() == home / "constraints.txt"


def test_a_runs_folder_in_a_models_or_steps_place_names_what_lies_in_it(home):
    for folder in ("run/step1", "run/step2", "run/step3/actor"):
        (home / folder).mkdir(parents=True)
        (home / folder / "config.json").write_text("{}")
    (home / "run" / "step2" / "summary.json").write_text("{}")
    with pytest.raises(UserError, match=r"no config.json\); .*in it: run/step1, run/step2, run/step3/actor$"):
        inputs.check_model_path("run", "--path")
    with pytest.raises(UserError, match="no summary.json.; give the step's folder: run/step2$"):
        folders.step_folder("run", "step2")
    with pytest.raises(UserError, match=r"no summary.json\)$"):
        folders.step_folder("run", "step1")


def test_a_folder_that_no_flag_has_named_says_what_names_another(home, monkeypatch):
    (home / "file").touch()
    monkeypatch.setenv("TRIPOD_OUTPUT", "~/file")
    monkeypatch.setenv("TRIPOD_CACHE", "~/file")
    with pytest.raises(UserError, match=f"{home}/file can not be made: File exists; .*--output_dir, or TRIPOD_OUTPUT"):
        folders.new_run_dir("run")
    with pytest.raises(UserError, match=f"{home}/file can not be made: .*TRIPOD_CACHE"):
        folders.make_dir(folders.cache_dir(), folders.CACHE_FOLDER)
    monkeypatch.delenv("TRIPOD_CACHE")
    assert folders.cache_dir() == Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache") / "tripod"


def test_a_process_that_was_forked_does_not_keep_the_folder(tmp_path):
    """A reward function's workers outlive a rank that is killed, and its run could not be taken up."""
    context = multiprocessing.get_context("fork")
    begun, end = context.Event(), context.Event()
    with folders.locked(tmp_path, "a run"):
        worker = context.Process(target=lambda: (begun.set(), end.wait()), daemon=True)
        worker.start()
        assert begun.wait(60)
        with pytest.raises(UserError, match="a run is at work"), folders.locked(tmp_path, "a run"):
            pass
    with folders.locked(tmp_path, "a run"):
        end.set()
    worker.join()


@pytest.fixture
def output(home, monkeypatch):
    monkeypatch.setenv("TRIPOD_OUTPUT", str(home / "output"))
    return home / "output"


def test_the_output_folder_may_be_named_through_a_link(output):
    """As a home folder on another disk often is: its runs are as new as others, and their link is not one of them."""
    (output / "mine" / "step1").mkdir(parents=True)
    (output.parent / "linked").symlink_to(output)
    folders.prepare_output_dir("linked/mine/step1", "step1")
    assert (output / "latest").readlink() == Path("mine")
    assert folders.named_itself(Path("linked/latest/step2")) == output.parent / "linked" / "mine" / "step2"
    with pytest.raises(UserError, match="is where the link to the newest run goes"):
        (output / "latest").unlink()
        folders.check_latest(output.parent / "linked" / "latest")


def test_a_run_that_lies_elsewhere_and_is_linked_is_found(output, home):
    (home / "disk" / "mine" / "step1").mkdir(parents=True)
    (home / "disk" / "mine" / "step1" / "summary.json").write_text("{}")
    output.mkdir()
    (output / "mine").symlink_to(home / "disk" / "mine")
    folders.point_latest(folders.new_run_dir("run"))
    assert folders.latest_output("step1") == output / "mine" / "step1"
    assert output / "latest" not in folders.runs_newest_first()


def test_the_newest_run_is_that_whose_step_ended_last(output, monkeypatch):
    """Whatever was written into an older one since, such as its report; one that is removed meanwhile is none."""
    for number, name in enumerate(("old", "new", "gone")):
        (output / name / "step1").mkdir(parents=True)
        (output / name / "step1" / "summary.json").write_text("{}")
        os.utime(output / name / "step1" / "summary.json", (number, number))
    (output / "old" / "report.html").touch()
    os.utime(output / "new", (5, 5))
    glob = Path.glob

    def found(path: Path, pattern: str) -> list[Path]:
        files = list(glob(path, pattern))
        if path.name == "gone" and path.exists():
            shutil.rmtree(path)
        return files

    monkeypatch.setattr(Path, "glob", found)
    assert folders.latest_output("step1") == output / "new" / "step1"


def test_a_file_system_without_links_has_runs_all_the_same(output, monkeypatch, capsys):
    def fails(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(Path, "symlink_to", fails)
    assert folders.prepare_output_dir("", "step1") == output / "run" / "step1"
    assert "output/latest can not be made: Operation not supported" in capsys.readouterr().out


@pytest.mark.parametrize("earlier", [False, True])
def test_a_refused_step_leaves_no_empty_run_to_go_on_with(output, monkeypatch, earlier):
    """The next step would be trained into it, apart from the run that it belongs to."""
    monkeypatch.setattr(folders, "_before", {})
    if earlier:
        (output / "mine" / "step1").mkdir(parents=True)
        (output / "mine" / "step1" / "summary.json").write_text("{}")
        folders.point_latest(output / "mine")
    path = folders.prepare_output_dir("", "step1")
    assert path == output / "run" / "step1"
    (path / ".failed-rank0.json").touch()
    folders.take_back()
    assert sorted(p.name for p in output.iterdir()) == (["latest", "mine"] if earlier else [])
    assert not earlier or folders.prepare_output_dir("", "step2") == output / "mine" / "step2"


def test_what_a_refused_step_finds_stays(output, monkeypatch):
    """A folder that a flag names, other steps of the run, the output of a start before."""
    monkeypatch.setattr(folders, "_before", {})
    (output / "mine" / "step1").mkdir(parents=True)
    folders.point_latest(output / "mine")
    named = folders.prepare_output_dir("output/other/step1", "step1")
    folders.take_back()
    assert named.is_dir() and (output / "latest").readlink() == Path("mine")
    path = folders.prepare_output_dir("", "step2")
    (path / "metrics.jsonl").touch()
    folders.take_back()
    assert (path / "metrics.jsonl").exists() and (output / "latest").readlink() == Path("mine")


def test_the_empty_folder_of_a_refused_step_does_not_end_the_one_before_it(output):
    """Step 1 goes on with its own run, in which step 2 was refused: other ranks may have looked for notes there."""
    (output / "mine" / "step1").mkdir(parents=True)
    (output / "mine" / "step2").mkdir()
    (output / "mine" / "step2" / ".failed-rank0.json").touch()
    folders.point_latest(output / "mine")
    assert folders.prepare_output_dir("", "step1") == output / "mine" / "step1"
