"""What `ringfence setup` does: get what each level needs, once. A second run finds all of it and takes no
time.

Packages come from the system's package manager, which ringfence itself runs only as root on Debian and
Ubuntu; elsewhere the step says the exact command. The guest's kernel package is downloaded and unpacked into
the cache, and never installed on the host.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess

from ringfence import _cache
from ringfence._value import Value
from ringfence.errors import RingfenceError, Unavailable
from ringfence.linux import kvm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Literal

    Progress = Callable[[str], None]
    State = Literal["present", "done", "needs", "failed"]

LEVELS = ("process", "container", "vm")

_INSTALL_SECONDS = 1800


class Step(Value):
    """One thing that a level needs.

    state: "present" (nothing was to be done), "done" (just now), "needs" (somebody else has to run
    `command`), or "failed". detail: which one it is, or why not. command: what would help, as a line for a
    shell, or None.
    """

    __slots__ = ("command", "detail", "name", "state")

    name: str
    state: State
    detail: str
    command: str | None

    def __init__(self, *, name: str, state: State, detail: str, command: str | None = None) -> None:
        self._set(name=name, state=state, detail=detail, command=command)

    @property
    def ok(self) -> bool:
        """Whether what it is about is there now."""
        return self.state in ("present", "done")


class Need(Value):
    """What a package provides. found(): where that is, or None. packages: manager -> the package's name."""

    __slots__ = ("found", "levels", "name", "packages")

    name: str
    found: Callable[[], str | None]
    packages: dict[str, str]
    levels: tuple[str, ...]

    def __init__(
        self, *, name: str, found: Callable[[], str | None], packages: dict[str, str], levels: tuple[str, ...]
    ) -> None:
        self._set(name=name, found=found, packages=packages, levels=levels)


def _libseccomp() -> str | None:
    try:
        ctypes.CDLL("libseccomp.so.2")
    except OSError:
        return None
    return "libseccomp.so.2"


NEEDS = (
    Need(
        name="libseccomp",
        found=_libseccomp,
        packages={"apt-get": "libseccomp2", "dnf": "libseccomp", "pacman": "libseccomp", "apk": "libseccomp"},
        levels=LEVELS,
    ),
    Need(
        name="qemu",
        found=lambda: shutil.which("qemu-system-x86_64"),
        packages={
            "apt-get": "qemu-system-x86",
            "dnf": "qemu-system-x86-core",
            "pacman": "qemu-system-x86",
            "apk": "qemu-system-x86_64",
        },
        levels=("vm",),
    ),
    Need(
        name="erofs-utils",
        found=lambda: shutil.which("mkfs.erofs"),
        packages={
            "apt-get": "erofs-utils",
            "dnf": "erofs-utils",
            "pacman": "erofs-utils",
            "apk": "erofs-utils",
        },
        levels=("vm",),
    ),
)

# manager -> the command that installs packages, without asking.
_INSTALL = {
    "apt-get": ("apt-get", "install", "-y", "--no-install-recommends"),
    "dnf": ("dnf", "install", "-y", "--setopt=install_weak_deps=False"),
    "pacman": ("pacman", "-S", "--needed", "--noconfirm"),
    "apk": ("apk", "add"),
}


def steps(
    levels: Sequence[str] = LEVELS,
    *,
    cache_dir: str | None = None,
    progress: Progress | None = None,
    core: str | None = None,
) -> list[Step]:
    """Do what is missing for these levels, and say of each thing how it stands. progress: called before long
    work.

    core: path of ringfence-core; by default the one in this package. Nothing raises: a step that goes wrong
    is "failed", and the ones that don't depend on it are still done.
    """
    needs = [need for need in NEEDS if set(need.levels) & set(levels)]
    missing = [need for need in needs if need.found() is None]
    install = _Install(progress)
    error = install.packages([need.packages for need in missing]) if missing else ""
    results = [_package_step(need, need in missing, install, error) for need in needs]
    results.append(_attempt("seccomp filters", _seccomp))
    if "vm" in levels:
        results.append(_attempt("guest kernel", lambda: _kernel(cache_dir, progress, install)))
        results.append(_attempt("guest initramfs", lambda: _initramfs(cache_dir, progress, core)))
        results.append(_attempt("kvm", lambda: _kvm(cache_dir)))
        if cache_dir is None and all(one.ok for one in results):
            results.append(_attempt("guest template", lambda: _template(progress)))
    return results


def _package_step(need: Need, was_missing: bool, install: _Install, error: str) -> Step:
    found = need.found()
    if found:
        return Step(name=need.name, state="done" if was_missing else "present", detail=found)
    command = install.command([need.packages])
    if install.allowed:
        return Step(name=need.name, state="failed", detail=error or "still missing", command=command)
    return Step(name=need.name, state="needs", detail="not installed", command=command)


def _kernel(cache_dir: str | None, progress: Progress | None, install: _Install) -> Step:
    from ringfence.levels.vm import kernel

    name = "guest kernel"
    if found := kernel.find(cache_dir):
        return Step(name=name, state="present", detail=f"{found.release} ({found.source})")
    try:
        made = kernel.prepare(cache_dir, progress=progress)
    except Unavailable as failure:
        # Old package lists name a kernel that the mirror has dropped, or none.
        if install.manager != "apt-get":
            return Step(name=name, state="failed", detail=failure.reason, command=failure.help or None)
        if not install.allowed:
            return Step(name=name, state="needs", detail=failure.reason, command=install.refresh_command())
        if error := install.refresh():
            detail = f"{failure.reason}; {error}"
            return Step(name=name, state="failed", detail=detail, command=failure.help or None)
        made = kernel.prepare(cache_dir, progress=progress)
    return Step(name=name, state="done", detail=f"{made.release} ({made.source})")


def _initramfs(cache_dir: str | None, progress: Progress | None, core: str | None) -> Step:
    from ringfence.levels.vm import initramfs, kernel

    name = "guest initramfs"
    found = kernel.find(cache_dir)
    if found is None:
        return Step(name=name, state="failed", detail="there is no kernel for guests yet")
    core = core or os.path.join(os.path.dirname(__file__), "_core", "ringfence-core")
    if not os.path.exists(core):
        return Step(name=name, state="failed", detail=f"{core} is missing", command="pip install .")
    before = _names(os.path.join(_cache.root(cache_dir), "initramfs"))
    path = initramfs.build(found, core, cache_dir=cache_dir, progress=progress)
    state: State = "present" if os.path.basename(os.path.dirname(path)) in before else "done"
    return Step(name=name, state=state, detail=path)


def _seccomp() -> Step:
    from ringfence.linux import seccomp

    name = "seccomp filters"
    folder = os.path.join(_cache.root(), "seccomp")
    before = _names(folder)
    usable, reason = seccomp.available()
    if not usable:
        return Step(name=name, state="failed", detail=reason)
    sizes = [len(seccomp.cached(seccomp.policy(namespaces=own))) // 8 for own in (True, False)]
    state: State = "present" if _names(folder) == before else "done"
    return Step(name=name, state=state, detail=f"{len(sizes)} filters of {sizes[0]} and {sizes[1]} instructions")


def _kvm(cache_dir: str | None) -> Step:
    state = kvm.probe(cache_dir)
    # No KVM is no failure: guests then run by emulation, only slower.
    how = "guests run on KVM" if state.usable else "guests run by software emulation (TCG)"
    return Step(name="kvm", state="present", detail=f"{how}: {state.reason}")


def _template(progress: Progress | None) -> Step:
    """The one that a run without limits is restored from. Others are made when they are first needed."""
    from ringfence.levels.host import host
    from ringfence.levels.vm import VmLevel
    from ringfence.levels.vm.start import prepare

    name = "guest template"
    machine = host()
    if missing := VmLevel().unavailable(machine):
        return Step(name=name, state="present", detail=f"none is made: {missing[0]}")
    there, template = prepare(machine, progress)
    detail = f"{template.size_bytes >> 20} MB in {template.folder}; a guest is restored from it"
    return Step(name=name, state="present" if there else "done", detail=detail)


def _attempt(name: str, work: Callable[[], Step]) -> Step:
    try:
        return work()
    except RingfenceError as error:
        detail, help = getattr(error, "reason", str(error)), getattr(error, "help", None)
        return Step(name=name, state="failed", detail=detail, command=help or None)
    except OSError as error:
        return Step(name=name, state="failed", detail=str(error))


class _Install:
    """The system's package manager."""

    def __init__(self, progress: Progress | None) -> None:
        self._progress = progress
        self.manager = next((manager for manager in _INSTALL if shutil.which(manager)), None)
        # Only here has it been tried; elsewhere the administrator runs it.
        self.allowed = os.geteuid() == 0 and self.manager == "apt-get"

    def command(self, wanted: Sequence[dict[str, str]]) -> str:
        """The line that installs these packages."""
        if self.manager is None:
            return "install " + " ".join(packages["apt-get"] for packages in wanted) + " (names as in Debian)"
        words = [*_INSTALL[self.manager], *(packages[self.manager] for packages in wanted)]
        return " ".join([*self._sudo(), *words])

    def refresh_command(self) -> str:
        """The line that fetches new package lists, for apt."""
        return " ".join([*self._sudo(), "apt-get", "update"])

    def packages(self, wanted: Sequence[dict[str, str]]) -> str:
        """Install packages where that is allowed. Gives what went wrong, or ""."""
        if not self.allowed:
            return ""
        assert self.manager is not None
        names = [packages[self.manager] for packages in wanted]
        if not all(self._known(name) for name in names) and (error := self.refresh()):
            return error
        self._tell(f"installing {' '.join(names)}")
        error = self._run([*_INSTALL[self.manager], *names])
        # A mirror drops old versions: with fresh lists it works, or never will.
        if error and not self.refresh():
            error = self._run([*_INSTALL[self.manager], *names])
        return error

    def refresh(self) -> str:
        """Fetch new package lists. Gives what went wrong, or ""."""
        self._tell("fetching package lists (apt-get update)")
        return self._run(["apt-get", "update"])

    def _known(self, package: str) -> bool:
        run = subprocess.run(
            ["apt-cache", "show", "--no-all-versions", package],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=False,
        )
        return run.returncode == 0 and bool(run.stdout)

    def _run(self, command: list[str]) -> str:
        if command[0] == "apt-get":
            # Another apt may be at work on a fresh machine: wait for it.
            command = [command[0], "-q", "-o", "DPkg::Lock::Timeout=120", *command[1:]]
        env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C"}
        try:
            run = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                env=env,
                timeout=_INSTALL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return f"{' '.join(command)} took over {_INSTALL_SECONDS} s"
        except OSError as error:
            return f"{command[0]}: {error.strerror}"
        if run.returncode == 0:
            return ""
        said = [line for line in run.stderr.decode(errors="replace").splitlines() if line.strip()]
        return f"{' '.join(command)} failed with {run.returncode}: {' '.join(said[-2:])}"

    def _sudo(self) -> list[str]:
        return [] if os.geteuid() == 0 else ["sudo"]

    def _tell(self, text: str) -> None:
        if self._progress:
            self._progress(text)


def _names(folder: str) -> set[str]:
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()
