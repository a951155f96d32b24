"""The command line's own option parser, and the table of commands."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import ringfence
from ringfence.cli import _options, main
from ringfence.cli._options import HelpAsked, Option, Options, UsageError
from ringfence.cli.doctor import OPTIONS as DOCTOR
from ringfence.cli.main import COMMANDS
from ringfence.cli.run import OPTIONS as RUN
from ringfence.cli.setup import OPTIONS as SETUP

SRC = os.path.dirname(os.path.dirname(os.path.abspath(ringfence.__file__)))

TRY = Options(
    "ringfence try",
    "[--] COMMAND [ARGUMENT]...",
    "Tries.",
    [
        Option("memory", "how much", short="m", metavar="SIZE"),
        Option("count", "how many", metavar="N", convert=int),
        Option("env", "a variable", short="e", metavar="K=V", repeatable=True),
        Option("level", "which", short="i", choices=("process", "container")),
        Option("verbose", "say more", short="v"),
        Option("quiet", "say less", short="q"),
    ],
)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--memory", "1M"], "memory", "1M"),
        (["--memory=1M"], "memory", "1M"),
        (["--memory=a=b"], "memory", "a=b"),
        (["--memory="], "memory", ""),
        (["-m", "1M"], "memory", "1M"),
        (["-m1M"], "memory", "1M"),
        (["--memory", "-1"], "memory", "-1"),
        (["--count", "3"], "count", 3),
        (["-vqm1M"], "memory", "1M"),
        (["-vq"], "quiet", True),
        (["-e", "A=1", "--env=B=2"], "env", ["A=1", "B=2"]),
        (["-i", "process"], "level", "process"),
        ([], "memory", None),
        ([], "env", []),
        ([], "verbose", False),
    ],
)
def test_values(words: list[str], name: str, value: object) -> None:
    parsed = TRY.parse([*words, "true"])
    assert parsed[name] == value
    assert parsed.operands == ["true"]


@pytest.mark.parametrize(
    ("words", "operands"),
    [
        (["sh", "-c", "x", "--memory"], ["sh", "-c", "x", "--memory"]),
        (["--", "--help"], ["--help"]),
        (["-v", "--", "--", "x"], ["--", "x"]),
        (["-", "x"], ["-", "x"]),
        (["--"], []),
        ([""], [""]),
    ],
)
def test_operands_are_left_alone(words: list[str], operands: list[str]) -> None:
    assert TRY.parse(words).operands == operands


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--memroy", "1M"], "ringfence try: unknown option --memroy; did you mean --memory?"),
        (["--memroy=1M"], "ringfence try: unknown option --memroy; did you mean --memory?"),
        (["-x"], "ringfence try: unknown option -x; see ringfence try --help"),
        (["-vx"], "ringfence try: unknown option -x; see ringfence try --help"),
        (["--mem", "1"], "ringfence try: unknown option --mem; did you mean --memory?"),
        (["--memory"], "ringfence try: -m, --memory needs a value: SIZE"),
        (["--memory", "--", "true"], "ringfence try: -m, --memory needs a value: SIZE"),
        (["--verbose=yes"], "ringfence try: --verbose takes no value"),
        (["-m1", "--memory", "2"], "ringfence try: --memory is given twice"),
        (["-vv"], "ringfence try: --verbose is given twice"),
        (["--count", "x"], "ringfence try: --count: invalid literal for int() with base 10: 'x'"),
        (
            ["-i", "contianer"],
            "ringfence try: --level must be one of process, container, not 'contianer'; did you mean container?",
        ),
    ],
)
def test_errors(words: list[str], sentence: str) -> None:
    with pytest.raises(UsageError) as caught:
        TRY.parse(words)
    assert str(caught.value) == sentence


def test_operands_where_there_are_none() -> None:
    with pytest.raises(UsageError, match="'x' is one word too many"):
        Options("ringfence none", "", "None.", []).parse(["x"])


@pytest.mark.parametrize("options", [TRY, RUN, DOCTOR, SETUP], ids=lambda one: one.program)
def test_help_shows_every_option_in_lines_of_a_screen(options: Options) -> None:
    for words in (["--help"], ["-h"], ["--help", "--no-such"]):
        with pytest.raises(HelpAsked) as asked:
            options.parse(words)
    text = asked.value.text
    assert text.startswith(f"Usage: {options.program} [OPTION]...")
    assert text.endswith("\n")
    for option in options.options:
        assert f"--{option.name}" in text
        assert option.help.split()[0] in text
    assert [line for line in text.splitlines() if len(line) > 105] == []


@pytest.mark.parametrize("options", [TRY, RUN, DOCTOR, SETUP], ids=lambda one: one.program)
def test_no_name_is_taken_twice(options: Options) -> None:
    names = [one.name for one in options.options]
    shorts = [one.short for one in options.options if one.short]
    assert len(set(names)) == len(names)
    assert len(set(shorts)) == len(shorts)


def test_the_table_of_commands(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    overview = capfd.readouterr().out
    for name, (_, help) in COMMANDS.items():
        assert f"  {name} " in overview
        assert help.split()[0] in overview
    assert main(["help"]) == 0
    assert capfd.readouterr().out == overview
    for name in ("run", "doctor", "setup"):
        assert main(["help", name]) == 0
        text = capfd.readouterr().out
        assert main([name, "--help"]) == 0
        assert capfd.readouterr().out == text
        assert text.startswith(f"Usage: ringfence {name} ")
    assert main(["--version"]) == 0
    assert capfd.readouterr().out == f"ringfence {ringfence.__version__}\n"


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "ringfence: a command is missing; see ringfence --help\n"),
        (["rnu"], "ringfence: unknown command 'rnu'; did you mean run?\n"),
        (["help", "zzz"], "ringfence: unknown command 'zzz'; see ringfence --help\n"),
        (["--verison"], "ringfence: unknown option '--verison'; see ringfence --help\n"),
        (["run"], "ringfence run: a command is missing; see ringfence run --help\n"),
        (["bad\x1b[2Jword"], "ringfence: unknown command 'bad\\x1b[2Jword'; see ringfence --help\n"),
    ],
)
def test_usage_errors_are_one_line_and_125(capfd: pytest.CaptureFixture[str], words: list[str], sentence: str) -> None:
    assert main(words) == 125
    assert capfd.readouterr() == ("", sentence)


def test_a_bug_is_no_exit_status_of_a_workload(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: Options, argv: list[str]) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(_options.Options, "parse", broken)
    assert main(["run", "true"]) == 125
    assert "RuntimeError: a bug" in capfd.readouterr().err


def test_the_way_to_run_imports_nothing_slow() -> None:
    """Each of these costs as much as all that is imported here; a start of the command must not pay for it."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import ringfence.cli.run;"
        "print(sorted({'argparse', 'asyncio', 'dataclasses', 'difflib', 'inspect', 'json', 'pathlib', 're', 'rich',"
        "'shutil', 'subprocess', 'tempfile', 'traceback', 'typing'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-I", "-S", "-c", program, SRC], capture_output=True, check=True)
    assert run.stdout == b"[]\n"
