"""What matrix units lose, and what makes up for it.

Tensor cores align the products of a step along K, and the sum so far, with the largest of them. They cut off
what lies 24 (sm_80, sm_89) or 25 (later) bits below it, and cut the new sum to float32. They never round:
each step makes a projection smaller in magnitude, on average by the same share (Fasi et al., PeerJ Comput.
Sci. 7:e330; bit-accurate models: Xie et al., arXiv 2511.10909). T multiplies an error of the mean with N,
and so a share of 4e-7 (K = 512) is several times the error that float32 would make. Hence

- tensor cores add no more dimensions than the `chain` of a tile; chains are added in float32, which rounds;
- most of the share that a chain loses on average goes back in with the factor of the phase, at no cost.

CDNA3's matrix cores cut the old sum towards minus infinity but round the new one: nothing to make up for.
`bench/rounding_bench.py` has the models and measures the shares; no GPU has been measured yet.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .configs import Tile


class Lost(NamedTuple):
    """Share of a projection that is made up for, for every dimension of a chain, by what is multiplied.

    A little less than normal embeddings lose in chains of 64 dimensions, of tf32 32. Longer ones lose less
    for a dimension, short ones more, where it matters less.
    """

    bf16: float = 0.0
    fp16: float = 0.0
    tf32x3: float = 0.0


class Chain(NamedTuple):
    """How a launch adds along K.

    Attributes:
        tiles: of `block_k`, that matrix units add, 0 for all of them.
        even: K is a multiple of `block_k`, and of the chain where K is stepped through.
        lost: share of a projection that is made up for.
    """

    tiles: int
    even: bool
    lost: float


def kind_of_products(x: Tensor, A: Tensor, precision: str) -> str:
    """What is multiplied: "bf16", "fp16", or the precision of float32 products."""
    if x.dtype == A.dtype and x.itemsize == 2:
        return "bf16" if x.dtype == torch.bfloat16 else "fp16"
    return precision


def plan_chain(lost: Lost, tile: Tile, K: int, kind: str, *, held: bool) -> Chain:
    """How to add K dimensions in the tiles of a launch.

    In half precision: of tf32x3, the compiler adds every tile in float32.

    Args:
        lost: of the configuration.
        tile: of the launch.
        K: dimensions.
        kind: of `kind_of_products`; nothing is known to be lost of "ieee", and "tf32" loses more by itself.
        held: a program has all of K before it multiplies, else it steps through K.
    """
    block_k, _ = tile.steps(K)
    tiles = 0
    if kind in ("bf16", "fp16") and 0 < tile.chain < K:
        tiles = max(1, tile.chain // block_k)
        if not held and K % block_k == 0 and K % (tiles * block_k) != 0:
            tiles = 1
    step = block_k * (1 if held else max(1, tiles))
    dims = block_k if kind == "tf32x3" else tiles * block_k or K
    return Chain(
        tiles, K % step == 0, (0.0 if kind in ("ieee", "tf32") else getattr(lost, kind)) * min(dims, K)
    )
