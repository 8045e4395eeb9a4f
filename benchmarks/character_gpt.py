"""A small study: where a character GPT should grow, and whether growing pays at all.

    python -m benchmarks.character_gpt FOLDER

trains a GPT of some 1.2 million parameters on the sources of Python's standard library, grown from
three blocks to six by `LayerInsertion`'s merits or by rules that know nothing, beside one that has
six blocks from the beginning. All have the same number of floating-point operations; what the
merits cost is counted. The questions and their tests stand in character_gpt_claims.toml, which was
written before the trainings. Finished trainings are lines of FOLDER/trainings.jsonl; the same
command goes on behind them, and ends with FOLDER/summary.json.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.environment import describe
from growkernels.experiments.claims import Evidence, Value, judge, registered, registration
from growkernels.experiments.seeds import seeded
from growkernels.experiments.statistics import estimate
from growkernels.growth import LayerInsertion

CLAIMS = Path(__file__).with_name("character_gpt_claims.toml")
GROWN = ("merit", "first", "last", "random")
VARIANTS = (*GROWN, "scratch")
ALPHABET = "\n" + "".join(map(chr, range(32, 127)))
# What a generator is for, so that no two draw the same numbers.
INITIAL_VALUES, BATCHES, POSITIONS, TEST = range(4)


@dataclass(frozen=True)
class Setting:
    """Sizes of the study; ``steps`` are those that the final network could take from scratch.

    ``growth`` are the shares of all operations after which a block is inserted, ``recorded`` the
    training steps before each whose gradients make the merits.
    """

    width: int = 128
    heads: int = 4
    blocks: int = 3
    growth: tuple[float, ...] = (0.25, 0.375, 0.5)
    context: int = 64
    batch: int = 16
    steps: int = 900
    recorded: int = 16
    rate: float = 2e-3
    warm_up: float = 0.05
    decay: float = 0.1
    test_windows: int = 1024
    runs: int = 6

    def forward_flops(self, blocks: int) -> int:
        """Of one batch: products of matrices, two operations per multiply-add."""
        per_token = blocks * self.block_flops + 2 * self.width * len(ALPHABET)
        return self.batch * self.context * per_token

    @property
    def block_flops(self) -> int:
        """Of one token: weights, and attention's two products."""
        return 24 * self.width**2 + 4 * self.context * self.width

    def merit_flops(self, positions: int) -> int:
        """Of one recorded batch: each copy's forward pass, and the gradient of its zero layers."""
        return self.batch * self.context * positions * (self.block_flops + 10 * self.width**2)

    @property
    def all_flops(self) -> int:
        """Of every training; a step's backward pass counts as two forward passes."""
        return 3 * self.steps * self.forward_flops(self.blocks + len(self.growth))


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        shape = batch, length, 3, self.heads, width // self.heads
        q, k, v = self.qkv(self.norm1(x)).view(shape).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
        out: Tensor = x + self.fc2(F.gelu(self.fc1(self.norm2(x))))
        return out


class CharacterGPT(nn.Module):
    """Scores [batch, length, alphabet] of the next character, from characters [batch, length]."""

    def __init__(self, setting: Setting, blocks: int, generator: torch.Generator) -> None:
        super().__init__()
        width = setting.width
        self.characters = nn.Embedding(len(ALPHABET), width)
        self.places = nn.Parameter(torch.empty(setting.context, width))
        self.blocks = nn.ModuleList(Block(width, setting.heads) for _ in range(blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, len(ALPHABET))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                into_stream = name.endswith(("proj.weight", "fc2.weight"))
                scale = (2 * blocks) ** -0.5 if into_stream else 1.0
                nn.init.normal_(parameter, std=0.02 * scale, generator=generator)

    def forward(self, characters: Tensor) -> Tensor:
        h = self.characters(characters) + self.places[: characters.shape[1]]
        for block in self.blocks:
            h = block(h)
        scores: Tensor = self.head(self.norm(h))
        return scores


@dataclass(frozen=True)
class Text:
    """Characters as numbers, for training and for tests, and where they come from."""

    training: Tensor
    test: Tensor
    about: dict[str, Any]

    @classmethod
    def of_standard_library(cls) -> Text:
        """The modules of this Python's standard library, by name; every tenth is for tests."""
        files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
        texts = [file.read_text(encoding="utf-8", errors="replace") for file in files]
        number = torch.full((128,), ALPHABET.index("?"))
        number[[ord(character) for character in ALPHABET]] = torch.arange(len(ALPHABET))
        numbers = [
            number[torch.frombuffer(bytearray(text, "ascii", "replace"), dtype=torch.uint8).long()]
            for text in filter(None, texts)
        ]
        about = {
            "text": "top-level modules of the standard library",
            "python": sys.version.split()[0],
            "files": len(files),
            "characters": sum(map(len, numbers)),
            "sha256": hashlib.sha256("".join(texts).encode()).hexdigest(),
        }
        training = [part for index, part in enumerate(numbers) if index % 10 != 9]
        return cls(torch.cat(training), torch.cat(numbers[9::10]), about)


def windows(text: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """[count, length + 1] pieces of a text at random places."""
    starts = torch.randint(len(text) - length, (count, 1), generator=generator)
    return text[starts + torch.arange(length + 1)]


@dataclass
class Training:
    """One training, wherever it is: it can be copied and go on in several ways."""

    setting: Setting
    run: int
    model: CharacterGPT
    optimizer: torch.optim.Optimizer
    step: int = 0
    flops: int = 0
    losses: list[tuple[float, float]] = field(default_factory=list)
    insertions: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def new(cls, setting: Setting, run: int, blocks: int) -> Training:
        model = CharacterGPT(setting, blocks, seeded(run, INITIAL_VALUES))
        groups: list[dict[str, Any]] = [
            {"params": [p for p in model.parameters() if p.dim() > 1]},
            {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
        ]
        optimizer = torch.optim.AdamW(
            groups, lr=setting.rate, betas=(0.9, 0.99), weight_decay=setting.decay
        )
        return cls(setting, run, model, optimizer)

    @property
    def share(self) -> float:
        """Of all operations, those that are done."""
        return self.flops / self.setting.all_flops

    @property
    def step_flops(self) -> int:
        return 3 * self.setting.forward_flops(len(self.model.blocks))

    def batch(self, text: Text) -> Tensor:
        """The next step's batch; the same in every variant of a run."""
        setting, generator = self.setting, seeded(self.run, BATCHES, self.step)
        return windows(text.training, setting.batch, setting.context, generator)

    def take_step(self, characters: Tensor, inserter: LayerInsertion | None = None) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.setting.rate * _rate(self.share, self.setting.warm_up)
        loss = _loss(self.model, characters)
        self.optimizer.zero_grad()
        if inserter is None:
            loss.backward()
        else:
            with inserter.recording():
                loss.backward()
        self.optimizer.step()
        self.flops += self.step_flops
        self.step += 1
        self.losses.append((self.share, loss.item()))

    def before_growth(self, share: float) -> bool:
        """Whether steps are left before those that are recorded for a growth at a share."""
        left = share * self.setting.all_flops - self.flops
        return left > self.setting.recorded * self.step_flops

    def grow(self, variant: str, text: Text) -> None:
        """The recorded steps, and a block where the variant wants it."""
        inserter = LayerInsertion(self.model, kinds=("block",), sample=self.batch(text)[:1, :-1])
        names = [position.name for position in inserter.positions]
        for _ in range(self.setting.recorded):
            self.take_step(self.batch(text), inserter)
        merits = inserter.merits()
        if variant == "merit":
            self.flops += self.setting.recorded * self.setting.merit_flops(len(names))
        draw = seeded(self.run, POSITIONS, len(self.insertions))
        place = {
            "merit": merits.best(),
            "first": 0,
            "last": len(names) - 1,
            "random": int(torch.randint(len(names), (), generator=draw)),
        }[variant]
        inserter.insert(names[place], self.optimizer)
        self.insertions.append(
            {"step": self.step, "behind": place, "merits": [f"{v:.4g}" for v in merits.values]}
        )


def _rate(share: float, warm_up: float) -> float:
    """Of the largest learning rate: a linear warm-up, then a cosine down to a tenth."""
    return min((share + 1e-3) / warm_up, 0.55 + 0.45 * math.cos(math.pi * min(share, 1.0)))


def _loss(model: nn.Module, characters: Tensor) -> Tensor:
    scores = model(characters[:, :-1])
    return F.cross_entropy(scores.flatten(0, 1), characters[:, 1:].flatten())


def test_loss(model: nn.Module, text: Text, setting: Setting) -> float:
    """Nats per character, over the same windows for every network."""
    held = windows(text.test, setting.test_windows, setting.context, seeded(TEST))
    with torch.no_grad():
        losses = [_loss(model, part).item() * len(part) for part in held.split(64)]
    return sum(losses) / len(held)


def finish(training: Training, variant: str, text: Text) -> dict[str, Any]:
    """Train to the end, growing when it is due; what is stored of it."""
    setting, began = training.setting, time.perf_counter()
    growth = setting.growth if variant in GROWN else ()
    while training.share < 1:
        done = len(training.insertions)
        if done < len(growth) and not training.before_growth(growth[done]):
            training.grow(variant, text)
        else:
            training.take_step(training.batch(text))
    last = [loss for share, loss in training.losses if share > 0.9]
    return {
        "variant": variant,
        "run": training.run,
        "test_loss": test_loss(training.model, text, setting),
        "training_loss": sum(last) / len(last),
        "parameters": sum(p.numel() for p in training.model.parameters()),
        "steps": training.step,
        "flops": training.flops,
        "insertions": training.insertions,
        "seconds": round(time.perf_counter() - began, 1),
        "curve": _curve(training.losses),
    }


def _curve(losses: Sequence[tuple[float, float]], points: int = 24) -> list[float]:
    """Mean training losses between equal shares of the operations."""
    parts: list[list[float]] = [[] for _ in range(points)]
    for share, loss in losses:
        parts[min(int(share * points), points - 1)].append(loss)
    return [round(sum(part) / len(part), 4) for part in parts if part]


def trainings(setting: Setting, text: Text, done: set[tuple[str, int]]) -> Iterator[dict[str, Any]]:
    """What is missing, run by run. Grown variants share their steps before the first growth."""
    for run in range(setting.runs):
        missing = [variant for variant in VARIANTS if (variant, run) not in done]
        trunk = Training.new(setting, run, setting.blocks)
        while set(missing) & set(GROWN) and trunk.before_growth(setting.growth[0]):
            trunk.take_step(trunk.batch(text))
        for variant in missing:
            if variant in GROWN:
                training = copy.deepcopy(trunk)
            else:
                training = Training.new(setting, run, setting.blocks + len(setting.growth))
            yield finish(training, variant, text)


@dataclass(frozen=True)
class Measured(Evidence):
    """Finished trainings, as the claims ask for them."""

    records: Sequence[Mapping[str, Any]]

    def runs(self, setting: str, variant: str, quantity: str) -> dict[int, float]:
        return {r["run"]: r[quantity] for r in self.records if r["variant"] == variant}

    def value(self, name: str, setting: str) -> Value:
        raise ValueError(f"A claim asks for {name!r}, which this study does not have.")


def summarise(
    setting: Setting, text: Text, records: Sequence[Mapping[str, Any]], environment: Any
) -> dict[str, Any]:
    """Final values by variant, and the verdicts on the registered claims."""
    by_variant = {}
    for variant in VARIANTS:
        own = [r for r in records if r["variant"] == variant]
        by_variant[variant] = {
            "runs": len(own),
            **{q: estimate([r[q] for r in own]).text() for q in ("test_loss", "training_loss")},
            "steps": [r["steps"] for r in own],
            "inserted_behind": [[i["behind"] for i in r["insertions"]] for r in own],
        }
    return {
        "setting": asdict(setting),
        "text": text.about,
        "variants": by_variant,
        "claims": [claim.as_json() for claim in judge(registered(CLAIMS), Measured(records))],
        "registration": registration(CLAIMS),
        "environment": environment,
        "trainings": list(records),
    }


def study(folder: Path, setting: Setting, text: Text) -> Path:
    """Train what is missing in a folder, and write what all of it says; the summary's path.

    Raises ValueError for a folder that holds a study of other sizes or of another text.
    """
    folder.mkdir(parents=True, exist_ok=True)
    about, lines = folder / "study.json", folder / "trainings.jsonl"
    environment = describe(torch.device("cpu"))
    what = json.loads(json.dumps({"setting": asdict(setting), "text": text.about}))
    if about.exists() and json.loads(about.read_text())["what"] != what:
        raise ValueError(f"{folder} holds a study of other sizes or another text; choose another.")
    about.write_text(json.dumps({"what": what, "environment": environment}))
    kept = lines.read_text().splitlines() if lines.exists() else []
    records = [json.loads(line) for line in kept]
    done = {(r["variant"], r["run"]) for r in records}
    for record in trainings(setting, text, done):
        records.append(record)
        new = folder / "trainings.new"
        new.write_text("".join(f"{json.dumps(r)}\n" for r in records))
        new.replace(lines)
        print(*(f"{key}={record[key]}" for key in list(record)[:5]), flush=True)
    summary = folder / "summary.json"
    found = summarise(setting, text, records, environment)
    summary.write_text(json.dumps(found, indent=1) + "\n")
    for claim in found["claims"]:
        print(f"{claim['verdict']:15} {claim['claim']}\n  {claim['measured']}")
    return summary


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("folder", type=Path)
    torch.set_num_threads(1)
    study(arguments.parse_args().folder, Setting(), Text.of_standard_library())
