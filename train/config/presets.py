"""Named base configurations: `--preset NAME`. All numbers of the small CPU run are here.

`default` holds the recipe of the LeJEPA paper (arXiv 2511.08544) for large data on GPUs. `laptop` trains
a small convolutional network on the embedded images in a few minutes on two CPU cores.
"""

from lejepa_fast.data.recipe import MultiCropRecipe
from lejepa_fast.train.config.settings import (
    Config,
    DataConfig,
    EvalConfig,
    LossConfig,
    ModelConfig,
    OptimConfig,
)

# Photos of materials are told apart by texture and tint, so local crops stay large enough to show some, and
# solarization is off. Small batches give more steps an epoch, which counts for more than their noise.
_LAPTOP = Config(
    data=DataConfig(batch_size=64, workers=1),
    crops=MultiCropRecipe(
        global_crops=2,
        global_size=48,
        local_crops=2,
        local_size=32,
        local_scale=(0.1, 0.4),
        grayscale_prob=0.1,
        blur_kernel=5,
        solarize_prob=0.0,
    ),
    model=ModelConfig(
        name="resnet18",
        kwargs='{"channels": [32, 64, 128, 256], "layers": [1, 1, 1, 1]}',
        projector_hidden=512,
        projector_layers=3,
        projector_dim=64,
    ),
    loss=LossConfig(lambd=0.1, num_slices=256),
    optim=OptimConfig(lr=2e-3, weight_decay=0.05, warmup_fraction=0.1),
    eval=EvalConfig(every=5),
    epochs=40,
    log_every=5,
    checkpoint_every=200,
)

PRESETS: dict[str, Config] = {"default": Config(), "laptop": _LAPTOP}
