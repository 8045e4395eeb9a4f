"""`growkernels bench --against REV`: ours of this checkout beside ours of another commit.

The other commit is built in a git worktree of its own. Both run in a process each, which time the
same cases in turn, so that whatever slows the machine slows both.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.results import Spread

_ROOT = Path(__file__).resolve().parent.parent
_WORKER = Path(__file__).resolve().parent / "against_worker.py"
# (seconds per case, fewest rounds, most rounds)
_FULL = (5.0, 7, 41)
_QUICK = (1.0, 3, 9)


class Side:
    """A process that times the cases of one tree on demand."""

    def __init__(self, tree: Path, device: str) -> None:
        environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONSAFEPATH": "1"}
        self._process = subprocess.Popen(
            [sys.executable, str(_WORKER), str(tree), device],
            cwd=tree,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *words: object) -> Any:
        """The answer to a request; raises RuntimeError where the process has ended."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(words) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self._process.wait()
            raise RuntimeError(
                f"the process that times {words[1:]} ended with status {status}; its own message "
                "is above"
            )
        return json.loads(line)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()


def compare_with(revision: str, families: list[str], device: str, quick: bool) -> int:
    """Prints for every case that both commits have the other's time over ours; an exit status."""
    # So that a run which is told to end leaves no worktree behind.
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        with ExitStack() as stack:
            tree = stack.enter_context(built_tree(revision))
            sides = []
            for root in (tree, _ROOT):
                sides.append(Side(root, device))
                stack.callback(sides[-1].close)
            other, ours = sides
            for line in compare(other, ours, families, quick):
                print(line, flush=True)
    except (RuntimeError, ValueError) as error:
        print(f"growkernels bench: {error}", file=sys.stderr)
        return 1
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def compare(other: Side, ours: Side, families: list[str], quick: bool) -> Iterator[str]:
    """A line for each case: times per call, and the other's over ours with its quartiles."""
    yield "other's time over this checkout's, medians with quartiles; above 1 this one is faster"
    for family in families:
        theirs, mine = (side.ask("cases", family) for side in (other, ours))
        for name in mine:
            if name not in theirs:
                yield f"{family}: {name}: only here"
                continue
            ratios, seconds = _rounds(other, ours, family, name, quick)
            spread = Spread.of(ratios)
            yield (
                f"{family}: {name}: {spread.median:.3f} ({spread.lower:.3f} to {spread.upper:.3f}),"
                f" {1e3 * min(seconds):.4g} ms a call here, {len(ratios)} rounds"
            )


def _rounds(
    other: Side, ours: Side, family: str, name: str, quick: bool
) -> tuple[list[float], list[float]]:
    seconds, fewest, most = _QUICK if quick else _FULL
    for side in (other, ours):
        side.ask("prepare", family, name)
    # As many calls on either side as the slower one makes in a fiftieth of a second.
    once = max(side.ask("time", 1) for side in (other, ours))
    calls = max(1, int(0.02 / max(once, 1e-9)))
    rounds = min(max(int(seconds / (2 * calls * once)), fewest), most)
    theirs: list[float] = []
    mine: list[float] = []
    for number in range(rounds):
        # Neither is always the second.
        order = ((other, theirs), (ours, mine))
        for side, times in order if number % 2 == 0 else order[::-1]:
            times.append(side.ask("time", calls) / calls)
    return [a / b for a, b in zip(theirs, mine, strict=True)], mine


@contextmanager
def built_tree(revision: str) -> Iterator[Path]:
    """A worktree of the commit with its op library built, removed again afterwards.

    Raises ValueError for what is no commit, RuntimeError where it cannot be built.
    """
    found = _git("rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}")
    if found.returncode:
        raise ValueError(f"there is no commit {revision!r} in {_ROOT}; give one that git log shows")
    with tempfile.TemporaryDirectory(prefix="growkernels-against-") as folder:
        tree = Path(folder) / "tree"
        added = _git("worktree", "add", "--detach", str(tree), found.stdout.strip())
        if added.returncode:
            raise RuntimeError(f"git could not check out {revision}: {added.stderr.strip()}")
        try:
            print(f"building {revision} in {tree}", flush=True)
            built = subprocess.run(
                [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
                cwd=tree,
                env={**os.environ, "PYTHONPATH": str(tree)},
                capture_output=True,
                text=True,
                check=False,
            )
            if built.returncode:
                raise RuntimeError(f"{revision} cannot be built: {built.stderr[-2000:]}")
            yield tree
        finally:
            _git("worktree", "remove", "--force", str(tree))


def _git(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["git", "-C", str(_ROOT), *arguments], capture_output=True, text=True, check=False
    )
