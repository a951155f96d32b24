"""A pytest plugin: what a boundary isolates and what a start in it takes, as a budget that a test has.

    @pytest.mark.ringfence_budget(isolation="container", against="baseline.json", startup_ratio=1.2)
    def test_the_workers_sandbox(): ...

    def test_the_job(ringfence_budget):
        ringfence_budget(["python3", "job.py"], isolation="container", startup_ms=50, require={"network": "own"})

It is loaded into every pytest of an environment that ringfence is installed in, so it imports nothing of it until a
budget is there to be kept. docs/design/comparison.md has what counts as worse.
"""

from __future__ import annotations

import functools
import inspect

import pytest

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

__all__: list[str] = []

_NAME = "ringfence_budget"
_MARKER = (
    f"{_NAME}(argv=['true'], *, isolation, against=None, verdicts=True, startup_ratio=1.1, startup_ms=None,"
    " require=None, allow_unknown=False, input=None, files=None, limits=None, repeat=None, probes=True): fail the test"
    " where the level isolates less, or a start in it takes longer, than in a comparison saved by 'ringfence compare"
    " --save', or than is asked for"
)
_RANK = {"own": 3, "restricted": 2, "shared": 1}
# What was compared in this session, by what it was of: several budgets share one comparison.
_COMPARED = pytest.StashKey["dict[str, Any]"]()
_NOTES = pytest.StashKey["dict[str, None]"]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", _MARKER)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call(item: pytest.Item) -> None:
    """Judged as the first part of the test itself: a budget that is exceeded is a failure, not an error of a set-up."""
    for mark in item.iter_markers(_NAME):
        try:
            given = inspect.signature(_keep).bind(item.config, *mark.args, **mark.kwargs)
        except TypeError as error:
            pytest.fail(f"@pytest.mark.{_NAME}: {error}", pytrace=False)
        _keep(*given.args, **given.kwargs)


@pytest.fixture(name=_NAME)
def _budget(request: pytest.FixtureRequest) -> Callable[..., dict[str, Any]]:
    """Compares a command, as the marker does, and returns the comparison's document; the test fails where the budget is
    exceeded.
    """
    return functools.partial(_keep, request.config)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """What couldn't be judged is told, also where all passed."""
    notes = config.stash.get(_NOTES, {})
    if notes:
        from ringfence.errors import printable

        terminalreporter.section("ringfence budgets")
        for note in notes:
            terminalreporter.write_line(printable(note))


def _keep(
    config: pytest.Config,
    argv: Sequence[str | bytes] = ("true",),
    *,
    isolation: str | Iterable[str],
    against: str | None = None,
    verdicts: bool = True,
    startup_ratio: float | None = 1.1,
    startup_ms: float | None = None,
    require: Mapping[str, str] | None = None,
    allow_unknown: bool = False,
    input: Any = None,
    files: Any = None,
    limits: Any = None,
    repeat: int | None = None,
    probes: bool = True,
) -> dict[str, Any]:
    """Compares the command and returns the comparison's document. Fails the test where a budget is exceeded.

    isolation: the level, or several. against: a file of `ringfence compare --save`, from pytest's root folder on;
    verdicts: none may be worse than there; startup_ratio: so much longer may a start take than there, beyond noise;
    None leaves starts out. startup_ms: the median of a start may be this at most. require: by the name of a resource
    or a probe the least verdict. allow_unknown: a verdict that can't be told any more is no failure. input, files,
    limits, repeat, probes: as `ringfence.compare` takes them.
    """
    from ringfence.errors import RingfenceError, printable

    names = (isolation,) if isinstance(isolation, str) else tuple(isolation)
    of_compare = {"input": input, "files": files, "limits": limits, "repeat": repeat, "probes": probes}
    try:
        document = _comparison(config, argv, names, of_compare)
        failed = [*_absolute(document, names, startup_ms, require or {})]
        if against is not None:
            path = str(config.rootpath / against)
            failed += _relative(config, document, names, path, verdicts, startup_ratio, allow_unknown)
    except (RingfenceError, OSError, ValueError) as error:
        pytest.fail(f"the ringfence budget can't be judged: {printable(str(error))}", pytrace=False)
    if failed:
        command = " ".join(word if isinstance(word, str) else word.decode("utf-8", "replace") for word in argv)
        since = f" Compared with {against}." if against else ""
        # Names and evidence come from a file, and from what was run.
        told = printable("; ".join(failed))
        pytest.fail(f"the ringfence budget of {command!r} is exceeded: {told}.{since}", pytrace=False)
    return document


def _comparison(
    config: pytest.Config, argv: Sequence[str | bytes], names: tuple[str, ...], of_compare: Mapping[str, Any]
) -> dict[str, Any]:
    from ringfence.comparison import compare

    known = config.stash.setdefault(_COMPARED, {})
    key = repr((tuple(argv), names, sorted(of_compare.items())))
    if key not in known:
        known[key] = compare(argv, levels=names, **of_compare).to_json()
    found: dict[str, Any] = known[key]
    return found


def _absolute(
    document: dict[str, Any], names: Iterable[str], startup_ms: float | None, require: Mapping[str, str]
) -> Iterable[str]:
    from ringfence.comparison.document import level_named
    from ringfence.comparison.figures import duration

    for name in names:
        level = level_named(document, name)
        assert level is not None, name
        if level["unavailable"]:
            yield f"{name} doesn't run here: {level['unavailable']}"
            continue
        start = level["costs"]["startup_ns"]
        if startup_ms is not None and (start is None or start["p50"] > startup_ms * 1e6):
            took = "an unknown time" if start is None else f"{duration(start['p50'])} (the median of {start['n']})"
            yield f"{name}: a start takes {took}, and may take {startup_ms:g} ms"
        for wanted, least in require.items():
            if least not in _RANK:
                yield f"require: {wanted!r} must be of {', '.join(_RANK)}, not {least!r}"
                continue
            found = level["isolation"].get(wanted) or level["probes"].get(wanted)
            if found is None:
                yield f"require: there is no resource or probe {wanted!r} (of {', '.join(level['isolation'])})"
            elif _RANK.get(found["verdict"], 0) < _RANK[least]:
                yield f"{name}: {wanted} must be {least}, is {found['verdict']}: {found['evidence']}"


def _relative(
    config: pytest.Config,
    document: dict[str, Any],
    names: Sequence[str],
    path: str,
    verdicts: bool,
    startup_ratio: float | None,
    allow_unknown: bool,
) -> Iterable[str]:
    from ringfence.comparison.changes import Tolerance, changes_between
    from ringfence.comparison.document import BARE, load

    try:
        old = load(path)
    except FileNotFoundError:
        yield f"there is no {path}: make it by 'ringfence compare --levels {','.join(names)} --save {path} -- COMMAND'"
        return
    there = [one["name"] for one in old["levels"]]
    for name in names:
        if name not in there:
            yield f"{path} has no level {name}, only {', '.join(there)}"
    old = {**old, "levels": [one for one in old["levels"] if one["name"] in (BARE, *names)]}
    document = {**document, "levels": [one for one in document["levels"] if one["name"] in (BARE, *there)]}
    tolerance = Tolerance(share=(startup_ratio or 1.0) - 1)
    changes = changes_between(old, document, tolerance=tolerance, allow_unknown=allow_unknown)
    ignored = {"start"} if startup_ratio is None else set()
    ignored |= set() if verdicts else {"isolation", "probe", "surface"}
    yield from (f"{one.level}: {one.sentence}" for one in changes.worse if one.about not in ignored)
    config.stash.setdefault(_NOTES, {}).update(dict.fromkeys(f"{path}: {note}" for note in changes.notes))
