"""Stochastic depth whose rate is a tensor, so that compiled blocks of different rates share one graph.

timm's `DropPath` keeps its rate as a number, which becomes a constant of a compiled graph. As the rate rises
from block to block, a transformer of 40 blocks would compile 80 graphs for its two sizes of crops, not 4.
"""

import torch
from timm.layers import DropPath
from torch import Tensor, nn


class TensorDropPath(nn.Module):
    """Drops the branch of a sample with probability `rate` in training, and rescales the others."""

    def __init__(self, rate: float, device: torch.device):
        super().__init__()
        # In a tuple, so that it is no part of sharding, initialization and state dict.
        self._keep = (torch.tensor(1 - rate, device=device),)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if not self.training:
            return x
        (keep,) = self._keep
        kept = torch.rand((x.shape[0],) + (1,) * (x.ndim - 1), device=x.device) < keep
        return x * (kept / keep).to(x.dtype)


def share_drop_path(block: nn.Module, device: torch.device) -> None:
    """Replace timm's `DropPath` in `block`; identities (rate 0) stay."""
    for parent in list(block.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is DropPath and child.scale_by_keep:
                setattr(parent, name, TensorDropPath(child.drop_prob, device))
