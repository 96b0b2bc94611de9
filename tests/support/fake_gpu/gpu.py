"""The pretended GPU: what its tensors are, what it counts, and what ``torch.cuda`` says of it.

Every operation passes through one dispatch mode. Operations of the host alone run for real; those that touch a tensor
of device ``cuda`` run on torch's fake tensors, which check devices, dtypes and shapes as kernels do.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from benchmarks.support.gpu_budget import Cost, kernel_s

aten = torch.ops.aten
ROOT = Path(__file__).resolve().parents[3]
NAME = "pretended GPU"
DEVICES = 8

IRREPRODUCIBLE = frozenset({
    "_adaptive_avg_pool2d_backward", "avg_pool3d_backward", "bincount", "convolution_backward", "cumsum",
    "embedding_dense_backward", "grid_sampler_2d_backward", "histc", "index_add", "index_add_", "index_put",
    "index_put_", "index_reduce", "kthvalue", "median", "put_", "reflection_pad2d_backward",
    "replication_pad2d_backward", "scatter_add", "scatter_add_", "scatter_reduce",
    "_scaled_dot_product_efficient_attention_backward", "_scaled_dot_product_flash_attention_backward",
    "upsample_bicubic2d_backward", "_upsample_bicubic2d_aa_backward", "upsample_bilinear2d_backward",
    "_upsample_bilinear2d_aa_backward", "upsample_linear1d_backward", "upsample_trilinear3d_backward",
})  # fmt: skip
"""Operations whose CUDA kernels may add in another order every time (torch's page on reproducibility, and cuDNN's)."""


@dataclass
class Counts:
    """What a piece of work does to the GPU.

    Args:
        kernels: Operations that compute or move something there; views are none.
        waits: Place -> how often the host waits there until the GPU has done everything before.
        to_device_bytes, to_host_bytes: Moved between host and GPU.
        gpu_s: What the operations need at the rates that ``benchmarks.support.gpu_budget`` assumes.
        collectives: Name -> calls over ranks.
        cpu_collectives: Places that hand a tensor of the CPU to a collective call, which NCCL refuses.
        irreproducible: Name -> operations that may give other bits in another run.
        float64: Operations in float64, which most GPUs do slowly.
    """

    kernels: int = 0
    waits: Counter[str] = field(default_factory=Counter)
    to_device_bytes: int = 0
    to_host_bytes: int = 0
    gpu_s: float = 0.0
    collectives: Counter[str] = field(default_factory=Counter)
    cpu_collectives: list[str] = field(default_factory=list)
    irreproducible: Counter[str] = field(default_factory=Counter)
    float64: int = 0


class PretendedGpu(TorchDispatchMode):
    """Eight GPUs of one memory size, of which a process uses one.

    Args:
        memory_bytes: Memory of the card.
    """

    def __init__(self, memory_bytes: float) -> None:
        super().__init__()
        self.memory_bytes, self.fraction = int(memory_bytes), 1.0
        self.alive_bytes = self.peak_bytes = 0
        self.counts = Counts()
        self._fakes = FakeTensorMode(allow_non_fake_inputs=True)
        self._storages: dict[int, object] = {}

    # -- operations --------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run one operation, on the host or there."""
        kwargs = kwargs or {}
        if func.namespace == "c10d":
            return self._collective(func, args, kwargs)
        given = list(_tensors((*args, *kwargs.values()) if kwargs else args))
        there = [tensor for tensor in given if is_there(tensor)]
        target = kwargs.get("device")
        if not there and (target is None or torch.device(target).type != "cuda"):
            return func(*args, **kwargs)
        name = func._schema.name.rpartition("::")[2]
        if name in ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "_unique2", "masked_select"):
            self.counts.waits[place()] += 1
        if name in ("_local_scalar_dense", "is_nonzero"):
            return _constant(there[0].dtype)
        if name == "equal":
            return True
        if name == "copy_" and not is_there(args[0]):
            self._moved(args[1], args[0], bool(args[2]) if len(args) > 2 else False)
            return args[0].fill_(_constant(args[0].dtype))
        call = args, kwargs
        with self._fakes:
            if not all(isinstance(tensor, FakeTensor) for tensor in given):
                call = tree_map_only(torch.Tensor, _shape_of, call)
            out = func(*call[0], **call[1])
        made = list(_tensors((out,)))
        self._account(func, name, (args, kwargs), given, made, out)
        if all(tensor.device.type != "cpu" for tensor in made):
            return out
        return tree_map_only(torch.Tensor, self._as_seen_from_host, out)

    def _account(
        self,
        func: Any,
        name: str,
        call: tuple[Any, Any],
        given: list[torch.Tensor],
        made: list[torch.Tensor],
        out: Any,
    ) -> None:
        """Count one operation and the memory that its results take."""
        known = {_storage(tensor) for tensor in given if isinstance(tensor, FakeTensor)}
        fresh = [tensor for tensor in made if is_there(tensor) and _storage(tensor) not in known]
        if name in ("_to_copy", "copy_"):
            args, kwargs = call
            source = args[1] if name == "copy_" else args[0]
            if is_there(source) != is_there(made[0]):
                flags = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
                self._moved(source, made[0], bool(flags))
        for tensor in fresh:
            self._keep(tensor)
        is_view = not fresh and not func._schema.is_mutable
        if is_view or name.startswith(("empty", "new_empty")) or not any(map(is_there, made)):
            return
        self.counts.kernels += 1
        self.counts.irreproducible.update([name] if name in IRREPRODUCIBLE else ())
        self.counts.float64 += any(tensor.dtype == torch.float64 for tensor in made)
        self.counts.gpu_s += kernel_s(func, call, out, given, fresh)

    def _moved(self, source: torch.Tensor, target: torch.Tensor, is_asynchronous: bool) -> None:
        """Count a copy between host and GPU; only one of pinned memory leaves the host free."""
        if is_there(source):
            self.counts.to_host_bytes += _bytes(source)
            waits = not is_asynchronous
        else:
            self.counts.to_device_bytes += _bytes(source)
            waits = not (is_asynchronous and source.is_pinned())
        if waits and _bytes(source):
            self.counts.waits[place()] += 1

    def _as_seen_from_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a result; one that lies on the host is a real tensor of some constant."""
        if tensor.device.type != "cpu":
            return tensor
        return torch.full(tuple(tensor.shape), _constant(tensor.dtype), dtype=tensor.dtype)

    def _collective(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        """Count a call over ranks, which finishes at once and changes nothing."""
        from torch._C._distributed_c10d import FakeWork

        name = func._schema.name.rpartition("::")[2].rstrip("_")
        self.counts.collectives[name] += 1
        if name != "barrier" and not all(map(is_there, _tensors((*args, *(kwargs or {}).values())))):
            self.counts.cpu_collectives.append(f"{name} {place()}")
        work = FakeWork().boxed()
        return (args[0], work) if len(func._schema.returns) > 1 else work

    # -- memory ------------------------------------------------------------------------------------------------------

    def _keep(self, tensor: torch.Tensor) -> None:
        """Take the memory of a new tensor until its storage is gone."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if self.alive_bytes + size > self.memory_bytes * self.fraction:
            raise torch.cuda.OutOfMemoryError(
                f"CUDA out of memory (pretended): {size / 1e9:.2f} GB beside {self.alive_bytes / 1e9:.2f} GB"
            )

        def gone(_: object) -> None:
            if self._storages.pop(key, None) is not None:
                self.alive_bytes -= size

        self._storages[key] = weakref.ref(storage, gone)
        self.alive_bytes += size
        self.peak_bytes = max(self.peak_bytes, self.alive_bytes)

    def reset_peak(self) -> None:
        """Measure the peak from here on."""
        self.peak_bytes = self.alive_bytes

    @contextlib.contextmanager
    def limited(self, memory_gb: float) -> Iterator[None]:
        """Be a smaller card in a block."""
        before, self.memory_bytes = self.memory_bytes, int(memory_gb * 1e9)
        try:
            yield
        finally:
            self.memory_bytes = before

    def take(self) -> Counts:
        """Return what was counted since the last time."""
        counts, self.counts = self.counts, Counts()
        return counts

    def cost(self, counts: Counts) -> Cost:
        """Return counts as a line of the budget table, with the peak since ``reset_peak``."""
        return Cost(
            kernels=counts.kernels,
            waits=counts.waits.total(),
            to_device_mb=round(counts.to_device_bytes / 1e6, 1),
            to_host_mb=round(counts.to_host_bytes / 1e6, 1),
            peak_gb=round(self.peak_bytes / 1e9, 2),
            gpu_ms=round(1e3 * counts.gpu_s, 2),
        )


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Yield the tensors among the arguments or results of an operation."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)


def is_there(tensor: torch.Tensor) -> bool:
    """Return whether a tensor lies on the pretended GPU."""
    return tensor.device.type == "cuda"


def place(depth: int = 2) -> str:
    """Return the innermost lines of the repository that are being run."""
    frame, found = sys._getframe(1), []
    while frame is not None and len(found) < depth:
        path = Path(frame.f_code.co_filename)
        if path.is_relative_to(ROOT) and ".venv" not in path.parts and path.parent != Path(__file__).parent:
            found.append(f"{path.relative_to(ROOT)}:{frame.f_lineno}")
        frame = frame.f_back  # type: ignore[assignment]
    return " < ".join(found) or "outside the repository"


def _shape_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor that fake ones can meet: of a real one only shape, dtype and device. Inside the fake mode."""
    if isinstance(tensor, FakeTensor):
        return tensor
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device=tensor.device)


def _storage(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _constant(dtype: torch.dtype) -> bool | float | int:
    """Return what every value of the device is, seen from the host."""
    if dtype == torch.bool:
        return True
    return 0.5 if dtype.is_floating_point else 1


def _submitted(_pool: ThreadPoolExecutor, work: Callable[..., Any], *args: Any, **kwargs: Any) -> Future[Any]:
    """Stand in for ``ThreadPoolExecutor.submit``: fake tensors are for one thread, so the work is done at once."""
    future: Future[Any] = Future()
    try:
        future.set_result(work(*args, **kwargs))
    except Exception as error:  # noqa: BLE001 - whoever asks for the result meets it there
        future.set_exception(error)
    return future


class _Attention(TorchFunctionMode):
    """Chooses the kernel of fused attention as a GPU of compute capability 8 or more does: a CPU build cannot say."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run a function of torch."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = args[0] if args else kwargs["query"]
            return (_fused_attention if is_there(query) else func)(*args, **kwargs)
        return func(*args, **kwargs)


def _fused_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if len({(tensor.device, tensor.dtype) for tensor in (query, key, value)}) > 1:
        raise RuntimeError("Expected query, key, and value to have the same dtype and device.")
    width, is_half = query.shape[-1], query.dtype in (torch.bfloat16, torch.float16)
    is_plain = query.ndim == 4 and attn_mask is None
    if is_plain and is_half and width % 8 == 0 and width <= 256:
        made = aten._scaled_dot_product_flash_attention(query, key, value, dropout_p, is_causal, scale=scale)
        return made[0]  # type: ignore[no-any-return]
    if is_plain and width % (8 if is_half else 4) == 0:
        has_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value))
        made = aten._scaled_dot_product_efficient_attention(
            query, key, value, None, has_gradient, dropout_p, is_causal, scale=scale
        )
        return made[0]  # type: ignore[no-any-return]
    scores = query @ key.transpose(-1, -2) * (width**-0.5 if scale is None else scale)
    if is_causal:
        scores = scores + torch.zeros(scores.shape[-2:], dtype=scores.dtype, device=scores.device)
    if attn_mask is not None:
        scores = scores + attn_mask.to(scores.dtype)
    return scores.softmax(dim=-1) @ value


def _moved(module: torch.nn.Module, change: Callable[..., Any], recurse: bool = True) -> torch.nn.Module:
    """Stand in for ``nn.Module._apply``, which would swap the insides of fake parameters and cannot."""
    for child in module.children() if recurse else ():
        child._apply(change)
    with torch.no_grad():
        for name, old in module._parameters.items():
            if old is not None:
                module._parameters[name] = torch.nn.Parameter(change(old), old.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = change(buffer)
    return module


@contextlib.contextmanager
def pretended_gpu(memory_gb: float = 80.0) -> Iterator[PretendedGpu]:
    """Yield a GPU that torch believes in until the block ends.

    Args:
        memory_gb: Its memory in gigabytes (1e9 bytes).
    """
    gpu = PretendedGpu(memory_gb * 1e9)
    current = [0]

    def choose(device: Any) -> None:
        current[0] = torch.device(device).index or 0 if not isinstance(device, int) else device

    properties = SimpleNamespace(name=NAME, total_memory=gpu.memory_bytes, uuid=NAME, major=9, minor=0)
    says: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": lambda: None,
        "device_count": lambda: DEVICES,
        "current_device": lambda: current[0],
        "set_device": choose,
        "get_device_name": lambda device=None: NAME,
        "get_device_properties": lambda device=None: properties,
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (gpu.memory_bytes - gpu.alive_bytes, gpu.memory_bytes),
        "memory_reserved": lambda device=None: gpu.alive_bytes,
        "memory_allocated": lambda device=None: gpu.alive_bytes,
        "max_memory_allocated": lambda device=None: gpu.peak_bytes,
        "reset_peak_memory_stats": lambda device=None: gpu.reset_peak(),
        "set_per_process_memory_fraction": lambda fraction, device=None: setattr(gpu, "fraction", fraction),
        "get_per_process_memory_fraction": lambda device=None: gpu.fraction,
        "Event": lambda **_: SimpleNamespace(record=lambda: None, synchronize=lambda: None),
        "empty_cache": lambda: None,
        "synchronize": lambda device=None: gpu.counts.waits.update([place()]),
    }
    only_lift = torch._C._only_lift_cpu_tensors()
    with contextlib.ExitStack() as stack:
        for name, answer in says.items():
            stack.enter_context(mock.patch.object(torch.cuda, name, answer))
        stack.enter_context(mock.patch.object(torch.nn.Module, "_apply", _moved))
        stack.enter_context(mock.patch.object(ThreadPoolExecutor, "submit", _submitted))
        stack.callback(torch._C._set_only_lift_cpu_tensors, only_lift)
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) is made on the host, then moved
        stack.enter_context(gpu)
        stack.enter_context(_Attention())
        yield gpu
