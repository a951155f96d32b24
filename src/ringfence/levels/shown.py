"""What of the host, or of an image, is shown in a container: the steps that mount it, with ids as they are inside."""

from __future__ import annotations

import os
import stat

from ringfence.errors import SpecError
from ringfence.images import held, tree
from ringfence.images.kernel_mounts import kernel_mount_of
from ringfence.levels.root import HOST_TEMPLATE, device_steps, directories_above, kernel_places, own_directories
from ringfence.linux.mounts import clone_tree, set_idmap
from ringfence.spec.rules import Tmpfs
from ringfence.wire import messages
from ringfence.wire.messages import NODEV, NOEXEC, NOFOLLOW, NOSUID, RDONLY, RECURSIVE, MountStep

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.levels.container import ContainerSandbox
    from ringfence.spec import Mount, Spec

__all__ = [
    "as_it_is",
    "device",
    "hold_image",
    "host_mount",
    "lower",
    "masks",
    "mounts",
    "outside_gid",
    "roots_own",
    "skeleton",
    "standard_device",
    "userland",
]


def skeleton(sandbox: ContainerSandbox) -> list[MountStep]:
    """A root built step by step, of the image's top-level entries."""
    spec = sandbox.spec
    own = sandbox.privileged
    # What was a folder a moment ago may be a symlink to anywhere by now.
    flags = RDONLY | NOSUID | NODEV | RECURSIVE | NOFOLLOW
    image = None
    if spec.image == "host":
        entries, folder = tree.host_entries(), b"/t/" + HOST_TEMPLATE if own else b""
    else:
        image = hold_image(sandbox)
        entries, folder = tree.entries(spec.image, image), os.fsencode(spec.image)
    steps = own_directories()
    for entry in entries:
        at = b"/" + entry.name
        if entry.kind == "symlink":
            steps.append(messages.symlink(at, entry.target))
            continue
        steps.append(messages.directory(at) if entry.kind == "directory" else messages.file(at))
        source: bytes | int = folder + at
        if own and image is not None:
            one = held.entry(image, entry.name, entry.kind)
            try:
                source = _detached(sandbox, folder + at, held=one)
            finally:
                os.close(one)
        steps.append(messages.bind(at, source, flags))
    steps += device_steps(lambda path: standard_device(sandbox, path))
    return steps + (masks(sandbox, image) if image is not None or not own else [])  # the template has its own


def masks(sandbox: ContainerSandbox, image: int | None, at: bytes = b"") -> list[MountStep]:
    """The steps that hide, beneath `at`, what of the host's userland or of an image isn't to be seen: secrets, and what
    is mounted there of the kernel's own. image: a descriptor of its folder, which was taken before.
    """
    link = b"/proc/self/fd/%d" % (image if image is not None else -1)
    folder = os.readlink(link) if image is not None else b""
    if image is not None and (kind := kernel_mount_of(folder)):
        raise SpecError(f"image: {os.fsdecode(folder)} lies in a {os.fsdecode(kind)} of the host's")
    places = kernel_places(folder)
    if image is not None and os.readlink(link) != folder:
        raise held.replaced(folder)  # what is mounted in it is told by its path, wherever it has gone
    if places and not sandbox.privileged:
        # What the caller can't reach its workload can't either, and init couldn't mask it.
        places = [place for place in places if _may_reach(folder + place)]
    secrets = tree.host_secrets() if image is None else []
    return [messages.mask(at + path) for path in (*secrets, *places)]


def _may_reach(path: bytes) -> bool:
    try:
        os.lstat(path)
    except PermissionError:
        return False
    except OSError:
        pass  # it shows when it is masked
    return True


def hold_image(sandbox: ContainerSandbox) -> int:
    """A descriptor of the image's folder, by which all of it is taken."""
    try:
        return sandbox.keep_fd(held.open_real(sandbox.spec.image))
    except OSError as error:
        raise SpecError(f"image: {sandbox.spec.image!r} can't be read ({error.strerror})") from None


def userland(sandbox: ContainerSandbox, at: bytes) -> list[MountStep]:
    """The steps that show the host's userland once more, beneath `at`: what a VMM hands on to its guest."""
    flags = RDONLY | NOSUID | NODEV | NOEXEC | RECURSIVE
    prefix = b"/t/" + HOST_TEMPLATE if sandbox.privileged else b""
    steps = []
    for entry in tree.host_entries():
        if entry.kind == "symlink":
            continue  # the guest makes its own
        below = at + b"/" + entry.name
        steps.append(messages.directory(below) if entry.kind == "directory" else messages.file(below))
        steps.append(messages.bind(below, prefix + b"/" + entry.name, flags))
    return steps + (masks(sandbox, None, at) if not sandbox.privileged else [])


def device(sandbox: ContainerSandbox, path: bytes) -> bytes | int:
    """A device of the host's, as the source of a mount."""
    return sandbox.keep_fd(clone_tree(path)) if sandbox.privileged else path


def outside_gid(sandbox: ContainerSandbox) -> int:
    """The workload's group, as the host numbers it."""
    for line in sandbox.maps[1].splitlines():
        first, outside, count = map(int, line.split())
        if first <= sandbox.user[1] < first + count:
            return outside + sandbox.user[1] - first
    raise AssertionError("the workload's group is in its map")


def lower(
    sandbox: ContainerSandbox, path: bytes, image: int | None = None, entry: tree.Entry | None = None
) -> bytes | int:
    """A lower layer: a mount on which the ids on disk are the same ids inside, so that a copy has an owner. image,
    entry: a descriptor of the image's folder, and what of it is meant.
    """
    if not sandbox.privileged:
        return path
    if image is not None and entry is not None:
        one = held.entry(image, entry.name, entry.kind)
        try:
            fd = sandbox.keep_fd(clone_tree(b"", recursive=False, at=one))
        finally:
            os.close(one)
    else:
        fd = sandbox.keep_fd(clone_tree(path, recursive=False, follow=False))
    if not set_idmap(fd, _user_namespace(sandbox, None)):
        raise SpecError(f"overlay: the file system of {os.fsdecode(path)} can't map ids")
    return fd


def roots_own(sandbox: ContainerSandbox, path: bytes) -> int:
    """A file system without what is mounted below it, on which what is the host's root's is root's inside, and all
    else nobody's.
    """
    root = b"0 %d 1" % sandbox.base
    fd = sandbox.keep_fd(clone_tree(path, recursive=False, follow=False))
    if not set_idmap(fd, sandbox.keep_fd(sandbox.state.launcher.user_namespace(root, root))):
        raise SpecError(f"overlay: the file system of {os.fsdecode(path)} can't map ids")
    return fd


def as_it_is(sandbox: ContainerSandbox, path: bytes, image: int | None = None) -> bytes | int:
    """A file system with all that is mounted below it, where ids on disk are nobody's inside: what only its owner
    may read stays so, to root inside too. image: a descriptor of the image's folder, which the path is in.
    """
    if not sandbox.privileged:
        return path
    if image is None:
        return sandbox.keep_fd(clone_tree(path, follow=False))
    try:
        point = held.beneath(image, path[len(os.fsencode(sandbox.spec.image)) :])
    except OSError:
        raise held.replaced(path) from None
    try:
        return sandbox.keep_fd(clone_tree(b"", at=point))
    finally:
        os.close(point)


def standard_device(sandbox: ContainerSandbox, path: bytes) -> bytes | int:
    """A standard node: the template's, where there is one."""
    if sandbox.privileged and sandbox.spec.image == "host":
        return b"/t/" + HOST_TEMPLATE + path
    return device(sandbox, path)


def _detached(
    sandbox: ContainerSandbox,
    path: bytes,
    owner: tuple[int, int] | None = None,
    *,
    must: bool = False,
    held: int | None = None,
) -> int:
    """A detached mount of a host path. owner: (uid, gid) on disk that the workload is to be; else ids on disk are
    the same ids inside. Where the file system can't map ids they are nobody's, which does for what all may read.
    held: a descriptor of what the path was found to be.
    """
    tree = clone_tree(path) if held is None else clone_tree(b"", at=held)
    fd = sandbox.keep_fd(tree)
    if not set_idmap(fd, _user_namespace(sandbox, owner)):
        if must:
            raise SpecError(
                f"mounts: the file system of {os.fsdecode(path)} can't map ids, so nothing could be written there"
            )
        sandbox.unmapped.add(path)
    return fd


def _user_namespace(sandbox: ContainerSandbox, owner: tuple[int, int] | None) -> int:
    """A user namespace to map the ids of a mount by; made once for each owner."""
    if owner not in sandbox.user_namespaces:
        if owner is None:
            maps = sandbox.maps
        else:
            maps = (
                b"%d %d 1" % (owner[0], sandbox.outside[0]),
                b"%d %d 1" % (owner[1], sandbox.outside[1]),
            )
        sandbox.user_namespaces[owner] = sandbox.keep_fd(sandbox.state.launcher.user_namespace(*maps))
    return sandbox.user_namespaces[owner]


def host_mount(
    sandbox: ContainerSandbox,
    source: bytes,
    target: bytes,
    flags: int,
    *,
    must: bool = False,
    secret: bool = True,
    expected: tuple[int, int] | None = None,
) -> list[MountStep]:
    """The steps that show a host path at `target`: what its owner owns outside, the workload owns inside.

    secret: whether it may be one. expected: (st_dev, st_ino) of the regular file that it was, by a real path; None:
    whatever the path leads to. Raises SpecError.
    """
    # Opened once: whoever may write to a folder on the way could swap it between a look and another.
    if expected is None:
        found = os.open(source, os.O_PATH | os.O_CLOEXEC)
    else:
        found = held.regular(source, expected)
        flags |= NOFOLLOW  # an unprivileged caller's init opens it once more
    try:
        about = os.fstat(found)
        if not secret and (reason := _why_secret(found)):
            raise SpecError(f"mounts: {os.fsdecode(source)} has become what would show a secret: {reason}")
        if not sandbox.privileged and not flags & RDONLY and _lifts_limits(sandbox.spec, found):
            raise SpecError(f"mounts: {os.fsdecode(source)} shows cgroups, and the workload's user owns its own")
        what: bytes | int = source
        if sandbox.privileged:
            what = _detached(sandbox, source, (about.st_uid, about.st_gid), must=must, held=found)
    finally:
        os.close(found)
    steps = directories_above(target)
    steps.append(messages.directory(target) if stat.S_ISDIR(about.st_mode) else messages.file(target))
    return [*steps, messages.bind(target, what, flags | RECURSIVE)]


def mounts(sandbox: ContainerSandbox) -> list[MountStep]:
    """The spec's own mounts, parents first."""
    steps: list[MountStep] = []
    both: list[Mount | Tmpfs] = [*sandbox.spec.mounts, *sandbox.spec.tmpfs]
    for one in sorted(both, key=lambda one: one.target):
        if isinstance(one, Tmpfs):
            from ringfence.wire import layers

            steps += [*directories_above(one.target), messages.directory(one.target)]
            steps.append(layers.tmpfs(one.target, one.size_bytes, one.mode, sandbox.user))
        else:
            flags = NOSUID | NODEV | (0 if one.writable else RDONLY)
            steps += host_mount(sandbox, one.source, one.target, flags, must=one.writable, secret=one.secret)
    return steps


def _lifts_limits(spec: Spec, held: int) -> bool:
    """Whether what a writable mount shows is where the limits of the sandbox could be changed."""
    from ringfence.levels import owned

    return not spec.asked.isdisjoint(owned.CGROUP_LIMITS) and owned.shows_cgroups(held)


def _why_secret(held: int) -> str:
    from ringfence.images.secrets import why_secret

    return why_secret(os.fsencode(os.readlink(f"/proc/self/fd/{held}")))
