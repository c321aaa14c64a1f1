"""Load a library that makes torch believe in a CUDA device, without CUDA. Call `load` before torch is imported.

A build of torch for CPUs has no device guard for CUDA, and autograd asks for one. It has no accelerator either, so
autograd would run everything on the main thread. The library registers both, and the choice between the kernels of
attention. It computes nothing (see fake_cuda.py).
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

SOURCE = r"""
#include <ATen/SDPBackend.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/transformers/attention.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;

static Device device() { return Device(DeviceType::CUDA, 0); }
static Stream stream() { return Stream(Stream::DEFAULT, device()); }

struct Guard final : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return device(); }
  Device getDevice() const override { return device(); }
  Stream getStream(Device) const noexcept override { return stream(); }
  Stream getNewStream(Device, int) const override { return stream(); }
  Stream exchangeStream(Stream) const noexcept override { return stream(); }
  void record(void**, const Stream&, const DeviceIndex, const EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

namespace at {
struct CUDAHooks final : CUDAHooksInterface {
  CUDAHooks(CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex current_device() const override { return 0; }
  int getNumGPUs() const override { return 1; }
};
REGISTER_CUDA_HOOKS(CUDAHooks);
}

// The kernel that scaled_dot_product_attention takes. Flash attention has neither a mask nor float32, and efficient
// attention no grouped heads.
static int64_t choose(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor&, const std::optional<at::Tensor>& mask, double,
    bool, std::optional<double>, bool) {
  bool flash = !mask.has_value() && query.scalar_type() != at::kFloat;
  bool grouped = query.size(1) != key.size(1);
  return static_cast<int64_t>(
      flash ? at::SDPBackend::flash_attention
            : grouped ? at::SDPBackend::math : at::SDPBackend::efficient_attention);
}
static const bool chosen = (at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(choose), true);
"""


def torch_home() -> Path:
    """The folder of torch, which is not imported."""
    spec = find_spec("torch")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


def missing() -> str | None:
    """Why there can be no fake device here, or None."""
    if (torch_home() / "lib/libtorch_cuda.so").exists():
        return "this torch is a build with CUDA, and the fake device was made for a build without: tools/gpu_check.py"
    if shutil.which("g++") is None:
        return "the fake CUDA device needs g++ to build its library"
    return None


def load() -> None:
    """Build the library (two seconds) and load it."""
    assert "torch" not in sys.modules, "torch asks for the hooks of CUDA once, when it is imported"
    home = torch_home()
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "shim.cpp", Path(folder) / "shim.so"
        source.write_text(SOURCE)
        links = [f"-L{home}/lib", "-lc10", "-ltorch_cpu", f"-Wl,-rpath,{home}/lib"]
        flags = ["-std=c++20", "-shared", "-fPIC", f"-I{home}/include"]
        subprocess.run(["g++", *flags, str(source), "-o", str(library), *links], check=True)
        ctypes.CDLL(str(library))
