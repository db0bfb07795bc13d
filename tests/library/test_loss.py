"""LeJEPALoss: the formula, its options, and every convention of other public implementations."""

import pytest
import torch
from accuracy import authors_sigreg

from lejepa_fast import LeJEPALoss, SIGReg, sample_directions, symmetric_knots


@pytest.fixture
def views():
    z = torch.randn(5, 40, 8, dtype=torch.float64) + 0.3 * torch.arange(5).view(5, 1, 1)
    return z[:2], z


def eager_sigreg(z, M, *knots):
    """At the first step."""
    return authors_sigreg(z, sample_directions(8, M, step=0, dtype=torch.float64), *knots)


# Each row of the table in docs/migration.md.
CONVENTIONS = {
    "paper": (
        lambda: LeJEPALoss(0.05, SIGReg(num_slices=256, t_max=5, n_points=9)),
        lambda g, z: 0.95 * (g.mean(0) - z).square().mean() + 0.05 * eager_sigreg(z, 256, 5.0, 9),
    ),
    "authors' minimal example, timm": (
        lambda: LeJEPALoss(0.02, SIGReg(num_slices=256, sync=False), center="all"),
        lambda g, z: 0.98 * (z.mean(0) - z).square().mean() + 0.02 * eager_sigreg(z, 256),
    ),
    "stable-pretraining": (
        lambda: LeJEPALoss(0.02, SIGReg(num_slices=1024, pool_views=True), form="additive"),
        lambda g, z: (g.mean(0) - z).square().mean() + 0.02 * eager_sigreg(z.flatten(0, 1), 1024),
    ),
    "lightly": (
        lambda: LeJEPALoss(0.05, SIGReg(num_slices=1024)),
        lambda g, z: 0.95 * (g.mean(0) - z).square().mean() + 0.05 * eager_sigreg(z, 1024),
    ),
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_conventions_of_other_implementations(views, convention):
    make, formula = CONVENTIONS[convention]
    out, expected = make()(*views), formula(*views)
    torch.testing.assert_close(out.total.double(), expected, rtol=1e-6, atol=0)


def test_eb_jepa(views):
    """mse(z1, z2) + 10 * statistic without the factor N, knots linspace(-3, 3, 10).

    Our prediction term is a quarter of the mean squared difference of two views: 4 x (lambda 2.5).
    """
    z = views[0]
    t = torch.linspace(-3, 3, 10, dtype=torch.float64)
    phi = torch.exp(-t.square() / 2)
    A = sample_directions(8, 256, step=0, dtype=torch.float64)
    ecf = torch.exp(1j * (z @ A)[..., None] * t).mean(-3)
    statistic = torch.trapezoid(phi * (ecf - phi).abs() ** 2, t, dim=-1).mean()
    expected = (z[0] - z[1]).square().mean() + 10 * statistic
    reg = SIGReg(num_slices=256, knots=symmetric_knots(3, 10), scale_by_n=False)
    loss_fn = LeJEPALoss(2.5, reg, center="all", form="additive")
    torch.testing.assert_close(4 * loss_fn(z, z).total.double(), expected, rtol=1e-6, atol=0)


def test_parts_of_the_loss(views):
    """Unweighted, and SIGReg is called as a module, so that hooks on it run."""
    loss_fn = LeJEPALoss(lambd=0.05, sigreg=SIGReg(num_slices=32))
    seen = []
    loss_fn.sigreg.register_forward_hook(lambda module, args, output: seen.append(output))
    out = loss_fn(*views)
    prediction = (views[0].mean(0) - views[1]).square().mean()
    torch.testing.assert_close(out.prediction.double(), prediction, rtol=1e-6, atol=0)
    torch.testing.assert_close(out.total, 0.95 * out.prediction + 0.05 * out.sigreg)
    assert seen == [out.sigreg]


def test_gradient_flows_through_the_center(views):
    z, exact, detached = (views[1].clone().requires_grad_() for _ in range(3))
    LeJEPALoss(lambd=0.0, sigreg=SIGReg(num_slices=4))(z[:2], z).prediction.backward()
    (exact[:2].mean(0) - exact).square().mean().backward()
    (detached[:2].mean(0).detach() - detached).square().mean().backward()
    torch.testing.assert_close(z.grad, exact.grad, rtol=1e-6, atol=1e-9)
    assert (z.grad - detached.grad).abs().max() > 1e-4


def test_half_precision_embeddings_under_autocast(views):
    global_views, z = (v.bfloat16() for v in views)
    loss_fn = LeJEPALoss(sigreg=SIGReg(num_slices=16)).eval()
    plain = loss_fn(global_views, z)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, loss_fn(global_views, z), plain))
    assert all(part.dtype == torch.float32 and part.shape == () for part in plain)


@pytest.mark.parametrize("pool_views", [False, True])
def test_compiles_to_one_graph(pool_views, views):
    """Inductor compiles the regularizer in test_sigreg_module.py."""
    global_views, z = (v.float() for v in views)
    eager, module = (LeJEPALoss(sigreg=SIGReg(num_slices=16, pool_views=pool_views)) for _ in range(2))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        for got, expected in zip(compiled(global_views, z), eager(global_views, z), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lambd": -0.1}, ValueError, "^lambd: expected"),
        ({"lambd": 1.5}, ValueError, "^lambd: .*convex"),
        ({"lambd": float("inf"), "form": "additive"}, ValueError, "^lambd: expected a number finite"),
        ({"lambd": float("nan")}, ValueError, "^lambd: expected"),
        ({"lambd": "0.1"}, TypeError, "^lambd: expected a number"),
        ({"center": "local"}, ValueError, "^center: expected .* got 'local'"),
        ({"form": "sum"}, ValueError, "^form: expected .* got 'sum'"),
        ({"sigreg": SIGReg(reduction=None)}, ValueError, "^sigreg: expected"),
        ({"sigreg": 1024}, TypeError, "^sigreg: expected a SIGReg module"),
    ],
)
def test_bad_options_are_named(arguments, error, message):
    """At construction, and when an attribute is changed later."""
    with pytest.raises(error, match=message):
        LeJEPALoss(**arguments)
    name, value = next(iter(arguments.items()))
    loss_fn = LeJEPALoss(form="additive" if len(arguments) > 1 else "convex")
    with pytest.raises(error, match=message):
        setattr(loss_fn, name, value)


def test_attributes_that_do_not_fit_each_other_are_named(views):
    loss_fn = LeJEPALoss(lambd=10.0, sigreg=SIGReg(num_slices=4), form="additive")
    with pytest.raises(ValueError, match=r"^lambd: .*convex"):
        loss_fn.form = "convex"
    loss_fn.lambd = 0.5
    loss_fn.form = "convex"
    loss_fn.sigreg.reduction = None
    with pytest.raises(ValueError, match=r"^sigreg: expected reduction='mean' or 'sum', got None"):
        loss_fn(*views)


Z = torch.zeros(3, 10, 4)


@pytest.mark.parametrize(
    ("global_views", "all_views", "error", "message"),
    [
        ([Z[0]], Z, TypeError, "^global_views: expected a tensor, got list"),
        (Z, Z.long(), TypeError, "^all_views: expected a floating dtype"),
        (Z[0], Z, ValueError, r"^global_views: expected shape \(views, N, K\)"),
        (Z, Z[:2], ValueError, "^global_views: expected at most the 2 of all_views, got 3"),
        (Z, Z[:0], ValueError, "^all_views: expected non-empty view"),
        (Z[:, :9], Z, ValueError, r"^global_views: expected .*\(10, 4\).*got \(9, 4\)"),
        (Z[:, :0], Z[:, :0], ValueError, "^all_views: expected at least 1 sample, got N = 0"),
    ],
)
def test_bad_embeddings_are_named(global_views, all_views, error, message):
    with pytest.raises(error, match=message):
        LeJEPALoss(sigreg=SIGReg(num_slices=4))(global_views, all_views)
