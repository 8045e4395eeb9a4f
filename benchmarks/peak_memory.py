"""Peak extra memory of one call of every variant, on the CPU measured in a process of its own.

On the CPU the kernel's own high-water mark counts everything, scratch of C++ code and libraries
included: /proc/self/clear_refs resets it, and VmHWM after the call minus VmRSS before it is the
extra peak (exact to some 0.5 MiB: the kernel batches its counters by thread). glibc keeps freed
blocks and would hide later peaks, so the process runs with small mmap and trim thresholds.
On a GPU it is the caching allocator's `max_memory_allocated`.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.case import Call, Case, Workload

_REPOSITORY = Path(__file__).resolve().parent.parent
_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
RESOLUTION_BYTES = 2**19
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size to the current one


def measure_in_subprocess(module: str, case: Case) -> dict[str, int | None]:
    """Peak extra bytes on the CPU of each variant of `case`, declared in `module`.

    None where this system does not let them be measured.
    """
    if not os.access(_CLEAR_REFS, os.W_OK):
        return dict.fromkeys(case.variants)
    finished = subprocess.run(
        [sys.executable, "-m", "benchmarks.peak_memory", module, case.name],
        cwd=_REPOSITORY,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if finished.returncode != 0:
        raise RuntimeError(
            f"measuring the memory of case {case.name!r} failed with exit status "
            f"{finished.returncode}; its own message is above"
        )
    peaks: dict[str, int | None] = json.loads(finished.stdout.splitlines()[-1])
    return peaks


def measure_here(case: Case, workload: Workload, device: torch.device) -> dict[str, int | None]:
    """Peak extra bytes of each variant of `case` in this process."""
    return {name: peak_extra_bytes(workload.calls[name], device) for name in case.variants}


def peak_extra_bytes(call: Call, device: torch.device) -> int:
    """Extra peak of one call, its result included, after one call that warms it up."""
    call()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device) - before)
    _CLEAR_REFS.write_text(_RESET_PEAK)
    before = _status_bytes("VmRSS")
    call()
    return max(0, _status_bytes("VmHWM") - before)


def _status_bytes(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"{_STATUS} has no field {field}; this kernel cannot report peak memory")


def main(module: str, case_name: str) -> None:
    device = torch.device("cpu")
    cases: list[Case] = importlib.import_module(module).CASES
    case = next(case for case in cases if case.name == case_name)
    print(json.dumps(measure_here(case, case.prepare(device), device)))


if __name__ == "__main__":
    main(*sys.argv[1:])
