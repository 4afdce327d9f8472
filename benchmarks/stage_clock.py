"""Where the time of a datastore goes: a clock that is told of every change of stage, and where in `less` they are.

One stage runs at a time; an inner one interrupts an outer one. On CUDA a change of stage is an event in the stream,
so a stage gets the GPU's time and not that of queuing its kernels, and the CPU's only where the GPU waits for it.
What runs in a thread beside the device (rendering ahead, writing behind) is listed beside and taken from nothing.
"""

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

import less.features
import less.gradients
from datastore import DatastoreWriter
from less.data import Renderer
from less.lm_head import lm_head

__all__ = [
    "BACKWARD", "FORWARD", "GRADIENTS", "HEAD", "PROJECTION", "RENDERING", "REST", "SETTING_UP", "WRITING",
    "StageClock",
]  # fmt: skip

SETTING_UP = "setting up"
RENDERING = "rendering"
FORWARD = "forward"
HEAD = "LM head and loss"
BACKWARD = "backward"
GRADIENTS = "per-sample gradients"
PROJECTION = "Γ, Π, norms"
WRITING = "writing"
REST = "rest"


class StageClock:
    """Seconds by stage, of what happens between `watching`'s begin and end.

    What belongs to no stage is `SETTING_UP` before the first batch, and `REST` afterwards.

    Args:
        device: whose time it is.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._stages = [SETTING_UP]
        self._marks: list[tuple[str, Any]] = []
        self._owner = threading.get_ident()
        self.beside: dict[str, float] = defaultdict(float)
        """Seconds of the stages that ran in threads of their own."""

    def seconds(self) -> dict[str, float]:
        """Of each stage, in the order of the work; they add up to the whole."""
        if self._on_gpu:
            torch.cuda.synchronize()
        order = (SETTING_UP, RENDERING, FORWARD, HEAD, BACKWARD, GRADIENTS, PROJECTION, WRITING, REST)
        found = dict.fromkeys(order, 0.0)
        for (stage, start), (_, stop) in zip(self._marks, self._marks[1:], strict=False):
            found[stage] += start.elapsed_time(stop) / 1000 if self._on_gpu else stop - start
        return found

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Within it, time is this stage's; what began within it ends with it."""
        depth = len(self._stages)
        self.begin(name)
        try:
            yield
        finally:
            del self._stages[depth:]
            self._mark()

    def begin(self, name: str) -> None:
        """The stage begins; the one before it is interrupted."""
        self._stages.append(name)
        self._mark()

    def end(self) -> None:
        """The stage that began last ends."""
        self._stages.pop()
        self._mark()

    @contextmanager
    def watching(self, model: torch.nn.Module) -> Iterator[None]:
        """Within it, `build_datastore` with this base model tells the clock of its stages, and so does any `backward`.

        The head's stage is from its input to the loss, and in the backward pass down to its input's gradient. A LoRA
        layer's stage is from the gradient of its output to the last of its blocks: both products, and Bᵀδ, which one
        of them and the backward pass both need.
        """
        places: list[tuple[Any, str, Callable[[Any], Any]]] = [
            (less.features, "per_sample_gradients", self._whole_pass),
            (less.gradients, "token_losses", self._up_to_the_loss),
            (less.gradients._StreamingLora, "backward", self._lora_backward),
            (Tensor, "backward", self._backward),
            (Renderer, "render_record", partial(self._called, RENDERING)),
            (DatastoreWriter, "write_shard", partial(self._called, WRITING)),
            (DatastoreWriter, "seal", partial(self._called, WRITING)),
        ]
        hook = lm_head(model).register_forward_pre_hook(self._enter_head)
        self._mark()
        try:
            with ExitStack() as patches:
                for owner, name, watched in places:
                    patches.enter_context(patch.object(owner, name, watched(getattr(owner, name))))
                yield
        finally:
            hook.remove()
            self._mark()

    def _mark(self) -> None:
        if self._on_gpu:
            at: Any = torch.cuda.Event(enable_timing=True)
            at.record()
        else:
            at = time.perf_counter()
        self._marks.append((self._stages[-1], at))

    def _called(self, name: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == self._owner:
                with self.stage(name):
                    return work(*args, **kwargs)
            start = time.perf_counter()
            try:
                return work(*args, **kwargs)
            finally:
                self.beside[name] += time.perf_counter() - start

        return run

    def _whole_pass(self, per_sample_gradients: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(model: Any, batch: Any, sink: Callable[[str, Tensor], None], *args: Any, **kwargs: Any) -> Tensor:
            def timed_sink(name: str, grads_Bp: Tensor) -> None:
                with self.stage(PROJECTION):
                    sink(name, grads_Bp)

            self._stages[0] = REST
            with self.stage(FORWARD):
                return per_sample_gradients(model, batch, timed_sink, *args, **kwargs)

        return run

    def _up_to_the_loss(self, token_losses: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(*args: Any, **kwargs: Any) -> Tensor:
            with self.stage(FORWARD):  # the head's stage, which its input begins, ends with it
                return token_losses(*args, **kwargs)

        return run

    def _enter_head(self, _: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        hidden_BTD = args[0]
        if hidden_BTD.requires_grad:  # else it is a trial run
            self.begin(HEAD)
            hidden_BTD.register_hook(lambda _: self.end())

    def _backward(self, backward: Callable[..., None]) -> Callable[..., None]:
        def run(*args: Any, **kwargs: Any) -> None:
            if self._stages[-1] == HEAD:  # a plain step, in which nothing else ends it
                self.end()
            with self.stage(BACKWARD):
                self.begin(HEAD)  # until the gradient of its input is there
                backward(*args, **kwargs)

        return run

    def _lora_backward(self, backward: Callable[..., Any]) -> staticmethod:
        def run(ctx: Any, *grad_outputs: Tensor) -> Any:
            if not ctx.needs_input_grad[2]:  # A's gradient is not wanted: nothing of this layer is for a sink
                return backward(ctx, *grad_outputs)
            sink_a = ctx.sink_a

            def last_sink(grads_Bp: Tensor) -> None:
                sink_a(grads_Bp)
                self.end()

            ctx.sink_a = last_sink
            self.begin(GRADIENTS)
            return backward(ctx, *grad_outputs)

        return staticmethod(run)
