"""Files of the host that a command line names."""

from __future__ import annotations

import os
import stat

from ringfence.spec import File

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.cli._options import Options

__all__ = ["read_file"]


def read_file(options: Options, option: str, path: str) -> File:
    """A file with its mode. Raises the command's own error, which names the option."""
    try:
        with open(path, "rb") as file:
            return File(file.read(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o777)
    except OSError as error:
        raise options.error(f"{option}: {path}: {error.strerror}") from None
