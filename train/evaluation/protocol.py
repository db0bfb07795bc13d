"""Evaluate a model on a data set: probes and collapse statistics of the frozen encoder, and fine-tuning.

The trainer calls `evaluate_model` every few epochs. `train/pretrain.py` and `train/evaluate.py` call it for
the trained encoder, and `evaluate_untrained` for the baseline.
"""

import functools
import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lejepa_fast.data import ImageSource, eval_loader, open_source
from lejepa_fast.data.sources import hold_out
from lejepa_fast.data.sources.scientific import as_trained, choose_value_range
from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import Config, DataConfig, shots
from lejepa_fast.train.evaluation import collapse
from lejepa_fast.train.evaluation.embeddings import calibrate_batchnorm, embed_source
from lejepa_fast.train.evaluation.few_shot import (
    PROBES,
    Samples,
    Table,
    few_shot,
    few_shot_note,
    score_probes,
)
from lejepa_fast.train.evaluation.fine_tuning import fine_tune
from lejepa_fast.train.evaluation.label_table import LabelTable, labeled, read_labels
from lejepa_fast.train.evaluation.probes import MAX_STEPS
from lejepa_fast.train.evaluation.regression import Score, regression_score
from lejepa_fast.train.model.initialize import lay_out
from lejepa_fast.train.model.model import build_model, evaluated

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
    """Neighbors of kNN: as many as are asked for, but at most the training images of a class on average."""
    no_labels_because: str | None = None
    """Why there is no kNN and no linear probe; None with labels."""
    knn: float | None = None
    """Top-1 accuracy of kNN on the validation images, in percent."""
    linear: float | None = None
    """Top-1 accuracy of the linear probe in percent; None also if it was not asked for."""
    num_classes: int | None = None
    """Classes of the training source."""
    majority: float | None = None
    """Share of the largest class among the validation images, in percent."""
    regression: dict[str, Score] | None = None
    """Where the labels are numbers: scores of linear probe, kNN and kernel ridge regression, and of always
    predicting the mean of the training images."""
    fine_tuned: float | None = None
    """After full fine-tuning: top-1 accuracy in percent, or R2 of numbers."""
    few_shot: Table | None = None
    """Figures with few labels, see `few_shot.few_shot`."""
    few_shot_note: str = ""
    """Which classes have fewer images than that asks for."""
    gaussian: bool = True
    """Whether the training draws `z_val` to a standard Gaussian: not so of I-JEPA, nor of masked LeJEPA with
    SIGReg over single patches, whose mean `z_val` is."""
    seconds: float = field(default=0.0, compare=False)
    """Time that the evaluation took by the clock, in seconds."""
    weights: str | None = None
    """Of a backbone: where its weights come from, see `backbones.Backbone`. Its `z_val` are the features."""
    parameters: int | None = None
    """Of a backbone: parameters of the encoder."""

    @property
    def verdict(self) -> collapse.Verdict:
        """Healthy, low rank or collapsed, by the rule of `collapse.verdict`."""
        samples, dim = self.n_val, self.z_val.shape[1]
        std, rank = self.embedding_std, self.effective_rank
        return collapse.verdict(std, rank, samples, dim, gaussian=self.gaussian)

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
    with_few_labels: bool = True,
) -> EvalResult:
    """Evaluate the frozen model: fit the probes on the training images, score them on the validation images.

    It can run in the middle of a training: afterwards modes, gradients, buffers and random states are as
    before. Ranks are not synchronized, so a single rank can call it.

    Args:
        model: a `LeJEPAModel` on `device`; `embed_source` says what else works.
        train_source, val_source: images with classes, or with numbers (`values`). With an unknown class,
            there are no probes.
        cfg: its sections `eval` and `data`, `seed`, and `mean`, `std` and `global_size` of `crops` are used.
        device: of the model; the probes run there, too.
        linear_steps: upper limit of the linear probe's steps; 0: no linear probe.
        train_images: use a random subset of so many training images if there are more; 0: use all.
        num_workers: loader threads.
        amp_dtype: autocast dtype of the forward pass; None: the dtype of the weights.
        bad_images: file that lists unreadable images, which are skipped.
        calibrate: for an untrained model: first set the running statistics of its BatchNorm layers from up to
            4,096 random training images (`calibrate_batchnorm`).
        with_few_labels: do what `eval.few_shot` and `eval.fine_tune` ask for.

    Raises:
        UsageError: a source is empty, or has fewer than 2 validation images.
        RunError: the model gives NaN or infinite embeddings.
    """
    began = time.perf_counter()
    check_validation_images(val_source, cfg)
    device = torch.device(device)
    settings = cfg.eval
    no_labels_because = _no_labels(train_source, val_source)
    if no_labels_because and with_few_labels and (settings.few_shot or settings.fine_tune):
        no_labels_because += " Few labels and fine-tuning, which were asked for, are skipped as well."
    if no_labels_because is None:
        train_y, val_y = _labels(train_source), _labels(val_source)
        num_classes = None
        if not train_y.is_floating_point():
            num_classes = len(train_source.classes or ()) or int(max(train_y.max(), val_y.max())) + 1
    # Targets become the numbers of the images: bad images are left out on the way.
    train_source, val_source = _numbered(train_source), _numbered(val_source)
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
    embed = functools.partial(
        embed_source, model, device=device, amp_dtype=amp_dtype, linear_blocks=settings.linear_blocks
    )
    val, n_train, k = embed(loader(val_source)), len(train_source), settings.k
    figures: dict[str, Any] = {}
    if no_labels_because is None:
        train = embed(part(train_images) if 0 < train_images < n_train else loader(train_source))
        n_train = len(train.targets)
        fitted, scored = (
            Samples(each.features, each.probe, y[each.targets], each.targets)
            for each, y in ((train, train_y), (val, val_y))
        )
        # Not more neighbors than a class has samples on average: of 5 each, 20 would be mostly of others.
        k = min(k, max(1, n_train // num_classes)) if num_classes else k
        # The same draws of labels whatever the run's seed, so that runs can be compared.
        probing: dict[str, Any] = {"temperature": settings.temperature, "seed": 0, "device": device}
        probing |= {"k": k, "num_classes": num_classes}
        figures = _figures(fitted, scored, linear_steps, probing)

        def fine_tuned(chosen: Samples) -> float:
            return fine_tune(
                model.encoder,  # type: ignore[arg-type]
                train_source.subset(chosen.numbers.numpy()),
                train_y,
                loader,
                val_source,
                val_y,
                cfg,
                num_classes=num_classes,
                device=device,
                amp_dtype=amp_dtype,
                loading={"num_workers": num_workers, **loading_options(cfg.data, device, None)},
            )

        if with_few_labels:
            if settings.fine_tune:
                figures["fine_tuned"] = fine_tuned(fitted)
            if counts := shots(settings.few_shot):
                known = {name: figures[name] for name in (*PROBES, "fine_tuned") if name in figures}
                figures["few_shot"] = few_shot(
                    fitted,
                    scored,
                    counts,
                    draws=settings.draws,
                    known=known,
                    fine_tune=fine_tuned if settings.fine_tune else None,
                    probes=[name for name in PROBES if linear_steps or name != "linear"],
                    **probing,
                )
                figures["few_shot_note"] = few_shot_note(fitted.y, counts, train_source.classes or ())
    return EvalResult(
        embedding_std=collapse.embedding_std(val.z),
        effective_rank=collapse.effective_rank(val.z),
        sigreg=collapse.sigreg_statistic(val.z),
        z_val=val.z,
        features_val=val.features,
        n_train=n_train,
        n_val=len(val.targets),
        image_size=image_size,
        k=k,
        no_labels_because=no_labels_because,
        gaussian=cfg.objective == "lejepa"
        or (cfg.objective == "masked-lejepa" and cfg.loss.sigreg_over == "image"),
        seconds=time.perf_counter() - began,
        **figures,
    )


def _figures(train: Samples, val: Samples, linear_steps: int, probing: dict[str, Any]) -> dict[str, Any]:
    """What every evaluation measures with labels: fields of `EvalResult`."""
    linear = ["linear"] if linear_steps else []
    if probing["num_classes"] is None:
        scores = score_probes(train, val, probes=[*linear, "knn", "kernel"], **probing)
        mean = regression_score(train.y.mean().expand(len(val.y)), val.y)
        return {"regression": {**scores, "mean": mean}}
    return {
        "num_classes": probing["num_classes"],
        "majority": 100.0 * val.y.bincount().max().item() / len(val.y),
        **score_probes(train, val, probes=[*linear, "knn"], linear_steps=linear_steps, **probing),
    }


def _labels(source: ImageSource) -> Tensor:
    """Classes (n,) int64, or numbers (n,) float64."""
    return torch.tensor(source.targets if source.values is None else source.values)


def _numbered(source: ImageSource) -> ImageSource:
    """The images of a source, with their numbers in the place of classes."""
    part = source.subset(np.arange(len(source)))
    part._targets = np.arange(len(source))
    return part


def evaluate_untrained(
    cfg: Config, train_source: ImageSource, val_source: ImageSource, *, device: torch.device, **options: Any
) -> EvalResult:
    """Evaluate the baseline of a run: its encoder at the starting weights, with calibrated BatchNorm.

    Further `options` are those of `evaluate_model`.
    """
    model = evaluated(build_model(cfg)).to(device)
    lay_out(model, cfg)
    return evaluate_model(model, train_source, val_source, cfg, device=device, calibrate=True, **options)


def check_validation_images(source: ImageSource, cfg: Config) -> None:
    """Raise UsageError if there are fewer than 2 validation images, too few for statistics."""
    if len(source) < 2:
        share = "data" if cfg.eval.data is None else "eval"
        raise UsageError(
            f"evaluation needs at least 2 validation images, and {source.name} has {len(source)}; "
            f"raise --{share}.val-fraction, give more images, or evaluate on others with --eval.data"
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
    seeds are compared on the same images, and no run is evaluated on images that it was trained on. With
    `val_fraction` 0 there are none.
    """
    train, val = _open(data, data.val_fraction)
    _log_splits(train, val, "training images")
    return train, val


def open_evaluation(
    cfg: Config, splits: tuple[ImageSource, ImageSource] | None = None
) -> tuple[ImageSource, ImageSource]:
    """Images that the probes are fitted on, and those that they are scored on; logs what they are.

    Args:
        cfg: its section `eval` says which: those of the run, or others, and labels from a file.
        splits: the images of the run, if they are open.

    Raises:
        UsageError: they cannot be opened, a label is wrong, or there are too few of them.
    """
    data, settings = cfg.data, cfg.eval
    path, share = settings.data or data.path, settings.val_fraction
    labels, kind = settings.labels, settings.labels_are
    of_training = path == data.path or Path(path).resolve() == Path(data.path).resolve()
    if share is not None and not 0 < share < 1:
        raise UsageError(f"eval.val_fraction: expected a number between 0 and 1, got {share}")
    if share is not None and of_training and data.val_fraction:
        raise UsageError(
            f"eval.val_fraction: {path} is the data of the training, whose own held-out images are evaluated "
            "on; leave this out, or evaluate on others with --eval.data"
        )
    table = None if labels is None else read_labels(labels, kind)
    # Where the training holds out none of its images, a part of the labeled ones among them is held out here.
    if share is None and of_training and (data.val_fraction or (settings.data is None and table is None)):
        if table is None:
            return splits or open_splits(data)
        train, val = _open(data, data.val_fraction, table)
    else:
        train, val = _open(replace(data, path=path), 0.0, table, 0.5 if share is None else share)
    _log_splits(train, val, "images for the probes")
    return train, val


def _open(
    data: DataConfig, fraction: float, table: LabelTable | None = None, share: float | None = None
) -> tuple[ImageSource, ImageSource]:
    """Both splits. `fraction` is held out before images without labels in `table` are left out; `share`
    after it, if there is no val split yet."""
    train, val = (open_source(data.path, split, val_fraction=fraction) for split in ("train", "val"))
    if table is not None:
        train, val = labeled(table, train, val)
    if share is not None and not len(val):
        train, val = (hold_out(train, split, share) for split in ("train", "val"))
    train, val = (as_trained(source, data.slices, data.channels) for source in (train, val))
    train.value_range = val.value_range = data.value_range or choose_value_range(train, data.bit_depth)
    return train, val


def _log_splits(train: ImageSource, val: ImageSource, what: str) -> None:
    log.info("%s: %s", what, train.summary())
    log.info("validation images: %s", val.summary())
    if train.value_range is not None:
        log.info("images of more than 8 bits: %g is black, %g is white", *train.value_range)
    if len(val) and (train.labeled or val.labeled) and (reason := _no_labels(train, val)):
        way_out = f" Or give the training images alone ({train.origin}), and some of them are held out."
        log.info("note: %s%s", reason, way_out if train.labeled else "")


def _no_labels(train_source: ImageSource, val_source: ImageSource) -> str | None:
    """Why there is no kNN and no linear probe, for the report; None if every image has a class."""
    for role, source in (("training", train_source), ("validation", val_source)):
        if source.values is not None:
            continue
        targets = source.targets
        unlabeled = len(source) if targets is None else sum(target < 0 for target in targets)
        if unlabeled:
            return (
                f"{unlabeled} of the {len(source)} {role} images in {source.name} have no class: kNN and "
                "linear probe need one for every image. Give labeled images (a folder of class folders), or "
                "their labels in a CSV file (--labels; in a training --eval.labels)."
            )
    return None
