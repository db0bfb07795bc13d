"""What is measured on a GPU: device time, wall clock, memory, launches, graph replays, and the floor.

Device time lies between two events on the stream. The stream is kept busy by a short sleep before the
first one, so that the host runs ahead and its overhead does not enter; the caches are flushed before each
repetition. Wall clock is that of calls back to back without either: there the host's overhead shows where
it is what limits.

The floor of a pass is the largest of three times: its matmul flops at the speed of a matmul, its FP32
instructions at the rate that the chip issues them, and its bytes at the speed of a copy. Matmul and copy
are measured in the same process; instructions per projected sample are those of the cheapest algorithm
known for equidistant knots. Forward and backward are summed. `floor_ms` takes the pipes of a pass as
overlapping (the largest); `serial_floor_ms` as taking turns (their sum).
"""

from __future__ import annotations

import contextlib
import gc
import json
import re
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from benchlib import Mark, Timed, nvidia_smi
from sigreg_variants import Case, Run, Size
from torch import Tensor

L2_FACTOR = 4  # buffers of this many times the L2 cache: none of them is found there again
_MOST_BUFFERS = 16
_LONGEST_SLEEP = 0.02  # seconds
ASSUMED_HERTZ = 1.5e9  # only for the length of that sleep


# --- Time -----------------------------------------------------------------------------------------


class GpuClock:
    """Times one call at a time on a GPU; see the module."""

    def __init__(self, device: torch.device):
        self.properties = torch.cuda.get_device_properties(device)
        self.hertz, self.hertz_source = clock_rate(self.properties)
        self._flush = torch.empty(L2_FACTOR * self.l2_bytes, dtype=torch.uint8, device=device)
        self._host_seconds: dict[int, float] = {}

    @property
    def l2_bytes(self) -> int:
        return getattr(self.properties, "L2_cache_size", 0) or 64 << 20

    def buffers(self, bytes_each: int) -> int:
        """How many inputs to take in turns. Small ones are few: what is flushed does the rest."""
        return max(2, min(_MOST_BUFFERS, -(-L2_FACTOR * self.l2_bytes // bytes_each)))

    def once(self, call: Timed, repeat: int) -> tuple[float | None, float | None, float]:
        """Seconds of the device: forward, backward, both."""
        prepared = call.prepare(repeat)
        start, middle, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        marked: list[bool] = []

        def between() -> None:
            marked.append(True)
            middle.record()

        self._flush.zero_()
        ahead = 1.5 * self._host_seconds.get(id(call.run), 0.0) + 1e-4
        torch.cuda._sleep(int(min(ahead, _LONGEST_SLEEP) * self.hertz))
        began = time.perf_counter()
        start.record()
        call.run(prepared, between)
        end.record()
        self._host_seconds[id(call.run)] = time.perf_counter() - began
        torch.cuda.synchronize()
        both = 1e-3 * start.elapsed_time(end)
        if not marked:
            return None, None, both
        return 1e-3 * start.elapsed_time(middle), 1e-3 * middle.elapsed_time(end), both


def clock_rate(properties: Any) -> tuple[float, str]:
    """Highest clock of the multiprocessors in hertz, and who says so."""
    megahertz = nvidia_smi("clocks.max.sm")
    if megahertz and re.fullmatch(r"\d+", megahertz):
        return 1e6 * int(megahertz), "nvidia-smi clocks.max.sm"
    kilohertz = getattr(properties, "clock_rate", 0)
    if kilohertz:
        return 1e3 * kilohertz, "device properties"
    return ASSUMED_HERTZ, "assumed"


def wall_times(calls: dict[str, Timed], rounds: int = 7, seconds: float = 0.02) -> dict[str, list[float]]:
    """Seconds per call of many calls back to back, host included; the calls take turns by rounds."""

    def many(call: Timed, count: int) -> float:
        prepared = [call.prepare(i) for i in range(count)]
        torch.cuda.synchronize()
        began = time.perf_counter()
        for item in prepared:
            call.run(item, _nothing)
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / count

    counts = {n: max(3, min(200, int(seconds / max(many(c, 3), 1e-6)))) for n, c in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            times[name].append(many(call, counts[name]))
    return times


def _nothing() -> None:
    pass


# --- Memory and launches --------------------------------------------------------------------------


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def peak_extra_bytes(call: Callable[[], Any]) -> int:
    """Most memory allocated during `call`, above what was before; the gradient is part of it."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    kept = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del kept
    return peak


def launches(call: Callable[[], Any]) -> dict[str, int]:
    """Kernels, and copies and fills, that one `call` starts on the GPU, by name.

    Counted in the trace that the profiler exports: its format is the same in all versions of PyTorch.
    """
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return kernels_of(events)


def kernels_of(events: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The device's work in a trace: kernels, and the copies and fills that are launched like them."""
    work = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    return dict(Counter(str(event["name"])[:80] for event in work))


@contextlib.contextmanager
def interpreted_launches(counts: dict[str, int]) -> Iterator[None]:
    """Count the launches of Triton kernels by name while its interpreter runs them."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        counts[self.fn.__name__] = counts.get(self.fn.__name__, 0) + 1
        return run(self, *args, **kwargs)

    InterpretedFunction.run = counted
    try:
        yield
    finally:
        InterpretedFunction.run = run


# --- CUDA graphs ----------------------------------------------------------------------------------


def graphed(step: Run, device: torch.device) -> Run:
    """The training step captured in a CUDA graph at its first call; later calls copy x in and replay."""
    graph = torch.cuda.CUDAGraph()
    static: list[Tensor] = []
    results: list[Tensor] = []

    def capture(x: Tensor) -> None:
        static.append(x.detach().clone().requires_grad_())
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(3):
                step(static[0], _nothing)
        torch.cuda.current_stream(device).wait_stream(stream)
        with torch.cuda.graph(graph):
            results.extend(step(static[0], _nothing))

    def run(x: Tensor, between: Mark) -> tuple[Tensor, Tensor]:
        if not static:
            capture(x)
        with torch.no_grad():
            static[0].copy_(x)
        graph.replay()
        return results[0], results[1]

    return run


# --- The floor ------------------------------------------------------------------------------------


class Ceilings(NamedTuple):
    """What this GPU reaches.

    Attributes:
        matmul_flops: bf16 matmul, flops a second, measured.
        copy_bytes: device copy, bytes read and written a second, measured.
        fp32_rate: FP32 instructions a second: multiprocessors x lanes x highest clock.
        clock: hertz, and where from.
    """

    matmul_flops: float
    copy_bytes: float
    fp32_rate: float
    clock: float
    clock_source: str


def measure_ceilings(clock: GpuClock, device: torch.device, side: int = 8192) -> Ceilings:
    generator = torch.Generator(device=device).manual_seed(1)  # random numbers: zeros multiply faster
    a, b = (torch.randn(side, side, device=device, generator=generator).to(torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.empty(side, 8 * side, dtype=torch.float32, device=device).fill_(1.5)
    target = torch.empty_like(source)
    matmul = Timed(lambda repeat: None, lambda _, between: torch.mm(a, b, out=product))
    copy = Timed(lambda repeat: None, lambda _, between: target.copy_(source))
    best = {}
    for name, call in (("matmul", matmul), ("copy", copy)):
        for repeat in range(3):
            clock.once(call, repeat)
        seconds = sorted(clock.once(call, repeat)[2] for repeat in range(10))
        best[name] = seconds[len(seconds) // 2]
    properties = clock.properties
    lanes = 64 if (properties.major, properties.minor) == (8, 0) else 128
    return Ceilings(
        matmul_flops=2 * side**3 / best["matmul"],
        copy_bytes=2 * source.nbytes / best["copy"],
        fp32_rate=properties.multi_processor_count * lanes * clock.hertz,
        clock=clock.hertz,
        clock_source=clock.hertz_source,
    )


def floors(size: Size, itemsize: int, ceilings: Ceilings) -> dict[str, float]:
    """Milliseconds below which no version gets, overlapping and serial, forward plus backward."""
    rows, samples = size.V * size.N, size.V * size.N * size.M
    x, A, sums = rows * size.K * itemsize, size.K * size.M * itemsize, 8 * size.V * size.J * size.M
    passes = [
        # flops, FP32 instructions, bytes
        (2 * samples * size.K, samples * (4 * (size.J - 1) + 8), x + A + sums),
        (4 * samples * size.K, samples * (4 * (size.J - 1) + 10), 2 * x + A + sums),
    ]
    times = [
        (flops / ceilings.matmul_flops, issued / ceilings.fp32_rate, moved / ceilings.copy_bytes)
        for flops, issued, moved in passes
    ]
    return {
        "floor_ms": 1e3 * sum(max(each) for each in times),
        "serial_floor_ms": 1e3 * sum(sum(each) for each in times),
    }


def has_floor(case: Case, ceilings: Ceilings) -> bool:
    """Whether its ceilings are known: the matmul is that of half precision, and the clock may be a guess."""
    return case.dtype.itemsize == 2 and ceilings.clock_source != "assumed"
