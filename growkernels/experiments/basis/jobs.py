"""Trains tasks in worker processes, with checkpoints, and gives the finished curves back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy
import torch

from growkernels.data.images import ImageData
from growkernels.experiments.basis.settings import BasisSettings
from growkernels.experiments.basis.training import Curves, Task, Training
from growkernels.experiments.run_folder import StateStore
from growkernels.experiments.worker_pool import Report, available_cores, run_parts


@dataclass(frozen=True)
class Job:
    """Tasks in order, where their states are kept, and how often they are saved there.

    The data travel to the worker as numpy arrays: tensors would go through shared memory, of which
    containers have little.
    """

    tasks: tuple[Task, ...]
    settings: BasisSettings
    states: StateStore
    device: str
    save_seconds: float
    name: str
    classes: tuple[str, ...]
    arrays: tuple[numpy.ndarray, ...]

    def restore(self, task: Task) -> Training:
        """The training as its last checkpoint left it, or a new one."""
        data = ImageData(self.name, self.classes, *map(torch.from_numpy, self.arrays))
        training = Training(task, self.settings, data, self.device)
        state = self.states.load(task.name)
        if state is None and task.branch_of is not None:
            state = self.states.load(branch_name(task.branch_of))
        if state is not None:
            training.load_state_dict(state)
        return training


def branch_name(task_name: str) -> str:
    """The state in which skip schedules leave this task."""
    return f"{task_name}-branch"


def train(job: Job, report: Report) -> None:
    """Train all tasks to their ends, or while there is time; the last checkpoint is the result."""
    torch.backends.cudnn.deterministic = True  # on a GPU too, a resumed run repeats the same bits
    origins = {task.branch_of for task in job.tasks}
    behind = 0
    for task in job.tasks:
        training = job.restore(task)
        saved = time.monotonic()
        while not training.done:
            training.step()
            # Also finds out whether the parent is gone, before anything is written for it.
            time_is_up = report(behind + training.epoch)
            if training.epoch == training.switch_epoch and task.name in origins:
                job.states.save(branch_name(task.name), training.state_dict())
            if time_is_up:
                job.states.save(task.name, training.state_dict())
                return
            if time.monotonic() - saved > job.save_seconds:
                job.states.save(task.name, training.state_dict())
                saved = time.monotonic()
        job.states.save(task.name, training.state_dict())
        behind += task.epochs


def train_all(
    chains: Sequence[tuple[Task, ...]],
    settings: BasisSettings,
    data: ImageData,
    states: StateStore,
    device: str,
    save_seconds: float,
    progress: Callable[[int, int], None],
) -> dict[str, Curves]:
    """Train what is not finished yet; the curves of every task, by its name.

    Tasks of a chain follow one another, one that branches off behind its origin; chains run side
    by side, the longest first. ``progress(index of the chain, epochs behind)`` is called in this
    process.
    """
    tensors = (data.train_images, data.train_labels, data.test_images, data.test_labels)
    arrays = tuple(tensor.numpy() for tensor in tensors)
    finished: dict[str, Curves] = {}

    def collect(chain: int) -> bool:
        behind = 0
        for task in chains[chain]:
            state = states.load(task.name)
            if state is not None:
                behind += state["epoch"]
                if state["epoch"] == task.epochs:
                    finished[task.name] = Curves(**state["curves"])
        progress(chain, behind)
        return all(task.name in finished for task in chains[chain])

    waiting = [chain for chain in range(len(chains)) if not collect(chain)]
    waiting.sort(key=lambda chain: -len(chains[chain]))
    jobs = [
        Job(chains[chain], settings, states, device, save_seconds, data.name, data.classes, arrays)
        for chain in waiting
    ]
    # A GPU is one device: its trainings follow one another.
    workers = available_cores() if torch.device(device).type == "cpu" else 1
    for kind, index, behind in run_parts(train, jobs, workers):
        if kind == "progress":
            progress(waiting[index], behind)
        else:
            collect(waiting[index])
    return finished
