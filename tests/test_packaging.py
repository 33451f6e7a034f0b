"""Does a release hold all that it needs, for every platform, and is each file of it tried before it is published?"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

import gmask

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "release.yml").read_text("utf-8"))
JOBS = WORKFLOW["jobs"]
CHECK = ".ci/check_install.py"
BUILT = ("*.so", "*.dll", "__pycache__", "*.egg-info")


def steps(job: str, *, uses: str) -> list[dict[str, Any]]:
    return [step for step in JOBS[job]["steps"] if step.get("uses", "").startswith(f"{uses}@")]


def commands(job: str) -> str:
    return "\n".join(step.get("run", "") for step in JOBS[job]["steps"])


def test_there_is_a_wheel_for_every_platform() -> None:
    rows = JOBS["wheel"]["strategy"]["matrix"]["include"]
    assert {row["platform"]: row["runner"].partition("-")[0] for row in rows} == {
        "manylinux-x86_64": "ubuntu",
        "manylinux-aarch64": "ubuntu",
        "macos-arm64": "macos",
        "windows-amd64": "windows",
    }
    assert [row["runner"].endswith("-arm") for row in rows] == ["aarch64" in row["platform"] for row in rows]
    assert JOBS["wheel"]["runs-on"] == "${{ matrix.runner }}"
    assert PROJECT["tool"]["cibuildwheel"]["archs"] == ["native"]


def test_each_file_is_tried_where_nothing_else_is_installed() -> None:
    assert (ROOT / CHECK).is_file()
    (build,) = steps("wheel", uses="pypa/cibuildwheel")
    assert re.fullmatch(r"pypa/cibuildwheel@v\d+\.\d+\.\d+", build["uses"])
    settings = PROJECT["tool"]["cibuildwheel"]
    assert settings["test-command"] == f"python {{project}}/{CHECK}"
    assert not {"test-skip", "test-requires", "test-extras"} & settings.keys()
    first = PROJECT["project"]["requires-python"].removeprefix(">=").replace(".", "")
    assert settings["build"][0] == f"cp{first}-*"
    sdist = commands("sdist")
    assert "python -m build --sdist" in sdist and "python -m venv" in sdist and CHECK in sdist


def test_what_is_published_was_built_and_tried_in_the_same_run() -> None:
    publish = JOBS["publish"]
    assert publish["needs"] == ["sdist", "wheel"] == [name for name in JOBS if name != "publish"]
    assert publish["if"] == "github.event_name == 'push' && github.ref_type == 'tag'"
    assert WORKFLOW["permissions"] == {"contents": "read"}
    assert publish["permissions"] == {"id-token": "write"} and publish["environment"] == "pypi"
    (upload,), (built,) = (steps(job, uses="actions/upload-artifact") for job in ("sdist", "wheel"))
    assert upload["with"]["path"] == "dist/*.tar.gz" and built["with"]["path"] == "dist/*.whl"
    triggers = WORKFLOW[True]  # YAML 1.1 reads the key `on` so
    assert triggers["push"] == {"tags": ["v*"]}
    for pattern in triggers["pull_request"]["paths"]:
        assert list(ROOT.glob(pattern)), pattern


def test_the_same_torch_is_installed_everywhere() -> None:
    (torch,) = re.findall(r"^TORCH \?= (torch==\S+)$", (ROOT / "Makefile").read_text("utf-8"), re.M)
    assert f"{torch}\n" in (ROOT / "constraints.txt").read_text("utf-8")
    assert f"ARG TORCH={torch}\n" in (ROOT / "docker" / "Dockerfile").read_text("utf-8")
    assert f" {torch}\n" in commands("sdist")
    assert PROJECT["tool"]["cibuildwheel"]["linux"]["before-test"].endswith(f" {torch}")


def test_the_version_stands_in_one_place_and_has_a_chapter_in_the_changelog() -> None:
    assert PROJECT["project"]["dynamic"] == ["version"] and "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "gmask.__version__"}
    assert f"\n## {gmask.__version__} " in (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert "gmask.__version__" in commands("sdist")


def test_the_readmes_begin_without_a_clone() -> None:
    for name in ("README.md", "README.zh.md"):
        page = (ROOT / name).read_text("utf-8")
        for command in ("uvx gmask infill", "pipx run gmask", "gmask --version", "gmask --install-completion"):
            assert command in page, name
    assert set(PROJECT["project"]["scripts"]) == {PROJECT["project"]["name"]}, "uvx and pipx run look for this name"


COMPLETIONS = {
    "bash": ({"COMP_WORDS": "gmask inf", "COMP_CWORD": "1", "_GMASK_COMPLETE": "complete_bash"}, "infill"),
    "zsh": ({"_TYPER_COMPLETE_ARGS": "gmask inf", "_GMASK_COMPLETE": "complete_zsh"}, '"infill":"Fill the blanks'),
    "fish": (
        {
            "_TYPER_COMPLETE_ARGS": "gmask inf",
            "_TYPER_COMPLETE_FISH_ACTION": "get-args",
            "_GMASK_COMPLETE": "complete_fish",
        },
        "infill\tFill the blanks",
    ),
}


@pytest.mark.parametrize("shell", COMPLETIONS)
def test_a_shell_completes_verbs(shell: str) -> None:
    settings, expected = COMPLETIONS[shell]
    command = [sys.executable, "-m", "gmask"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env={**os.environ, **settings})
    assert expected in done.stdout and "chat" not in done.stdout, done.stderr


class Release(NamedTuple):
    sdist: Path
    wheel: Path
    sources: Path  # the tree that the sdist was made of


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """An sdist of these sources, and the wheel that is built from it, by the setuptools of this environment."""
    place = tmp_path_factory.mktemp("release")
    sources = place / "sources"
    ignored = shutil.ignore_patterns(*BUILT)
    for name in ("src", "recipes", "tests", "docs"):
        shutil.copytree(ROOT / name, sources / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file():
            shutil.copy(path, sources)
    sdist = build("sdist", sources, place)
    with tarfile.open(sdist) as archive:
        archive.extractall(place, filter="data")
    unpacked = place / sdist.name.removesuffix(".tar.gz")
    yield Release(sdist, build("wheel", unpacked, place), sources)
    shutil.rmtree(place)


def build(kind: str, sources: Path, out: Path) -> Path:
    code = f"from setuptools import build_meta; print(build_meta.build_{kind}({str(out)!r}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return out / done.stdout.splitlines()[-1]


def package_files(sources: Path) -> set[str]:
    return {path.relative_to(sources / "src").as_posix() for path in (sources / "src").rglob("*") if path.is_file()}


@pytest.mark.slow
def test_the_sdist_holds_what_an_installation_needs_and_no_tests(release: Release) -> None:
    with tarfile.open(release.sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {f"src/{name}" for name in package_files(release.sources) if "egg-info" not in name} <= names
    needed = {"pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md", "CHANGELOG.md", "constraints.txt"}
    assert needed <= names
    assert {f"recipes/{path.name}" for path in (ROOT / "recipes").iterdir() if path.is_file()} <= names
    assert not {name for name in names if name.startswith(("tests", "docs")) or name.endswith((".so", ".pyc"))}


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_serves_every_python(release: Release) -> None:
    assert release.wheel.name.startswith(f"gmask-{gmask.__version__}-py3-none-")
    with zipfile.ZipFile(release.wheel) as archive:
        names = set(archive.namelist())
    assert {name for name in package_files(release.sources) if "egg-info" not in name} <= names
    assert release.wheel.stat().st_size < 40e6, "of 100 MB that PyPI takes"


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_an_installed_wheel_fills_blanks_without_the_sources(release: Release, tmp_path: Path) -> None:
    """In an environment of its own, to which this one lends the dependencies, but not gmask."""
    empty = tmp_path / "empty"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", empty], check=True, timeout=600)
    scripts = empty / ("Scripts" if sys.platform == "win32" else "bin")
    python = scripts / "python"
    where = "import json, sysconfig; print(json.dumps(sysconfig.get_path('purelib')))"
    own = Path(json.loads(subprocess.run([python, "-c", where], capture_output=True, check=True, timeout=600).stdout))
    (own / "lent.pth").write_text(sysconfig.get_path("purelib"), "utf-8")
    install = ["--no-deps", "--no-index", "--no-warn-script-location", "--ignore-installed", str(release.wheel)]
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--quiet", "install", *install]
    subprocess.run(pip, check=True, timeout=300)
    done = subprocess.run([python, ROOT / CHECK], capture_output=True, encoding="utf-8", timeout=300)
    assert done.returncode == 0, done.stderr
    *filled, told = done.stdout.splitlines()
    assert len(filled) == 2 and "[MASK]" not in done.stdout
    assert told.startswith(f"gmask {gmask.__version__} with ") and str(own) in told
