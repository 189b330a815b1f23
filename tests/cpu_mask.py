"""Processes whose libraries find less of a CPU than there is, so that one machine can be measured as several.

Engines choose their kernels by CPUID, which ``cpu_mask.c`` answers in its place; the instructions go on to work.
"""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Collection, Mapping
from pathlib import Path

PLACES = {
    "fma": (1, 0, 2, 12),
    "avx": (1, 0, 2, 28),
    "avx2": (7, 0, 1, 5),
    "avx512f": (7, 0, 1, 16),
    "avx512bw": (7, 0, 1, 30),
    "avx512vl": (7, 0, 1, 31),
    "avx512_vnni": (7, 0, 2, 11),
    "amx_int8": (7, 0, 3, 25),
    "avx_vnni": (7, 1, 0, 4),
}
"""Leaf, subleaf, register (eax to edx) and bit of what /proc/cpuinfo calls so."""

_MASK = "CPU_MASK"


class MaskError(Exception):
    """Nothing can be hidden here."""


def is_in_force() -> bool:
    """Whether this process was started with something hidden from it."""
    return _MASK in os.environ


def environment(without: Collection[str], folder: Path) -> Mapping[str, str]:
    """What a process is to be started with; the library that it loads first comes into the folder. Raises MaskError."""
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").split()
    if platform.machine() != "x86_64" or "cpuid_fault" not in flags:
        raise MaskError("this CPU does not let CPUID fault (Intel's do), so no instruction can be hidden")
    library = folder / "cpu_mask.so"
    command = ["cc", "-O2", "-shared", "-fPIC", "-o", str(library), str(Path(__file__).with_suffix(".c"))]
    try:
        subprocess.run(command, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise MaskError(f"{library.name} cannot be compiled ({error}); install gcc and libc6-dev") from None
    mask = " ".join("{:x},{},{},{}".format(*PLACES[each]) for each in sorted(without))
    return {**os.environ, "LD_PRELOAD": str(library), _MASK: mask}
