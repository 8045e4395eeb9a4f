"""`make gpu-reproduce`: a paper's experiments on a GPU in pieces of a few minutes that continue.

A piece works in runs/gpu-PAPER, stops at a checkpoint when its time is up, and leaves the run's
state in OUT as files of at most 15 MiB, 58 MiB together. On another machine `--from` a copy of that
folder goes on. Works with any Python that has the packages; nothing is installed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_suite import ROOT, build_step, find_device
from timed_command import Log, run_timed
from travelling_state import pack, unpack

# What each of them is in the words of `growkernels reproduce`.
EXPERIMENTS = {
    "sensli": ["sensli"],
    "sensli-cnn": ["sensli", "--net", "cnn"],
    "basis": ["basis", "--autocast"],
    "scaling": ["scaling"],
}
STOPPED = 3  # exit status of `growkernels reproduce` at its time limit
_RESERVE_SECONDS = 20.0  # to stop between two steps and to pack what there is


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu-reproduce", description=__doc__)
    parser.add_argument("experiment", choices=EXPERIMENTS)
    parser.add_argument("--data", type=Path, help="folder of the data set, for networks on images")
    parser.add_argument("--minutes", type=float, default=9.0, help="for this piece altogether")
    parser.add_argument("--out", type=Path, help="where the state goes; runs/gpu-PAPER-state")
    parser.add_argument("--from", type=Path, dest="source", help="folder with an earlier OUT")
    parser.add_argument("--run", type=Path, help="where the run lies; runs/gpu-PAPER")
    parser.add_argument("--dry-run", action="store_true", help="quick preset on the CPU, no build")
    options = parser.parse_args(arguments)
    end = time.monotonic() + 60 * options.minutes
    name = f"gpu-{options.experiment}"
    run = options.run or ROOT / "runs" / name
    out = options.out or ROOT / "runs" / f"{name}-state"
    preset, device = ("quick", "cpu") if options.dry_run else ("paper", "cuda")
    command = [
        *(sys.executable, str(ROOT / "tools" / "growkernels"), "reproduce"),
        *EXPERIMENTS[options.experiment],
        *("--preset", preset, "--device", device, "--out", str(run), "--resume"),
        *(["--data", str(options.data.resolve())] if options.data else []),
    ]
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "log.txt")
    try:
        if options.source and not run.exists():
            unpack(options.source, run)
        if not options.dry_run:
            _build(end, log)
    except (OSError, RuntimeError) as error:
        print(f"gpu-reproduce: {error}", file=sys.stderr)
        return 2
    left = max(0.0, end - time.monotonic() - _RESERVE_SECONDS)
    # A rehearsal has the time that a slow machine needs to begin.
    limit = 600.0 if options.dry_run else left + _RESERVE_SECONDS / 2
    outcome = run_timed(
        [*command, "--minutes", f"{left / 60:.3f}"],
        limit,
        log,
        folder=ROOT,
        environment={"PYTHONPATH": str(ROOT)},
        on_line=lambda line: print(line, flush=True),
    )
    finished = outcome.returncode == 0
    stopped = outcome.returncode == STOPPED or outcome.status == "out of time"
    left_out = pack(run, out) if run.exists() else []
    status = "finished" if finished else "to be continued" if stopped else "failed"
    report = {"experiment": options.experiment, "status": status, "left out": left_out}
    (out / "status.json").write_text(json.dumps(report, indent=1) + "\n")
    print(f"{options.experiment}: {status}; state in {out}")
    for file in left_out:
        print(f"  too large to travel: {file}")
    return 0 if finished or stopped else 1


def _build(end: float, log: Log) -> None:
    """Brings the op library up to date for this GPU. Raises RuntimeError where that fails."""
    device = find_device()
    if device["capability"] is None:
        raise RuntimeError(f"torch {device['torch']} sees no GPU; rehearse with --dry-run")
    step = build_step(device["capability"])
    left = end - time.monotonic()
    outcome = run_timed(step.command, left, log, folder=ROOT, environment=step.environment)
    if outcome.status != "passed":
        raise RuntimeError("the build did not pass; its messages are in log.txt")


if __name__ == "__main__":
    sys.exit(main())
