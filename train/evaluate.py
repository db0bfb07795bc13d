"""Evaluation of a model on a data set: kNN, linear probe and collapse statistics of the frozen encoder.

Library: `evaluate_model` scores one model; `train/pretrain.py` calls it every few epochs and, for the
trained and the untrained encoder, at the end. Command: `python train/evaluate.py --checkpoint RUN`.
"""

from __future__ import annotations

import os

if __name__ == "__main__":
    # Before anything loads OpenMP; see pretrain.py.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import dataclasses
import statistics
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from lejepa_fast.data import ImageSource, MultiCropRecipe, eval_loader, multicrop_loader, open_source
from lejepa_fast.errors import UsageError
from lejepa_fast.train.checkpoint.storage import find_checkpoint, has_average, load_model
from lejepa_fast.train.config import (
    Config,
    DataConfig,
    EvalConfig,
    from_dict,
    loader_workers,
    to_dict,
    validate,
)
from lejepa_fast.train.engine.metrics import read_rows
from lejepa_fast.train.evaluation.collapse import (
    Verdict,
    effective_rank,
    embedding_std,
    sigreg_statistic,
    verdict,
)
from lejepa_fast.train.evaluation.embeddings import Embeddings, calibrate_batchnorm, embed_source
from lejepa_fast.train.evaluation.probes import fit_linear_probe, knn_accuracy, linear_probe
from lejepa_fast.train.model.initialize import memory_format
from lejepa_fast.train.model.model import LeJEPAModel, build_model
from lejepa_fast.train.report.report import write_report
from lejepa_fast.train.runtime.command import log_to_stderr, parse_options, run_command
from lejepa_fast.train.runtime.files import make_folder
from lejepa_fast.train.runtime.world import choose_device

__all__ = [
    "Embeddings",
    "EvalResult",
    "calibrate_batchnorm",
    "calibrate_on_source",
    "check_validation_images",
    "embed_source",
    "evaluate_model",
    "evaluate_untrained",
    "format_table",
    "knn_accuracy",
    "linear_probe",
    "training_speed",
]

CALIBRATION_IMAGES = 4096


@dataclass(frozen=True)
class EvalResult:
    """What `evaluate_model` found.

    Attributes:
        knn, linear: top-1 accuracy on the validation images in percent; None without labels, `linear`
            also where it was not asked for.
        linear_rate: learning rate that the linear probe chose.
        embedding_std, effective_rank, sigreg: statistics of `z_val`, see `collapse.py`.
        z_val: validation embeddings (n, K); features_val: pooled encoder features (n, D); float32, CPU.
        n_train, n_val: images on either side.
        num_classes: of the training source; majority: share of the largest one among the validation images
            in percent. None without labels.
        no_labels_because: why there is no kNN and no linear probe; None where there are labels.
        image_size: side of the images in pixels; k: neighbours of kNN.
    """

    knn: float | None
    linear: float | None
    linear_rate: float | None
    embedding_std: float
    effective_rank: float
    sigreg: float
    z_val: Tensor
    features_val: Tensor
    n_train: int
    n_val: int
    num_classes: int | None
    majority: float | None
    no_labels_because: str | None
    image_size: int
    k: int

    @property
    def verdict(self) -> Verdict:
        """Collapsed or healthy, by the rule of `collapse.verdict`."""
        return verdict(self.embedding_std, self.effective_rank, self.n_val, self.z_val.shape[1])

    @property
    def rank_limit(self) -> int:
        """The largest effective rank that n validation images in K dimensions can have."""
        return max(1, min(self.z_val.shape[1], self.n_val - 1))

    @property
    def chance(self) -> float | None:
        """Accuracy of guessing in percent."""
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
    quarantine: Path | None = None,
) -> EvalResult:
    """Score the frozen model: fit on the training images, measure on the validation images.

    Safe in the middle of a training: the model's modes, gradients, buffers and every random state are
    afterwards what they were before. Nothing is synchronised between ranks, so one rank can do it alone.

    Args:
        model: a `LeJEPAModel` on `device` (see `embed_source` for what else will do).
        train_source, val_source: images with classes; with unknown ones `knn` and `linear` are None.
        cfg: `image_size` (None: the recipe's global crops), `batch_size`, `k` and `temperature` are read.
        recipe: `mean`, `std` and `global_size` are read.
        device: of the model; the probes run there, too.
        linear: fit the linear probe as well.
        linear_steps: at most so many steps of it (None: as `fit_linear_probe` has it).
        train_images: where there are more, only so many of `train_source`, drawn at random; 0: all.
        seed: of the linear probe's held-out choice and batch order.
        num_workers: loader processes or threads.
        amp_dtype: autocast dtype of the forward pass; None computes in the dtype of the weights.
        data: how images are loaded, and how many may be bad (None: the defaults); not which they are.
        quarantine: file that lists unreadable images, which are left out.

    Raises:
        UsageError: a source without images, or fewer than 2 validation images.
        RunError: the model gives NaN or infinite embeddings.
    """
    check_validation_images(val_source)
    device = torch.device(device)
    image_size = cfg.image_size or recipe.global_size

    def embedded(source: ImageSource, quarantine: Path | None = quarantine, **more: Any) -> Embeddings:
        loader = eval_loader(
            source,
            image_size=image_size,
            batch_size=cfg.batch_size,
            num_workers=num_workers,
            mean=recipe.mean,
            std=recipe.std,
            **{**loading_options(data, device, quarantine), **more},
        )
        return embed_source(model, loader, device, amp_dtype=amp_dtype)

    val = embedded(val_source)
    reason = _no_labels(train_source, val_source)
    train = None
    knn = rate = linear_accuracy = num_classes = majority = None
    if reason is None:
        if 0 < train_images < len(train_source):
            # Without the list of bad images, as in `calibrate_on_source`; their share among these is chance.
            drawn = train_source.subset(_drawn(len(train_source), train_images))
            train = embedded(drawn, None, max_bad_fraction=1.0)
        else:
            train = embedded(train_source)
        num_classes = len(train_source.classes or ()) or int(max(train.targets.max(), val.targets.max())) + 1
        majority = 100.0 * val.targets.bincount().max().item() / len(val.targets)
        knn = knn_accuracy(
            train.features,
            train.targets,
            val.features,
            val.targets,
            k=cfg.k,
            temperature=cfg.temperature,
            num_classes=num_classes,
            device=device,
        )
        if linear:
            linear_accuracy, rate = fit_linear_probe(
                train.probe,
                train.targets,
                val.probe,
                val.targets,
                num_classes=num_classes,
                seed=seed,
                device=device,
                **({} if linear_steps is None else {"max_steps": linear_steps}),
            )
    return EvalResult(
        knn=knn,
        linear=linear_accuracy,
        linear_rate=rate,
        embedding_std=embedding_std(val.z),
        effective_rank=effective_rank(val.z),
        sigreg=sigreg_statistic(val.z),
        z_val=val.z,
        features_val=val.features,
        n_train=len(train_source) if train is None else len(train.targets),
        n_val=len(val.targets),
        num_classes=num_classes,
        majority=majority,
        no_labels_because=reason,
        image_size=image_size,
        k=cfg.k,
    )


def check_validation_images(source: ImageSource) -> None:
    """UsageError where there are too few to take statistics over."""
    if len(source) < 2:
        raise UsageError(
            f"evaluation needs at least 2 validation images, and {source.name} has {len(source)}; "
            "raise --data.val-fraction or give more images"
        )


def _no_labels(train_source: ImageSource, val_source: ImageSource) -> str | None:
    """Why the sources cannot be probed by class, as a sentence for the report; None if they can."""
    for role, source in (("training", train_source), ("validation", val_source)):
        targets = source.targets
        unlabelled = len(source) if targets is None else sum(target < 0 for target in targets)
        if unlabelled:
            return (
                f"{unlabelled} of the {len(source)} {role} images in {source.name} have no class: kNN and "
                "linear probe need one for every image. Give labelled images (a folder of class folders)."
            )
    return None


def calibrate_on_source(
    model: nn.Module,
    source: ImageSource,
    cfg: EvalConfig,
    *,
    recipe: MultiCropRecipe,
    device: torch.device | str,
    num_workers: int = 0,
    data: DataConfig | None = None,
) -> int:
    """`calibrate_batchnorm` on the training images at the size that `evaluate_model` uses; images seen.

    The images are drawn at random (by a fixed seed): in the order of the source, a batch would often hold a
    single class.
    """
    chosen = _drawn(len(source), CALIBRATION_IMAGES)
    loader = eval_loader(
        source.subset(chosen),
        image_size=cfg.image_size or recipe.global_size,
        batch_size=min(max(cfg.batch_size, 2), len(chosen)),  # statistics over one image are none
        num_workers=num_workers,
        mean=recipe.mean,
        std=recipe.std,
        # Without the list of bad images: the numbers of a subset are not those in it.
        **loading_options(data, torch.device(device), None),
    )
    return calibrate_batchnorm(model, loader, device)


def _drawn(images: int, count: int) -> np.ndarray:
    """The numbers of so many images, by a fixed seed, in random order."""
    return torch.randperm(images, generator=torch.Generator().manual_seed(0))[:count].numpy()


def loading_options(data: DataConfig | None, device: torch.device, quarantine: Path | None) -> dict[str, Any]:
    """How both loaders load for a run."""
    data = data or DataConfig()
    return {
        "backend": data.backend,
        "device": device,
        "prefetch": data.prefetch,
        "hw_decoder_load": data.hw_decoder_load,
        "bad_images": quarantine,
        "max_bad_fraction": data.max_bad_fraction,
    }


def open_splits(data: DataConfig) -> tuple[ImageSource, ImageSource]:
    """Training and validation images of a run.

    What is held out where the data has no val split does not depend on the run's seed: runs of several
    seeds are compared on the same images, and none is evaluated on images that it was trained on.
    """
    train, val = (open_source(data.path, split, val_fraction=data.val_fraction) for split in ("train", "val"))
    return train, val


def evaluate_untrained(
    cfg: Config,
    train_source: ImageSource,
    val_source: ImageSource,
    *,
    device: torch.device | str,
    linear: bool = True,
    num_workers: int = 0,
    amp_dtype: torch.dtype | None = None,
    quarantine: Path | None = None,
) -> EvalResult:
    """The baseline of a run: its encoder at the starting weights, BatchNorm calibrated, scored alike."""
    model = build_model(cfg).to(device, memory_format=memory_format(cfg))
    calibrate_on_source(
        model,
        train_source,
        cfg.eval,
        recipe=cfg.crops,
        device=device,
        num_workers=num_workers,
        data=cfg.data,
    )
    return evaluate_model(
        model,
        train_source,
        val_source,
        cfg.eval,
        recipe=cfg.crops,
        device=device,
        linear=linear,
        seed=cfg.seed,
        num_workers=num_workers,
        amp_dtype=amp_dtype,
        data=cfg.data,
        quarantine=quarantine,
    )


def training_speed(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Images per second of a run: the median over the train rows of its metrics; None without such rows."""
    rates = [row.get("images_per_second") for row in history if row.get("kind") == "train"]
    known = [rate for rate in rates if rate is not None]
    return statistics.median(known) if known else None


def format_table(trained: EvalResult, untrained: EvalResult) -> str:
    """The main figures side by side, for a terminal."""
    rows = [
        (f"kNN accuracy, k = {trained.k} (%)", untrained.knn, trained.knn, ".1f"),
        ("linear probe accuracy (%)", untrained.linear, trained.linear, ".1f"),
        ("embedding std (target 1)", untrained.embedding_std, trained.embedding_std, ".3g"),
        (f"effective rank of {trained.rank_limit}", untrained.effective_rank, trained.effective_rank, ".3g"),
        ("SIGReg of validation embeddings", untrained.sigreg, trained.sigreg, ".3g"),
    ]
    lines = [f"{'':34}{'untrained':>12}{'trained':>12}{'difference':>12}"]
    for name, before, after, form in rows:
        if before is None or after is None:
            lines.append(f"{name:34}{'-':>12}{'-':>12}{'-':>12}")
        else:
            lines.append(f"{name:34}{before:>12{form}}{after:>12{form}}{after - before:>+12{form}}")
    if trained.chance is not None:
        lines.append(f"guessing: {trained.chance:.1f} %, always the largest class: {trained.majority:.1f} %")
    if trained.no_labels_because:
        lines.append(trained.no_labels_because)
    return "\n".join([*lines, trained.verdict.sentence])


@dataclass(frozen=True)
class Options:
    """Evaluate a checkpoint against the untrained encoder, and write a report."""

    checkpoint: Path
    """A run folder (its newest checkpoint is taken) or a folder checkpoints/step-*."""
    data: str | None = None
    """Images to evaluate on, in any form that training takes; None: those of the run."""
    image_size: int | None = None
    """Side of the evaluated images in pixels; None: as in the run."""
    batch_size: int | None = None
    """Images per forward pass; None: as in the run. The results do not depend on it."""
    linear: bool = True
    """Fit the linear probe as well."""
    averaged: bool = True
    """Take the averaged weights where the run keeps them (--average)."""
    out: Path | None = None
    """Folder that gets report/; None: RUN/evaluation/step-N, so that the report of the training stays."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    workers: int | None = None
    """Loader processes; None: as in the run."""


def main(argv: Sequence[str] | None = None) -> int:
    """The command. Returns the exit code: 0, 1 for a failed run, 2 for a usage error, 130 after Ctrl-C."""
    log_to_stderr()
    given = sys.argv[1:] if argv is None else argv
    description = Options.__doc__ or ""
    return run_command(lambda: evaluate_checkpoint(parse_options(Options, given, description=description)))


def evaluate_checkpoint(options: Options) -> Path:
    """Evaluate, print the table and write the report; returns the path of `report.html`."""
    path, state = find_checkpoint(options.checkpoint)
    cfg = _configured(options, from_dict(state["config"], where=f"checkpoint {path}"))
    device = choose_device(options.device)
    train_source, val_source = open_splits(cfg.data)
    workers = loader_workers(cfg, processes_here=1, on_gpu=device.type == "cuda")
    model = build_model(cfg)
    averaged = options.averaged and has_average(state)
    _load(model, load_model(path, "average" if averaged else "model"), path)
    setting = {"device": device, "linear": options.linear, "num_workers": workers}
    untrained = evaluate_untrained(cfg, train_source, val_source, **setting)
    trained = evaluate_model(
        model.to(device),
        train_source,
        val_source,
        cfg.eval,
        recipe=cfg.crops,
        seed=cfg.seed,
        data=cfg.data,
        **setting,
    )
    run_dir = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    out = options.out or run_dir / "evaluation" / path.name
    history = [row for row in read_rows(run_dir / "metrics.jsonl") if row.get("step", 0) <= state["step"]]
    speed = training_speed(history)
    if options.data is not None or options.image_size is not None:
        history = [row for row in history if row.get("kind") != "eval"]  # measured on other images
    make_folder(out)
    page = write_report(
        out,
        config=to_dict(cfg),
        history=history,
        views=_example_views(train_source, cfg),
        images_per_second=speed,
        steps=state["step"],
        trained=trained,
        untrained=untrained,
    )
    if averaged:
        print("of the averaged weights:")
    print(format_table(trained, untrained))
    print(f"report: {page}")
    return page


def _configured(options: Options, cfg: Config) -> Config:
    """The run's configuration with the data and evaluation settings that were asked for."""
    changed = {"image_size": options.image_size, "batch_size": options.batch_size}
    evaluation = dataclasses.replace(cfg.eval, **{k: v for k, v in changed.items() if v is not None})
    data = cfg.data
    if options.data is not None:
        data = dataclasses.replace(data, path=options.data)
    if options.workers is not None:
        data = dataclasses.replace(data, workers=options.workers)
    cfg = dataclasses.replace(cfg, eval=evaluation, data=data)
    validate(cfg)
    return cfg


def _load(model: LeJEPAModel, weights: Mapping[str, Tensor], path: Path) -> None:
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        difference = str(error).splitlines()[-1].strip()
        raise UsageError(
            f"checkpoint {path} does not hold the model that its configuration describes ({difference}); "
            "it was written by another version: evaluate it with that one"
        ) from error


def _example_views(source: ImageSource, cfg: Config) -> list[Tensor]:
    """The views of a few training images, for the report's figure; small images are enlarged."""
    recipe = dataclasses.replace(cfg.crops, min_image_size=1)
    count = min(len(source), 6)
    loader = multicrop_loader(source, recipe, batch_size=count, seed=cfg.seed, backend="torchvision")
    return next(iter(loader))[0]


if __name__ == "__main__":
    sys.exit(main())
