"""Describes the machine that measures: its hardware and its current state.

Reads /proc and /sys, and calls nvidia-smi if it is installed. Whatever cannot be read is omitted.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path

from surgery.pipeline.threads import cores

_CPUS = Path("/sys/devices/system/cpu/cpu0/cpufreq")
_OURSELVES = Path("/proc/self/status")
_ZONES = Path("/sys/class/thermal")
_GPU = {"gpu": "name", "gpu driver": "driver_version", "gpu memory": "memory.total"}
_GPU_STATE = {
    "gpu clock": "clocks.sm",
    "gpu memory clock": "clocks.mem",
    "gpu temperature": "temperature.gpu",
    "gpu power": "power.draw",
    "gpu state": "pstate",
}


def machine() -> dict[str, str]:
    """The properties that do not change: processor, cores, system, and the GPU with its driver."""
    found = {"processor": _processor(), "cores": str(cores()), "system": platform.platform()}
    with contextlib.suppress(OSError, ValueError):
        found["memory"] = f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 1e9:.1f} GB"
    if governor := _read(_CPUS / "scaling_governor"):
        found["governor"] = governor
    return found | _nvidia(_GPU)


def condition(when: str) -> dict[str, str]:
    """The properties that change: load, clocks, temperature; each name ends in `when`, such as `load before`."""
    found = {}
    with contextlib.suppress(OSError):
        found["load"] = f"{os.getloadavg()[0]:.2f}"
    clock = _read(_CPUS / "scaling_cur_freq")
    if clock.isdigit():
        found["clock"] = f"{int(clock) / 1000:.0f} MHz"
    elif megahertz := _cpuinfo("cpu MHz"):
        found["clock"] = f"{float(megahertz):.0f} MHz"
    degrees = [int(text) for zone in sorted(_ZONES.glob("thermal_zone*")) if (text := _read(zone / "temp")).isdigit()]
    if degrees:
        found["temperature"] = f"{max(degrees) / 1000:.0f} °C"
    return {f"{name} {when}": value for name, value in (found | _nvidia(_GPU_STATE)).items()}


def device_memory(device: str) -> int | None:
    """Bytes in use on the first GPU, or by this process on the CPU, mapped file pages included; None if the system does
    not report it."""
    if device != "cuda":
        resident = next((line for line in _read(_OURSELVES).splitlines() if line.startswith("VmRSS:")), "").split()
        return int(resident[1]) << 10 if len(resident) > 1 else None  # "VmRSS: 1234 kB"
    used = _nvidia({"used": "memory.used"}).get("used", "").partition(" ")[0]  # "1234 MiB"
    return int(used) << 20 if used.isdigit() else None


def _nvidia(wanted: Mapping[str, str]) -> dict[str, str]:
    """Properties of the first GPU by nvidia-smi's names; empty without nvidia-smi."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    query = [program, "--id=0", f"--query-gpu={','.join(wanted.values())}", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    values = [value.strip() for value in said.strip().split(",")]
    return dict(zip(wanted, values, strict=True)) if len(values) == len(wanted) else {}


def _processor() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(field: str) -> str:
    """The first processor's entry with that name."""
    for line in _read(Path("/proc/cpuinfo")).splitlines():
        name, _, value = line.partition(":")
        if name.strip() == field:
            return value.strip()
    return ""


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
