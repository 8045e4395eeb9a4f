"""Growth inside transformers' Trainer, on real architectures of tiny sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset
from transformers import (
    AutoModelForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    ViTConfig,
    ViTForImageClassification,
)

from growkernels.growth import FixedStep, LayerInsertion, LossPlateau, NeuronScaling, insertions
from growkernels.integrations.transformers import Grow, from_pretrained

pytestmark = pytest.mark.filterwarnings("ignore")


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, images: bool) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(32, 3, 8, 8, generator=generator) if images else None
        self.tokens = torch.randint(0, 20, (32, 6), generator=generator)

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if self.images is None:
            return {"input_ids": self.tokens[index], "labels": self.tokens[index]}
        return {"pixel_values": self.images[index], "labels": self.tokens[index, 0] % 3}


def vit() -> ViTForImageClassification:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}
    config = ViTConfig(image_size=8, patch_size=4, num_hidden_layers=2, num_labels=3, **sizes)
    return ViTForImageClassification(config)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=20, n_positions=8, n_embd=16, n_layer=2, n_head=2)
    return GPT2LMHeadModel(config)


def arguments(folder: Path, steps: int, **settings: Any) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        **{"save_strategy": "no", **settings},
    )


def fit(model: PreTrainedModel, grow: Grow, folder: Path, **settings: Any) -> Any:
    resume = settings.pop("resume", None)
    trainer = Trainer(
        model,
        arguments(folder, **settings),
        train_dataset=Rows(isinstance(model, ViTForImageClassification)),
        callbacks=[grow],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def neurons(module: nn.Module) -> NeuronScaling:
    return NeuronScaling(module, "gradient_sum", layers=["*"])


def growth(**settings: Any) -> Grow:
    return Grow(FixedStep([2, 5]), neurons, budget=200, min_eligible=1, **settings)


def outputs(model: PreTrainedModel) -> torch.Tensor:
    row = Rows(isinstance(model, ViTForImageClassification))[0]
    with torch.no_grad():
        return model.eval()(**{k: v[None] for k, v in row.items() if k != "labels"}).logits


@pytest.mark.parametrize(("build", "module"), [(vit, "vit"), (llama, "model")])
def test_a_saved_model_is_rebuilt(build: Any, module: str, tmp_path: Path) -> None:
    grow = growth(module=module)
    model = build()
    before = sum(p.numel() for p in model.parameters())
    trainer = fit(model, grow, tmp_path, steps=8)
    assert grow.grown == [3, 6]
    records = insertions(model.get_submodule(module))
    assert [record["kind"] for record in records] == ["neurons"] * 2
    held = {id(p) for g in trainer.optimizer.param_groups for p in g["params"]}
    assert held == {id(p) for p in model.parameters()}
    assert sum(p.numel() for p in model.parameters()) > before
    trainer.save_model(str(tmp_path / "saved"))
    kind = AutoModelForImageClassification if build is vit else type(model)
    loaded = from_pretrained(kind, tmp_path / "saved")
    assert insertions(loaded.get_submodule(module)) == records
    torch.testing.assert_close(outputs(loaded), outputs(model))
    plain = type(model).from_pretrained(tmp_path / "saved", ignore_mismatched_sizes=True)
    with pytest.raises(ValueError, match="has grown 2 times, and the model has not"):
        fit(plain, growth(module=module), tmp_path, steps=1)


def test_a_killed_run_resumes_with_the_same_numbers(tmp_path: Path) -> None:
    model = vit()
    saving = {"save_strategy": "steps", "save_steps": 1}
    fit(model, growth(module="vit"), tmp_path / "one", steps=8, **saving)
    for last in (2, 4):
        checkpoint = tmp_path / "one" / f"checkpoint-{last}"
        resumed = from_pretrained(ViTForImageClassification, checkpoint)
        grow = growth(module="vit")
        fit(resumed, grow, tmp_path / f"{last}", steps=8, resume=str(checkpoint))
        assert grow.grown == [3, 6]
        for one, two in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(one, two)


def test_blocks_of_gpt2_are_inserted_under_accumulation(tmp_path: Path) -> None:
    model = gpt2()
    tokens = {"input_ids": torch.zeros(1, 6, dtype=torch.long)}

    def driver(module: nn.Module) -> LayerInsertion:
        return LayerInsertion(module, sample=tokens)

    grow = Grow(LossPlateau(patience=1, threshold=0.999), driver, batches=2)
    fit(model, grow, tmp_path, steps=5, gradient_accumulation_steps=2)
    assert grow.grown
    assert model.config.growkernels == {"": insertions(model)}
    assert insertions(model)[0]["kind"] == "block"
