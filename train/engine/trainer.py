"""The trainer: one object that builds a run from its configuration, trains, evaluates and reports.

A run folder holds config.json, metrics.jsonl, tensorboard/, checkpoints/, and at the end
encoder.safetensors with encoder.json and report/. The position in the training is one number, the count
of finished steps; the epoch and the batch within it follow from it.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import lejepa_fast
from lejepa_fast.data import multicrop_loader
from lejepa_fast.errors import RunError
from lejepa_fast.train import config
from lejepa_fast.train.checkpoint import resume
from lejepa_fast.train.checkpoint import storage as checkpoint
from lejepa_fast.train.checkpoint.export import export_encoder
from lejepa_fast.train.checkpoint.saving import Saver
from lejepa_fast.train.config import Config
from lejepa_fast.train.engine import random_state
from lejepa_fast.train.engine.guard import StepGuard
from lejepa_fast.train.engine.metrics import Meter, Metrics, peak_memory_gib, read_rows
from lejepa_fast.train.engine.optimization import build_optimizer, build_scheduler
from lejepa_fast.train.engine.profiling import StepProfiler
from lejepa_fast.train.engine.skipped import write_skipped
from lejepa_fast.train.engine.weights_and_biases import open_run
from lejepa_fast.train.evaluation.evaluate import (
    EvalResult,
    check_validation_images,
    evaluate_model,
    evaluate_untrained,
    loading_options,
    open_splits,
)
from lejepa_fast.train.model.average import WeightAverage
from lejepa_fast.train.model.flops import count_flops, peak_flops
from lejepa_fast.train.model.initialize import memory_format, whole_model
from lejepa_fast.train.model.model import LeJEPAModel, build_model
from lejepa_fast.train.model.objective import build_loss
from lejepa_fast.train.parallel.parallelize import (
    choose_strategy,
    compiled_blocks,
    compiles,
    compute_dtype,
    eagerly,
    make_mesh,
    parallelize,
)
from lejepa_fast.train.planning.out_of_memory import settings_that_help
from lejepa_fast.train.report.report import format_table, training_speed, write_report
from lejepa_fast.train.runtime.heartbeat import IN_VAIN, on_main_for_long, tried_in_vain
from lejepa_fast.train.runtime.lock import RunLock
from lejepa_fast.train.runtime.signals import Interrupted, SignalWatch
from lejepa_fast.train.runtime.world import (
    World,
    from_main,
    gather_to_main,
    mean_over_ranks,
    on_all,
    on_main,
    the_same_on_every_rank,
)

log = logging.getLogger("lejepa_fast.train")

EVAL_FIGURES = ("knn", "linear", "embedding_std", "effective_rank", "sigreg")  # in rows of kind eval


class Trainer:
    """Everything of one run on one process. `run()` does it all.

    Raises UsageError (bad configuration, data or checkpoint) while it is built and from `run`; RunError
    (non-finite losses, disk) and Interrupted (SIGTERM, Ctrl-C; the state is saved) from `run`.
    """

    def __init__(self, cfg: Config, world: World):
        on_all(world, lambda: config.validate(cfg, world.size))
        self.cfg = cfg = config.resolve(cfg)
        self.world = world
        assert cfg.out is not None  # resolve() fills it in
        self.run_dir: Path = cfg.out
        on_all(world, self._open_data)
        on_all(world, self._build)
        mesh = make_mesh(cfg.parallel, world.device.type)
        with self.telling_of_memory():
            self.parallel = parallelize(self.model, cfg, mesh, world.device)
            # What is random in training (drop path) differs between ranks and not between runs.
            random_state.seed_rng(cfg.seed + 7919 * world.rank)
            self.optimizer = build_optimizer(self.model, cfg.optim, world.device)
            limit = cfg.optim.skip_grad_norm
            self.guard = StepGuard(self.model, self.optimizer, world, self._write_skipped, limit)
            self.total_steps = config.total_steps(cfg, len(self.loader))
            averages = cfg.average.kind != "none"
            self.average = WeightAverage(self.model, cfg.average, self.total_steps) if averages else None
        self.step = 0  # finished steps
        self._at = (0, 0)  # epoch and number of the batch in training
        self.scheduler = build_scheduler(self.optimizer, cfg.optim, self.total_steps)
        parts = self.model, self.optimizer, self.loss_fn, self.scheduler, self.loader, self.average
        self.parts = resume.Parts(*parts, data=self.data)
        self.saver = Saver(self.run_dir / "checkpoints", world, keep=cfg.keep_checkpoints)
        self.lock = RunLock(self.run_dir)
        self.signals = SignalWatch()
        self.flops_per_image = count_flops(cfg).per_image
        peak = peak_flops(world.device)
        self.meter = Meter(flops_per_image=self.flops_per_image, peak_flops=peak and peak * world.size)
        self.profiler = StepProfiler(self.run_dir, world.device, enabled=cfg.profile and world.is_main)
        self._saved_step = -1

    def _open_data(self) -> None:
        cfg, world = self.cfg, self.world
        self._quarantine = self.run_dir / "quarantine.txt"
        self.train_source, self.val_source = open_splits(cfg.data)
        check_validation_images(self.val_source)  # now, and not when the training is done
        self.data = resume.data_identity(self.train_source, self.val_source)
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.workers = config.loader_workers(cfg, here, world.device.type == "cuda")
        self.loader = multicrop_loader(
            self.train_source,
            cfg.crops,
            batch_size=cfg.data.batch_size // world.size,
            seed=cfg.seed,
            rank=world.rank,
            world_size=world.size,
            num_workers=self.workers,
            channels_last=memory_format(cfg) is torch.channels_last,
            **loading_options(cfg.data, world.device, self._quarantine),
        )

    def _build(self) -> None:
        cfg, world = self.cfg, self.world
        self.amp_dtype = compute_dtype(cfg, world.device)
        self.loss_fn = build_loss(cfg, world.device)
        self.model = build_model(cfg, meta=True)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.strategy = choose_strategy(
            cfg.parallel, parameters, ranks=world.size if world.distributed else None
        )
        if self.strategy != "fsdp":  # every process holds all of it anyway
            self.model = build_model(cfg)
        images = len(self.train_source)
        self.telling_of_memory = functools.partial(settings_that_help, cfg, world, self.strategy, images)

    # ---- the run ---------------------------------------------------------------------------------

    def run(self) -> Path:
        """Resume or start, train, evaluate, export, report. Returns the path of the report."""
        with self.signals, self.telling_of_memory():
            try:
                self._prepare()
                with self.metrics, contextlib.closing(self.profiler):
                    self._tell_the_start()
                    self.train()
                    return self.finish()
            finally:
                self.saver.close()
                self.lock.release()
                # The wrapper holds the process group; alive at the interpreter's exit, gloo's threads abort.
                self.parallel = self.model

    def _prepare(self) -> None:
        """Resume if there is something to resume, then open the run folder for writing."""
        cfg, world = self.cfg, self.world
        on_main(world, self._lock)  # before anything in the folder changes
        self._resume()
        on_main(world, lambda: config.write(cfg, self.run_dir))
        on_main(world, self._lock)
        steps = {"step": self.step, "total_steps": self.total_steps}
        opened = functools.partial(Metrics, self.run_dir, tensorboard=cfg.tensorboard, **steps)
        with random_state.preserved_rng():  # which wandb may draw from
            writer = on_main(world, lambda: opened(enabled=True, wandb=lambda: open_run(self.run_dir, cfg)))
        self.metrics = writer or opened(enabled=False)

    def _tell_the_start(self) -> None:
        """The row of kind `run`; also what the rows of earlier starts say is evaluated already."""
        cfg, world = self.cfg, self.world
        rows = read_rows(self.metrics.path) if world.is_main else []
        evaluated = {row["step"] for row in rows if row["kind"] == "eval"}
        self._steps_evaluated: set[int] = from_main(world, evaluated)
        self._given_up: set[int] = from_main(world, tried_in_vain(rows))
        facts = {
            "device": str(world.device),
            "world_size": world.size,
            "precision": "bf16" if self.amp_dtype else "fp32",
            "compiled_blocks": compiled_blocks(self.model, cfg, world.device),
            "sigreg_impl": self.loss_fn.sigreg.chosen_impl,
            "loader_backend": self.loader.backend,
            "loader_workers": self.workers,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "gflops_per_image": round(self.flops_per_image / 1e9, 3),
            "torch": torch.__version__,
            "lejepa_fast": lejepa_fast.__version__,
        }
        self.metrics.write("run", self.step, **facts)
        log.info("%s", " | ".join(f"{key} {value}" for key, value in facts.items()))
        log.info(
            "training %s on %s: %d images, %d steps of %d images, run folder %s",
            cfg.model.name,
            self.train_source.name,
            len(self.train_source),
            self.total_steps,
            cfg.data.batch_size,
            self.run_dir,
        )
        if cfg.data.path != config.EMBEDDED_DATA and (few := config.small_batch_warning(cfg.data.batch_size)):
            log.warning("%s", few)  # but not of the embedded images, which have a recipe of small batches

    def _lock(self) -> None:
        if self.run_dir.is_dir():
            self.lock.take()

    def train(self) -> None:
        """Train up to `total_steps` and save the last checkpoint; nothing to do for a finished run."""
        self.model.train()
        self.meter.restart()
        while self.step < self.total_steps:
            epoch, batch = self._position()
            if batch == 0:
                self._evaluate_if_due(epoch)
            self.loader.set_epoch(epoch)
            for number, (views, waited) in enumerate(self._batches(), batch):
                self._at = epoch, number
                self._train_step(views, epoch)
                self.meter.add(self.cfg.data.batch_size, waited)
                self._log_if_due()
                self.profiler.step(self.step)
                if self.guard.stop:
                    self._leave()
                if self.step % self.cfg.checkpoint_every == 0:
                    self.save()
                if self.step >= self.total_steps:
                    break
        self.save()
        self.saver.wait()

    def _position(self) -> tuple[int, int]:
        """Epoch, and batches taken of it, fewer than it has. The loader's own count: after a resume with
        another batch size, the number of steps does not tell."""
        state = self.loader.state_dict()
        epoch, batch = state["epoch"], state["batch"]
        return (epoch + 1, 0) if batch == len(self.loader) else (epoch, batch)

    def _batches(self) -> Iterator[tuple[list[Tensor], float]]:
        """The rest of the epoch: views, and the seconds that the training waited for them."""
        batches = iter(self.loader)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(batches, None)
            except RunError:
                # A signal to the whole process group may end the workers before this process looks at it.
                # Several ranks cannot leave here: the others are in the middle of a step.
                if self.signals.requested and not self.world.distributed:
                    self._leave()
                raise
            if batch is None:
                return
            yield batch[0], time.perf_counter() - asked

    def _train_step(self, views: list[Tensor], epoch: int) -> None:
        device = self.world.device
        self.guard.before_forward(self.step + 1)
        with torch.autocast(device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            global_z, all_z = self.parallel(views)
        out = self.loss_fn(global_z, all_z)
        out.total.backward()
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        own_part = all_z.detach().sum(dtype=torch.float32)
        stop = self.signals.requested or self.saver.failed
        self.guard.check(out.total.detach(), own_part, grad_norm, stop=stop)
        if self.cfg.optim.clip_grad_norm > 0:
            clip_grads_with_norm_(parameters, self.cfg.optim.clip_grad_norm, grad_norm)
        lr = self.scheduler.get_last_lr()[0]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)  # here, so that none are held during the next forward
        self.scheduler.step()
        self.step += 1
        self.metrics.advance()
        parts = [part.detach() for part in out]
        self._last = {"parts": parts, "z": all_z.detach(), "grad_norm": grad_norm, "lr": lr, "epoch": epoch}
        self.guard.settle(self.step, self._at)
        if self.average is not None:
            self.average.update(self.step, self.guard.bad)

    def _write_skipped(self, step: int, position: tuple[int, int], losses: dict[int, float]) -> None:
        write_skipped(self.metrics, self.train_source, self.cfg, self.world.size, step, position, losses)

    def _log_if_due(self) -> None:
        due = self.step == 1 or self.step % self.cfg.log_every == 0 or self.step == self.total_steps
        if not due:
            return
        last = self._last
        spread = last["z"].float().std(dim=1).mean()  # over samples, within each view and dimension
        values = mean_over_ranks(self.world, torch.stack([*last["parts"], spread, last["grad_norm"]]))
        loss, prediction, sigreg, embedding_std, grad_norm = values.tolist()  # the one wait for the device
        self.metrics.write(
            "train",
            self.step,
            epoch=last["epoch"],
            loss=loss,
            prediction=prediction,
            sigreg=sigreg,
            lr=last["lr"],
            grad_norm=grad_norm,
            embedding_std=embedding_std,
            memory_gib=peak_memory_gib(self.world.device),
            **self.meter.read(),
        )

    # ---- checkpoints -----------------------------------------------------------------------------

    def save(self) -> None:
        """Begin to save the present step, unless that is done: the training goes on while it is written.

        RunError on every rank if the save before failed; `self.saver.wait` tells of this one.
        """
        if self._saved_step == self.step:
            return
        self.guard.flush()  # which on a GPU waits for the steps under way: what comes now is the save
        began = time.perf_counter()
        state = {
            "config": config.to_dict(self.cfg),
            **self.parts.state(),
            "rng": gather_to_main(self.world, random_state.capture_rng()),
        }
        self.saver.start(self.step, self.parts.tensors(), state)
        self._saved_step = self.step
        self.meter.saved(time.perf_counter() - began)

    def _leave(self) -> None:
        self.saver.wait()  # one that failed is why we leave
        self.save()
        self.saver.wait()
        signum = from_main(self.world, self.signals.signum) or signal.SIGTERM
        raise Interrupted(
            f"stopped by {signal.Signals(signum).name} after step {self.step} of {self.total_steps}; "
            f"checkpoint saved in {self.run_dir}; run the same command again to continue",
            signum,
        )

    def _resume(self) -> None:
        run_dir, current = self.run_dir, config.to_dict(self.cfg)
        found = on_main(self.world, lambda: resume.choose_checkpoint(run_dir, self.cfg.resume))
        path = from_main(self.world, found[0] if found else None)
        if path is None:
            return
        state = from_main(self.world, found[1] if found else None)
        assert state is not None
        with the_same_on_every_rank():  # all have rank 0's `state`
            checkpoint.check_same_model(state["config"], current, path)
        on_main(self.world, lambda: resume.check_same_run(state, current, self.data, path, run_dir))
        self.parts.load(path, state, self.world)
        if self.world.rank < len(state["rng"]):
            random_state.restore_rng(state["rng"][self.world.rank])
        else:  # more ranks than before: the new ones start a stream of their own
            random_state.seed_rng(self.cfg.seed + 7919 * self.world.rank + state["step"])
        self.step = state["step"]
        if resume.is_own(path, run_dir):
            self._saved_step = self.step
        log.info("resuming from %s, step %d of %d", path, self.step, self.total_steps)
        if self.step >= self.total_steps:
            log.info("training is complete: only evaluating; to train anew, choose another --out")
        resume.tell_changes(state["config"], current)

    # ---- evaluation ------------------------------------------------------------------------------

    def _evaluate_if_due(self, epoch: int) -> None:
        """kNN and linear probe between epochs, which leave no trace in the training: see `_evaluating`."""
        every = self.cfg.eval.every
        if not every or not epoch or epoch % every or self.step in self._steps_evaluated:
            return
        if self.step in self._given_up:
            log.warning(IN_VAIN, epoch)
            return
        self.save()  # so that a signal need not wait for the evaluation
        began = time.perf_counter()  # `save` pauses the meter for itself
        self.saver.wait()  # a run that starts again must do so here: it drops later rows, the next one, too
        self.metrics.write("evaluating", self.step, epoch=epoch)
        model = self._whole_model()
        on_main_for_long(self.world, lambda: self._evaluate(model, epoch, during_training=True))
        self._steps_evaluated.add(self.step)
        self.meter.pause(time.perf_counter() - began)

    def _whole_model(self) -> LeJEPAModel | None:
        """The model to evaluate and export, whole and on rank 0: the averaged one where there is one.

        All ranks call it.
        """
        averaged = self.parts.averaged()
        if self.strategy == "fsdp" or averaged:
            return whole_model(self.model, self.cfg, self.world, averaged)
        return self.model

    def _evaluate(self, model: LeJEPAModel | None, epoch: int, *, during_training: bool) -> EvalResult:
        """Evaluate on rank 0 and write the row, unless there is one. `during_training`: the short way."""
        assert model is not None  # on rank 0
        linear_steps = self.cfg.eval.linear_steps if during_training else None  # None: all
        with self._evaluating():
            result = evaluate_model(
                model,
                self.train_source,
                self.val_source,
                self.cfg.eval,
                recipe=self.cfg.crops,
                linear=linear_steps != 0,
                linear_steps=linear_steps,
                train_images=self.cfg.eval.train_images if during_training else 0,
                seed=self.cfg.seed,
                data=self.cfg.data,
                **self._how_to_evaluate,
            )
        if self.step not in self._steps_evaluated:
            values = {name: getattr(result, name) for name in EVAL_FIGURES}
            self.metrics.write("eval", self.step, epoch=epoch, **values)
            probes = {"kNN": result.knn, "linear probe": result.linear}
            known = [f"{name} {value:.1f} %" for name, value in probes.items() if value is not None]
            told = ", ".join(known) or "no labels"
            log.info("evaluation after epoch %d: %s, embedding std %.3f", epoch, told, result.embedding_std)
        return result

    @property
    def _how_to_evaluate(self) -> dict[str, Any]:
        """How the trained and the untrained encoder are evaluated."""
        return {
            "device": self.world.device,
            "num_workers": self.workers,
            "amp_dtype": self.amp_dtype,
            "quarantine": self._quarantine,
        }

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        """Leaves at once on a signal, since the training is saved. No trace of what is inside stays in the
        training: no gradient, mode, buffer or random state."""
        uncompiled = eagerly() if compiles(self.cfg, self.world.device) else contextlib.nullcontext()
        message = (
            f"stopped by a signal during the evaluation after step {self.step} of {self.total_steps}; "
            f"checkpoint saved in {self.run_dir}; run the same command again to continue"
        )
        with self.signals.leaving_at_once(message), random_state.preserved_rng(), uncompiled:
            yield

    def finish(self) -> Path:
        """Export the encoder, evaluate it beside the untrained one, write the report; returns its path."""
        model = self._whole_model()
        report = on_main_for_long(self.world, lambda: self._finish(model))
        return from_main(self.world, report)

    def _finish(self, model: LeJEPAModel | None) -> Path:
        cfg = self.cfg
        assert model is not None  # on rank 0
        export_encoder(model.encoder, cfg, self.step, self.run_dir)
        averaged = f" (the {cfg.average.kind} of its weights)" if self.parts.averaged() else ""
        log.info("evaluating the trained%s and the untrained encoder", averaged)
        epoch, batch = self._position()
        trained = self._evaluate(model, epoch + (batch > 0), during_training=False)
        with self._evaluating():
            untrained = evaluate_untrained(cfg, self.train_source, self.val_source, **self._how_to_evaluate)
        history = read_rows(self.metrics.path)
        page = write_report(
            self.run_dir,
            config=config.to_dict(cfg),
            trained=trained,
            untrained=untrained,
            history=history,
            views=self._example_views(),
            images_per_second=training_speed(history),
            steps=self.step,
        )
        print(format_table(trained=trained, untrained=untrained))
        return page

    def _example_views(self) -> list[Tensor]:
        """The first images that this process trained on, as it saw them."""
        self.loader.set_epoch(0)
        return [view[:6].cpu() for view in next(iter(self.loader))[0]]
