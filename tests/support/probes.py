"""What each probe of the catalogue is expected to find, for the tests and for docs/design/probes.md."""

from __future__ import annotations

# The verdicts at the levels process, container and vm, of a caller that is root.
EXPECTED = {
    "shared shared own": """
        kernel-identity kernel-release kernel-command-line memory-size-in-sight counters-of-interrupts counters-of-disks
        attack-descriptors channel-file-lock channel-file-events
    """,
    "shared shared shared": "channel-cache-timing",
    "restricted restricted own": """
        module-load module-load-file module-remove kernel-replace reboot memory-physical memory-kernel-core
        kernel-addresses swap-off files-by-handle files-mount files-new-mount-calls files-clone-mount files-chroot-walk
        files-pivot-root user-become-root user-groups user-new-namespace user-new-namespace-clone3 network-crypto-socket
        network-vsock-socket cgroup-membership cgroup-leave limit-raise limit-real-time limit-nice limit-disk-priority
        limit-out-of-memory-order capability-gain capability-replace-executable call-bpf call-bpf-program call-perf
        call-io-uring call-userfaultfd call-personality call-32-bit call-x32 devices-disk devices-make-node
        devices-virtual-machines devices-fuse devices-loop devices-ports devices-port-level devices-terminal-input
        clock-set clock-set-zone clock-adjust keys-of-the-user keys-add keys-request keys-session log-read log-device
        tunable-core-pattern tunable-magic-keys tunable-caches tunable-hotplug accounting quota attack-fork-bomb
        attack-memory channel-vsock channel-key
    """,
    "restricted own own": """
        memory-of-another memory-read-by-call memory-write-by-call files-read-homes processes-environment
        processes-descriptors processes-take-descriptor processes-root-of-another processes-schedule processes-limits
        signal-kill signal-queue signal-pidfd signal-init ptrace-seize ptrace-attach compare-processes user-outside
        network-host-loopback network-internet-socket network-raw-socket network-packet-socket network-netlink-socket
        ipc-abstract-socket ipc-shared-memory ipc-message-queue ipc-semaphore ipc-posix-queue hostname-set
        hostname-set-domain channel-temporary-file channel-posix-memory channel-abstract-socket channel-loopback
        channel-shared-memory channel-message-queue channel-semaphore channel-posix-queue
    """,
    "shared own own": """
        files-mount-namespace files-temporary processes-pid-namespace processes-in-sight user-namespace
        network-namespace network-interfaces ipc-namespace ipc-posix-memory hostname-namespace hostname-read
        cgroup-namespace clock-namespace channel-process
    """,
    "restricted restricted restricted": """
        files-change-accounts files-change-programs user-set-id-programs capability-sets filter
    """,
    "restricted own restricted": "files-read-secrets",
    "shared restricted own": "devices-in-sight attack-disk",
}
VERDICTS = {name: words.split() for words, names in EXPECTED.items() for name in names.split()}
assert len(VERDICTS) == sum(len(names.split()) for names in EXPECTED.values()), "a probe is told twice"
