"""Runs of random calls: for some minutes, or up to a number of calls in all, and their record.

A case is a few numbers and words, so that it can be stored and made again. One that fails is
appended to a corpus, which tests replay. What a long run has come to is kept seed by seed: calls,
seeds, commit, failures.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

Case = dict[str, Any]


@dataclass(frozen=True)
class Calls:
    """What is called at random.

    Attributes:
        make: a case.
        check: "right", or the one sentence with which the call was refused; raises if neither.
        corpus: where cases that failed are appended, a line each.
        record: where long runs are counted.
        of_a_seed: calls, about a minute's: a long run loses no more when it is stopped.
    """

    make: Callable[[random.Random], Case]
    check: Callable[[Case], str]
    corpus: Path
    record: Path
    of_a_seed: int

    def stored(self) -> list[Case]:
        """The cases that once failed."""
        return [json.loads(line) for line in self.corpus.read_text().splitlines()]


@dataclass
class Outcomes:
    """What became of some calls."""

    right: int = 0
    refused: int = 0
    failed: list[Case] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return self.right + self.refused + len(self.failed)

    def __str__(self) -> str:
        return (
            f"{self.calls} calls, {self.right} right, {self.refused} refused in a sentence, "
            f"{len(self.failed)} failures"
        )


def run(
    calls: Calls, rng: random.Random, goes_on: Callable[[Outcomes], bool], store: bool
) -> Outcomes:
    """Calls for as long as `goes_on`; failures are printed and, on demand, put into the corpus."""
    outcomes = Outcomes()
    while goes_on(outcomes):
        case = calls.make(rng)
        try:
            if calls.check(case) == "right":
                outcomes.right += 1
            else:
                outcomes.refused += 1
        except Exception as error:
            outcomes.failed.append(case)
            line = json.dumps(case)
            print(f"{type(error).__name__}: {error}\n  {line}", flush=True)
            if store:
                with calls.corpus.open("a") as corpus:
                    corpus.write(line + "\n")
    return outcomes


def long_run(calls: Calls, count: int, record: Path, store: bool) -> Outcomes:
    """Seed after seed until `record` has `count` calls; a finished seed is never lost.

    The record has an entry for every commit that took part, with its first and last seed.
    """
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    entries = json.loads(record.read_text()) if record.exists() else []
    seed = entries[-1]["last_seed"] + 1 if entries else 0
    outcomes = Outcomes()
    while sum(entry["calls"] for entry in entries) < count:
        found = run(calls, random.Random(seed), lambda done: done.calls < calls.of_a_seed, store)
        if not entries or entries[-1]["commit"] != commit:
            entries.append(
                {
                    "commit": commit,
                    "instructions": torch.backends.cpu.get_cpu_capability(),
                    "first_seed": seed,
                    "last_seed": seed,
                    **{"calls": 0, "right": 0, "refused": 0, "failed": []},
                }
            )
        entry = entries[-1]
        entry["last_seed"] = seed
        for name in ("calls", "right", "refused", "failed"):
            entry[name] += getattr(found, name)
        unfinished = record.with_suffix(".unfinished")
        unfinished.write_text(json.dumps(entries, indent=2) + "\n")
        unfinished.replace(record)
        outcomes.right += found.right
        outcomes.refused += found.refused
        outcomes.failed += found.failed
        seed += 1
    return outcomes


def command(calls: Calls, description: str | None) -> int:
    """Runs what the command line asks for; 1 if a call failed."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=None, help="another one at every start")
    counted = "as many in RECORD, of all runs; with --seed, as many of that seed alone"
    parser.add_argument("--calls", type=int, default=None, help=counted)
    parser.add_argument("--record", type=Path, default=calls.record)
    parser.add_argument("--store", action="store_true", help="append failures to the corpus")
    options = parser.parse_args()
    if options.calls is not None and options.seed is None:
        outcomes = long_run(calls, options.calls, options.record, options.store)
        print(f"{options.record}: {outcomes}")
    else:
        seed = options.seed if options.seed is not None else random.randrange(1 << 31)
        end = time.monotonic() + 60 * options.minutes

        def goes_on(done: Outcomes) -> bool:
            return time.monotonic() < end if options.calls is None else done.calls < options.calls

        outcomes = run(calls, random.Random(seed), goes_on, options.store)
        print(f"seed {seed}: {outcomes}")
    return 1 if outcomes.failed else 0
