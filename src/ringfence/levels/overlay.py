"""The root of a container that can be written to: one overlay for the sandbox's own skeleton, and one for each folder
at the top of the image.

Not one over the whole image: so the names that are ringfence's own stay so whatever the image has in their place, and
so the host's userland has an overlay without the host's other folders.
"""

from __future__ import annotations

import os

from ringfence.images import tree
from ringfence.levels import shown
from ringfence.levels.layer import DEFAULT_LAYER_BYTES, mounts_below
from ringfence.levels.root import device_steps, own_directories
from ringfence.wire import layers, messages
from ringfence.wire.messages import BIND, NODEV, NOFOLLOW, NOSUID, RDONLY, RECURSIVE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ringfence.levels.container import ContainerSandbox
    from ringfence.wire.messages import MountStep

__all__ = ["root_steps"]

# Where the host may keep what only some may read: the overlay, and the folder below it. All else that is shown of the
# host comes out of packages.
_PRIVATE_PLACES = {b"/etc": b"/", b"/opt": b"/", b"/usr": b"/local"}


def root_steps(sandbox: ContainerSandbox) -> list[MountStep]:
    """A root of overlays, up to where what is every sandbox's own is mounted into it."""
    spec = sandbox.spec
    host = spec.image == "host"
    image = None if host else shown.hold_image(sandbox)
    entries = tree.host_entries() if host else tree.entries(spec.image, image)
    folder = b"" if host else os.fsencode(spec.image)
    steps = [_layer(sandbox), *own_directories()]
    below: list[MountStep] = []
    for entry in entries:
        at = b"/" + entry.name
        if entry.kind == "symlink":
            steps.append(messages.symlink(at, entry.target))
        elif entry.kind == "directory":
            steps.append(messages.directory(at))
            hide = _PRIVATE_PLACES.get(at, b"") if host else b""
            below.append(layers.overlay(at, shown.lower(sandbox, folder + at, image, entry), hide=hide))
        else:
            # overlayfs is for directories. A file at the top of an image stays as it is.
            steps.append(messages.file(at))
            source = shown.lower(sandbox, folder + at, image, entry)
            below.append(messages.bind(at, source, RDONLY | NOSUID | NODEV | NOFOLLOW))
    devices = device_steps(lambda path: shown.standard_device(sandbox, path))
    steps += [step for step in devices if step.kind != BIND]
    # The devices first, as /dev/null is what masks a file.
    steps += [layers.overlay(b"/", None), *(step for step in devices if step.kind == BIND), *below]
    folders = [b"/" + entry.name for entry in entries if entry.kind == "directory"]
    hidden = shown.masks(sandbox, image)
    masked = {step.target for step in hidden}
    for point in mounts_below(folder + one for one in folders):
        if point[len(folder) :] in masked:
            continue
        source = shown.as_it_is(sandbox, point, image)
        steps.append(messages.bind(point[len(folder) :], source, RDONLY | NOSUID | NODEV | RECURSIVE | NOFOLLOW))
    return steps + hidden


def _layer(sandbox: ContainerSandbox) -> MountStep:
    size = sandbox.spec.limits.disk_bytes
    if size is None and sandbox.privileged:
        return layers.directory_layer(sandbox.layer_folder())
    return layers.memory_layer(size if size is not None else DEFAULT_LAYER_BYTES)
