import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from growkernels.experiments.run_folder import RunFolder, RunFolderError, write_atomically

CONFIG = {"experiment": "test", "epochs": 3}


def test_a_new_folder_holds_its_config_and_takes_files(tmp_path):
    folder = RunFolder(tmp_path / "a" / "run", CONFIG)
    assert json.loads((folder.path / "config.json").read_text()) == CONFIG
    folder.write_bytes("plots/one.png", b"png")
    assert (folder.path / "plots" / "one.png").read_bytes() == b"png"
    assert folder.read_json("summary.json") is None
    folder.close()


def test_an_existing_folder_needs_resume(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).close()
    with pytest.raises(RunFolderError, match="already holds files; add --resume"):
        RunFolder(tmp_path / "run", CONFIG)
    RunFolder(tmp_path / "run", CONFIG, resume=True).close()


def test_resume_starts_what_is_not_there(tmp_path):
    RunFolder(tmp_path / "run", CONFIG, resume=True).close()
    assert (tmp_path / "run" / "config.json").exists()


def test_a_changed_config_is_refused_by_name(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).close()
    with pytest.raises(RunFolderError, match=r"another configuration \(different: epochs\)"):
        RunFolder(tmp_path / "run", {**CONFIG, "epochs": 4}, resume=True)
    assert json.loads((tmp_path / "run" / "config.json").read_text()) == CONFIG


def test_foreign_folders_and_files_are_left_alone(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("text")
    with pytest.raises(RunFolderError, match="already holds files"):
        RunFolder(tmp_path / "mine", CONFIG)
    with pytest.raises(RunFolderError, match="not the folder of a run"):
        RunFolder(tmp_path / "mine", CONFIG, resume=True)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(RunFolderError, match="is a file"):
        RunFolder(tmp_path / "mine" / "thesis.tex", CONFIG)


def test_two_processes_cannot_share_a_folder(tmp_path):
    folder = RunFolder(tmp_path / "run", CONFIG)
    with pytest.raises(RunFolderError, match="in use by another process"):
        RunFolder(tmp_path / "run", CONFIG, resume=True)
    folder.close()
    RunFolder(tmp_path / "run", CONFIG, resume=True).close()


def test_another_process_holds_a_folder_until_it_is_killed(tmp_path):
    program = (
        "import sys; from pathlib import Path\n"
        "from growkernels.experiments.run_folder import RunFolder\n"
        f"folder = RunFolder(Path(sys.argv[1]), {CONFIG})\n"
        "print('ready', flush=True); sys.stdin.read()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path / "run")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"ready\n"
    with pytest.raises(RunFolderError, match="in use by another process; wait for it"):
        RunFolder(tmp_path / "run", CONFIG, resume=True)
    process.kill()
    process.communicate()
    RunFolder(tmp_path / "run", CONFIG, resume=True).close()


def test_an_unwritable_place_is_one_sentence(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(RunFolderError, match=r"No permission to create .*; give --out"):
        RunFolder(tmp_path / "run", CONFIG)


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_old_file_whole(tmp_path, monkeypatch):
    target = write_atomically(tmp_path / "state.pt", b"old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunFolderError, match=r"disk is full, .*state.pt was not written"):
        write_atomically(target, b"new")
    assert target.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_writers_of_one_file_do_not_disturb_each_other(tmp_path, monkeypatch):
    """A worker of a killed run writes its last state while the resumed run writes the same one."""
    target, plain = tmp_path / "state.pt", os.fsync

    def beside_another(descriptor):
        plain(descriptor)
        monkeypatch.setattr(os, "fsync", plain)
        write_atomically(target, b"the other's")
        assert target.read_bytes() == b"the other's"

    monkeypatch.setattr(os, "fsync", beside_another)
    write_atomically(target, b"ours")
    assert target.read_bytes() == b"ours"
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_what_killed_writers_left_is_gone_when_the_run_goes_on(tmp_path, monkeypatch):
    folder, plain, names = RunFolder(tmp_path / "run", CONFIG), os.replace, []
    monkeypatch.setattr(os, "replace", lambda old, new: (names.append(old), plain(old, new)))
    folder.state.save("exp2", {"a": 1})
    names[0].write_bytes(b"half of it")
    folder.close()
    RunFolder(tmp_path / "run", CONFIG, resume=True).close()
    assert [p.name for p in (tmp_path / "run" / "state").iterdir()] == ["exp2.pt"]


def test_metrics_are_replaced_as_a_whole(tmp_path):
    folder = RunFolder(tmp_path / "run", CONFIG)
    for epochs in (3, 2):
        folder.write_metrics({"epoch": epoch, "loss": 0.5} for epoch in range(epochs))
    folder.close()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [0, 1]


@pytest.mark.parametrize("content", [b"", b"{", b"[1, 2]", b"\xff\xfe", b"null"])
def test_a_config_that_is_none_is_one_sentence(tmp_path, content):
    RunFolder(tmp_path / "run", CONFIG).close()
    (tmp_path / "run" / "config.json").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"config\.json .*without --resume"):
        RunFolder(tmp_path / "run", CONFIG, resume=True)


def test_a_config_that_is_a_folder_or_huge_is_one_sentence(tmp_path):
    RunFolder(tmp_path / "run", CONFIG).close()
    config = tmp_path / "run" / "config.json"
    with config.open("wb") as file:
        file.truncate(1 << 40)  # sparse: it takes no room on the disk
    with pytest.raises(RunFolderError, match=r"config\.json cannot be read as JSON"):
        RunFolder(tmp_path / "run", CONFIG, resume=True)
    config.unlink()
    config.mkdir()
    with pytest.raises(RunFolderError, match=r"config\.json cannot be read as JSON"):
        RunFolder(tmp_path / "run", CONFIG, resume=True)


def test_a_part_is_computed_once_and_must_be_what_it_should(tmp_path):
    folder = RunFolder(tmp_path / "run", CONFIG)
    for compute in (lambda: {"a": 1}, lambda: {"a": 2}):
        assert folder.state.computed("part", compute, lambda state: state["a"]) == 1
    folder.state.save("part", {"b": 1})
    with pytest.raises(RunFolderError, match=r"part\.pt does not hold the state .*delete it"):
        folder.state.computed("part", lambda: None, lambda state: state["a"])
    folder.close()


def test_a_damaged_state_names_the_file_and_the_way_out(tmp_path):
    folder = RunFolder(tmp_path / "run", CONFIG)
    folder.state.save("exp2", {"a": 1})
    assert folder.state.load("exp2") == {"a": 1}
    assert folder.state.load("exp3") is None
    (folder.path / "state" / "exp2.pt").write_bytes(b"nonsense")
    with pytest.raises(RunFolderError, match=r"exp2\.pt cannot be read .* delete it"):
        folder.state.load("exp2")
    folder.close()


def test_killing_a_writer_never_leaves_half_a_file(tmp_path):
    """A process that rewrites one file for ever is killed; the file is one of its versions."""
    script = (
        "import sys; from pathlib import Path\n"
        "from growkernels.experiments.run_folder import write_atomically\n"
        "print('ready', flush=True)\n"
        "for n in range(10**9): write_atomically(Path(sys.argv[1]), bytes([n % 7]) * 2_000_000)\n"
    )
    target = tmp_path / "state.pt"
    process = subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE)
    process.stdout.readline()
    while not target.exists():
        pass
    for _ in range(20000):
        pass
    process.kill()
    process.wait()
    content = target.read_bytes()
    assert len(content) == 2_000_000
    assert len(set(content)) == 1
