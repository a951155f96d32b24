"""The keyword arguments of `rf.run`, `rf.Sandbox` and their like, as a type. Imported by type checkers only.

The one signature is that of `Spec.make`; what passes it on takes `**options: Unpack[Options]`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Any, TypedDict

from ringfence.spec.boundary import Device, Kernel, Namespaces, Seccomp
from ringfence.spec.network import Network
from ringfence.spec.rules import Limits, Mount, Tmpfs

Path = str | bytes | os.PathLike[str] | os.PathLike[bytes]


class SandboxOptions(TypedDict, total=False):
    """What a sandbox has for all its commands."""

    isolation: str
    env: Mapping[Any, Any] | None
    files: Mapping[Any, Any] | None
    mounts: Iterable[Mount | Tmpfs]
    image: Path | None
    overlay: bool
    user: int | str | None
    hostname: str | None
    network: str | Network | None
    limits: Limits | None
    namespaces: Namespaces | Mapping[str, Any] | None
    capabilities: Iterable[str]
    seccomp: str | Mapping[str, Any] | Seccomp | None
    devices: Iterable[Device | Path]
    kernel: Kernel | Path | None
    readable: Iterable[Path] | None
    writable: Iterable[Path]
    require: Mapping[str, str] | None


class _RunOptions(TypedDict, total=False):
    input: bytes | bytearray | memoryview | str | None
    collect: Iterable[Path]
    check: bool
    text: bool


class Options(SandboxOptions, _RunOptions, total=False):
    """What `rf.run` takes: a sandbox's options and a run's."""


class CommandOptions(_RunOptions, total=False):
    """What a command in a sandbox that is there already has of its own."""

    env: Mapping[Any, Any] | None
    files: Mapping[Any, Any] | None
    cwd: Path | None
    wall_time: str | int | float | None
    output: str | int | float | None
