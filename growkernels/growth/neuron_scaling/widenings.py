"""How layers can get more outputs while the network computes the same, and why others cannot.

The function stays, because what reads the new features starts at 0: fc2's and proj's new columns,
and k's new rows for q's (q's for k's). These zeros have a gradient at once, the new rows one step
later. (A pair of opposite neurons with equal columns c would not keep it: GELU(a)c + GELU(-a)c is
not 0.) Every head gets the same number of features, behind its own, so no feature changes its head,
and the softmax scale stays. A batch norm's new channels are scaled by 1 and shifted by 0, and start
with the running statistics that copies of their parents have (``init="parent"``; else mean 0,
variance 1); a group norm gets whole new groups.

**Layer and RMS norm** divide by the size of all n features together. Of features that come from a
linear layer directly, m new ones keep the function in one way, up to a linear choice: they must add
nothing to the sum of squares that the norm takes. So behind a layer norm they start as the mean of
the layer's neurons, which is the mean mu that the norm subtracts, and behind an RMS norm at 0. Then
mu stays, the mean of squares becomes n / (n + m) of what it was on every sample, and with the
norm's own weight times sqrt(n / (n + m)) and its eps times n / (n + m)

    w sqrt(n / (n + m)) (h - mu) / sqrt((v + eps) n / (n + m)) = w (h - mu) / sqrt(v + eps)

exactly. The new features come out of the norm as 0, whatever reads them: so the readers' new
columns are not 0, as elsewhere, but a share of the parents' columns, by which the new neurons get a
gradient, if the activation behind the norm is 0 at 0 and has a slope there (GELU, SiLU, tanh; of
ReLU torch's is 0). Behind an activation no neuron is mu, and without a weight of its own the norm
cannot make up for the factor: there only doubling all neurons would keep the function, which is not
done.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import nn

from growkernels.growth.module_graph import followers
from growkernels.growth.neuron_scaling.elementwise import function_of, value_and_slope
from growkernels.growth.neuron_scaling.neuron_rows import can_be_widened, has_neurons
from growkernels.growth.traced_graph import Features, TracedGraph
from growkernels.nn import Attention
from growkernels.nn.weights import why_computed

WIDTHS = ("fc1", "v", "qk", "conv", "gated")

# Normalise each feature, or each group of features, by itself.
# Normalise all features together.
OF_ALL = (nn.LayerNorm, nn.RMSNorm)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm)
OF_EACH = (*BATCH_NORMS, nn.InstanceNorm1d, nn.InstanceNorm2d)


@dataclass(frozen=True)
class Widening:
    """How a layer can get more outputs while the network computes the same.

    Attributes:
        role: one of ``WIDTHS``.
        follower: the layer that gets as many more inputs, or outputs (qk).
        heads: into how many equal runs the outputs are cut.
        readers: more layers that get as many more inputs.
        partners: layers that get as many more outputs: the other half of a gated MLP.
        norms: paths of the normalisations between, which get as many more features.
        multiple: new outputs come in such numbers: whole groups of a group norm.
        activation: path of the module, or "function NAME", that acts on the outputs, where it ran
            on a sample.
        only_activation: whether at most that, dropout and ``norms`` stand between.
        norm_behind_activation: whether one of these takes what it has made.
    """

    role: str
    follower: str
    heads: int = 1
    readers: tuple[str, ...] = ()
    partners: tuple[str, ...] = ()
    norms: tuple[str, ...] = ()
    multiple: int = 1
    activation: str | None = None
    only_activation: bool = True
    norm_behind_activation: bool = False

    @property
    def all_readers(self) -> tuple[str, ...]:
        """The layers that get new inputs."""
        return () if self.role == "qk" else (self.follower, *self.readers)

    @property
    def others(self) -> tuple[str, ...]:
        """The layers that change along."""
        return (self.follower, *self.readers, *self.partners)


def widenings(
    model: nn.Module, graph: TracedGraph | None
) -> tuple[dict[str, Widening], dict[str, str]]:
    """How each layer can be widened, and why others cannot that stand in the right place.

    Args:
        graph: what ran on a sample; None: Sequentials and modules with fc1, act and fc2.
    """
    fitting: dict[str, Widening] = {}
    unfit: dict[str, str] = {}
    if graph is None:
        for name, follower in followers(model):
            if isinstance(model.get_submodule(follower), nn.Linear):
                fitting[name] = Widening("fc1", follower)
    else:
        for name in graph.layers:
            if has_neurons(model.get_submodule(name)):
                found = _traced(model, graph, name)
                if isinstance(found, Widening):
                    fitting[name] = found
                else:
                    unfit[name] = found
    for name, module in model.named_modules():
        if isinstance(module, Attention):
            at = f"{name}." if name else ""
            fitting[f"{at}v"] = Widening("v", f"{at}proj", module.heads)
            fitting[f"{at}q"] = Widening("qk", f"{at}k", module.heads)
            fitting[f"{at}k"] = Widening("qk", f"{at}q", module.heads)
            for child in ("q", "k", "v"):
                unfit.pop(f"{at}{child}", None)
    for name, widening in list(fitting.items()):
        reason = _why_not_widened(model, (name, *widening.others))
        if reason is not None:
            del fitting[name]
            unfit[name] = reason
    return fitting, unfit


def _traced(model: nn.Module, graph: TracedGraph, name: str) -> Widening | str:
    if (reason := graph.why_fixed(name)) is not None:
        return reason
    features = graph.made_by(name)
    assert features is not None  # it can be changed
    if features.gated and name != features.makers[0]:
        return f"it is widened together with {features.makers[0]!r}, whose outputs it multiplies"
    norms = _norms(model, graph, features)
    if isinstance(norms, str):
        return norms
    own = {f"{norm}.{parameter}" for norm in norms for parameter in ("weight", "bias")}
    if rest := [parameter for parameter in features.parameters if parameter not in own]:
        return f"the parameter {rest[0]!r} has one entry for each of its outputs"
    groups = [model.get_submodule(norm) for norm in norms]
    sizes = {m.num_channels // m.num_groups for m in groups if isinstance(m, nn.GroupNorm)}
    if len(sizes) > 1:
        listed = " and ".join(map(str, sorted(sizes)))
        return f"group norms with groups of {listed} take its outputs"

    convolution = isinstance(model.get_submodule(name), nn.Conv2d)
    first, *more = features.readers
    between = [step for step in features.steps if step.kind not in ("dropout", "view", "norm")]
    acts = [step for step in between if step.kind == "activation"]
    kinds = [step.kind for step in features.steps if step.kind in ("activation", "norm")]
    activation = None
    if acts:
        activation = acts[0].module or f"function {acts[0].name}"
    return Widening(
        "gated" if features.gated else "conv" if convolution else "fc1",
        first,
        readers=tuple(more),
        partners=features.makers[1:],
        norms=norms,
        multiple=sizes.pop() if sizes else 1,
        activation=activation,
        only_activation=len(acts) == len(between) <= 1,
        norm_behind_activation="norm" in kinds[kinds.index("activation") :] if acts else False,
    )


def _norms(model: nn.Module, graph: TracedGraph, features: Features) -> tuple[str, ...] | str:
    """The paths of the normalisations, or why new features would not leave old ones alone."""
    found: list[str] = []
    for step in features.steps:
        if step.kind == "depthwise":
            return f"{step.module or step.name!r} convolves each of its outputs by itself"
        if step.kind != "norm":
            continue
        if step.module is None:
            return f"its outputs are normalised by {step.name!r}, which is no module of its own"
        module = model.get_submodule(step.module)
        if type(module) in OF_EACH or type(module) is nn.GroupNorm:
            if reason := why_computed(module):
                return f"of {step.module!r} {reason}"
            if not _along_features(step.module, graph, lambda dims: 1):
                return f"{step.module!r} normalises along another axis than that of its outputs"
            found.append(step.module)
            continue
        if reason := _why_not_over_all(step.module, module, model, graph, features):
            return reason
        found.append(step.module)
    return tuple(dict.fromkeys(found))


def _why_not_over_all(
    path: str, norm: nn.Module, model: nn.Module, graph: TracedGraph, features: Features
) -> str | None:
    """Why new features cannot leave the old ones alone in a norm of all of them; None: they can."""
    together = (
        f"{path!r} normalises over all of its outputs together, so that new ones would change"
    )
    if type(norm) not in OF_ALL:
        return f"{together} what becomes of the old ones"
    assert isinstance(norm, nn.LayerNorm | nn.RMSNorm)
    if reason := why_computed(norm):
        return f"of {path!r} {reason}"
    if not _along_features(path, graph, lambda dims: dims - 1):
        return f"{path!r} normalises along another axis than that of its outputs"
    steps = [step for step in features.steps if step.kind not in ("view", "dropout")]
    if features.gated or steps[0].module != path or len(norm.normalized_shape) > 1:
        return (
            f"{together} what becomes of the old ones: only directly behind a linear layer can "
            "they start so that its statistics change by a known factor"
        )
    if len(steps) > 2 or any(step.kind != "activation" for step in steps[1:]):
        return f"{together} what becomes of the old ones, and more than an activation follows"
    acts = [step.module or f"function {step.name}" for step in steps[1:]]
    f = function_of(model, acts[0] if acts else None, traced=True)
    if f is None or value_and_slope(f, 0.0)[0] != 0 or value_and_slope(f, 0.0)[1] == 0:
        return (
            f"{together} what becomes of the old ones, but where they are 0 behind it, and there "
            "its activation has another value, or no slope that torch takes a gradient through"
        )
    if norm._parameters.get("weight") is None:
        return f"{together} its scale, and it has no weight of its own to make up for that"
    return None


def _along_features(norm: str, graph: TracedGraph, axis: Callable[[int], int]) -> bool:
    """Whether the axis that a norm normalises, of so many, is the features', in all calls."""
    trace = graph.trace
    read = [
        operation.inputs[0]
        for operation in trace.operations
        if operation.name.endswith("_norm")
        and any(trace.calls[call].module == norm for call in operation.calls)
    ]
    places = [(graph.axis_of(number), len(trace.values[number].shape)) for number in read]
    return bool(places) and all(at is not None and at[0] == axis(dims) for at, dims in places)


def _why_not_widened(model: nn.Module, names: Sequence[str]) -> str | None:
    """What is in the way of new rows and columns; None: layers whose weights are theirs.

    A weight that a parametrization or a hook computes (weight_norm, spectral_norm, pruning) is no
    parameter of the layer, so rows and columns cannot be added to it.
    """
    for name in names:
        layer = model.get_submodule(name)
        if reason := why_computed(layer):
            return f"of {name!r} {reason}"
        if not can_be_widened(layer):
            return f"{name!r} is a {type(layer).__name__}"
        if isinstance(layer, nn.Conv2d) and layer.groups != 1:
            return f"{name!r} is a convolution with groups"
    return None
