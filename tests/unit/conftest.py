"""Fixtures of more than one file of unit tests."""

from __future__ import annotations

from cgroup_parts import fake, real, unified

__all__ = ["fake", "real", "unified"]
