"""The machine and the software that something ran on, for records by which it is judged and repeated."""

import platform
import subprocess
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "torch", "accelerate", "diffusers", "transformers", "safetensors", "bitsandbytes", "xformers", "numpy", "pillow", "deepspeed",
    "lycoris-lora", "prodigyopt", "prodigy-plus-schedule-free", "schedulefree", "dadaptation", "lion-pytorch", "pytorch-optimizer",
)  # fmt: skip
"""Packages whose version can change the numbers."""


def installed_versions() -> dict[str, str]:
    """Return the versions of the packages that matter, those that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def hardware(device: "torch.device") -> dict[str, Any]:
    """Name what numbers were computed on.

    Args:
        device: that computed them.
    """
    import torch

    facts: dict[str, Any] = {"device": device.type, "machine": platform.machine(), "threads": torch.get_num_threads()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"name": properties.name, "memory_gib": round(properties.total_memory / 2**30, 1), "cuda": torch.version.cuda}
        facts["driver"] = gpu_driver()
    else:
        facts["name"] = cpu_name()
    return facts


def cpu_name() -> str:
    """Return the processor's name as the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpu_driver() -> str | None:
    """Return the version of NVIDIA's driver, or None where there is none that can be asked."""
    return _first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


@cache
def source_revision() -> str:
    """Return the git revision of this suite, or "(unknown)" where it was not cloned."""
    return _first_line("git", "rev-parse", "HEAD") or "(unknown)"


def source_is_changed() -> bool | None:
    """Tell whether files of this suite differ from that revision; None where it was not cloned."""
    if _first_line("git", "rev-parse", "HEAD") is None:
        return None
    return _first_line("git", "status", "--porcelain", "--untracked-files=no") is not None


def _first_line(*command: str) -> str | None:
    """Return the first line that a program prints, or None where it fails or prints nothing."""
    try:
        done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), "").strip() or None
