"""Evaluate a checkpoint against the untrained encoder and other backbones, or compare finished runs:

python train/evaluate.py --checkpoint RUN --backbone vit_small_patch14_dinov2.lvd142m
python train/evaluate.py --compare RUN RUN

Exit codes: 0 done, 1 the run failed, 2 wrong usage, 130 Ctrl-C.
"""

import contextlib
import dataclasses
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lejepa_fast.data.recipe import Pixels
from lejepa_fast.errors import UsageError
from lejepa_fast.train.config import Config, DataConfig, loader_workers, to_dict, validate
from lejepa_fast.train.runtime.command import run_with_options
from lejepa_fast.train.runtime.files import disk_errors_named, read_rows

if TYPE_CHECKING:
    from torch import Tensor

    from lejepa_fast.data import ImageSource
    from lejepa_fast.train.evaluation.backbones import Backbone


@dataclass(frozen=True)
class Options:
    """Evaluate a checkpoint against the untrained encoder and write a report; or evaluate backbones alone,
    with --data and --backbone; or show finished runs side by side, with --compare."""

    checkpoint: Path | None = None
    """A run folder (its newest checkpoint is used) or a folder checkpoints/step-*."""
    backbone: tuple[str, ...] | None = None
    """Further encoders for the same table: timm's names, for weights of the Hugging Face hub or its cache,
    NAME:FILE, or NAME:untrained for random weights. Without --checkpoint they are evaluated alone, on
    --data. None: those of the run; no name after it: none."""
    backbone_size: Pixels | Literal["own"] | None = None
    """Side of the images for backbones. own: as each was trained; None: as for the checkpoint, or the next
    larger size that the backbone takes."""
    compare: tuple[Path, ...] = ()
    """Run folders to show side by side on one page; nothing is evaluated again."""
    data: str | None = None
    """Images to evaluate on, in any form that training takes; None: those of the run."""
    val_fraction: float | None = None
    """Share of each class of --data that is held out, where it has no val split of its own; the probes are
    fitted on the others. None: a half; of the data of the run, what was held out there."""
    image_size: int | None = None
    """Side of the evaluated images in pixels; None: as in the run."""
    batch_size: int | None = None
    """Images per forward pass; None: as in the run. The results do not depend on it."""
    linear: bool = True
    """Fit the linear probe as well."""
    linear_blocks: int | None = None
    """Last blocks of a vision transformer that the linear probe sees side by side, all if there are fewer;
    None: as in the run."""
    averaged: bool = True
    """Take the averaged weights if the run keeps them (--average)."""
    labels: Path | None = None
    """CSV file with a column `file` and a column `label` or `value`: classes or numbers of the images."""
    labels_are: Literal["auto", "classes", "numbers"] | None = None
    """What the labels of the CSV file are. auto: numbers if all can be read as such; None: as in the run."""
    few_shot: str | None = None
    """Labels per class for all probes, such as 1,10,100,all; None: as in the run."""
    draws: int | None = None
    """Random draws of the labels for each number of them; None: as in the run."""
    fine_tune: int | None = None
    """Epochs of fine-tuning the whole encoder with labels; 0: none; None: as in the run."""
    out: Path | None = None
    """Folder that gets report/; None: RUN/evaluation/step-N, so that the report of the training stays; of
    backbones alone ./evaluation. Of --compare it gets comparison/; None: the current folder."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute. auto: on a GPU if there is one."""
    workers: int | None = None
    """Loader threads; None: as in the run."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return run_with_options(Options, _evaluate, argv)


def _evaluate(options: Options) -> None:
    if options.compare:
        from lejepa_fast.train.report.comparison import write_comparison

        fields = dataclasses.fields(options)
        given = {each.name for each in fields if getattr(options, each.name) != each.default}
        if others := given - {"compare", "out"}:
            names = ", ".join(f"--{name.replace('_', '-')}" for name in sorted(others))
            raise UsageError(f"--compare takes finished runs alone; leave out {names}")
        print(f"comparison: {write_comparison(options.compare, _made(options.out or Path()))}")
    elif options.checkpoint is not None:
        with _own_options_named():
            _evaluate_checkpoint(options, options.checkpoint)
    elif options.backbone and options.data is not None:
        with _own_options_named():
            _evaluate_backbones(options, options.data)
    else:
        raise UsageError("give --checkpoint RUN, or --data PATH --backbone NAME, or --compare RUN RUN")


def _evaluate_checkpoint(options: Options, checkpoint: Path) -> None:
    # Not above: `--help` does not wait for PyTorch.
    from lejepa_fast.train.checkpoint.trained_model import load_trained
    from lejepa_fast.train.evaluation.backbones import evaluate_backbones
    from lejepa_fast.train.evaluation.protocol import evaluate_model, evaluate_untrained
    from lejepa_fast.train.model.masked import MaskedModel
    from lejepa_fast.train.report.predictor_pictures import masked_examples
    from lejepa_fast.train.report.report import write_report
    from lejepa_fast.train.report.results_table import format_table

    model, run, step, path, averaged, pretraining, whole = load_trained(checkpoint, averaged=options.averaged)
    cfg = _settings(run, options)
    backbones = _load_backbones(cfg, options)
    train_source, val_source, setting = _opened(cfg, options)
    run_dir = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    out = _made(options.out or run_dir / "evaluation" / path.name)  # a wrong one shows before the work
    untrained = evaluate_untrained(cfg, train_source, val_source, **setting)
    trained = evaluate_model(model.to(setting["device"]), train_source, val_source, cfg, **setting)
    others = dict(evaluate_backbones(backbones, train_source, val_source, cfg, **setting))
    results = {"untrained": untrained, "trained": trained, **others}
    evaluated_on = cfg.eval.data or cfg.data.path
    history = [row for row in read_rows(run_dir / "metrics.jsonl") if row["step"] <= step]
    changes = options.data, options.val_fraction, options.labels, options.image_size
    other_weights = run.average.kind != "none" and not options.averaged
    if other_weights or any(each is not None for each in changes):
        history = [row for row in history if row["kind"] != "eval"]  # of other weights, or on other images
    masked = None
    if isinstance(whole, MaskedModel):
        masked = masked_examples(whole.to(setting["device"]), cfg, train_source, val_source)
    page = write_report(
        out,
        config=to_dict(run),
        data=pretraining,
        evaluated_on=evaluated_on,
        evaluation=to_dict(cfg)["eval"],
        history=history,
        views=_example_views(train_source, cfg),
        steps=step,
        results=results,
        masked=masked,
    )
    if averaged:
        print("of the averaged weights:")
    print(
        f"pretrained on {run.data.path}: {pretraining['train_images']} images; "
        f"evaluated on {evaluated_on}: {trained.n_val} images, {trained.n_train} for the probes"
    )
    print(format_table(results))
    print(f"report: {page}")


def _evaluate_backbones(options: Options, data: str) -> None:
    from lejepa_fast.train.evaluation.backbones import evaluate_backbones
    from lejepa_fast.train.report.report import write_backbones_report
    from lejepa_fast.train.report.results_table import format_table

    cfg = _settings(Config(data=DataConfig(path=data, val_fraction=0.0)), options)
    backbones = _load_backbones(cfg, options)
    train_source, val_source, setting = _opened(cfg, options)
    out = _made(options.out or Path("evaluation"))
    results = dict(evaluate_backbones(backbones, train_source, val_source, cfg, **setting))
    how = {"evaluation": to_dict(cfg)["eval"], "seed": cfg.seed}
    page = write_backbones_report(out, evaluated_on=data, results=results, **how)
    print(format_table(results))
    print(f"report: {page}")


def _settings(run: Config, options: Options) -> Config:
    """The configuration of a run with the options of this command in place of its own."""
    data = _replaced(run.data, workers=options.workers)
    other: dict[str, Any] = {}
    if options.data is not None:
        other = {"data": options.data, "val_fraction": None, "labels": None}
    evaluation = _replaced(
        dataclasses.replace(run.eval, **other),
        backbone=options.backbone,
        image_size=options.image_size,
        linear_blocks=options.linear_blocks,
        batch_size=options.batch_size,
        val_fraction=options.val_fraction,
        labels=options.labels,
        labels_are=options.labels_are,
        few_shot=options.few_shot,
        draws=options.draws,
        fine_tune=options.fine_tune,
    )
    cfg = dataclasses.replace(run, eval=evaluation, data=data)
    validate(cfg)
    for name, needs, there in (
        ("backbone_size", "--backbone", evaluation.backbone),
        ("labels_are", "--labels", evaluation.labels),
        ("draws", "--few-shot", evaluation.few_shot),
        ("linear_blocks", "--linear", options.linear),
    ):
        if getattr(options, name) is not None and not there:
            option = f"--{name.replace('_', '-')}"
            raise UsageError(f"{option} has no effect without {needs}; give both or neither")
    return cfg


def _opened(cfg: Config, options: Options) -> "tuple[ImageSource, ImageSource, dict[str, Any]]":
    """Training and validation images, and the arguments that all evaluations share."""
    from lejepa_fast.train.evaluation.protocol import open_evaluation
    from lejepa_fast.train.runtime.world import choose_device

    device = choose_device(options.device)
    workers = loader_workers(cfg, processes_here=1, on_gpu=device.type == "cuda")
    setting = {"device": device, "num_workers": workers, **({} if options.linear else {"linear_steps": 0})}
    return *open_evaluation(cfg), setting


def _load_backbones(cfg: Config, options: Options) -> "dict[str, Backbone]":
    """The backbones, before anything is evaluated: a wrong name or missing weights show at once."""
    from lejepa_fast.train.evaluation.backbones import load_backbones

    try:
        return load_backbones(cfg, options.backbone_size)
    except UsageError as error:
        if options.backbone is not None:
            raise
        way_out = "the run names this backbone, and --backbone without a name leaves it out"
        raise UsageError(f"{error}; {way_out}") from error


def _made(out: Path) -> Path:
    with disk_errors_named(out, "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
    return out


def _replaced(section: Any, **values: Any) -> Any:
    return dataclasses.replace(
        section, **{name: value for name, value in values.items() if value is not None}
    )


@contextlib.contextmanager
def _own_options_named() -> Iterator[None]:
    """Let errors about settings of a run name the options of this command."""
    try:
        yield
    except UsageError as error:
        message = str(error).replace("raise --data.val-fraction, ", "")  # a finished run keeps its own
        ours = "data|val[_-]fraction|(image|batch)[_-]size|linear_blocks|few_shot|draws|fine_tune|labels"
        ours += "|backbone"
        raise UsageError(re.sub(rf"\beval\.(?={ours})", "", message)) from error


def _example_views(source: "ImageSource", cfg: Config) -> "list[Tensor]":
    """Views of a few images for the report's figure; small images are enlarged."""
    from lejepa_fast.data import multicrop_loader

    recipe = dataclasses.replace(cfg.crops, min_image_size=1)
    count = min(len(source), 6)
    backend = "torchvision" if cfg.data.channels == 3 else "cpu"  # which alone makes other channels
    loader = multicrop_loader(source, recipe, batch_size=count, seed=cfg.seed, backend=backend)
    return next(iter(loader))[0]


if __name__ == "__main__":
    sys.exit(main())
