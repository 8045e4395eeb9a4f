"""The networks of torchvision, timm and transformers, tiny and with random weights."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers")

Network = tuple[nn.Module, Any]  # with a sample


def library(name: str) -> Any:
    """torchvision or timm; skips the test where it is not, or does not load beside this torch."""
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def images(size: int = 32, count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def tokens(count: int = 2, length: int = 5) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 40, (count, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids}


def resnet18() -> Network:
    return library("torchvision").models.resnet18(num_classes=5), images()


def resnet50() -> Network:
    return library("torchvision").models.resnet50(num_classes=5), images()


def mobilenet() -> Network:
    return library("torchvision").models.mobilenet_v3_small(num_classes=5, dropout=0.0), images()


def convnext() -> Network:
    settings = [
        library("torchvision").models.convnext.CNBlockConfig(8, 16, 2),
        library("torchvision").models.convnext.CNBlockConfig(16, None, 2),
    ]
    return library("torchvision").models.ConvNeXt(
        settings, layer_scale=0.5, num_classes=5
    ), images()


def torchvision_vit() -> Network:
    model = library("torchvision").models.VisionTransformer(16, 8, 2, 2, 16, 32, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # zero in torchvision
    return model, images(16)


def timm_deit() -> Network:
    settings = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
    return library("timm").create_model(
        "deit_small_patch16_224", num_classes=5, **settings
    ), images(16)


def timm_swin() -> Network:
    model = library("timm").models.SwinTransformer(
        img_size=32, patch_size=4, embed_dim=8, depths=(2, 2), num_heads=(2, 2), window_size=4,
        num_classes=5, drop_path_rate=0.0,
    )  # fmt: skip
    return model, images()


def timm_efficientnet() -> Network:
    return library("timm").create_model("efficientnet_b0", num_classes=5), images()


def timm_convnext() -> Network:
    return library("timm").models.ConvNeXt(
        depths=(1, 2, 1, 1), dims=(8, 8, 16, 16), num_classes=5
    ), images()


def gpt2() -> Network:
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=2,
        n_head=2,
        vocab_size=40,
        n_positions=16,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config), tokens()


def llama() -> Network:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=40,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config), tokens()


def hf_vit() -> Network:
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return transformers.ViTForImageClassification(config), {"pixel_values": images(16)}


def bert() -> Network:
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        vocab_size=40,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config), tokens()


def mixtral() -> Network:
    config = transformers.MixtralConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, vocab_size=40, num_local_experts=2, num_experts_per_tok=1,
    )  # fmt: skip
    return transformers.MixtralForCausalLM(config), tokens()


def t5() -> Network:
    config = transformers.T5Config(
        d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2, vocab_size=40,
        decoder_start_token_id=0, dropout_rate=0.0,
    )  # fmt: skip
    ids = tokens()["input_ids"]
    return transformers.T5ForConditionalGeneration(config), {
        "input_ids": ids,
        "decoder_input_ids": ids,
    }


def torch_encoder() -> Network:
    layer = nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(encoder, nn.Linear(16, 5)), torch.randn(2, 5, 16)


NETWORKS: dict[str, Callable[[], Network]] = {
    build.__name__: build
    for build in (
        resnet18, resnet50, mobilenet, convnext, torchvision_vit, timm_deit, timm_swin,
        timm_efficientnet, timm_convnext, gpt2, llama, hf_vit, bert, mixtral, t5, torch_encoder,
    )
}  # fmt: skip


def build(name: str, dtype: torch.dtype = torch.float32) -> Network:
    """A network and a sample, the same each time."""
    torch.manual_seed(0)
    model, sample = NETWORKS[name]()
    if isinstance(sample, dict):
        sample = {k: v.to(dtype) if v.is_floating_point() else v for k, v in sample.items()}
        return model.to(dtype), sample
    return model.to(dtype), sample.to(dtype)


def call(model: nn.Module, sample: Any) -> torch.Tensor:
    """The logits, or whatever tensor the model returns."""
    output = model(**sample) if isinstance(sample, dict) else model(sample)
    found: torch.Tensor = output if isinstance(output, torch.Tensor) else output.logits
    return found


def outputs_of(model: nn.Module, sample: Any) -> torch.Tensor:
    """The same in eval mode without gradients."""
    modes = [module.training for module in model.modules()]
    model.eval()
    with torch.no_grad():
        output = call(model, sample)
    for module, mode in zip(model.modules(), modes, strict=True):
        module.training = mode
    return output


def loss_of(model: nn.Module, sample: Any) -> torch.Tensor:
    """A loss of which every output has a gradient of its own."""
    output = call(model, sample)
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype).view(output.shape)
    return (output.tanh() * weights).mean()
