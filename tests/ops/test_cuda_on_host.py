"""The launch shim that runs CUDA kernels on the host: threads, barriers, warps, shared memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from host_compiler import HERE, HostCompiler, HostLibrary, cpp_compiler


@pytest.fixture(params=[(), ("-DCUDA_ON_HOST_UCONTEXT",)], ids=["own switch", "ucontext"])
def shim(request: pytest.FixtureRequest, host_compiler: HostCompiler) -> HostLibrary:
    return host_compiler(HERE / "cuda_on_host_test.cpp", request.param)


def test_barriers_and_static_shared_memory(shim: HostLibrary) -> None:
    x, sums = torch.randn(5, 999), torch.empty(5)
    shim.call("sum", x, sums, 5, 999)
    torch.testing.assert_close(sums, x.sum(1), rtol=1e-5, atol=1e-4)
    forwards = sums.clone()
    with shim.backwards():
        shim.call("sum", x, sums, 5, 999)
    assert sums.equal(forwards)


def test_shuffles(shim: HostLibrary) -> None:
    x, out = torch.randn(64, dtype=torch.float64), torch.empty(6, 64, dtype=torch.float64)
    shim.call("shuffle", x, out, 64)
    lane = torch.arange(32)
    sources = torch.stack(
        [
            torch.full((32,), 3),
            lane // 8 * 8 + (lane + 1) % 8,
            lane ^ 5,
            torch.where(lane % 16 < 2, lane, lane - 2),
            torch.where(lane + 3 < 32, lane + 3, lane),
            lane // 2,
        ]
    )
    expected = torch.cat([x[:32][sources], x[32:][sources]], 1)
    expected[5] = expected[5].float().double()
    # The last shuffle's lane is t / 2 of the thread: beyond 31 it wraps around.
    expected[5, 32:] = x[32:][(torch.arange(32, 64) // 2) % 32].float().double()
    assert out.equal(expected)


def test_votes_of_parts_of_a_warp(shim: HostLibrary) -> None:
    x = torch.zeros(64, dtype=torch.int32)
    x[[1, 4, 20]] = 1
    x[32:] = 1
    out = torch.empty(64, dtype=torch.int32)
    shim.call("vote", x, out, 64)
    assert out[:32].tolist() == [0b10010] * 16 + [1 << 20] * 16
    assert out[32:].tolist() == [0xFFFF + 11] * 16 + [(0xFFFF0000 + 11) - (1 << 32)] * 16


def test_a_block_that_fills_no_warp_votes_with_the_lanes_it_has(shim: HostLibrary) -> None:
    out = torch.empty(40, dtype=torch.int32)
    shim.call("vote", torch.ones(40, dtype=torch.int32), out, 40)
    assert out[32:].tolist() == [0xFF + 11] * 8


def test_votes_of_a_block(shim: HostLibrary) -> None:
    out = torch.empty(90, 70, dtype=torch.int32)
    shim.call("block_vote", out, 70, 90)
    assert out.equal((torch.arange(90) < 70).int()[:, None].expand(90, 70))


def test_indices_in_three_dimensions(shim: HostLibrary) -> None:
    out = torch.empty(2 * 3 * 2, 3 * 2 * 4, dtype=torch.int32)
    shim.call("index", out)
    blocks = [
        100_000 * z + 10_000 * y + 1000 * x for z in range(2) for y in range(3) for x in (0, 1)
    ]
    threads = [100 * z + 10 * y + x for z in range(4) for y in range(2) for x in range(3)]
    assert out.tolist() == [[block + thread for thread in threads] for block in blocks]


def test_shared_memory_is_nan_when_a_block_starts(shim: HostLibrary) -> None:
    found = torch.zeros(3, 2)
    shim.call("poison", found, 3)
    assert found.isnan().all()


def test_atomics(shim: HostLibrary) -> None:
    total, largest, last = (torch.zeros(1, dtype=torch.int32) for _ in range(3))
    halves = torch.zeros(1)
    shim.call("count", total, halves, largest, last)
    assert [part.item() for part in (total, halves, largest, last)] == [400, 200.0, 99, 9]


def test_a_missing_barrier_shows_in_one_of_the_two_orders(shim: HostLibrary) -> None:
    right = (torch.arange(64, dtype=torch.int32) + 1) % 64
    out = torch.empty(64, dtype=torch.int32)
    shim.call("read_neighbour", out, 1)
    assert out.equal(right)
    shim.call("read_neighbour", out, 0)
    forwards = out.clone()
    with shim.backwards():
        shim.call("read_neighbour", out, 1)
        assert out.equal(right)
        shim.call("read_neighbour", out, 0)
    assert not out.equal(forwards)


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (0, r"thread \(6,0,0\): __syncthreads\(\) that thread \(5,0,0\) never reaches"),
        (1, r"thread \(32,0,0\): __syncthreads\(\) while thread \(31,0,0\) waits at another one"),
        (2, r"cannot go on: .*thread \(7,0,0\).* a warp collective in .*with mask 0xffffffff"),
        (3, r"thread \(3,0,0\): a shuffle reads lane 9, which takes no part"),
        (4, r"thread \(16,0,0\): .*mask does not name the calling lane 16"),
        (5, r"cannot go on: .*0 of 64 threads have left the kernel"),
    ],
)
def test_threads_that_never_meet_end_in_an_error(
    shim: HostLibrary, mistake: int, message: str
) -> None:
    with pytest.raises(RuntimeError, match=message):
        shim.call("make_mistake", mistake)
    # The next launch is as good as the first.
    test_barriers_and_static_shared_memory(shim)


def test_a_write_beyond_dynamic_shared_memory(shim: HostLibrary) -> None:
    with pytest.raises(RuntimeError, match="wrote beyond its 16 bytes of dynamic shared memory"):
        shim.call("write_too_far")


@pytest.mark.parametrize("shape", [(0, 32, 0), (1, 1025, 0), (1, 0, 0), (1, 32, 228 << 10)])
def test_launches_that_no_gpu_takes(shim: HostLibrary, shape: tuple[int, int, int]) -> None:
    with pytest.raises(RuntimeError, match="no GPU launches"):
        shim.call("launch_shape", *shape)


def test_the_compiler_is_named_in_what_it_says(
    host_compiler: HostCompiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "broken.cpp"
    broken.write_text("int f() { return nowhere; }\n")
    with pytest.raises(RuntimeError, match=r"(?s)broken\.cpp.*failed.*nowhere"):
        host_compiler(broken)
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(RuntimeError, match="CXX names no-such-compiler, which is not there"):
        cpp_compiler()
