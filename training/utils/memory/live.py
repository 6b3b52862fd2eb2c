"""Memory of a computation before it is run: models without storage, and a count of the bytes that tensors hold.

A model is built on PyTorch's fake tensors: shapes and types are real, memory is not. The training code itself runs on
it, forward and backward, in a few seconds for any size, while `LiveMemory` adds up the tensors that are alive. So a
plan knows nothing of its own about model families, attention kernels, checkpointing or the loss.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """While open, counts the bytes of all tensors that operations make, for as long as their storages live.

    Args:
        known: tensors that were there before; views of them cost nothing.

    Attributes:
        bytes: alive now.
        peak: the most that was alive at once; may be set back to `bytes`.
        gradients: bytes among them that are parameters' gradients, which whoever counts says.
        growth: what these would take more in fp32, which it says as well.
        lean_peak: the most that was alive at once without these.
        wide_peak: the most that would be if each were in fp32.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self.gradients = 0
        self.lean_peak = 0
        self.growth = 0
        self.wide_peak = 0
        self._alive: dict[int, weakref.ref] = {}
        for tensor in known:
            self.add(tensor, 0)

    def add(self, tensor: torch.Tensor, size: int | None = None) -> None:
        """Count a tensor's storage if it is not counted yet, with another ``size`` in bytes if one is given."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._alive:
            return
        held = storage.nbytes() if size is None else size

        def freed(_: object) -> None:
            """Called when the storage is gone."""
            self.bytes -= held
            self._alive.pop(key, None)

        self._alive[key] = weakref.ref(storage, freed)
        self.bytes += held
        self.peak = max(self.peak, self.bytes)
        self.lean_peak = max(self.lean_peak, self.bytes - self.gradients)
        self.wide_peak = max(self.wide_peak, self.bytes + self.growth)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # A model asks for a number, and a fake tensor has none. OPT does, in transformers 5.17, whether to drop a
            # layer, which it never does here.
            return False
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            # a meta tensor that is not fake has no memory; a fake one stands for a device's
            if isinstance(leaf, torch.Tensor) and leaf.device.type != "meta":
                self.add(leaf)
        return result


@dataclass(frozen=True)
class PassMemory:
    """Bytes that one forward (and backward) needs beyond parameters and buffers.

    Attributes:
        peak: the most at once; with a backward the gradients in the parameters' own precision are part of it.
        gradients: what is left of them at the end.
        lean: the most at once where each parameter's gradient is let go as soon as it is whole.
        wide: the most at once where each becomes fp32 as soon as it is whole.
    """

    peak: int
    gradients: int
    lean: int
    wide: int


class FakeModel:
    """A model without storage, called as an engine is: through ``__call__``, with the model itself in ``module``.

    Args:
        build: makes the module; runs on the meta device.
        device: what its tensors pretend to be on; attention kernels are chosen for it.

    Attributes:
        beside: bytes that every pass needs beside what its operations show: one layer of 4-bit weights made whole.
    """

    beside = 0

    def __init__(self, build: Callable[[], nn.Module], device: torch.device) -> None:
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._device = device
        with torch.device("meta"):  # PEFT moves its layers, which a fake tensor does not allow; a meta tensor does
            self.module = build()
        made: dict[int, torch.Tensor] = {}  # fake tensors in place of meta ones; what is tied stays tied
        with self._mode:
            for module in self.module.modules():
                for tensors in (module._parameters, module._buffers):
                    for name, tensor in tensors.items():
                        if tensor is None:
                            continue
                        if id(tensor) not in made:
                            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=self._device)
                            trained = isinstance(tensor, nn.Parameter)
                            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if trained else empty
                        tensors[name] = made[id(tensor)]  # type: ignore[assignment]

    def __call__(self, *args: torch.Tensor, **kwargs: Any) -> Any:
        """The module's forward; tensors given are taken for fake ones of the same shape."""
        with self._mode:
            return self.module(*map(self._fake, args), **{name: self._fake(value) for name, value in kwargs.items()})

    def _fake(self, value: Any) -> Any:
        return self.on_device(value) if isinstance(value, torch.Tensor) else value

    def on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A fake tensor of the same shape on the model's device, such as targets that meet its outputs there."""
        with self._mode:
            fake = tensor if isinstance(tensor, FakeTensor) else self._mode.from_tensor(tensor)
            return fake.to(self._device)

    def gradient_checkpointing(self, enabled: bool) -> None:
        """Switch the recomputation of activations on or off."""
        with self._mode:
            self.module.apply(lambda m: setattr(m, "gradient_checkpointing", False) if not enabled else None)
            if enabled:
                from training.utils.model.forward import enable_gradient_checkpointing

                enable_gradient_checkpointing(self.module)

    @contextlib.contextmanager
    def counting(self) -> Iterator[LiveMemory]:
        """Counts what is made inside, parameters and buffers not included."""
        with LiveMemory([*self.module.parameters(), *self.module.buffers()]) as memory:
            yield memory

    def training_pass(self, loss: Callable[[FakeModel], torch.Tensor]) -> PassMemory:
        """Memory of ``loss(model)`` and its backward, a scalar."""
        self.module.train()
        for module in self.module.modules():
            if hasattr(module, "layerdrop"):  # it draws whether to leave a layer out: a fake number has no value
                module.training = False
        with self.counting() as memory, contextlib.ExitStack() as hooks:

            def whole(parameter: torch.Tensor) -> None:
                """Counts a gradient that the backward has finished."""
                assert parameter.grad is not None
                wide = 4 * parameter.grad.numel()
                if parameter.grad.nbytes < wide:  # it is there in both precisions for a moment
                    memory.wide_peak = max(memory.wide_peak, memory.bytes + memory.growth + wide)
                memory.gradients += parameter.grad.nbytes
                memory.growth += wide - parameter.grad.nbytes

            for parameter in self.module.parameters():
                if parameter.requires_grad:
                    hooks.callback(parameter.register_post_accumulate_grad_hook(whole).remove)
            value = loss(self)
            value.backward()
            del value
        gradients = memory.bytes
        wide = max(memory.wide_peak, gradients + memory.growth) + self.beside
        for parameter in self.module.parameters():
            parameter.grad = None
        return PassMemory(memory.peak + self.beside, gradients, memory.lean_peak + self.beside, wide)

    def forward_pass(self, function: Callable[[FakeModel], Any]) -> PassMemory:
        """Memory of ``function(model)`` without gradients."""
        self.module.eval()
        with self.counting() as memory, torch.no_grad():
            result = function(self)
            del result
        peak = memory.peak + self.beside
        return PassMemory(peak, 0, peak, peak)
