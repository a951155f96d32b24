"""What a sandbox must not let happen. Each test here also asserts that nothing was left behind."""

from __future__ import annotations

from support.fixtures import *  # noqa: F403
