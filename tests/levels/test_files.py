"""Files into the work directory and back out of it."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

import ringfence as rf
from support.sandboxes import EXITED_0, IN_A_GUEST, LEVELS, PROBE_FILE, ended, output, run_probe

MEGABYTES_20 = os.urandom(20 << 20)
FILES: dict[str | bytes, rf.File | bytes | str | tuple[bytes, int]] = {
    "probe": PROBE_FILE["probe"],
    "empty": b"",
    "a/b/c/deep.txt": "grüße\n",
    "a/b/other.bin": bytes(range(256)),
    "secret": rf.File(b"for the owner", 0o600),
    "tool.sh": (b"#!/bin/sh\necho ran\n", 0o755),
    "locked": (b"read-only", 0o400),
    b"n\xffame with space": b"1",
    "big": MEGABYTES_20,
}
TREE = [
    b"dir 0755 a",
    b"dir 0755 a/b",
    b"dir 0755 a/b/c",
    b"file 0644 8 a/b/c/deep.txt",
    b"file 0644 256 a/b/other.bin",
    b"file 0644 20971520 big",
    b"file 0644 0 empty",
    b"file 0400 9 locked",
    b"file 0644 1 n\xffame with space",
    b"file 0755 %d probe" % len(PROBE_FILE["probe"].data),
    b"file 0600 13 secret",
    b"file 0755 19 tool.sh",
]


def without_directory_sizes(line: bytes) -> bytes:
    """A directory's size is its file system's business."""
    kind, mode, size, name = line.split(b" ", 3)
    return b" ".join((kind, mode, name) if kind == b"dir" else (kind, mode, size, name))


@pytest.mark.parametrize("isolation", LEVELS)
def test_files_in(isolation: str) -> None:
    """Nested folders, modes, nothing, 20 MB, names of any bytes; all of them the workload's own."""
    script = (
        "./probe tree . && echo == && sha256sum < big && ./tool.sh && cat a/b/c/deep.txt secret locked"
        " && echo more >> empty && mkdir a/b/new && cat empty"
    )
    printed = output(rf.run(["sh", "-c", script], isolation=isolation, files=FILES))
    tree, _, rest = printed.partition(b"==\n")
    assert [without_directory_sizes(line) for line in tree.splitlines()] == TREE
    digest = hashlib.sha256(MEGABYTES_20).hexdigest()
    assert rest.decode() == f"{digest}  -\nran\ngrüße\nfor the ownerread-onlymore\n"


MAKE = """
mkdir -p out/deep/er made
printf 'x,y\\n' > out/a.csv
: > out/empty.csv
printf '\\000\\377' > out/deep/b.csv
printf deeper > out/deep/er/c.txt
printf no > made/not.log
printf 'n\\n' > "$(printf 'out/odd\\377 name.csv')"
echo changed > given.txt
mkfifo out/pipe.csv
chmod 600 out/a.csv
"""


@pytest.mark.parametrize("isolation", LEVELS)
def test_files_out(isolation: str) -> None:
    """`*` within a name, `**` across folders, a plain name, one that was put in and changed, none matching."""
    patterns = ["out/*.csv", "**/c.txt", "given.txt", "no/such/*", "missing"]
    result = rf.run(
        ["sh", "-c", MAKE], isolation=isolation, collect=patterns, files={"given.txt": b"old", "kept": b"k"}
    )
    assert output(result) == b""
    assert result.files == {
        "out/a.csv": b"x,y\n",
        "out/empty.csv": b"",
        os.fsdecode(b"out/odd\xff name.csv"): b"n\n",
        "out/deep/er/c.txt": b"deeper",
        "given.txt": b"changed\n",
    }


@pytest.mark.parametrize("isolation", LEVELS)
def test_20_megabytes_out_after_a_failure(isolation: str) -> None:
    """What a workload left is brought back also where it failed; without collect nothing is."""
    script = "./probe mkfile big 20M && exit 3"
    result = rf.run(["sh", "-c", script], isolation=isolation, collect=["big"], files=PROBE_FILE)
    assert ended(result) == ("exited", 3, None)
    wanted = (bytes(range(251)) * (21 << 12))[: 20 << 20]
    assert result.files.keys() == {"big"}
    assert result.files["big"] == wanted


def test_nothing_is_collected_unasked() -> None:
    for isolation in ("process", "container"):
        assert rf.run(["sh", "-c", "echo > x"], isolation=isolation).files == {}


@pytest.mark.parametrize("isolation", LEVELS)
def test_a_planted_symlink_is_not_followed(isolation: str, tmp_path: Path) -> None:
    """To a file, as a folder on the way, and in place of a file that was put in."""
    secret = tmp_path / "secret.csv"
    secret.write_bytes(b"the host's")
    secret.chmod(0o644)
    tmp_path.chmod(0o755)
    script = f"""
    mkdir out
    ln -s /etc/passwd out/passwd.csv
    ln -s {secret} out/secret.csv
    ln -s {tmp_path} linked
    ln -s . out/loop
    rm given.csv; ln -s {secret} given.csv
    ln {secret} out/hard.csv 2>/dev/null
    echo honest > out/honest.csv
    """
    patterns = ["**/*.csv", "linked/secret.csv", "given.csv"]
    result = rf.run(["sh", "-c", script], isolation=isolation, collect=patterns, files={"given.csv": b"old"})
    assert ended(result) == EXITED_0
    assert result.files == {"out/honest.csv": b"honest\n"}
    assert secret.read_bytes() == b"the host's"


# A guest's work directory is memory, gone with it; making much there only takes time under emulation.
MANY = (80, 100) if IN_A_GUEST else (300, 2000)
HOW_DEEP_AND_MANY = {"process": MANY, "container": MANY, "vm": (70, 50)}


@pytest.mark.parametrize("isolation", LEVELS)
def test_awkward_leftovers_are_removed(isolation: str) -> None:
    """Folders without rights, a tree deeper than any walk, many files: the leak fixture looks for them."""
    deep, many = HOW_DEEP_AND_MANY[isolation]
    script = f"""
    mkdir locked && touch locked/f && chmod 000 locked
    mkdir sealed && touch sealed/f && chmod 555 sealed
    i=0; while [ $i -lt {deep} ]; do mkdir d && cd d && i=$((i+1)); done
    cd "$HOME" && mkdir many && cd many && seq {many} | xargs touch
    """
    result = rf.run(["sh", "-c", script], isolation=isolation)
    assert (ended(result), result.stderr) == (EXITED_0, b"")


@pytest.mark.parametrize("isolation", ["process", "container"])
def test_a_workload_cannot_reach_another_ones_folder(isolation: str) -> None:
    """Two of the same caller: each has ids of its own, and the folder that holds theirs can't be listed."""
    first = run_probe(isolation, "cwd")
    if isolation == "process":
        folder = os.path.dirname(output(first).decode().strip())
        result = run_probe(isolation, "tree", folder)
        assert (ended(result), result.stderr) == (("exited", 1, None), b"EACCES scandir\n")
    else:
        assert output(first) == b"/work\n"
