"""The trained model of a checkpoint, and its encoder as files that need no lejepa_fast:

encoder = timm.create_model("local-dir:RUN", pretrained=True)
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
"""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from safetensors.torch import save
from torch import nn

from lejepa_fast.errors import UsageError
from lejepa_fast.regular_files import open_regular
from lejepa_fast.train.checkpoint.storage import find_checkpoint, load_model
from lejepa_fast.train.config import Config, from_dict
from lejepa_fast.train.model.model import LeJEPAModel, TrainedModule, build_model, evaluated
from lejepa_fast.train.runtime.files import write_atomically, write_json

log = logging.getLogger("lejepa_fast.train")

# In a folder, timm takes the first of these that is there, else the first *.safetensors by name.
_TIMM_PREFERS = ("model.safetensors", "pytorch_model.bin", "pytorch_model.pth", "model.pth")


class TrainedModel(NamedTuple):
    """A model from the checkpoint `path`, on the CPU, and the configuration of its run."""

    model: LeJEPAModel
    """What is evaluated and exported: of I-JEPA with the target encoder, unless the context encoder was
    asked for."""
    cfg: Config
    step: int
    path: Path
    averaged: bool
    """Whether the weights are the averaged ones."""
    data: Mapping[str, Any]
    """Counts of the images that it was trained on and that were held out: `resume.data_identity`."""
    whole: TrainedModule
    """All parts of what was trained; `model` has some of them."""


def load_trained(
    where: Path, *, averaged: bool = True, which: Literal["target", "context"] = "target"
) -> TrainedModel:
    """Load the model of a checkpoint, see `find_checkpoint`; with averaged weights if the run keeps them and
    `averaged`, and with the encoder `which` if there are two. UsageError if there is none, or it holds
    another model than its configuration describes."""
    path, state = find_checkpoint(where)
    cfg = from_dict(state["config"], where=f"checkpoint {path}")
    averaged = averaged and bool((state.get("average") or {}).get("count"))
    model = build_model(cfg)
    try:
        model.load_state_dict(load_model(path, "average" if averaged else "model"))
    except RuntimeError as error:
        difference = str(error).splitlines()[-1].strip()
        raise UsageError(
            f"checkpoint {path} does not hold the model that its configuration describes ({difference}); "
            "use the version of lejepa_fast that wrote it"
        ) from error
    step, data = state["step"], state["data"]
    return TrainedModel(evaluated(model, which), cfg, step, path, averaged, data, model)


def export_encoder(
    encoder: nn.Module,
    cfg: Config,
    step: int,
    run_dir: Path,
    name: str = "encoder.safetensors",
    *,
    which: Literal["target", "context"] = "target",
    way_out: str = "free some space and run the same command again: it resumes at this step",
) -> Path:
    """Write `run_dir/name` and, beside it, its settings as .json and for timm; return the weights' path.

    The settings are "encoder" (of I-JEPA "target" or, if `which` says so, "context"; else "online", the only
    one), "model" (arguments of `timm.create_model`), "input" (size, mean and std of the evaluated
    images, RGB in 0-1 before normalization, how they are resized, and the values of black and white of images
    with more than 8 bits), "trained_with" and "step". timm reads config.json, which in a run folder holds the
    configuration of the run as well. It stays as it is, with a warning, if it is of another program, or if
    timm would take other weights of the folder. RunError, which ends with the advice `way_out`, if the disk
    refuses.
    """
    path, crops = run_dir / name, cfg.crops
    weights, storages = {}, set()
    for key, tensor in encoder.state_dict().items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        weights[key] = tensor.clone() if storage in storages else tensor  # safetensors takes no shared memory
        storages.add(storage)
    size = cfg.eval.image_size or crops.global_size
    arguments: dict[str, Any] = encoder.encoder_args  # type: ignore[assignment]
    # As `center_view` does: the short side becomes the size, and nothing is cut off it.
    normalized = {"mean": list(crops.mean), "std": list(crops.std)}
    resized = {"interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
    settings = {
        "encoder": which if cfg.objective == "ijepa" else "online",
        "model": arguments,
        "input": {"size": size, "value_range": cfg.data.value_range, **normalized, **resized},
        "trained_with": "lejepa_fast",
        "step": step,
    }
    known: Any = encoder.pretrained_cfg
    layers = {key: known[key] for key in ("first_conv", "classifier") if key in known}
    fixed = "img_size" in arguments and "dynamic_img_size" not in arguments
    size_and_head = {
        "input_size": [cfg.data.channels, size, size],
        "fixed_input_size": fixed,
        "num_classes": 0,
    }
    for_timm = {
        "architecture": arguments["model_name"].partition(".")[0],
        "num_classes": 0,
        "model_args": {key: value for key, value in arguments.items() if key != "model_name"},
        "pretrained_cfg": size_and_head | normalized | resized | layers,
        "trained_with": "lejepa_fast",  # timm ignores it
    }
    write_atomically(path, save(weights), way_out=way_out)
    write_json(path.with_suffix(".json"), settings, way_out=way_out)
    beside = run_dir / "config.json"
    try:
        with open_regular(beside) as file:
            earlier = json.load(file)
    except FileNotFoundError:
        earlier = for_timm
    except (OSError, ValueError, RecursionError):
        earlier = {}
    names = dict.fromkeys([*_TIMM_PREFERS, *sorted(each.name for each in run_dir.glob("*.safetensors"))])
    present = [name for name in names if (run_dir / name).exists()]
    marks = earlier if isinstance(earlier, dict) else {}
    if "crops" not in marks and marks.get("trained_with") != "lejepa_fast":  # not of a run, nor of an export
        log.warning("%s is of another program: timm cannot load %s as a folder", beside, run_dir)
        return path
    if len(present) > 1:
        several = "%s holds several files of weights, of which timm takes %s; export to a folder for each"
        log.warning(several, run_dir, present[0])
    if present[0] == path.name:
        write_json(beside, earlier | for_timm, way_out=way_out)
    return path
