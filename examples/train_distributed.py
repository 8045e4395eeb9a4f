"""A network that grows twice while several processes train it, and survives kill -9.

    torchrun --standalone --nproc-per-node 2 --max-restarts 3 examples/train_distributed.py
    torchrun --standalone --nproc-per-node 2 examples/train_distributed.py --mode fsdp2

Images are generated; with --data FOLDER they are those of CIFAR-10's binary version
(data_batch_1.bin and so on, https://www.cs.toronto.edu/~kriz/cifar.html). A batch is the same
whatever the number of processes, so a run that was killed goes on at any world size: torchrun
starts all processes anew, and each reads the newest checkpoint in --out, what has grown first.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.distributed import PrefixStore
from torch.distributed.fsdp import fully_shard
from torch.distributed.rendezvous import rendezvous
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import growkernels as gk

RECORDED = 2  # batches that a growth looks at


def build() -> nn.Sequential:
    """The base model, the same in every process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Conv2d(8, 12, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(4),
        nn.Flatten(),
        nn.Linear(12 * 2 * 2, 10),
    )


def shard(model: nn.Module) -> None:
    """Each layer with weights is gathered for itself."""
    for layer in model.children():
        if list(layer.parameters()):
            fully_shard(layer)
    fully_shard(model)


def make_optimizer(model: nn.Module) -> Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def images(folder: Path | None) -> tuple[Tensor, Tensor]:
    """[N, 3, 32, 32] from -1 to 1, and their classes [N]."""
    if folder is None:
        generator = torch.Generator().manual_seed(1)
        classes = torch.randint(0, 10, (512,), generator=generator)
        means = torch.randn(10, 3, 32, 32, generator=generator)
        return means[classes] + torch.randn(512, 3, 32, 32, generator=generator), classes
    files = sorted(folder.glob("data_batch_*.bin"))
    read = [torch.frombuffer(bytearray(file.read_bytes()), dtype=torch.uint8) for file in files]
    rows = torch.cat(read).view(-1, 1 + 3 * 32 * 32)
    return rows[:, 1:].view(-1, 3, 32, 32) / 127.5 - 1, rows[:, 0].long()


class Training:
    """A model, its optimizer and its place in the data."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.x, self.y = images(options.data)
        self.sharded = options.mode == "fsdp2"
        self.step = 0
        newest = gk.checkpoint.latest(options.out)
        if newest is not None:
            shards = shard if self.sharded else None
            restored = gk.checkpoint.load(newest, build, shards, make_optimizer)
            self.model, self.optimizer = restored.model, restored.optimizer
            self.step = restored.extra["step"]
        else:
            self.model = build()
            if self.sharded:
                shard(self.model)
            self.optimizer = make_optimizer(self.model)
        self.called = self.model if self.sharded else DistributedDataParallel(self.model)

    def part_of_batch(self, number: int) -> tuple[Tensor, Tensor]:
        """This process's rows of a batch."""
        size, epochs = self.options.batch, len(self.x) // self.options.batch
        generator = torch.Generator().manual_seed(number // epochs)
        order = torch.randperm(len(self.x), generator=generator)
        start = number % epochs * size
        rows = order[start : start + size][distributed.get_rank() :: distributed.get_world_size()]
        return self.x[rows], self.y[rows]

    def loss(self, number: int) -> Tensor:
        x, y = self.part_of_batch(number)
        return F.cross_entropy(self.called(x), y)

    def train_step(self) -> float:
        """One step; the mean loss over the processes."""
        self.optimizer.zero_grad()
        loss = self.loss(self.step)
        loss.backward()
        self.optimizer.step()
        self.step += 1
        mean = loss.detach()
        distributed.all_reduce(mean)
        return float(mean) / distributed.get_world_size()

    def grow(self) -> None:
        """Insert the layer that the recorded batches ask for."""
        recorded = range(self.step, self.step + RECORDED)
        if not self.sharded:
            with gk.distributed.growing(self.called, self.optimizer) as growth:
                for number in recorded:
                    with growth.recording():
                        self.loss(number).backward()
                growth.insert_best()
            return
        inserter = gk.growth.LayerInsertion(self.model)
        for number in recorded:
            with inserter.recording():
                self.loss(number).backward()
        position = inserter.select(inserter.merits())
        assert position is not None
        record = inserter.record(position)
        inserter.close()
        self.model, self.optimizer = gk.distributed.regrow(
            self.model,
            self.optimizer,
            [record],
            build=build,
            shard=shard,
            make_optimizer=make_optimizer,
        )
        self.called = self.model

    def save(self) -> None:
        folder = self.options.out / f"step-{self.step}"
        gk.checkpoint.save(folder, self.model, self.optimizer, extra={"step": self.step})


def options_of(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mode", choices=("ddp", "fsdp2"), default="ddp")
    parser.add_argument("--data", type=Path, help="folder of CIFAR-10's binary version")
    parser.add_argument("--out", type=Path, default=Path("run"), help="folder of checkpoints")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64, help="rows, of all processes together")
    parser.add_argument("--grow-at", type=int, nargs="*", default=[60, 120])
    parser.add_argument("--save-every", type=int, default=20)
    return parser.parse_args(arguments)


def meet() -> None:
    """Join the other processes of this start.

    torchrun's store outlives a restart, with the addresses of the processes that were killed.
    """
    store, rank, number = next(rendezvous("env://"))
    start = PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    distributed.init_process_group("gloo", store=start, rank=rank, world_size=number)


def main(arguments: list[str] | None = None) -> None:
    options = options_of(arguments)
    meet()
    run(options)
    # A wrapper that outlives its process group may wait for the group's threads forever.
    gc.collect()
    distributed.destroy_process_group()


def run(options: argparse.Namespace) -> None:
    training = Training(options)
    loss = float("nan")
    while training.step < options.steps:
        loss = training.train_step()
        if training.step in options.grow_at:
            training.grow()
        if training.step % options.save_every == 0 or training.step == options.steps:
            training.save()
        if distributed.get_rank() == 0:
            print(f"step {training.step}: loss {loss:.4f}", flush=True)
    records: list[dict[str, Any]] = gk.growth.insertions(training.model)
    if distributed.get_rank() == 0:
        result = {"loss": loss, "positions": [record["position"] for record in records]}
        (options.out / "result.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main()
