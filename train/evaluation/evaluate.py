"""Evaluate a model on a data set: kNN, linear probe and collapse statistics of the frozen encoder.

The trainer calls `evaluate_model` every few epochs. `train/pretrain.py` and `train/evaluate.py` call it for
the trained encoder, and `evaluate_untrained` for the baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lejepa_fast.data import ImageSource, MultiCropRecipe, eval_loader, open_source
from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import Config, DataConfig, EvalConfig
from lejepa_fast.train.evaluation.collapse import (
    Verdict,
    effective_rank,
    embedding_std,
    sigreg_statistic,
    verdict,
)
from lejepa_fast.train.evaluation.embeddings import Embeddings, calibrate_batchnorm, embed_source
from lejepa_fast.train.evaluation.probes import MAX_STEPS, knn_accuracy, linear_probe
from lejepa_fast.train.model.initialize import memory_format
from lejepa_fast.train.model.model import build_model

CALIBRATION_IMAGES = 4096


@dataclass(frozen=True)
class EvalResult:
    """Result of `evaluate_model`. Figures that need labels are None without them."""

    knn: float | None
    """Top-1 accuracy of kNN on the validation images, in percent."""
    linear: float | None
    """Top-1 accuracy of the linear probe in percent; None also if it was not asked for."""
    linear_rate: float | None
    """Learning rate that the linear probe chose."""
    embedding_std: float
    effective_rank: float
    sigreg: float
    """Statistics of `z_val`; see `collapse.py`."""
    z_val: Tensor
    """Embeddings of the validation images, (n, K) float32 on the CPU."""
    features_val: Tensor
    """Pooled encoder features of the validation images, (n, D) float32 on the CPU."""
    n_train: int
    n_val: int
    num_classes: int | None
    """Classes of the training source."""
    majority: float | None
    """Share of the largest class among the validation images, in percent."""
    no_labels_because: str | None
    """Why there is no kNN and no linear probe; None with labels."""
    image_size: int
    """Side of the evaluated images, in pixels."""
    k: int
    """Neighbours of kNN."""

    @property
    def verdict(self) -> Verdict:
        """Collapsed or healthy, by the rule of `collapse.verdict`."""
        return verdict(self.embedding_std, self.effective_rank, self.n_val, self.z_val.shape[1])

    @property
    def rank_limit(self) -> int:
        """The largest effective rank that n validation images can have in K dimensions."""
        return max(1, min(self.z_val.shape[1], self.n_val - 1))

    @property
    def chance(self) -> float | None:
        """Accuracy of guessing, in percent."""
        return None if self.num_classes is None else 100 / self.num_classes


def evaluate_model(
    model: nn.Module,
    train_source: ImageSource,
    val_source: ImageSource,
    cfg: EvalConfig,
    *,
    recipe: MultiCropRecipe,
    device: torch.device | str,
    linear: bool = True,
    linear_steps: int | None = None,
    train_images: int = 0,
    seed: int = 0,
    num_workers: int = 0,
    amp_dtype: torch.dtype | None = None,
    data: DataConfig | None = None,
    bad_images: Path | None = None,
    calibrate: bool = False,
) -> EvalResult:
    """Evaluate the frozen model: fit the probes on the training images, score them on the validation images.

    It can run in the middle of a training: afterwards modes, gradients, buffers and random states are as
    before. Ranks are not synchronised, so a single rank can call it.

    Args:
        model: a `LeJEPAModel` on `device`; `embed_source` says what else works.
        train_source, val_source: images with classes. With an unknown class, `knn` and `linear` are None.
        cfg: its `image_size` (None: that of the global crops), `batch_size`, `k` and `temperature` are used.
        recipe: its `mean`, `std` and `global_size` are used.
        device: of the model; the probes run there, too.
        linear: fit the linear probe as well.
        linear_steps: upper limit of its steps; None: `probes.MAX_STEPS`.
        train_images: use a random subset of so many training images if there are more; 0: use all.
        seed: of the linear probe.
        num_workers: loader processes or threads.
        amp_dtype: autocast dtype of the forward pass; None: the dtype of the weights.
        data: how images are loaded, and how many may be bad; None: the defaults.
        bad_images: file that lists unreadable images, which are skipped.
        calibrate: for an untrained model: first set the running statistics of its BatchNorm layers from up to
            4,096 random training images (`calibrate_batchnorm`).

    Raises:
        UsageError: a source is empty, or has fewer than 2 validation images.
        RunError: the model gives NaN or infinite embeddings.
    """
    check_validation_images(val_source)
    device = torch.device(device)
    options = {
        "image_size": cfg.image_size or recipe.global_size,
        "batch_size": cfg.batch_size,
        "num_workers": num_workers,
        "mean": recipe.mean,
        "std": recipe.std,
        **loading_options(data, device, bad_images),
    }
    # The list of bad images has the numbers of the whole source, so it does not apply to a subset of it.
    subset_options = {**options, "bad_images": None, "max_bad_fraction": 1.0}

    def embedded(source: ImageSource, options: dict[str, Any]) -> Embeddings:
        return embed_source(model, eval_loader(source, **options), device, amp_dtype=amp_dtype)

    if calibrate:
        images = _subset(train_source, CALIBRATION_IMAGES)
        batch_size = min(max(cfg.batch_size, 2), len(images))  # one image has no variance
        loader = eval_loader(images, **{**subset_options, "batch_size": batch_size})
        calibrate_batchnorm(model, loader, device)
    val = embedded(val_source, options)
    n_train = len(train_source)
    knn = linear_accuracy = linear_rate = num_classes = majority = None
    no_labels_because = _no_labels(train_source, val_source)
    if no_labels_because is None:
        if 0 < train_images < n_train:
            train = embedded(_subset(train_source, train_images), subset_options)
        else:
            train = embedded(train_source, options)
        n_train = len(train.targets)
        num_classes = len(train_source.classes or ()) or int(max(train.targets.max(), val.targets.max())) + 1
        majority = 100.0 * val.targets.bincount().max().item() / len(val.targets)
        shared: dict[str, Any] = {"num_classes": num_classes, "device": device}
        samples = train.features, train.targets, val.features, val.targets
        knn = knn_accuracy(*samples, k=cfg.k, temperature=cfg.temperature, **shared)
        if linear:
            samples = train.probe, train.targets, val.probe, val.targets
            max_steps = MAX_STEPS if linear_steps is None else linear_steps
            linear_accuracy, linear_rate = linear_probe(*samples, seed=seed, max_steps=max_steps, **shared)
    return EvalResult(
        knn=knn,
        linear=linear_accuracy,
        linear_rate=linear_rate,
        embedding_std=embedding_std(val.z),
        effective_rank=effective_rank(val.z),
        sigreg=sigreg_statistic(val.z),
        z_val=val.z,
        features_val=val.features,
        n_train=n_train,
        n_val=len(val.targets),
        num_classes=num_classes,
        majority=majority,
        no_labels_because=no_labels_because,
        image_size=cfg.image_size or recipe.global_size,
        k=cfg.k,
    )


def evaluate_untrained(
    cfg: Config,
    train_source: ImageSource,
    val_source: ImageSource,
    *,
    device: torch.device | str,
    **options: Any,
) -> EvalResult:
    """Evaluate the baseline of a run: its encoder at the starting weights, with calibrated BatchNorm.

    Further `options` are those of `evaluate_model`.
    """
    model = build_model(cfg).to(device).to(memory_format=memory_format(cfg))
    options |= {"recipe": cfg.crops, "seed": cfg.seed, "data": cfg.data, "calibrate": True}
    return evaluate_model(model, train_source, val_source, cfg.eval, device=device, **options)


def check_validation_images(source: ImageSource) -> None:
    """Raise UsageError if there are fewer than 2 validation images, too few for statistics."""
    if len(source) < 2:
        raise UsageError(
            f"evaluation needs at least 2 validation images, and {source.name} has {len(source)}; "
            "raise --data.val-fraction or give more images"
        )


def loading_options(data: DataConfig | None, device: torch.device, bad_images: Path | None) -> dict[str, Any]:
    """Arguments that a run passes to both of its loaders, `multicrop_loader` and `eval_loader`."""
    data = data or DataConfig()
    return {
        "backend": data.backend,
        "device": device,
        "prefetch": data.prefetch,
        "hw_decoder_load": data.hw_decoder_load,
        "bad_images": bad_images,
        "max_bad_fraction": data.max_bad_fraction,
    }


def open_splits(data: DataConfig) -> tuple[ImageSource, ImageSource]:
    """Training and validation images of a run.

    If the data has no val split, the held-out images do not depend on the run's seed: runs with different
    seeds are compared on the same images, and no run is evaluated on images that it was trained on.
    """
    train, val = (open_source(data.path, split, val_fraction=data.val_fraction) for split in ("train", "val"))
    return train, val


def _subset(source: ImageSource, count: int) -> ImageSource:
    """At most `count` images of the source, in random order from a fixed seed."""
    order = torch.randperm(len(source), generator=torch.Generator().manual_seed(0))
    return source.subset(order[:count].numpy())


def _no_labels(train_source: ImageSource, val_source: ImageSource) -> str | None:
    """Why there is no kNN and no linear probe, for the report; None if every image has a class."""
    for role, source in (("training", train_source), ("validation", val_source)):
        targets = source.targets
        unlabelled = len(source) if targets is None else sum(target < 0 for target in targets)
        if unlabelled:
            return (
                f"{unlabelled} of the {len(source)} {role} images in {source.name} have no class: kNN and "
                "linear probe need one for every image. Give labelled images (a folder of class folders)."
            )
    return None
