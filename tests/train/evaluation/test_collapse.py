"""Statistics of embeddings and the verdict: on planted embeddings, against numpy and the closed forms."""

import numpy as np
import pytest
import torch
from training import randn

from lejepa_fast.train.evaluation import collapse


@pytest.mark.parametrize(
    ("name", "z", "state"),
    [
        ("gaussian", randn(500, 64), "healthy"),
        ("half the target's spread", 0.5 * randn(500, 64), "healthy"),
        ("fewer samples than dimensions", randn(40, 256), "healthy"),
        ("as many samples as dimensions, the lowest share of all", randn(65, 64), "healthy"),
        ("one dimension", randn(100, 1), "healthy"),
        ("a cliff after 16 of 64 directions", randn(505, 64) * (torch.arange(64) < 16), "low rank"),
        ("three directions of 64", randn(505, 3) @ randn(3, 64, seed=1), "low rank"),
        ("a steady fall", randn(500, 64) * torch.logspace(0, -2, 64), "low rank"),
        ("constant", torch.full((100, 64), 0.7), "collapsed"),
        ("zero", torch.zeros(100, 64), "collapsed"),
        ("constant but for noise", 3.0 + 1e-3 * randn(100, 64), "collapsed"),
        ("one direction, large spread", 10 * randn(100, 1) * randn(1, 64, seed=1), "collapsed"),
        ("five directions of 512", randn(600, 5) @ randn(5, 512, seed=1), "collapsed"),
    ],
)
def test_verdict_on_planted_embeddings(name, z, state):
    verdict = collapse.verdict(collapse.embedding_std(z), collapse.effective_rank(z), *z.shape)
    assert verdict.state == state, f"{name}: {verdict.sentence}"
    assert verdict.sentence.startswith(f"{state.capitalize()}: ")
    collapsed, low = collapse.rank_floors(*z.shape)
    assert (
        f"rule: collapsed below std 0.1 or rank {collapsed:.3g}, low rank below {low:.3g})"
        in verdict.sentence
    )
    assert collapse.verdict(1.0, 2.3, 500, 128).state == "collapsed"  # below 2 % of 128
    assert collapse.verdict(1.0, 2.3, 500, 128, gaussian=False).state == "low rank"  # I-JEPA
    assert collapse.verdict(1.0, 1.1, 500, 128, gaussian=False).state == "collapsed"
    assert collapse.verdict(0.05, 100.0, 500, 128).state == "collapsed"
    assert collapse.verdict(0.05, 100.0, 500, 128, gaussian=False).state == "healthy"  # their scale is free
    assert collapse.verdict(0.005, 100.0, 500, 128, gaussian=False).state == "collapsed"
    assert collapse.verdict(float("nan"), 50.0, 100, 64).state == "collapsed"
    assert collapse.verdict(1.0, float("nan"), 100, 64).state == "collapsed"


def test_effective_rank_counts_equal_directions():
    basis = torch.linalg.qr(randn(200, 5, dtype=torch.float64))[0]
    basis = torch.linalg.qr(torch.cat([torch.ones(200, 1).double(), basis], dim=1))[0][:, 1:]  # centered
    z = basis @ torch.linalg.qr(randn(32, 5, seed=1, dtype=torch.float64))[0].T
    assert collapse.effective_rank(z) == pytest.approx(5.0, rel=1e-9)
    assert collapse.effective_rank(torch.full((50, 8), 0.1)) == 0.0


@pytest.mark.parametrize("n", [6, 50, 1000])  # below K, by singular values, by the covariance
def test_spectra_equal_numpys_and_rankme_is_not_centered(n):
    z = randn(n, 10) * torch.linspace(0.1, 2, 10) + 5
    expected = np.linalg.eigvalsh(np.cov(z.double().numpy(), rowvar=False, bias=True))[::-1]
    np.testing.assert_allclose(collapse.covariance_eigenvalues(z).numpy(), expected, rtol=1e-8, atol=1e-12)
    assert collapse.embedding_std(z) == pytest.approx(z.double().numpy().std(axis=0).mean(), rel=1e-12)
    values = np.linalg.svd(z.double().numpy(), compute_uv=False)
    p = values / values.sum()
    assert collapse.rankme(z) == pytest.approx(np.exp(-(p * np.log(p)).sum()), rel=1e-6)
    assert collapse.rankme(torch.full((n, 10), 0.1)) == pytest.approx(1.0, abs=1e-4)
    assert collapse.rankme(torch.zeros(n, 10)) == 0.0


def test_sigreg_statistic_between_its_levels():
    levels = collapse.sigreg_levels(300)
    assert levels.gaussian == pytest.approx(1.0524641548, abs=1e-9)
    assert levels.collapsed == pytest.approx(0.4020475797 * 300, abs=1e-7)
    assert collapse.sigreg_statistic(torch.zeros(300, 16)) == pytest.approx(levels.collapsed, rel=1e-5)
    assert collapse.sigreg_statistic(randn(300, 16)) == pytest.approx(levels.gaussian, rel=0.35)
    paper = collapse.sigreg_levels(1, t_max=5, n_points=9)
    assert paper == pytest.approx((1.0594231238, 0.4089207202), abs=1e-9)
