"""The command line as a user meets it: in its own process where that may matter."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from growkernels import cli, info
from growkernels.experiments import sensli
from growkernels.ops.backends import DEVICES, DTYPES, EXAMPLES

RunHere = Callable[..., tuple[object, str, str]]
COMMAND = str(Path(sys.executable).parent / "growkernels")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([COMMAND, *arguments], capture_output=True, text=True)


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> RunHere:
    """As `run`, without the seconds that a process takes to start: status, stdout and stderr."""

    def call(*arguments: str) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["growkernels", *arguments])
        try:
            status: object = cli.main()
        except SystemExit as ended:
            status = ended.code
        return status or 0, *capsys.readouterr()

    return call


def test_info_as_json_holds_everything() -> None:
    finished = run("info", "--json")
    assert finished.returncode == 0, finished.stderr
    report = json.loads(finished.stdout)
    assert report["environment"]["torch"] == torch.__version__
    assert report["built"]["torch"] == torch.__version__
    rows = {(row["op"], row["device"], row["dtype"]) for row in report["backends"]}
    assert len(rows) == len(EXAMPLES) * len(DEVICES) * len(DTYPES)
    for row in report["backends"]:
        assert row["backend"] or row["refused"]
    for row in report["gpu_kernels"]:
        assert row["built"]
        assert row["obstacle"] or torch.cuda.is_available()


def test_info_names_every_op_and_reason(run_here: RunHere) -> None:
    status, told, errors = run_here("info")
    assert status == 0, errors
    for text in ["virtual_grads", "conv2d_relu", "float64", "portable", torch.__version__, "CUDA"]:
        assert text in told


def test_help_lists_the_commands(run_here: RunHere) -> None:
    finished = run("--help")
    assert finished.returncode == 0
    for command in ("info", "reproduce", "bench", "grow"):
        assert command in finished.stdout
    assert "sensli" in run_here("reproduce", "--help")[1]


def test_bad_arguments_are_one_sentence(run_here: RunHere) -> None:
    finished = run("inform")
    assert "Traceback" not in finished.stderr
    found = [("inform", finished.returncode, finished.stderr)]
    for arguments in (["info", "--xml"], ["reproduce", "nothing"], ["bench", "none"]):
        status, _, errors = run_here(*arguments)  # an exception would come through
        found.append((arguments[-1], status, errors))
    for word, status, errors in found:
        assert status == 2, word
        assert word in errors.strip().splitlines()[-1]


def test_environment_is_plain_json() -> None:
    environment = info.environment()
    assert json.loads(json.dumps(environment)) == environment
    assert environment["threads"] == torch.get_num_threads()
    assert environment["cpu"]


def test_commit_is_none_outside_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(info, "__file__", str(tmp_path / "site" / "growkernels" / "info.py"))
    assert info.git_commit() is None


def test_a_time_limit_stops_a_run_that_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    finished = run("reproduce", "sensli", "--minutes", "0", "--out", str(out))
    assert finished.returncode == 3
    assert "Stopped at the time limit; continue with --resume." in finished.stderr
    assert "Traceback" not in finished.stderr
    assert (out / "config.json").exists()
    assert not (out / "summary.json").exists()


def test_ctrl_c_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sensli, "run", interrupted)
    monkeypatch.setattr(sys, "argv", ["growkernels", "reproduce", "sensli"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "growkernels: Interrupted; continue with --resume.\n"


def test_a_path_without_permission_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "images/train")

    monkeypatch.setattr(sensli, "run", refused)
    monkeypatch.setattr(sys, "argv", ["growkernels", "reproduce", "sensli"])
    assert cli.main() == 1
    message = "growkernels: No permission to use images/train; allow it or give another path.\n"
    assert capsys.readouterr().err == message
