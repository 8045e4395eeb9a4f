"""Which sources a family measures, so that results can say whether those have changed since."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from benchmarks.families import family_files, load_family

_ROOT = Path(__file__).resolve().parent.parent
_SUFFIXES = (".cpp", ".h", ".cu", ".cuh", ".py")
# What runs on a GPU alone leaves results from CPUs as they are.
_GPU_ALONE = ("cuda", "triton", "gpu")
# A change of anything else, the documents and the results themselves above all, measures the same.
_MEASURED = ("csrc", "growkernels", "benchmarks", "CMakeLists.txt", "setup.py")


def source_files(kernels: tuple[str, ...], device: str, root: Path = _ROOT) -> list[Path]:
    """The files of those families of kernels, and of what all share, that run on "cpu" or "cuda".

    `kernels` are names of folders below csrc, growkernels/ops or growkernels.
    """
    folders = [
        folder
        for name in ("common", *kernels)
        for folder in (
            root / "csrc" / name,
            root / "growkernels/ops" / name,
            root / "growkernels" / name,
        )
    ]
    return sorted(
        path
        for folder in folders
        for path in folder.rglob("*")
        if path.suffix in _SUFFIXES
        and (device != "cpu" or not (path.suffix in (".cu", ".cuh") or _on_gpus_alone(path)))
    )


def fingerprint(family: str, device: str, root: Path = _ROOT) -> str | None:
    """A hash of what `family` measures on a device; None for a family that this checkout lacks."""
    file = family_files().get(family)
    if file is None:
        return None
    digest = hashlib.sha256()
    for path in source_files(load_family(file).KERNELS, device, root):
        digest.update(f"{path.relative_to(root)}\0".encode())
        digest.update(path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def uncommitted(root: Path = _ROOT) -> list[str]:
    """The files that differ from the commit and could change what is measured."""
    finished = subprocess.run(
        ["git", "-C", str(root), "status", "--porcelain", "--", *_MEASURED, ":!benchmarks/results"],
        capture_output=True,
        text=True,
        check=False,
    )
    return [line[3:] for line in finished.stdout.splitlines()]


def _on_gpus_alone(path: Path) -> bool:
    return path.name.startswith(_GPU_ALONE)
