"""Every example runs at a tiny size, and does what its first line says."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from growkernels.ops.library import library_path

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def example(name: str) -> Callable[..., dict[str, Any]]:
    """The example's main function."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    main: Callable[..., dict[str, Any]] = module.main
    return main


def test_every_example_is_tested() -> None:
    here = Path(__file__).read_text()
    for path in EXAMPLES.glob("*.py"):
        # tests/distributed/test_restart.py runs that one, and kills it.
        assert path.stem == "train_distributed" or f'example("{path.stem}")' in here, path.name
        lines = len(path.read_text().splitlines())
        assert path.stem == "train_distributed" or 40 <= lines <= 100, (path.name, lines)


def test_a_layer_is_inserted() -> None:
    losses = example("insert_a_layer")(["--steps=40", "--width=8"])
    assert losses["same"] == pytest.approx(losses["before"], rel=1e-5)
    assert losses["after"] < losses["before"]


def test_layers_are_widened() -> None:
    told = example("widen")(["--steps=10", "--growths=1", "--budget=60"])
    assert told["neurons"] > 8
    assert told["loss1"] < told["loss0"]


def test_a_vit_is_scaled() -> None:
    told = example("scale_a_vit")(
        ["--steps=10", "--embed=16", "--depth=2", "--budget=2000"]
    )  # fmt: skip
    assert 0 < told["new"] <= 2000
    assert told["same"] == pytest.approx(told["before"], rel=1e-4)
    assert told["after"] < told["before"]


def test_a_resnet_is_converted_and_back() -> None:
    told = example("convert_a_resnet")(["--steps=1", "--width=8", "--size=8"])
    assert told["fewer"] < 0.7 * told["weights"]
    assert told["difference"] < 1e-4


def test_the_raw_ops_agree_with_plain_torch() -> None:
    errors = example("raw_ops")()
    assert len(errors) == 6
    assert max(errors.values()) < 1e-4


def test_a_stopped_run_goes_on(tmp_path: Path) -> None:
    main = example("resume")
    grow = ["--grow-at", "2", "5", "--save-every=4"]
    whole = main([f"--out={tmp_path / 'whole'}", "--steps=8", *grow])
    assert len(whole["records"]) == 2
    main([f"--out={tmp_path / 'parts'}", "--steps=4", *grow])
    assert main([f"--out={tmp_path / 'parts'}", "--steps=8", *grow]) == whole


@pytest.mark.skipif(importlib.util.find_spec("lightning") is None, reason="needs lightning")
def test_growth_inside_lightning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert example("lightning_trainer")(["--steps=5", "--every=2", "--width=4"]) == {
            "growths": 2,
            "modules": 7,
        }


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")
def test_growth_inside_transformers(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = example("transformers_trainer")(["--steps=4", "--width=8", f"--out={tmp_path}"])
    assert told == {"layers": 3, "difference": 0}


def test_a_program_in_cpp_links_the_op_library(tmp_path: Path) -> None:
    options = {
        "CMAKE_PREFIX_PATH": torch.utils.cmake_prefix_path,
        "GROWKERNELS_LIBRARY": library_path(),
        "CMAKE_CXX_FLAGS": "-O0",
    }
    definitions = [f"-D{name}={value}" for name, value in options.items()]
    cmake = str(Path(sys.executable).parent / "cmake")
    for command in (
        [cmake, "-S", str(EXAMPLES / "cpp"), "-B", str(tmp_path), *definitions],
        [cmake, "--build", str(tmp_path)],
        [str(tmp_path / "merits")],
    ):
        finished = subprocess.run(command, capture_output=True, text=True)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    assert finished.stdout.startswith("merits: ")
