"""The trained model of a checkpoint, and its encoder as files that need no lejepa_fast:

settings = json.load(open("encoder.json"))
encoder = timm.create_model(**settings["model"])
encoder.load_state_dict(safetensors.torch.load_file("encoder.safetensors"))
"""

import json
from pathlib import Path
from typing import NamedTuple

from safetensors.torch import save
from torch import nn

from lejepa_fast.errors import UsageError
from lejepa_fast.train.checkpoint.storage import find_checkpoint, has_average, load_model
from lejepa_fast.train.config import Config, from_dict
from lejepa_fast.train.model.model import LeJEPAModel, build_model
from lejepa_fast.train.runtime.files import write_atomically


class TrainedModel(NamedTuple):
    """A model from the checkpoint `path`, on the CPU, and the configuration of its run."""

    model: LeJEPAModel
    cfg: Config
    step: int
    path: Path
    averaged: bool
    """Whether the weights are the averaged ones."""


def load_trained(where: Path, *, averaged: bool = True) -> TrainedModel:
    """Load the model of a checkpoint, see `find_checkpoint`; with averaged weights if the run keeps them and
    `averaged`. UsageError if there is none, or it holds another model than its configuration describes."""
    path, state = find_checkpoint(where)
    cfg = from_dict(state["config"], where=f"checkpoint {path}")
    averaged = averaged and has_average(state)
    model = build_model(cfg)
    try:
        model.load_state_dict(load_model(path, "average" if averaged else "model"))
    except RuntimeError as error:
        difference = str(error).splitlines()[-1].strip()
        raise UsageError(
            f"checkpoint {path} does not hold the model that its configuration describes ({difference}); "
            "use the version of lejepa_fast that wrote it"
        ) from error
    return TrainedModel(model, cfg, state["step"], path, averaged)


def export_encoder(
    encoder: nn.Module,
    cfg: Config,
    step: int,
    run_dir: Path,
    name: str = "encoder.safetensors",
    *,
    way_out: str = "free some space and run the same command again: it resumes at this step",
) -> Path:
    """Write `run_dir/name` and, beside it, its settings as .json; return the path of the weights.

    The settings are "model" (arguments of `timm.create_model`), "input" (size, mean and std of the evaluated
    images, RGB in 0-1 before normalization), "trained_with" and "step". RunError, which ends with the advice
    `way_out`, if the disk refuses.
    """
    path, crops = run_dir / name, cfg.crops
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    size = cfg.eval.image_size or crops.global_size
    settings = {
        "model": encoder.encoder_args,
        "input": {"size": size, "mean": list(crops.mean), "std": list(crops.std)},
        "trained_with": "lejepa_fast",
        "step": step,
    }
    text = json.dumps(settings, indent=2) + "\n"
    write_atomically(path, lambda file: file.write(save(weights)), way_out=way_out)
    write_atomically(path.with_suffix(".json"), lambda file: file.write(text.encode()), way_out=way_out)
    return path
