"""Reports: `report.html`, `summary.json` and figures. They appear all together or not at all."""

import base64
import contextlib
import importlib.metadata
import os
import platform
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from torch import Tensor

from lejepa_fast.train.evaluation.collapse import rank_floors, sigreg_levels, std_floor
from lejepa_fast.train.evaluation.protocol import EvalResult
from lejepa_fast.train.report import plots
from lejepa_fast.train.report.overlays import draw_page, to_pixels
from lejepa_fast.train.report.predictor_pictures import MaskedExamples, draw_predictions
from lejepa_fast.train.report.results_table import (
    TRAINED,
    UNTRAINED,
    encoder_figures,
    table_rows,
)
from lejepa_fast.train.report.runs import json_text, knn_at_the_ends, series, strict_json
from lejepa_fast.train.runtime.files import disk_errors_named


def write_report(
    run_dir: Path,
    *,
    config: Mapping[str, Any],
    data: Mapping[str, Any],
    evaluated_on: str,
    results: Mapping[str, EvalResult],
    history: Sequence[Mapping[str, Any]],
    views: Sequence[Tensor],
    steps: int,
    evaluation: Mapping[str, Any] | None = None,
    views_of: str | None = None,
    masked: MaskedExamples | None = None,
) -> Path:
    """Write `run_dir/report/`, in place of an earlier report, and return the path of its `report.html`.

    Args:
        run_dir: an existing folder.
        config: resolved configuration of the training (`config.to_dict`), copied into the report.
        data: counts of the images of the training: "train_images" and "val_images", which were held out.
        evaluated_on: name of the data of `results`, as `config["data"]["path"]` is that of the training.
        results: the columns of the table: "untrained" and "trained", on the same data at the same image size,
            then those of backbones by their names.
        history: rows of `metrics.jsonl`; missing values leave gaps in the figures.
        views: views of a few images, tensors (B, 3, S, S), global ones first.
        steps: optimizer steps of the trained encoder.
        evaluation: how all were evaluated, the section `eval` of a configuration; None: that of `config`.
        views_of: name of the data of `views`; None: `evaluated_on`.
        masked: of a masked objective, model and images for the pages of masks and predictions; None: no such
            pages.

    Raises:
        RunError: the folder cannot be written (no space, no permission). An earlier report stays as it is.
    """
    untrained, trained = results[UNTRAINED], results[TRAINED]
    backbones = {name: each for name, each in results.items() if name not in (UNTRAINED, TRAINED)}
    summary = {
        "pretraining_data": config["data"]["path"],
        "pretraining_images": data["train_images"],
        "pretraining_held_out": data["val_images"],
        "evaluation_data": evaluated_on,
        "evaluation": config["eval"] if evaluation is None else evaluation,
        **_summary(config, trained, untrained, history, steps),
        "evaluation_seconds": round(sum(each.seconds for each in results.values()), 1),
        "backbones": _of_backbones(backbones),
    }
    with replaced_folder(run_dir / "report") as folder:
        _draw(folder, config, trained, untrained, history, views, summary)
        if masked is not None:
            draw_predictions(folder, masked, config["crops"]["mean"], config["crops"]["std"])
        _write_pages(
            folder,
            summary,
            results,
            views_of=views_of or evaluated_on,
            objective=config["objective"],
            config=json_text(config),
        )
    return run_dir / "report" / "report.html"


def write_backbones_report(
    out: Path,
    *,
    evaluated_on: str,
    seed: int,
    results: Mapping[str, EvalResult],
    evaluation: Mapping[str, Any],
) -> Path:
    """Write `out/report/` of backbones alone, without figures, and return the path of its `report.html`.

    The arguments are those of `write_report`, `seed` that of the linear probe. RunError as there.
    """
    summary = {
        "evaluation_data": evaluated_on,
        "evaluation": evaluation,
        **_setting(next(iter(results.values()))),
        "seed": seed,
        **_environment(),
        "backbones": _of_backbones(results),
    }
    with replaced_folder(out / "report") as folder:
        _write_pages(folder, summary, results)
    return out / "report" / "report.html"


@contextlib.contextmanager
def replaced_folder(target: Path) -> Iterator[Path]:
    """Yield a new folder that takes the place of `target` at the end; after an error `target` is as before.

    RunError, which names `target`, if the disk refuses.
    """
    # Fixed names: the next report removes what a killed run left.
    temporary, earlier = (target.with_name(f".{target.name}-{which}") for which in ("new", "old"))
    way_out = "free some space or choose another folder, then run the command again"
    try:
        with disk_errors_named(target, way_out):
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            yield temporary
            shutil.rmtree(earlier, ignore_errors=True)
            if target.exists():
                target.rename(earlier)
            temporary.rename(target)
    finally:
        if earlier.exists() and not target.exists():
            earlier.rename(target)
        for folder in (temporary, earlier):
            shutil.rmtree(folder, ignore_errors=True)


def _draw(
    folder: Path,
    config: Mapping[str, Any],
    trained: EvalResult,
    untrained: EvalResult,
    history: Sequence[Mapping[str, Any]],
    views: Sequence[Tensor],
    summary: Mapping[str, Any],
) -> None:
    """Draw all figures; the arguments are those of `write_report`, and its summary."""
    loss, crops = config["loss"], config["crops"]
    if config["objective"] != "lejepa":
        plots.plot_curves(folder / "targets.png", {"": history}, plots.TARGETS)
    if config["objective"] != "ijepa":  # which has no SIGReg
        level = sigreg_levels(2, t_max=loss["t_max"], n_points=loss["n_points"]).gaussian
        floor = 0.0 if loss["unbiased"] else level
        panels = plots.loss_panels(sigreg_floor=floor, batch=config["data"]["batch_size"])
        plots.plot_curves(folder / "loss.png", {"": history}, panels)
        plots.plot_projections(folder / "projections.png", trained.z_val, untrained.z_val)
    if summary["knn_gain"] is not None:
        levels = (
            (summary["knn_untrained"], f"untrained encoder: {summary['knn_untrained']:.1f} %"),
            (summary["majority_class"], f"always the largest class: {summary['majority_class']:.1f} %"),
        )
        panel = plots.Panel("kNN accuracy on the validation images (%)", "knn", "eval", levels)
        plots.plot_curves(folder / "knn.png", {"": [*history, *knn_at_the_ends(summary)]}, [panel])
    pixels = [to_pixels(view, crops["mean"], crops["std"]) for view in views]
    names = [f"global {i + 1}" for i in range(crops["global_crops"])]
    names += [f"local {i + 1}" for i in range(len(views) - len(names))]
    draw_page(folder / "views.png", dict(zip(names, pixels, strict=True)))
    plots.plot_spectrum(folder / "spectrum.png", trained.z_val, untrained.z_val)


def _write_pages(
    folder: Path,
    summary: Mapping[str, Any],
    results: Mapping[str, EvalResult],
    **variables: Any,
) -> None:
    """Write summary.json and report.html, with the table of `results`."""
    summary = strict_json(summary)
    (folder / "summary.json").write_text(json_text(summary), encoding="utf-8")
    rows, few_rows = table_rows(results)
    table = {"rows": rows, "few_rows": few_rows, "columns": list(results)}
    page = render("report.html.j2", folder, **{"s": summary, "objective": None, **table, **variables})
    (folder / "report.html").write_text(page, encoding="utf-8")


def render(template: str, folder: Path, **variables: Any) -> str:
    """The page of a template of this package; its variable `figures` holds the figures in `folder`."""
    loader, strict = jinja2.FileSystemLoader(Path(__file__).parent), jinja2.StrictUndefined
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, undefined=strict)
    figures = {path.name: base64.b64encode(path.read_bytes()).decode() for path in folder.glob("*.png")}
    return environment.get_template(template).render(figures=figures, **variables)


def _summary(
    config: Mapping[str, Any],
    trained: EvalResult,
    untrained: EvalResult,
    history: Sequence[Mapping[str, Any]],
    steps: int,
) -> dict[str, Any]:
    """Contents of `summary.json`; accuracies in percent, None without labels."""
    collapsed, low = rank_floors(trained.n_val, trained.z_val.shape[1], gaussian=trained.gaussian)
    summary: dict[str, Any] = {}
    before, after = encoder_figures(untrained), encoder_figures(trained)
    for name in ("knn", "linear", "fine_tuned"):
        gain = None if before[name] is None or after[name] is None else after[name] - before[name]
        summary |= {f"{name}_untrained": before[name], f"{name}_trained": after[name], f"{name}_gain": gain}
    for name in ("regression", "few_shot"):
        summary |= {f"{name}_untrained": before[name], name: after[name]}
    for name in ("embedding_std", "effective_rank", "rankme"):
        summary |= {f"{name}_untrained": getattr(untrained, name), name: getattr(trained, name)}
    speeds = series(history, "train", "images_per_second")[1]
    return summary | {
        **_setting(trained),
        "effective_rank_limit": trained.rank_limit,
        "sigreg_val": trained.sigreg,
        "sigreg_val_untrained": untrained.sigreg,
        "rank_collapsed_below": collapsed,
        "std_collapsed_below": std_floor(gaussian=trained.gaussian),
        "rank_low_below": low,
        "collapsed": trained.verdict.state == "collapsed",
        "state": trained.verdict.state,
        "verdict": trained.verdict.sentence,
        "images_per_second": float(np.median(speeds)) if len(speeds) else None,
        "steps": steps,
        "seed": config["seed"],
        "image_size": trained.image_size,
        "feature_dim": trained.features_val.shape[1],
        "embedding_dim": trained.z_val.shape[1],
        **_environment(),
        "config": config,
    }


def _setting(result: EvalResult) -> dict[str, Any]:
    """What all encoders of a report share."""
    return {
        "knn_k": result.k,
        "chance": result.chance,
        "majority_class": result.majority,
        "no_labels_because": result.no_labels_because,
        "probe_images": result.n_train,
        "val_images": result.n_val,
        "num_classes": result.num_classes,
        "few_shot_note": result.few_shot_note,
    }


def _environment() -> dict[str, Any]:
    """When and on what machine a report was made; nothing that identifies its user."""
    cpuinfo = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    name = re.search(r"^model name\s*: *(.*)", cpuinfo, re.MULTILINE)
    machine = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": name[1] if name else platform.processor() or "unknown",
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
    versions = {"python": platform.python_version()}
    for package in ("lejepa_fast", "torch", "torchvision", "timm", "triton", "numpy", "matplotlib"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    created = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    return {"created": created, "machine": machine, "versions": versions}


def _of_backbones(results: Mapping[str, EvalResult]) -> dict[str, Any]:
    return {
        name: {**encoder_figures(each), "parameters": each.parameters, "weights": each.weights}
        for name, each in results.items()
    }
