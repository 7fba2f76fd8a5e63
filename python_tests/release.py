"""Makes a release of the version in `pelt_kernels/_version.py`: builds an sdist and, from it, a wheel,
checks both in empty environments, dates the changelog's heading and tags the commit.

    python python_tests/release.py [--dry-run | --build-only]

Nothing is changed before everything has passed. With --dry-run it tells what it would do, once the
repository has been found ready; with --build-only it builds this folder as it is, into `dist`. Pushing the tag is left to a person; the hosted workflow
`wheels.yml` then builds the wheels of every Python.
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import install_check

ROOT = Path(__file__).resolve().parents[1]
CHANGELOG = "CHANGELOG.md"
# torch brings OpenMP under this name, and is loaded first: a second copy would have a pool of its own.
REPAIR = ("--strip", "--exclude", "libgomp.so.1")


class NotReadyError(Exception):
    """Why there can be no release: one sentence."""


def git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True)
    if done.returncode:
        raise NotReadyError(f"git {arguments[0]} failed: {done.stderr.strip()}")
    return done.stdout


def version_of(root: Path) -> str:
    text = (root / "pelt_kernels" / "_version.py").read_text()
    return re.findall(r'__version__ = "(.+)"', text)[0]


def released(changelog: str, version: str, day: datetime.date) -> str:
    """The changelog with the version's heading dated. Raises NotReadyError where the section is
    missing or empty.
    """
    heading = f"## {version}, unreleased\n"
    _, found, after = changelog.partition(heading)
    if not found:
        raise NotReadyError(f"expected '{heading.strip()}' in {CHANGELOG}, got no such heading")
    section = after.partition("\n## ")[0]
    if not [line for line in section.splitlines() if line.strip() and not line.startswith("#")]:
        raise NotReadyError(f"expected what has changed in {version} in {CHANGELOG}, got nothing")
    return changelog.replace(heading, f"## {version}, {day.isoformat()}\n")


def ready(root: Path, day: datetime.date) -> tuple[str, str]:
    """The version and its changelog. Raises NotReadyError before any work."""
    changed = git(root, "status", "--porcelain").splitlines()
    if changed:
        raise NotReadyError(f"expected a clean checkout, got {len(changed)} changes; commit them")
    version = version_of(root)
    if git(root, "tag", "--list", f"v{version}").strip():
        raise NotReadyError(
            f"expected a version without a tag, got {version}, which v{version} is of; raise it in "
            "pelt_kernels/_version.py"
        )
    git(root, "var", "GIT_COMMITTER_IDENT")  # who makes the commit and the tag
    return version, released((root / CHANGELOG).read_text(), version, day)


def distributions(source: Path, folder: Path) -> list[Path]:
    """An sdist of the source and a wheel from it, for the Linux that this C library is of. Raises
    subprocess.CalledProcessError; what a build prints goes through.
    """
    subprocess.run([sys.executable, "-m", "build", "--outdir", folder, source], check=True)
    for wheel in folder.glob("*-linux_*.whl"):
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        command = [sys.executable, "-m", "auditwheel", "repair", *REPAIR, "-w", folder, wheel]
        subprocess.run(command, check=True, env={**os.environ, "PATH": path})  # finds patchelf
        wheel.unlink()
    return sorted(folder.iterdir())


def release(root: Path, is_dry: bool) -> None:
    """The whole way. Raises NotReadyError; what a build prints goes through."""
    version, changelog = ready(root, datetime.date.today())
    if is_dry:
        print(
            f"release {version}: would build, check, date {CHANGELOG} and make the tag v{version}"
        )
        return
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        git(root, "clone", "--quiet", ".", str(source))  # what is committed, and nothing else
        (source / CHANGELOG).write_text(changelog)
        files = distributions(source, Path(folder) / "dist")
        if install_check.main([str(file) for file in files]):
            raise NotReadyError(f"what was built of {version} does not work, for the reason above")
        shutil.copytree(files[0].parent, root / "dist", dirs_exist_ok=True)
    record(root, version, changelog)
    print(f"release {version}: dist/, and the tag v{version} to push")


def record(root: Path, version: str, changelog: str) -> None:
    """The commit with the changelog, and its tag; the changelog as it was where git refuses."""
    before = (root / CHANGELOG).read_text()
    try:
        (root / CHANGELOG).write_text(changelog)
        git(root, "commit", "--quiet", "--message", f"Release {version}", "--", CHANGELOG)
    except NotReadyError:
        (root / CHANGELOG).write_text(before)
        raise
    git(root, "tag", "--annotate", f"v{version}", "--message", f"pelt_kernels {version}")


def main(arguments: Sequence[str] | None = None, root: Path = ROOT) -> int:
    """0, or 1 with a sentence."""
    parser = argparse.ArgumentParser(description="Builds, checks and tags a release.")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--dry-run", action="store_true", help="only say what would be done")
    one.add_argument("--build-only", action="store_true", help="build this folder as it is")
    given = parser.parse_args(arguments)
    try:
        if given.build_only:
            distributions(root, root / "dist")
        else:
            release(root, given.dry_run)
    except (NotReadyError, subprocess.CalledProcessError) as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
