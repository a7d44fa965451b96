"""Detects devices, free memory and working kernels by probing the machine, never by a name or version."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import platform
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

from rabbit_engine.errors import DeviceUnavailableError, first_line
from rabbit_engine.utils.extras import install_command

_AMPERE = (8, 0)


def best_device() -> torch.device:
    """The first device of the accelerator that torch was built for (CUDA, ROCm, XPU, MPS ...) if there is one, else `cpu`."""
    found = torch.accelerator.current_accelerator(check_available=True)
    return torch.device("cpu") if found is None else torch.device(found.type, 0)


def find_device(requested: str | int | torch.device | None) -> torch.device:
    """The requested device with its index; None selects the best one.

    Raises DeviceUnavailableError if the device is not available; never falls back to the CPU.
    """
    if requested is None:
        return best_device()
    try:
        device = torch.device(requested)
    except (RuntimeError, TypeError) as error:
        raise DeviceUnavailableError(
            f'device={requested!r} is not a device torch knows; try "cuda:0", "xpu:0", "mps" or "cpu"'
        ) from error
    problem = _device_problem(device)
    if problem:
        raise DeviceUnavailableError(
            f"device={str(requested)!r} is not available: {problem}; use device=None for the best one ({best_device()})"
        )
    return torch.device(device.type, device.index or 0) if device.type != "cpu" else torch.device("cpu")


def _device_problem(device: torch.device) -> str | None:
    if device.type == "cpu":
        return None
    if not is_accelerator(device):
        return f"{device.type!r} is not supported, only cpu and accelerators such as cuda, xpu and mps"
    found = torch.accelerator.current_accelerator(check_available=True)
    count = torch.accelerator.device_count() if found is not None and found.type == device.type else 0
    known = f"this torch ({torch.__version__}) sees {count} {device.type.upper()} devices"
    return known if (device.index or 0) >= count else None


def kernels_of(device: torch.device) -> str:
    """The type of a device, and of a processor the instructions that torch uses: with other ones sums may differ in their last
    bits."""
    return f"cpu {torch.backends.cpu.get_cpu_capability()}" if device.type == "cpu" else device.type


def is_available(device: torch.device) -> bool:
    """Whether this machine has the device, and this torch sees it."""
    return _device_problem(device) is None


def is_accelerator(device: torch.device) -> bool:
    """Whether torch can run models on a device of that type, if the machine has one."""
    with contextlib.suppress(RuntimeError):  # "meta" and others, which have no module
        return device.type != "cpu" and bool(torch.get_device_module(device))
    return False


def has_streams(device: torch.device) -> bool:
    """Whether the device copies asynchronously while it computes. False for the CPU, and for MPS, which has one queue."""
    return device.type not in ("cpu", "mps")


def own_memory_bytes(device: torch.device) -> tuple[int, int] | None:
    """Free and total bytes of the device's own memory; None if it uses the host's, as the CPU and MPS do."""
    module = torch.get_device_module(device)
    return module.mem_get_info(device) if hasattr(module, "mem_get_info") else None


def free_memory_bytes(device: torch.device) -> int:
    """Bytes that can be allocated on `device` now, within the cgroup's limit for host memory; memory in torch's GPU cache
    counts as free."""
    own = own_memory_bytes(device)
    if own is not None:
        module = torch.get_device_module(device)
        return own[0] + int(module.memory_reserved(device)) - int(module.memory_allocated(device))
    free = int(psutil.virtual_memory().available)
    limits = [limit for limit in (_cgroup_free_bytes(),) if limit is not None]
    return max(0, min([free, *limits]))


def pinned_limit_bytes() -> int:
    """The most host memory to page-lock: half of it on Windows and WSL, whose drivers refuse more, else nine tenths, because
    pinned memory cannot be swapped out."""
    half = platform.system() == "Windows" or "microsoft" in platform.release().lower()
    return int(psutil.virtual_memory().total * (0.5 if half else 0.9))


IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs")
"""File systems that are memory."""


def file_system_of(folder: Path) -> str | None:
    """The type of the file system of a folder, which may not exist yet, such as "ext4"; None if unknown."""
    mounted = [part for part in psutil.disk_partitions(all=True) if folder.resolve().is_relative_to(part.mountpoint)]
    nearest = max(mounted, key=lambda part: len(part.mountpoint), default=None)
    return nearest.fstype if nearest else None


CGROUP_FILES = (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes"))
"""File names of limit and usage, for cgroups v2 and v1."""


def _cgroup_free_bytes() -> int | None:
    """Bytes that this process's cgroups and their ancestors still allow; None without a limit.

    Unmapped page cache counts as free: the kernel drops it first.
    """
    free = [found for folder in _cgroup_folders() for names in CGROUP_FILES if (found := cgroup_room(folder, *names)) is not None]
    return min(free, default=None)


def _cgroup_folders() -> Iterator[Path]:
    root = Path("/sys/fs/cgroup")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and "memory" not in controllers.split(","):
                continue
            mount = root / "memory" if controllers else root
            own = mount / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(mount))


def cgroup_room(folder: Path, limit_name: str, use_name: str) -> int | None:
    """Bytes between one cgroup's usage and its limit; None without a limit."""
    with contextlib.suppress(OSError, ValueError):  # "max" means no limit
        limit, used = (int((folder / name).read_text()) for name in (limit_name, use_name))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        prefix = "total_" if "total_cache" in stat else ""
        file = int(stat.get(f"{prefix}cache", stat.get("file", 0)))
        mapped = int(stat.get(f"{prefix}mapped_file", stat.get("file_mapped", 0)))
        shared = int(stat.get(f"{prefix}shmem", 0))
        return limit - used + max(0, file - mapped - shared)
    return None


@functools.cache
def is_flash_attention_available() -> tuple[bool, str]:
    """`(True, "flash-attn 2.8.1 on NVIDIA H200")` or `(False, reason)`.

    True only where the package is installed, the GPU is Ampere or newer, and a real kernel call succeeds.
    """
    if importlib.util.find_spec("flash_attn") is None:
        return False, f"the package flash-attn is not installed ({install_command('flash')})"
    if not torch.cuda.is_available():
        return False, f"no CUDA device ({platform.system()}, torch {torch.__version__})"
    name, capability = torch.cuda.get_device_name(0), torch.cuda.get_device_capability(0)
    if capability < _AMPERE:
        return False, f"{name} has compute capability {capability[0]}.{capability[1]}, flash-attn needs 8.0 (Ampere)"
    problem = _flash_kernel_problem()
    return (False, problem) if problem else (True, f"flash-attn runs on {name}")


def _flash_kernel_problem() -> str | None:
    """Run the kernel once on a [1, 8, 1, 64] bf16 input; the reason if it fails, else None."""
    try:
        from flash_attn import flash_attn_func

        states = torch.randn(1, 8, 1, 64, dtype=torch.bfloat16, device="cuda")
        if not torch.isfinite(flash_attn_func(states, states, states, causal=True)).all():
            return "flash-attn is installed, but its kernel returned non-finite values"
    except (ImportError, OSError, RuntimeError) as error:  # wrong ABI, missing symbol, no kernel image
        return f"flash-attn is installed, but its kernel does not run: {first_line(error)}"
    return None


def environment() -> dict[str, str]:
    """Versions and hardware, for benchmark records and bug reports."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu_cores": str(psutil.cpu_count()),
        "ram": f"{psutil.virtual_memory().total / 2**30:.0f} GiB",
        "gpu": gpu,
    }
