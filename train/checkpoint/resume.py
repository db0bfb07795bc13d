"""Which checkpoint a run resumes from, and what of the two must be equal."""

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lejepa_fast.data import ImageSource
from lejepa_fast.data.sources.base import names_digest
from lejepa_fast.errors import UsageError
from lejepa_fast.train.checkpoint import storage
from lejepa_fast.train.config import Config, flat, to_dict

log = logging.getLogger("lejepa_fast.train")


def is_own(path: Path, run_dir: Path) -> bool:
    """Whether a checkpoint belongs to this run folder."""
    return path.resolve().parent == (run_dir / "checkpoints").resolve()


def choose_checkpoint(run_dir: Path, resume: str) -> tuple[Path, dict[str, Any]] | None:
    """Return the checkpoint that `--resume` asks for and its state; None: the run starts anew.

    UsageError if the run folder already holds other checkpoints. Those of the new run would be mixed with
    them, and the ones with more steps would be kept as the newest.
    """
    own = run_dir / "checkpoints"
    if resume == "auto":
        return storage.newest_checkpoint(own, own=True)
    existing = storage.list_checkpoints(own)
    found = None if resume == "none" else storage.find_checkpoint(resume)
    if existing and not (found and existing[-1].resolve() == found[0].resolve()):
        raise UsageError(
            f"--resume {resume}: {run_dir} holds checkpoints of another run ({existing[-1].name}); choose "
            "another --out, or --resume auto to continue that run"
        )
    return found


def data_identity(train: ImageSource, val: ImageSource) -> dict[str, Any]:
    """Identify the images of a run: counts of both splits and a digest of their names."""
    names = names_digest({"train": train, "val": val})
    return {"train_images": len(train), "val_images": len(val), "names_sha256": names}


def check_same_model(saved: Mapping[str, Any], current: Mapping[str, Any], path: Path) -> None:
    """Raise UsageError, naming both models, if the configuration of the checkpoint `path` has another one."""

    def weights(config: Mapping[str, Any]) -> dict[str, Any]:
        """The model's settings that its weights depend on."""
        size = config["model"]["img_size"] or config["crops"]["global_size"]
        own = {k: v for k, v in config["model"].items() if k != "drop_path"}
        own |= {"objective": config.get("objective", "lejepa"), "kwargs": json.loads(own.get("kwargs", "{}"))}
        if own["objective"] != "lejepa":
            own |= {k: v for k, v in config["masked"].items() if k.startswith("predictor")}
        return own | {"img_size": size, "data.channels": config["data"].get("channels", 3)}

    theirs, ours = weights(saved), weights(current)
    differ = [key for key in ours if theirs.get(key) != ours[key]]
    if differ:
        before, now = (
            model["name"] + "".join(f" ({key} {model.get(key)})" for key in differ if key != "name")
            for model in (theirs, ours)
        )
        raise UsageError(
            f"checkpoint {path} is of model {before}, and this run is of {now}; choose another --out, or the "
            "checkpoint's model"
        )


def check_same_run(
    state: Mapping[str, Any], current: Mapping[str, Any], data: Mapping[str, Any], path: Path, run_dir: Path
) -> None:
    """Raise UsageError if the checkpoint `path` is of another model, or of this folder and another seed or
    other images. A checkpoint of another folder may be of other images; a warning says what that means."""
    check_same_model(state["config"], current, path)
    own, before = is_own(path, run_dir), state["data"]
    if own and state["config"]["seed"] != current["seed"]:
        raise UsageError(
            f"seed: {run_dir} holds a run with seed {state['config']['seed']}, and this one has "
            f"{current['seed']}; choose another --out, or continue that run with its seed"
        )
    if before == data:
        return
    theirs, ours = (
        f"({of['train_images']} for training, {of['val_images']} held out of {config['data']['path']})"
        for of, config in ((before, state["config"]), (data, current))
    )
    difference = f"the checkpoint {path} was trained on other images {theirs} than this run has {ours}"
    if own:
        way_out = "choose another --out, or continue with the same --data and --data.val-fraction"
        raise UsageError(f"data: {difference}; {way_out}")
    log.warning(
        f"{difference}: some that are held out now may have been trained on; the epoch starts over, without "
        "the list of bad images"
    )


def log_changes(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Warn of every setting that differs from the checkpoint's; one that it lacks had its default."""
    now = flat(current)
    before = flat(to_dict(Config())) | flat(saved)
    for key in sorted(now.keys() - {"out", "resume"}):
        if before[key] != now[key]:
            log.warning("%s: the checkpoint has %s, this run %s", key, before[key], now[key])
