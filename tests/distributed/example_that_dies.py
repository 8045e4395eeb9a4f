"""The example for torchrun; its last process kills itself once, before the step in DIES_AT."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import train_distributed


class Dying(train_distributed.Training):
    def train_step(self) -> float:
        last = torch.distributed.get_rank() == torch.distributed.get_world_size() - 1
        first_try = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
        if last and first_try and self.step == int(os.environ.get("DIES_AT", -1)):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().train_step()


train_distributed.Training = Dying  # type: ignore[misc]
torch.set_num_threads(1)
train_distributed.main()
