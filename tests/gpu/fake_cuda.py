"""A CUDA device that is not there.

Tensors on "cuda" are torch's fake tensors: they have a shape, a dtype and a device, but no values. Everything on the
host is real. So the code of a GPU run runs on a CPU, and operations that mix devices or dtypes fail as on a GPU. The
device notes what a GPU run would show only in a profile: where the host waits for the device, the dtypes of the matrix
products, and the bytes of the tensors that exist. What the host reads from the device is zero, and tensors are equal.

It cannot see numerics, races between streams, NCCL, what kernels and the allocator need beyond the tensors, or whether
the source of a copy is pinned memory.
"""

import sys
import types
import weakref
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_iter, tree_map

import mdmtrain

PACKAGE = Path(mdmtrain.__file__).parent
TORCH = Path(torch.__file__).parent
aten = torch.ops.aten
PRODUCTS = (
    aten.mm,
    aten.addmm,
    aten.bmm,
    aten.baddbmm,
    aten._scaled_mm,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
RESIZE = torch.UntypedStorage.resize_
H100 = types.SimpleNamespace(
    name="NVIDIA H100 80GB HBM3",
    major=9,
    minor=0,
    multi_processor_count=132,
    total_memory=80 << 30,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    shared_memory_per_block=49152,
    shared_memory_per_block_optin=232448,
    shared_memory_per_multiprocessor=233472,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


class Event(torch.Event):
    def __new__(cls, *_, **__):
        return super().__new__(cls, device="cuda")

    def synchronize(self):
        FakeCuda.waited()

    def elapsed_time(self, _end):
        return 1.0


class Stream:
    def __init__(self, *_, **__): ...

    def wait_stream(self, *_): ...

    def wait_event(self, *_): ...

    def record_event(self, event=None):
        return Event() if event is None else event

    def synchronize(self):
        FakeCuda.waited()

    def __enter__(self):
        return self

    def __exit__(self, *_): ...


class Generator(torch.Generator):
    """Of random numbers. Nothing draws any, but a compiled block that recomputes attention keeps its state."""

    device = torch.device("cuda", 0)

    def clone_state(self):
        return self

    graphsafe_get_state = clone_state

    def graphsafe_set_state(self, _state): ...


# Where a build of torch for CPUs has no kernel for CUDA, it composes the operation of smaller ones. With these kernels,
# autograd uses the same operations as on a GPU.
KERNELS = torch.library.Library("aten", "IMPL", "CUDA")
KERNELS.impl(
    "_fused_rms_norm",
    lambda x, shape, _weight, _eps: (
        torch.empty_like(x),
        x.new_empty((*x.shape[: x.ndim - len(shape)], *[1] * len(shape)), dtype=torch.float32),
    ),
)
KERNELS.impl(
    "_fused_rms_norm_backward",
    lambda _gradient, x, _shape, _rstd, weight, _wanted: (torch.empty_like(x), torch.empty_like(weight)),
)
KERNELS.impl("silu_backward", lambda _gradient, x: torch.empty_like(x))


class Memory:
    """The bytes of the device's tensors: now, and the peak since reset_peak()."""

    def __init__(self) -> None:
        self.now = 0
        self.peak = 0
        self._sizes: dict[int, int] = {}  # by the id of the storage

    def reset_peak(self) -> None:
        self.peak = self.now

    def hold(self, tensor: torch.Tensor) -> None:
        """Count the storage of a tensor until it is freed, or its new size if it is counted already."""
        storage = tensor.untyped_storage()
        if id(storage) not in self._sizes:
            weakref.finalize(storage, self._free, id(storage)).atexit = False
        self._set(id(storage), storage.nbytes())

    def resize(self, storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
        """Storage.resize_, by which FSDP frees gathered parameters and allocates them again."""
        RESIZE(storage, size)
        if id(storage) in self._sizes:
            self._set(id(storage), size)
        return storage

    def _set(self, key: int, size: int) -> None:
        self.now += size - self._sizes.get(key, 0)
        self.peak = max(self.peak, self.now)
        self._sizes[key] = size

    def _free(self, key: int) -> None:
        self.now -= self._sizes.pop(key)


def place() -> str:
    """The innermost function of the package that is running, as file:function; without one, that of torch.

    The backward pass runs on a thread of its own, whose stack has no function of the package.
    """
    fallback = "?"
    frame = sys._getframe()
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(PACKAGE):
            return f"{file.relative_to(PACKAGE)}:{frame.f_code.co_name}"
        if fallback == "?" and file.is_relative_to(TORCH) and file.parts[len(TORCH.parts)] == "distributed":
            fallback = f"torch/{file.relative_to(TORCH)}:{frame.f_code.co_name}"
        frame = frame.f_back
    return fallback


class FakeCuda(TorchDispatchMode):
    """In this mode, everything that is made on or copied to "cuda" is a fake tensor."""

    supports_higher_order_operators = True  # flex_attention
    waits: ClassVar[Counter[str]] = Counter()  # how often the host waited for the device, by place
    products: ClassVar[Counter[str]] = Counter()  # how many matrix products the device did, by dtype
    memory: ClassVar[Memory]  # of the device that is in use
    forbidden = False  # whether a wait is an error: torch.cuda.set_sync_debug_mode("error")

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        return True  # torch.compile works in this mode

    @classmethod
    def forget(cls) -> None:
        """Forget what was noted so far."""
        cls.waits.clear()
        cls.products.clear()

    @classmethod
    def waited(cls) -> None:
        if cls.forbidden:
            raise RuntimeError(f"the host waits for the device in {place()}")
        cls.waits[place()] += 1

    @classmethod
    def set_sync_debug_mode(cls, mode: str) -> None:
        cls.forbidden = mode == "error"

    def __enter__(self):
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.stack = ExitStack()
        self.forget()
        FakeCuda.memory = Memory()  # not that of an earlier device, some of whose tensors may still exist
        self.set_sync_debug_mode("default")
        stream = Stream()
        replaced = {
            "Stream": Stream,
            "Event": Event,
            "current_stream": lambda *_: stream,
            "stream": lambda entered: entered,
            "synchronize": lambda *_: self.waited(),
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "set_device": lambda *_: None,
            "get_device_name": lambda *_: H100.name,
            "get_device_capability": lambda *_: (H100.major, H100.minor),
            "get_device_properties": lambda *_: H100,
            "is_bf16_supported": lambda *_, **__: True,
            "default_generators": (Generator(),),
            "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
            "set_rng_state": lambda *_: None,
            "memory_allocated": lambda *_: self.memory.now,
            "max_memory_allocated": lambda *_: self.memory.peak,
            "reset_peak_memory_stats": lambda *_: self.memory.reset_peak(),
            "empty_cache": lambda: None,
            "set_sync_debug_mode": self.set_sync_debug_mode,
        }
        for name, value in replaced.items():
            self.stack.enter_context(patch.object(torch.cuda, name, value))
        for name, value in {"pin_memory": lambda tensor, *_: tensor, "is_pinned": lambda *_: False}.items():
            self.stack.enter_context(patch.object(torch.Tensor, name, value))
        self.stack.enter_context(patch.object(torch.UntypedStorage, "resize_", lambda s, n: self.memory.resize(s, n)))
        torch._C._ensureCUDADeviceGuardSet()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(map(is_traceable_wrapper_subclass_type, types)):
            return NotImplemented  # a DTensor or a tensor of torchao calls again with the tensors inside it
        kwargs = {name: value for name, value in (kwargs or {}).items() if name != "pin_memory"}
        on_device = any(isinstance(one, FakeTensor) for one in tree_iter((args, kwargs)))
        device = torch.device(kwargs["device"]).type if kwargs.get("device") is not None else None
        if func is aten._to_copy.default and (device == "cpu" if on_device else device == "cuda"):
            self._copies(kwargs.get("non_blocking", False))
            if on_device:
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if on_device and func is aten.copy_.default:
            there = [isinstance(tensor, FakeTensor) for tensor in args[:2]]
            if not all(there):
                self._copies(args[2] if len(args) > 2 else kwargs.get("non_blocking", False))
            if not there[0]:
                return args[0].zero_()
        if on_device and func is aten._local_scalar_dense.default:
            self.waited()
            return 0.0 if args[0].is_floating_point() else 0
        if on_device and func is aten.equal.default:
            self.waited()
            return True
        if not on_device and device != "cuda":
            return func(*args, **kwargs)
        if on_device and device == "cpu":
            raise RuntimeError(f"{func} makes a tensor on the host from one on the device: the fake device only copies")
        if on_device and getattr(func, "overloadpacket", None) in PRODUCTS:
            self.products[str(args[0].dtype).removeprefix("torch.")] += 1
        with self.fake:
            if not on_device:
                args, kwargs = tree_map(self._from_host, (args, kwargs))
            out = func(*args, **kwargs)  # a shape that depends on values is an error here
        for tensor in tree_iter(out):
            if isinstance(tensor, FakeTensor):
                self.memory.hold(tensor)
        return out

    def _copies(self, non_blocking: bool) -> None:
        """A copy between host and device, either way. The host waits until it is complete, if it is blocking."""
        if not non_blocking:
            self.waited()

    def _from_host(self, value):
        return self.fake.from_tensor(value) if isinstance(value, torch.Tensor) else value
