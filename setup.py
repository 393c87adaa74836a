"""Builds the C runtime, `tilewright/lib/libtilewright.so`, into wheels and editable installs; all else is in pyproject.toml.

Zig's C compiler, a build requirement from PyPI, makes a library for every glibc since 2.17, whatever is installed here. While
working on the runtime: `python setup.py build_ext --inplace`.
"""

import subprocess
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

TARGET, PLATFORM = "x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wconversion", "-Wshadow"]
FLAGS = ["-std=c11", "-O2", "-fPIC", "-fvisibility=hidden", "-shared", "-Wl,-s", "-pthread"]


class BuildRuntime(build_ext):
    """Compiles and links the runtime."""

    def build_extension(self, ext: Extension) -> None:
        """One call of the compiler."""
        output = Path(self.get_ext_fullpath(ext.name))
        output.parent.mkdir(parents=True, exist_ok=True)
        compiler = [sys.executable, "-m", "ziglang", "cc", f"--target={TARGET}"]
        subprocess.run([*compiler, *FLAGS, *WARNINGS, "-o", str(output), *ext.sources, "-ldl"], check=True)

    def copy_extensions_to_source(self) -> None:
        """For editable installs, whose folder git does not keep."""
        Path("tilewright/lib").mkdir(exist_ok=True)
        super().copy_extensions_to_source()

    def get_ext_filename(self, fullname: str) -> str:
        """That of a library, which is no module of some version of Python."""
        return str(Path(*fullname.split("."))) + ".so"


class RuntimeWheel(bdist_wheel):
    """A wheel for any Python on Linux, since the library knows none."""

    def get_tag(self) -> tuple[str, str, str]:
        """Python, ABI and platform."""
        return "py3", "none", PLATFORM


runtime = Extension("tilewright.lib.libtilewright", sorted(glob("runtime/*.c")), depends=sorted(glob("runtime/*.h")))
setup(ext_modules=[runtime], cmdclass={"build_ext": BuildRuntime, "bdist_wheel": RuntimeWheel})
