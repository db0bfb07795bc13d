"""A way around a fault of oneDNN in the gradient of strided 1 x 1 convolutions.

For channels-last images of fewer channels than a vector register holds, such as the RGB input of RepVGG and
MobileOne, oneDNN 3.12 (PyTorch 2.14) writes past a buffer on a CPU: the process crashes, or the gradient is
wrong (https://github.com/uxlfoundation/oneDNN/issues/6035).
"""

import torch.nn.functional as F
from torch import Tensor, nn

_VECTOR = 16  # float32 numbers in a register of AVX-512


class StridedPointwise(nn.Conv2d):
    """A strided 1 x 1 convolution that leaves out the skipped pixels first; the result is the same."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C', ceil(H / stride), ceil(W / stride))."""
        rows, columns = self.stride
        return F.conv2d(x[..., ::rows, ::columns], self.weight, self.bias, groups=self.groups)


def avoid_strided_pointwise(model: nn.Module) -> None:
    """Let the convolutions of `model` that oneDNN gets wrong compute as `StridedPointwise`, in place."""
    for module in model.modules():
        if type(module) is not nn.Conv2d or module.kernel_size != (1, 1) or module.padding != (0, 0):
            continue
        if module.in_channels < _VECTOR and max(module.stride) > 1:
            module.__class__ = StridedPointwise
