"""What `describe` finds in real models, written down."""

from __future__ import annotations

from typing import Any

import networks
import pytest
import torch
from torch import nn

from growkernels.growth import describe

# For each model: what can be inserted behind (kind), what can be widened (role), how many layers
# can grow, how many convolutions can be exchanged, and some of the reasons against.
EXPECTED: dict[str, dict[str, Any]] = {
    "resnet18": {
        "insert": {"conv2d_relu": 1, "block": 8},
        "widen": {"conv": 8},
        "grow": 21,
        "basis": 20,
        "why_not": {
            ("layer1.0.relu", "insert"): "it runs 2 times in one pass",
            ("layer1.0.conv2", "widen"): "added to what 'conv1' and 1 more layer make",
            ("fc", "widen"): "is an output of the model",
        },
    },
    "resnet50": {
        "insert": {"conv2d_relu": 1, "block": 16},
        "widen": {"conv": 33},
        "grow": 54,
        "basis": 53,
        "why_not": {("layer2.0.downsample.0", "widen"): "added to what 'layer2.0.conv3'"},
    },
    "mobilenet": {
        "insert": {"conv2d_relu": 14, "block": 10},
        "widen": {"conv": 11, "fc1": 1},
        "grow": 43,
        "basis": 41,
        "why_not": {
            ("features.1", "insert"): "it makes [2, 16, 8, 8] of [2, 16, 16, 16]",
            ("features.4.block.0.0", "widen"): "multiplied by what 'features.4.block.2.fc2' makes",
            ("features.4.block.1.0", "widen"): "convolves each channel by itself",
            ("features.4.block.1.0", "basis"): "only groups=1 can be replaced",
        },
    },
    "convnext": {
        "insert": {"block": 4},
        "widen": {"fc1": 4},
        "grow": 11,
        "basis": 2,
        "why_not": {("features.1.0.block.0", "grow"): "a convolution with groups"},
    },
    "torchvision_vit": {
        "insert": {"block": 2},
        "widen": {"fc1": 2},
        "grow": 6,
        "basis": 1,
        "why_not": {
            ("encoder.layers.encoder_layer_0.self_attention", "grow"): "not in MultiheadAttention",
        },
    },
    "timm_deit": {
        "insert": {"block": 2},
        "widen": {"fc1": 2},
        "grow": 10,
        "basis": 1,
        "why_not": {("blocks.0.attn.qkv", "widen"): "which divides its features"},
    },
    "timm_swin": {
        "insert": {"block": 4},
        "widen": {"fc1": 4},
        "grow": 19,
        "basis": 1,
        "why_not": {("patch_embed.proj", "widen"): "what it makes is"},
    },
    "timm_efficientnet": {
        "insert": {"block": 14},
        "widen": {"conv": 16},
        "grow": 66,
        "basis": 65,
        "why_not": {("blocks.0.0.conv_dw", "widen"): "convolves each channel by itself"},
    },
    "timm_convnext": {
        "insert": {"block": 5},
        "widen": {"fc1": 5},
        "grow": 15,
        "basis": 4,
        "why_not": {("head.fc", "widen"): "is an output of the model"},
    },
    "gpt2": {
        "insert": {"block": 2},
        "widen": {"fc1": 2},
        "grow": 0,
        "basis": 0,
        "why_not": {
            ("transformer.h.0.mlp.c_fc", "grow"): "not in Conv1D",
            ("transformer.h.0.attn.c_attn", "widen"): "cut into pieces (split)",
            ("lm_head", "grow"): "'transformer.wte.weight' is 'lm_head.weight'",
        },
    },
    "llama": {
        "insert": {"block": 2},
        "widen": {"gated": 2},
        "grow": 15,
        "basis": 0,
        "why_not": {
            ("model.layers.0.self_attn.q_proj", "widen"): "which divides its features",
            ("model.layers.0.mlp.up_proj", "widen"): "together with 'model.layers.0.mlp.gate_proj'",
        },
    },
    "hf_vit": {
        "insert": {"block": 2},
        "widen": {"fc1": 2},
        "grow": 14,
        "basis": 1,
        "why_not": {("vit.layers.0.mlp.fc2", "widen"): "and 3 more layers make"},
    },
    "bert": {
        "insert": {},
        "widen": {"fc1": 3},
        "grow": 14,
        "basis": 0,
        "why_not": {
            ("bert.encoder.layer.0", "insert"): "does not end in adding to its input (its last "
            "operation is 'layer_norm')",
        },
    },
    "mixtral": {
        "insert": {},
        "widen": {},
        "grow": 9,
        "basis": 0,
        "why_not": {
            ("model.layers.0", "insert"): "adds something that no layer, norm or layer scale ends",
            ("model.layers.0.self_attn.o_proj", "widen"): "goes into linear",
        },
    },
    "t5": {
        "insert": {"linear_relu": 4},
        "widen": {"fc1": 4},
        "grow": 32,
        "basis": 0,
        "why_not": {
            ("encoder.block.0.layer.1", "insert"): "does not run one more block there",
            ("decoder.block.0.layer.0.SelfAttention.q", "widen"): "which divides its features",
        },
    },
    "torch_encoder": {
        "insert": {"block": 2},
        "widen": {"fc1": 2},
        "grow": 5,
        "basis": 0,
        "why_not": {},
    },
}


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_found(name: str) -> None:
    model, sample = networks.build(name)
    found, expected = describe(model, sample), EXPECTED[name]
    assert _counted(found.possible("insert").values()) == expected["insert"]
    assert (
        _counted(way.partition(",")[0] for way in found.possible("widen").values())
        == (expected["widen"])
    )
    assert len(found.possible("grow")) == expected["grow"]
    assert len(found.possible("basis")) == expected["basis"]
    for (path, action), reason in expected["why_not"].items():
        assert reason in found.why_not(path)[action]
    layers = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and "out_proj" not in path
    ]
    rows = {(row.path, row.action) for row in found.rows}
    assert all((path, action) in rows for path in layers for action in ("grow", "widen"))


def _counted(entries: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for entry in entries:
        counts[entry] = counts.get(entry, 0) + 1
    return counts


def test_the_printed_table() -> None:
    model, sample = networks.build("gpt2")
    lines = str(describe(model, sample)).splitlines()
    assert lines[0].startswith("GPT2LMHeadModel: 2 positions to insert at, 0 layers")
    assert lines[2].split() == ["module", "class", "insert", "grow", "widen", "basis"]
    assert lines[3].split() == ["transformer.h.0-1", "(2)", "GPT2Block", "block", "-", "-", "-"]
    assert any("'transformer.wte.weight' is 'lm_head.weight'" in line for line in lines)
    assert max(map(len, lines)) < 160


def test_bad_input() -> None:
    model, sample = networks.build("gpt2")
    with pytest.raises(ValueError, match=r"The model raises \w+ on the sample"):
        describe(model, torch.randn(2, 3))
    with pytest.raises(ValueError, match="Unknown action 'prune'"):
        describe(model, sample).possible("prune")
    with pytest.raises(TypeError, match="compiled"):
        describe(torch.compile(model), sample)


def test_a_forward_that_depends_on_data_is_noted() -> None:
    class Routed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.a(x) if x.mean() > 0 else self.b(x)
            return out

    found = describe(Routed(), torch.ones(2, 3))
    assert found.notes[0].startswith("The model's forward reads numbers from tensors (__bool__)")
    assert found.why_not("b")["widen"] == "it did not run on the sample as a module of its own"
