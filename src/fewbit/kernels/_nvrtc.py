"""CUDA C++ compiled at first use by NVRTC, kept on disk, launched on torch's stream.

Sources are package data under `_cuda/`; nobody needs nvcc. What was compiled lies in the cache directory under a name
made of everything it depends on: all sources, the defines, the card's architecture and the compiler's version.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch

from fewbit import kept
from fewbit.errors import FewbitError
from fewbit.store import cache_dir

SOURCES = Path(__file__).parent / "_cuda"
# more than this for a block has to be asked of the driver
PLAIN_SHARED = 48 << 10
SUFFIX = ".cubin"
# all that is kept: one takes 20 to 80 KB, a model a dozen of them, and old versions' are never asked for again
MAX_BYTES = 64 << 20
DIGEST = hashlib.sha256().digest_size
# the first architecture with programmatic dependent launch
DEPENDENT_LAUNCH = 90
INVALID_CONTEXT = 201


def missing() -> str | None:
    """Why nothing can be compiled or launched here, in words; None where it can."""
    if not torch.cuda.is_available():
        return "torch sees no CUDA card"
    return lacking()


def extra() -> str:
    """What to install for this torch: bindings and NVRTC of its own major version of CUDA."""
    return "fewbit[cuda12]" if (torch.version.cuda or "").startswith("12.") else "fewbit[cuda]"


@cache
def lacking() -> str | None:
    """What of the extra is not there, in words; None where the compiler can be called."""
    if not importlib.util.find_spec("cuda") or not importlib.util.find_spec("cuda.bindings"):
        return f"cuda-bindings is not installed (the extra {extra()} has it)"
    try:
        _imported()
    except ImportError as error:
        return f"cuda-bindings can't be imported: {error}"
    except RuntimeError as error:
        return f"NVRTC's library can't be loaded (the extra {extra()} has it): {str(error).splitlines()[0]}"
    return None


@cache
def _imported() -> tuple[Any, Any]:
    from cuda.bindings import driver, nvrtc

    nvrtc.nvrtcVersion()
    return driver, nvrtc


def _both() -> tuple[Any, Any]:
    if reason := lacking():
        raise FewbitError("The CUDA kernels can't be compiled.", f"{reason}.", f"Install {extra()}, or run on the CPU.")
    return _imported()


class Arguments:
    """Arguments as the driver takes them, from ctypes values whose `.value` may be changed between launches.

    Not to be shared by threads that change them.
    """

    __slots__ = ("_pointers", "address", "values")

    def __init__(self, *values: Any) -> None:
        self.values = values
        self._pointers = (ctypes.c_void_p * max(1, len(values)))(*map(ctypes.addressof, values))
        self.address = ctypes.addressof(self._pointers)


class Kernel:
    """One function of a compiled module, in one card's context."""

    __slots__ = ("_device", "_driver", "_function", "_largest", "arch", "name")

    def __init__(self, driver: Any, function: Any, name: str, device: int, arch: int) -> None:
        self._driver, self._function, self._device = driver, function, device
        self._largest = PLAIN_SHARED
        self.name, self.arch = name, arch

    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        args: Arguments | Sequence[Any],
        shared: int = 0,
        dependent: bool = False,
    ) -> None:
        """Launch on torch's current stream of this kernel's card; `args` are ctypes values, `shared` dynamic bytes.

        `dependent`: it may start while the kernel before it on the stream still runs, and waits for that one's results
        itself (griddepcontrol.wait); where the card can't, it is launched as any other.
        """
        if not isinstance(args, Arguments):
            args = Arguments(*args)
        if shared > self._largest:
            self._allow(shared)
        stream = torch.cuda.current_stream(self._device).cuda_stream
        driver = self._driver
        if dependent and self.arch >= DEPENDENT_LAUNCH:
            config = _dependent_config(driver, grid, block, shared, stream)
            (status,) = driver.cuLaunchKernelEx(config, self._function, args.address, 0)
        else:
            (status,) = driver.cuLaunchKernel(self._function, *grid, *block, shared, stream, args.address, 0)
        if int(status) == INVALID_CONTEXT:
            # this thread has not used the card yet
            _use_context(driver, self._device)
            (status,) = driver.cuLaunchKernel(self._function, *grid, *block, shared, stream, args.address, 0)
        if int(status):
            raise _launch_error(driver, self.name, status, f"grid {grid}, block {block}, {shared} bytes shared")

    def attribute(self, which: str) -> int:
        """A number of the driver's, such as NUM_REGS, LOCAL_SIZE_BYTES or SHARED_SIZE_BYTES."""
        kinds = self._driver.CUfunction_attribute
        return int(_done(self._driver.cuFuncGetAttribute(kinds[f"CU_FUNC_ATTRIBUTE_{which}"], self._function)))

    def _allow(self, shared: int) -> None:
        kind = self._driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _done(self._driver.cuFuncSetAttribute(self._function, kind, shared))
        self._largest = shared


def _dependent_config(driver: Any, grid: Sequence[int], block: Sequence[int], shared: int, stream: int) -> Any:
    attribute = driver.CUlaunchAttribute()
    attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
    value = driver.CUlaunchAttributeValue()
    value.programmaticStreamSerializationAllowed = 1
    attribute.value = value
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid
    config.blockDimX, config.blockDimY, config.blockDimZ = block
    config.sharedMemBytes = shared
    config.hStream = stream
    config.attrs = [attribute]
    config.numAttrs = 1
    return config


def module(
    source: str, names: Sequence[str], defines: Mapping[str, object] | None = None, device: int | None = None
) -> dict[str, Kernel]:
    """The functions `names` (extern "C") of `_cuda/<source>` with -D`defines`, for torch's current card or `device`.

    FewbitError with the compiler's log where it does not compile, or with the driver's words where it does not load.
    """
    index = torch.cuda.current_device() if device is None else device
    pairs = tuple(sorted((key, str(value)) for key, value in (defines or {}).items()))
    loaded = _loaded(source, pairs, index)
    driver, _ = _both()
    arch = card_arch(index)
    return {
        name: Kernel(driver, _done(driver.cuModuleGetFunction(loaded, name.encode())), name, index, arch)
        for name in names
    }


def card_arch(device: int | None = None) -> int:
    """Compute capability as one number: 86 for 8.6."""
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@cache
def most_shared(device: int) -> int:
    """Bytes of shared memory that a block may ask for."""
    driver, _ = _both()
    which = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
    return int(_done(driver.cuDeviceGetAttribute(which, device)))


@cache
def _loaded(source: str, defines: tuple[tuple[str, str], ...], device: int) -> Any:
    driver, _ = _both()
    image = _kept(source, defines, card_arch(device))
    _use_context(driver, device)
    status, loaded = driver.cuModuleLoadData(image)
    if int(status):
        # a file that passes its checksum and does not load was made for another driver
        image = _kept(source, defines, card_arch(device), anew=True)
        status, loaded = driver.cuModuleLoadData(image)
    if int(status):
        raise _launch_error(driver, source, status, f"{len(image)} bytes for sm_{card_arch(device)}")
    return loaded


def _use_context(driver: Any, device: int) -> None:
    """Torch's own context of the card, current on this thread."""
    torch.cuda.synchronize(device)
    context = _done(driver.cuDevicePrimaryCtxRetain(device))
    _done(driver.cuCtxSetCurrent(context))


def _kept(source: str, defines: tuple[tuple[str, str], ...], arch: int, anew: bool = False) -> bytes:
    """What NVRTC made of it, from the cache where it is whole; a folder that can't be written costs compiling again."""
    file = cache_dir() / "cuda" / f"{Path(source).stem}-{_key(source, defines, arch)}{SUFFIX}"
    if not anew:
        try:
            whole = file.read_bytes()
            if len(whole) > DIGEST and hashlib.sha256(whole[DIGEST:]).digest() == whole[:DIGEST]:
                kept.used(file)
                return whole[DIGEST:]
        except OSError:
            pass
    image = compiled(source, dict(defines), arch)
    with suppress(OSError):
        with kept.written(file) as draft:
            draft.write(hashlib.sha256(image).digest() + image)
        kept.tidy(file.parent, SUFFIX, file, MAX_BYTES)
    return image


def _key(source: str, defines: tuple[tuple[str, str], ...], arch: int) -> str:
    _, nvrtc = _both()
    _, major, minor = nvrtc.nvrtcVersion()
    known = hashlib.sha256(repr((source, defines, arch, _options(arch, {}), major, minor)).encode())
    for name, text in sorted(_headers().items()):
        known.update(f"{name}\0{len(text)}\0".encode() + text)
    known.update((SOURCES / source).read_bytes())
    return known.hexdigest()[:32]


def _headers() -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in SOURCES.glob("*.cuh")}


def architectures() -> list[int]:
    """What this NVRTC compiles for."""
    _, nvrtc = _both()
    _, known = nvrtc.nvrtcGetSupportedArchs()
    return sorted(known)


def _options(arch: int, defines: Mapping[str, object]) -> list[str]:
    """Machine code for the card; for one that is newer than the compiler, PTX for the driver to translate."""
    known = architectures()
    older = [a for a in known if a <= arch]
    if not older:
        raise FewbitError(
            "This card is too old for the CUDA kernels.",
            f"It is sm_{arch}; this NVRTC compiles for sm_{known[0]} and up.",
            "Run on the CPU.",
        )
    # machine code runs on later minor versions, not on later major ones
    kind = "sm" if older[-1] // 10 == arch // 10 else "compute"
    given = [f"-D{key}={value}" for key, value in sorted(defines.items())]
    # wgmma is no part of plain sm_90, which has no other minor version either
    exact = "a" if older[-1] == arch == 90 else ""
    return [f"--gpu-architecture={kind}_{older[-1]}{exact}", "--std=c++17", "-default-device", *given]


def compiled(source: str, defines: Mapping[str, object], arch: int) -> bytes:
    """Machine code (or PTX) of `_cuda/<source>` for an architecture such as 86; needs no card."""
    _, nvrtc = _both()
    headers = _headers()
    names = [name.encode() for name in headers]
    made = nvrtc.nvrtcCreateProgram(
        (SOURCES / source).read_bytes(), source.encode(), len(headers), list(headers.values()), names
    )
    program = _done(made)
    try:
        options = [option.encode() for option in _options(arch, defines)]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), options)
        if int(status):
            raise FewbitError(
                "A CUDA kernel did not compile.",
                f"{source} for sm_{arch} with {dict(defines)}: {_log(nvrtc, program)}",
                f"Update {extra()}, or run on the CPU; this is worth a report.",
            )
        if options[0].startswith(b"--gpu-architecture=sm_"):
            size, get = nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN
        else:
            size, get = nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX
        image = bytearray(_done(size(program)))
        # bytes are filled in place by the bindings
        whole = bytes(image)
        _done(get(program, whole))
        return whole
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _log(nvrtc: Any, program: Any) -> str:
    text = b" " * int(_done(nvrtc.nvrtcGetProgramLogSize(program)))
    _done(nvrtc.nvrtcGetProgramLog(program, text))
    return text.rstrip(b"\0 \n").decode(errors="replace")


def _done(answer: tuple[Any, ...]) -> Any:
    """What a call gave besides its status; FewbitError where that is not 0."""
    status, *rest = answer
    if int(status):
        raise FewbitError(
            "A call of the CUDA driver or compiler failed.",
            f"{status!s}.",
            "Update the card's driver, or run on the CPU.",
        )
    return rest[0] if rest else None


def _launch_error(driver: Any, name: str, status: Any, facts: str) -> FewbitError:
    _, text = driver.cuGetErrorString(status)
    words = text.decode() if isinstance(text, bytes) else str(status)
    return FewbitError(f"The CUDA kernel {name} did not run.", f"{words}; {facts}.", "Run on the CPU, and report this.")


def run(kernel: Kernel, grid: tuple[int, int, int], threads: int, *args: Any) -> None:
    """Launch a kernel that waits for the one before it by itself, and so may start early."""
    kernel.launch(grid, (threads, 1, 1), args, dependent=True)


def pointers(*tensors: torch.Tensor | None) -> list[ctypes.c_void_p]:
    """Where they lie, as arguments; 0 for None."""
    return [ctypes.c_void_p(0 if t is None else t.data_ptr()) for t in tensors]
