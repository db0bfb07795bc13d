"""The timing harness of all benchmarks: calls take turns, and a clock times one call.

- `wall_clock` is `torch.utils.benchmark.Timer`: wall time, host included. The clock of a CPU.
- `GpuClock` times what the GPU does, as `triton.testing.do_bench` does: between two events on the stream,
  with the L2 cache flushed before each call. The stream first sleeps for as long as the host needs to launch
  the call, so that host time does not count.
"""

import ctypes
import gc
import multiprocessing
import re
import statistics
import time
import timeit
from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from benchlib import nvidia_smi
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils.benchmark import Timer

Call = Callable[[], Any]
Clock = Callable[[Call], float]
Key = TypeVar("Key", bound=Hashable)

_SLEEP_HERTZ, _LONGEST_SLEEP = 2e9, 0.02  # cycles a second of `torch.cuda._sleep`, about; seconds


def wall_clock(call: Call) -> float:
    """Wall seconds of a call, after two untimed ones."""
    return Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads()).timeit(1).mean


def once(call: Call) -> float:
    """Wall seconds of one call, for calls that take long or count for nothing."""
    return timeit.timeit(call, number=1)


def wall_clock_of_many(call: Call) -> float:
    """Wall seconds per call of so many calls back to back that they take about 20 ms."""
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.02).median


class GpuClock:
    """Seconds that the current GPU takes for a call; see the module."""

    def __init__(self, device: torch.device):
        self.l2_bytes = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        self._flush = torch.empty(4 * self.l2_bytes, dtype=torch.uint8, device=device)
        self._host_seconds: dict[int, float] = {}

    def __call__(self, call: Call) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()
        ahead = 1.5 * self._host_seconds.get(id(call), 0.0) + 1e-4
        torch.cuda._sleep(int(_SLEEP_HERTZ * min(ahead, _LONGEST_SLEEP)))
        began = time.perf_counter()
        start.record()
        call()
        end.record()
        self._host_seconds[id(call)] = time.perf_counter() - began
        torch.cuda.synchronize()
        return 1e-3 * start.elapsed_time(end)

    def buffers(self, bytes_each: int) -> int:
        """How many inputs to take in turns so that none is found in the L2 cache; 2 to 16."""
        return max(2, min(16, -(-4 * self.l2_bytes // bytes_each)))


def interleave(
    calls: Mapping[Key, Call],
    rounds: int,
    clock: Clock = wall_clock,
    warm_up: int = 0,
    failures: dict[Key, Exception] | None = None,
) -> dict[Key, list[float]]:
    """Seconds of each call in each round; the calls take turns, so that a slow spell hits all alike.

    `failures` gets the exception of a call that raises, which is left out from there on; without it the
    exception is the caller's.
    """
    found: dict[Key, list[float]] = {key: [] for key in calls}
    for number in range(-warm_up, rounds):
        for key in list(found):
            try:
                taken = clock(calls[key])
            except Exception as failure:
                if failures is None:
                    raise
                failures[key] = failure
                del found[key]
            else:
                found[key] += [taken] if number >= 0 else []
    return found


def summary(seconds: Sequence[float]) -> dict[str, float]:
    """Median and 20th and 80th percentile, in milliseconds."""
    deciles = statistics.quantiles(seconds, n=10, method="inclusive")
    return {f"{name}_ms": 1e3 * deciles[i] for name, i in (("median", 4), ("p20", 1), ("p80", 7))}


def fresh_processes(count: int) -> ProcessPoolExecutor:
    """Processes that are no copies of this one, which may hold a GPU already."""
    return ProcessPoolExecutor(count, multiprocessing.get_context("spawn"))


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of `function`, whose memory is then that of nothing else."""
    with fresh_processes(1) as pool:
        return pool.submit(function, *arguments).result()


def peak_extra_bytes(call: Call, device: torch.device) -> int:
    """Most memory held during `call` above what is held before; its results count.

    On a GPU by PyTorch's allocator, on a CPU the resident memory of this process (Linux only).
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before

    def status(field: str) -> int:
        return 1024 * int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0])

    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM, the high-water mark
    before = status("VmRSS")
    call()
    return status("VmHWM") - before


def free_memory() -> None:
    """Drop what nothing refers to, and give unused blocks of PyTorch's allocator back to the GPU."""
    gc.collect()
    torch.cuda.empty_cache()


def launches(call: Call) -> dict[str, int]:
    """Kernels, copies and fills that one `call` starts on the GPU, by name."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    return device_work(profiler.events())


def device_work(events: Sequence[Any]) -> dict[str, int]:
    """How often each name stands among the profiler's events of the GPU, annotations left out."""
    on_gpu = (e for e in events if e.device_type == torch.autograd.DeviceType.CUDA)
    return dict(Counter(str(e.name)[:80] for e in on_gpu if not getattr(e, "is_user_annotation", False)))


def graphed(step: Callable[[Tensor], Any], device: torch.device) -> Callable[[Tensor], Any]:
    """`step` captured in a CUDA graph at its first call; later calls copy x in and replay.

    The results stay where they are: the next call overwrites them.
    """
    graph = torch.cuda.CUDAGraph()
    static: list[Tensor] = []
    results: list[Any] = []

    def run(x: Tensor) -> Any:
        if not static:
            static.append(x.detach().clone().requires_grad_())
            stream = torch.cuda.Stream(device)
            stream.wait_stream(torch.cuda.current_stream(device))
            with torch.cuda.stream(stream):
                for _ in range(3):
                    step(static[0])
            torch.cuda.current_stream(device).wait_stream(stream)
            with torch.cuda.graph(graph):
                results.append(step(static[0]))
        static[0].data.copy_(x)
        graph.replay()
        return results[0]

    return run


class Ceilings(NamedTuple):
    """Rates a second: bf16 matmul and device copy as measured, FP32 instructions by the highest clock."""

    matmul_flops: float
    copy_bytes: float
    fp32_rate: float


def measure_ceilings(device: torch.device, side: int = 8192) -> Ceilings | None:
    """The ceilings of a GPU, or None where nvidia-smi does not tell its highest clock."""
    from triton.testing import do_bench

    megahertz = nvidia_smi("clocks.max.sm")
    if not megahertz or not megahertz.isdigit():
        return None
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = torch.empty_like(a)
    source = torch.randn(side, 4 * side, device=device)
    target = torch.empty_like(source)
    matmul = do_bench(lambda: torch.mm(a, b, out=product), return_mode="median")
    copy = do_bench(lambda: target.copy_(source), return_mode="median")
    properties = torch.cuda.get_device_properties(device)
    lanes = 64 if (properties.major, properties.minor) == (8, 0) else 128
    fp32 = properties.multi_processor_count * lanes * 1e6 * int(megahertz)
    return Ceilings(2e3 * side**3 / matmul, 2e3 * source.nbytes / copy, fp32)
