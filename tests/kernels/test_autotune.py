"""Choosing tiles by timing: with a clock of our own, so without a GPU and without running a kernel."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources, PTXASError

from lejepa_fast.kernels import autotune, forward, timing
from lejepa_fast.kernels.configs import TARGETS, Config, Tile, shipped_config
from lejepa_fast.kernels.table import count_splits, make_plan

CONFIG = shipped_config("sm_90", 2)


@pytest.fixture(autouse=True)
def _tuner(monkeypatch):
    monkeypatch.setattr(autotune, "_chosen", {})
    monkeypatch.setenv("LEJEPA_AUTOTUNE", "1")


def problem(N: int = 2048, K: int = 512, J: int = 17, variant=()) -> autotune.Problem:
    x, A = torch.empty(8, N, K, device="meta"), torch.empty(K, 1024, device="meta")
    return autotune.Problem(x, A, make_plan(J, 3 / (J - 1)), variant)


class Clock:
    """Times a launch by its tile: the n-th best of `order` takes n seconds."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, order: list[Tile]):
        self.order = order
        self.launched: list[Tile] = []
        monkeypatch.setattr(autotune, "measure", self.measure)

    def measure(self, call, x) -> float:
        call()
        return float(self.order.index(self.launched[-1]))

    def choose(self, problem: autotune.Problem, config: Config = CONFIG) -> Tile:
        return autotune.choose(config, "forward", problem, self.launched.append)


def test_the_fastest_tile_is_kept(monkeypatch):
    tiles = CONFIG.candidates("forward", 512)
    assert tiles[0] == CONFIG.tile("forward", 512), "the shipped tile comes first"
    assert len(set(tiles)) == len(tiles) > 3
    clock = Clock(monkeypatch, tiles[::-1])
    assert clock.choose(problem()) == tiles[-1]
    assert clock.launched == tiles
    clock.order = tiles  # what is fast later does not matter
    assert clock.choose(problem(N=3000)) == tiles[-1], "the same power of two of rows"
    assert len(clock.launched) == len(tiles)
    for other in (problem(N=5000), problem(K=256), problem(J=9), problem(variant=("tf32", True))):
        assert clock.choose(other) == tiles[0]


@pytest.mark.parametrize("value", ["", "0", None])
def test_off_nothing_is_launched(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("LEJEPA_AUTOTUNE")
    else:
        monkeypatch.setenv("LEJEPA_AUTOTUNE", value)
    clock = Clock(monkeypatch, [])
    assert clock.choose(problem()) == CONFIG.tile("forward", 512)
    assert clock.launched == []


def test_other_values_are_refused(monkeypatch):
    monkeypatch.setenv("LEJEPA_AUTOTUNE", "yes")
    with pytest.raises(ValueError, match=r"^LEJEPA_AUTOTUNE: expected 0 or 1 in the environment, got 'yes'$"):
        Clock(monkeypatch, []).choose(problem())


def test_a_graph_capture_is_never_timed(monkeypatch):
    tiles = CONFIG.candidates("forward", 512)
    clock = Clock(monkeypatch, tiles[::-1])
    monkeypatch.setattr(autotune, "_capturing", lambda x: True)
    assert clock.choose(problem()) == tiles[0]
    assert clock.launched == []
    monkeypatch.setattr(autotune, "_capturing", lambda x: False)
    assert clock.choose(problem()) == tiles[-1], "the capture has left no choice behind"
    monkeypatch.setattr(autotune, "_capturing", lambda x: True)
    assert clock.choose(problem()) == tiles[-1], "a capture takes a choice made before"


@pytest.mark.parametrize(
    "failure",
    [
        OutOfResources(300_000, 232_448, "shared memory"),
        PTXASError("out of memory"),
        RuntimeError("PassManager::run failed"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
)
def test_tiles_that_cannot_run_are_passed_over(monkeypatch, failure):
    tiles = CONFIG.candidates("forward", 512)
    clock = Clock(monkeypatch, tiles[::-1])

    def launch(tile: Tile) -> None:
        if tile == tiles[-1]:
            raise failure
        clock.launched.append(tile)

    assert autotune.choose(CONFIG, "forward", problem(), launch) == tiles[-2]


@pytest.mark.parametrize("by", ["CUDA error", "Triton Error [CUDA]"])
def test_a_broken_device_is_no_reason_to_try_the_next_tile(monkeypatch, by):
    Clock(monkeypatch, CONFIG.candidates("forward", 512))

    def launch(tile: Tile) -> None:
        raise RuntimeError(f"{by}: an illegal memory access was encountered")

    with pytest.raises(RuntimeError, match="illegal memory access"):
        autotune.choose(CONFIG, "forward", problem(), launch)


def test_a_choice_is_not_for_another_configuration(monkeypatch):
    """Gradients per direction are multiplied in float32, which other tiles may not hold."""
    tiles = CONFIG.candidates("forward", 512)
    clock = Clock(monkeypatch, tiles)
    clock.choose(problem())
    clock.launched.clear()
    single = shipped_config("sm_90", 4)
    clock.order = single.candidates("forward", 512)
    assert clock.choose(problem(), single) in clock.order
    assert clock.launched == clock.order


def test_where_no_tile_can_run_the_shipped_one_says_why(monkeypatch):
    Clock(monkeypatch, CONFIG.candidates("forward", 512))

    def launch(tile: Tile) -> None:
        raise PTXASError(f"{tile}")

    assert autotune.choose(CONFIG, "forward", problem(), launch) == CONFIG.tile("forward", 512)


def test_rows_of_a_benchmark_say_what_cannot_run(monkeypatch):
    """Also where it is the shipped tile, and where no tile of a kernel is left."""
    for able in (CONFIG.candidates("forward", 512)[1:], []):
        clock = Clock(monkeypatch, CONFIG.candidates("forward", 512))

        def table_sums(x, A, scale, t, plan, config, precision, able=able, clock=clock):
            def launch(tile: Tile) -> None:
                if tile not in able:
                    raise PTXASError("too large")
                clock.launched.append(tile)

            launch(autotune.choose(CONFIG, "forward", problem(), launch))
            raise RuntimeError("as far as this test goes")

        monkeypatch.setattr(forward, "table_sums", table_sums)
        rows = timing.time_candidates(torch.empty(1, 16, 8), torch.empty(8, 4))
        assert len(rows) == len(CONFIG.candidates("forward", 512))
        assert [row["error"] is None for row in rows] == [Tile(**row["tile"]) in able for row in rows]
        assert rows[0]["error"] == "PTXASError: PTXAS error: too large"


def test_large_dimensions_get_no_resident_tile():
    assert not any(tile.resident for tile in CONFIG.candidates("gradient", 1536))
    assert any(tile.resident for tile in CONFIG.candidates("gradient", 512))


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("itemsize", [2, 4])
def test_every_split_is_made_of_whole_tiles(target, itemsize):
    """What lets the number of splits, and so every size, ignore the tile."""
    config = shipped_config(target, itemsize)
    for kernel in ("forward", "gradient"):
        for tile in (tile for K in (64, 1536) for tile in config.candidates(kernel, K)):
            assert config.split.samples % tile.block_n == 0


@pytest.mark.parametrize("N", [0, 1, 127, 128, 129, 2048, 5000, 10_000_000])
@pytest.mark.parametrize(("views", "M"), [(1, 16), (8, 1024), (10, 16384)])
def test_splits_cover_every_sample_once(N, views, M):
    splits, samples = count_splits(views, N, M, 1, CONFIG.split)
    assert splits * samples >= N
    assert N == 0 or (splits - 1) * samples < N, "no split is empty"
    assert samples <= 1024, "more are not added one after another in float32"
    most = 8 * CONFIG.split.programs * (CONFIG.split.block_m + M)
    assert splits <= max(-(-N // 1024), most // (views * M))


def test_more_directions_than_the_kernels_can_count_are_refused():
    A = torch.zeros(1, 1).expand(1, 60_000_000)
    with pytest.raises(ValueError, match=r"^A: expected at most 59652291 directions with 17 knots"):
        forward.table_sums(torch.zeros(1, 4, 1), A, None, torch.zeros(17), make_plan(17, 0.2), CONFIG, "ieee")


def test_more_samples_than_the_kernels_can_count_are_refused():
    x = torch.zeros(1, 1, 1).expand(1, (1 << 30) + 1, 1)
    with pytest.raises(ValueError, match=r"^x: expected at most 1073741824 samples .* got N = 1073741825"):
        forward.table_sums(x, torch.ones(1, 4), None, torch.zeros(2), make_plan(2, 1.0), CONFIG, "ieee")
