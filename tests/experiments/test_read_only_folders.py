"""Folders that nobody may write, and files where a folder should be: each writer says one sentence
and leaves nothing behind. Run as a program, this file calls the writers.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from write_rights import NOT_GIVEN_UP, without_the_right_to_write_anywhere

from growkernels import checkpoint, cli
from growkernels.experiments.run_folder import RunFolder

TOLD = (
    "status 1: growkernels", "status 2: growkernels", "OSError: ", "RunFolderError: ",
)  # fmt: skip
ROOT, HERE = Path(cli.__file__).parents[1], Path(__file__).parent
CONFIG = {"experiment": "test"}


def build() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 2))


def command(*arguments: str) -> Callable[[], str]:
    def call() -> str:
        sys.argv = ["growkernels", *arguments]
        told = io.StringIO()
        with contextlib.redirect_stderr(told):
            try:
                status: object = cli.main()
            except SystemExit as ended:
                status = ended.code
        return f"status {status}: {told.getvalue()}"

    return call


def raised(action: Callable[[], object]) -> Callable[[], str]:
    def call() -> str:
        try:
            action()
        except (OSError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
        return "nothing"

    return call


def begin_again(path: Path) -> None:
    run = RunFolder(path, CONFIG, resume=True)
    try:
        run.state.save("part", {"a": 1})
    finally:
        run.close()


def writers(target: str, inputs: str) -> dict[str, Callable[[], str]]:
    record, model = f"{inputs}/record.json", "test_read_only_folders:build"
    grow = ("grow", f"{inputs}/checkpoint.pt", "--record", record, "--build", model)
    bench = ("bench", "splitting", "--busy", "--quick", "--results")
    return {
        "reproduce": command("reproduce", "sensli", "--out", target),
        "reproduce inside": command("reproduce", "sensli", "--out", f"{target}/run"),
        "grow": command(*grow, "--out", f"{target}/grown.pt"),
        "bench": command(*bench, target),
        "save": raised(lambda: checkpoint.save(target, build())),
        "save inside": raised(lambda: checkpoint.save(f"{target}/saved", build())),
    }


def test_one_sentence_and_nothing_left(tmp_path: Path) -> None:
    inputs, begun = tmp_path / "inputs", tmp_path / "begun"
    inputs.mkdir()
    torch.save(build().state_dict(), inputs / "checkpoint.pt")
    (inputs / "record.json").write_text("[]")
    RunFolder(begun, CONFIG).close()
    begun.chmod(0o555)
    (tmp_path / "read-only").mkdir(mode=0o555)
    (tmp_path / "file").write_text("mine")
    before = sorted(map(str, tmp_path.rglob("*")))
    finished = subprocess.run(
        [sys.executable, __file__, str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, HERE.parent)))},
        preexec_fn=without_the_right_to_write_anywhere,
        capture_output=True,
        text=True,
        timeout=300,
    )
    after = sorted(map(str, tmp_path.rglob("*")))
    begun.chmod(0o755)  # so that it can be removed
    if finished.returncode == NOT_GIVEN_UP:
        pytest.skip("root may write anywhere here, and cannot give that up")
    assert finished.returncode == 0, finished.stderr
    told = json.loads(finished.stdout.splitlines()[-1])
    assert len(told) == 13
    for name, words in told.items():
        assert words.startswith(TOLD), (name, words)
        assert "\n" not in words.rstrip("\n"), (name, words)
        assert str(tmp_path) in words, (name, words)
    assert after == before
    assert (tmp_path / "file").read_text() == "mine"


def call_all(folder: Path) -> dict[str, str]:
    found = {"resume": raised(lambda: begin_again(folder / "begun"))()}
    for target in (folder / "read-only", folder / "file"):
        for name, call in writers(str(target), str(folder / "inputs")).items():
            found[f"{name}, {target.name}"] = call()
    return found


if __name__ == "__main__":
    print(json.dumps(call_all(Path(sys.argv[1]))))
