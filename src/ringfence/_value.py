"""The bases of ringfence's frozen values, and of what a `with` closes.

Not dataclasses: importing that module costs some 20 ms, half of what `import ringfence` may take.
"""

from __future__ import annotations

# What the module operator wraps.
from _operator import attrgetter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import TracebackType
    from typing import Any, ClassVar, Self, TypeVar

    _Value = TypeVar("_Value", bound="Value")

__all__ = ["Closing", "Later", "Plain", "Value"]

# A repr is for people: a Result with 50 MB of output has to fit on a screen.
_REPR_LIMIT = 120


class Value:
    """A frozen value with slots: equal, hashable and printable by its fields.

    A subclass lists its fields in `__slots__`, annotates them, and has an explicit keyword `__init__` that
    checks its arguments and then calls `self._set(...)` once. A field can't be changed afterwards
    (AttributeError); `replace` makes a changed copy, which is checked like any other.
    """

    __slots__ = ()
    _fields: ClassVar[tuple[str, ...]] = ()
    # All fields of an instance at once.
    _values: ClassVar[attrgetter[Any]] = attrgetter("__class__")

    def __init_subclass__(cls) -> None:
        slots = cls.__dict__.get("__slots__")
        if slots is None:
            raise TypeError(f"{cls.__name__} needs __slots__: without them its instances could be changed")
        # In the order of the annotations: that is the one to read.
        order = list(cls.__annotations__)
        cls._fields = (*cls._fields, *sorted(slots, key=order.index))
        if cls._fields:
            cls._values = attrgetter(*cls._fields)

    def _set(self, **fields: object) -> None:
        """Set fields, past the guard of __setattr__. For `__init__` only."""
        put = object.__setattr__
        for name, value in fields.items():
            put(self, name, value)

    def _init_arguments(self) -> dict[str, Any]:
        """What `__init__` needs for an equal value; overridden where that isn't the fields."""
        return {name: getattr(self, name) for name in self._fields}

    def replace(self, **changes: Any) -> Self:
        """A copy with the given arguments of `__init__` changed. Raises what `__init__` raises."""
        return type(self)(**{**self._init_arguments(), **changes})

    def _changed(self, **fields: object) -> Self:
        """A copy with these fields in place of its own, past the checks of `__init__`. For its own methods only."""
        copy = _restore(type(self), self._values(self))
        copy._set(**fields)
        return copy

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: use .replace({name}=...) for a changed copy")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is frozen: its field {name} can't be deleted")

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        values = self._values
        return bool(values(self) == values(other))

    def __hash__(self) -> int:
        return hash((type(self), self._values(self)))

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={_short(getattr(self, name))}" for name in self._fields)
        return f"{type(self).__name__}({fields})"

    def __reduce__(self) -> tuple[Any, ...]:
        return _restore, (type(self), tuple(getattr(self, name) for name in self._fields))


class Plain(Value):
    """A value whose fields are all what JSON takes."""

    __slots__ = ()

    def to_json(self) -> dict[str, Any]:
        """For json.dumps."""
        return {name: getattr(self, name) for name in self._fields}


class Later:
    """A module that is imported once something of it is asked for."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> Any:
        found = getattr(__import__(self._name, fromlist=("*",)), name)
        setattr(self, name, found)
        return found


class Closing:
    """A context manager that is closed at its end."""

    __slots__ = ()

    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _restore(cls: type[_Value], values: tuple[object, ...]) -> _Value:
    """Unpickle and copy: the fields were checked when the original was made."""
    value = cls.__new__(cls)
    put = object.__setattr__
    for name, one in zip(cls._fields, values, strict=True):
        put(value, name, one)
    return value


def _short(value: object) -> str:
    if isinstance(value, (bytes, str)) and len(value) > _REPR_LIMIT:
        return f"{value[:_REPR_LIMIT]!r}... ({len(value)} in all)"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key!r}: {_short(item)}" for key, item in value.items()) + "}"
    return repr(value)
