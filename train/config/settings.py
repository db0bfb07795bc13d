"""The configuration of a run: nested dataclasses, filled from a preset or a JSON file and the command line.

Types and bounds are declared at the fields (`Annotated[int, Ge(1)]`); pydantic checks them.
"""

import dataclasses
import json
import math
import os
import re
import reprlib
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from annotated_types import Ge, Gt, Le, Lt

from lejepa_fast.data.recipe import Area, Finite, MultiCropRecipe, Pixels
from lejepa_fast.data.validation import check_bounds, validated
from lejepa_fast.errors import UsageError
from lejepa_fast.train.config.names import default_weight_decay
from lejepa_fast.train.runtime import files

EMBEDDED_DATA = "trashnet96"
# The export adds these to a run's config.json, for timm.
TIMM_KEYS = ("architecture", "num_classes", "model_args", "pretrained_cfg", "trained_with")

C = TypeVar("C", bound="Config")

AtLeast0 = Annotated[int, Ge(0), Lt(2**31)]
AtLeast1 = Annotated[int, Ge(1), Lt(2**31)]
# What memory or processes are made of at the start; a typing error must not exhaust the machine.
Workers = Annotated[int, Ge(0), Le(1024)]
Batches = Annotated[int, Ge(1), Le(1024)]
Layers = Annotated[int, Ge(1), Le(100)]
Width = Annotated[int, Ge(1), Le(100_000)]
Share = Annotated[float, Ge(0), Le(1)]
BelowOne = Annotated[float, Ge(0), Lt(1)]
# Below infinity: NaN and infinity are refused.
Nonnegative = Annotated[float, Ge(0), Lt(math.inf)]
Positive = Annotated[float, Gt(0), Lt(math.inf)]


@dataclass(frozen=True)
class DataConfig:
    """Images: where they are, how many per step, and how they are loaded."""

    path: Annotated[str, tyro.conf.arg(aliases=["--data"])] = EMBEDDED_DATA
    """Embedded set `trashnet96`, a folder of images or of class folders, a folder of .tar shards, or
    torchvision:NAME:FOLDER."""
    batch_size: Annotated[AtLeast1, tyro.conf.arg(aliases=["--batch-size", "--batch"])] = 512
    """Images per step over ALL processes; a multiple of their number."""
    val_fraction: Share = 0.1
    """Share of each class held out for evaluation where the data has no val split of its own; 0: none, which
    needs --eval.data."""
    bit_depth: Literal["auto", "8", "12", "16", "percentile"] = "auto"
    """White of images with more than 8 bits, the same for all: 8, 12 or 16 bits; auto: the bits that hold the
    largest value of 64 images; percentile: black and white at their 0.1th and 99.9th percentile."""
    value_range: tuple[Finite, Finite] | None = None
    """Values of black and white of images with more than 8 bits; None: by bit_depth. Stored in the run."""
    channels: Annotated[int, Ge(1), Le(16)] = 3
    """Channels of the images. 1: gray. 3: RGB. Others: those of the file, or pages of a TIFF. All but 3 leave
    out operations on colors, have crops.mean 0.5 and crops.std 0.25, and need the backend cpu."""
    slices: Literal["first", "random", "all"] = "first"
    """Of files that hold several images, such as TIFF stacks: the first; a random one in each epoch; or all,
    each as an image of its own."""
    workers: Workers | None = None
    """Loader threads of each training process; 0: with the backend torchvision, load in the thread of the
    training, else one thread. None: by CPU count."""
    backend: Literal["auto", "dali", "cpu", "torchvision"] = "auto"
    """What decodes and augments. auto: dali on a GPU where it is installed, else cpu where Numba is, else
    torchvision."""
    prefetch: Batches = 2
    """Batches that are made ahead of the training. Each costs memory."""
    hw_decoder_load: Share = 0.65
    """Share of JPEGs for the hardware decoder of a GPU, where DALI decodes there; 0: all go to CUDA."""
    max_bad_fraction: Share = 0.05
    """Unreadable images are listed in RUN/bad_images.txt and replaced; more than this share stops the run."""


@dataclass(frozen=True)
class ModelConfig:
    """Encoder and projector."""

    name: Annotated[str, tyro.conf.arg(aliases=["--model"])] = "vit_small"
    """Any timm model, or vit_tiny|small|base|large|huge|giant|gigantic (patch 14)."""
    img_size: Pixels | None = None
    """Image size of the position embeddings, for models that have them; None: crops.global_size."""
    drop_path: BelowOne = 0.0
    """Stochastic depth rate of the last block (models that offer it)."""
    register_tokens: Annotated[int, Ge(0), Le(1000)] = 0
    """Extra learned tokens (vision transformers)."""
    kwargs: str = "{}"
    """Further arguments of timm.create_model as a JSON object, for example '{"layers": [1, 1, 1, 1]}'. Those
    of a preset or --config go when --model names another model."""
    projector_hidden: Width = 2048
    """Width of the projector between its layers."""
    projector_layers: Layers = 3
    """Linear layers of the projector, the output layer included."""
    projector_dim: Width = 512
    """K, the width of the embeddings that the loss sees."""
    projector_norm: Literal["batch", "layer", "none"] = "batch"
    """Norm after each layer of the projector but the last: BatchNorm, LayerNorm or none."""


@dataclass(frozen=True)
class LossConfig:
    """LeJEPA's loss: prediction and SIGReg."""

    lambd: Annotated[Nonnegative, tyro.conf.arg(aliases=["--lambda"])] = 0.05
    """Weight of SIGReg; 0 trains the prediction alone, which collapses."""
    num_slices: Annotated[int, Ge(1), Le(2**20)] = 1024
    """Random directions that SIGReg projects on, new ones each step."""
    t_max: float = 3.0
    """SIGReg compares characteristic functions up to this argument."""
    n_points: Annotated[int, Le(10_000)] = 17
    """Knots on the half line [0, t_max]."""
    unbiased: bool = False
    """Remove the bias of SIGReg that a small batch has; a Gaussian then gives 0 on average."""
    center: Literal["global", "all"] = "global"
    """What all views are drawn to: the mean of the global views of an image, or of all its views."""
    center_from: Literal["views", "average"] = "views"
    """Which weights embed the views for that mean. views: those that train, with a gradient; average: those
    of --average, without one: the paper's variant for transformers, for one more forward pass."""
    form: Literal["convex", "additive"] = "convex"
    """convex: (1 - lambda) prediction + lambda SIGReg; additive: prediction + lambda SIGReg."""
    distance: Literal["smooth_l1", "l2"] = "smooth_l1"
    """In masked prediction: smooth L1, as in the authors' code of I-JEPA, or the squared difference."""
    sigreg_over: Literal["image", "position", "token"] = "position"
    """With --objective masked-lejepa, the samples of SIGReg: the mean embedding of each image; the images at
    each position of the grid; or all patches of all images as one sample."""
    impl: Literal["auto", "triton", "torch", "reference"] = "auto"
    """What computes SIGReg. auto: the Triton kernels on GPUs where they can run, else PyTorch."""


@dataclass(frozen=True)
class MaskedConfig:
    """Masked prediction, with --objective ijepa and masked-lejepa: masks, predictor, target encoder."""

    targets: Annotated[int, Ge(1), Le(64)] = 4
    """Target blocks of an image."""
    target_area: tuple[Area, Area] = (0.15, 0.2)
    """Lowest and highest share of the image's patches in a target block."""
    target_aspect: tuple[Positive, Positive] = (0.75, 1.5)
    """Lowest and highest height / width of a target block."""
    context_area: tuple[Area, Area] = (0.85, 1.0)
    """Lowest and highest share of the context block, before the targets are taken out of it."""
    min_keep: AtLeast1 = 10
    """Context patches that stay, at least."""
    predictor_width: Width = 384
    """Width of the predictor."""
    predictor_depth: Layers = 6
    """Blocks of the predictor; the paper has 12 for ViT-L and ViT-H."""
    predictor_heads: Annotated[int, Ge(1), Le(1000)] = 12
    """Attention heads of the predictor."""
    momentum: Share = 0.996
    """Share of its weights that the target encoder of I-JEPA keeps at the first step."""
    final_momentum: Share = 1.0
    """The same at the end; in between it changes linearly."""


@dataclass(frozen=True)
class OptimConfig:
    """AdamW, its schedule and its limits."""

    lr: Annotated[Nonnegative, tyro.conf.arg(aliases=["--lr"])] = 5e-4
    """Peak learning rate of AdamW; it is not scaled with the batch."""
    weight_decay: Nonnegative | Literal["auto"] = "auto"
    """auto: 5e-2 for transformers and ConvNeXt, 5e-4 for other convolutional networks."""
    final_weight_decay: Nonnegative | None = None
    """Weight decay at the end, reached on half a cosine over all steps; None: it stays."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """Decay of AdamW's averages of the gradient and of its square."""
    warmup_fraction: Share = 0.05
    """Share of all steps during which the rate rises linearly."""
    start_lr_fraction: Share = 0.0
    """The rise begins at this share of the peak rate."""
    final_lr_fraction: Share = 1e-3
    """The cosine ends at this share of the peak rate."""
    clip_grad_norm: Nonnegative = 0.0
    """Largest norm of the gradient over all parameters; 0: no clipping."""
    skip_grad_norm: Nonnegative = 0.0
    """A step with a larger norm of the gradient, before clipping, is skipped; 0: none is."""


@dataclass(frozen=True)
class ParallelConfig:
    """How processes share a model, and what is computed twice to save memory."""

    strategy: Literal["auto", "none", "ddp", "fsdp"] = "auto"
    """How processes share the model. auto: without torchrun none; with it, FSDP2 from half a billion
    parameters, or where --parallel.replicate asks for groups, and DDP below."""
    replicate: AtLeast1 = 1
    """Groups of processes that each hold the whole model under FSDP2 (HSDP); divides their number."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again, block by block. selective: everything but attention and every
    second matrix product; full: everything."""


@dataclass(frozen=True)
class AverageConfig:
    """Averaged weights."""

    kind: Annotated[Literal["none", "ema", "swa"], tyro.conf.arg(aliases=["--average"])] = "none"
    """Average of the weights over the steps, which is then what is evaluated and exported. ema: exponential
    moving average; swa: plain mean. 4 bytes a parameter, sharded as the weights are."""
    decay: BelowOne = 0.999
    """Share of the ema that each step keeps."""
    start: BelowOne | Literal["auto"] = "auto"
    """Averaging begins after this share of all steps. auto: 0 for ema, 0.75 for swa."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluations during and after the training."""

    every: AtLeast0 = 10
    """Epochs between evaluations during training (kNN, linear probe); 0: only at the end."""
    linear_steps: AtLeast0 = 200
    """Steps of the linear probe during training, 0: none; at the end it gets its full length."""
    linear_blocks: AtLeast1 = 2
    """Last blocks of a vision transformer that the linear probe sees side by side, all if there are fewer;
    I-JEPA's authors also take 4."""
    train_images: AtLeast0 = 100_000
    """Training images for evaluations during training, at most, drawn at random; 0: all, as at the end."""
    image_size: Pixels | None = None
    """Side of the evaluated images; None: crops.global_size."""
    batch_size: AtLeast1 = 256
    """Images per forward pass of an evaluation; the figures do not depend on it."""
    k: Annotated[int, Ge(1), Le(10_000)] = 20
    """Neighbors that vote in kNN."""
    temperature: Positive = 0.07
    """A neighbor of similarity s votes with weight exp(s / temperature)."""
    data: str | None = None
    """Other images to evaluate on, such as a few with labels, in any form of --data; None: data.path."""
    val_fraction: Share | None = None
    """Share of each class of eval.data that is held out, where it has no val split of its own; the probes are
    fitted on the others. None: a half; of the data of the training, what is held out there, if any."""
    labels: Path | None = None
    """CSV file with a column `file` and a column `label` or `value`: classes or numbers of the images."""
    labels_are: Literal["auto", "classes", "numbers"] = "auto"
    """What the labels of the CSV file are. auto: numbers if all of them can be read as such."""
    few_shot: str = ""
    """Labels per class for probes at the end, such as 1,10,100,all; of numbers, labels in all."""
    draws: Annotated[int, Ge(1), Le(1000)] = 3
    """Random draws of the labels for each number of them."""
    fine_tune: AtLeast0 = 0
    """Epochs of fine-tuning the whole encoder with labels, at the end; 0: none."""
    backbone: tuple[str, ...] = ()
    """Further encoders for the table at the end: timm's names, for weights of the Hugging Face hub or its
    cache, NAME:FILE, or NAME:untrained for random weights."""


@dataclass(frozen=True)
class Config:
    """A training run; `resolve` fills in what depends on other fields, `validate` checks it."""

    __pydantic_config__: typing.ClassVar = {"extra": "forbid", "strict": True}

    data: DataConfig = field(default_factory=DataConfig)
    crops: MultiCropRecipe = field(default_factory=MultiCropRecipe)
    model: ModelConfig = field(default_factory=ModelConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    masked: MaskedConfig = field(default_factory=MaskedConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    average: AverageConfig = field(default_factory=AverageConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    objective: Literal["lejepa", "ijepa", "masked-lejepa"] = "lejepa"
    """lejepa: the views of an image predict their mean, with SIGReg. ijepa: predict from a part of an image
    the features of the rest, which a moving average of the encoder gives. masked-lejepa, for research: the
    same with one encoder, and SIGReg in place of the average."""
    out: Path | None = None
    """Run folder; None: runs/DATA-MODEL."""
    epochs: AtLeast1 = 100
    """Passes over the training images."""
    max_steps: AtLeast1 | None = None
    """Train this many steps, and let the schedule span them; None: `epochs` epochs."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 0
    """Seed of starting weights, order of images, crops and directions."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train. auto: on GPUs if there are any."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """auto: bf16 autocast on GPUs, float32 on the CPU. The loss is float32 always."""
    compile: Literal["auto", "on", "off"] = "auto"
    """torch.compile of each block of the encoder. auto: on GPUs, where it pays for its minutes."""
    resume: str = "auto"
    """auto: continue from the newest readable checkpoint of the run folder, if any; none: start anew;
    PATH: a checkpoint or another run folder."""
    log_every: AtLeast1 = 10
    """Steps between rows of metrics.jsonl; only then do metrics leave the device."""
    checkpoint_every: AtLeast1 = 1000
    """Steps between checkpoints; one is always written at the end and on SIGTERM or Ctrl-C."""
    keep_checkpoints: AtLeast1 = 3
    """Newest checkpoints that are kept; older ones are deleted."""
    tensorboard: bool = True
    """Write the numbers of metrics.jsonl to RUN/tensorboard/ as well."""
    wandb: str | None = None
    """Weights & Biases project that gets the numbers, too; None: nothing is sent anywhere."""
    profile: bool = False
    """Record a few steps after the first ones: profiler trace and memory snapshot in RUN/profile/."""


def resolve(cfg: C) -> C:
    """Fill in what depends on other fields, so that config.json records what ran."""
    optim, average, out = cfg.optim, cfg.average, cfg.out
    if optim.weight_decay == "auto":
        optim = dataclasses.replace(optim, weight_decay=default_weight_decay(cfg.model.name))
    if average.start == "auto":
        average = dataclasses.replace(average, start=0.75 if average.kind == "swa" else 0.0)
    if out is None:
        path = cfg.data.path.split(":")[1] if cfg.data.path.startswith("torchvision:") else cfg.data.path
        name = f"{Path(path).resolve().name}-{cfg.model.name}"
        out = Path("runs") / re.sub(r"[^A-Za-z0-9_.]+", "-", name).strip("-.")
    crops = cfg.crops.for_channels(cfg.data.channels)
    return dataclasses.replace(cfg, optim=optim, average=average, out=out, crops=crops)


def validate(cfg: Config, world_size: int = 1) -> None:
    """Raise UsageError for a bad type or bound, or what does not fit several fields or the processes."""
    check_bounds(cfg)
    cfg.crops.validate()
    for option, path in (("out", cfg.out or ""), ("data.path", cfg.data.path)):
        if any(len(name.encode()) > 255 for name in Path(path).parts):
            raise UsageError(f"{option}: expected names of at most 255 bytes, got {reprlib.repr(str(path))}")
    if cfg.loss.form == "convex" and cfg.loss.lambd > 1:
        raise UsageError(
            f"loss.lambd: expected a number from 0 to 1 with loss.form convex, got {cfg.loss.lambd}"
        )
    if cfg.data.value_range is not None and not cfg.data.value_range[0] < cfg.data.value_range[1]:
        raise UsageError(f"data.value_range: expected black < white, got {cfg.data.value_range}")
    shots(cfg.eval.few_shot)
    if cfg.loss.center_from == "average" and cfg.objective != "lejepa":
        raise UsageError(f"loss.center_from: expected views with --objective {cfg.objective}, got average")
    if cfg.loss.center_from == "average" and cfg.average.kind == "none":
        raise UsageError("loss.center_from: expected views without --average ema or swa, got average")
    views = cfg.crops.global_crops, cfg.crops.local_crops
    if cfg.objective != "lejepa" and views != (1, 0):
        raise UsageError(
            f"crops: {cfg.objective} takes one global view of an image, got {views[0]} global and {views[1]} "
            "local; use --preset ijepa-vit-b, or --crops.global-crops 1 --crops.local-crops 0"
        )
    for name in ("target_area", "target_aspect", "context_area") if cfg.objective != "lejepa" else ():
        low, high = getattr(cfg.masked, name)
        if low > high:
            raise UsageError(f"masked.{name}: expected (lowest, highest), got {(low, high)}")
    if cfg.objective == "lejepa" and sum(views) < 2:
        raise UsageError(
            "crops: lejepa predicts the views of an image from each other, got 1 view; use "
            "--crops.global-crops 2, or --objective ijepa"
        )
    groups, images = cfg.parallel.replicate, cfg.data.batch_size
    if world_size % groups:
        raise UsageError(
            f"parallel.replicate: {world_size} processes cannot be split evenly into {groups} groups; "
            "use a divisor of their number"
        )
    if images % world_size:
        raise UsageError(
            f"data.batch_size: {images} images cannot be split evenly over {world_size} processes; use a "
            f"multiple of {world_size}, for example --batch-size {-(-images // world_size) * world_size}"
        )
    if images // world_size < 2:
        raise UsageError(
            f"data.batch_size: {images} over {world_size} process(es) leaves {images // world_size} "
            "image(s) for each, and BatchNorm and SIGReg take statistics over at least 2; "
            f"use --batch-size {2 * world_size} or more (rule of thumb: 256 or more in all)"
        )


def shots(text: str) -> list[int | None]:
    """Parse `eval.few_shot`: numbers of labels per class, None for "all"; UsageError for anything else."""
    words = [word.strip() for word in text.split(",")] if text.strip() else []
    if not all(re.fullmatch("all|[1-9][0-9]{0,8}", word) for word in words):
        raise UsageError(f"eval.few_shot: expected numbers from 1 and 'all', as in 1,10,all, got {text!r}")
    return [None if word == "all" else int(word) for word in dict.fromkeys(words)]


def small_batch_warning(batch: int) -> str | None:
    """Return a warning if a global batch, the sum over ranks, is small for SIGReg, else None."""
    few = f"{batch} images over all GPUs are few for SIGReg, which compares them with a Gaussian"
    figures = "linear accuracy of the paper's ViT-L: 72.2 % with 128, 74.15 % with 256"
    return f"{few}; use 256 or more ({figures})" if batch < 256 else None


def total_steps(cfg: Config, steps_per_epoch: int) -> int:
    """Return the steps of the whole run."""
    return cfg.max_steps if cfg.max_steps is not None else cfg.epochs * steps_per_epoch


def loader_workers(cfg: Config, processes_here: int, on_gpu: bool) -> int:
    """Return the loader workers of one training process: as set, else its share of this machine's CPUs.

    A CPU run leaves half of them to the training itself.
    """
    if cfg.data.workers is not None:
        return cfg.data.workers
    cpus = len(os.sched_getaffinity(0)) // max(1, processes_here)
    return max(1, min(16, cpus if on_gpu else cpus // 2))


def write(cfg: Config, folder: Path) -> None:
    """Write `folder/config.json`; RunError if it cannot be written."""
    files.write_json(folder / "config.json", to_dict(cfg), way_out="choose another --out")


def to_dict(cfg: Config) -> dict[str, Any]:
    """Return plain dicts, lists and scalars: what JSON and `torch.load(weights_only=True)` accept."""
    import pydantic

    return pydantic.TypeAdapter(type(cfg)).dump_python(cfg, mode="json", warnings=False)


def flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a configuration by their dotted names, such as "loss.lambd"."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found |= {f"{name}.{key}": each for key, each in value.items()}
        else:
            found[name] = value
    return found


def load_json(path: Path) -> Config:
    """Read a config.json; UsageError for an unreadable file, an unknown key or a bad value."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config: cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"--config: {path} is not JSON: {error}") from error
    if isinstance(values, dict):
        values = {key: value for key, value in values.items() if key not in TIMM_KEYS}
    return from_dict(values, str(path))


def from_dict(values: Any, where: str = "config") -> Config:
    """Invert `to_dict`; missing keys keep their defaults. `where` begins the message of a UsageError."""
    return validated(Config, values, f"{where}: ")
