"""The tuner: which tiles it tries, that a wrong kernel is never chosen, and that `dispatch` uses what it stores.

The interpreter runs the kernels, and a simulated clock replaces the device's.
"""

from dataclasses import replace

import pytest
import torch

from fastlora import BackendError, ConfigError
from fastlora.kernels.config import ARCHITECTURES, Problem, tiles
from fastlora.ops import dispatch, tune, tuning_file
from fastlora.ops.tune import Bench, Shape, candidates

H100 = ARCHITECTURES[90]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def test_shapes_are_parsed():
    assert Shape.parse("8,16,24,4") == Shape(8, 16, 24, 4, 0.0)
    assert Shape.parse("8,16,24,4,0.1").p == 0.1


@pytest.mark.parametrize(
    "text", ["8,16,24", "8,16,24,4,0.1,7", "a,1,1,1", "0,1,1,1", "1,1,1,1,1.0"]
)
def test_an_invalid_shape_is_named(text):
    with pytest.raises(ConfigError, match="shapes: expected .*, got " + repr(text)):
        Shape.parse(text)


def test_candidates_start_from_the_table_and_are_distinct_and_sensible():
    config = tiles(H100, Problem(8192, 4096, 4096, 16, 2, True))
    for start in (config.split, config.down, config.dy, config.x, config.decode):
        tried = list(candidates(start))
        assert tried[0] == start and len(set(tried)) == len(tried) > 20
        assert all(c.block_m * c.block_n <= 128 * 32 * c.num_warps for c in tried)
        assert all((c.block_n == 0) == (start.block_n == 0) for c in tried), (
            "a block that is not there"
        )


@pytest.fixture
def small(monkeypatch):
    shape = Shape(24, 32, 48, 4, 0.2)
    bench = Bench(shape, torch.float32, DEVICE)
    monkeypatch.setattr(dispatch, "device_architecture", lambda device: H100)
    return bench, tiles(H100, bench.problem)


def _clock(times):
    """A timer that runs the call once and returns the next of `times`, then the last one repeatedly."""
    left = list(times)

    def timer(call):
        call()
        return left.pop(0) if len(left) > 1 else left[0]

    return timer


@pytest.mark.slow
def test_the_fastest_tiles_and_plans_win(small):
    bench, start = small
    # Two candidates for each of the seven kernels that run with dropout, the second always faster; launches apart and
    # overlapping of split, decode and dx, of which decode is slower so; then the plans in the order of the cost model
    # (in_place, split, decode), then the plans of dx.
    times = [2.0, 1.0] * 7 + [2.0, 1.0, 1.0, 2.0, 2.0, 1.0] + [3.0, 2.0, 1.0] + [2.0, 1.0]
    result = tune.tune_shape(bench, start, _clock(times), limit=2)
    assert (result.plan, result.dx_plan) == ("decode", "in_place")
    overlapping = ("down", "split", "x", "dx")
    for name in ("down", "dy", "x", "dx", "update", "split", "decode"):
        second = list(candidates(getattr(start, name)))[1]
        expected = replace(second, overlap=True) if name in overlapping else second
        assert getattr(result.config, name) == expected
    assert result.config.fused == start.fused, "it cannot run with dropout"


@pytest.mark.slow
def test_a_wrong_kernel_gets_no_time(small, monkeypatch):
    bench, start = small
    correct = bench.ops.decode
    monkeypatch.setattr(
        bench.ops, "decode", lambda *a, **k: tuple(1.01 * t for t in correct(*a, **k))
    )
    result = tune.tune_shape(bench, start, _clock([1.0]), limit=1)
    assert result.plan != "decode"
    monkeypatch.setattr(
        bench.ops, "down_project", lambda x, a, *r, **k: x.new_zeros(len(x), len(a))
    )
    with pytest.raises(BackendError, match="no plan has a correct result"):
        tune.tune_shape(bench, start, _clock([1.0]), limit=1)


@pytest.mark.slow
def test_tiles_that_do_not_fit_are_skipped(small, monkeypatch):
    from triton.runtime.errors import OutOfResources

    bench, start = small
    large = list(candidates(start.dy))[1]
    run = bench.ops.dy_pass

    def dy_pass(dy, b, s, config, **named):
        if config != large:
            return run(dy, b, s, config, **named)
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(bench.ops, "dy_pass", dy_pass)
    result = tune.tune_shape(bench, start, _clock([2.0, 1.0] * 10 + [1.0]), limit=2)
    assert result.config.dy == start.dy


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without a device")
def test_without_a_device_it_exits_with_the_reason(capsys):
    with pytest.raises(SystemExit) as stop:
        tune.main(["--shapes", "8,16,24,4"])
    assert stop.value.code == 2
    assert (
        capsys.readouterr().err
        == "fastlora.tune: fastlora.tune measures on a CUDA device, and there is none\n"
    )


@pytest.mark.gpu
def test_a_tuned_shape_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTLORA_TUNING", str(tmp_path / "tuning.json"))
    tuning_file._read.cache_clear()
    dispatch._plan.cache_clear()
    assert tune.main(["--shapes", "256,128,192,8,0.1", "--max-candidates", "3"]) == 0
    x = torch.zeros(256, 128, dtype=torch.bfloat16, device="cuda")
    weight = torch.zeros(192, 128, dtype=torch.bfloat16, device="cuda")
    choice = dispatch.choose(x, weight, 8, dropout=True)
    assert choice.reason == "measured by fastlora.tune"
    assert choice.config != replace(choice.config, down=None)
    tuning_file._read.cache_clear()
    dispatch._plan.cache_clear()
