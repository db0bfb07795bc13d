"""The configuration of a run: nested dataclasses, filled from a preset or a JSON file and the command line.

Every field is read somewhere; an unknown key is an error, exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import json
import math
import os
import re
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from lejepa_fast.data.backends.choose_backend import check_loading
from lejepa_fast.data.recipe import MultiCropRecipe
from lejepa_fast.errors import UsageError
from lejepa_fast.train.runtime import files
from lejepa_fast.train.runtime.command import parse_options

EMBEDDED_DATA = "trashnet96"

C = TypeVar("C")

# The LeJEPA paper's ViT-L/14, linear probe on ImageNet-1k after 100 epochs, by images over all GPUs.
PUBLISHED = {128: 72.20, 256: 74.15, 512: 74.72, 1024: 74.07}
SMALLEST_GOOD_BATCH = 256


@dataclass(frozen=True)
class DataConfig:
    path: Annotated[str, tyro.conf.arg(aliases=["--data"])] = EMBEDDED_DATA
    """Embedded set `trashnet96`, a folder of images or of class folders, a folder of .tar shards, or
    torchvision:NAME:FOLDER."""
    batch_size: Annotated[int, tyro.conf.arg(aliases=["--batch-size"])] = 512
    """Images per step over ALL processes; a multiple of their number."""
    val_fraction: float = 0.1
    """Share of each class held out for evaluation where the data has no val split of its own."""
    workers: int | None = None
    """Loader worker processes per training process; 0: load in the training process; None: by CPU count."""
    backend: Literal["auto", "dali", "cpu", "torchvision"] = "auto"
    """What decodes and augments. auto: dali on a GPU where it is installed, else cpu where Numba is, else
    torchvision."""
    prefetch: int = 2
    """Finished batches that wait for the training; with torchvision, for each worker. Each costs memory."""
    hw_decoder_load: float = 0.65
    """Share of JPEGs for the hardware decoder of a GPU, where DALI decodes there; 0: all go to CUDA."""
    max_bad_fraction: float = 0.05
    """Unreadable images are listed in RUN/quarantine.txt and replaced; more than this share stops the run."""


@dataclass(frozen=True)
class ModelConfig:
    name: Annotated[str, tyro.conf.arg(aliases=["--model"])] = "vit_small"
    """Any timm model, or vit_tiny|small|base|large|huge|giant|gigantic (patch 14)."""
    img_size: int | None = None
    """Image size of the position embeddings, for models that have them; None: crops.global_size."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block (models that offer it)."""
    register_tokens: int = 0
    """Extra learned tokens (vision transformers)."""
    kwargs: str = "{}"
    """Further arguments of timm.create_model as a JSON object, for example '{"layers": [1, 1, 1, 1]}'."""
    projector_hidden: int = 2048
    projector_layers: int = 3
    """Linear layers of the projector, the output layer included."""
    projector_dim: int = 512
    """K, the width of the embeddings that the loss sees."""
    projector_norm: Literal["batch", "layer", "none"] = "batch"


@dataclass(frozen=True)
class LossConfig:
    lambd: Annotated[float, tyro.conf.arg(aliases=["--lambda"])] = 0.05
    """Weight of SIGReg; 0 trains the prediction alone, which collapses."""
    num_slices: int = 1024
    t_max: float = 3.0
    n_points: int = 17
    """Knots on the half line [0, t_max]."""
    unbiased: bool = False
    center: Literal["global", "all"] = "global"
    form: Literal["convex", "additive"] = "convex"
    impl: Literal["auto", "triton", "torch", "reference"] = "auto"


@dataclass(frozen=True)
class OptimConfig:
    lr: Annotated[float, tyro.conf.arg(aliases=["--lr"])] = 5e-4
    """Peak learning rate of AdamW; it is not scaled with the batch."""
    weight_decay: float | Literal["auto"] = "auto"
    """auto: 5e-2 for transformers and ConvNeXt, 5e-4 for other convolutional networks."""
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_fraction: float = 0.05
    """Share of all steps during which the rate rises linearly."""
    final_lr_fraction: float = 1e-3
    """The cosine ends at this share of the peak rate."""
    clip_grad_norm: float = 0.0
    """Largest norm of the gradient over all parameters; 0: no clipping."""
    skip_grad_norm: float = 0.0
    """A step with a larger norm of the gradient, before clipping, is skipped; 0: none is."""


@dataclass(frozen=True)
class ParallelConfig:
    strategy: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How processes share the model. auto: without torchrun none; with it, FSDP2 from half a billion
    parameters, or where --parallel.replicate asks for groups, and DDP below."""
    replicate: int = 1
    """Groups of processes that each hold the whole model under FSDP2 (HSDP); divides their number."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again, block by block. selective: everything but attention and every
    second matrix product; full: everything."""
    keep_gathered: bool = False
    """Under FSDP2 every GPU keeps the parameters whole for the step: they are sent once and not up to four
    times, for 2 bytes a parameter in bf16 (4 in float32)."""


@dataclass(frozen=True)
class AverageConfig:
    kind: Annotated[Literal["none", "ema", "swa"], tyro.conf.arg(aliases=["--average"])] = "none"
    """Average of the weights over the steps, which is then what is evaluated and exported. ema: exponential
    moving average; swa: plain mean. 4 bytes a parameter, sharded as the weights are."""
    decay: float = 0.999
    """What the ema keeps of itself at each step."""
    start: float | Literal["auto"] = "auto"
    """Share of all steps before the first that counts. auto: 0 for ema, 0.75 for swa."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 10
    """Epochs between evaluations during training (kNN, linear probe); 0: only at the end."""
    linear_steps: int = 200
    """Steps of the linear probe during training, 0: none; at the end it gets its full length."""
    train_images: int = 100_000
    """Training images for evaluations during training, at most, drawn at random; 0: all, as at the end."""
    image_size: int | None = None
    """Side of the evaluated images; None: crops.global_size."""
    batch_size: int = 256
    k: int = 20
    temperature: float = 0.07


@dataclass(frozen=True)
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    crops: MultiCropRecipe = field(default_factory=MultiCropRecipe)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    out: Path | None = None
    """Run folder; None: runs/DATA-MODEL."""
    epochs: int = 100
    max_steps: int | None = None
    """Train this many steps, and let the schedule span them; None: `epochs` epochs."""
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast on GPUs, float32 on the CPU. The loss is float32 always."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block of the encoder. auto: on GPUs, where it pays for its minutes."""
    resume: str = "auto"
    """auto: continue from the newest readable checkpoint of the run folder, if any; none: start anew;
    PATH: a checkpoint or another run folder."""
    log_every: int = 10
    """Steps between rows of metrics.jsonl; only then do metrics leave the device."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; one is always written at the end and on SIGTERM or Ctrl-C."""
    keep_checkpoints: int = 3
    tensorboard: bool = True
    wandb: str | None = None
    """Weights & Biases project that gets the numbers, too; None: nothing is sent anywhere."""
    profile: bool = False
    """Record a few steps after the first ones: profiler trace and memory snapshot in RUN/profile/."""


def parse(argv: Sequence[str]) -> Config:
    """Command line -> Config. Base: `--config FILE.json`, else `--preset NAME`, else by the data.

    Without either option the embedded set gets the preset `laptop` and all other data `default`.
    From `--config` come the settings of a run, and neither its folder nor what it was resumed from.
    UsageError for an unknown key or a value of the wrong type.
    """
    from lejepa_fast.train.config.presets import PRESETS

    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    first.add_argument("--config", type=Path)
    known, rest = first.parse_known_args(list(argv))
    if known.preset is not None and known.config is not None:
        raise UsageError("--preset and --config both name a base configuration; give one of them")
    if known.config is not None:
        base = dataclasses.replace(load_json(known.config), out=None, resume="auto")
    else:
        name = known.preset or ("laptop" if _data_argument(rest) == EMBEDDED_DATA else "default")
        if name not in PRESETS:
            raise UsageError(f"--preset: expected one of {', '.join(PRESETS)}, got {name!r}")
        base = PRESETS[name]
    description = (
        "Pretrain an encoder with LeJEPA. Base of the options below: --preset NAME "
        f"({', '.join(PRESETS)}; without it, laptop for the embedded images and default for other data) "
        "or --config FILE.json (the config.json of an earlier run)."
    )
    return parse_options(Config, rest, default=base, description=description)


def _data_argument(argv: Sequence[str]) -> str:
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    scan.add_argument("--data", "--data.path", dest="data", default=EMBEDDED_DATA)
    return scan.parse_known_args(list(argv))[0].data


def resolve(cfg: Config) -> Config:
    """Fill in what depends on other fields, so that config.json says what ran."""
    from lejepa_fast.train.model.model import weight_decay_of

    optim = dataclasses.replace(cfg.optim, weight_decay=weight_decay_of(cfg))
    average = cfg.average
    if isinstance(average.start, str):
        average = dataclasses.replace(average, start=0.75 if average.kind == "swa" else 0.0)
    out = cfg.out or Path("runs") / _run_name(cfg)
    return dataclasses.replace(cfg, optim=optim, average=average, out=out)


def validate(cfg: Config, world_size: int = 1) -> None:
    """Raise UsageError for values that cannot work; names the field, what is expected and what came."""
    cfg.crops.validate()
    check_loading(prefetch=cfg.data.prefetch, hw_decoder_load=cfg.data.hw_decoder_load)
    at_least: list[tuple[str, Any, float]] = [
        ("data.workers", cfg.data.workers, 0),
        ("model.img_size", cfg.model.img_size, 1),
        ("model.register_tokens", cfg.model.register_tokens, 0),
        ("loss.num_slices", cfg.loss.num_slices, 1),
        ("optim.lr", cfg.optim.lr, 0),
        ("optim.weight_decay", None if cfg.optim.weight_decay == "auto" else cfg.optim.weight_decay, 0),
        ("optim.clip_grad_norm", cfg.optim.clip_grad_norm, 0),
        ("optim.skip_grad_norm", cfg.optim.skip_grad_norm, 0),
        ("parallel.replicate", cfg.parallel.replicate, 1),
        ("eval.every", cfg.eval.every, 0),
        ("eval.linear_steps", cfg.eval.linear_steps, 0),
        ("eval.train_images", cfg.eval.train_images, 0),
        ("eval.image_size", cfg.eval.image_size, 1),
        ("eval.batch_size", cfg.eval.batch_size, 1),
        ("eval.k", cfg.eval.k, 1),
        ("epochs", cfg.epochs, 1),
        ("max_steps", cfg.max_steps, 1),
        ("seed", cfg.seed, 0),
        ("log_every", cfg.log_every, 1),
        ("checkpoint_every", cfg.checkpoint_every, 1),
        ("keep_checkpoints", cfg.keep_checkpoints, 1),
    ]
    for name, value, low in at_least:
        if value is not None and not low <= value < math.inf:
            raise UsageError(f"{name}: expected at least {low}, got {value}")
    if cfg.seed >= 2**63:
        raise UsageError(f"seed: expected a number below 2**63, got {cfg.seed}")
    if not 0 < cfg.eval.temperature < math.inf:
        raise UsageError(f"eval.temperature: expected a number above 0, got {cfg.eval.temperature}")
    below_one = [
        ("model.drop_path", cfg.model.drop_path),
        ("optim.betas", cfg.optim.betas[0]),
        ("optim.betas", cfg.optim.betas[1]),
        ("average.decay", cfg.average.decay),
        ("average.start", 0.0 if isinstance(cfg.average.start, str) else cfg.average.start),
    ]
    for name, value in below_one:
        if not 0 <= value < 1:
            raise UsageError(f"{name}: expected numbers from 0 to below 1, got {value}")
    shares = [
        ("data.val_fraction", cfg.data.val_fraction),
        ("data.max_bad_fraction", cfg.data.max_bad_fraction),
        ("loss.lambd", cfg.loss.lambd if cfg.loss.form == "convex" else 0.0),
        ("optim.warmup_fraction", cfg.optim.warmup_fraction),
        ("optim.final_lr_fraction", cfg.optim.final_lr_fraction),
    ]
    for name, value in shares:
        if not 0 <= value <= 1:
            raise UsageError(f"{name}: expected a number from 0 to 1, got {value}")
    if world_size % cfg.parallel.replicate:
        raise UsageError(
            f"parallel.replicate: {world_size} processes cannot be split evenly into "
            f"{cfg.parallel.replicate} groups; use a divisor of their number"
        )
    _validate_batch(cfg.data.batch_size, world_size)


def _validate_batch(batch_size: int, world_size: int) -> None:
    if batch_size % world_size:
        next_multiple = -(-batch_size // world_size) * world_size
        raise UsageError(
            f"data.batch_size: {batch_size} images cannot be split evenly over {world_size} processes; "
            f"use a multiple of {world_size}, for example --batch-size {next_multiple}"
        )
    if batch_size // world_size < 2:
        raise UsageError(
            f"data.batch_size: {batch_size} over {world_size} process(es) leaves {batch_size // world_size} "
            "image(s) for each, and BatchNorm and SIGReg take statistics over at least 2; "
            f"use --batch-size {2 * world_size} or more (rule of thumb: 256 or more in all)"
        )


def small_batch_warning(batch: int) -> str | None:
    """What to say about a global batch that is small for SIGReg; None if it is not.

    SIGReg compares the batch of all ranks with a Gaussian, so it is their sum that counts.
    """
    if batch >= SMALLEST_GOOD_BATCH:
        return None
    known = ", ".join(f"{accuracy} % with {images}" for images, accuracy in PUBLISHED.items())
    return (
        f"{batch} images over all GPUs are few for SIGReg, which judges the distribution of the whole batch; "
        f"rule of thumb: at least {SMALLEST_GOOD_BATCH} (linear accuracy of the paper's ViT-L: {known})"
    )


def total_steps(cfg: Config, steps_per_epoch: int) -> int:
    return cfg.max_steps if cfg.max_steps is not None else cfg.epochs * steps_per_epoch


def loader_workers(cfg: Config, processes_here: int, on_gpu: bool) -> int:
    """Worker processes of one training process: as set, else this machine's CPUs shared out.

    A CPU run leaves half of them to the training itself.
    """
    if cfg.data.workers is not None:
        return cfg.data.workers
    cpus = len(os.sched_getaffinity(0)) // max(1, processes_here)
    return max(1, min(16, cpus if on_gpu else cpus // 2))


def write(cfg: Config, folder: Path) -> None:
    """As `folder/config.json`. RunError where the disk refuses."""
    files.make_folder(folder)
    text = json.dumps(to_dict(cfg), indent=2) + "\n"
    path = folder / "config.json"
    files.write_atomically(path, lambda file: file.write(text.encode()), way_out="choose another --out")


def to_dict(cfg: Config) -> dict[str, Any]:
    """Plain dicts, lists and scalars: what JSON and `torch.load(weights_only=True)` accept."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(cfg))


def from_dict(values: dict[str, Any], where: str = "config") -> Config:
    """The inverse of `to_dict`. Missing keys keep their defaults; UsageError names an unknown or bad one."""
    return _build(Config, values, where)


def load_json(path: Path) -> Config:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config: cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--config: {path} is not JSON: {error}") from error
    return _build(Config, values, str(path))


def _run_name(cfg: Config) -> str:
    source = cfg.data.path.split(":")[1] if cfg.data.path.startswith("torchvision:") else cfg.data.path
    stem = Path(source).resolve().name if source != EMBEDDED_DATA else source
    return re.sub(r"[^A-Za-z0-9_.]+", "-", f"{stem}-{cfg.model.name}").strip("-.")


def _build(cls: type[C], values: Any, where: str) -> C:
    if not isinstance(values, dict):
        raise UsageError(f"{where}: expected an object with the fields of {cls.__name__}, got {values!r}")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(names)}"
            raise UsageError(f"{where}: unknown key {key!r}; {hint}")
    return cls(**{key: _convert(hints[key], value, f"{where}: {key}") for key, value in values.items()})


def _convert(hint: Any, value: Any, where: str) -> Any:
    """`value` from JSON as the annotated type, or UsageError."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint):
        return _build(typing.cast(type, hint), value, where)
    if origin in (typing.Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(option, value, where)
            except UsageError:
                continue
    elif origin is Literal:
        if value in arguments:
            return value
    elif origin is tuple:
        kinds = [a for a in arguments if a is not Ellipsis]
        if isinstance(value, (list, tuple)) and (Ellipsis in arguments or len(value) == len(kinds)):
            each = kinds * len(value) if Ellipsis in arguments else kinds
            return tuple(_convert(kind, item, where) for kind, item in zip(each, value, strict=True))
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float:
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            return float(value)
    elif hint is Path:
        if isinstance(value, str):
            return Path(value)
    elif isinstance(value, hint) and (hint is bool or not isinstance(value, bool)):
        return value
    readable = getattr(hint, "__name__", str(hint)) if origin is None else str(hint).replace("typing.", "")
    raise UsageError(f"{where}: expected {readable}, got {value!r}")
