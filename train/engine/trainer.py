"""The trainer. Read it from top to bottom: build a run, resume it, train, save, evaluate.

A run folder holds config.json, metrics.jsonl, tensorboard/ and checkpoints/; `train/pretrain.py` adds the
exported encoder and the report. The position in the training is the number of finished steps.
"""

import contextlib
import logging
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

import lejepa_fast
from lejepa_fast.data import multicrop_loader
from lejepa_fast.data.sampler import EpochSchedule
from lejepa_fast.errors import RunError, UsageError
from lejepa_fast.train import config
from lejepa_fast.train.checkpoint import resume, storage
from lejepa_fast.train.checkpoint.saving import Saver
from lejepa_fast.train.config import Config
from lejepa_fast.train.engine import random_state
from lejepa_fast.train.engine.guard import StepGuard
from lejepa_fast.train.engine.metrics import Metrics, peak_memory_gib
from lejepa_fast.train.engine.objectives import Masked, Objective
from lejepa_fast.train.engine.optimization import build_optimizer, build_scheduler, set_weight_decay
from lejepa_fast.train.engine.out_of_memory import settings_that_help
from lejepa_fast.train.engine.profiling import step_profiler
from lejepa_fast.train.engine.weights_and_biases import WandbRun
from lejepa_fast.train.evaluation import protocol
from lejepa_fast.train.evaluation.protocol import EvalResult
from lejepa_fast.train.model.crop_sizes import sizes_explained
from lejepa_fast.train.model.flops import count_flops, peak_flops
from lejepa_fast.train.model.initialize import memory_format, whole_model
from lejepa_fast.train.model.model import LeJEPAModel, TrainedModule, build_model, evaluated
from lejepa_fast.train.model.objective import build_loss
from lejepa_fast.train.parallel.parallelize import (
    add_average,
    center_model,
    choose_strategy,
    compiles,
    compute_dtype,
    eagerly,
    make_mesh,
    parallelize,
)
from lejepa_fast.train.runtime.files import RunLock, read_rows
from lejepa_fast.train.runtime.signals import Interrupted, SignalWatch
from lejepa_fast.train.runtime.world import (
    World,
    from_main,
    gather_to_main,
    mean_over_ranks,
    on_all,
    on_main,
    require_same_on_all,
    same_error_on_all_ranks,
)

log = logging.getLogger("lejepa_fast.train")

EVALUATION_ATTEMPTS = 2
EVALUATION_FIGURES = ("knn", "linear", "embedding_std", "effective_rank", "sigreg")


# Machines may have other CPUs, and keep their copies of the images elsewhere (`data_identity` compares them).
MAY_DIFFER = (
    *("--data.path", "--data.workers", "--data.prefetch"),
    *("--eval.data", "--eval.labels", "--eval.backbone"),
)


def facts_of(cfg: Config) -> dict[str, Any]:
    """What all ranks must have in common: versions, and the options by their names on the command line."""
    packages = (lejepa_fast, torch, timm)
    facts: dict[str, Any] = {f"version of {package.__name__}": package.__version__ for package in packages}
    for name, value in config.flat(config.to_dict(cfg)).items():
        facts["--" + name.replace("_", "-")] = value
    facts["--out (give --out; its default depends on --data.path)"] = facts.pop("--out")
    return {name: value for name, value in facts.items() if name not in MAY_DIFFER}


def _checked(cfg: Config, world: World) -> Config:
    config.validate(cfg, world.size)
    return config.resolve(cfg)


class Trainer:
    """One run on one process.

    `run()` resumes or starts the run, trains and saves. As a context manager the trainer holds the run folder
    open, so that a caller can go on after `train()`: see `train/pretrain.py`.

    Args:
        cfg: the configuration of the run.
        world: this rank's place.

    Raises:
        UsageError: bad configuration, data or checkpoint.
        RunError: three non-finite steps in a row, the disk refuses a file, or out of memory.
        Interrupted: SIGTERM or Ctrl-C; the state is saved.
    """

    def __init__(self, cfg: Config, world: World):
        self.cfg = cfg = on_all(world, lambda: _checked(cfg, world))
        self.world = world
        require_same_on_all(world, facts_of(cfg))
        assert cfg.out is not None  # resolve() fills it in
        self.run_dir: Path = cfg.out
        on_all(world, self._open_and_build)
        in_use = {
            "number of training images": self.data_identity["train_images"],
            "number of validation images": self.data_identity["val_images"],
            "digest of the images' names": self.data_identity["names_sha256"][:12],
            "range of values": self.cfg.data.value_range,
            "precision in use": str(self.amp_dtype),
            "strategy in use": self.strategy,
            "implementation of SIGReg in use": self._sigreg_impl,
            "backend of the data in use": self.loader.backend,
        }
        require_same_on_all(world, in_use)
        with self._memory_advice():
            mesh = make_mesh(cfg.parallel, world.device.type)
            wrapped = parallelize(self.model, cfg, mesh, world.device)
            self.total_steps = config.total_steps(cfg, len(self.loader))
            second = center_model(self.model, cfg, mesh, world.device)
            self.average, self.wrapped = add_average(self.model, wrapped, second, cfg, mesh, self.total_steps)
            # Random numbers of the training (drop path) differ between ranks, and not between runs.
            random_state.seed_rng(cfg.seed, world.rank)
            self.optimizer = build_optimizer(self.model, cfg.optim)
            max_norm, record = cfg.optim.skip_grad_norm, self._record_skipped
            self.guard = StepGuard(self.model, self.optimizer, world, record, max_norm)
            self.objective = self._build_objective()
        self.scheduler = build_scheduler(self.optimizer, cfg.optim, self.total_steps)
        self.step = 0  # finished steps
        self.position = (0, 0)  # epoch, and number of the batch in it, of the step in progress
        self.saver = Saver(self.run_dir / "checkpoints", world, keep=cfg.keep_checkpoints)
        self.lock = RunLock(self.run_dir)
        self.signals = SignalWatch()
        self._saved_step = -1

    def _open_and_build(self) -> None:
        with sizes_explained(self.cfg):
            self._open_data()
            self._build_model()

    def _open_data(self) -> None:
        cfg, world = self.cfg, self.world
        self.train_source, self.val_source = protocol.open_splits(cfg.data)
        data = replace(cfg.data, value_range=self.train_source.value_range)
        self.cfg = cfg = replace(cfg, data=data)
        if world.is_main:  # now, not after the training
            self.evaluated = protocol.open_evaluation(cfg, (self.train_source, self.val_source))
            protocol.check_validation_images(self.evaluated[1], cfg)
        self.data_identity = resume.data_identity(self.train_source, self.val_source)
        self.bad_images = self.run_dir / "bad_images.txt"
        processes_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.workers = config.loader_workers(cfg, processes_here, world.device.type == "cuda")
        self.loader = multicrop_loader(
            self.train_source,
            cfg.crops,
            batch_size=cfg.data.batch_size // world.size,
            seed=cfg.seed,
            rank=world.rank,
            world_size=world.size,
            num_workers=self.workers,
            channels_last=memory_format(cfg) is torch.channels_last,
            **protocol.loading_options(cfg.data, world.device, self.bad_images),
        )

    def _build_model(self) -> None:
        cfg, world = self.cfg, self.world
        self.amp_dtype = compute_dtype(cfg, world.device)
        self.loss_fn = build_loss(cfg, world.device)
        counted = build_model(cfg, meta=True)
        self.flops_per_image = count_flops(cfg, counted).per_image
        self.parameters = sum(parameter.numel() for parameter in counted.parameters())
        ranks = world.size if world.distributed else None
        self.strategy = choose_strategy(cfg.parallel, self.parameters, ranks=ranks)
        with self._memory_advice():  # without FSDP every process holds the whole model
            self.model = build_model(cfg, meta=self.strategy == "fsdp")

    def _build_objective(self) -> Objective:
        if isinstance(self.model, LeJEPAModel):
            return Objective()
        schedule = self._schedule(self.world.rank)
        return Masked(self.cfg, self.model, schedule, self.world.device, self.total_steps)

    def _schedule(self, rank: int) -> EpochSchedule:
        """Which images make up the batches of a rank."""
        images, ranks = len(self.train_source), self.world.size
        return EpochSchedule(images, self.cfg.data.batch_size // ranks, self.cfg.seed, rank, ranks)

    @property
    def _sigreg_impl(self) -> str:
        """The implementation of SIGReg in use; "none" without SIGReg."""
        sigreg = self.loss_fn.sigreg
        return "none" if sigreg is None else sigreg.chosen_impl

    def _memory_advice(self) -> AbstractContextManager[None]:
        return settings_that_help(self.cfg, self.world, self.strategy, len(self.train_source))

    # ---- start, resume, end ----------------------------------------------------------------------

    def run(self) -> None:
        """Resume or start the run, and train it to its end."""
        with self:
            self.train()

    def __enter__(self) -> "Trainer":
        with ExitStack() as stack:
            stack.enter_context(self._memory_advice())
            stack.enter_context(self.signals)
            stack.callback(self._release)
            self._open_run_folder()
            stack.enter_context(self.metrics)
            self.profiler = None
            if self.cfg.profile and self.world.is_main:
                profiler = step_profiler(self.run_dir / "profile", self.world.device, done=self.step)
                self.profiler = stack.enter_context(profiler)
            self._log_start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def _release(self) -> None:
        self.loader.close()
        self.saver.close()
        self.lock.release()
        # The wrapper holds the process group. If it lives at the interpreter's exit, gloo's threads abort.
        self.wrapped = self.model

    def _open_run_folder(self) -> None:
        """Resume from a checkpoint if there is one, then open the run folder for writing."""
        cfg, world = self.cfg, self.world
        on_main(world, lambda: self.lock.take() if self.run_dir.is_dir() else None)
        self._resume()
        on_main(world, lambda: config.write(cfg, self.run_dir))
        on_main(world, self.lock.take)
        options: dict[str, Any] = {"enabled": world.is_main, "tensorboard": cfg.tensorboard}
        options |= {"step": self.step, "total_steps": self.total_steps}
        if peak := peak_flops(world.device):
            options["peak_rate"] = peak * world.size / self.flops_per_image
        if cfg.wandb:
            options["wandb"] = lambda: WandbRun(self.run_dir, cfg.wandb, config.to_dict(cfg))
        with random_state.preserved_rng():  # wandb may draw random numbers
            self.metrics = on_all(world, lambda: Metrics(self.run_dir, **options))
        rows = read_rows(self.metrics.path) if world.is_main else []
        steps = [[row["step"] for row in rows if row["kind"] == kind] for kind in ("eval", "evaluating")]
        self._evaluated, self._evaluations_begun = map(Counter, from_main(world, steps))

    def _resume(self) -> None:
        run_dir, current, world = self.run_dir, config.to_dict(self.cfg), self.world
        found = from_main(world, on_main(world, lambda: resume.choose_checkpoint(run_dir, self.cfg.resume)))
        if found is None:
            return
        path, state = found
        on_main(world, lambda: resume.check_same_run(state, current, self.data_identity, path, run_dir))
        self._load(path, state)
        if world.rank < len(state["rng"]):
            random_state.restore_rng(state["rng"][world.rank])
        else:  # more ranks than before
            random_state.seed_rng(self.cfg.seed, world.rank, state["step"])
        self.step = state["step"]
        if resume.is_own(path, run_dir):
            self._saved_step = self.step
        log.info("resuming from %s, step %d of %d", path, self.step, self.total_steps)
        if self.step >= self.total_steps:
            log.info("the training is complete; to train anew, choose another --out")
        if world.is_main:
            resume.log_changes(state["config"], current)

    def _log_start(self) -> None:
        cfg, world = self.cfg, self.world
        facts = {
            "device": str(world.device),
            "world_size": world.size,
            "precision": "bf16" if self.amp_dtype else "fp32",
            "compiled": compiles(cfg, world.device),
            "sigreg_impl": self._sigreg_impl,
            "loader_backend": self.loader.backend,
            "loader_workers": self.workers,
            "parameters": self.parameters,
            "gflops_per_image": round(self.flops_per_image / 1e9, 3),
            "torch": torch.__version__,
            "lejepa_fast": lejepa_fast.__version__,
        }
        self.metrics.write("run", self.step, **facts)
        log.info("%s", " | ".join(f"{key} {value}" for key, value in facts.items()))
        batch, source = cfg.data.batch_size, self.train_source
        log.info(
            f"training {cfg.model.name} on {source.name}: {len(source)} images, {self.total_steps} steps of "
            f"{batch} images, run folder {self.run_dir}"
        )
        # The preset of the embedded images is made for small batches, and I-JEPA has no SIGReg.
        for_small = cfg.data.path == config.EMBEDDED_DATA or cfg.objective == "ijepa"
        if not for_small and (warning := config.small_batch_warning(batch)):
            log.warning("%s", warning)

    def _load(self, path: Path, state: Mapping[str, Any]) -> None:
        """Load a checkpoint of any number of ranks. If it is of other images, the loader takes over the epoch
        only. An averaged model that this run does not continue is left out.

        UsageError if a tensor is missing in the run or in the checkpoint, or has another shape.
        """
        if self.average is not None:
            self.average.restore(state.get("average"))
        tensors = on_all(self.world, lambda: self._tensors_to_load(path))
        with same_error_on_all_ranks():  # DCP raises an error of one rank on all
            storage.load_tensors(path, tensors)
        if self.average is not None:
            self.average.follow()
        # Rate, decay and betas stay those of this run's settings, and the rate of the next step follows this
        # run's schedule, which may be longer than the checkpoint's.
        self.scheduler = build_scheduler(self.optimizer, self.cfg.optim, self.total_steps, state["step"])
        same_images = state["data"] == self.data_identity
        position = {"epoch": state["loader"]["epoch"], "images_seen": 0}
        self.loader.load_state_dict(state["loader"] if same_images else position)

    def _tensors_to_load(self, path: Path) -> dict[str, Tensor]:
        """As `_tensors`, with the optimizer's state allocated, which a new optimizer does not have."""
        saved = storage.saved_tensors(path)
        self.optimizer.state.clear()
        wanted = self._tensors()
        parameters = dict(self.model.named_parameters())
        for name in sorted(saved.keys() - wanted.keys()):
            section, _, rest = name.partition(".")
            if section == "average" and not self.averaged():
                continue
            parameter, _, slot = rest.rpartition(".")
            if section != "optimizer" or parameter not in parameters:
                raise UsageError(
                    f"checkpoint {path} does not fit this run: it holds {name}, which this model does not "
                    "have; choose another --out"
                )
            owner, like = parameters[parameter], saved[name]
            if like.ndim and like.shape == owner.shape:  # sharded as the parameter
                wanted[name] = torch.empty_like(owner, dtype=like.dtype)
            else:
                wanted[name] = torch.empty_like(like, device=owner.device)
            self.optimizer.state[owner][slot] = wanted[name]
        return wanted

    # ---- training --------------------------------------------------------------------------------

    def train(self) -> None:
        """Train up to `total_steps` and save the last checkpoint; nothing to do for a finished run."""
        self.model.train()
        self.metrics.restart()
        while self.step < self.total_steps:
            # After a resume with another batch size the number of steps does not tell the position.
            epoch, first_batch = self.loader.position
            if first_batch == 0:
                self._evaluate_if_due(epoch)
            self.loader.set_epoch(epoch)
            for batch, (views, waited) in enumerate(self._batches(), first_batch):
                self.position = epoch, batch
                self.train_step(views, epoch)
                self.metrics.count_step(self.cfg.data.batch_size, waited)
                if self.step == 1 or self.step % self.cfg.log_every == 0 or self.step == self.total_steps:
                    self.log_metrics()
                if self.profiler is not None:
                    self.profiler.step()
                if self.guard.stop:
                    self._stop()
                if self.step % self.cfg.checkpoint_every == 0:
                    self.save()
                if self.step >= self.total_steps:
                    break
        self.save()
        self.saver.wait()

    def train_step(self, views: list[Tensor], epoch: int) -> None:
        """One step: forward, loss, backward, agreement of all ranks, clipping, optimizer.

        `views`: tensors (B, C, H, W) of B images of this rank, global views first.
        """
        device = self.world.device
        self.guard.before_forward(self.step + 1)
        inputs = self.objective.inputs(views, epoch, self.position[1])
        with torch.autocast(device.type, dtype=self.amp_dtype, enabled=self.amp_dtype is not None):
            outputs = self.wrapped(*inputs)
        out = self.loss_fn(*outputs)
        out.total.backward()

        parameters = [p for p in self.model.parameters() if p.grad is not None]
        grad_norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(grad_norm, DTensor):
            grad_norm = grad_norm.full_tensor()
        own_part = outputs[-1].detach().sum(dtype=torch.float32)
        stop = self.signals.requested or self.saver.failed
        self.guard.check(out.total.detach(), own_part, grad_norm, stop=stop)
        if self.cfg.optim.clip_grad_norm > 0:
            clip_grads_with_norm_(parameters, self.cfg.optim.clip_grad_norm, grad_norm)

        lr = self.scheduler.get_last_lr()[0]
        decay = set_weight_decay(self.optimizer, self.cfg.optim, self.step, self.total_steps)
        self.optimizer.step()  # skipped on the device if the guard found a bad value
        self.optimizer.zero_grad(set_to_none=True)  # no gradients are held during the next forward pass
        self.scheduler.step()
        self.step += 1
        parts = [part.detach() for part in out]
        self.last: dict[str, Any] = {"parts": parts, "kept": self.objective.kept(outputs)}
        self.last |= {"grad_norm": grad_norm, "lr": lr, "weight_decay": decay, "epoch": epoch}
        self.guard.settle(self.step, self.position)
        self.objective.finish(self.step, self.guard.bad)
        if self.average is not None:
            self.average.update(self.step, self.guard.bad)

    def _batches(self) -> Iterator[tuple[list[Tensor], float]]:
        """The rest of the epoch: views, and the seconds that the training waited for them."""
        batches = iter(self.loader)
        epoch, first_batch = self.loader.position
        left = len(self.loader) - first_batch
        while True:
            began = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                if left:  # the other ranks would wait for this one in their next step
                    raise RunError(
                        f"epoch {epoch} ended {left} of {len(self.loader)} batches early on rank "
                        f"{self.world.rank}: a defect of the loader; use another --data.backend than "
                        f"{self.loader.backend}"
                    )
                return
            left -= 1
            yield batch[0], time.perf_counter() - began

    def log_metrics(self) -> None:
        """Write a row of kind "train" about the last step: the only place where metrics leave the device."""
        last = self.last
        spread = self.objective.spread(last["kept"])
        values = mean_over_ranks(self.world, torch.stack([*last["parts"], spread, last["grad_norm"]]))
        names = ("loss", "prediction", "sigreg", "embedding_std", "grad_norm")
        row = dict(zip(names, values.tolist(), strict=True))  # waits for the device
        row |= {"lr": last["lr"], "memory_gib": peak_memory_gib(self.world.device)}
        if self.cfg.optim.final_weight_decay is not None:
            row["weight_decay"] = last["weight_decay"]
        if self.world.is_main:
            row |= self.objective.figures(last["kept"])
        self.metrics.write("train", self.step, epoch=last["epoch"], **row)

    def _record_skipped(self, step: int, position: tuple[int, int], losses: dict[int, float]) -> None:
        """Write a row of kind "skipped" for each rank in `losses`, with the images of its batch: a function
        of seed and position. A bad image is listed although another one took its place."""
        epoch, batch = position
        for rank, loss in losses.items():
            ids = list(next(self._schedule(rank).keys(epoch, batch)).indices)
            names = [self.train_source.describe(index) for index in ids]
            self.metrics.write("skipped", step, epoch=epoch, rank=rank, loss=loss, ids=ids, images=names)

    # ---- saving ----------------------------------------------------------------------------------

    def save(self) -> None:
        """Begin to save the present step, unless it is saved; the training goes on meanwhile. RunError on
        every rank if the previous save failed; `self.saver.wait` reports the result of this one."""
        if self._saved_step == self.step:
            return
        self.guard.flush()  # waits for the steps that a GPU has queued; the time from here on is the save's
        began = time.perf_counter()
        state = {
            "config": config.to_dict(self.cfg),
            "data": self.data_identity,
            "loader": self.loader.state_dict(),
            "average": self.average and self.average.state(),
            "rng": gather_to_main(self.world, random_state.capture_rng()),
        }
        self.saver.start(self.step, self._tensors(), state)
        self._saved_step = self.step
        self.metrics.pause(time.perf_counter() - began, saving=True)

    def _tensors(self) -> dict[str, Tensor]:
        """The tensors of a checkpoint by their names there; they share memory with those of the run."""
        tensors = {f"model.{name}": tensor for name, tensor in self.model.state_dict().items()}
        tensors |= {f"loss.{name}": tensor for name, tensor in self.loss_fn.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.averaged().items()}
        for name, parameter in self.model.named_parameters():
            for slot, tensor in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{name}.{slot}"] = tensor
        return tensors

    def averaged(self) -> dict[str, Tensor]:
        """The tensors of the averaged model; {} if there is none yet."""
        return self.average.tensors() if self.average is not None else {}

    def _stop(self) -> None:
        self.saver.wait()  # if this save failed, that is why the run stops
        self.save()
        self.saver.wait()
        signum = from_main(self.world, self.signals.signum) or signal.SIGTERM
        with same_error_on_all_ranks():
            raise Interrupted(self._stopped_by(signal.Signals(signum).name), signum)

    def _stopped_by(self, what: str) -> str:
        return (
            f"stopped by {what} after step {self.step} of {self.total_steps}; checkpoint saved in "
            f"{self.run_dir}; run the same command again to continue"
        )

    # ---- evaluation ------------------------------------------------------------------------------

    def _evaluate_if_due(self, epoch: int) -> None:
        """Evaluate between epochs, without any effect on the training."""
        every = self.cfg.eval.every
        if not every or not epoch or epoch % every or self._evaluated[self.step]:
            return
        if self._evaluations_begun[self.step] >= EVALUATION_ATTEMPTS:
            log.warning(
                f"skipping the evaluation after epoch {epoch}: it ended the run {EVALUATION_ATTEMPTS} times; "
                "--eval.train-images makes evaluations shorter, --eval.every 0 leaves only that at the end"
            )
            return
        self.save()
        began = time.perf_counter()
        self.saver.wait()  # a signal during the evaluation then need not save
        self.metrics.write("evaluating", self.step, epoch=epoch)
        model = self.whole_model()
        on_main(self.world, lambda: self.evaluate(model, during_training=True))
        self._evaluated[self.step] += 1
        self.metrics.pause(time.perf_counter() - began)

    def whole_model(self) -> LeJEPAModel | None:
        """Return the model to evaluate and export, unsharded, on rank 0: the averaged one if there is one,
        with the target encoder if there is one. All ranks call it."""
        averaged = self.averaged()
        whole: TrainedModule | None = self.model
        if self.strategy == "fsdp" or averaged:
            whole = whole_model(self.model, self.cfg, self.world, averaged)
        return None if whole is None else evaluated(whole)

    def evaluate(self, model: LeJEPAModel | None, *, during_training: bool) -> EvalResult:
        """Evaluate the `whole_model` on rank 0 and write a row of kind "eval", unless this step has one.

        `during_training`: on fewer images and with fewer steps of the linear probe, as configured.
        """
        assert model is not None  # on rank 0
        cfg, options = self.cfg, self.evaluation_options
        if during_training:
            options |= {"linear_steps": cfg.eval.linear_steps, "train_images": cfg.eval.train_images}
            options["with_few_labels"] = False
        with self.outside_training():
            result = protocol.evaluate_model(model, *self.evaluated, cfg, **options)
        if not self._evaluated[self.step]:
            epoch, batch = self.loader.position
            epoch += batch > 0
            figures = {name: getattr(result, name) for name in EVALUATION_FIGURES}
            figures |= {f"{name}_r2": score.r2 for name, score in (result.regression or {}).items()}
            self.metrics.write("eval", self.step, epoch=epoch, **figures)
            if self.metrics.log_is_due("eval", self.step):
                known = [f"{name} {value:.3g}" for name, value in figures.items() if value is not None]
                log.info("evaluation after epoch %d: %s", epoch, ", ".join(known))
        return result

    @property
    def evaluation_options(self) -> dict[str, Any]:
        """Arguments that the evaluations of the trained and of the untrained encoder share."""
        options = {"device": self.world.device, "amp_dtype": self.amp_dtype}
        return {**options, "num_workers": self.workers, "bad_images": self.bad_images}

    @contextlib.contextmanager
    def outside_training(self) -> Iterator[None]:
        """For work beside the training, whose state is saved: a signal exits at once, compiled blocks run
        eagerly, and random states are restored."""
        uncompiled = eagerly() if compiles(self.cfg, self.world.device) else contextlib.nullcontext()
        message = self._stopped_by("a signal during the evaluation")
        with self.signals.exit_at_once(message), random_state.preserved_rng(), uncompiled:
            yield
