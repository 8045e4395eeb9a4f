"""The example under torchrun: killed, started again, at the same world size and at another one."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parent / "example_that_dies.py"
ROOT = SCRIPT.parents[2]
STEPS = 12


def run(out: Path, processes: int, *arguments: str, dies_at: int = -1) -> int:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={processes}", "--max-restarts=0", str(SCRIPT)]
    command += [f"--out={out}", f"--steps={STEPS}", "--batch=32", "--save-every=4"]
    command += ["--grow-at", "3", "7", *arguments]
    environment = {**os.environ, "DIES_AT": str(dies_at), "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
    ran = subprocess.run(command, env=environment, timeout=200, capture_output=True, text=True)
    print(ran.stderr)  # shown where a test fails
    return ran.returncode


def result(out: Path) -> dict[str, Any]:
    return json.loads((out / "result.json").read_text())  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("undisturbed")
    assert run(out, 2) == 0
    return result(out)


def test_a_killed_run_goes_on(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    assert run(tmp_path, 2, dies_at=6) != 0
    assert run(tmp_path, 2) == 0
    assert result(tmp_path) == undisturbed  # to the last bit
    assert len(undisturbed["positions"]) == 2


def test_a_killed_fsdp2_run_goes_on_in_one_process(
    undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    assert run(tmp_path, 2, "--mode=fsdp2", dies_at=6) != 0
    assert not (tmp_path / "result.json").exists()
    assert run(tmp_path, 1, "--mode=fsdp2") == 0
    told = result(tmp_path)
    assert told["positions"] == undisturbed["positions"]
    assert told["loss"] == pytest.approx(undisturbed["loss"], rel=1e-3)


def test_cifar_is_read(tmp_path: Path) -> None:
    sys.path.insert(0, str(ROOT / "examples"))
    import train_distributed

    rows = b"".join(struct.pack("B", label) + bytes([255] * 3072) for label in (3, 7))
    (tmp_path / "data_batch_1.bin").write_bytes(rows)
    x, y = train_distributed.images(tmp_path)
    assert x.shape == (2, 3, 32, 32)
    assert x.unique().tolist() == [1.0]
    assert y.tolist() == [3, 7]
