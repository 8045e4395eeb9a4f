"""Trains a study's stretches in worker processes, with checkpoints, and resumes them by key."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from growkernels.experiments import team
from growkernels.experiments.pool import Report, run_in_step, run_parts, workers_on
from growkernels.experiments.run_folder import FOREIGN, StateStore
from growkernels.experiments.study import Content, Result, Stretch, Training
from growkernels.growth.processes import Ranks

REPORT_SECONDS = 0.2
SAVING_SHARE = 0.05  # of the time, at most, where states are large


@dataclass(frozen=True)
class Job:
    """A stretch to train, where states are kept, and how often this one is saved there."""

    content: Content
    stretch: Stretch
    states: StateStore
    save_seconds: float
    has_children: bool
    together: bool

    def training(self) -> tuple[Training, int]:
        """The training as its last checkpoint left it, or at its beginning; and the next step."""
        stretch = self.stretch
        stored = _stored(self.states, stretch.key)
        try:
            if stored is not None:
                step, result = stored
                return self.content.resume(stretch, result), step
            parent = None if stretch.parent is None else _stored(self.states, stretch.parent)
            result_of_parent = None if parent is None else parent[1]
            return self.content.begin(stretch, result_of_parent), stretch.first
        except FOREIGN as error:
            if stored is None and stretch.parent is None:
                raise  # nothing was read
            key = stretch.parent if stored is None else stretch.key
            raise self.states.foreign(str(key), error) from error

    def save(self, training: Training, step: int) -> None:
        finished = step == self.stretch.last
        # A finished training keeps what it measured, and its weights only for its children.
        state = training.state() if self.has_children or not finished else None
        self.states.save(
            self.stretch.key, {"step": step, "measured": training.measured, "state": state}
        )


def _stored(states: StateStore, key: str) -> tuple[int, Result] | None:
    state = states.load(key)
    if state is None:
        return None
    try:
        return int(state["step"]), Result(dict(state["measured"]), state["state"])
    except FOREIGN as error:
        raise states.foreign(key, error) from error


def train_stretch(job: Job, report: Report) -> None:
    """Train to the end, or while there is time; the last checkpoint is the result."""
    _repeat_bits(job.content.device)
    if job.together:
        with team.met(job.stretch.key):
            _train_together(job, report)
        return
    training, step = job.training()
    saved = reported = time.monotonic()
    between = job.save_seconds
    while step < job.stretch.last:
        training.advance(step)
        step += 1
        now = time.monotonic()
        if now - reported > REPORT_SECONDS or step == job.stretch.last:
            reported = now
            # Also finds out whether the parent is gone, before anything is written for it.
            if report(step):
                break
        if now - saved > between and step < job.stretch.last:
            job.save(training, step)
            saved = time.monotonic()
            between = max(job.save_seconds, (saved - now) / SAVING_SHARE)
    job.save(training, step)


def _train_together(job: Job, report: Report) -> None:
    """As alone, but that all processes stop at the same step, and the first one saves."""
    training, step = job.training()
    first = Ranks().own == 0
    saved = time.monotonic()
    while step < job.stretch.last:
        training.advance(step)
        step += 1
        if team.any_of(report(step)):
            break
        if first and time.monotonic() - saved > job.save_seconds and step < job.stretch.last:
            job.save(training, step)
            saved = time.monotonic()
    if first:
        job.save(training, step)


def _repeat_bits(device: str) -> None:
    """On a GPU too, a resumed run repeats the same bits."""
    torch.backends.cudnn.deterministic = True
    if torch.device(device).type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))  # torchrun's: one GPU each
        # cuBLAS reads the variable before its first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)


def train(
    content: Content,
    states: StateStore,
    save_seconds: float,
    progress: Callable[[Stretch, int], None],
    results: dict[str, Result],
) -> None:
    """Train what is not finished yet; the finished stretches come into ``results`` by their keys.

    ``progress(stretch, step)`` is called in this process. Of what can begin, that with the longest
    way to the end of its descendants does.
    """
    stretches = content.stretches()
    inner = {stretch.parent for stretch in stretches}
    ahead: dict[str, float] = {}
    for stretch in reversed(stretches):  # children come behind their parents
        own = ahead.get(stretch.key, 0.0) + stretch.cost * (stretch.last - stretch.first)
        ahead[stretch.key] = own
        if stretch.parent is not None:
            ahead[stretch.parent] = max(ahead.get(stretch.parent, 0.0), own)

    def collect(stretch: Stretch) -> bool:
        stored = _stored(states, stretch.key)
        step = stretch.first if stored is None else stored[0]
        if not stretch.first <= step <= stretch.last:
            error = ValueError(f"step {step} of {stretch.first} to {stretch.last}")
            raise states.foreign(stretch.key, error)
        progress(stretch, step)
        if stored is None or step < stretch.last:
            return False
        results[stretch.key] = stored[1]
        return True

    waiting = [stretch for stretch in stretches if not collect(stretch)]
    waiting.sort(key=lambda stretch: -ahead[stretch.key])
    place = {stretch.key: index for index, stretch in enumerate(waiting)}
    together = team.processes() > 1
    jobs = [
        Job(content, stretch, states, save_seconds, stretch.key in inner, together)
        for stretch in waiting
    ]
    after = [None if s.parent is None else place.get(s.parent) for s in waiting]
    events = (
        run_in_step(train_stretch, jobs, team.processes())
        if together
        else run_parts(train_stretch, jobs, workers_on(content.device), after)
    )
    for kind, index, step in events:
        if kind == "progress":
            progress(waiting[index], step)
        else:
            collect(waiting[index])
