"""What to run and under which rules: frozen values, and the parsing of what people write."""

from ringfence.spec.model import DEFAULT_ENV, ISOLATIONS, Spec
from ringfence.spec.rules import WORK_DIRECTORY, File, FileIn, Limits, Mount, Network

__all__ = [
    "DEFAULT_ENV",
    "ISOLATIONS",
    "WORK_DIRECTORY",
    "File",
    "FileIn",
    "Limits",
    "Mount",
    "Network",
    "Spec",
]
