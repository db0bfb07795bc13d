"""`multicrop_loader` and `eval_loader`: what a trainer sees, whichever backend makes the pixels."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from lejepa_fast.data.backends.base import Backend, RawBatch
from lejepa_fast.data.backends.choose_backend import make_backend
from lejepa_fast.data.backends.memory import give_memory_back
from lejepa_fast.data.bad_images import DEFAULT_MAX_BAD_FRACTION, Omission, Quarantine, Substitutes
from lejepa_fast.data.identity import names_digest
from lejepa_fast.data.recipe import IMAGENET_MEAN, IMAGENET_STD, MultiCropRecipe
from lejepa_fast.data.sampler import BatchKey, EpochSchedule, Part
from lejepa_fast.data.sources.base import ImageSource, check_sizes
from lejepa_fast.data.state import check_fields, wrong_field
from lejepa_fast.data.views import EvalPlan, TrainPlan
from lejepa_fast.errors import UsageError

log = logging.getLogger("lejepa_fast.data")

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.uint8)


class MultiCropLoader:
    """Iterable over (views, targets), one epoch per pass. Made by `multicrop_loader`.

    After a complete pass the loader stands at the next epoch, so a trainer that never calls
    `set_epoch` still gets new crops each time. A pass that is broken off starts over.
    """

    def __init__(
        self,
        backend: Backend,
        schedule: EpochSchedule,
        recipe: MultiCropRecipe,
        quarantine: Quarantine,
        *,
        labelled: bool,
        names: str,
        device: torch.device | None,
        dtype: torch.dtype,
        channels_last: bool,
    ) -> None:
        self._backend, self._schedule, self._quarantine = backend, schedule, quarantine
        self._names = names  # of the images, their digest: states of other images are told by it
        self._labelled, self._device, self._dtype = labelled, device, dtype
        self._layout = torch.channels_last if channels_last else torch.contiguous_format
        self._mean, self._std = channel_values(recipe.mean, device), channel_values(recipe.std, device)
        self._stand_at(0)

    def _stand_at(
        self,
        epoch: int,
        batch: int = 0,
        *,
        since: int = 0,
        earlier: Sequence[Part] = (),
        resuming: bool = False,
    ) -> None:
        self._epoch = epoch
        self._batch = batch  # batches of this epoch that the trainer has taken
        # The epoch so far: parts on other numbers of ranks, and the batch since which it runs on these.
        self._earlier, self._since = list(earlier), since
        self._resuming = resuming

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._backend.name

    @property
    def epoch(self) -> int:
        """The epoch that the current or next pass belongs to."""
        return self._epoch

    def __len__(self) -> int:
        """Batches per epoch, equal on all ranks."""
        return len(self._schedule)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass. A restored position within that same epoch is kept."""
        if epoch < 0:
            raise UsageError(f"epoch must be 0 or more; got {epoch}")
        if self._resuming and epoch == self._epoch:
            return
        self._stand_at(epoch)

    def __iter__(self) -> Iterator[tuple[list[Tensor], Tensor | None]]:
        if not self._resuming:
            self._stand_at(self._epoch)
        epoch, start = self._epoch, self._batch
        self._resuming = False
        substitutes = Substitutes(
            self._schedule, epoch, start, self._quarantine, since=self._since, earlier=self._earlier
        )
        for raw in self._backend.batches(self._schedule.keys(epoch, start), substitutes):
            batch = self._finish(raw)
            self._quarantine.check()  # so that too many bad files stop all ranks, whoever meets them
            self._batch += 1
            yield batch
        self._stand_at(epoch + 1)
        give_memory_back()

    @property
    def quarantined(self) -> list[int]:
        """Numbers of the images that are known to be bad, ascending."""
        return sorted(self._quarantine.known)

    def state_dict(self) -> dict[str, Any]:
        """Position of the batches handed out: valid inside the loop body and between epochs.

        After the last batch of an epoch, also within the loop body, it is the start of the next epoch.
        """
        complete = self._batch == len(self)
        self._quarantine.refresh()  # what other ranks have met up to here belongs to the state
        bad = self.quarantined
        return {
            "epoch": self._epoch + complete,
            "batch": 0 if complete else self._batch,
            "seed": self._schedule.seed,
            "global_batch": self._schedule.global_batch,
            "world_size": self._schedule.world_size,
            "since": 0 if complete else self._since,
            "earlier": [] if complete else [list(part) for part in self._earlier],
            "images": self._schedule.num_images,
            "names_sha256": self._names,
            "bad": bad,
            "reasons": self._quarantine.reasons(bad),
            "backend": self.backend,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where the state was taken, on any number of ranks.

        With the same global batch (batch size x ranks) every image of the rest is seen as it would have been.
        With another one the epoch goes on at the last batch that does not leave an image out, which repeats
        less than one batch per rank. In mid-epoch the places of bad images need the knowledge of all ranks:
        share the quarantine file. Of a state of other images (their number or names tell) the bad ones are
        not taken over, and a warning says so. Raises `UsageError` when the state does not fit: in mid-epoch,
        another seed or other images would silently repeat some images and leave others out.
        """
        check_fields(state)
        epoch, batch = state["epoch"], state["batch"]
        own = self._schedule
        for key, meaning, mine in (
            ("seed", "seed", own.seed),
            ("images", "number of images", own.num_images),
        ):
            if batch and state.get(key, mine) != mine:
                raise UsageError(
                    f"the loader state was saved in mid-epoch with {meaning} {state[key]}, now it is {mine}; "
                    "resume with the same, or from the end of an epoch"
                )
        same_images = all(
            state.get(key, mine) == mine
            for key, mine in (("images", own.num_images), ("names_sha256", self._names))
        )
        if batch and not same_images:
            raise UsageError(
                "the loader state was saved in mid-epoch of other images (they have other names); "
                "resume with the same, or from the end of an epoch"
            )
        part, earlier = self._parts_of(state, batch)
        if part.last > own.num_images // (part.world_size * part.batch_size):
            raise UsageError(
                f"loader state is at batch {batch} of an epoch of {len(self)}; it is of another run"
            )
        if batch and own.rank == 0 and state.get("backend", self.backend) != self.backend:
            log.warning(
                "the loader state is of the %s backend in mid-epoch, and this is %s: they may differ on "
                "which damaged JPEG files are bad, and then on the images of the rest; a quarantine file of "
                "'python -m lejepa_fast.data.commands.verify', made ahead of a run, makes them agree",
                state["backend"],
                self.backend,
            )
        if same_images:
            self._learn(state)
        elif own.rank == 0:
            log.warning(
                "the loader state is of other images (%s, here %d): of it, only the epoch is taken over, "
                "and not which images are bad",
                state.get("images"),
                own.num_images,
            )
        if (part.world_size, part.batch_size) == (own.world_size, own.batch_size) or not batch:
            self._stand_at(epoch, batch, since=part.first, earlier=earlier, resuming=True)
            return
        batch = batch * part.world_size * part.batch_size // own.global_batch
        self._stand_at(epoch, batch, since=batch, earlier=[*earlier, part], resuming=True)

    def _parts_of(self, state: Mapping[str, Any], batch: int) -> tuple[Part, list[Part]]:
        """The part of the epoch that a state ends, and those before. Older states tell of one only."""
        own = self._schedule
        ranks = state.get("world_size", own.world_size)
        size, rest = divmod(state.get("global_batch", own.global_batch), ranks)
        if rest or not size:
            raise wrong_field(state, "global_batch", f"a multiple of 'world_size' ({ranks})")
        if not batch:
            return Part(ranks, size, 0, 0), []
        since, earlier = state.get("since", 0), [Part(*part) for part in state.get("earlier", ())]
        if since > batch:
            raise wrong_field(state, "since", f"at most 'batch' ({batch})")
        if any(max(1, p.last) * p.world_size * p.batch_size > own.num_images for p in earlier):
            raise wrong_field(state, "earlier", f"parts of an epoch of {own.num_images} images")
        return Part(ranks, size, since, batch), earlier

    def _learn(self, state: Mapping[str, Any]) -> None:
        """Take over which images are bad.

        Older states do not say which images they are of. Between epochs these may since have become fewer.
        """
        bad, reasons, count = state.get("bad", ()), state.get("reasons"), self._schedule.num_images
        unknown = not state["batch"] and "images" not in state and "names_sha256" not in state
        if not unknown and any(index >= count for index in bad):
            raise wrong_field(state, "bad", f"numbers of {count} images")
        if reasons is not None and len(reasons) != len(bad):
            raise wrong_field(state, "reasons", f"one for each of the {len(bad)} numbers in 'bad'")
        here = [number for number, index in enumerate(bad) if index < count]
        kept = None if reasons is None else [reasons[number] for number in here]
        self._quarantine.learn([bad[number] for number in here], kept)

    def _finish(self, raw: RawBatch) -> tuple[list[Tensor], Tensor | None]:
        views = [
            normalise(view, self._mean, self._std, dtype=self._dtype, layout=self._layout)
            for view in raw.views
        ]
        if not self._labelled:
            return views, None
        return views, raw.targets.to(self._device, non_blocking=True) if self._device else raw.targets


class EvalLoader:
    """Iterable over (images, targets) in the order of the source. Made by `eval_loader`."""

    def __init__(
        self,
        backend: Backend,
        num_images: int,
        batch_size: int,
        *,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device | None,
        quarantine: Quarantine,
    ) -> None:
        self._backend, self._num_images, self._batch_size = backend, num_images, batch_size
        self._quarantine = quarantine
        self._mean, self._std = channel_values(mean, device), channel_values(std, device)
        self._device = device

    @property
    def backend(self) -> str:
        """Name of the backend in use."""
        return self._backend.name

    def __len__(self) -> int:
        """Batches, the last one possibly shorter."""
        return -(-self._num_images // self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        starts = range(0, self._num_images, self._batch_size)
        keys = (BatchKey(0, tuple(range(s, min(s + self._batch_size, self._num_images)))) for s in starts)
        for raw in self._backend.batches(keys, Omission(self._quarantine)):
            if not len(raw.targets):
                continue
            images = normalise(raw.views[0], self._mean, self._std)
            yield images, raw.targets.to(self._device, non_blocking=True) if self._device else raw.targets


def multicrop_loader(
    source: ImageSource,
    recipe: MultiCropRecipe,
    *,
    batch_size: int,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 0,
    backend: str = "auto",
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
    channels_last: bool = False,
    shuffle: bool = True,
    start_method: str | None = None,
    prefetch: int = 2,
    hw_decoder_load: float = 0.65,
    dali_views: str = "auto",
    quarantine: str | os.PathLike[str] | None = None,
    max_bad_fraction: float = DEFAULT_MAX_BAD_FRACTION,
) -> MultiCropLoader:
    """Loader of multi-crop batches for one rank.

    Each pass is one epoch and yields (views, targets): `views` is a list of V_g + V_l tensors
    (batch_size, 3, S, S) of `dtype` on `device`, globals first, normalised by the recipe's mean and
    std (with dtype=torch.uint8: raw pixels, not normalised); `targets` is (batch_size,) int64, or
    None when the source has no labels. The last incomplete batch of an epoch is dropped.

    batch_size: images per rank and step. num_workers: processes (torchvision; 0: none, in this process) or
    threads (DALI; at least 1) that decode and augment. backend: "dali", "torchvision", or "auto": DALI
    where it is installed and the batches go to a GPU, or where numba is installed, too. device: where the
    tensors go (None: stay on the CPU). shuffle=False takes images in the order of the source. start_method:
    how workers start ("fork", "spawn", "forkserver"; None: Python's default). prefetch: finished batches
    that wait (per worker with torchvision). hw_decoder_load: share of JPEGs for a GPU's hardware decoder.
    dali_views: what makes DALI's views: "operators" (DALI's, on either device), "numba" (compiled code, on
    the CPU only), or "auto": on a GPU the former, on a CPU the latter where numba is installed.
    quarantine: file that lists bad images, one for all ranks; max_bad_fraction: share of bad images that
    stops the run. See `quarantine.Quarantine`; the place of a bad image is taken by another one
    (`quarantine.Substitutes`).

    The crops and colours of an image are a function of (seed, epoch, index of the image), whatever the
    backend, the number of workers and ranks and the batch size; the images of step s are the same for
    every world_size of equal `batch_size * world_size`. Global random generators are not touched.
    Raises `UsageError` for settings or data that cannot work, `RunError` when too many images are bad.
    """
    recipe.validate()
    _check_whole(batch_size=batch_size, seed=seed, num_workers=num_workers, prefetch=prefetch)
    schedule = EpochSchedule(len(source), batch_size, seed, rank, world_size, shuffle)
    if dtype not in _DTYPES:
        raise UsageError(f"dtype must be one of {', '.join(map(str, _DTYPES))}; got {dtype}")
    bad = Quarantine(source, quarantine, max_bad_fraction=max_bad_fraction)
    check_sizes(source, recipe.smallest_image, max_bad_fraction, bad.known)
    device = _usable(device)
    made, reason = make_backend(
        backend,
        TrainPlan(source, recipe, seed),
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        start_method=start_method,
        prefetch=prefetch,
        hw_decoder_load=hw_decoder_load,
        dali_views=dali_views,
    )
    if rank == 0:
        log.info(
            "multi-crop loader: %s backend (%s), %d workers, %s", made.name, reason, num_workers, source.name
        )
    return MultiCropLoader(
        made,
        schedule,
        recipe,
        bad,
        labelled=source.labelled,
        names=names_digest({"images": source}),
        device=device,
        dtype=dtype,
        channels_last=channels_last,
    )


def eval_loader(
    source: ImageSource,
    *,
    image_size: int,
    batch_size: int,
    num_workers: int = 0,
    mean: tuple[float, float, float] = IMAGENET_MEAN,
    std: tuple[float, float, float] = IMAGENET_STD,
    backend: str = "auto",
    device: torch.device | str | None = None,
    start_method: str | None = None,
    prefetch: int = 2,
    hw_decoder_load: float = 0.65,
    dali_views: str = "auto",
    quarantine: str | os.PathLike[str] | None = None,
    max_bad_fraction: float = DEFAULT_MAX_BAD_FRACTION,
) -> EvalLoader:
    """Loader of every image once, in order, without randomness.

    Yields (images (B, 3, image_size, image_size) float32 normalised, targets (B,) int64, -1 where
    unlabelled); the last batch may be shorter. Each image's short side is resized to `image_size` px
    (bilinear, antialiased; small images are enlarged) and the centre is cut out. Bad images are left out,
    so their batch is shorter; all other arguments are those of `multicrop_loader`.
    """
    _check_whole(image_size=image_size, batch_size=batch_size, num_workers=num_workers, prefetch=prefetch)
    if image_size < 1 or batch_size < 1:
        raise UsageError(f"image_size and batch_size must be positive; got {image_size} and {batch_size}")
    device = _usable(device)
    made, _ = make_backend(
        backend,
        EvalPlan(source, image_size),
        batch_size=batch_size,
        num_workers=num_workers,
        device=device,
        start_method=start_method,
        prefetch=prefetch,
        hw_decoder_load=hw_decoder_load,
        dali_views=dali_views,
    )
    bad = Quarantine(source, quarantine, max_bad_fraction=max_bad_fraction)
    return EvalLoader(made, len(source), batch_size, mean=mean, std=std, device=device, quarantine=bad)


def _check_whole(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, Integral):
            raise UsageError(f"{name} must be a whole number; got {value!r}")


def _usable(device: torch.device | str | None) -> torch.device | None:
    """The device that batches go to; None for the CPU's memory as it is."""
    if device is None:
        return None
    try:
        made = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise UsageError(f"device must be such as 'cpu', 'cuda' or 'cuda:1'; got {device!r}") from error
    if made.type == "cuda" and (made.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device {str(device)!r}: there are {torch.cuda.device_count()} CUDA devices; "
            "use another one, or 'cpu'"
        )
    return made


def channel_values(values: tuple[float, float, float], device: torch.device | None) -> Tensor:
    """One number per channel as (3, 1, 1) float32 on `device`.

    Made once per loader: making it from Python numbers on a GPU waits for the GPU.
    """
    # "cpu" by name: None would be the caller's default device.
    return torch.tensor(values, dtype=torch.float32, device=device or "cpu").view(3, 1, 1)


def normalise(
    pixels: Tensor,
    mean: Tensor,
    std: Tensor,
    *,
    dtype: torch.dtype = torch.float32,
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """(B, 3, H, W) uint8 pixels as (x / 255 - mean) / std, computed in float32 on the device of `mean`.

    mean, std: from `channel_values`. dtype=torch.uint8 returns the pixels as they are.
    """
    pixels = pixels.to(mean.device, non_blocking=True)
    if dtype is not torch.uint8:
        scaled = F.to_dtype(pixels, torch.float32, scale=True)
        pixels = scaled.sub_(mean).div_(std).to(dtype)
    return pixels.contiguous(memory_format=layout)
