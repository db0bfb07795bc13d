"""What the theory of LeJEPA (arXiv 2511.08544) says, in numbers: python bench/theory_bench.py [--rehearse]

Five experiments without images, each a figure theory_NAME.png and rows in theory.jsonl. The docstring of
each function, which its rows repeat, is the statement it shows; `holds` says whether the run agrees. On one
core they take one to two minutes together; --rehearse runs each in small.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from benchlib import Row, Rows, command_line
from matplotlib.figure import Figure
from torch import Tensor

from lejepa_fast import sample_directions, sigreg, standard_normal_knots

COLORS = ("#0b6bcb", "#d9822b", "#3b4252", "#2f9e44")


def statistic(x: Tensor, A: Tensor, t_max: float = 5.0, n_points: int = 17) -> Tensor:
    """SIGReg of samples (N, K) along the directions (K, M), the mean over these."""
    knots = standard_normal_knots(t_max, n_points)
    return sigreg(x, A, *knots[:3], spacing=knots.spacing, impl="torch")


# ---- (a) ----------------------------------------------------------------------------------------------


def dimension(small: bool) -> Iterator[Row]:
    """Section 4.3: 16 directions drawn anew at each step do more than thousands of fixed ones. Adam on the
    samples (N 100, dimension 512), all Gaussian but for two dimensions in the shape of an X. The right panel
    decides: SIGReg in these two dimensions. The left one takes 512 directions that no training used; few of
    them see the X, so any value below that of Gaussian samples is as good."""
    N, K, steps = (64, 128, 100) if small else (100, 512, 400)
    fixed_counts = (16, 32) if small else (16, 256, 2048)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(N, K, generator=generator)
    arm = 1.0 - 2.0 * torch.randint(0, 2, (N,), generator=generator)
    start[:, 1] = arm * start[:, 0]  # marginals and covariance are those of N(0, I)
    angles = torch.linspace(0, math.pi, 65)[:-1]
    plane = torch.stack([angles.cos(), angles.sin()])
    gaussian = [statistic(torch.randn(N, 2, generator=generator), plane).item() for _ in range(50)]
    about = {"N": N, "K": K, "steps": steps, "before": statistic(start[:, :2], plane).item()}
    about["gaussian"] = sum(gaussian) / len(gaussian)
    for count, resampled in ((16, True), *((count, False) for count in fixed_counts)):
        x = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([x], lr=0.02)
        fixed = sample_directions(K, count, step=0)
        for step in range(steps):
            A = sample_directions(K, count, step=step) if resampled else fixed
            optimizer.zero_grad()
            statistic(x, A).backward()
            optimizer.step()
        with torch.no_grad():
            unseen = statistic(x, sample_directions(K, 512, step=10**6)).item()
            after = statistic(x[:, :2], plane).item()
        yield {**about, "directions": count, "resampled": resampled, "after": after, "unseen": unseen}


def dimension_holds(rows: Sequence[Row]) -> bool:
    resampled, *fixed = rows
    return all(resampled["after"] < row["after"] for row in fixed)


def draw_dimension(figure: Figure, rows: Sequence[Row]) -> None:
    left, right = figure.subplots(1, 2)
    names = [f"{row['directions']} {'resampled' if row['resampled'] else 'fixed'}" for row in rows]
    colors = [COLORS[0] if row["resampled"] else COLORS[1] for row in rows]
    left.barh(names, [row["unseen"] for row in rows], color=colors)
    left.set(title="directions never trained on", xlabel="SIGReg")
    right.barh(names, [row["after"] for row in rows], color=colors)
    right.axvline(rows[0]["before"], color=COLORS[2], linestyle=":", label="before")
    right.axvline(rows[0]["gaussian"], color=COLORS[2], linestyle="--", label="Gaussian samples")
    right.set(title="plane of the X", xlabel="SIGReg")
    for axis in (left, right):
        axis.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=2, fontsize=8)


# ---- (b) ----------------------------------------------------------------------------------------------


def quadrature(small: bool) -> Iterator[Row]:
    """Section 5.1: the trapezoid rule needs as few as 17 knots. Relative error of the statistic, the median
    over samples of four kinds, against the integral over the line with 20,001 knots; dotted against the
    same range with 2,001 knots."""
    generator = torch.Generator().manual_seed(0)
    N, repeats = (64, 4) if small else (256, 32)

    def normal() -> Tensor:
        return torch.randn(N, generator=generator, dtype=torch.float64)

    def heavy_tails() -> Tensor:
        seed = int(torch.randint(9999, (1,), generator=generator))
        return torch.from_numpy(np.random.default_rng(seed).standard_t(2, N))

    kinds: dict[str, Callable[[], Tensor]] = {
        "Gaussian": normal,
        "twice as wide": lambda: 2 * normal(),
        "two humps": lambda: normal().sign() + 0.2 * normal(),
        "heavy tails": heavy_tails,
    }
    one = torch.ones(1, 1, dtype=torch.float64)
    for kind, draw in kinds.items():
        samples = [draw()[:, None] for _ in range(repeats)]
        exact = torch.stack([statistic(x, one, 10.0, 2001 if small else 20001) for x in samples])
        for t_max in (1.0, 3.0, 5.0):
            for n_points in (3, 5, 9, 17, 33):
                got = torch.stack([statistic(x, one, t_max, n_points) for x in samples])
                whole = torch.stack([statistic(x, one, t_max, 2001) for x in samples])
                yield {
                    "kind": kind, "t_max": t_max, "knots": n_points,
                    "error": ((got - exact).abs() / exact).median().item(),
                    "rule_error": ((got - whole).abs() / whole).median().item(),
                }  # fmt: skip


def quadrature_holds(rows: Sequence[Row]) -> bool:
    """17 knots on the half line [0, 3], the default: the rule's own error is below 1 % for every kind."""
    return all(row["rule_error"] < 0.01 for row in rows if (row["t_max"], row["knots"]) == (3.0, 17))


def draw_quadrature(figure: Figure, rows: Sequence[Row]) -> None:
    kinds = list(dict.fromkeys(row["kind"] for row in rows))
    for axis, kind in zip(figure.subplots(1, len(kinds), sharey=True), kinds, strict=True):
        for color, t_max in zip(COLORS, (1.0, 3.0, 5.0), strict=False):
            mine = [row for row in rows if (row["kind"], row["t_max"]) == (kind, t_max)]
            knots = [row["knots"] for row in mine]
            axis.plot(knots, [row["error"] for row in mine], "o-", color=color, label=f"[0, {t_max:g}]")
            axis.plot(knots, [row["rule_error"] for row in mine], ":", color=color)
        axis.set(title=kind, xlabel="knots on the half line", yscale="log", ylim=(1e-9, 3))
    figure.axes[0].set_ylabel("relative error (dotted: of the rule alone)")
    figure.axes[-1].legend(fontsize=8)


# ---- (c) ----------------------------------------------------------------------------------------------


def linear(small: bool) -> Iterator[Row]:
    """Lemmas 1 and 2: of features with the same total variance, the isotropic ones give the linear probe of
    least variance (ordinary least squares) and, with weight decay, of least bias for the worst task. Spectra
    k^-power; bias: norm of the mean estimate less the truth, for the unit task along the smallest axis."""
    K, N, draws = (16, 64, 20) if small else (64, 256, 200)
    generator = torch.Generator().manual_seed(0)
    for power in (0.0, 0.25, 0.5, 1.0, 2.0):
        spectrum = torch.arange(1, K + 1, dtype=torch.float64) ** -power
        spectrum *= K / spectrum.sum()
        truth = torch.zeros(K, dtype=torch.float64)
        truth[-1] = 1.0  # the smallest variance: the worst task
        found: dict[str, list[Tensor]] = {"ols": [], "ridge": []}
        for _ in range(draws):
            X = torch.randn(N, K, generator=generator, dtype=torch.float64) * spectrum.sqrt()
            y = X @ truth + 0.5 * torch.randn(N, generator=generator, dtype=torch.float64)
            for name, decay in (("ols", 0.0), ("ridge", 0.1 * N)):
                gram = X.T @ X + decay * torch.eye(K, dtype=torch.float64)
                found[name].append(torch.linalg.solve(gram, X.T @ y))
        ols, ridge = (torch.stack(each) for each in found.values())
        yield {
            "K": K, "N": N, "draws": draws, "power": power,
            "condition": (spectrum[0] / spectrum[-1]).item(),
            "variance": ols.var(0).sum().item(),
            "expected_variance": (0.25 * (1 / spectrum).sum() / (N - K - 1)).item(),
            "bias": (ridge.mean(0) - truth).norm().item(),
        }  # fmt: skip


def linear_holds(rows: Sequence[Row]) -> bool:
    """Both grow with every step away from isotropy."""
    pairs = itertools.pairwise(rows)
    return all(a["variance"] < b["variance"] and a["bias"] < b["bias"] for a, b in pairs)


def draw_linear(figure: Figure, rows: Sequence[Row]) -> None:
    left, right = figure.subplots(1, 2)
    condition = [row["condition"] for row in rows]
    left.loglog(condition, [row["variance"] for row in rows], "o", color=COLORS[0], label="measured")
    left.loglog(condition, [row["expected_variance"] for row in rows], color=COLORS[2], label="closed form")
    left.set(title="OLS, Lemma 2", xlabel="largest / smallest variance of a feature", ylabel="total variance")
    left.legend(fontsize=8)
    right.semilogx(condition, [row["bias"] for row in rows], "o-", color=COLORS[0])
    right.set(title="ridge, Lemma 1", xlabel="largest / smallest variance of a feature", ylabel="bias")


# ---- (d) ----------------------------------------------------------------------------------------------


def neighbors(small: bool) -> Iterator[Row]:
    """Theorem 1: the integrated squared bias of radius kNN is r^4 / (K + 2)^2 tau^2 J(p), with the Fisher
    information J(p) of the features' density p; of one total variance, the isotropic Gaussian has the least.
    Linear tasks f(z) = u . z with random unit u, so tau^2 = 1 / K; the bias with infinitely many neighbors,
    by quadrature over the disc around each query, queries drawn from p."""
    K, radius, queries = 2, 0.5, 2_000 if small else 100_000
    nodes, weights = np.polynomial.legendre.leggauss(12)
    r, angle = radius * (nodes + 1) / 2, 2 * math.pi * np.arange(24) / 24
    disc = np.stack([np.outer(r, np.cos(angle)), np.outer(r, np.sin(angle))], -1).reshape(-1, 2)
    area = np.repeat(weights * r, 24)
    for name, (draw, logarithm, fisher) in _densities().items():
        q, gap = draw(np.random.default_rng(0), queries), []
        for part in np.array_split(q, max(1, queries // 2000)):
            mass = area * np.exp(logarithm(part[:, None] + disc) - logarithm(part)[:, None])
            shift = (mass[..., None] * disc).sum(1) / mass.sum(1, keepdims=True)  # E[neighbor] - query
            gap.append((shift**2).sum(1) / K)
        bias = np.concatenate(gap)
        yield {
            "K": K, "radius": radius, "density": name, "fisher": fisher,
            "predicted": radius**4 / (K + 2) ** 2 * fisher / K, "bias": float(bias.mean()),
            "bias_error": float(bias.std() / math.sqrt(queries)), "queries": queries,
        }  # fmt: skip


Density = tuple[Callable[[np.random.Generator, int], np.ndarray], Callable[[np.ndarray], np.ndarray], float]


def _densities() -> dict[str, Density]:
    """Sampler, log density but for a constant, and Fisher information, the integral of |grad log p|^2 p, of
    densities in the plane of total variance 2."""

    def gaussian(ratio: float) -> Density:
        variance = 2 * np.array([ratio, 1]) / (ratio + 1)
        return (
            lambda random, n: random.normal(size=(n, 2)) * np.sqrt(variance),
            lambda z: -(z**2 / variance).sum(-1) / 2,
            float((1 / variance).sum()),
        )

    found = {"isotropic Gaussian": gaussian(1), "Gaussian, variances 3:1": gaussian(3)}
    found["Gaussian, 9:1"] = gaussian(9)
    scale = math.sqrt(3) / math.pi  # of the logistic density with variance 1
    found["logistic"] = (
        lambda random, n: random.logistic(scale=scale, size=(n, 2)),
        lambda z: (-z / scale - 2 * np.logaddexp(0, -z / scale)).sum(-1),
        2 / (3 * scale**2),
    )
    offset, width = 0.8, 0.6  # two clusters along the first axis, of variance 1 together

    def clusters(random: np.random.Generator, n: int) -> np.ndarray:
        z = random.normal(size=(n, 2))
        z[:, 0] = width * z[:, 0] + offset * random.choice([-1, 1], n)
        return z

    def of_clusters(z: np.ndarray) -> np.ndarray:
        first, second = (-(((z[..., 0] + side) / width) ** 2) / 2 for side in (offset, -offset))
        return np.logaddexp(first, second) - z[..., 1] ** 2 / 2

    line = np.linspace(-8, 8, 100_001)
    logs = of_clusters(np.stack([line, 0 * line], -1))
    density = np.exp(logs) / np.exp(logs).sum()
    fisher = 1 + float((density * np.gradient(logs, line) ** 2).sum())
    return {**found, "two clusters": (clusters, of_clusters, fisher)}


def neighbors_holds(rows: Sequence[Row]) -> bool:
    """The isotropic Gaussian has the least bias, and more Fisher information goes with more bias."""
    by_fisher = sorted(rows, key=lambda row: row["fisher"])
    biases = [row["bias"] for row in by_fisher]
    return by_fisher[0]["density"] == "isotropic Gaussian" and biases == sorted(biases)


def draw_neighbors(figure: Figure, rows: Sequence[Row]) -> None:
    axis = figure.subplots()
    rows = sorted(rows, key=lambda row: row["fisher"])
    fisher = [row["fisher"] for row in rows]
    axis.plot(fisher, [row["predicted"] for row in rows], color=COLORS[2], label="Theorem 1, leading term")
    for color, row in zip((*COLORS, "#c92a2a"), rows, strict=True):
        axis.errorbar(
            row["fisher"], row["bias"], 2 * row["bias_error"], fmt="o", color=color, label=row["density"]
        )
    axis.set(
        title=f"radius kNN, r = {rows[0]['radius']}", xlabel="Fisher information J(p)", ylabel="squared bias"
    )
    axis.legend(fontsize=8)


# ---- (e) ----------------------------------------------------------------------------------------------


def gradients(small: bool) -> Iterator[Row]:
    """Theorems 3 and 4: matching a few moments does not make a distribution Gaussian, and its gradients
    explode with the size of the samples; those of the Epps-Pulley statistic are bounded whatever comes.
    The figure shows the largest gradient of a sample, of N times the distance, for scaled samples. Three
    atoms with the first five moments of N(0, 1) are a distribution that four moments cannot tell from it
    and Epps-Pulley can."""
    N = 64 if small else 256
    one = torch.ones(1, 1, dtype=torch.float64)
    x0 = torch.randn(N, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moments = {4: (0.0, 1.0, 0.0, 3.0), 8: (0.0, 1.0, 0.0, 3.0, 0.0, 15.0, 0.0, 105.0)}

    def distance(x: Tensor, normal: Sequence[float]) -> Tensor:
        return torch.stack([(x**k).mean() - m for k, m in enumerate(normal, 1)]).square().sum()

    knots = standard_normal_knots(5.0, 17)
    bound = (4 * knots.weights * knots.t).sum().item()
    for scale in (1.0, 3.0, 10.0, 100.0, 1000.0):
        x = (scale * x0).requires_grad_()
        row: Row = {"scale": scale, "N": N, "bound": bound}
        for name, value in {
            "epps_pulley": statistic(x, one),
            **{f"moments_{k}": N * distance(x, normal) for k, normal in moments.items()},
        }.items():
            (grad,) = torch.autograd.grad(value, x, retain_graph=True)
            row[f"{name}_gradient"] = grad.abs().max().item()
        yield row
    atoms = (3**0.5 * torch.tensor([-1, 0, 0, 0, 0, 1], dtype=torch.float64)).repeat(100)
    x = atoms[:, None]
    seeds = (torch.Generator().manual_seed(i) for i in range(200))
    gaussian = [statistic(torch.randn(len(x), 1, generator=seed).double(), one) for seed in seeds]
    row = {"atoms": len(x), "moment_distance_of_atoms": distance(x, moments[4]).item()}
    row["epps_pulley_of_atoms"] = statistic(x, one).item()
    yield row | {"epps_pulley_99_percent_of_gaussians": torch.quantile(torch.stack(gaussian), 0.99).item()}


def gradients_holds(rows: Sequence[Row]) -> bool:
    *scaled, atoms = rows
    bounded = all(row["epps_pulley_gradient"] <= row["bound"] for row in scaled)
    explodes = scaled[-1]["moments_4_gradient"] > 1e6 * scaled[0]["moments_4_gradient"]
    told = atoms["epps_pulley_of_atoms"] > atoms["epps_pulley_99_percent_of_gaussians"]
    return bounded and explodes and told and atoms["moment_distance_of_atoms"] < 1e-12


def draw_gradients(figure: Figure, rows: Sequence[Row]) -> None:
    axis, scaled = figure.subplots(), rows[:-1]
    scales = [row["scale"] for row in scaled]
    names = {"epps_pulley": "Epps-Pulley", "moments_4": "4 moments", "moments_8": "8 moments"}
    for color, (key, label) in zip(COLORS, names.items(), strict=False):
        axis.loglog(scales, [row[f"{key}_gradient"] for row in scaled], "o-", color=color, label=label)
    axis.axhline(scaled[0]["bound"], color=COLORS[2], linestyle=":", label="bound of Epps-Pulley")
    axis.set(xlabel="std of the samples", ylabel="largest gradient of a sample")
    axis.legend(fontsize=8)


# ---- all ----------------------------------------------------------------------------------------------

EXPERIMENTS: dict[str, tuple[Callable[..., Any], Callable[..., bool], Callable[..., None]]] = {
    "dimension": (dimension, dimension_holds, draw_dimension),
    "quadrature": (quadrature, quadrature_holds, draw_quadrature),
    "linear": (linear, linear_holds, draw_linear),
    "neighbors": (neighbors, neighbors_holds, draw_neighbors),
    "gradients": (gradients, gradients_holds, draw_gradients),
}
"""By name: makes the rows, says whether they agree with its statement, draws them."""


def main(arguments: list[str] | None = None) -> int:
    parser = command_line(__doc__, rehearse="run each in small; the rows are marked")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(EXPERIMENTS)}; none: all")
    options = parser.parse_args(arguments)
    if unknown := sorted(set(options.names) - EXPERIMENTS.keys()):
        parser.error(f"names: expected {', '.join(EXPERIMENTS)}, got {unknown[0]}")
    writer = Rows(options.out / "theory.jsonl", "theory", torch.device("cpu"), rehearsal=options.rehearse)
    agree = True
    for name in options.names or EXPERIMENTS:
        measure, holds, draw = EXPERIMENTS[name]
        rows = list(measure(options.rehearse))
        said: Row = {"experiment": name, "statement": " ".join((measure.__doc__ or "").split())}
        said["holds"] = holds(rows)
        rows = writer.write(*({**said, **row} for row in rows))
        figure = Figure(figsize=(8, 3), dpi=100, layout="constrained")
        path = options.out / f"theory_{name}{'_rehearsal' * options.rehearse}.png"
        draw(figure, rows)
        figure.savefig(path)
        print(f"{name} {'holds' if said['holds'] else 'DOES NOT HOLD'}: {path}", flush=True)
        agree = agree and said["holds"]
    return int(not agree)


if __name__ == "__main__":
    raise SystemExit(main())
