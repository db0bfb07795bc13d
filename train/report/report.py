"""The report of a run: `report.html`, `summary.json` and figures, written all together or not at all."""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lejepa_fast.data.recipe import IMAGENET_MEAN, IMAGENET_STD
from lejepa_fast.errors import RunError
from lejepa_fast.train.evaluation.collapse import sigreg_levels
from lejepa_fast.train.report import plots
from lejepa_fast.train.report.html import render

if TYPE_CHECKING:
    from lejepa_fast.train.evaluate import EvalResult


def write_report(
    run_dir: Path,
    *,
    config: Mapping[str, Any],
    trained: EvalResult,
    untrained: EvalResult,
    history: Sequence[Mapping[str, Any]],
    views: Sequence[Tensor],
    images_per_second: float | None,
    steps: int,
) -> Path:
    """Write `run_dir/report/` and return the path of its `report.html`.

    The folder appears complete, in place of an earlier report, or not at all.

    Args:
        run_dir: an existing folder.
        config: resolved configuration as nested dicts (`config.to_dict`), copied into the report. Read
            from it, where they stand: the crops' normalisation and number of global views, the loss's
            knots, lambda and form.
        trained, untrained: `evaluate_model` of both encoders, on the same data at the same image size.
        history: rows of `metrics.jsonl`; `{"kind": "train", "step", "loss", "prediction", "sigreg",
            "embedding_std", ...}` and `{"kind": "eval", "step", "knn", ...}`. Missing values leave gaps.
        views: the views of one batch, tensors (B, 3, S, S), global ones first; an empty list leaves the
            figure out.
        images_per_second: of the training; None where it is not known.
        steps: optimiser steps behind the trained encoder.

    Raises:
        RunError: the folder cannot be written (no space, no permission); nothing is left behind.
    """
    summary = _summary(config, trained, untrained, images_per_second, steps)
    target = run_dir / "report"
    temporary = run_dir / ".report-new"  # a fixed name: the next report removes what a killed run has left
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _draw(temporary, config, trained, untrained, history, views, steps)
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        (temporary / "summary.json").write_text(text, encoding="utf-8")
        (temporary / "report.html").write_text(render(summary, temporary), encoding="utf-8")
        _replace_folder(temporary, target)
    except OSError as error:
        raise RunError(
            f"cannot write the report to {target}: {error.strerror or error}; "
            "free some space or choose another folder, then evaluate the checkpoint again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target / "report.html"


def _draw(
    folder: Path,
    config: Mapping[str, Any],
    trained: EvalResult,
    untrained: EvalResult,
    history: Sequence[Mapping[str, Any]],
    views: Sequence[Tensor],
    steps: int,
) -> None:
    """All figures. The ones that need labels or views are left out where there are none."""
    loss, crops = config.get("loss") or {}, config.get("crops") or {}
    level = sigreg_levels(2, t_max=loss.get("t_max", 3.0), n_points=loss.get("n_points", 17)).gaussian
    plots.plot_losses(folder / "loss.png", history, sigreg_floor=0.0 if loss.get("unbiased") else level)
    if trained.knn is not None and untrained.knn is not None and trained.majority is not None:
        plots.plot_knn(
            folder / "knn.png",
            history,
            steps=steps,
            trained=trained.knn,
            untrained=untrained.knn,
            majority=trained.majority,
        )
    if views:
        plots.plot_views(
            folder / "views.png",
            views,
            num_global=crops.get("global_crops", sum(view.shape == views[0].shape for view in views)),
            mean=crops.get("mean", IMAGENET_MEAN),
            std=crops.get("std", IMAGENET_STD),
        )
    plots.plot_projections(folder / "projections.png", trained.z_val, untrained.z_val)
    plots.plot_spectrum(folder / "spectrum.png", trained.z_val, untrained.z_val)


def _replace_folder(new: Path, target: Path) -> None:
    """Rename `new` to `target`; a folder that stood there goes once the new one is in place."""
    old = target.with_name(".report-old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        os.replace(target, old)
    try:
        os.replace(new, target)
    except OSError:
        if old.exists():
            os.replace(old, target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _summary(
    config: Mapping[str, Any],
    trained: EvalResult,
    untrained: EvalResult,
    images_per_second: float | None,
    steps: int,
) -> dict[str, Any]:
    """Everything in `summary.json`; accuracies in percent, None where there are no labels."""
    levels = sigreg_levels(trained.n_val)
    judged = trained.verdict
    summary = {
        "knn_untrained": untrained.knn,
        "knn_trained": trained.knn,
        "linear_untrained": untrained.linear,
        "linear_trained": trained.linear,
        "knn_gain": _difference(trained.knn, untrained.knn),
        "linear_gain": _difference(trained.linear, untrained.linear),
        "knn_k": trained.k,
        "chance": trained.chance,
        "majority_class": trained.majority,
        "no_labels_because": trained.no_labels_because,
        "embedding_std": trained.embedding_std,
        "embedding_std_untrained": untrained.embedding_std,
        "effective_rank": trained.effective_rank,
        "effective_rank_untrained": untrained.effective_rank,
        "effective_rank_limit": trained.rank_limit,
        "sigreg_val": trained.sigreg,
        "sigreg_val_untrained": untrained.sigreg,
        "sigreg_val_gaussian": levels.gaussian,
        "sigreg_val_all_zero": levels.collapsed,
        "collapsed": judged.collapsed,
        "verdict": judged.sentence,
        "images_per_second": images_per_second,
        "steps": steps,
        "seed": config.get("seed"),
        "train_images": trained.n_train,
        "val_images": trained.n_val,
        "num_classes": trained.num_classes,
        "image_size": trained.image_size,
        "feature_dim": trained.features_val.shape[1],
        "embedding_dim": trained.z_val.shape[1],
        "linear_learning_rate_untrained": untrained.linear_rate,
        "linear_learning_rate_trained": trained.linear_rate,
        "created": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(),
        "versions": versions(),
        "config": config,
    }
    return _plain(summary)


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def _plain(value: Any) -> Any:
    """The value in types that strict JSON knows: non-finite numbers become None, foreign objects text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def machine() -> dict[str, Any]:
    """Processor, cores, memory and GPUs of this machine; names only, nothing that identifies its user."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1) if memory else None,
        "gpus": gpus,
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"


def versions() -> dict[str, str]:
    """Python and the packages that a result depends on; those that are not installed are left out."""
    found = {"python": platform.python_version()}
    for package in ("lejepa_fast", "torch", "torchvision", "timm", "triton", "numpy", "matplotlib"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
