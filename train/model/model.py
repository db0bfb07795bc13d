"""Encoder (any timm model) and projector, and how crops of two sizes run through them.

The encoder returns pooled features, (B, D); the projector maps them to the embeddings, (B, K), that the
loss sees. Downstream work uses the encoder alone.

Crops of one resolution go through the encoder in one call, so 2 global and 6 local crops cost two calls and
not eight. The projector runs once over all rows: its BatchNorm sees the same mixture of crops in training
whatever the number of resolutions.
"""

import contextlib
import copy
import json
import reprlib
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any, Literal

import timm
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from lejepa_fast.errors import UsageError, first_line
from lejepa_fast.train.config import Config, ModelConfig
from lejepa_fast.train.config.names import fixed_input_size, resolve_name
from lejepa_fast.train.model.masked import (
    ENCODER_DEFAULTS,
    MaskedModel,
    Predictor,
    check_masked_encoder,
    start_positions,
)
from lejepa_fast.train.model.strided_pointwise import avoid_strided_pointwise

# Arguments of timm.create_model that `model.kwargs` must not set, and what to do instead.
_FROM_SCRATCH = "the encoder starts from random weights, which is what the untrained baseline compares with"
_REFUSED = {
    "model_name": "use --model",
    "img_size": "use --model.img-size",
    "drop_path_rate": "use --model.drop-path",
    "reg_tokens": "use --model.register-tokens",
    **dict.fromkeys(("in_chans", "num_classes", "features_only", "dynamic_img_size"), "the trainer sets it"),
    **dict.fromkeys(("pretrained", "pretrained_cfg", "pretrained_cfg_overlay"), _FROM_SCRATCH),
    **dict.fromkeys(("checkpoint_path", "cache_dir"), _FROM_SCRATCH),
}


def build_encoder(options: ModelConfig, channels: int = 3) -> nn.Module:
    """Build a timm model without its classifier: (B, channels, S, S) -> pooled features (B, D).

    `options.img_size` is that of the position embeddings, for models that have them; transformers that can,
    interpolate them for other sizes. The encoder's attribute `encoder_args` holds the keyword arguments with
    which `timm.create_model` builds it again. UsageError for an unknown model, or one that does not take
    these options.
    """
    name, usual = resolve_name(options.name)
    kwargs: dict[str, Any] = {**usual, **parse_kwargs(options.kwargs), "num_classes": 0}
    if channels != 3:
        kwargs["in_chans"] = channels
    if options.drop_path:
        kwargs["drop_path_rate"] = options.drop_path
    if options.register_tokens:
        kwargs["reg_tokens"] = options.register_tokens
    variants: list[dict[str, Any]] = [kwargs]
    if options.img_size is not None and fixed_input_size(name):  # other models do not take img_size
        sized = {**kwargs, "img_size": options.img_size}
        variants = [{**sized, "dynamic_img_size": True}, sized]  # some interpolate, some do not
    refusal: TypeError | None = None
    for arguments in variants:
        try:
            encoder = timm.create_model(name, **arguments)
            avoid_strided_pointwise(encoder)
            encoder.encoder_args = {"model_name": name, **arguments}  # type: ignore[assignment]
            return encoder
        except TypeError as error:  # "... got an unexpected keyword argument ..."
            refusal = error
        except Exception as error:  # of timm's, about a value of model.kwargs
            problem = f"cannot be built with {arguments}: {type(error).__name__}: {first_line(error)}"
            raise UsageError(f"model {options.name}: {problem}") from error
    optional = {"drop-path": options.drop_path, "register-tokens": options.register_tokens}
    optional["kwargs"] = options.kwargs != ModelConfig.kwargs
    given = [f"--model.{name}" for name, value in optional.items() if value]
    way_out = f"leave out {' or '.join(given)}" if given else "choose another model"
    raise UsageError(
        f"model {options.name}: does not take these options ({first_line(refusal)}); {way_out}"
    ) from refusal


def parse_kwargs(text: str) -> dict[str, Any]:
    """Parse the JSON object of `model.kwargs`; UsageError for anything else."""
    try:
        values = json.loads(text, parse_int=_modest)
    except (ValueError, RecursionError) as error:
        raise UsageError(
            f"model.kwargs: expected a JSON object, got {reprlib.repr(text)} ({error})"
        ) from error
    if not isinstance(values, dict):
        raise UsageError(f"model.kwargs: expected a JSON object, got {reprlib.repr(text)}")
    for key in values:
        if key in _REFUSED:
            raise UsageError(f"model.kwargs: {key!r} cannot be given here; {_REFUSED[key]}")
    return values


def _modest(digits: str) -> int:
    """Refuse a number of which the machine's memory could not make layers."""
    if len(digits) > 6:
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def build_projector(features: int, options: ModelConfig) -> nn.Sequential:
    """Build linear layers, with norm and ReLU after all but the last: (B, features) -> (B, K)."""
    norm = {"batch": nn.BatchNorm1d, "layer": nn.LayerNorm, "none": nn.Identity}[options.projector_norm]
    bias = options.projector_norm != "batch"  # BatchNorm subtracts it
    stack: list[nn.Module] = []
    width, hidden = features, options.projector_hidden
    for _ in range(options.projector_layers - 1):
        stack += [nn.Linear(width, hidden, bias=bias), norm(hidden), nn.ReLU()]
        width = hidden
    return nn.Sequential(*stack, nn.Linear(width, options.projector_dim))


class LeJEPAModel(nn.Module):
    """Encoder and projector under one forward, so that DDP sees one call per step.

    The first `num_global` views are global crops.
    """

    def __init__(self, encoder: nn.Module, projector: nn.Module, *, num_global: int):
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.num_global = num_global

    def forward(self, views: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """V views (N, C, S, S), globals first -> embeddings (Vg, N, K) and (V, N, K)."""
        sizes = groupby(views, key=lambda view: view.shape)
        features = [self.encoder(torch.cat(list(same_size))) for _, same_size in sizes]
        all_z = self.projector(torch.cat(features)).unflatten(0, (len(views), -1))
        return all_z[: self.num_global], all_z

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images (B, C, S, S) -> features (B, D) and embeddings (B, K)."""
        features = self.encoder(images)
        return features, self.projector(features)

    def project(self, features: Tensor, patches: Tensor) -> Tensor:
        """Features (B, D) of images, and of their patches (B, P, D) -> embeddings (B, K)."""
        return self.projector(features)


class PatchwiseModel(LeJEPAModel):
    """Encoder and projector of masked LeJEPA: the projector embeds patches, and the embedding of an image is
    their mean."""

    encoder: VisionTransformer

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor]:
        tokens = self.encoder.forward_features(images)
        features = self.encoder.forward_head(tokens)
        return features, self.project(features, tokens[:, self.encoder.num_prefix_tokens :])

    def project(self, features: Tensor, patches: Tensor) -> Tensor:
        return self.projector(patches.flatten(0, 1)).unflatten(0, patches.shape[:2]).mean(dim=1)


TrainedModule = LeJEPAModel | MaskedModel


def evaluated(model: TrainedModule, which: Literal["target", "context"] = "target") -> LeJEPAModel:
    """The part of a model that is evaluated and exported, which shares its weights: with a target encoder
    that one, unless `which` is "context"."""
    if isinstance(model, LeJEPAModel):
        return model
    if model.target is None:
        return PatchwiseModel(model.encoder, model.projector, num_global=1)
    return LeJEPAModel(model.encoder if which == "context" else model.target, model.projector, num_global=1)


def build_model(cfg: Config, *, meta: bool = False) -> TrainedModule:
    """Build the model of a run on the CPU; its weights depend on `cfg.seed` alone.

    With `meta` it is on the meta device, without memory and weights, for `parallelize`. UsageError for an
    unknown model, options that it does not have, or crop sizes that it cannot take.
    """
    if not meta:
        return _build_model(cfg)
    try:
        with torch.device("meta"):
            return _build_model(cfg)
    except UsageError:  # wrong usage, or a model that computes with values while it is built
        return _build_model(cfg).to("meta")


def _build_model(cfg: Config) -> TrainedModule:
    options = replace(cfg.model, img_size=cfg.model.img_size or cfg.crops.global_size)
    if cfg.objective != "lejepa":
        return _build_masked(cfg, options)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg.seed)  # torch.manual_seed would touch the GPUs' as well
        encoder = build_encoder(options, cfg.data.channels)
        projector = build_projector(_check_sizes(encoder, cfg), options)
    return LeJEPAModel(encoder, projector, num_global=cfg.crops.global_crops)


def _build_masked(cfg: Config, options: ModelConfig) -> MaskedModel:
    options = replace(options, kwargs=json.dumps(ENCODER_DEFAULTS | parse_kwargs(options.kwargs)))
    ijepa = cfg.objective == "ijepa"

    def encoder_of() -> VisionTransformer:
        try:
            return check_masked_encoder(build_encoder(options, cfg.data.channels), cfg.model.name)
        except UsageError:  # for a model that is no vision transformer: of options that it was not given
            check_masked_encoder(build_encoder(cfg.model, cfg.data.channels), cfg.model.name)
            raise

    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg.seed)
        encoder = encoder_of()
        start_positions(encoder)
        features = _check_sizes(encoder, cfg)
        projector = nn.Identity() if ijepa else build_projector(features, options)
        out = features if ijepa else options.projector_dim
        height, width = encoder.patch_embed.dynamic_feat_size((cfg.crops.global_size,) * 2)
        predictor = Predictor(features, out, (int(height), int(width)), cfg.masked)
        target = encoder_of() if ijepa else None
    # Stochastic depth draws a number for each sequence, which packed rows are not.
    return MaskedModel(encoder, projector, predictor, target, cfg.masked, packed=not options.drop_path)


def _check_sizes(encoder: nn.Module, cfg: Config) -> int:
    """Run the encoder on every input size of the run and return D.

    UsageError names the size that fails, and the nearest one that a forward pass succeeds with.
    """
    sizes = {"crops.global_size": cfg.crops.global_size}
    if cfg.crops.local_crops:
        sizes["crops.local_size"] = cfg.crops.local_size
    if cfg.eval.image_size:
        sizes["eval.image_size"] = cfg.eval.image_size
    encoder.eval()
    # For a copy without memory: `torch.func.functional_call` leaves its tensors in modules that a model has
    # twice.
    on_meta = {id(tensor): tensor.to("meta") for tensor in (*encoder.parameters(), *encoder.buffers())}
    for field, size in sizes.items():
        try:
            with torch.no_grad():
                try:
                    image = torch.empty(1, cfg.data.channels, size, size, device="meta")
                    shape = copy.deepcopy(encoder, on_meta.copy())(image).shape
                except Exception:
                    # A wrong size, or a layer that the meta device lacks: the real forward tells which.
                    shape = encoder(torch.zeros(1, cfg.data.channels, size, size)).shape
        except Exception as error:  # of timm's, or of PyTorch's operators
            problem = f"cannot take {size} x {size} pixels ({first_line(error)})"
            blamed, hint = _size_hint(cfg, field, size)
            raise UsageError(f"{blamed}: model {cfg.model.name} {problem}; {hint}") from error
        if len(shape) != 2:
            raise UsageError(
                f"model.name: {cfg.model.name} returns {tuple(shape)} for one image and not pooled features "
                "(1, D); choose a model with a pooling head"
            )
    encoder.train()
    return shape[1]


def encoder_on_meta(cfg: Config, global_size: int) -> nn.Module | None:
    """The encoder of a run with global crops of this size, on the meta device, if it can be built."""
    with contextlib.suppress(Exception), torch.device("meta"):
        options = replace(cfg.model, img_size=cfg.model.img_size or global_size)
        return build_encoder(options, cfg.data.channels).eval()
    return None


@torch.no_grad()
def takes(encoder: nn.Module | None, size: int) -> bool:
    """Whether a forward pass of an encoder on the meta device succeeds on an image of this size."""
    with contextlib.suppress(Exception), torch.device("meta"):
        arguments: Any = getattr(encoder, "encoder_args", {})
        image = torch.empty(1, arguments.get("in_chans", 3), size, size)
        return encoder is not None and encoder(image).ndim == 2
    return False


def sizes_near(encoder: Any, size: int, *others: int) -> list[int]:
    """Sizes worth trying, nearest first: multiples of the patch and of 32, the model's own, and others."""
    patch = getattr(getattr(encoder, "patch_embed", None), "patch_size", None)
    step = patch[0] if isinstance(patch, (tuple, list)) else patch
    near = {k * each + size // each * each for each in (step or 32, 32) for k in range(-8, 9)}
    near |= {size, *others, *(encoder.pretrained_cfg["input_size"][1:] if encoder else ())}
    return sorted((each for each in near if each > 0), key=lambda each: (abs(each - size), each))


def _size_hint(cfg: Config, field: str, size: int) -> tuple[str, str]:
    """The option to blame, and the nearest size that the encoder takes, of some that are tried."""
    encoder = encoder_on_meta(cfg, cfg.crops.global_size)
    for candidate in sizes_near(encoder, size, cfg.crops.global_size, 224):
        if field == "crops.global_size":  # the weights may depend on it
            encoder = encoder_on_meta(cfg, candidate)
        if takes(encoder, candidate):
            return field, f"use --{field.replace('_', '-')} {candidate}, which it takes"
    none = "none of the sizes tried near it works"
    if cfg.model.kwargs != ModelConfig.kwargs:
        return "model.kwargs", f"{none}; leave out --model.kwargs or use another model"
    other = "--crops.local-crops 0 or " if field == "crops.local_size" else ""
    return field, f"{none}; use {other}another model"
