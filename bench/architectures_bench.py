"""LeJEPA on many architectures with the same settings: python bench/architectures_bench.py

The paper (arXiv 2511.08544) trains about 50 timm models below 20 M parameters without tuning any of them.
Here each of `MODELS` trains for some steps on the embedded images, all with the settings of `configuration`.
A row says whether the loss stayed finite and fell, whether the embeddings collapsed, and what kNN and linear
probe reach beside the same encoder without training. So few steps make no good encoder: the gain over the
untrained encoder only shows whether training leads away from it or beyond it.

A model that cannot take part has a row with the reason as `error`. Models that have a row of the same steps
and images are not trained again, so an interrupted run goes on; only those that failed for another reason
than their settings are. `--models NAME ...` trains these alone.
"""

import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from benchlib import SHORT_RUN, Row, Rows, command_line, first_line, print_rows

from lejepa_fast.train.config import EMBEDDED_DATA, Config, ModelConfig, parse
from lejepa_fast.train.engine.trainer import Trainer
from lejepa_fast.train.evaluation.protocol import evaluate_model, evaluate_untrained
from lejepa_fast.train.runtime import files
from lejepa_fast.train.runtime.world import World

STEPS = 30
FIGURES = ("knn", "linear", "embedding_std", "effective_rank")
# Below 20 M parameters, those of one family (a module of timm) together.
_NAMES = """
    repvgg_a0 gernet_s mobileone_s1 mobilevit_xxs mobilevitv2_050 botnet26t_256 halonet26t
    lambda_resnet26t cait_xxs24_224 coat_lite_tiny convit_tiny convnext_atto convnext_femto
    convnextv2_atto crossvit_tiny_240 cs3darknet_focus_s densenet121 dla46_c dla60x_c dpn48b
    edgenext_xx_small efficientformer_l1 efficientformerv2_s0 efficientnet_b0 efficientnet_lite0
    mobilenetv2_100 mnasnet_100 tinynet_e fbnetc_100 spnasnet_100 mixnet_s efficientvit_b0 efficientvit_m0
    eva02_tiny_patch14_224 fastvit_t8 gcvit_xxtiny ghostnet_100 ghostnetv2_100 hgnetv2_b0 hrnet_w18_small
    inception_next_atto levit_128s mambaout_femto maxvit_rmlp_pico_rw_256 coatnet_nano_rw_224
    poolformer_s12 poolformerv2_s12 mixer_s32_224 resmlp_12_224 gmlp_ti16_224 mobilenetv3_small_100
    mobilenetv4_conv_small lcnet_050 hardcorenas_a nest_tiny nf_regnet_b0 pit_ti_224 pvt_v2_b0 regnetx_002
    regnety_002 repghostnet_050 repvit_m0_9 resnet10t resnet14t resnet18 seresnet18 skresnet18 resnest14d
    resnetv2_18 rexnet_100 shvit_s1 starnet_s1 swiftformer_xs tiny_vit_5m_224 visformer_tiny
    vit_tiny_patch16_224 deit_tiny_patch16_224 vit_wee_patch16_reg1_gap_256 ese_vovnet19b_dw
    xcit_nano_12_p16_224
"""
MODELS = _NAMES.split()


def configuration(name: str, steps: int, out: Path, data: str = EMBEDDED_DATA) -> Config:
    """The settings, the same for every model."""
    usual = parse(SHORT_RUN)
    return replace(
        usual,
        data=replace(usual.data, path=data, batch_size=32, workers=0),
        # One size of crops, as some models take one alone.
        crops=replace(usual.crops, global_size=64, local_size=64, local_crops=1, min_image_size=1),
        model=ModelConfig(name=name, projector_hidden=256, projector_dim=32),
        loss=replace(usual.loss, num_slices=128),
        optim=replace(usual.optim, lr=1e-3, warmup_fraction=0.2),
        eval=replace(usual.eval, every=0),
        max_steps=steps,
        log_every=1,
        checkpoint_every=steps,
        tensorboard=False,
        out=out,
    )


def train(name: str, steps: int, folder: Path, data: str = EMBEDDED_DATA) -> Row:
    """Train a model in `folder`, evaluate it and its untrained twin, and return the row."""
    began = time.perf_counter()
    cfg = configuration(name, steps, folder / name, data)
    short = {"linear_steps": cfg.eval.linear_steps, "train_images": 1000}
    with Trainer(cfg, World(torch.device("cpu"))) as trainer:
        trainer.train()
        losses = [row["loss"] for row in files.read_rows(trainer.metrics.path) if row["kind"] == "train"]
        sources, options = (trainer.train_source, trainer.val_source), trainer.evaluation_options | short
        model, encoder = trainer.model, trainer.model.encoder
        with trainer.outside_training():  # SIGTERM ends the evaluation, too
            # So few steps leave the running statistics of some BatchNorm layers far behind.
            trained = evaluate_model(model, *sources, trainer.cfg, calibrate=True, **options)
            untrained = evaluate_untrained(trainer.cfg, *sources, **options)
    row: Row = {
        "family": type(encoder).__module__.rpartition(".")[2],
        "parameters": sum(parameter.numel() for parameter in encoder.parameters()),
        "loss_first": statistics.mean(losses[: max(1, steps // 10)]),
        "loss_last": statistics.mean(losses[-max(1, steps // 10) :]),
        "finite": all(map(math.isfinite, losses)),
        "state": trained.verdict.state,
        "n_val": trained.n_val,
    }
    for which, result in (("trained", trained), ("untrained", untrained)):
        row |= {f"{figure}_{which}": getattr(result, figure) for figure in FIGURES}
    return row | {"seconds": round(time.perf_counter() - began, 1)}


def summarize(rows: Sequence[Row]) -> None:
    """Print the rows as a table, and `counts`."""
    trained = [row for row in rows if "error" not in row]
    figures = (
        "loss_first",
        "loss_last",
        "knn_untrained",
        "knn_trained",
        "linear_untrained",
        "linear_trained",
    )
    columns = {"model": "{model}", "family": "{family}", "parameters": "{parameters:,}"}
    columns |= {key: f"{{{key}:.3g}}" for key in figures} | {"state": "{state}"}
    print_rows(sorted(trained, key=lambda row: (row["family"], row["model"])), columns)
    for row in rows:
        if "error" in row:
            print(f"{row['model']} cannot take part: {row['error']}")
    print(", ".join(f"{name}: {count}" for name, count in counts(rows).items()))


def counts(rows: Sequence[Row]) -> dict[str, int]:
    """How many models did what the paper says of them."""
    trained = [row for row in rows if "error" not in row]
    return {
        "trained": len(trained),
        "families": len({row["family"] for row in trained}),
        "with a finite loss": sum(row["finite"] for row in trained),
        "with a lower loss at the end": sum(row["loss_last"] < row["loss_first"] for row in trained),
        "not collapsed": sum(row["state"] != "collapsed" for row in trained),
        "better than untrained in kNN": sum(row["knn_trained"] > row["knn_untrained"] for row in trained),
        "better in the linear probe": sum(row["linear_trained"] > row["linear_untrained"] for row in trained),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command_line(__doc__)
    parser.add_argument("--models", nargs="+", default=MODELS, help="timm models (all of MODELS)")
    parser.add_argument("--steps", type=int, default=STEPS, help="of each training (%(default)s)")
    parser.add_argument("--data", default=EMBEDDED_DATA, help="labeled images (%(default)s)")
    options = parser.parse_args(arguments)
    writer, rows = Rows(options.out / "architectures.jsonl", "architectures", torch.device("cpu")), []
    for name in options.models:
        wanted: Row = {"model": name, "steps": options.steps, "data": options.data}
        # A failure that is no wrong setting may have had a passing cause, such as a full disk.
        found = [row for row in writer.known(wanted) if "UsageError" in row.get("error", "UsageError")]
        if not found:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    measured = train(name, options.steps, Path(folder), options.data)
                except Exception as error:  # models refuse sizes in many ways; the others go on
                    measured = {"error": first_line(error)}
            found = writer.write({**wanted, **measured})
            print(found[-1], flush=True)
        rows.append(found[-1])
    summarize(rows)


if __name__ == "__main__":
    main()
