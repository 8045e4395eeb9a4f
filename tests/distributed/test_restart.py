"""The example under torchrun: killed, started again by itself, and at another world size."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ranks import on_ranks

SCRIPT = Path(__file__).parent / "example_that_dies.py"
ROOT = SCRIPT.parents[2]
OPTIONS = ["--steps=12", "--batch=32", "--save-every=4", "--grow-at", "3", "7"]


def torchrun(out: Path, restarts: int, *arguments: str) -> int:
    """Of two processes, one of which kills itself before step 6 of its first start."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [f"--max-restarts={restarts}", str(SCRIPT), f"--out={out}", *OPTIONS, *arguments]
    environment = {**os.environ, "DIES_AT": "6", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    ran = subprocess.run(command, env=environment, timeout=1800, capture_output=True, text=True)
    print(ran.stderr)  # shown where a test fails
    return ran.returncode


def undisturbed(out: Path, mode: str, rank: int) -> None:
    """The example in a process that has met the others, or goes on from what is in the folder."""
    sys.path.insert(0, str(ROOT / "examples"))
    import train_distributed

    arguments = [f"--out={out}", f"--mode={mode}", *OPTIONS]
    train_distributed.run(train_distributed.options_of(arguments))


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed")
    on_ranks({"run": partial(undisturbed, out, "ddp")}, 2, out)
    return result(out)


def test_torchrun_starts_a_killed_run_again(expected: dict[str, Any], tmp_path: Path) -> None:
    assert torchrun(tmp_path, 3) == 0
    assert result(tmp_path) == expected  # to the last bit
    assert len(expected["positions"]) == 2


def test_a_killed_fsdp2_run_goes_on_in_one_process(
    expected: dict[str, Any], tmp_path: Path
) -> None:
    assert torchrun(tmp_path, 0, "--mode=fsdp2") != 0
    assert not (tmp_path / "result.json").exists()
    on_ranks({"run": partial(undisturbed, tmp_path, "fsdp2")}, 1, tmp_path)
    told = result(tmp_path)
    assert told["positions"] == expected["positions"]
    assert told["loss"] == pytest.approx(expected["loss"], rel=1e-3)


def test_cifar_is_read(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    import train_distributed

    rows = b"".join(struct.pack("B", label) + bytes([255] * 3072) for label in (3, 7))
    (tmp_path / "data_batch_1.bin").write_bytes(rows)
    x, y = train_distributed.images(tmp_path)
    assert x.shape == (2, 3, 32, 32)
    assert x.unique().tolist() == [1.0]
    assert y.tolist() == [3, 7]
