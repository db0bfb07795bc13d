"""The report of a run: `report.html`, `summary.json` and figures. They appear all together or not at all."""

from __future__ import annotations

import base64
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import torch
from torch import Tensor

from lejepa_fast.data.recipe import IMAGENET_MEAN, IMAGENET_STD
from lejepa_fast.errors import RunError
from lejepa_fast.train.evaluation.collapse import sigreg_levels
from lejepa_fast.train.evaluation.evaluate import EvalResult
from lejepa_fast.train.report import plots


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
    """Write `run_dir/report/`, in place of an earlier report, and return the path of its `report.html`.

    Args:
        run_dir: an existing folder.
        config: resolved configuration as nested dicts (`config.to_dict`), copied into the report. Missing
            sections are allowed.
        trained, untrained: results for both encoders, on the same data at the same image size.
        history: rows of `metrics.jsonl`; missing values leave gaps in the figures.
        views: views of one batch, tensors (B, 3, S, S), global ones first; if empty, there is no such figure.
        images_per_second: of the training; None: not recorded.
        steps: optimiser steps of the trained encoder.

    Raises:
        RunError: the folder cannot be written (no space, no permission). An earlier report stays as it is.
    """
    summary = _summary(config, trained, untrained, images_per_second, steps)
    target = run_dir / "report"
    loss, crops = config.get("loss") or {}, config.get("crops") or {}
    temporary = run_dir / ".report-new"  # a fixed name: the next report removes what a killed run left
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        level = sigreg_levels(2, t_max=loss.get("t_max", 3.0), n_points=loss.get("n_points", 17)).gaussian
        plots.plot_losses(
            temporary / "loss.png", history, sigreg_floor=0.0 if loss.get("unbiased") else level
        )
        if trained.knn is not None and untrained.knn is not None and trained.majority is not None:
            plots.plot_knn(
                temporary / "knn.png",
                history,
                steps=steps,
                trained=trained.knn,
                untrained=untrained.knn,
                majority=trained.majority,
            )
        if views:
            plots.plot_views(
                temporary / "views.png",
                views,
                num_global=crops.get("global_crops", sum(view.shape == views[0].shape for view in views)),
                mean=crops.get("mean", IMAGENET_MEAN),
                std=crops.get("std", IMAGENET_STD),
            )
        plots.plot_projections(temporary / "projections.png", trained.z_val, untrained.z_val)
        plots.plot_spectrum(temporary / "spectrum.png", trained.z_val, untrained.z_val)
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        (temporary / "summary.json").write_text(text, encoding="utf-8")
        (temporary / "report.html").write_text(_render(summary, temporary), encoding="utf-8")
        earlier = run_dir / ".report-old"
        shutil.rmtree(earlier, ignore_errors=True)
        if target.exists():
            target.rename(earlier)
        try:
            temporary.rename(target)
        except OSError:
            if earlier.exists():
                earlier.rename(target)
            raise
        shutil.rmtree(earlier, ignore_errors=True)
    except OSError as error:
        raise RunError(
            f"cannot write the report to {target}: {error.strerror or error}; "
            "free some space or choose another folder, then evaluate the checkpoint again"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target / "report.html"


def _render(summary: Mapping[str, Any], folder: Path) -> str:
    """The page, with the figures in `folder` embedded."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    config = summary["config"]
    return environment.get_template("report.html.j2").render(
        s=summary,
        figures={path.name: base64.b64encode(path.read_bytes()).decode() for path in folder.glob("*.png")},
        model=(config.get("model") or {}).get("name") or "encoder",
        loss=config.get("loss") or {},
        config=json.dumps(config, indent=2),
    )


# ---- summary.json ----------------------------------------------------------------------------------------


def _summary(
    config: Mapping[str, Any],
    trained: EvalResult,
    untrained: EvalResult,
    images_per_second: float | None,
    steps: int,
) -> dict[str, Any]:
    """Contents of `summary.json`; accuracies in percent, None without labels."""
    levels = sigreg_levels(trained.n_val)
    verdict = trained.verdict
    accuracies: dict[str, float | None] = {}
    for name in ("knn", "linear"):
        before, after = getattr(untrained, name), getattr(trained, name)
        gain = None if before is None or after is None else after - before
        accuracies |= {f"{name}_untrained": before, f"{name}_trained": after, f"{name}_gain": gain}
    return _json_value(
        {
            **accuracies,
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
            "collapsed": verdict.collapsed,
            "verdict": verdict.sentence,
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
            "machine": _machine(),
            "versions": _versions(),
            "config": config,
        }
    )


def _json_value(value: Any) -> Any:
    """Convert to types of strict JSON: non-finite numbers become None, unknown objects text."""
    if isinstance(value, Mapping):
        return {str(key): _json_value(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_value(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (str, bool, int)) else str(value)


def _machine() -> dict[str, Any]:
    """Processor, cores, memory and GPUs of this machine; nothing that identifies its user."""
    processor = platform.processor() or "unknown"
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
        processor = names[0] if names else processor
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _versions() -> dict[str, str]:
    """Versions of Python and of the packages that a result depends on, if they are installed."""
    found = {"python": platform.python_version()}
    for package in ("lejepa_fast", "torch", "torchvision", "timm", "triton", "numpy", "matplotlib"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ---- on the terminal -------------------------------------------------------------------------------------


def format_table(trained: EvalResult, untrained: EvalResult) -> str:
    """The main figures of both encoders side by side, for a terminal."""
    lines = [f"{'':34}{'untrained':>12}{'trained':>12}{'difference':>12}"]
    for label, name, form in (
        (f"kNN accuracy, k = {trained.k} (%)", "knn", ".1f"),
        ("linear probe accuracy (%)", "linear", ".1f"),
        ("embedding std (target 1)", "embedding_std", ".3g"),
        (f"effective rank of {trained.rank_limit}", "effective_rank", ".3g"),
        ("SIGReg of validation embeddings", "sigreg", ".3g"),
    ):
        before, after = getattr(untrained, name), getattr(trained, name)
        if before is None or after is None:
            lines.append(f"{label:34}{'-':>12}{'-':>12}{'-':>12}")
        else:
            lines.append(f"{label:34}{before:>12{form}}{after:>12{form}}{after - before:>+12{form}}")
    if trained.chance is not None:
        lines.append(f"guessing: {trained.chance:.1f} %, always the largest class: {trained.majority:.1f} %")
    if trained.no_labels_because:
        lines.append(trained.no_labels_because)
    return "\n".join([*lines, trained.verdict.sentence])


def training_speed(history: Sequence[Mapping[str, Any]]) -> float | None:
    """Images per second of a run: the median over its train rows; None without such rows."""
    rates = [row.get("images_per_second") for row in history if row.get("kind") == "train"]
    known = [rate for rate in rates if rate is not None]
    return statistics.median(known) if known else None
