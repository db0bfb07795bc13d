"""Tiles chosen by timing on the device, opt-in by LEJEPA_AUTOTUNE=1; unset, empty or 0 is off.

The first launch of a kernel for a (device, dtypes, K, M, knots, power of two of rows, variant) times the
candidates of its configuration, the shipped tile first, and the process keeps the fastest. Off, nothing is
timed and a cold start never pauses. A candidate that cannot run is passed over.

- Timing synchronises with the device, so nothing is timed while a CUDA graph is captured: an untimed launch
  takes the shipped tile there. Run once before capturing, as graphs ask for anyway.
- A tile fixes the order in which numbers are added. Within a process results stay the same bit for bit once
  a choice is made; between processes the choice, and so the last bits, may differ.
- No size depends on a tile (`count_splits`), so fake implementations need not know the choice.

For benchmarks, with tensors as the kernels take them (x (V, N, K), A (K, M)):

    time_candidates(x, A, scale=None, *, J=17, t_max=3.0, precision="ieee", fused=None, timer=None)
        -> list of rows {"kernel", "V", "N", "K", "M", "J", "dtype", "tile": {...}, "shipped": bool,
                         "seconds": float or None, "error": None or why a tile cannot run}

`fused=False` times gradient and product where K is small enough for the fused kernel, `fused=True` the fused
kernel for any K and M. `timer(call)` returns the seconds that `call()` takes; the default is `measure`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.errors import TritonError

from .configs import ANY, Choice, Config, Tile, get_config
from .layout import Plan, make_plan

Timer = Callable[[Callable[[], None]], float]
Launch = Callable[[Tile], None]

_REPEATS = 10
# Too large for the device or its memory, or beyond the compiler, whose passes raise RuntimeError.
_CANNOT_RUN = (TritonError, RuntimeError)
# States of a device from which no later launch recovers, in the words of PyTorch or Triton.
_BROKEN = ("illegal memory access", "misaligned address", "unspecified launch failure", "illegal instruction",
           "device-side assert", "HIP error")  # fmt: skip
_chosen: dict[Hashable, Tile] = {}
_rows: list[dict[str, Any]] | None = None  # where `time_candidates` collects


class Problem(NamedTuple):
    """What a choice depends on besides the kernel."""

    x: Tensor
    A: Tensor
    plan: Plan
    variant: tuple[Hashable, ...]  # what else the compiler sees: precision, and of which gradient

    def key(self) -> Hashable:
        (views, N, K), M = self.x.shape, self.A.shape[1]
        rows = (views * N).bit_length()
        knots = self.plan.J, self.plan.equidistant
        return self.x.device, self.x.dtype, self.A.dtype, K, M, knots, rows, self.variant


def enabled() -> bool:
    """Whether LEJEPA_AUTOTUNE asks for timings.

    Raises:
        ValueError: it is set to anything but 0 or 1.
    """
    value = os.environ.get("LEJEPA_AUTOTUNE", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"LEJEPA_AUTOTUNE: expected 0 or 1 in the environment, got {value!r}")
    return value == "1"


def choose(config: Config, kernel: str, problem: Problem, launch: Launch) -> Tile:
    """The tile to launch a kernel with; `launch` may be called with candidates and must bear repetition."""
    shipped = config.tile(kernel, problem.x.shape[2])
    if _rows is not None:
        timed = [row for row in _rows if row["kernel"] == kernel]  # of an earlier chunk
        if not timed:
            timed = _time_all(config, kernel, problem, launch)
            _rows.extend(timed)
        return shipped if timed[0]["error"] is None else _fastest(timed)
    if enabled():
        key = (kernel, tuple(config.candidates(kernel, problem.x.shape[2])), problem.key())
        if key in _chosen:
            return _chosen[key]
        if not _capturing(problem.x):
            return _chosen.setdefault(key, _fastest(_time_all(config, kernel, problem, launch)))
    return shipped


def _fastest(timed: list[dict[str, Any]]) -> Tile:
    """The fastest tile; the shipped one if none can run, so that its launch raises the reason."""
    able = [row for row in timed if row["error"] is None]
    return Tile(**(min(able, key=lambda row: row["seconds"]) if able else timed[0])["tile"])


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _time_all(config: Config, kernel: str, problem: Problem, launch: Launch) -> list[dict[str, Any]]:
    (V, N, K), M = problem.x.shape, problem.A.shape[1]
    size = {"V": V, "N": N, "K": K, "M": M, "J": problem.plan.J, "dtype": str(problem.x.dtype)[6:]}
    rows: list[dict[str, Any]] = []
    for tile in config.candidates(kernel, K):
        seconds, error = None, None
        try:
            seconds = measure(lambda tile=tile: launch(tile), problem.x)  # type: ignore[misc]
        except _CANNOT_RUN as failure:
            if any(reason in str(failure) for reason in _BROKEN):
                raise
            error = f"{type(failure).__name__}: {failure}"
        row = {"tile": tile._asdict(), "shipped": not rows, "seconds": seconds, "error": error}
        rows.append({"kernel": kernel, **size, **row})
    return rows


def measure(call: Callable[[], None], x: Tensor) -> float:
    """Seconds of a call on the device of x, the current one, after a first call that compiles."""
    call()
    if not x.is_cuda:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    for _ in range(_REPEATS):
        call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1000 / _REPEATS


def time_candidates(
    x: Tensor,
    A: Tensor,
    scale: Tensor | None = None,
    *,
    J: int = 17,
    t_max: float = 3.0,
    precision: str = "ieee",
    fused: bool | None = None,
    timer: Timer | None = None,
) -> list[dict[str, Any]]:
    """Times every candidate of every tiled kernel of a forward and backward pass; see the module.

    Args:
        x: embeddings (V, N, K), float32, bf16 or fp16.
        A: directions (K, M) in the dtype of x or float32.
        scale: multiplies the columns of A, (M,) float32.
        J, t_max: knots.
        precision: of float32 products, "ieee", "tf32x3" or "tf32".
        fused: None for what K gets by default.
        timer: seconds of a call; None for `measure`.
    """
    global _rows, measure
    from . import backward, finish, forward

    config = get_config(x.device, x.element_size() if x.dtype == A.dtype else 4)
    K, largest = x.shape[2], config.fused[-1].max_dim
    if fused is not None:
        # The first choice is for any case.
        config = config._replace(fused=(Choice(ANY, config.tile("fused", min(K, largest))),) if fused else ())
    t = torch.arange(J, device=x.device, dtype=torch.float32) * (t_max / max(1, J - 1))
    phi = torch.exp(-t.square() / 2)
    plan = make_plan(J, t_max / (J - 1) if J > 1 else None)
    before, _rows = measure, []
    if timer is not None:
        measure = lambda call, x: timer(call)  # noqa: E731
    try:
        table = forward.table_sums(x, A, scale, t, plan, config, precision)
        options = {"unbiased": False, "scale_by_n": True, "factor": 1.0}
        value, coef = finish.finish(table, x.shape[1], scale, t, phi, phi, plan, **options)  # type: ignore[arg-type]
        backward.gradient(torch.ones_like(value), 1.0, coef, x, A, scale, t, plan, config, precision)
    except _CANNOT_RUN:  # no tile of a kernel can run: the rows say why
        if all(row["error"] is None for row in _rows):
            raise
    finally:
        measure, rows, _rows = before, _rows, None
    return rows
