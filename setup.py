"""Adds one step to setuptools' build: core/ is compiled to static binaries, which are shipped as files of the package.

They are no extension modules: one wheel serves every Python 3 of this kind of machine.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "core"))

from build import BuildError, sources  # noqa: E402  core/build.py, which is no module of an installed package
from build import build as compile_core  # noqa: E402

INSIDE = Path("ringfence/_core")


class BuildCore(Command):
    """Compiles core/ into the package: of the wheel, or of the source tree for an editable install."""

    description = "compile the static binaries of ringfence"
    user_options: ClassVar = [("build-lib=", "d", "where the package is built")]

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        assert self.build_lib is not None
        package = ROOT / "src" if self.editable_mode else Path(self.build_lib)
        try:
            compile_core(package / INSIDE, release=self.distribution.get_version())
        except BuildError as error:
            raise CompileError(str(error)) from None

    # What editable installs and sdists ask of a step of the build.
    def get_source_files(self) -> list[str]:
        files = [path for group in sources().values() for path in group]
        return [str(path.relative_to(ROOT)) for path in [*files, *sorted((ROOT / "core").glob("*.h"))]]

    def get_outputs(self) -> list[str]:
        assert self.build_lib is not None
        return [str(Path(self.build_lib) / INSIDE / name) for name in sources()]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Build(build):
    sub_commands: ClassVar = [*build.sub_commands, ("build_core", None)]


class Package(Distribution):
    def has_ext_modules(self) -> bool:
        """True, for what follows from it: the package is one of a kind of machine (platlib, not purelib)."""
        return True


class Wheel(bdist_wheel):
    """A wheel for this kind of machine, and for any Python 3."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


setup(distclass=Package, cmdclass={"build": Build, "build_core": BuildCore, "bdist_wheel": Wheel})
