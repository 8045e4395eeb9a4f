"""Trains the variants in worker processes, with checkpoints, and gives finished runs back."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from growkernels.data.images import ImageData
from growkernels.experiments.run_folder import StateStore
from growkernels.experiments.scaling.engine import ScalingRun
from growkernels.experiments.scaling.history import History
from growkernels.experiments.scaling.image_cache import stored_images
from growkernels.experiments.scaling.settings import Setting, Variant
from growkernels.experiments.worker_pool import Report, available_cores, run_parts


@dataclass(frozen=True)
class Job:
    """One run of one variant, where its state is kept, and how often it is saved there."""

    setting: Setting
    variant: Variant
    run: int
    states: StateStore
    images: Path
    device: str
    save_seconds: float

    @property
    def key(self) -> str:
        return f"{self.variant.name}-run{self.run}"

    @property
    def trunk(self) -> str:
        """The state of the reduced network before the first growth."""
        return f"trunk-run{self.run}"

    def restore(self) -> ScalingRun:
        """The run as its last checkpoint left it, or at its beginning."""
        data = images_on(self.images, self.device)
        run = ScalingRun(self.setting, self.variant, self.run, data, self.device)
        state = self.states.load(self.key)
        if state is None and self.variant.growth is not None:
            state = self.states.load(self.trunk)
        if state is not None:
            run.load_state_dict(state)
        return run


@lru_cache(maxsize=1)
def images_on(path: Path, device: str) -> ImageData:
    """The study's images, resident on the device for all runs of a process."""
    data = stored_images(path)
    size = data.train_images.nbytes + data.test_images.nbytes
    if torch.device(device).type == "cuda":
        free, _ = torch.cuda.mem_get_info(torch.device(device))
        if size > 0.8 * free:
            raise RuntimeError(
                f"The images take {size / 2**30:.1f} GiB and have to lie on the device, which has "
                f"{free / 2**30:.1f} GiB free; use a GPU with more memory or smaller images."
            )
    return data.to(device)


def train(job: Job, report: Report) -> None:
    """Train to the end, or while there is time; the last checkpoint is the result."""
    if torch.device(job.device).type == "cuda":
        # A resumed run repeats the same bits; cuBLAS reads the variable before its first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
    run = job.restore()
    saved = time.monotonic()
    while not run.done:
        if run.variant.name == "reduced" and run.epoch == job.setting.first_growth:
            job.states.save(job.trunk, run.state_dict())
        run.step()
        # Also finds out whether the parent is gone, before anything is written for it.
        time_is_up = report(run.epoch)
        if time.monotonic() - saved > job.save_seconds:
            job.states.save(job.key, run.state_dict())
            saved = time.monotonic()
        if time_is_up:
            break
    job.states.save(job.key, run.state_dict())


def train_all(
    setting: Setting,
    images: Path,
    states: StateStore,
    device: str,
    save_seconds: float,
    progress: Callable[[Variant, int, int], None],
    finished: Callable[[Variant, int, History], None],
) -> dict[str, list[History]]:
    """Train what is not finished yet; what all runs of every variant measured, by its name.

    ``progress(variant, run, epochs behind)`` and ``finished(variant, run, history)`` are called in
    this process.
    """
    jobs = [
        Job(setting, variant, run, states, images, device, save_seconds)
        for variant in setting.variants
        for run in range(setting.runs)
    ]
    done: dict[str, History] = {}

    def collect(job: Job) -> bool:
        state = states.load(job.key)
        if state is None:
            return False
        history = History.from_state(state["history"])
        progress(job.variant, job.run, len(history.epochs))
        if len(history.epochs) < setting.epochs:
            return False
        done[job.key] = history
        finished(job.variant, job.run, history)
        return True

    # A GPU is one device: its runs follow one another.
    workers = available_cores() if torch.device(device).type == "cpu" else 1
    # Networks that grow continue the reduced one, which therefore comes first.
    for grows in (False, True):
        waiting = [job for job in jobs if (job.variant.growth is not None) == grows]
        waiting = [job for job in waiting if not collect(job)]
        for kind, index, behind in run_parts(train, waiting, workers):
            if kind == "progress":
                progress(waiting[index].variant, waiting[index].run, behind)
            else:
                collect(waiting[index])
    return {
        variant.name: [done[f"{variant.name}-run{run}"] for run in range(setting.runs)]
        for variant in setting.variants
    }
