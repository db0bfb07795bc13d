"""`torch.func` and forward-mode differentiation: the reference supports them, operators refuse."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, hessian, jvp, vjp, vmap

from lejepa_fast import SIGReg, sample_directions, sigreg, standard_normal_knots

KNOTS = standard_normal_knots(3.0, 5)


def loss(impl):
    A = sample_directions(3, 4, step=0, dtype=torch.float64)
    return lambda x: sigreg(x, A, *KNOTS[:3], spacing=KNOTS.spacing, impl=impl)


def views():
    return torch.randn(2, 5, 3, dtype=torch.float64)


def plain_gradient(x):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(loss("reference")(x), x)[0]


def dual_tangent(f, x, direction):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction))).tangent


TRANSFORMS = {
    "grad": lambda f: grad(f)(views()[0]),
    "vjp": lambda f: vjp(f, views()[0])[1](torch.ones((), dtype=torch.float64)),
    "jvp": lambda f: jvp(f, (views()[0],), (views()[1],)),
    "vmap of grad": lambda f: vmap(grad(f))(views()),
    "dual numbers": lambda f: dual_tangent(f, *views()),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_streaming_refuses(transform):
    for function in (loss("torch"), SIGReg(num_slices=4).eval()):
        with pytest.raises(RuntimeError, match=r"^sigreg: .* impl='reference' only, got impl='torch'"):
            transform(function)


def test_reference_under_reverse_mode_and_vmap():
    f, x = loss("reference"), views()
    expected = torch.stack([plain_gradient(v) for v in x])
    torch.testing.assert_close(grad(f)(x[0]), expected[0])
    torch.testing.assert_close(vmap(f)(x), torch.stack([f(v) for v in x]))
    torch.testing.assert_close(vmap(grad(f))(x), expected)
    compiled = torch.compile(lambda x: grad(f)(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x[0]), expected[0])


def test_reference_under_forward_mode():
    f, (x, direction) = loss("reference"), views()
    expected = (plain_gradient(x) * direction).sum()
    torch.testing.assert_close(jvp(f, (x,), (direction,))[1], expected)
    torch.testing.assert_close(dual_tangent(f, x, direction), expected)
    torch.testing.assert_close(hessian(f)(x), torch.autograd.functional.hessian(f, x))


def test_module_under_transforms_needs_its_step():
    reg, x = SIGReg(num_slices=4, impl="reference"), views().float()
    with pytest.raises(RuntimeError, match=r"^step: expected an explicit step in training mode"):
        grad(reg)(x)
    z = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(reg(z, step=3), z)
    torch.testing.assert_close(grad(lambda x: reg(x, step=3))(x), expected)
    assert reg.step.item() == 0
    reg.eval()
    torch.testing.assert_close(vmap(reg)(x), torch.stack([reg(view) for view in x]))
