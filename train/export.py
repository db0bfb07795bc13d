"""The trained encoder as others take it: `encoder.safetensors` and `encoder.json`.

settings = json.load(open("encoder.json"))
encoder = timm.create_model(**settings["model"])
encoder.load_state_dict(safetensors.torch.load_file("encoder.safetensors"))
"""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save
from torch import nn

from lejepa_fast.train.config import Config
from lejepa_fast.train.files import write_atomically


def export_encoder(encoder: nn.Module, cfg: Config, step: int, run_dir: Path) -> Path:
    """Write both files into `run_dir`; returns the path of the weights. RunError if the disk refuses.

    `encoder.json`: "model" (arguments of `timm.create_model`), "input" (size, mean and std of the images
    that it was evaluated on, RGB in 0-1 before normalisation) and "step".
    """
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    settings = {
        "model": encoder.encoder_args,
        "input": {
            "size": cfg.eval.image_size or cfg.crops.global_size,
            "mean": list(cfg.crops.mean),
            "std": list(cfg.crops.std),
        },
        "trained_with": "lejepa_fast",
        "step": step,
    }
    way_out = "free some space and run the same command again: a finished run goes straight to this step"
    path = run_dir / "encoder.safetensors"
    write_atomically(path, lambda file: file.write(save(weights)), way_out=way_out)
    text = json.dumps(settings, indent=2) + "\n"
    write_atomically(run_dir / "encoder.json", lambda file: file.write(text.encode()), way_out=way_out)
    return path
