"""`growkernels bench`, or `python -m benchmarks` in a checkout: run families, store results."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import pytest

from benchmarks.against import compare_with
from benchmarks.environment import busy_cores, disturbance
from benchmarks.families import cases_on, family_files, load_family
from benchmarks.results import RESULTS
from benchmarks.sources import uncommitted
from growkernels.ops.gpu_support import no_gpu

DESCRIPTION = (
    "Times our ops and their opponents in turn in one process, and prints a table of speed-ups, "
    "memory and shares of the machine's ceiling. A family of which every case ran is stored in "
    "benchmarks/results, from a clean commit alone. All families take some 20 minutes on two cores."
)


def main(arguments: list[str] | None = None) -> int:
    files = family_files()
    parser = argparse.ArgumentParser(prog="growkernels bench", description=DESCRIPTION)
    parser.add_argument(
        "families", nargs="*", metavar="FAMILY", help=f"all, or some of {', '.join(files)}"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few rounds, stored in --results alone"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="cpu by default")
    parser.add_argument("--list", action="store_true", help="name the cases, run nothing")
    parser.add_argument(
        "--results", type=Path, help="folder to store every case in as soon as it has run"
    )
    parser.add_argument("--busy", action="store_true", help="go on though the machine is busy")
    parser.add_argument(
        "--against", metavar="REV", help="time ours beside that commit's, case by case; not stored"
    )
    options = parser.parse_args(arguments)
    unknown = [name for name in options.families if name not in files]
    if unknown:
        print(
            f"growkernels bench: there is no family {unknown[0]!r}; known are {', '.join(files)}",
            file=sys.stderr,
        )
        return 2
    chosen = options.families or list(files)
    cases = {name: cases_on(options.device, load_family(files[name])) for name in chosen}
    if options.list:
        for name, declared in cases.items():
            for case in declared:
                print(f"{name}: {case.name} ({case.shape}; against {', '.join(case.opponents)})")
        return 0
    if not any(cases.values()):
        print(
            f"growkernels bench: {', '.join(chosen)} has no cases for {options.device}; "
            "choose another family or --device",
            file=sys.stderr,
        )
        return 2
    if options.device == "cuda" and (reason := no_gpu()):
        print(
            f"growkernels bench: --device cuda cannot be used here: {reason}; choose cpu, or "
            "--list to name the cases",
            file=sys.stderr,
        )
        return 2
    folder = options.results or (None if options.quick or options.against else RESULTS)
    if folder is not None and (reason := _no_folder_to_write(folder)):
        print(f"growkernels bench: {reason}; give --results another folder", file=sys.stderr)
        return 2
    if folder == RESULTS and (changed := uncommitted()):
        print(
            f"growkernels bench: {len(changed)} files differ from the commit, {changed[0]} first; "
            "results are stored from a commit alone: commit, or give --quick or --results FOLDER",
            file=sys.stderr,
        )
        return 2
    if options.device == "cpu" and not options.busy and (reason := _busy()):
        print(
            f"growkernels bench: {reason}; wait until it is quiet, or give --busy", file=sys.stderr
        )
        return 2
    if options.against:
        return compare_with(options.against, chosen, options.device, options.quick)
    flags = ["--benchmark-only", "-v", f"--device={options.device}"]
    flags += ["--quick"] if options.quick else []
    flags += [f"--results={options.results}"] if options.results else []
    return int(pytest.main([*(str(files[name]) for name in chosen if cases[name]), *flags]))


def _busy() -> str | None:
    return disturbance({"load_before": busy_cores(), "cpus": os.cpu_count()})


def _no_folder_to_write(folder: Path) -> str | None:
    """Why no results can be stored there, or None; makes the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        return f"{folder} is a file"
    except OSError as error:
        return f"{folder} cannot be made ({error.strerror})"
    return None if os.access(folder, os.W_OK) else f"{folder} cannot be written"


if __name__ == "__main__":
    sys.exit(main())
