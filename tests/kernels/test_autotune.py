"""Choosing tiles by a clock of our own, without a GPU and without running a kernel; splits and limits."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources, PTXASError

from lejepa_fast.kernels import autotune, forward
from lejepa_fast.kernels.configs import TARGETS, shipped_config
from lejepa_fast.kernels.table import count_splits, make_plan

CONFIG = shipped_config("sm_90", 2)
TILES = CONFIG.candidates("forward", 512)


@pytest.fixture
def launched(monkeypatch):
    """Tiles that were launched; the last candidate is the fastest."""
    seconds = itertools.count(1000, -1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(autotune, "process_tuner", autotune.Tuner(lambda call: call() or next(seconds)))
    monkeypatch.setenv("LEJEPA_AUTOTUNE", "1")
    return []


def launch_best(launch, V=8, N=2048, K=512, J=17, variant=(), config=CONFIG):
    with FakeTensorMode():
        x, A = torch.empty(V, N, K, device="cuda"), torch.empty(K, 1024, device="cuda")
    autotune.launch_best(launch, "forward", config, x, A, make_plan(J, 3 / (J - 1)), *variant)


def test_the_fastest_tile_is_kept(launched):
    assert TILES[0] == CONFIG.tile("forward", 512), "the shipped tile comes first"
    assert len(set(TILES)) == len(TILES) > 3
    launch_best(launched.append)
    assert launched == [*TILES, TILES[-1]]
    launch_best(launched.append, N=3000)  # the same power of two of rows
    assert launched[len(TILES) + 1 :] == [TILES[-1]]
    changes = [{"N": 5000}, {"V": 64}, {"K": 256}, {"J": 9}, {"variant": ("tf32",)}]
    for change in [*changes, {"config": shipped_config("sm_90", 4)}]:
        launched.clear()
        launch_best(launched.append, **change)
        assert len(launched) == len((change.get("config") or CONFIG).candidates("forward", 512)) + 1, change


def test_off_unless_the_environment_says_1(monkeypatch, launched):
    for value in ("", "0"):
        monkeypatch.setenv("LEJEPA_AUTOTUNE", value)
        launch_best(launched.append)
    assert launched == TILES[:1] * 2
    monkeypatch.setenv("LEJEPA_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match=r"^LEJEPA_AUTOTUNE: expected 0 or 1 .*, got 'yes'$"):
        launch_best(launched.append)


def test_a_graph_capture_is_never_timed(monkeypatch, launched):
    for capturing, expected in (
        (True, TILES[:1]),
        (False, [*TILES, TILES[-1]]),
        (True, TILES[-1:]),  # a capture takes a choice made before
    ):
        launched.clear()
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda answer=capturing: answer)
        launch_best(launched.append)
        assert launched == expected


@pytest.mark.parametrize(
    "failure",
    [
        OutOfResources(300_000, 232_448, "shared memory"),
        PTXASError("out of memory"),
        RuntimeError("PassManager::run failed"),
    ],
)
def test_tiles_that_cannot_run_are_passed_over(launched, failure):
    """If none can, the shipped tile's launch raises the reason."""
    able = TILES[:-1]

    def launch(tile):
        if tile not in able:
            raise failure
        launched.append(tile)

    launch_best(launch)
    assert launched[-1] == TILES[-2]
    able = []
    with pytest.raises(type(failure)):
        launch_best(launch, N=1)


def test_a_measurement_is_the_mean_of_the_calls_after_the_first(monkeypatch):
    clock, calls = iter([10.0, 16.0]), []
    monkeypatch.setattr(autotune, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    assert autotune.measure(lambda: calls.append(None)) == 6.0 / (len(calls) - 1)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_split_is_made_of_whole_tiles(target, itemsize):
    """What lets the number of splits, and so every size, ignore the tile."""
    config = shipped_config(target, itemsize)
    for kernel, K in itertools.product(("forward", "gradient"), (64, 512, 513)):
        tiles = config.candidates(kernel, K)
        assert all(config.split.samples % tile.block_n == 0 for tile in tiles)
        assert K <= 512 or not any(tile.resident for tile in tiles), "they would not fit"


@pytest.mark.parametrize("N", [0, 1, 127, 128, 129, 2048, 5000, 10_000_000])
@pytest.mark.parametrize(("views", "M"), [(1, 16), (8, 1024), (10, 16384)])
def test_splits_cover_every_sample_once(N, views, M):
    splits, samples = count_splits(views, N, M, 1, CONFIG.split)
    assert splits * samples >= N
    assert N == 0 or (splits - 1) * samples < N, "no split is empty"
    assert samples <= 1024, "more are not added one after another in float32"
    most = 8 * CONFIG.split.programs * (CONFIG.split.block_m + M)
    assert splits <= max(-(-N // 1024), most // (views * M))


@pytest.mark.parametrize(
    ("x", "M", "message"),
    [
        ((1, 4, 1), 60_000_000, "^A: expected at most 59652291 directions with 17 knots"),
        ((1, (1 << 30) + 1, 1), 4, "^x: expected at most 1073741824 samples .* got N = 1073741825"),
    ],
)
def test_more_than_the_kernels_can_count_is_refused(x, M, message):
    x, A = torch.zeros(1, 1, 1).expand(x), torch.zeros(1, 1).expand(1, M)
    with pytest.raises(ValueError, match=message):
        forward.table_sums(x, A, None, torch.zeros(17), make_plan(17, 0.2), CONFIG, "ieee")
