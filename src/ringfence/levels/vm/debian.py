"""Debian and Ubuntu kernel packages: which one is current, fetching it, reading it. Nothing is installed.

`apt-get download` needs no privilege and checks the package against the signed package lists, as an
installation would; only `apt-get update`, which fetches these lists, is root's.
"""

from __future__ import annotations

import os

from ringfence._value import Value
from ringfence.errors import Unavailable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import IO

# The generic kernels: Debian's, Ubuntu's. Debian's cloud kernel lacks 9p.
METAPACKAGES = ("linux-image-amd64", "linux-image-generic")

# Stalled mirrors end here; apt itself gives up on a silent connection after 30 seconds.
_DOWNLOAD_SECONDS = 1800

REFRESH = "as root run 'apt-get update', then 'ringfence setup' again"


class Package(Value):
    """One version of a package. size_bytes: of the .deb, or None where the list doesn't say."""

    __slots__ = ("name", "size_bytes", "version")

    name: str
    version: str
    size_bytes: int | None

    def __init__(self, *, name: str, version: str, size_bytes: int | None) -> None:
        self._set(name=name, version=version, size_bytes=size_bytes)


def kernel_packages() -> tuple[Package, ...]:
    """The packages of the newest generic kernel that apt knows: Debian has all in one, Ubuntu the modules
    apart.

    Raises Unavailable where there is no apt, or where its lists know no kernel.
    """
    for meta in METAPACKAGES:
        for image in _dependencies(_show(meta)):
            if not image.startswith("linux-image-"):
                continue
            release = image.removeprefix("linux-image-").removeprefix("unsigned-")
            names = (image, f"linux-modules-{release}", f"linux-modules-extra-{release}")
            found = tuple(package for name in names if (package := _package(name)))
            if found and found[0].name == image:
                return found
    raise Unavailable("vm", f"apt's package lists know no {' or '.join(METAPACKAGES)}", REFRESH)


def download(package: Package, folder: str) -> str:
    """Fetch the package's .deb into the folder (which is to be empty) and give its path."""
    import subprocess

    command = ["apt-get", "-q", "-o", "Acquire::Retries=2"]
    if os.geteuid() == 0:
        # Otherwise apt complains that its own user can't write to our cache, and downloads as root all the
        # same.
        command += ["-o", "APT::Sandbox::User=root"]
    command += ["download", f"{package.name}={package.version}"]
    try:
        run = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            stdin=subprocess.DEVNULL,
            timeout=_DOWNLOAD_SECONDS,
            check=False,
        )
    except FileNotFoundError:
        raise Unavailable("vm", "there is no apt-get here", _BY_HAND) from None
    except subprocess.TimeoutExpired:
        raise Unavailable("vm", f"apt-get download {package.name} took over {_DOWNLOAD_SECONDS} s") from None
    files = [name for name in os.listdir(folder) if name.endswith(".deb")]
    if run.returncode or len(files) != 1:
        said = run.stderr.decode(errors="replace").strip().splitlines()
        raise Unavailable("vm", f"apt-get download {package.name} failed: {' '.join(said[-2:])}", REFRESH)
    return os.path.join(folder, files[0])


def members(deb: str, fds: tuple[int, ...] = ()) -> Iterator[tuple[str, IO[bytes]]]:
    """(path without a leading "./", its content) of each regular file of a .deb, in the archive's order.

    A content can be read only until the next one is asked for. fds: descriptors that the path is of, if any.
    Raises Unavailable where it can't be read.
    """
    import subprocess
    import tarfile

    try:
        # dpkg-deb knows every compression that Debian and Ubuntu have used, and tarfile does not.
        unpack = subprocess.Popen(
            ["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=fds
        )
    except FileNotFoundError:
        raise Unavailable("vm", "there is no dpkg-deb here", _BY_HAND) from None
    with unpack:
        assert unpack.stdout is not None
        assert unpack.stderr is not None
        try:
            with tarfile.open(fileobj=unpack.stdout, mode="r|", bufsize=1 << 20) as archive:
                for member in archive:
                    if member.isreg() and (content := archive.extractfile(member)):
                        yield member.name.removeprefix("./"), content
        except tarfile.TarError as error:
            said = unpack.stderr.read().decode(errors="replace").strip()
            raise Unavailable("vm", f"{deb} can't be read: {said or error}") from error
        finally:
            # A reader that has found all it wants stops early; dpkg-deb then ends by SIGPIPE.
            unpack.stdout.close()


_BY_HAND = "set RINGFENCE_KERNEL to a kernel image; its modules are looked for in /lib/modules/<release>"


def _package(name: str) -> Package | None:
    about = _show(name)
    if "Version" not in about:
        return None
    size = about.get("Size", "")
    return Package(name=name, version=about["Version"], size_bytes=int(size) if size.isdigit() else None)


def _dependencies(about: dict[str, str]) -> list[str]:
    """The names in a package's Depends, without versions and alternatives."""
    entries = about.get("Depends", "").split(",")
    return [words[0] for entry in entries if (words := entry.split("|")[0].split())]


def _show(name: str) -> dict[str, str]:
    """The fields of the version of a package that apt would install; {} where it knows none."""
    import subprocess

    try:
        run = subprocess.run(
            ["apt-cache", "show", "--no-all-versions", name],
            capture_output=True,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "LC_ALL": "C"},
            timeout=60,
            check=False,
        )
    except FileNotFoundError:
        raise Unavailable("vm", "there is no apt here to fetch a kernel with", _BY_HAND) from None
    except subprocess.TimeoutExpired:
        raise Unavailable("vm", "apt-cache took over 60 s") from None
    fields = (line.partition(": ") for line in run.stdout.decode(errors="replace").split("\n\n")[0].splitlines())
    return {name: value for name, colon, value in fields if colon and not name.startswith(" ")}
