"""Where a benchmark ran: everything a reader needs to judge or repeat the figures."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import re
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
        "load_before": os.getloadavg()[0],
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **environment,
    }


def disturbance(environment: dict[str, Any]) -> str | None:
    """A warning where other programs kept a core or more busy before the run, else None.

    Threads of one parallel region then wait for each other, which slows short calls out of all
    proportion; interleaving does not mend that.
    """
    if environment["load_before"] < 1.0:
        return None
    return (
        f"Warning: other programs kept {environment['load_before']:.1f} of {environment['cpus']} "
        "cores busy before this run, which distorts ratios of short calls; run it again alone."
    )


def machine_slug(environment: dict[str, Any]) -> str:
    """The machine's name as part of a file name: lower case, words joined by hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", str(environment["machine"]).lower()).strip("-")


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
