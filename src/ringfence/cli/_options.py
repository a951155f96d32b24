"""The options of every command: a table, and what is parsed and explained from it.

Not argparse: its import takes longer than all else that `ringfence run` imports together.
"""

from __future__ import annotations

from ringfence._value import Value
from ringfence.errors import SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

__all__ = ["HelpAsked", "Option", "Options", "Parsed", "UsageError", "did_you_mean", "name_and_path"]

_HELP_WIDTH = 100
_HELP_COLUMN = 28


class UsageError(SpecError):
    """A command line that makes no sense: one sentence, which begins with the command's name."""


class HelpAsked(Exception):
    """--help was given. text: what to print."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text


class Option(Value):
    """One option.

    name: the long one, without its hyphens. short: one letter, or "". metavar: what its value is called; an option
    without one is a flag. help: half a sentence. repeatable: it may be given more than once, and its value is a list.
    choices: the only values. convert: makes the value of the word; a ValueError of it is a usage error.
    """

    __slots__ = ("choices", "convert", "help", "metavar", "name", "repeatable", "short")
    name: str
    short: str
    metavar: str
    help: str
    repeatable: bool
    choices: tuple[str, ...]
    convert: Callable[[str], Any] | None

    def __init__(
        self,
        name: str,
        help: str,
        *,
        short: str = "",
        metavar: str = "",
        repeatable: bool = False,
        choices: tuple[str, ...] = (),
        convert: Callable[[str], Any] | None = None,
    ) -> None:
        self._set(
            name=name,
            short=short,
            metavar=metavar or "|".join(choices),
            help=help,
            repeatable=repeatable,
            choices=choices,
            convert=convert,
        )


class Parsed:
    """values: by the option's name; False, None or [] where it wasn't given. operands: the words after the options."""

    __slots__ = ("operands", "values")

    def __init__(self, values: dict[str, Any], operands: list[str]) -> None:
        self.values = values
        self.operands = operands

    def __getitem__(self, name: str) -> Any:
        return self.values[name]


_HELP = Option("help", "show this and exit", short="h")


class Options:
    """A command's options, and all that its --help says.

    program: "ringfence run". operands: how they are shown in the first line, or "" where there are none.
    The first word that is no option ends them, and so does "--": what follows is the operands, untouched.
    """

    def __init__(self, program: str, operands: str, summary: str, options: Sequence[Option], details: str = "") -> None:
        self.program = program
        self.operands = operands
        self.summary = summary
        self.options = (*options, _HELP)
        self.details = details
        self._by_word = {f"--{one.name}": one for one in self.options}
        self._by_word.update({f"-{one.short}": one for one in self.options if one.short})

    def parse(self, argv: Sequence[str]) -> Parsed:
        """Raises UsageError, and HelpAsked where --help comes first."""
        values: dict[str, Any] = {one.name: _absent(one) for one in self.options}
        given: set[str] = set()
        words = list(argv)
        at = 0
        while at < len(words):
            word = words[at]
            if word == "--":
                at += 1
                break
            if not word.startswith("-") or word == "-":
                break
            at += 1
            for option, value in self._split(word):
                if option is _HELP:
                    raise HelpAsked(self.help())
                if option.metavar and value is None:
                    if at == len(words) or words[at] == "--":
                        raise self.error(f"{_shown(option)} needs a value: {option.metavar}")
                    value = words[at]
                    at += 1
                if option.name in given and not option.repeatable:
                    raise self.error(f"--{option.name} is given twice")
                given.add(option.name)
                self._store(values, option, value)
        operands = words[at:]
        if operands and not self.operands:
            raise self.error(f"{operands[0]!r} is one word too many")
        return Parsed(values, operands)

    def error(self, sentence: str) -> UsageError:
        """The error that is raised for this command."""
        return UsageError(f"{self.program}: {sentence}")

    def help(self) -> str:
        """What --help prints, with a newline at its end."""
        operands = f" {self.operands}" if self.operands else ""
        parts = [f"Usage: {self.program} [OPTION]...{operands}", *_wrapped(self.summary, 0)]
        rows = [(_spelled(one), _explained(one)) for one in self.options]
        return "\n\n".join([parts[0], "\n".join(parts[1:]), "Options:\n" + two_columns(rows)]) + (
            f"\n\n{self.details.strip()}\n" if self.details else "\n"
        )

    def _split(self, word: str) -> list[tuple[Option, str | None]]:
        """The options in one word, each with the value that the word has for it: --name=value, -nvalue, -vh."""
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            option = self._find(name)
            if equals and not option.metavar:
                raise self.error(f"{name} takes no value")
            return [(option, value if equals else None)]
        found: list[tuple[Option, str | None]] = []
        for index, letter in enumerate(word[1:], 2):
            option = self._find(f"-{letter}")
            if option.metavar:
                return [*found, (option, word[index:] or None)]
            found.append((option, None))
        return found

    def _find(self, word: str) -> Option:
        option = self._by_word.get(word)
        if option is None:
            near = did_you_mean(word, [f"--{one.name}" for one in self.options])
            raise self.error(f"unknown option {word}{near or f'; see {self.program} --help'}")
        return option

    def _store(self, values: dict[str, Any], option: Option, word: str | None) -> None:
        value: Any = True
        if word is not None:
            value = word
            if option.choices and word not in option.choices:
                near = did_you_mean(word, option.choices)
                raise self.error(f"--{option.name} must be one of {', '.join(option.choices)}, not {word!r}{near}")
            if option.convert is not None:
                try:
                    value = option.convert(word)
                except ValueError as error:
                    raise self.error(f"--{option.name}: {error}") from None
        if option.repeatable:
            values[option.name].append(value)
        else:
            values[option.name] = value


def name_and_path(word: str) -> tuple[str, str]:
    """Of NAME=PATH. Raises ValueError."""
    name, equals, path = word.partition("=")
    if not (name and equals and path):
        raise ValueError(f"must be NAME=PATH, not {word!r}")
    return name, path


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """ "; did you mean --memory?", or "" where nothing is near."""
    import difflib  # only on the way to an error

    near = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {near[0]}?" if near else ""


def two_columns(rows: Sequence[tuple[str, str]]) -> str:
    """Names on the left, what they are on the right, wrapped."""
    lines = []
    for left, right in rows:
        wrapped = _wrapped(right, _HELP_COLUMN)
        if len(left) > _HELP_COLUMN - 4:
            lines += [f"  {left}", *wrapped]
        else:
            lines += [f"  {left:{_HELP_COLUMN - 2}}{wrapped[0].lstrip()}", *wrapped[1:]]
    return "\n".join(lines)


def _absent(option: Option) -> Any:
    if option.repeatable:
        return []
    return None if option.metavar else False


def _shown(option: Option) -> str:
    return f"-{option.short}, --{option.name}" if option.short else f"--{option.name}"


def _spelled(option: Option) -> str:
    value = f" {option.metavar}" if option.metavar else ""
    return f"{_shown(option)}{value}"


def _explained(option: Option) -> str:
    return f"{option.help}; may be repeated" if option.repeatable else option.help


def _wrapped(text: str, indent: int) -> list[str]:
    lines, line = [], ""
    for word in text.split():
        if line and indent + len(line) + 1 + len(word) > _HELP_WIDTH:
            lines.append(" " * indent + line)
            line = word
        else:
            line = f"{line} {word}" if line else word
    return [*lines, " " * indent + line]
