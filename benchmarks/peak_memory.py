"""Most bytes that some work holds at once, beyond what was there before it."""

import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

__all__ = ["peak_bytes"]


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The peak above the start, exact to the byte: of every tensor and every scratch buffer of PyTorch's allocator.

    Args:
        work: run twice on CUDA, once on a CPU. What it returns is freed.
        device: whose memory counts. On CUDA `torch.cuda.max_memory_allocated`; on a CPU the running sum of what the
            profiler saw the allocator give and take back: not the end of what was there before.
    """
    gc.collect()
    if device.type == "cuda":
        work()  # a library's workspace, made in its first call, stays
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    changes = [
        (event.start_ns(), event.nbytes())
        for event in seen.profiler.kineto_results.events()
        if event.name() == "[memory]"
    ]
    live = peak = 0
    for _, num_bytes in sorted(changes, key=lambda change: change[0]):
        live += num_bytes
        peak = max(peak, live)
    return peak
