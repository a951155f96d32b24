"""What to run and under which rules: frozen values, and the parsing of what people write."""

from ringfence.spec.boundary import CAPABILITIES, NAMESPACES, Device, Kernel, Namespaces, Seccomp
from ringfence.spec.model import AUTO, DEFAULT_ENV, ISOLATIONS, Spec
from ringfence.spec.network import Allowed, Network
from ringfence.spec.rules import WORK_DIRECTORY, File, FileIn, Limits, Mount, Tmpfs

__all__ = [
    "AUTO",
    "CAPABILITIES",
    "DEFAULT_ENV",
    "ISOLATIONS",
    "NAMESPACES",
    "WORK_DIRECTORY",
    "Allowed",
    "Device",
    "File",
    "FileIn",
    "Kernel",
    "Limits",
    "Mount",
    "Namespaces",
    "Network",
    "Seccomp",
    "Spec",
    "Tmpfs",
]
