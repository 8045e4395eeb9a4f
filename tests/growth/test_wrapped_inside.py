"""A part of a model that is wrapped, sharded or compiled is refused before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.distributed._composable import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import distribute_tensor
from torch.nn.parallel import DataParallel, DistributedDataParallel

from growkernels.growth import BasisSearch, LayerInsertion, NeuronScaling, insertions, rebuild
from growkernels.nn import convert, separate_attention


@pytest.fixture(autouse=True, scope="module")
def _one_process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    meet = tmp_path_factory.mktemp("gloo") / "meet"
    distributed.init_process_group("gloo", init_method=f"file://{meet}", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


class Network(nn.Module):
    """A convolution, an attention and a backbone, each of interest to one of the functions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.backbone = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.conv(x).flatten(2).transpose(1, 2)
        mixed, _ = self.attention(tokens, tokens, tokens, need_weights=False)
        out: Tensor = self.head(self.backbone(mixed.mean(1)))
        return out


def in_data_parallel(model: Network) -> None:
    model.backbone = DataParallel(model.backbone)  # type: ignore[assignment]


def in_ddp(model: Network) -> None:
    model.backbone = DistributedDataParallel(model.backbone)  # type: ignore[assignment]


def in_fsdp1(model: Network) -> None:
    model.backbone = FullyShardedDataParallel(  # type: ignore[assignment]
        model.backbone, device_id=torch.device("cpu"), use_orig_params=True
    )


def fully_sharded(model: Network) -> None:
    fully_shard(model.backbone[2])


def replicated(model: Network) -> None:
    replicate(model.backbone)  # type: ignore[operator]


def a_dtensor(model: Network) -> None:
    mesh = init_device_mesh("cpu", (1,))
    weight = model.backbone[2].weight
    assert isinstance(weight, nn.Parameter)
    model.backbone[2].weight = nn.Parameter(distribute_tensor(weight.detach(), mesh))


def a_dtensor_buffer(model: Network) -> None:
    mesh = init_device_mesh("cpu", (1,))
    model.head.register_buffer("mask", distribute_tensor(torch.ones(3), mesh))


WRAPPED: list[tuple[Callable[[Network], None], str]] = [
    (in_data_parallel, "'backbone' is wrapped in DataParallel"),
    (in_ddp, "'backbone' is wrapped in DistributedDataParallel"),
    (in_fsdp1, "'backbone' is distributed by FullyShardedDataParallel"),
    (fully_sharded, r"'backbone\.2' is distributed by FSDPModule"),
    (replicated, "'backbone' is distributed by replicate"),
    (a_dtensor, r"'backbone\.2\.weight' is a DTensor"),
    (a_dtensor_buffer, r"'head\.mask' is a DTensor"),
]

USES: list[Callable[[nn.Module], object]] = [
    lambda model: LayerInsertion(model),
    lambda model: NeuronScaling(model),
    lambda model: BasisSearch(model),
    lambda model: convert(model, {"conv": 2}),
    lambda model: separate_attention(model),
    lambda model: rebuild(model, a_record()),
]


def a_record() -> list[dict[str, object]]:
    model = nn.Sequential(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)))
    inserter = LayerInsertion(model)
    with inserter.recording():
        model(torch.randn(4, 3)).sum().backward()
    inserter.insert("0.1")
    return insertions(model)


def contents(model: nn.Module) -> list[tuple[str, int]]:
    modules = [(path, id(module)) for path, module in model.named_modules()]
    hooks = [
        (path, len(module._forward_hooks) + len(module._forward_pre_hooks))
        for path, module in model.named_modules()
    ]
    return modules + hooks + [(path, id(p)) for path, p in model.named_parameters()]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("wrap", "sentence"), WRAPPED, ids=lambda v: getattr(v, "__name__", ""))
@pytest.mark.parametrize("use", USES)
def test_refused_everywhere(
    use: Callable[[nn.Module], object], wrap: Callable[[Network], None], sentence: str
) -> None:
    model = Network()
    wrap(model)
    before = contents(model)
    with pytest.raises(TypeError, match=sentence):
        use(model)
    assert contents(model) == before


@pytest.mark.filterwarnings("ignore")
def test_the_inside_of_a_sharded_model_is_refused() -> None:
    inner = Network()
    FullyShardedDataParallel(inner, device_id=torch.device("cpu"))
    with pytest.raises(TypeError, match="distributed by FullyShardedDataParallel"):
        LayerInsertion(inner.backbone)


def test_the_inside_of_data_parallelism_is_free() -> None:
    model = Network()
    wrapped = DistributedDataParallel(model)
    inserter = LayerInsertion(model)
    with inserter.recording():
        wrapped(torch.randn(2, 3, 4, 4)).sum().backward()
    inserter.insert("backbone.1")


def test_what_is_wrapped_after_a_driver_was_built_is_refused() -> None:
    model = Network()
    inserter, scaling = LayerInsertion(model), NeuronScaling(model, "magnitude")
    with inserter.recording():
        model(torch.randn(2, 3, 4, 4)).sum().backward()
    chosen = scaling.select(scaling.scores(), budget=100, min_eligible=1)
    in_ddp(model)
    before = contents(model)
    with pytest.raises(TypeError, match="'backbone' is wrapped in Dist"):
        inserter.insert("backbone.1")
    with pytest.raises(TypeError, match="'backbone' is wrapped in Dist"):
        scaling.grow(chosen)
    assert contents(model) == before


@pytest.mark.parametrize("use", USES[:3])
def test_drivers_refuse_compiled_parts(use: Callable[[nn.Module], object]) -> None:
    model = Network()
    model.backbone.compile()
    with pytest.raises(TypeError, match="'backbone' is compiled"):
        use(model)


def test_compiled_parts_compile_again_after_an_exchange() -> None:
    """``convert``, ``separate_attention`` and ``rebuild`` have no hooks to lose."""
    model = Network().double().eval()
    reference = copy.deepcopy(model)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    model.conv.compile(backend="eager")
    model.attention.compile(backend="eager")
    model.backbone = torch.compile(model.backbone, backend="eager")  # type: ignore[assignment]
    torch.testing.assert_close(model(x), reference(x))
    for network in (model, reference):
        convert(network, {"conv": 2})
        separate_attention(network)
    torch.testing.assert_close(model(x), reference(x))
