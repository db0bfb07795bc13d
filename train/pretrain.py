"""Pretrain an encoder: `python train/pretrain.py`, or `torchrun --nproc-per-node N train/pretrain.py`.

Joins the trainer (engine/trainer.py) with evaluation at the end, export and report. Exit codes: 0 done (also
after SIGTERM, with the state saved), 1 the run failed, 2 wrong usage, 130 Ctrl-C. Failures that a user can
act on are one line on stderr, `error: ...`.
"""

import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lejepa_fast.errors import RunError, UsageError, first_line
from lejepa_fast.train import config
from lejepa_fast.train.config import Config
from lejepa_fast.train.runtime.command import let_threads_sleep, log_to_stderr, run_command
from lejepa_fast.train.runtime.files import read_rows

if TYPE_CHECKING:
    from lejepa_fast.train.engine.trainer import Trainer
    from lejepa_fast.train.evaluation.protocol import EvalResult
    from lejepa_fast.train.model.model import LeJEPAModel
    from lejepa_fast.train.runtime.world import World


log = logging.getLogger("lejepa_fast.train")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    if {"-h", "--help"} & {*(sys.argv[1:] if argv is None else argv)}:
        return run_command(lambda: config.parse(argv))  # does not wait for PyTorch

    let_threads_sleep()
    from torch.distributed.elastic.multiprocessing.errors import record

    import lejepa_fast.train.runtime.world as ranks

    rank = int(os.environ.get("RANK", "0"))
    who = f" (rank {rank})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
    log_to_stderr(main_process=rank == 0, who=who)

    def work() -> None:
        with ranks.reported_once():
            cfg = config.parse(argv)
            world = ranks.setup_world(cfg.device)
        with ranks.lost_rank_is_a_run_error():
            report = pretrain(cfg, world)
        if world.is_main:
            print(f"report: {report}")

    @record  # torchrun's report shows the traceback of a defect; expected failures are exit codes here
    def command() -> int:
        return run_command(work, who=who, quiet=lambda error: ranks.reported_elsewhere(error, rank))

    code = 1  # of a defect
    try:
        code = command() or 0
        return code
    finally:
        ranks.close_world(code)


def pretrain(cfg: Config, world: "World") -> Path:
    """Train, export the encoder, evaluate it beside the untrained one, write report.html and return its path.

    A finished run goes straight to the export. All ranks call it.
    """
    from lejepa_fast.train.engine.trainer import Trainer
    from lejepa_fast.train.evaluation.backbones import load_backbones
    from lejepa_fast.train.runtime.world import from_main, on_all, on_main

    on_all(world, lambda: config.validate(cfg, world.size))
    on_main(world, lambda: load_backbones(cfg))  # a wrong name or missing weights show before the training
    with Trainer(cfg, world) as trainer:
        trainer.train()
        model = trainer.whole_model()
        page = from_main(world, on_main(world, lambda: _export_and_report(trainer, model)))
        assert page is not None  # rank 0's
        return page


def _evaluate_backbones(trainer: "Trainer") -> "dict[str, EvalResult]":
    """Those of `eval.backbone`; a failure is a warning, as the report of the training must not wait."""
    import torch

    from lejepa_fast.train.evaluation.backbones import evaluate_backbones, load_backbones

    cfg = trainer.cfg
    found: dict[str, EvalResult] = {}
    way_out = f"python train/evaluate.py --checkpoint {trainer.run_dir} --backbone"
    try:
        backbones, options = load_backbones(cfg), trainer.evaluation_options
        for name, result in evaluate_backbones(backbones, *trainer.evaluated, cfg, **options):
            found[name] = result
    except (UsageError, RunError, MemoryError, torch.OutOfMemoryError) as error:
        lost = cfg.eval.backbone[len(found) :]
        log.warning(
            "the report lacks %s: %s; try again: %s %s", ", ".join(lost), first_line(error), way_out, lost[0]
        )
    return found


def _export_and_report(trainer: "Trainer", model: "LeJEPAModel | None") -> Path:
    from lejepa_fast.train.checkpoint.trained_model import export_encoder, load_trained
    from lejepa_fast.train.evaluation.protocol import evaluate_untrained
    from lejepa_fast.train.model.masked import MaskedModel
    from lejepa_fast.train.report.predictor_pictures import masked_examples
    from lejepa_fast.train.report.report import write_report
    from lejepa_fast.train.report.results_table import format_table

    assert model is not None  # on rank 0
    cfg = trainer.cfg
    export_encoder(model.encoder, cfg, trainer.step, trainer.run_dir)
    kind = f" (the {cfg.average.kind} of its weights)" if trainer.averaged() else ""
    print(f"evaluating the trained{kind} and the untrained encoder", file=sys.stderr)
    trained = trainer.evaluate(model, during_training=False)
    with trainer.outside_training():
        untrained = evaluate_untrained(cfg, *trainer.evaluated, **trainer.evaluation_options)
        others = _evaluate_backbones(trainer)
    results = {"untrained": untrained, "trained": trained, **others}
    trainer.loader.set_epoch(0)
    views = next(iter(trainer.loader))[0]
    masked = None
    if cfg.objective != "lejepa":
        whole = load_trained(trainer.run_dir).whole  # the one here may be sharded
        assert isinstance(whole, MaskedModel)
        masked = masked_examples(whole.to(trainer.world.device), cfg, *trainer.evaluated)
    page = write_report(
        trainer.run_dir,
        config=config.to_dict(cfg),
        data=trainer.data_identity,
        evaluated_on=cfg.eval.data or cfg.data.path,
        views_of=cfg.data.path,
        results=results,
        history=read_rows(trainer.metrics.path),
        views=[view[:6].cpu() for view in views],
        steps=trainer.step,
        masked=masked,
    )
    print(format_table(results))
    if trained.no_labels_because:
        score = f"python train/evaluate.py --checkpoint {trainer.run_dir} --data FOLDER"
        print(f"to score this encoder on labeled images later: {score} [--labels FILE.csv]")
    return page


if __name__ == "__main__":
    sys.exit(main())
