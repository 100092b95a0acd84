"""Where something was measured."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True, kw_only=True)
class Machine:
    """A device and the software that ran on it.

    Attributes:
        processor: name of the CPU, or of the accelerator that was measured.
        device: its type: cpu, cuda, ...
        threads: that torch uses on the CPU.
        python: version.
        libraries: versions, by distribution.
    """

    processor: str
    device: str
    threads: int
    python: str
    libraries: Mapping[str, str]

    @classmethod
    def here(cls, device: torch.device | str, modules: Iterable[str] = ()) -> Machine:
        """Describe this machine.

        Args:
            device: which of its devices.
            modules: import names of the libraries in use beside torch.
        """
        device = torch.device(device)
        return cls(
            processor=processor_name(device),
            device=device.type,
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            libraries=_versions({"torch", *modules}),
        )

    def to_dict(self) -> dict[str, Any]:
        """Give the fields as JSON types."""
        return asdict(self)


def processor_name(device: torch.device | str) -> str:
    """Give the name of a CUDA device, or of the CPU."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        # Only here does Linux tell the processor's name.
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _versions(modules: Iterable[str]) -> dict[str, str]:
    distributions = packages_distributions()
    found = {}
    for module in sorted(modules):
        for name in distributions.get(module, ()):
            try:
                found[name] = version(name)
            except PackageNotFoundError:  # half removed
                continue
    return found
