"""Trains settings in worker processes, with checkpoints, and gives the finished runs back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from growkernels.experiments.run_folder import StateStore
from growkernels.experiments.sensli.engine import SettingRun
from growkernels.experiments.sensli.settings import Setting
from growkernels.experiments.worker_pool import Report, available_cores, run_parts

REPORT_SECONDS = 0.2


@dataclass(frozen=True)
class Job:
    """One setting to train, where its state is kept, and how often it is saved there."""

    setting: Setting
    states: StateStore
    device: str
    save_seconds: float


def restore(job: Job) -> SettingRun:
    """The run as its last checkpoint left it, or a new one."""
    run = SettingRun(job.setting, job.device)
    state = job.states.load(job.setting.name)
    if state is not None:
        run.load_state_dict(state)
    return run


def train(job: Job, report: Report) -> None:
    """Train to the end, or while there is time; the last checkpoint is the result."""
    run = restore(job)
    saved = reported = time.monotonic()
    time_is_up = False
    while not run.done and not time_is_up:
        run.step()
        now = time.monotonic()
        if now - reported > REPORT_SECONDS:
            time_is_up = report(run.epoch)
            reported = now
        if now - saved > job.save_seconds and not run.done:
            job.states.save(job.setting.name, run.state_dict())
            saved = time.monotonic()
    job.states.save(job.setting.name, run.state_dict())


def work_estimate(setting: Setting) -> float:
    """Relative training cost: layer evaluations, where small batches cost a fixed overhead more."""
    run = SettingRun(setting)
    layers = sum(
        (end - lineage.begin) * (lineage.hidden + 1)
        for lineage, end in zip(run.lineages, run.ends, strict=True)
    )
    weight = 2.0 if setting.family == "residual" else 1.0
    return layers * setting.runs * setting.width * weight * (1.0 if setting.full_batch else 3.0)


def train_all(
    settings: Sequence[Setting],
    states: StateStore,
    device: str,
    save_seconds: float,
    progress: Callable[[Setting, int], None],
    finished: Callable[[SettingRun], None],
) -> list[SettingRun]:
    """Train what is not finished yet, longest first; returns all runs in the given order.

    ``progress(setting, epoch)`` and ``finished(run)`` are called in this process as they happen.
    """
    jobs = sorted(
        (Job(setting, states, device, save_seconds) for setting in settings),
        key=lambda job: -work_estimate(job.setting),
    )
    waiting = []
    runs: dict[str, SettingRun] = {}

    def finish(run: SettingRun) -> None:
        runs[run.setting.name] = run
        finished(run)

    for job in jobs:
        run = restore(job)
        progress(job.setting, run.epoch)
        if run.done:
            finish(run)
        else:
            waiting.append(job)
    # A GPU is one device: its settings run one after the other.
    workers = available_cores() if torch.device(device).type == "cpu" else 1
    for kind, index, epoch in run_parts(train, waiting, workers):
        job = waiting[index]
        if kind == "progress":
            progress(job.setting, epoch)
        else:
            run = restore(job)
            progress(job.setting, run.epoch)
            finish(run)
    return [runs[setting.name] for setting in settings]
