"""Loads machine code and launches it through the CUDA driver."""

from __future__ import annotations

import ctypes
import itertools
import operator
from functools import lru_cache
from typing import Any

import torch

from edadm_kernels.hopper.compilation import compiled
from edadm_kernels.hopper.variant import Variant


@lru_cache(maxsize=1)
def is_available() -> bool:
    """Returns whether cuda-bindings, on which torch's CUDA builds depend, is installed and finds NVRTC."""
    try:
        from cuda.bindings import driver, nvrtc  # noqa: F401

        return bool(nvrtc.nvrtcVersion()[0] == nvrtc.nvrtcResult.NVRTC_SUCCESS)
    except (ImportError, OSError, RuntimeError):  # the last two are raised if the library itself is missing
        return False


@lru_cache(maxsize=256)
def function(variant: Variant, device: int) -> Any:
    """Returns the kernel of a variant, compiled and loaded once per device.

    Raises:
        RuntimeError: The driver refused it.
    """
    from cuda.bindings import driver

    with torch.cuda.device(device):
        _enter_context(device)
        text = (variant.source, variant.defines(), variant.prelude())
        loaded = driver.cuModuleLoadData(compiled(*text))
        if loaded[0] != driver.CUresult.CUDA_SUCCESS:  # the cache may be damaged
            loaded = driver.cuModuleLoadData(compiled(*text, anew=True))
        module = _checked(loaded)
        kernel = _checked(driver.cuModuleGetFunction(module, variant.name.encode()))
        attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked(driver.cuFuncSetAttribute(kernel, attribute, variant.shared_bytes))
    return kernel


def launch(variant: Variant, blocks: int, arguments: list[Any], device: int) -> None:
    """Launches a kernel on torch's current stream; it may start while the kernel before it ends.

    Args:
        variant: The kernel with its threads, shared memory and cluster.
        blocks: Number of blocks, a multiple of the cluster.
        arguments: ctypes values, or objects with `getPtr`, in the kernel's order.
        device: Index of the device.

    Raises:
        RuntimeError: The driver refused it.
    """
    from cuda.bindings import driver

    stream = torch.cuda.current_stream(device).cuda_stream
    kernel, config = _prepared(variant, blocks, device, stream)
    addresses = (ctypes.c_void_p * len(arguments))(*(_address(argument) for argument in arguments))
    with torch.cuda.device(device):
        _enter_context(device)
        _checked(driver.cuLaunchKernelEx(config, kernel, ctypes.addressof(addresses), 0))


@lru_cache(maxsize=4096)
def _prepared(variant: Variant, blocks: int, device: int, stream: int) -> tuple[Any, Any]:
    """Returns a kernel and the configuration of its launch on a stream, which is never changed afterwards."""
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = blocks, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = variant.threads, 1, 1
    config.sharedMemBytes = variant.shared_bytes
    config.hStream = driver.CUstream(stream)
    overlap = driver.CUlaunchAttribute()
    overlap.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    overlap.value.programmaticStreamSerializationAllowed = 1
    attributes = [overlap]
    if variant.cluster > 1:
        cluster = driver.CUlaunchAttribute()
        cluster.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        cluster.value.clusterDim.x = variant.cluster
        cluster.value.clusterDim.y = cluster.value.clusterDim.z = 1
        attributes.append(cluster)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return function(variant, device), config


@lru_cache(maxsize=1 << 16)
def tensor_map(
    address: int,
    sizes: tuple[int, ...],
    box: tuple[int, ...],
    swizzle_bytes: int,
    steps: tuple[int, ...] | None = None,
    strides: tuple[int, ...] | None = None,
) -> Any:
    """Returns the tensor map that describes an array of bytes to the tensor memory accelerator; sizes start innermost.

    Args:
        address: The address of the array, aligned to 16 bytes.
        sizes: Bytes of the first dimension, elements of the others.
        box: Bytes of the first dimension and elements of the others that one copy spans; it copies zeros for what is
            outside the array.
        swizzle_bytes: 32, 64 or 128, equal to the first number of `box`.
        steps: Distance between the elements that are copied, per dimension; `None` copies every element.
        strides: Bytes between elements of each dimension but the first; `None` means that the array is dense.

    Raises:
        RuntimeError: The driver refused it.
    """
    from cuda.bindings import driver

    if strides is None:
        strides = tuple(itertools.accumulate(sizes[:-1], operator.mul))
    return _checked(
        driver.cuTensorMapEncodeTiled(
            driver.CUtensorMapDataType.CU_TENSOR_MAP_DATA_TYPE_UINT8,
            len(sizes),
            address,
            [driver.cuuint64_t(size) for size in sizes],
            [driver.cuuint64_t(stride) for stride in strides],
            [driver.cuuint32_t(size) for size in box],
            [driver.cuuint32_t(step) for step in steps or (1,) * len(sizes)],
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle_bytes}B"),
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
    )


def _enter_context(device: int) -> None:
    """Gives the thread torch's context of a device if it has none: a new thread may not have called CUDA yet."""
    from cuda.bindings import driver

    if int(_checked(driver.cuCtxGetCurrent())) == 0:
        _checked(
            driver.cuCtxSetCurrent(_checked(driver.cuDevicePrimaryCtxRetain(_checked(driver.cuDeviceGet(device)))))
        )


def _address(argument: Any) -> int:
    """Returns the address of an argument of a kernel."""
    return int(argument.getPtr()) if hasattr(argument, "getPtr") else ctypes.addressof(argument)


def _checked(result: tuple[Any, ...]) -> Any:
    """Returns the value of a driver call; raises a RuntimeError if it failed."""
    from cuda.bindings import driver

    if result[0] != driver.CUresult.CUDA_SUCCESS:
        reason = driver.cuGetErrorString(result[0])[1].decode()
        raise RuntimeError(
            f"the CUDA driver refused a kernel: {reason}; "
            "set EDADM_KERNELS_BACKEND=triton to run without kernels in CUDA C++"
        )
    return result[1] if len(result) > 1 else None
