"""Backbones of others with their trained weights, evaluated by the protocol of our encoders.

A backbone is any timm model. Its weights come from a file, from the cache of the Hugging Face hub or from the
hub itself; or it stays untrained, as a baseline. It gets its own normalization, and the image size nearest to
the one asked for that it takes.
"""

import contextlib
import math
import pickle
import re
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import safetensors
import safetensors.torch
import timm
import torch
from torch import Tensor, nn

from lejepa_fast.data import ImageSource
from lejepa_fast.errors import RunError, UsageError, first_line
from lejepa_fast.train.config import Config, ModelConfig
from lejepa_fast.train.evaluation.protocol import EvalResult, evaluate_model
from lejepa_fast.train.model.model import LeJEPAModel, build_encoder, takes
from lejepa_fast.train.model.strided_pointwise import avoid_strided_pointwise

UNTRAINED = "untrained"
# What the hub has of a model, in the order of preference.
_HUB_FILES = ("model.safetensors", "pytorch_model.bin")
# Where training scripts put the weights inside a file.
_NESTED = ("state_dict", "model", "model_state_dict", "state_dict_ema", "model_ema")


@dataclass(frozen=True)
class Backbone:
    """A timm model with its weights, on the CPU."""

    name: str
    model: LeJEPAModel
    """The encoder, and the identity for a projector."""
    image_size: int
    """Side of the images that it is evaluated on, in pixels."""
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: str
    """The file that was given, "hub" or "untrained"."""

    @property
    def parameters(self) -> int:
        """Parameters of the encoder."""
        return sum(parameter.numel() for parameter in self.model.parameters())


def load_backbones(cfg: Config, image_size: int | Literal["own"] | None = None) -> dict[str, Backbone]:
    """Load those of `cfg.eval.backbone`, `NAME`, `NAME:FILE` or `NAME:untrained` each; see `load_backbone`.

    The image size is that of the evaluation, unless one is given. The keys are the names, or the whole texts
    where a name is given twice or stays untrained. UsageError for a text twice.
    """
    names, size = cfg.eval.backbone, image_size or cfg.eval.image_size or cfg.crops.global_size
    if len(set(names)) < len(names):
        raise UsageError(f"--eval.backbone: expected each backbone once, got {' '.join(names)}")
    only = [name.partition(":")[0] for name in names]
    keys = [
        text if only.count(name) > 1 or text == f"{name}:{UNTRAINED}" else name
        for text, name in zip(names, only, strict=True)
    ]
    return {
        key: load_backbone(text, image_size=size, channels=cfg.data.channels, seed=cfg.seed)
        for key, text in zip(keys, names, strict=True)
    }


def load_backbone(
    text: str, *, image_size: int | Literal["own"], channels: int = 3, seed: int = 0
) -> Backbone:
    """Load a timm model with trained weights, or build it without.

    Args:
        text: timm's name, for the weights of the hub or its cache, `NAME:FILE` for those of a file
            (safetensors, or one that `torch.load(weights_only=True)` reads), or `NAME:untrained` for random
            weights.
        image_size: side of the images in pixels. A model that cannot take it gets the next larger size that
            fits its patches, or its own size. "own": the size that timm records for it.
        channels: of the images. Unless 3, timm adapts the first layer, and all channels are normalized by the
            average of the model's means and deviations.
        seed: of random weights.

    Raises:
        UsageError: no such model, no such weights, weights of another model, or no network and no cache.
    """
    name, _, file = text.partition(":")
    if name in ("hf-hub", "hf_hub", "local-dir"):
        forms = "NAME for timm's weights on the hub, or NAME:FILE, such as resnet18:FOLDER/model.safetensors"
        raise UsageError(
            f"--eval.backbone: expected a model's name, got the prefix {name}: in {text}; give {forms}"
        )
    candidates = _sizes(name, image_size, channels)
    known: Any = candidates[0][1].pretrained_cfg
    mean, std = tuple(known["mean"]), tuple(known["std"])
    if channels != 3:
        mean, std = ((sum(values) / len(values),) * channels for values in (mean, std))

    def backbone(encoder: nn.Module, size: int) -> Backbone:
        model = LeJEPAModel(encoder, nn.Identity(), num_global=1)
        return Backbone(name, model, size, mean, std, file or "hub")

    if file == UNTRAINED:
        return backbone(_with_random_weights(candidates[0][1], seed), candidates[0][0])
    path = Path(file) if file else _hub_file(name, known)
    state, refusals = read_weights(path), []
    for size, empty in candidates:
        try:
            return backbone(_with_weights(empty, state), size)
        except Exception as error:  # of PyTorch, or of timm's conversion of older files
            refusals.append(error)
    problem = _in_short(refusals[-1])
    raise UsageError(
        f"--eval.backbone: {path} does not hold the weights of {name} ({problem})"
    ) from refusals[-1]


def evaluate_backbone(
    backbone: Backbone,
    train_source: ImageSource,
    val_source: ImageSource,
    cfg: Config,
    *,
    device: torch.device,
    **options: Any,
) -> EvalResult:
    """Evaluate a backbone by `evaluate_model`, at its image size and with its normalization.

    `cfg` and `options` are those of `evaluate_model`; the model leaves the device afterwards. BatchNorm of an
    untrained one is calibrated, as that of our untrained encoder. A RunError names the backbone and its
    weights.
    """
    own = replace(
        cfg,
        crops=replace(cfg.crops, mean=backbone.mean, std=backbone.std),
        eval=replace(cfg.eval, image_size=backbone.image_size),
    )
    model = backbone.model.to(device)
    try:
        options["calibrate"] = backbone.weights == UNTRAINED
        result = evaluate_model(model, train_source, val_source, own, device=device, **options)
    except RunError as error:
        raise RunError(f"backbone {backbone.name} (weights: {backbone.weights}): {error}") from error
    finally:
        model.cpu()
    return replace(result, weights=backbone.weights, parameters=backbone.parameters)


def evaluate_backbones(
    backbones: Mapping[str, Backbone],
    train_source: ImageSource,
    val_source: ImageSource,
    cfg: Config,
    **options: Any,
) -> Iterator[tuple[str, EvalResult]]:
    """Evaluate one after another by `evaluate_backbone`, and yield name and result; stderr names each."""
    for name, backbone in backbones.items():
        print(f"evaluating {name} on {backbone.image_size} px", file=sys.stderr)
        yield name, evaluate_backbone(backbone, train_source, val_source, cfg, **options)


def _sizes(name: str, image_size: int | Literal["own"], channels: int) -> list[tuple[int, nn.Module]]:
    """The image sizes that a model takes, best first, and the model for each on the meta device."""
    try:
        plain = _on_meta(name, None, channels)
    except UsageError as error:
        message = str(error).removeprefix("model.name: ").removeprefix("model ")
        raise UsageError(f"--eval.backbone: {message}") from error
    known: Any = plain.pretrained_cfg
    native: int = known["input_size"][-1]
    wanted = native if image_size == "own" else image_size
    patch: Any = getattr(getattr(plain, "patch_embed", None), "patch_size", None)
    patch = max(patch) if isinstance(patch, (tuple, list)) else patch
    multiples = [math.ceil(wanted / step) * step for step in (patch or 32, 32)]
    found: dict[int, nn.Module] = {}
    # The weights of some models fit their own size alone, though timm builds the model for others.
    for size, img_size in [*((each, each) for each in (wanted, *multiples)), (native, None)]:
        with contextlib.suppress(UsageError):  # it takes no img_size
            encoder = _on_meta(name, img_size, channels).eval()
            if len(found) < 2 and takes(encoder, size):
                found.setdefault(size, encoder)
    if not found:
        raise UsageError(
            f"--eval.backbone: {name} gives no pooled features (1, D) of an image; choose another model"
        )
    return list(found.items())


def _on_meta(name: str, img_size: int | None, channels: int) -> nn.Module:
    with torch.device("meta"):
        return build_encoder(ModelConfig(name=name, img_size=img_size), channels)


def _with_random_weights(empty: nn.Module, seed: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        encoder = timm.create_model(**cast(dict[str, Any], empty.encoder_args))
    avoid_strided_pointwise(encoder)
    return encoder


def _with_weights(empty: nn.Module, state: dict[str, Tensor]) -> nn.Module:
    """The encoder `empty` with weights, which timm fits to the image size and the number of channels."""
    arguments, known = cast(dict[str, Any], empty.encoder_args), cast(dict[str, Any], empty.pretrained_cfg)
    classifiers = known.get("classifier") or ()
    layers = (classifiers,) if isinstance(classifiers, str) else classifiers
    heads, kept = {layer.split(".")[0] for layer in layers}, empty.state_dict()
    own = {name: tensor for name, tensor in state.items() if name in kept or name.split(".")[0] not in heads}
    if not own:  # timm would take those of the hub
        raise ValueError("it has none of the encoder")
    # timm refuses missing weights only where the number of classes is that of the file.
    overlay: dict[str, Any] = {"num_classes": 0, "label_offset": 0, "state_dict": own}
    encoder = timm.create_model(pretrained=True, pretrained_cfg_overlay=overlay, **arguments)
    avoid_strided_pointwise(encoder)
    return encoder


def _in_short(refusal: Exception) -> str:
    """The message of PyTorch or timm. Of keys, which may be hundreds: how many, and the first."""
    found = re.findall(r"^\s*(Missing|Unexpected) key\(s\) in state_dict: (.*)", str(refusal), re.MULTILINE)
    lists = [(kind.lower(), re.findall(r'"([^"]+)"', keys)) for kind, keys in found]
    said = [f"{kind} keys: {len(keys)}, the first {keys[0]}" for kind, keys in lists]
    return "; ".join(said) or " ".join(str(refusal).split())[:200]


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file, or of another without running code of it; UsageError if it
    cannot be read or holds no tensors by name. The prefix `module.` of parallel training is left out."""
    try:
        if path.suffix == ".safetensors":
            found: Any = safetensors.torch.load_file(path)
        else:
            found = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UsageError(f"--eval.backbone: cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # of pickle, zip or safetensors
        # PyTorch's own text advises to run the code of such a file.
        objects = "it is damaged, or holds Python objects, not tensors alone"
        reason = objects if isinstance(error, pickle.UnpicklingError) else first_line(error)
        advice = "give a safetensors file, or one that torch.load(weights_only=True) reads"
        raise UsageError(f"--eval.backbone: {path} is no file of weights ({reason}); {advice}") from error
    for key in _NESTED:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not any(isinstance(value, Tensor) for value in found.values()):
        got = type(found).__name__ if found else "none"
        raise UsageError(f"--eval.backbone: {path}: expected tensors by name, got {got}")
    return {key.removeprefix("module."): value for key, value in found.items() if isinstance(value, Tensor)}


def _hub_file(name: str, known: dict[str, Any]) -> Path:
    """The weights of a model in the cache of the Hugging Face hub, downloaded where they are not there."""
    import huggingface_hub

    repository = known.get("hf_hub_id")
    if not repository:
        raise UsageError(f"--eval.backbone: timm knows no weights of {name} on the hub; give {name}:FILE")
    named = known.get("hf_hub_filename")
    files = (named,) if named else _HUB_FILES
    for file in files:
        if isinstance(cached := huggingface_hub.try_to_load_from_cache(repository, file), str):
            return Path(cached)
    reason = _hub_unreachable()
    for file in files if reason is None else ():
        try:
            return Path(huggingface_hub.hf_hub_download(repository, file))
        except Exception as error:  # of the hub or of the HTTP library: no such file, no access, no answer
            reason = first_line(error)
    raise UsageError(
        f"--eval.backbone: the weights of {name} are not in the cache of the Hugging Face hub, and cannot be "
        f"downloaded ({reason}); get {files[0]} of {repository} elsewhere and give "
        f"--eval.backbone {name}:FILE"
    )


def _hub_unreachable() -> str | None:
    """Why the hub cannot be reached; None if it can. A download would try for a minute before it gives up."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=10).close()
    except urllib.error.HTTPError:
        return None  # it answers
    except OSError as error:
        return f"no network: {first_line(error)}"
    return None
