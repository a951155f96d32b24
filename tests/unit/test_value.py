"""The base of frozen values."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest

from ringfence._value import Value


class Point(Value):
    __slots__ = ("x", "y")
    x: int
    y: int

    def __init__(self, *, x: int, y: int = 0) -> None:
        if x < 0:
            raise ValueError("x is negative")
        self._set(x=x, y=y)


class Point3(Point):
    __slots__ = ("z",)
    z: Any

    def __init__(self, *, x: int, y: int = 0, z: Any = 0) -> None:
        super().__init__(x=x, y=y)
        self._set(z=z)


def test_fields_cannot_be_changed_or_deleted_or_added() -> None:
    point = Point(x=1)
    with pytest.raises(AttributeError, match=r"Point is frozen: use \.replace\(x=\.\.\.\)"):
        point.x = 2
    with pytest.raises(AttributeError, match="can't be deleted"):
        del point.x
    with pytest.raises(AttributeError):
        point.colour = "red"
    assert not hasattr(point, "__dict__")
    assert point.x == 1


def test_equality_and_hash_are_by_type_and_fields() -> None:
    assert Point(x=1, y=2) == Point(x=1, y=2)
    assert hash(Point(x=1, y=2)) == hash(Point(x=1, y=2))
    assert Point(x=1) != Point(x=2)
    assert Point(x=1) != Point3(x=1)
    assert Point3(x=1) != Point(x=1)
    assert Point(x=1) != (1, 0)


def test_replace_makes_a_checked_copy() -> None:
    point = Point3(x=1, y=2, z=3)
    assert point.replace(y=5) == Point3(x=1, y=5, z=3)
    assert point.y == 2
    with pytest.raises(ValueError, match="negative"):
        point.replace(x=-1)
    with pytest.raises(TypeError):
        point.replace(w=1)


def test_repr_names_the_fields_and_cuts_long_ones() -> None:
    assert repr(Point3(x=1, y=2, z="a")) == "Point3(x=1, y=2, z='a')"
    shown = repr(Point3(x=1, z=b"x" * 10**6))
    assert len(shown) < 300
    assert "1000000 in all" in shown
    assert len(repr(Point3(x=1, z={"name": b"x" * 10**6}))) < 300


def test_pickle_and_copy_keep_the_value() -> None:
    point = Point3(x=1, y=2, z=(3, 4))
    for again in (pickle.loads(pickle.dumps(point)), copy.copy(point), copy.deepcopy(point)):
        assert again == point
        assert type(again) is Point3


def test_a_subclass_without_slots_is_refused() -> None:
    with pytest.raises(TypeError, match="needs __slots__"):
        type("Loose", (Value,), {})
