"""What an sdist and a wheel hold. Without the compiled module, which takes minutes: what a whole one
does in an empty environment is told by `install_check.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import pelt_kernels
from pelt_kernels.ops import _forms

ROOT = Path(__file__).resolve().parents[1]
STEM = f"pelt_kernels-{pelt_kernels.__version__}"


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An sdist and a wheel of this folder, which stays as it is."""
    folder = tmp_path_factory.mktemp("distributions")
    settings = folder / "setup.cfg"
    settings.write_text(f"[build]\nbuild_base={folder}/build\n[egg_info]\negg_base={folder}\n")
    subprocess.run(
        [sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", folder,
         "build_py", "bdist_wheel", "--skip-build", "--dist-dir", folder],
        cwd=ROOT, check=True, env={**os.environ, "DIST_EXTRA_CONFIG": str(settings)},
    )  # fmt: skip
    (wheel,) = folder.glob("*.whl")
    return folder / f"{STEM}.tar.gz", wheel


def files_in(folder: str) -> set[str]:
    """Every file that someone wrote."""
    found = (path.relative_to(ROOT) for path in (ROOT / folder).rglob("*") if path.is_file())
    made = {"__pycache__", "results"}
    return {str(p) for p in found if p.suffix != ".so" and not made & set(p.parts)}


def test_an_sdist_holds_what_a_build_and_the_tests_need(distributions):
    with tarfile.open(distributions[0]) as archive:
        inside = {member.name.partition("/")[2] for member in archive if member.isfile()}
    folders = ("cmake", "csrc", "pelt_kernels", "python_tests", "benchmarks")
    wanted = {"CMakeLists.txt", "LICENSE", "Makefile", "README.md", "pyproject.toml", "setup.py"}
    wanted |= {path for folder in folders for path in files_in(folder)}
    assert {"csrc/bindings/module.cpp", "python_tests/conftest.py"} <= wanted
    assert not wanted - inside
    assert not [name for name in inside if name.endswith((".png", ".svg", ".so", ".pyc"))]
    assert not [name for name in inside if name.startswith("benchmarks/results/")]


def test_a_wheel_holds_the_package_and_its_data_alone(distributions):
    wheel = zipfile.ZipFile(distributions[1])
    metadata = Parser().parsestr(wheel.read(f"{STEM}.dist-info/METADATA").decode())
    assert metadata["Version"] == pelt_kernels.__version__
    assert metadata["Requires-Python"] == ">=3.10"
    assert {f"Programming Language :: Python :: 3.{minor}" for minor in range(10, 14)} <= set(
        metadata.get_all("Classifier")
    )
    names = set(wheel.namelist())
    assert {"pelt_kernels/py.typed", f"pelt_kernels/ops/{_forms.FILE.name}"} <= names
    assert {name.split("/")[0] for name in names} == {"pelt_kernels", f"{STEM}.dist-info"}


def test_mypy_sees_the_types_of_a_wheel(distributions, tmp_path):
    """In an environment that has the wheel alone, of whose dependencies nothing is asked here."""
    venv.create(tmp_path / "environment", symlinks=True)
    (site,) = (tmp_path / "environment").glob("lib/python*/site-packages")
    zipfile.ZipFile(distributions[1]).extractall(site)
    code = "import pelt_kernels\nreveal_type(pelt_kernels.LoraConfig(r=4).r)\n"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--cache-dir", tmp_path / "cache",
         "--python-executable", tmp_path / "environment/bin/python", "-c", code],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert 'Revealed type is "int"' in done.stdout.replace("builtins.", ""), done
    assert done.returncode == 0
