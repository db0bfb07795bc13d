"""Names of models: short names, timm's names, and the family that decides the default weight decay.

timm is imported on first use, so that `--help` does not wait for it.
"""

import difflib
from typing import Any

from lejepa_fast.errors import UsageError

# Patch 14 throughout, so that the recipe's 224 and 98 pixels are whole numbers of patches. timm has no
# patch-14 tiny, small or base: these are its patch-16 models with another patch size.
SHORT_NAMES: dict[str, tuple[str, dict[str, Any]]] = {
    "vit_tiny": ("vit_tiny_patch16_224", {"patch_size": 14}),
    "vit_small": ("vit_small_patch16_224", {"patch_size": 14}),
    "vit_base": ("vit_base_patch16_224", {"patch_size": 14}),
    "vit_large": ("vit_large_patch14_224", {}),
    "vit_huge": ("vit_huge_patch14_224", {}),
    "vit_giant": ("vit_giant_patch14_224", {}),
    "vit_gigantic": ("vit_gigantic_patch14_224", {}),
}


def resolve_name(name: str) -> tuple[str, dict[str, Any]]:
    """Return timm's name and extra arguments; UsageError, which suggests names, for one that is unknown."""
    import timm

    if name in SHORT_NAMES:
        return SHORT_NAMES[name]
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, [*SHORT_NAMES, *timm.list_models()], n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see timm.list_models() for all names"
        raise UsageError(f"model.name: no model is called {name!r}; {hint}")
    return name, {}


def fixed_input_size(name: str) -> bool | None:
    """Whether the weights depend on the input size, as in transformers, by timm's records; None: unknown."""
    import timm

    pretrained_cfg = timm.get_pretrained_cfg(resolve_name(name)[0])
    return None if pretrained_cfg is None else pretrained_cfg.fixed_input_size


def is_convolutional(name: str) -> bool:
    """Whether a model is a convolutional network: its weights fit every input size."""
    return fixed_input_size(name) is False


def default_weight_decay(name: str) -> float:
    """Return the paper's weight decay: 5e-4 for ResNets and their kin, else 5e-2 (arXiv 2511.08544)."""
    return 5e-4 if is_convolutional(name) and "convnext" not in name else 5e-2
