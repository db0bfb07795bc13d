"""What matrix units lose of a projection, and what is left of it: python bench/rounding_bench.py

No GPU is needed: the units are modelled (`matrix_units.py`). For every target (sm_89 has the units and tiles
of sm_80), kind of products and K it projects normal embeddings on unit directions, for one K also more
samples and embeddings that are not normal, and measures

- the share of a projection that is lost for each dimension of a chain, which `kernels/configs.py` records;
- the error of the statistic over what the accuracy rule allows (twice that of plain float32 + 1e-6): with
  one chain over all of K, with the chains of the shipped forward tile, and with these and the recorded
  share, as the kernels compute it. The statistic itself is taken in float64.

Rows go to bench/results/rounding.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matrix_units
import numpy as np
import torch
from benchlib import RESULTS, append_rows, machine, print_table
from matrix_units import Array

from lejepa_fast import standard_normal_knots
from lejepa_fast.kernels.configs import TARGETS, shipped_config
from lejepa_fast.kernels.rounding import plan_chain

N, M, J = 2048, 32, 17
DIMS = (16, 64, 128, 256, 512, 1536)
MANY, OTHER_DIM = 16384, 512
EMBEDDINGS = {
    "normal": lambda z: z,
    "sparse": lambda z: z * (np.abs(z) > 1.96) * 1.9,  # one in twenty is not 0
    "leading": lambda z: z * np.where(np.arange(z.shape[1]) < z.shape[1] // 16, 4.0, 0.01),
}
KINDS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32x3": torch.float32}


class Problem(NamedTuple):
    """Embeddings (N, K), directions (K, M), the factors that make them unit vectors, and projections."""

    x: Array
    A: Array
    scale: Array
    exact: Array
    plain: Array  # by float32


def problem(
    K: int, kind: str, *, samples: int = N, embeddings: str = "normal", directions: int = M, seed: int = 0
) -> Problem:
    generator = np.random.default_rng(seed + K)
    A = generator.standard_normal((K, directions))
    A = _rounded(A / np.linalg.norm(A, axis=0), kind)
    x = _rounded(EMBEDDINGS[embeddings](generator.standard_normal((samples, K))), kind)
    scale = 1 / np.linalg.norm(A, axis=0)
    exact = x @ A * scale
    plain = torch.from_numpy(x).float() @ torch.from_numpy(A * scale).float()
    return Problem(x, A, scale, exact, plain.double().numpy())


def _rounded(values: Array, kind: str) -> Array:
    return torch.from_numpy(values).to(KINDS[kind]).double().numpy()


def project(target: str, case: Problem, kind: str, chain: int) -> Array:
    """By the units of a target, chains of so many dimensions added in float32."""
    total = np.zeros_like(case.exact)
    for k in range(0, case.x.shape[1], chain):
        step = slice(k, k + chain)
        precision = kind if kind == "tf32x3" else "half"
        part = matrix_units.multiply(target, case.x[:, step], case.A[step], np.zeros_like(total), precision)
        total = (total + part).astype(np.float32).astype(np.float64)
    return total * case.scale


def lost_share(case: Problem, projected: Array) -> float:
    """Least squares: projected = (1 - share) * exact."""
    return float(((case.exact - projected) * case.exact).sum() / np.square(case.exact).sum())


def statistic(p: Array, dtype: torch.dtype = torch.float64) -> Array:
    """T of projections (N, M), (M,)."""
    t, phi, weights = (a.double() for a in standard_normal_knots(n_points=J)[:3])
    phase = torch.from_numpy(p).to(dtype)[..., None] * t.to(dtype)
    C, S = (f(phase).sum(0).double() / p.shape[0] for f in (torch.cos, torch.sin))
    return (p.shape[0] * (weights * ((C - phi) ** 2 + S**2)).sum(-1)).numpy()


def error_over_allowed(case: Problem, projected: Array) -> float:
    """Error of T in the Euclidean norm, over what the accuracy rule allows."""
    exact = statistic(case.exact)
    allowed = 2 * np.linalg.norm(statistic(case.plain, torch.float32) - exact) + 1e-6 * np.linalg.norm(exact)
    return float(np.linalg.norm(statistic(projected) - exact) / allowed)


def measure() -> Iterator[dict[str, Any]]:
    cases = [(K, "normal", N) for K in DIMS]
    cases += [(OTHER_DIM, embeddings, N) for embeddings in ("sparse", "leading")]
    cases += [(OTHER_DIM, "normal", MANY)]
    for kind, (K, embeddings, samples) in itertools.product(KINDS, cases):
        directions = M if samples == N else M // 4
        case = problem(K, kind, samples=samples, embeddings=embeddings, directions=directions)
        for target in TARGETS:
            if target == "sm_89" or (target == "gfx942" and kind == "tf32x3"):
                continue  # the latter multiplies float32 as such
            config = shipped_config(target, KINDS[kind].itemsize)
            tile = config.tile("forward", K).for_sums(1, kind)
            block_k, _ = tile.steps(K)
            plan = plan_chain(config.lost, tile, K, kind, held=tile.resident)
            chain = min(K, block_k if kind == "tf32x3" else plan.tiles * block_k or K)
            chained = project(target, case, kind, chain)
            yield {
                "target": target,
                "products": kind,
                "embeddings": embeddings,
                "K": K,
                "N": samples,
                "M": directions,
                "J": J,
                "chain": chain,
                "lost_per_dim": lost_share(case, chained) / chain,
                "recorded_per_dim": getattr(config.lost, kind),
                "error_of_one_chain": error_over_allowed(case, project(target, case, kind, K)),
                "error_in_chains": error_over_allowed(case, chained),
                "error": error_over_allowed(case, chained * (1 + plan.lost)),
            }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the rows (default: %(default)s)")
    folder = parser.parse_args().out
    where = machine(torch.device("cpu"))
    rows = []
    for row in measure():
        append_rows(folder / "rounding.jsonl", [row | where])
        rows.append(row)
    names = ("target", "products", "embeddings", "K", "N", "chain")
    errors = ("error_of_one_chain", "error_in_chains", "error")
    table = [
        [*(str(row[n]) for n in names), f"{row['lost_per_dim']:.2e}", *(f"{row[e]:.2f}" for e in errors)]
        for row in rows
    ]
    print_table(
        [*names, "lost per dim", "error of one chain / allowed", "in chains", "and made up for"], table
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
