"""What a sandbox must do alike at every level. Each test here also asserts that nothing was left behind."""

from __future__ import annotations

from support.fixtures import *  # noqa: F403
