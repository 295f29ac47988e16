"""The tuner: which tiles it tries, that a wrong kernel is never chosen, and that `dispatch` uses what it stores.

The interpreter runs the kernels, and a simulated clock replaces the device's.
"""

import math
from dataclasses import asdict, replace

import pytest
import torch

from fastlora import BackendError, ConfigError
from fastlora.kernels.config import ARCHITECTURES, Problem, tiles
from fastlora.ops import dispatch, tune, tuning_file
from fastlora.ops.bench import Bench, Shape
from fastlora.ops.graph import capture
from fastlora.ops.tune import _sensible, neighbours, search

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


def test_neighbours_differ_in_one_setting_or_halve_the_tile():
    config = tiles(H100, Problem(8192, 4096, 4096, 16, 2, True))
    for start in (config.split, config.down, config.start, config.dy, config.x, config.decode):
        tried = list(neighbours(start))
        assert len(set(tried)) > 12
        for one in tried:
            changed = {f for f, v in asdict(one).items() if v != getattr(start, f)}
            halved = {"block_n", "num_warps", "programs"}
            pairs = ({"block_k", "num_stages"}, {"prefetch", "subtiles"})
            assert len(changed) <= 1 or halved <= changed or changed in pairs
        assert all((c.block_n == 0) == (start.block_n == 0) for c in tried), (
            "a block that is not there"
        )


def test_the_search_finds_a_planted_best_within_twelve_candidates():
    """Each setting that differs from the planted one costs a tenth; one that fails takes infinitely long."""
    start = tiles(H100, Problem(8192, 4096, 4096, 16, 2, True)).split
    best = replace(start, block_n=128, num_warps=4, programs=2 * start.programs, num_stages=3)
    timed, found = [], []

    def seconds(config):
        timed.append(config)
        if config.block_k == 128:
            return math.inf
        return 1.1 ** sum(v != getattr(best, f) for f, v in asdict(config).items())

    def improved(config, time):
        found.append((config, time))

    assert search(start, seconds, 12, improved) == (best, 1.0)
    assert len(timed) == len(set(timed)) <= 12 and found[-1] == (best, 1.0)
    assert [time for _, time in found] == sorted((t for _, t in found), reverse=True)


def test_the_search_goes_on_from_the_fastest_tiles_so_far():
    """The planted best differs from the first tiles in two settings, which are not neighbours."""
    start = tiles(H100, Problem(8192, 4096, 4096, 16, 2, True)).down
    best = replace(start, num_warps=8, num_stages=4)
    assert best not in neighbours(start)

    def seconds(config):
        return 1.1 ** sum(v != getattr(best, f) for f, v in asdict(config).items())

    assert search(start, seconds, 40) == (best, 1.0)


def test_a_difference_within_the_noise_changes_nothing():
    start = tiles(H100, Problem(8192, 4096, 4096, 16, 2, True)).down
    assert search(start, lambda config: 1.0 if config == start else 0.995, 8) == (start, 1.0)


def _second(config):
    """The first configuration that a search tries after `config`."""
    return next(one for one in neighbours(config) if one != config and _sensible(one))


@pytest.fixture
def small(monkeypatch):
    bench = Bench(Shape(80, 32, 48, 4, 0.2), torch.float32, DEVICE)
    monkeypatch.setattr(dispatch, "device_architecture", lambda device: H100)
    return bench, dispatch.predicted_choice(DEVICE, bench.problem)


def _clock(times):
    """A timer that runs the call once and returns the next of `times`, then the last one repeatedly."""
    left = list(times)

    def timer(call):
        call()
        return left.pop(0) if len(left) > 1 else left[0]

    return timer


KERNELS = ("x", "update", "dy", "down", "start", "dx", "split")


@pytest.mark.slow
def test_the_fastest_tiles_and_plans_win(small):
    bench, start = small
    # Two candidates for each kernel, the second always faster; the plans in the order of the cost model (in_place, accumulate,
    # split), then those of dx (split, accumulate, in_place).
    times = [2.0, 1.0] * len(KERNELS) + [3.0, 1.0, 2.0] + [3.0, 2.0, 1.0]
    kept, rows = [], []
    result = tune.tune_shape(
        bench, start, _clock(times), 2, kept.append, lambda *row: rows.append(row)
    )
    assert (result.plan, result.dx_plan) == ("accumulate", "in_place") and kept[-1] == result
    for name in KERNELS:
        assert getattr(result.config, name) == _second(getattr(start.config, name))
    assert result.config.fused == start.config.fused, "it cannot run with dropout"
    # Every improvement is kept, so that a search that is stopped loses nothing.
    assert len(kept) == 2 * len(KERNELS) + 1
    assert kept[1].config == replace(start.config, x=_second(start.config.x))
    assert rows[-1][:2] == ("dx in_place", 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("overlapping", [1.0, 3.0])
def test_launches_overlap_where_that_is_faster(small, overlapping):
    bench, start = small
    times = [1.0] * len(KERNELS) + [3.0, 3.0, 2.0] + [2.0, 3.0, 3.0]
    times += [2.0, overlapping, 2.0, overlapping]
    result = tune.tune_shape(bench, start, _clock(times), 1)
    assert (result.plan, result.dx_plan) == ("split", "split")
    for name in ("down", "split", "x", "dx"):
        assert getattr(result.config, name).overlap == (overlapping < 2.0)


@pytest.mark.slow
def test_few_rows_tune_the_decode_kernel(monkeypatch):
    bench = Bench(Shape(24, 32, 48, 4), torch.float32, DEVICE)
    monkeypatch.setattr(dispatch, "device_architecture", lambda device: H100)
    start = dispatch.predicted_choice(DEVICE, bench.problem)
    rows = []
    tune.tune_shape(bench, start, _clock([1.0]), 1, row=lambda *row: rows.append(row[0]))
    assert {"x", "update", "dy", "decode", "y decode"} <= set(rows) and "split" not in rows


@pytest.mark.slow
def test_a_wrong_kernel_gets_no_time(small, monkeypatch):
    bench, start = small
    correct = bench.ops.start
    monkeypatch.setattr(
        bench.ops, "start", lambda *a, **k: tuple(1.01 * t for t in correct(*a, **k))
    )
    rows = {}
    result = tune.tune_shape(
        bench, start, _clock([1.0]), 1, row=lambda what, time, config: rows.update({what: time})
    )
    assert result.plan != "accumulate" and math.isinf(rows["start"] + rows["y accumulate"])
    monkeypatch.setattr(
        bench.ops, "dy_pass", lambda dy, b, s, *r, **k: (torch.zeros_like(s), b[None], None)
    )
    with pytest.raises(BackendError, match="no plan has a correct result"):
        tune.tune_shape(bench, start, _clock([1.0]), 1)


@pytest.mark.slow
def test_a_wrong_mask_is_noticed(small, monkeypatch):
    bench, start = small
    correct = bench.ops.dy_pass

    def dy_pass(*arguments, **named):
        ds, db, bits = correct(*arguments, **named)
        return ds, db, bits ^ 1

    assert bench.attempt(lambda: bench.run("dy", start.config.dy))
    monkeypatch.setattr(bench.ops, "dy_pass", dy_pass)
    assert not bench.attempt(lambda: bench.run("dy", start.config.dy))


@pytest.mark.slow
def test_tiles_that_do_not_fit_are_skipped(small, monkeypatch):
    from triton.runtime.errors import OutOfResources

    bench, start = small
    large = _second(start.config.dy)
    run = bench.ops.dy_pass

    def dy_pass(dy, b, s, config, **named):
        if config != large:
            return run(dy, b, s, config, **named)
        raise OutOfResources(300_000, 232_448, "shared memory")

    monkeypatch.setattr(bench.ops, "dy_pass", dy_pass)
    result = tune.tune_shape(bench, start, _clock([2.0, 1.0] * 10 + [1.0]), 2)
    assert result.config.dy == start.config.dy


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
def test_a_capture_that_fails_leaves_the_stream_and_the_random_numbers_as_they_were():
    before, x = torch.cuda.current_stream(), torch.ones(3, device="cuda")
    with pytest.raises(RuntimeError):
        capture(lambda: x.sum().item())
    assert torch.cuda.current_stream() == before
    assert torch.rand(3, device="cuda").lt(1).all()
    replay = capture(lambda: x.mul_(2))
    x.fill_(1)
    replay()
    assert x.tolist() == [2, 2, 2]


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
