"""Where a sandbox's files come from: the host's own userland, or a rootfs folder, as a list of top-level entries."""
