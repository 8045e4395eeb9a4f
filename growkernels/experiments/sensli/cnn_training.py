"""Trains the CNN settings in worker processes, with checkpoints, and gives finished runs back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch

from growkernels.data.images import ImageData
from growkernels.experiments.run_folder import StateStore
from growkernels.experiments.sensli.cnn_engine import CnnRun
from growkernels.experiments.sensli.cnn_settings import CnnSetting
from growkernels.experiments.worker_pool import Report, available_cores, run_parts


@dataclass(frozen=True)
class Job:
    """One run of one setting, where its state is kept, and how often it is saved there.

    The data travel to the worker as numpy arrays: tensors would go through shared memory, of which
    containers have little.
    """

    setting: CnnSetting
    run: int
    states: StateStore
    device: str
    save_seconds: float
    name: str
    classes: tuple[str, ...]
    arrays: tuple[numpy.ndarray, ...]

    @property
    def key(self) -> str:
        return f"{self.setting.name}-run{self.run}"

    def restore(self) -> CnnRun:
        """The run as its last checkpoint left it, or a new one."""
        tensors = (torch.from_numpy(array) for array in self.arrays)
        run = CnnRun(
            self.setting, self.run, ImageData(self.name, self.classes, *tensors), self.device
        )
        state = self.states.load(self.key)
        if state is not None:
            run.load_state_dict(state)
        return run


def train(job: Job, report: Report) -> None:
    """Train to the end, or while there is time; the last checkpoint is the result."""
    torch.backends.cudnn.deterministic = True  # on a GPU too, a resumed run repeats the same bits
    run = job.restore()
    saved = time.monotonic()
    while not run.done:
        run.step()
        # Also finds out whether the parent is gone, before anything is written for it.
        time_is_up = report(run.progress)
        if time.monotonic() - saved > job.save_seconds:
            job.states.save(job.key, run.state_dict())
            saved = time.monotonic()
        if time_is_up:
            break
    job.states.save(job.key, run.state_dict())


def train_all(
    settings: Sequence[CnnSetting],
    data: ImageData,
    states: StateStore,
    device: str,
    save_seconds: float,
    progress: Callable[[CnnSetting, int, int], None],
    finished: Callable[[CnnRun], None],
) -> dict[str, list[CnnRun]]:
    """Train what is not finished yet, longest first; all runs of every setting, by its name.

    ``progress(setting, run, epochs behind)`` and ``finished(run)`` are called in this process.
    """
    tensors = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    arrays = tuple(tensor.numpy() for tensor in tensors)
    jobs = [
        Job(setting, run, states, device, save_seconds, data.name, data.classes, arrays)
        for setting in settings
        for run in range(setting.runs)
    ]
    done: dict[str, CnnRun] = {}

    def collect(job: Job) -> bool:
        run = job.restore()
        progress(job.setting, job.run, run.progress)
        if run.done:
            done[job.key] = run
            finished(run)
        return run.done

    waiting = [job for job in sorted(jobs, key=_longest_first) if not collect(job)]
    # A GPU is one device: its runs follow one another.
    workers = available_cores() if torch.device(device).type == "cpu" else 1
    for kind, index, behind in run_parts(train, waiting, workers):
        if kind == "progress":
            progress(waiting[index].setting, waiting[index].run, behind)
        else:
            collect(waiting[index])
    return {
        setting.name: [done[job.key] for job in jobs if job.setting.name == setting.name]
        for setting in settings
    }


def _longest_first(job: Job) -> float:
    return -float(job.setting.epochs_to_train * len(job.setting.variants))
