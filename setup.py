"""How is the optional C++ library of gmask.native built? Everything else is in pyproject.toml.

A plain shared library with a C interface (it includes neither Python's headers nor torch's), loaded through ctypes.
Without a C++ compiler the package installs all the same, and torch's own operations serve.
"""

import sys
from glob import glob

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

FOLDER = "src/gmask/native/csrc"
IS_WINDOWS = sys.platform == "win32"


class BuildLibrary(build_ext):
    """Names the library without Python's version, and leaves OpenMP out where the compiler has none."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", "/") + (".dll" if IS_WINDOWS else ".so")

    def get_export_symbols(self, extension: Extension) -> list[str]:
        return []

    def build_extension(self, extension: Extension) -> None:
        openmp = "/openmp" if self.compiler.compiler_type == "msvc" else "-fopenmp"
        compiling, linking = extension.extra_compile_args, extension.extra_link_args
        try:
            extension.extra_compile_args = [*compiling, openmp]
            extension.extra_link_args = [*linking, *([] if IS_WINDOWS else [openmp])]
            super().build_extension(extension)
        except (CompileError, LinkError):
            extension.extra_compile_args, extension.extra_link_args = compiling, linking
            super().build_extension(extension)


class TagWheel(bdist_wheel):
    """One wheel serves every Python 3 of a platform."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[
        Extension(
            "gmask.native._native",
            sources=sorted(glob(f"{FOLDER}/*.cpp")),
            depends=sorted(glob(f"{FOLDER}/*.h") + glob(f"{FOLDER}/*.inc")),
            language="c++",
            extra_compile_args=["/O2", "/std:c++17"]
            if IS_WINDOWS
            else ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", "-g0"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": TagWheel},
)
