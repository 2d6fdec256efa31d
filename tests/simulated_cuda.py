"""A GPU that is none: tensors that say they are on cuda:0, compute on the CPU, and count what a GPU would do.

    with SimulatedCuda() as gpu:
        x = torch.ones(3, device="cuda")
        (x + x).sum().item()
    gpu.kernels, gpu.waits, gpu.uploads        # 3 (fill, add, sum), 1 (item), 0

It refuses what a GPU refuses: an operation on tensors of both sides, and numpy's look at memory that is
elsewhere. Every operation that is no view counts as one kernel; a real GPU may need more for it. A wait is
whatever makes the processor stand still until the GPU has caught up: a number or a copy fetched from it,
and results whose size only the GPU knows. An upload is a copy to it. What the counts are good for is
comparing: a loop that starts to launch or to wait more shows on any laptop. The arithmetic is the CPU's, so
results must be equal to the bit.

How: torch itself sees tensors of the CPU, of a subclass whose `device` is cuda:0 for whoever asks in
Python. Where a device is named in a call, a function mode takes it out and says so to a dispatch mode,
which marks the results.
"""
import contextlib
from collections import Counter
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Results of a size that the processor must learn before it can go on, and single values that it asks for.
SIZE_IS_DATA = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
ANSWERS = {"_local_scalar_dense", "equal", "is_nonzero"}
# Memory without contents, and what only looks at a tensor's description: no kernel.
FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "detach", "lift_fresh"}
# These may have a side on the CPU: a copy, and an index, which CUDA copies over by itself.
CROSSING = {"copy_", "_to_copy", "index", "index_put_", "_index_put_impl_"}


class OnGpu(torch.Tensor):
    """A tensor whose `device` is cuda:0. `inner` is a plain tensor that shares its memory."""

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> "OnGpu":
        self = torch.Tensor._make_subclass(cls, inner)
        self.inner = inner
        return self

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func} on a simulated GPU's tensor outside of `with SimulatedCuda()`")

    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def __repr__(self) -> str:
        return f"OnGpu({self.inner})"

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec)

    def cpu(self) -> torch.Tensor:
        return self.to("cpu")

    def tolist(self) -> list:
        return self.cpu().tolist()

    def numpy(self, **kw):
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = numpy


class Devices(TorchFunctionMode):
    """Takes the device out of a call, and lets the dispatch mode know where the result belongs."""

    def __init__(self, gpu: "SimulatedCuda"):
        super().__init__()
        self.gpu = gpu

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.Tensor.cuda:
            func, args = torch.Tensor.to, (args[0], CUDA)
        # Flat arguments only: nobody hides a device in a list. `x.to(y)` means the device and the type of y.
        if func is torch.Tensor.to and len(args) > 1 and isinstance(args[1], torch.Tensor):
            args = (args[0], args[1].device, args[1].dtype, *args[2:])
        named = [x for x in (*args[1:], kwargs.get("device")) if is_device(x)]
        if not named:
            return func(*args, **kwargs)
        target = torch.device(named[0])
        args = tuple(CPU if is_device(x) else x for x in args)
        kwargs = {name: CPU if is_device(x) else x for name, x in kwargs.items()}
        if func is torch.Tensor.to:
            if isinstance(args[0], OnGpu) == (target.type == "cuda"):
                return func(*args, **kwargs)  # it is there already
            kwargs["copy"] = True  # for torch it is on the CPU either way, and would stay where it is
        self.gpu.target.append(target)
        try:
            return func(*args, **kwargs)
        finally:
            self.gpu.target.pop()


def is_device(x) -> bool:
    return isinstance(x, (torch.device, str)) and str(x).split(":")[0] in ("cpu", "cuda")


def for_the_cpu(function):
    """The same function of a device's type, asked about the CPU."""
    def asked(device_type="cuda", *args, **kw):
        return function("cpu", *args, **kw)
    return asked


class SimulatedCuda(TorchDispatchMode):
    """While it is entered, "cuda" works: see the top of this file. `memory`: bytes that it says are free."""

    def __init__(self, memory: int = 2**36, name: str = "NVIDIA H100 80GB HBM3"):
        super().__init__()
        self.memory, self.name, self.target = memory, name, []
        self.kernels, self.waits, self.uploads = 0, 0, 0
        self.by_kernel, self.by_wait = Counter(), Counter()
        self.outside = contextlib.ExitStack()

    def __enter__(self):
        # Else Module.to makes new parameters, and weights that were tied no longer are.
        self.swapped_before = torch.__future__.get_swap_module_params_on_conversion()
        torch.__future__.set_swap_module_params_on_conversion(True)
        answers = {"_lazy_init": None, "is_available": True, "is_bf16_supported": True, "set_device": None,
                   "get_device_name": self.name, "mem_get_info": (self.memory, self.memory),
                   "device_count": 1, "current_device": 0, "synchronize": None, "empty_cache": None}
        for function, answer in answers.items():
            self.outside.enter_context(mock.patch.object(torch.cuda, function, return_value=answer))
        # Casting goes by what torch takes the tensors for, and that is the CPU.
        for function in ("autocast", "is_autocast_enabled", "get_autocast_dtype"):
            real = getattr(torch, function)
            self.outside.enter_context(mock.patch.object(torch, function, for_the_cpu(real)))
        self.outside.enter_context(Devices(self))
        return super().__enter__()

    def __exit__(self, *error):
        torch.__future__.set_swap_module_params_on_conversion(self.swapped_before)
        left = super().__exit__(*error)
        self.outside.close()
        return left

    def reset(self) -> None:
        """Count from nothing again."""
        self.kernels, self.waits, self.uploads = 0, 0, 0
        self.by_kernel.clear()
        self.by_wait.clear()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        tensors = [x for x in tree_flatten((args, kwargs or {}))[0] if isinstance(x, torch.Tensor)]
        here = [x for x in tensors if isinstance(x, OnGpu)]
        check(name, here, tensors)
        kwargs = dict(kwargs or {})
        target = self.target[-1] if self.target else None
        device, in_backward = kwargs.get("device"), torch._C._current_autograd_node() is not None
        # A function mode is off within the functions that it has caught, and one of these is `backward`.
        # Autograd's own zeros are made like the tensors that torch sees, on the CPU; nothing else there is.
        if device is not None and (device.type == "cuda" or in_backward):
            target = target or CUDA
            kwargs["device"] = CPU
        to_gpu = target.type == "cuda" if target else bool(here)
        if name == "copy_":
            to_gpu = isinstance(args[0], OnGpu)
        if here or to_gpu:
            self.count(func, name, args, kwargs, here, to_gpu)

        wrapper_of = {id(x.inner): x for x in here}
        args, kwargs = tree_map(lambda x: x.inner if isinstance(x, OnGpu) else x, (args, kwargs))
        out = func(*args, **kwargs)

        def back(x):
            if not isinstance(x, torch.Tensor):
                return x
            # An operation in place hands back what it was given.
            return wrapper_of[id(x)] if id(x) in wrapper_of else OnGpu(x) if to_gpu else x
        return tree_map(back, out)

    def count(self, func, name: str, args: tuple, kwargs: dict, here: list, to_gpu: bool) -> None:
        """One more kernel, upload or wait."""
        if name in ("copy_", "_to_copy"):
            leaves = isinstance(args[1] if name == "copy_" else args[0], OnGpu)
            if leaves and not to_gpu:
                return self.wait(name)
            if to_gpu and not leaves:
                self.uploads += 1
                return None
        indices = args[1] if name in ("index", "index_put_") else ()
        by_mask = any(x is not None and x.dtype == torch.bool for x in indices)
        unsized = name == "repeat_interleave" and kwargs.get("output_size") is None
        if name in ANSWERS or name in SIZE_IS_DATA or by_mask or unsized:
            self.wait(name)
        is_view = any(x.alias_info and not x.alias_info.is_write for x in func._schema.returns)
        if not is_view and name not in FREE and name != "_local_scalar_dense":
            self.kernels += 1
            self.by_kernel[name] += 1
        return None

    def wait(self, name: str) -> None:
        self.waits += 1
        self.by_wait[name] += 1


def check(name: str, here: list, tensors: list) -> None:
    """Refuse an operation on tensors of both sides, as CUDA does. A single number may come from the CPU."""
    others = [x for x in tensors if not isinstance(x, OnGpu) and x.ndim]
    if here and others and name not in CROSSING:
        shapes = ", ".join(str(tuple(x.shape)) for x in others)
        raise RuntimeError(f"{name}: tensors must be on one device, found cuda:0 and cpu (shapes {shapes})")
