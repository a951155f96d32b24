"""A plugin of pytest for the suite inside a guest (support/guest.py): which tests run there, and which can't.

A test is named by the end of its node id, with `*` for anything. The reasons are what a failing skip is told by.
"""

from __future__ import annotations

import os
from collections.abc import Generator
from fnmatch import fnmatchcase

import pytest

import ringfence as rf

NO_VM = "there is no vm level inside a guest"
NO_IDMAP = "a tmpfs maps no ids before Linux 6.3, and the guest has no other file system to write to"
FEW_RIGHTS = "what it looks at is root's"
CALLER = "an unprivileged caller's workload has the caller's own id"
SIGNALS = "before Landlock ABI 6 an unprivileged caller's workload could stop whoever watches the time"

SLOW = "it counts on a machine that isn't emulated"

NO_SET_ID = "newuidmap isn't set-user-ID on what the guest sees of the host's files"

TRUNCATE = "before Landlock ABI 3 a file outside the mounts could be emptied"

# What a refusal says that is right there, and what it is called as a skip.
REFUSED = {"Landlock ABI 6": SIGNALS, "Landlock ABI 2 can't deny truncate(2)": TRUNCATE}

# What the usual run is made of, which is to take some three minutes under emulation: what of the two levels depends on
# the kernel, on cgroups or on rights, each promise once. What else there is runs in `make test-long`.
SOME = tuple(
    f"tests/{name}.py"
    for name in (
        "levels/test_applied",
        "levels/test_arguments",
        "levels/test_cgroup_v2",
        "levels/test_ends",
        "levels/test_files",
        "levels/test_limits",
        "levels/test_system",
        "security/test_denials",
        "security/test_isolation",
        "security/test_killed_caller",
        "security/test_left_on_the_host",
    )
)
# What `make test-long` adds to these. Not among them: what needs a kernel after Linux 6.1 (ids mapped in a tmpfs, an
# unprivileged overlay), and what does something in large numbers, which under emulation takes hours.
MORE = tuple(
    f"tests/{name}.py"
    for name in ("levels/test_filter", "levels/test_namespaces", "levels/test_sandbox", "levels/test_streams")
)
# Left out of the usual run: what tests in large numbers or sizes what another test does in small ones.
LONG = (
    "test_arguments.py::test_no_descriptor_leaks_into_the_workload",
    "test_ends.py::test_wall_time_covers_the_cpu_time_of_a_short_run*",
    "test_files.py::test_awkward_leftovers_are_removed*",
    "test_files.py::test_20_megabytes_out_after_a_failure*",
    "test_files.py::test_files_in*",
    "test_limits.py::test_a_fork_bomb_that_never_stops*",
    "test_limits.py::test_a_sleeper_uses_no_cpu_time*",
    "test_killed_caller.py::test_launchers_may_die_any_number_of_times",
    "test_killed_caller.py::test_sigkill_while_a_filter_waits_for_an_answer*",
    "test_killed_caller.py::test_sigkill_in_the_middle_of_a_run[[]*-a little later]",
    "test_killed_caller.py::test_what_a_caller_and_its_launcher_left_is_removed_by_the_next_one",
    "test_killed_caller.py::test_an_exception_in_the_middle_of_a_run_leaves_nothing",
    "test_killed_caller.py::test_sigkill_at_any_moment_of_many_runs*",
    "test_left_on_the_host.py::test_killers_do_not_reach_each_other",
)

# Who can't run what there, and why.
NOT_HERE = {
    "root": {
        "test_inside_a_vm.py::*": "this is that guest",
        "test_foreign.py::test_podman_without_root": NO_SET_ID,
        "test_applied.py::test_a_guest_tells_its_own_kernel_and_how_its_vmm_is_jailed": NO_VM,
        "test_refusals.py::test_a_guest_cannot_have_the_hosts_network": NO_VM,
        "test_refusals.py::test_a_process_cannot_have_what_only_a_system_of_its_own_has": TRUNCATE,
        "test_system.py::test_user_in_a_guest": NO_VM,
        "test_owned.py::test_without_a_filter_a_guests_jail_holds_no_limit": NO_VM,
        "test_system.py::test_a_user_that_the_image_does_not_have": NO_VM,
        "test_denials.py::test_what_a_sandbox_made_in_its_own_tmp_is_not_the_hosts": NO_VM,
        "test_isolation.py::test_the_vmm_is_jailed": NO_VM,
        "test_system.py::test_a_writable_mount[[]container]": NO_IDMAP,
        "test_system.py::test_a_rootfs_folder_is_read_only_and_no_way_out[[]container]": NO_IDMAP,
        "test_left_on_the_host.py::test_no_set_id_file_is_left_in_a_writable_mount[[]container]": NO_IDMAP,
        "test_denials.py::test_secrets_of_the_host_cannot_be_read*": "the share of the host's files has no secrets",
        "test_company.py::test_a_caller_with_1_gib_resident": "the guest is too small",
        "test_filter.py::test_a_profile_in_a_guest": NO_VM,
        "test_filter.py::test_a_guest_without_execve_starts_nothing": NO_VM,
        "test_filter.py::test_denials_in_a_guest_are_listed_by_its_init*": NO_VM,
        "test_filter.py::test_unconfined[[]process]": "what it tries to write to is on a read-only file system there",
        "test_filter.py::test_a_storm_of_denied_calls_starves_no_clock*": SLOW,
        "test_namespaces.py::test_joining_by_pid_and_by_path": "before Linux 6.3 an unshare leaves itself where it is",
    },
    "user": {
        "test_files.py::test_a_workload_cannot_reach_another_ones_folder[[]process]": CALLER,
        "test_company.py::test_two_at_once_have_different_ids": CALLER,
        "test_isolation.py::test_privileges[[]process]": "its bounding set stays full",
        "test_ready.py::*[[]process*]": f"no process sandbox waits: {SIGNALS}",
        "test_ready.py::test_its_command_is_restricted_before_it_is_known*": FEW_RIGHTS,
        "test_refusals.py::test_every_unmet_rule_is_told_at_once[[]process]": SIGNALS,
        "test_filter.py::test_a_profile_that_lets_nothing_be_read_back[[]process]": "its bounding set stays full",
        "test_namespaces.py::test_what_is_no_namespace": FEW_RIGHTS,
        "test_sandbox.py::test_a_pool_whose_caller_exits_without_closing_it": SLOW,
        "test_sandbox.py::test_memory_is_counted_for_each_command[[]container]": SLOW,
        "test_streams.py::test_a_gigabyte_of_output_is_stopped_at_the_limit[[]process]": SIGNALS,
        "test_system.py::test_a_user_by_the_name_that_the_image_gives*": "an unprivileged caller maps a single id",
    },
}
NOT_HERE["user"] |= NOT_HERE["root"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    everything = os.environ["RINGFENCE_TEST_IN_A_GUEST"] == "everything"
    here = NOT_HERE["root" if os.geteuid() == 0 else "user"]
    kept, left_out = [], []
    for item in items:
        if not everything and _among(item, LONG):
            left_out.append(item)
            continue
        for pattern, reason in here.items():
            if _among(item, (pattern,)):
                item.add_marker(pytest.mark.skip(reason=reason))
        kept.append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """What that kernel can't enforce, and is refused for that, is a skip by its name, whoever asks for it."""
    try:
        yield
    except rf.CannotEnforce as error:
        for said, reason in REFUSED.items():
            if all(said in one.reason for one in error.unmet):
                pytest.skip(reason)
        raise


def _among(item: pytest.Item, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(item.nodeid, f"*/{pattern}") for pattern in patterns)


# Why else a test is skipped there: by the tests themselves.
SKIPS = (
    "this machine lacks: vm level",
    "this machine lacks: cgroup v1",
    "it fails unconfined too, by this machine's own kernel or rights: *",
)
OF_THE_USER = ("this machine lacks: root", "needs root: *")


def is_known(who: str, reason: str) -> bool:
    """Whether that is a reason of these tables."""
    patterns = (*NOT_HERE[who].values(), *REFUSED.values(), *SKIPS, *(OF_THE_USER if who == "user" else ()))
    return any(fnmatchcase(reason.removeprefix("Skipped: "), pattern) for pattern in patterns)
