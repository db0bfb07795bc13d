"""LeJEPALoss: the formula, its options, and every convention of other public implementations."""

from __future__ import annotations

import pytest
import torch
from accuracy import COMPILE_BACKEND

from lejepa_fast import LeJEPALoss, SIGReg, sample_directions, symmetric_knots


@pytest.fixture
def views():
    torch.manual_seed(0)
    z = torch.randn(5, 40, 8, dtype=torch.float64) + 0.3 * torch.arange(5).view(5, 1, 1)
    return z[:2], z


def eager_sigreg(z, A, t_max=3.0, J=17):
    """The authors' formulation, (..., N, K) -> (..., M), written from its formula."""
    t = torch.linspace(0, t_max, J, dtype=z.dtype)
    dt = t_max / (J - 1)
    weights = torch.full((J,), 2 * dt, dtype=z.dtype)
    weights[[0, -1]] = dt
    phi = torch.exp(-t.square() / 2)
    phase = (z @ A).unsqueeze(-1) * t
    error = (phase.cos().mean(-3) - phi).square() + phase.sin().mean(-3).square()
    return z.shape[-2] * (error @ (weights * phi))


def directions(M, step=0):
    return sample_directions(8, M, step=step, dtype=torch.float64)


def check(loss_fn, global_views, all_views, expected):
    got = loss_fn(global_views, all_views).total
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)


def test_formula(views):
    global_views, z = views
    out = LeJEPALoss(lambd=0.05, sigreg=SIGReg(num_slices=32))(global_views, z)
    mu = global_views.mean(0)
    torch.testing.assert_close(out.prediction.double(), (mu - z).square().mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.sigreg.double(), eager_sigreg(z, directions(32)).mean(), rtol=1e-6, atol=0)
    torch.testing.assert_close(out.total, 0.95 * out.prediction + 0.05 * out.sigreg)


def test_gradient_flows_through_the_centre(views):
    z = views[1].clone().requires_grad_()
    LeJEPALoss(lambd=0.0, sigreg=SIGReg(num_slices=4))(z[:2], z).prediction.backward()
    exact = views[1].clone().requires_grad_()
    (exact[:2].mean(0) - exact).square().mean().backward()
    torch.testing.assert_close(z.grad, exact.grad, rtol=1e-6, atol=1e-9)
    detached = views[1].clone().requires_grad_()
    (detached[:2].mean(0).detach() - detached).square().mean().backward()
    assert (z.grad - detached.grad).abs().max() > 1e-4


# Each row of the table in docs/migration.md.


def test_paper(views):
    """Algorithms 1 and 2: [-5, 5] x 17, 256 slices, centre of the global views, convex, lambda 0.05."""
    global_views, z = views
    loss_fn = LeJEPALoss(0.05, SIGReg(num_slices=256, t_max=5, n_points=9))
    expected = 0.95 * (global_views.mean(0) - z).square().mean()
    expected += 0.05 * eager_sigreg(z, directions(256), 5.0, 9).mean()
    check(loss_fn, global_views, z, expected)


def test_authors_minimal_example_and_timm(views):
    """Centre of all views, convex, lambda 0.02, statistic of the local batch."""
    global_views, z = views
    loss_fn = LeJEPALoss(0.02, SIGReg(num_slices=256, sync=False), center="all")
    expected = 0.98 * (z.mean(0) - z).square().mean() + 0.02 * eager_sigreg(z, directions(256)).mean()
    check(loss_fn, global_views, z, expected)


def test_stable_pretraining(views):
    """Additive, lambda 0.02, SIGReg of the views pooled into one sample of V * N."""
    global_views, z = views
    reg = SIGReg(num_slices=1024)
    prediction = LeJEPALoss(0.0, SIGReg(num_slices=1))(global_views, z).prediction
    got = prediction + 0.02 * reg(z.flatten(0, -2))
    expected = (global_views.mean(0) - z).square().mean()
    expected += 0.02 * eager_sigreg(z.flatten(0, 1), directions(1024)).mean()
    torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=0)
    pooled = LeJEPALoss(0.02, SIGReg(num_slices=1024, pool_views=True), form="additive")
    check(pooled, global_views, z, expected)


def test_lightly(views):
    """Convex, lambda 0.05, 1024 slices, centre of the global views."""
    global_views, z = views
    expected = 0.95 * (global_views.mean(0) - z).square().mean()
    expected += 0.05 * eager_sigreg(z, directions(1024)).mean()
    check(LeJEPALoss(0.05, SIGReg(num_slices=1024)), global_views, z, expected)


def test_eb_jepa(views):
    """mse(z1, z2) + 10 * statistic without the factor N, knots linspace(-3, 3, 10).

    Our prediction term is a quarter of the mean squared difference of two views: 4 x (lambda 2.5).
    """
    z = views[1][:2]
    t = torch.linspace(-3, 3, 10, dtype=torch.float64)
    phi = torch.exp(-t.square() / 2)
    ecf = torch.exp(1j * (z @ directions(256))[..., None] * t).mean(-3)
    statistic = torch.trapezoid(phi * (ecf - phi).abs() ** 2, t, dim=-1).mean()
    expected = (z[0] - z[1]).square().mean() + 10 * statistic
    reg = SIGReg(num_slices=256, knots=symmetric_knots(3, 10), scale_by_n=False)
    loss_fn = LeJEPALoss(2.5, reg, center="all", form="additive")
    torch.testing.assert_close(4 * loss_fn(z, z).total.double(), expected, rtol=1e-6, atol=0)


def test_half_precision_embeddings_under_autocast(views):
    global_views, z = (v.bfloat16() for v in views)
    loss_fn = LeJEPALoss(sigreg=SIGReg(num_slices=16)).eval()
    plain = loss_fn(global_views, z)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, loss_fn(global_views, z), plain))
    assert all(part.dtype == torch.float32 and part.shape == () for part in plain)


def test_compiles_to_one_graph(views):
    global_views, z = (v.float() for v in views)
    eager, module = (LeJEPALoss(sigreg=SIGReg(num_slices=16)) for _ in range(2))
    compiled = torch.compile(module, fullgraph=True, backend=COMPILE_BACKEND)
    for _ in range(2):
        for got, expected in zip(compiled(global_views, z), eager(global_views, z), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lambd": -0.1}, "^lambd: expected"),
        ({"lambd": 1.5}, "^lambd: .*convex"),
        ({"lambd": float("nan")}, "^lambd: expected"),
        ({"center": "local"}, "^center: expected .* got 'local'"),
        ({"form": "sum"}, "^form: expected .* got 'sum'"),
        ({"sigreg": SIGReg(reduction=None)}, "^sigreg: expected"),
    ],
)
def test_bad_options_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        LeJEPALoss(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lambd": "0.1"}, "^lambd: expected a number"),
        ({"sigreg": 1024}, "^sigreg: expected a SIGReg module"),
    ],
)
def test_options_of_wrong_types_are_named(arguments, message):
    with pytest.raises(TypeError, match=message):
        LeJEPALoss(**arguments)


def test_bad_embeddings_are_named():
    loss_fn, z = LeJEPALoss(sigreg=SIGReg(num_slices=4)), torch.randn(3, 10, 4)
    with pytest.raises(TypeError, match=r"^global_views: expected a tensor, got list"):
        loss_fn([z[0]], z)
    with pytest.raises(TypeError, match=r"^all_views: expected a floating dtype"):
        loss_fn(z, z.long())
    with pytest.raises(ValueError, match=r"^all_views: expected at least 1 sample, got N = 0"):
        loss_fn(z[:, :0], z[:, :0])


def test_bad_shapes_are_named():
    loss_fn = LeJEPALoss(sigreg=SIGReg(num_slices=4))
    z = torch.randn(3, 10, 4)
    with pytest.raises(ValueError, match=r"^global_views: expected shape \(views, N, K\)"):
        loss_fn(z[0], z)
    with pytest.raises(ValueError, match=r"^all_views: expected non-empty view"):
        loss_fn(z, z[:0])
    with pytest.raises(ValueError, match=r"^global_views: expected .*\(10, 4\).*got \(9, 4\)"):
        loss_fn(z[:, :9], z)
