"""What this installation is and runs on: for `growkernels info`, and stored with every result."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

import growkernels
from growkernels.ops.backends import DEVICES, DTYPES, EXAMPLES, choose_backend
from growkernels.ops.gpu_support import gpu_kernels
from growkernels.ops.library import build_info, library_path

# The instruction sets that decide how fast the CPU kernels and oneDNN run.
CPU_FEATURES = (
    "avx2",
    "fma",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_bf16",
    "amx_fp16",
)


def environment() -> dict[str, Any]:
    """The machine and the versions a result depends on, as plain values that JSON can hold."""
    return {
        "growkernels": growkernels.__version__,
        "commit": git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None,
        "onednn": onednn_version(),
        "cpu": cpu_model(),
        "cpu_features": cpu_features(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu_name(),
        "gpu_driver": gpu_driver(),
    }


def built() -> dict[str, Any]:
    """What the op library was built for."""
    info = build_info()
    return {
        "library": str(library_path()),
        "torch": info.torch_version,
        "cuda": info.cuda_version,
        "cuda_architectures": list(info.cuda_architectures),
        "cuda_families": list(info.cuda_families),
        "cuda_note": info.cuda_note,
        "compiler": info.compiler,
    }


def gpu_kernel_table() -> list[dict[str, Any]]:
    """One row per family and language: its GPU kernels, and whether they can run here."""
    return [{**kernels._asdict(), "ops": list(kernels.ops)} for kernels in gpu_kernels()]


def backend_table() -> list[dict[str, Any]]:
    """One row per op, device and dtype: the backend that would run, and the refused ones."""
    rows = []
    for op in EXAMPLES:
        for device in DEVICES:
            for dtype in DTYPES:
                choice = choose_backend(op, device, dtype)
                rows.append(
                    {
                        "op": op,
                        "device": device,
                        "dtype": str(dtype).removeprefix("torch."),
                        "backend": choice.backend,
                        "refused": dict(choice.refused),
                    }
                )
    return rows


def cpu_model() -> str:
    """The CPU's name as the operating system states it."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cpu_features() -> list[str]:
    """Those of CPU_FEATURES that this CPU has."""
    flags = (_cpuinfo("flags") or "").split()
    return [feature for feature in CPU_FEATURES if feature in flags]


def onednn_version() -> str | None:
    """The version of the oneDNN inside torch, None where torch was built without it."""
    found = re.search(r"(?:MKL-DNN|oneDNN) v([\d.]+)", torch.__config__.show())
    return found[1] if found else None


def git_commit() -> str | None:
    """The commit of the checkout, "+" added when files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    commit = _output_of(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    changes = _output_of(["git", "-C", str(root), "status", "--porcelain", "-uno"])
    return f"{commit}+" if commit and changes else commit


def gpu_name() -> str | None:
    """The name of the current GPU, None without one."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def gpu_driver() -> str | None:
    """The version of the NVIDIA driver, None without a GPU."""
    if not torch.cuda.is_available():
        return None
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    versions = _output_of(query)
    return versions.splitlines()[0] if versions else None


def _cpuinfo(key: str) -> str | None:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return None
    found = re.search(rf"^{key}\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def _output_of(command: list[str]) -> str | None:
    try:
        finished = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return finished.stdout.strip() or None if finished.returncode == 0 else None
