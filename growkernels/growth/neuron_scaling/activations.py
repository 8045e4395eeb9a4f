"""The activations behind the candidates, as far as their second derivatives are known."""

from __future__ import annotations

from torch import nn

from growkernels.growth.neuron_scaling.candidates import Candidate

# Activation modules whose second derivative gk.splitting_weight knows.
NAMES: dict[type[nn.Module], str] = {
    nn.GELU: "gelu",
    nn.SiLU: "silu",
    nn.Tanh: "tanh",
    nn.Sigmoid: "sigmoid",
    nn.Softplus: "softplus",
    nn.ReLU: "relu",
}


def activation_name(module: nn.Module) -> str | None:
    """gk.splitting_weight's name of an activation module; None: it does not know the module."""
    name = NAMES.get(type(module))
    return "gelu_tanh" if name == "gelu" and module.approximate == "tanh" else name


def with_known_activation(
    model: nn.Module,
    candidates: list[Candidate],
    relu_beta: float | None,
    left_out: dict[str, str],
) -> list[Candidate]:
    """The candidates whose own activation has a second derivative; the others go to ``left_out``.

    Raises:
        ValueError: an activation that overwrites its input, a ReLU without ``relu_beta``, or no
            candidate left.
    """
    known = []
    for candidate in candidates:
        path = candidate.activation
        module = None if path is None else model.get_submodule(path)
        name = None if module is None else activation_name(module)
        if name is None:
            left_out[candidate.name] = (
                "no activation with a second derivative takes its outputs, so its s2d matrix "
                "is zero or not known"
            )
        elif getattr(module, "inplace", False):
            raise ValueError(
                f"Activation {path!r} overwrites its input, which 's2d' needs; use inplace=False."
            )
        elif name == "relu" and relu_beta is None:
            raise ValueError(
                f"Layer {candidate.name!r} has a ReLU behind it, whose second derivative is 0 "
                "wherever it exists; pass relu_beta= (Wu et al. 2019 take 3) to use that of a "
                "softplus, or use criterion='splitting'."
            )
        else:
            known.append(candidate)
    if not known:
        raise ValueError(
            "No layer has a known activation directly behind it, so every 's2d' matrix is "
            "zero; use criterion='splitting', which takes the curvature of what is added."
        )
    return known
