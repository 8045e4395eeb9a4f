import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

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


def test_a_real_full_device_is_named(tmp_path):
    folder = RunFolder(tmp_path / "run", CONFIG)
    (folder.path / "metrics.jsonl").symlink_to("/dev/full")
    folder.log(epoch=1)
    with pytest.raises(RunFolderError, match="disk is full"):
        folder.save_checkpoint({})
    (folder.path / "metrics.jsonl").unlink()
    folder.close()
    assert json.loads((folder.path / "metrics.jsonl").read_text()) == {"epoch": 1}


def test_metrics_after_the_last_checkpoint_are_dropped_on_resume(tmp_path):
    folder = RunFolder(tmp_path / "run", CONFIG)
    folder.log(epoch=1, loss=0.5)
    folder.save_checkpoint({"epoch": 1, "weights": torch.ones(2)})
    folder.log(epoch=2, loss=0.4)
    folder.close()
    again = RunFolder(tmp_path / "run", CONFIG, resume=True)
    state = again.load_checkpoint()
    assert state["epoch"] == 1
    assert torch.equal(state["weights"], torch.ones(2))
    again.log(epoch=2, loss=0.4)
    again.close()
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["epoch"] for line in lines] == [1, 2]


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
