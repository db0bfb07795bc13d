"""The table of sums of J knots, and how programs share it and the samples (maths: `phases.py`)."""

import ctypes
import functools
import math
from typing import NamedTuple

_BABIES = 3
_CHUNK_GIANTS = 2  # 34 running sums a direction: more do not fit into registers
_CHUNK_KNOTS = 8
# Directions whose coefficients are stored together, so that a row of them is a cache line.
COEF_BLOCK = 32


class Plan(NamedTuple):
    """Table of a set of knots."""

    equidistant: bool  # knots `j * spacing` by baby and giant steps, else one sine and cosine a knot
    J: int  # number of knots
    B: int  # baby steps
    G: int  # giant steps
    chunk_giants: int  # giant steps of one program (equidistant knots)
    chunk_knots: int  # knots of one program (arbitrary knots)
    chunks: int  # programs that share the table
    rows: int  # entries of the table for one view and direction
    factor_hi: float  # half turns per unit of projection (equidistant) or per unit of t p ...
    factor_lo: float  # ... as the sum of two float32 numbers
    giant_factor: tuple[float, float]  # the same for one giant step


def make_plan(J: int, spacing: float | None, stretch: float = 1.0) -> Plan:
    """The table for J knots, `spacing` apart from 0 or, with None, anywhere.

    `stretch` multiplies all phases, see `Config.stretch`.
    """
    return _make_plan(int(J), spacing, stretch)  # a size may be a symbol of torch.compile, which is no key


@functools.lru_cache(maxsize=64)
def _make_plan(J: int, spacing: float | None, stretch: float) -> Plan:
    if spacing is None or J < 2:
        chunk_knots = min(J, _CHUNK_KNOTS)
        chunks = -(-J // chunk_knots)
        return Plan(
            False, J, 0, 0, 0, chunk_knots, chunks, 2 * J, *_two_floats(stretch / math.pi), (0.0, 0.0)
        )
    degree = J - 1
    B = min(degree, _BABIES)
    G = -(-max(0, degree - B) // (2 * B + 1))
    chunk_giants = min(G, _CHUNK_GIANTS)
    chunks = -(-G // chunk_giants) if G else 1
    rows = (1 + 2 * G) * (1 + 2 * B)
    half_turns = stretch * spacing / math.pi
    giant = _two_floats((2 * B + 1) * half_turns)
    return Plan(True, J, B, G, chunk_giants, 0, chunks, rows, *_two_floats(half_turns), giant)


def coefficient_shape(views: int, M: int, plan: Plan) -> tuple[int, int, int, int]:
    """Shape of the coefficients of dT/dp: blocks of directions, their rows and one row more.

    That row holds the largest absolute coefficient of the block.
    """
    return views, ceil_div(M, COEF_BLOCK), plan.rows + 1, COEF_BLOCK


class Split(NamedTuple):
    """How samples are shared between programs: the same for every tile, so that sizes do not depend on it."""

    block_m: int  # directions of a program, about
    samples: int  # least samples of a split, a multiple of the samples of every tile
    programs: int  # programs that run at a time


# Programs for each that runs at a time, at most: later ones fill the gaps of earlier ones, ...
_WAVES = 8
# ... as long as a split has this many times the least samples, because starting a program has a cost.
_MIN_SHARE = 4
# A program adds its samples one by one in float32; the sums of programs are added with compensation.
_MAX_SAMPLES = 1024


def count_splits(views: int, N: int, M: int, chunks: int, split: Split) -> tuple[int, int]:
    """How the samples of a view are shared: (number of splits, samples in each but the last).

    Args:
        views, N, M: sizes of the batch and the number of directions.
        chunks: programs that share a table.
        split: of the configuration.
    """
    base = views * ceil_div(M, split.block_m) * chunks
    units = max(1, ceil_div(N, split.samples))
    fill = split.programs // base
    smooth = min(_WAVES * split.programs // base, units // _MIN_SHARE)
    share = min(ceil_div(units, min(units, max(1, fill, smooth))), _MAX_SAMPLES // split.samples)
    return ceil_div(units, share), share * split.samples


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def _two_floats(value: float) -> tuple[float, float]:
    """Two float32 numbers whose sum is `value` to about 48 bits."""
    high = ctypes.c_float(value).value
    return high, ctypes.c_float(value - high).value
