"""Evaluate a model on a data set: kNN, linear probe and collapse statistics of the frozen encoder.

The trainer calls `evaluate_model` every few epochs. `train/pretrain.py` and `train/evaluate.py` call it for
the trained encoder, and `evaluate_untrained` for the baseline.
"""

import functools
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lejepa_fast.data import ImageSource, eval_loader, open_source
from lejepa_fast.data.sources.scientific import as_trained, choose_value_range
from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import Config, DataConfig
from lejepa_fast.train.evaluation import collapse
from lejepa_fast.train.evaluation.embeddings import calibrate_batchnorm, embed_source
from lejepa_fast.train.evaluation.probes import MAX_STEPS, knn_accuracy, linear_probe
from lejepa_fast.train.model.initialize import memory_format
from lejepa_fast.train.model.model import build_model

log = logging.getLogger("lejepa_fast.train")

CALIBRATION_IMAGES = 4096


@dataclass(frozen=True)
class EvalResult:
    """Result of `evaluate_model`. Figures that need labels are None without them."""

    embedding_std: float
    effective_rank: float
    sigreg: float
    """Statistics of `z_val`; see `collapse.py`."""
    z_val: Tensor
    """Embeddings of the validation images, (n, K) float32 on the CPU."""
    features_val: Tensor
    """Pooled encoder features of the validation images, (n, D) float32 on the CPU."""
    n_train: int
    """Images that kNN and linear probe are fitted on; without labels those that they could be."""
    n_val: int
    image_size: int
    """Side of the evaluated images, in pixels."""
    k: int
    """Neighbors of kNN."""
    no_labels_because: str | None = None
    """Why there is no kNN and no linear probe; None with labels."""
    knn: float | None = None
    """Top-1 accuracy of kNN on the validation images, in percent."""
    linear: float | None = None
    """Top-1 accuracy of the linear probe in percent; None also if it was not asked for."""
    linear_rate: float | None = None
    """Learning rate that the linear probe chose."""
    num_classes: int | None = None
    """Classes of the training source."""
    majority: float | None = None
    """Share of the largest class among the validation images, in percent."""

    @property
    def verdict(self) -> collapse.Verdict:
        """Healthy, low rank or collapsed, by the rule of `collapse.verdict`."""
        return collapse.verdict(self.embedding_std, self.effective_rank, self.n_val, self.z_val.shape[1])

    @property
    def rankme(self) -> float:
        """RankMe of `z_val`; see `collapse.py`."""
        return collapse.rankme(self.z_val)

    @property
    def rank_limit(self) -> int:
        """The largest effective rank that n validation images can have in K dimensions."""
        return collapse.rank_limit(self.n_val, self.z_val.shape[1])

    @property
    def chance(self) -> float | None:
        """Accuracy of guessing, in percent."""
        return None if self.num_classes is None else 100 / self.num_classes


def evaluate_model(
    model: nn.Module,
    train_source: ImageSource,
    val_source: ImageSource,
    cfg: Config,
    *,
    device: torch.device | str,
    linear_steps: int = MAX_STEPS,
    train_images: int = 0,
    num_workers: int = 0,
    amp_dtype: torch.dtype | None = None,
    bad_images: Path | None = None,
    calibrate: bool = False,
) -> EvalResult:
    """Evaluate the frozen model: fit the probes on the training images, score them on the validation images.

    It can run in the middle of a training: afterwards modes, gradients, buffers and random states are as
    before. Ranks are not synchronized, so a single rank can call it.

    Args:
        model: a `LeJEPAModel` on `device`; `embed_source` says what else works.
        train_source, val_source: images with classes. With an unknown class, `knn` and `linear` are None.
        cfg: its sections `eval` and `data`, `seed`, and `mean`, `std` and `global_size` of `crops` are used.
        device: of the model; the probes run there, too.
        linear_steps: upper limit of the linear probe's steps; 0: no linear probe.
        train_images: use a random subset of so many training images if there are more; 0: use all.
        num_workers: loader processes or threads.
        amp_dtype: autocast dtype of the forward pass; None: the dtype of the weights.
        bad_images: file that lists unreadable images, which are skipped.
        calibrate: for an untrained model: first set the running statistics of its BatchNorm layers from up to
            4,096 random training images (`calibrate_batchnorm`).

    Raises:
        UsageError: a source is empty, or has fewer than 2 validation images.
        RunError: the model gives NaN or infinite embeddings.
    """
    check_validation_images(val_source)
    device = torch.device(device)
    settings = cfg.eval
    image_size = settings.image_size or cfg.crops.global_size
    options = {
        "image_size": image_size,
        "batch_size": settings.batch_size,
        "num_workers": num_workers,
        "mean": cfg.crops.mean,
        "std": cfg.crops.std,
        **loading_options(cfg.data, device, bad_images),
    }

    def loader(source: ImageSource, **changes: Any) -> Iterable[tuple[Tensor, Tensor]]:
        return eval_loader(source, **{**options, **changes})

    def part(count: int, **changes: Any) -> Iterable[tuple[Tensor, Tensor]]:
        """At most `count` training images, in random order from a fixed seed."""
        order = torch.randperm(len(train_source), generator=torch.Generator().manual_seed(0))[:count]
        # The list of bad images has the numbers of the whole source, so it does not apply here.
        return loader(train_source.subset(order.numpy()), bad_images=None, max_bad_fraction=1.0, **changes)

    if calibrate:
        # One image has no variance.
        batch_size = min(max(settings.batch_size, 2), CALIBRATION_IMAGES, len(train_source))
        calibrate_batchnorm(model, part(CALIBRATION_IMAGES, batch_size=batch_size), device)
    embed = functools.partial(embed_source, model, device=device, amp_dtype=amp_dtype)
    val, n_train = embed(loader(val_source)), len(train_source)
    labeled: dict[str, Any] = {}
    no_labels_because = _no_labels(train_source, val_source)
    if no_labels_because is None:
        train = embed(part(train_images) if 0 < train_images < n_train else loader(train_source))
        n_train = len(train.targets)
        num_classes = len(train_source.classes or ()) or int(max(train.targets.max(), val.targets.max())) + 1
        shared: dict[str, Any] = {"num_classes": num_classes, "device": device}
        samples = train.features, train.targets, val.features, val.targets
        labeled = {
            "num_classes": num_classes,
            "majority": 100.0 * val.targets.bincount().max().item() / len(val.targets),
            "knn": knn_accuracy(*samples, k=settings.k, temperature=settings.temperature, **shared),
        }
        if linear_steps:
            samples = train.probe, train.targets, val.probe, val.targets
            probe = linear_probe(*samples, seed=cfg.seed, max_steps=linear_steps, **shared)
            labeled |= {"linear": probe.accuracy, "linear_rate": probe.learning_rate}
    return EvalResult(
        embedding_std=collapse.embedding_std(val.z),
        effective_rank=collapse.effective_rank(val.z),
        sigreg=collapse.sigreg_statistic(val.z),
        z_val=val.z,
        features_val=val.features,
        n_train=n_train,
        n_val=len(val.targets),
        image_size=image_size,
        k=settings.k,
        no_labels_because=no_labels_because,
        **labeled,
    )


def evaluate_untrained(
    cfg: Config, train_source: ImageSource, val_source: ImageSource, *, device: torch.device, **options: Any
) -> EvalResult:
    """Evaluate the baseline of a run: its encoder at the starting weights, with calibrated BatchNorm.

    Further `options` are those of `evaluate_model`.
    """
    model = build_model(cfg).to(device).to(memory_format=memory_format(cfg))
    return evaluate_model(model, train_source, val_source, cfg, device=device, calibrate=True, **options)


def check_validation_images(source: ImageSource) -> None:
    """Raise UsageError if there are fewer than 2 validation images, too few for statistics."""
    if len(source) < 2:
        raise UsageError(
            f"evaluation needs at least 2 validation images, and {source.name} has {len(source)}; "
            "raise --data.val-fraction or give more images"
        )


def loading_options(data: DataConfig, device: torch.device, bad_images: Path | None) -> dict[str, Any]:
    """Arguments that a run passes to both of its loaders, `multicrop_loader` and `eval_loader`."""
    return {
        "backend": data.backend,
        "device": device,
        "prefetch": data.prefetch,
        "hw_decoder_load": data.hw_decoder_load,
        "bad_images": bad_images,
        "max_bad_fraction": data.max_bad_fraction,
    }


def open_splits(data: DataConfig) -> tuple[ImageSource, ImageSource]:
    """Training and validation images of a run; logs what they are.

    If the data has no val split, the held-out images do not depend on the run's seed: runs with different
    seeds are compared on the same images, and no run is evaluated on images that it was trained on.
    """
    files = (open_source(data.path, split, val_fraction=data.val_fraction) for split in ("train", "val"))
    train, val = (as_trained(source, data.slices, data.channels) for source in files)
    values = data.value_range or choose_value_range(train, data.bit_depth)
    train.value_range = val.value_range = values
    log.info("training images: %s", train.summary())
    log.info("validation images: %s", val.summary())
    if values is not None:
        log.info("images of more than 8 bits: %g is black, %g is white", *values)
    if (train.labeled or val.labeled) and (reason := _no_labels(train, val)):
        way_out = f" Or give the training images alone ({train.origin}), and some of them are held out."
        log.info("note: %s%s", reason, way_out if train.labeled else "")
    return train, val


def _no_labels(train_source: ImageSource, val_source: ImageSource) -> str | None:
    """Why there is no kNN and no linear probe, for the report; None if every image has a class."""
    for role, source in (("training", train_source), ("validation", val_source)):
        targets = source.targets
        unlabeled = len(source) if targets is None else sum(target < 0 for target in targets)
        if unlabeled:
            return (
                f"{unlabeled} of the {len(source)} {role} images in {source.name} have no class: kNN and "
                "linear probe need one for every image. Give labeled images (a folder of class folders)."
            )
    return None
