"""A GPT-2 that gets blocks while the Trainer of transformers trains it; saved, and loaded again.

python examples/transformers_trainer.py       # needs pip install 'growkernels[transformers]'
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from torch.utils.data import Dataset
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments

import growkernels as gk


class Counting(Dataset[dict[str, torch.Tensor]]):
    """Sequences that count upwards from anywhere, modulo the size of the vocabulary."""

    def __init__(self, vocabulary: int, length: int) -> None:
        starts = torch.arange(64)[:, None]
        self.tokens = (starts + torch.arange(length)) % vocabulary

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir()) / "grown_gpt2")
    options = parser.parse_args(arguments)

    torch.manual_seed(0)
    data = Counting(vocabulary=29, length=12)
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=29,
            n_positions=12,
            n_embd=options.width,
            n_layer=2,
            n_head=2,
            use_cache=False,
        )
    )
    sample = {"input_ids": data.tokens[:1]}
    grow = gk.integrations.transformers.Grow(
        gk.growth.FixedStep([options.steps // 2]),
        # With a sample, residual stacks get positions between their blocks.
        lambda module: gk.growth.LayerInsertion(module, sample=sample),
    )
    settings = TrainingArguments(
        output_dir=str(options.out / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    Trainer(model=model, args=settings, train_dataset=data, callbacks=[grow]).train()
    print(f"grown at steps {grow.grown}: {model.config.n_layer} layers")

    # The records are in the config. This builds what it says, grows it, and loads all weights.
    model.save_pretrained(options.out / "model")
    again = gk.integrations.transformers.from_pretrained(GPT2LMHeadModel, options.out / "model")
    with torch.no_grad():
        difference = (again.eval()(**sample).logits - model.eval()(**sample).logits).abs().max()
    return {"layers": model.config.n_layer, "difference": float(difference)}


if __name__ == "__main__":
    main()
