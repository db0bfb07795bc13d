"""Named base configurations: `--preset NAME`. All numbers of the small CPU run are here.

`default` holds the recipe of the LeJEPA paper (arXiv 2511.08544) for large data on GPUs. `laptop` trains
a small convolutional network on the embedded images in a few minutes on two CPU cores. `ijepa-vit-b` and
`ijepa-vit-h` hold the recipe of I-JEPA (arXiv 2301.08243, with the rates of its authors' code) for ImageNet
on GPUs, `ijepa-laptop` a small transformer for the embedded images on two CPU cores.
"""

from dataclasses import replace

from lejepa_fast.data.recipe import MultiCropRecipe
from lejepa_fast.train.config.settings import (
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    MaskedConfig,
    ModelConfig,
    OptimConfig,
)

# Photos of materials are told apart by texture and tint, so colors change little, and crops show a part of
# the image at about its own resolution. Averages in place of strides keep texture, and a wide last layer
# serves linear classifiers. Small batches give more steps an epoch, which counts for more than their noise.
_LAPTOP = Config(
    data=DataConfig(batch_size=64, workers=1),
    crops=MultiCropRecipe(
        global_crops=2,
        global_size=48,
        global_scale=(0.15, 0.7),
        local_crops=2,
        local_size=32,
        local_scale=(0.06, 0.25),
        brightness=0.3,
        contrast=0.3,
        saturation=0.15,
        hue=0.03,
        grayscale_prob=0.0,
        blur_kernel=5,
        solarize_prob=0.0,
    ),
    model=ModelConfig(
        name="resnet14t",
        kwargs='{"channels": [16, 32, 64, 256], "stem_width": 16}',
        projector_hidden=512,
        projector_layers=3,
        projector_dim=64,
    ),
    loss=LossConfig(lambd=0.1, num_slices=256),
    optim=OptimConfig(lr=2e-3, weight_decay=0.05, warmup_fraction=0.1),
    eval=EvalConfig(every=10),
    epochs=30,
    log_every=5,
    checkpoint_every=200,
)

# I-JEPA takes one crop without flip and colors.
_PLAIN = MultiCropRecipe(
    global_crops=1,
    local_crops=0,
    flip_prob=0.0,
    jitter_prob=0.0,
    grayscale_prob=0.0,
    blur_prob=0.0,
    solarize_prob=0.0,
)


def _ijepa(model: str, *, epochs: int, predictor_depth: int, predictor_heads: int) -> Config:
    """40 epochs of warm-up from a fifth of the rate; the decay rises tenfold."""
    return Config(
        objective="ijepa",
        data=DataConfig(batch_size=2048),
        crops=_PLAIN,
        model=ModelConfig(name=model),
        masked=MaskedConfig(predictor_depth=predictor_depth, predictor_heads=predictor_heads),
        optim=OptimConfig(
            lr=1e-3,
            weight_decay=0.04,
            final_weight_decay=0.4,
            warmup_fraction=40 / epochs,
            start_lr_fraction=0.2,
            final_lr_fraction=1e-3,
        ),
        epochs=epochs,
    )


_IJEPA_LAPTOP = Config(
    objective="ijepa",
    data=DataConfig(batch_size=64, workers=1),
    crops=replace(_PLAIN, global_size=64),
    model=ModelConfig(
        name="vit_tiny_patch16_224",
        kwargs='{"patch_size": 8, "embed_dim": 128, "depth": 4, "num_heads": 4}',
        projector_hidden=512,
        projector_layers=3,
        projector_dim=64,
    ),
    loss=LossConfig(lambd=0.05, num_slices=256),
    # So few steps: at 0.996 the targets lose what differs between images.
    masked=MaskedConfig(predictor_width=64, predictor_depth=2, predictor_heads=4, min_keep=8, momentum=0.999),
    optim=OptimConfig(lr=1e-3, weight_decay=0.04, final_weight_decay=0.4, warmup_fraction=0.1),
    eval=EvalConfig(every=10),
    epochs=40,
    log_every=10,
    checkpoint_every=200,
)

PRESETS: dict[str, Config] = {
    "default": Config(),
    "laptop": _LAPTOP,
    "ijepa-vit-b": _ijepa("vit_base_patch16_224", epochs=600, predictor_depth=6, predictor_heads=12),
    "ijepa-vit-h": _ijepa("vit_huge", epochs=300, predictor_depth=12, predictor_heads=16),
    "ijepa-laptop": _IJEPA_LAPTOP,
}
