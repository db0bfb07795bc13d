"""The center of the views from averaged weights: `--loss.center-from average` (LeJEPA, arXiv 2511.08544).

The paper's variant for vision transformers. The views go through a second model, whose weights are the
average of the trained model's (`average.py`), and the center is the mean of its embeddings, without a
gradient. The trained model's embeddings are drawn to it, and SIGReg is taken of them, as ever.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lejepa_fast.train.model.average import WeightAverage
from lejepa_fast.train.model.model import LeJEPAModel


def without_noise(model: LeJEPAModel) -> LeJEPAModel:
    """Make a model that is not trained give embeddings like those of the trained one, in place.

    Stochastic depth and dropout are off. BatchNorm normalizes by the batch, as averages of running statistics
    lag behind the weights; its running statistics stay as they are.
    """
    model.requires_grad_(False).eval()
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            norm.train()
            norm.track_running_stats = False
    return model


class CenterFromAverage(nn.Module):
    """The trained model and, for the center, the averaged one, under one forward.

    Args:
        model: the model to train, or its DDP wrapper.
        averaged: a model whose tensors are those of `average`.
        average: before its first step the center is that of the trained model's own embeddings, with a
            gradient.
        views: the center is the mean of the first so many views.
    """

    def __init__(self, model: nn.Module, averaged: LeJEPAModel, average: WeightAverage, views: int):
        super().__init__()
        self.model = model
        self.averaged = averaged
        self.average = average
        self.views = views

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """V views (N, C, S, S) -> embeddings whose mean is the center (M, N, K), and of all (V, N, K)."""
        center = None
        if self.average.count:  # first: the other forward pass keeps its activations
            with torch.no_grad():
                center = self.averaged(views[: self.views])[1]
        _, all_z = self.model(views)
        return (all_z[: self.views] if center is None else center), all_z
