"""What is made once from other things, and kept in the cache folder by what it was made of.

An entry is a folder `<cache>/<kind>/<key>`. It is filled in a scratch folder beside it and then renamed,
under a lock, so that nobody sees half of one and two processes don't make the same one at once. A file `seal`
in it holds the SHA-256 of each of its files together with their stat(2) data: an entry whose stat data still
agree is taken as it is, any other is read and compared, and one that was damaged is made anew.
"""

from __future__ import annotations

import fcntl
import os
import stat

from ringfence._cache_folder import root

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Progress = Callable[[str], None]

__all__ = [
    "entries",
    "find",
    "forget_old",
    "intact",
    "kinds",
    "limit",
    "obtain",
    "path_of",
    "remove",
    "root",
    "sha256_of",
    "sweep",
    "write",
]

_SEAL = "seal"
_LOCK = ".lock"
_SCRATCH = ".new-"


def find(kind: str, key: str, cache_dir: str | None = None) -> str | None:
    """The entry's folder, or None where it is missing or damaged."""
    path = os.path.join(root(cache_dir), kind, key)
    return path if intact(path) else None


def obtain(
    kind: str,
    key: str,
    fill: Callable[[str], None],
    *,
    cache_dir: str | None = None,
    progress: Progress | None = None,
) -> str:
    """The entry's folder; where it is missing or damaged, `fill(scratch folder)` makes its files first.

    Raises what `fill` raises, and then leaves nothing behind.
    """
    if found := find(kind, key, cache_dir):
        return found
    parent = _kind_folder(kind, cache_dir)
    path = os.path.join(parent, key)
    lock = _lock(parent, progress)
    try:
        if not intact(path):
            _sweep(parent)
            _replace(path, fill)
    finally:
        os.close(lock)
    return path


# What is of no concern to other accounts, should the cache folder be open to them: copies of images, guests'
# memory, what the caller sees of this host.
# A VMM under another uid is shown single files by their descriptors, whatever is above them.
_PRIVATE = frozenset(("erofs", "templates", "choices"))


def _kind_folder(kind: str, cache_dir: str | None) -> str:
    """The folder of a kind's entries, made where it is missing, whatever the umask is."""
    here = root(cache_dir)
    private = kind.partition("/")[0] in _PRIVATE
    for name in kind.split("/"):
        here = os.path.join(here, name)
        try:
            os.mkdir(here, 0o700 if private else 0o755)
        except FileExistsError:
            about = os.stat(here)
            if private and about.st_uid == os.geteuid() and about.st_mode & 0o077:
                os.chmod(here, 0o700)
    return here


def _replace(path: str, fill: Callable[[str], None]) -> None:
    parent = os.path.dirname(path)
    scratch = os.path.join(parent, f"{_SCRATCH}{os.getpid()}-{os.urandom(4).hex()}")
    os.mkdir(scratch, 0o755)
    try:
        fill(scratch)
        _seal(scratch)
        if os.path.lexists(path):
            # Out of the way, by a name that the next sweep removes should we be killed here.
            os.rename(path, f"{scratch}-damaged")
        os.rename(scratch, path)
    finally:
        _sweep(parent)


def path_of(kind: str, key: str, cache_dir: str | None = None) -> str:
    """Where an entry is, or would be."""
    return os.path.join(root(cache_dir), kind, key)


def kinds(cache_dir: str | None = None) -> list[str]:
    """The kinds of which there are entries; one of a folder's own is "erofs/0123"."""
    top = root(cache_dir)
    return [
        os.path.relpath(here, top)
        for here, folders in _folders(top)
        if here != top and any(not name.startswith(".") and _is_entry(here, name) for name in folders)
    ]


def _folders(top: str) -> Iterator[tuple[str, list[str]]]:
    """The cache's folders from the top on, each with the names of those in it. An entry's own hold no entries."""
    for here, folders, _ in os.walk(top):
        yield here, list(folders)
        folders[:] = sorted(name for name in folders if not name.startswith(".") and not _is_entry(here, name))


def _is_entry(folder: str, name: str) -> bool:
    return os.path.exists(os.path.join(folder, name, _SEAL))


def intact(folder: str, *, thorough: bool = False) -> bool:
    """True where the entry's files are the ones that were sealed, and nobody else could have changed them.

    thorough: all of them are read.
    """
    # An entry may be a name for another one of its kind.
    parent, folder = os.path.realpath(os.path.dirname(folder)), os.path.realpath(folder)
    seal = os.path.join(folder, _SEAL)
    try:
        if os.path.dirname(folder) != parent or not _is_ours(parent, stat.S_ISDIR):
            return False
        if not _is_ours(folder, stat.S_ISDIR) or not _is_ours(seal, stat.S_ISREG):
            return False
        with open(seal, encoding="utf-8") as file:
            sealed = [line.split(" ", 2) for line in file.read().splitlines()]
        if not sealed or any(len(one) != 3 for one in sealed):
            return False
        for _, _, name in sealed:
            *folders, _ = parts = name.split("/")
            below = ["/".join(folders[: count + 1]) for count in range(len(folders))]
            if ".." in parts or not all(_is_ours(os.path.join(folder, one), stat.S_ISDIR) for one in below):
                return False
            if not _is_ours(os.path.join(folder, name), stat.S_ISREG):
                return False
        now = [(digest, _fingerprint(os.path.join(folder, name)), name) for digest, _, name in sealed]
        same = all(fingerprint == before for (_, fingerprint, _), (_, before, _) in zip(now, sealed, strict=True))
        if same and not thorough:
            return True
        if any(sha256_of(os.path.join(folder, name)) != digest for digest, _, name in now):
            return False
    except (OSError, UnicodeDecodeError):
        return False
    if same:
        return True
    # The same bytes under new stat data (copied, restored from a backup): seal it again, so that the next
    # look is quick. Not being allowed to is no damage.
    try:
        write(seal, _sealed(now))
    except OSError:
        pass
    return True


def _is_ours(path: str, kind: Callable[[int], bool]) -> bool:
    """Whether it is of that kind, and no symlink to one, and only this user or root can change it."""
    about = os.lstat(path)
    return kind(about.st_mode) and about.st_uid in (0, os.geteuid()) and not about.st_mode & 0o022


def forget_old(kind: str, keep: int, cache_dir: str | None = None) -> None:
    """Remove all but the `keep` newest entries of a kind. Who has a file of one open can go on using it."""
    import shutil

    parent = os.path.join(root(cache_dir), kind)
    lock = _lock(parent, None)
    try:
        found = (entry for entry in os.scandir(parent) if not entry.name.startswith("."))
        entries = sorted((entry.stat(follow_symlinks=False).st_mtime_ns, entry.path) for entry in found)
        for _, path in entries[: max(0, len(entries) - keep)]:
            shutil.rmtree(path, ignore_errors=True)
    finally:
        os.close(lock)
    sweep(cache_dir)


def sweep(cache_dir: str | None = None) -> None:
    """Remove what makers of any kind that were killed have left. What is being made now stays."""
    for here, folders in _folders(root(cache_dir)):
        if any(name.startswith(_SCRATCH) for name in folders):
            try:
                lock = os.open(os.path.join(here, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            except OSError:
                continue
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _sweep(here)
            except BlockingIOError:
                pass  # one that lives
            finally:
                os.close(lock)


def remove(kind: str, key: str, cache_dir: str | None = None) -> None:
    """Remove an entry. Who has a file of it open can go on using it."""
    import shutil

    parent = os.path.join(root(cache_dir), kind)
    if not os.path.isdir(parent):
        return
    lock = _lock(parent, None)
    try:
        path = os.path.join(parent, key)
        gone = os.path.join(parent, f"{_SCRATCH}{os.getpid()}-{os.urandom(4).hex()}")
        os.rename(path, gone)  # at once: nobody shall find half of it
        shutil.rmtree(gone, ignore_errors=True)
    except FileNotFoundError:
        pass
    finally:
        os.close(lock)


def limit(kind: str, most_bytes: int, *, keep: str = "", cache_dir: str | None = None) -> None:
    """Remove the entries that were used longest ago until the others have at most so much. keep: one that stays."""
    found = sorted(((used, size, key) for key, size, used in entries(kind, cache_dir)), reverse=True)
    total = 0
    for _, size, key in found:
        total += size
        if total > most_bytes and key != keep:
            remove(kind, key, cache_dir)
    sweep(cache_dir)


def entries(kind: str, cache_dir: str | None = None) -> list[tuple[str, int, int]]:
    """(key, bytes on disk, when it was last made or used in ns since 1970) of every entry of a kind."""
    parent = os.path.join(root(cache_dir), kind)
    found = []
    try:
        listed = [
            one for one in os.scandir(parent) if not one.name.startswith(".") and one.is_dir(follow_symlinks=False)
        ]
    except FileNotFoundError:
        return []
    for one in listed:
        try:
            size = sum(
                os.lstat(os.path.join(here, name)).st_blocks for here, _, names in os.walk(one.path) for name in names
            )
            found.append((one.name, size * 512, one.stat(follow_symlinks=False).st_mtime_ns))
        except FileNotFoundError:
            continue  # it is being removed
    return found


def sha256_of(path: str) -> str:
    """A file's SHA-256, as 64 hex digits."""
    import hashlib

    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write(path: str, data: bytes) -> None:
    """Write a whole file, through another name: a reader sees the old one or the new one."""
    scratch = f"{path}.{os.getpid()}-{os.urandom(4).hex()}"
    with open(scratch, "xb") as file:
        os.fchmod(file.fileno(), os.fstat(file.fileno()).st_mode & 0o755)  # whatever the umask lets others write to
        file.write(data)
    os.replace(scratch, path)


def _fingerprint(path: str) -> str:
    about = os.lstat(path)
    return f"{about.st_size}:{about.st_mtime_ns}:{about.st_ctime_ns}:{about.st_ino}:{about.st_mode:o}"


def _seal(folder: str) -> None:
    """Write the seal of a folder's files, and let everybody read them, whatever the umask is."""
    sealed = []
    os.chmod(folder, 0o755)
    for here, folders, names in os.walk(folder):
        for name in folders:
            os.chmod(os.path.join(here, name), 0o755)
        for name in sorted(names):
            path = os.path.join(here, name)
            os.chmod(path, 0o644)
            # On the disk before the seal is: after a power cut a sealed file must not be a hole of its size.
            with open(path, "rb") as file:
                os.fsync(file.fileno())
            sealed.append((sha256_of(path), _fingerprint(path), os.path.relpath(path, folder)))
    write(os.path.join(folder, _SEAL), _sealed(sealed))


def _sealed(files: list[tuple[str, str, str]]) -> bytes:
    """The seal's text: digest, fingerprint and name of each file."""
    return "".join(f"{digest} {fingerprint} {name}\n" for digest, fingerprint, name in files).encode()


def _lock(folder: str, progress: Progress | None) -> int:
    """Take the folder's lock: a file descriptor that holds it, until it is closed or this process ends."""
    fd = os.open(os.path.join(folder, _LOCK), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if progress:
            progress(f"waiting for another ringfence that is writing to {folder}")
        fcntl.flock(fd, fcntl.LOCK_EX)
    return fd


def _sweep(parent: str) -> None:
    """Remove every scratch folder: whoever holds the lock knows that no other process is using one."""
    import shutil

    for name in os.listdir(parent):
        if name.startswith(_SCRATCH):
            shutil.rmtree(os.path.join(parent, name), ignore_errors=True)
