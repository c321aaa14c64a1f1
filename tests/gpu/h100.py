"""Let Inductor and Triton compile kernels for an H100 on a machine without one. The kernels are not run.

Import triton's folder first: sys.path. Use it inside the mode of fake_cuda.py. Triton brings the assembler and the
disassembler of CUDA with it.
"""

import re
import subprocess
import tempfile
import types
from dataclasses import dataclass
from pathlib import Path

import torch
import torch._C._dynamo.guards as guards
import torch._dynamo.device_interface as device_interface
from torch._inductor import config as inductor
from torch._inductor.fx_passes import joint_graph
from torch._inductor.runtime import triton_helpers
from torch._inductor.runtime.triton_heuristics import CachingAutotuner
from torch._inductor.select_algorithm import extern_kernels

from tests.gpu.fake_cuda import H100

DRIVER = {
    "max_shared_mem": H100.shared_memory_per_block_optin,
    "max_num_regs": H100.regs_per_multiprocessor,
    "multiprocessor_count": H100.multi_processor_count,
    "warpSize": H100.warp_size,
}


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel, for one configuration of its tiles."""

    name: str
    tiles: str
    registers: int  # per thread
    spilled: int  # bytes of a thread's stack: registers that did not fit
    shared: int  # bytes of shared memory per block


COMPILED: list[Kernel] = []


class Guard:
    """In place of torch's context managers that select a device."""

    def __init__(self, *_): ...

    def __enter__(self):
        return self

    def __exit__(self, *_): ...


class Driver:
    """Triton's view of the device."""

    def __init__(self, target):
        self._target = target
        self.utils = types.SimpleNamespace(get_device_properties=lambda _: DRIVER)

    def get_current_target(self):
        return self._target

    def get_current_device(self):
        return 0

    def get_current_stream(self, _device):
        return 0

    def get_device_interface(self):
        return torch.cuda

    def map_python_to_cpp_type(self, name):
        return name


def install() -> None:
    """Make the compilers take the device for an H100, for the rest of the process."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(Driver(GPUTarget("cuda", 10 * H100.major + H100.minor, H100.warp_size)))
    torch.version.cuda = "12.8"
    for name, value in {"_exchange_device": lambda _: 0, "_maybe_exchange_device": lambda _: 0}.items():
        setattr(torch.cuda, name, value)
    torch.cuda._DeviceGuard = torch.cuda.device = Guard
    torch._C._cuda_getCurrentRawStream = lambda _: 0
    torch._C._cuda_getDevice = lambda: 0
    # In C++ these would make real tensors.
    guards._empty_strided_cuda = lambda size, stride, dtype: torch.empty_strided(
        size, stride, dtype=dtype, device="cuda"
    )
    guards._reinterpret_tensor = lambda tensor, size, stride, offset=0: tensor.as_strided(
        size, stride, tensor.storage_offset() + offset
    )
    interface = device_interface.CudaInterface
    numbers = ("current_device", "set_device", "exchange_device", "maybe_exchange_device", "get_raw_stream")
    for name in numbers:
        setattr(interface, name, staticmethod(lambda *_: 0))
    interface.device = Guard
    interface.device_count = staticmethod(lambda: 1)
    interface.get_device_properties = staticmethod(lambda *_: H100)
    interface.is_bf16_supported = staticmethod(lambda *_, **__: True)
    interface.Worker.get_device_properties = staticmethod(lambda *_: H100)
    interface.Worker.current_device = staticmethod(lambda: 0)
    device_interface.get_cuda_stream = lambda _: 0
    device_interface.init_device_reg()
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, interface)
    inductor.compile_threads = 1  # other processes would have no fake device
    inductor.use_static_triton_launcher = False  # it keeps no binary
    inductor.force_disable_caches = True
    inductor.joint_graph_constant_folding = False  # it computes constants on the device
    joint_graph.lazy_init = lambda *_, **__: None  # its patterns are traced on a real device
    triton_helpers.set_driver_to_gpu = lambda *_: None
    extern_kernels._scaled_mm = lambda *_, **__: None  # cuBLAS's product in float8; torch has no fake one for out=
    precompile = CachingAutotuner._precompile_config

    def noted(tuner, config):
        result = precompile(tuner, config)
        COMPILED.append(kernel(tuner.fn.__name__, str(config.kwargs), result.kernel))
        return result

    CachingAutotuner._precompile_config = noted
    CachingAutotuner._make_launchers = lambda tuner: setattr(tuner, "launchers", [])
    CachingAutotuner._dynamic_scale_rblock = lambda tuner: None
    CachingAutotuner.run = lambda *_, **__: None


def kernel(name: str, tiles: str, compiled) -> Kernel:
    """What the disassembler says of a compiled kernel."""
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        tool = Path(nvidia.__file__ or next(iter(nvidia.__path__))).parent / "bin/cuobjdump"
        command = [str(tool), "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}
    return Kernel(name, tiles, used["REG"], used["STACK"], max(used["SHARED"], compiled.metadata.shared))
