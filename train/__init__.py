"""The LeJEPA trainer, installed and imported as `lejepa_fast.train`."""

if __name__ == "train":
    raise ImportError(
        "the trainer is imported as 'lejepa_fast.train', not as top-level 'train'; "
        "install the project with 'pip install -e .'"
    )

from lejepa_fast.errors import require_extra

require_extra(
    "train",
    *("torchvision", "timm", "tyro", "pydantic", "annotated_types", "safetensors", "tensorboard"),
    *("matplotlib", "jinja2", "tqdm", "numpy", "PIL"),
)
