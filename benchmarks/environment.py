"""Where a benchmark ran: everything a reader needs to judge or repeat the figures."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import re
import time
from pathlib import Path
from typing import Any

import torch

from growkernels import info


def describe(device: torch.device) -> dict[str, Any]:
    """What `growkernels info` knows, the machine's name and the time, as JSON values."""
    environment = info.environment()
    cpu_run = f"{_cpu_name()}, {environment['threads']} threads"
    return {
        "machine": cpu_run if device.type == "cpu" else torch.cuda.get_device_name(device),
        "device": device.type,
        "triton": _triton_version(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "load_before": busy_cores(),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **environment,
    }


def busy_cores(seconds: float = 0.5) -> float:
    """How many cores are busy on average over so long a time in which we do nothing."""
    before = _busy_and_all()
    time.sleep(seconds)
    after = _busy_and_all()
    passed = after[1] - before[1]
    cores = os.cpu_count() or 1
    return round(cores * (after[0] - before[0]) / passed, 2) if passed else 0.0


def disturbance(environment: dict[str, Any]) -> str | None:
    """What stands against timing where other programs keep half a core or more busy, else None.

    Threads of one parallel region then wait for each other, which slows short calls out of all
    proportion; interleaving does not mend that.
    """
    if environment["load_before"] < 0.5:
        return None
    return (
        f"other programs keep {environment['load_before']:.1f} of {environment['cpus']} cores "
        "busy, which distorts ratios of short calls"
    )


def machine_slug(environment: dict[str, Any]) -> str:
    """The machine's name as part of a file name: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", str(environment["machine"]).lower()).strip("-")


def _busy_and_all() -> tuple[int, int]:
    """Ticks that all cores have spent busy, and altogether; zeros where that is not told."""
    statistics = Path("/proc/stat")
    if not statistics.exists():
        return 0, 0
    # user, nice, system, idle, waiting for a disk, interrupts, and what other machines have stolen
    ticks = [int(word) for word in statistics.read_text().splitlines()[0].split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def _triton_version() -> str | None:
    try:
        return importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    name = re.sub(r"\((R|TM)\)", "", info.cpu_model())
    cpuinfo = Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    generation = [re.search(rf"^{key}\s*: (\d+)$", text, re.M) for key in ("cpu family", "model")]
    # Virtual machines hide the product number; family and model still tell generations apart.
    if not re.search(r"\d", name) and all(generation):
        family, model = (found[1] for found in generation if found)
        name += f" (family {family}, model {model})"
    return " ".join(name.split())
