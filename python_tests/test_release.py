"""What a release refuses before any work, and what it records; what an installation check refuses."""

from __future__ import annotations

import datetime
import subprocess
from pathlib import Path

import install_check
import pytest
import release
import yaml

ROOT = Path(__file__).resolve().parents[1]
CHANGELOG = "# Changelog\n\n## 1.2.0, unreleased\n\n### Operators\n\n- One more.\n\n## 1.1.0, 2026-01-02\n\n- Old.\n"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "Someone")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "someone@example.org")
    (tmp_path / "pelt_kernels").mkdir()
    (tmp_path / "pelt_kernels" / "_version.py").write_text('__version__ = "1.2.0"\n')
    (tmp_path / "CHANGELOG.md").write_text(CHANGELOG)
    subprocess.run(["git", "init", "--quiet", tmp_path], check=True)
    commit(tmp_path)
    return tmp_path


def commit(folder):
    release.git(folder, "add", "--all")
    release.git(folder, "commit", "--quiet", "--message", "All")


def change(folder, old, new):
    (folder / "CHANGELOG.md").write_text(CHANGELOG.replace(old, new))


def refused(folder, capsys):
    head = release.git(folder, "rev-parse", "HEAD")
    assert release.main([], folder) == 1
    assert release.git(folder, "rev-parse", "HEAD") == head and not (folder / "dist").exists()
    out, err = capsys.readouterr()
    assert not out and err.startswith("release: ") and err.count("\n") == 1
    return err


def test_a_checkout_with_changes_is_refused(repository, capsys):
    (repository / "new.txt").write_text("x")
    assert "expected a clean checkout, got 1 changes" in refused(repository, capsys)


def test_a_version_with_a_tag_is_refused(repository, capsys):
    release.git(repository, "tag", "v1.2.0")
    assert "got 1.2.0, which v1.2.0 is of; raise it in" in refused(repository, capsys)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("- One more.\n", "", "expected what has changed in 1.2.0"),
        ("1.2.0, unreleased", "1.2.0, 2026-02-03", "expected '## 1.2.0, unreleased'"),
    ],
)
def test_an_empty_section_is_refused(repository, capsys, old, new, sentence):
    change(repository, old, new)
    commit(repository)
    assert sentence in refused(repository, capsys)


def test_a_dry_run_changes_nothing(repository, capsys):
    assert release.main(["--dry-run"], repository) == 0
    assert "make the tag v1.2.0" in capsys.readouterr().out
    assert not release.git(repository, "status", "--porcelain")
    assert not release.git(repository, "tag")


@pytest.mark.parametrize("works", [True, False])
def test_only_what_works_is_recorded(repository, monkeypatch, capsys, works):
    """Without the build and the environments, which take minutes."""
    heading = f"## 1.2.0, {datetime.date.today().isoformat()}\n"

    def distributions(source, folder):
        assert heading in (source / "CHANGELOG.md").read_text()
        folder.mkdir()
        (folder / "a.whl").write_text("x")
        return [folder / "a.whl"]

    monkeypatch.setattr(release, "distributions", distributions)
    monkeypatch.setattr(install_check, "main", lambda files: 0 if works else 1)
    assert release.main([], repository) == (0 if works else 1)
    if works:
        assert heading in release.git(repository, "show", "v1.2.0:CHANGELOG.md")
        assert release.git(repository, "status", "--porcelain") == "?? dist/\n"
    else:
        assert "what was built of 1.2.0 does not work" in capsys.readouterr().err
        assert not release.git(repository, "status", "--porcelain", "--ignored")
        assert not release.git(repository, "tag")


@pytest.mark.checkout
def test_the_changelog_has_a_section_of_this_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert f"## {release.version_of(ROOT)}, " in text


@pytest.mark.parametrize(
    ("name", "size", "sentence"),
    [
        ("none.whl", None, "there is no such file"),
        ("a.zip", 1, "ends in .whl or .tar.gz, got a.zip"),
        ("a.whl", install_check.MOST_BYTES["wheel"] + 1, "expected at most 10,000,000 bytes"),
    ],
)
def test_an_installation_is_refused_before_any_work(name, size, sentence, tmp_path, capsys):
    if size is not None:
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    assert install_check.main([str(tmp_path / name)]) == 1
    assert sentence in capsys.readouterr().err


def test_wheels_are_repaired_in_one_way():
    assert (
        f"auditwheel repair {' '.join(release.REPAIR)} -w" in (ROOT / "pyproject.toml").read_text()
    )


@pytest.mark.checkout
def test_the_hosted_workflows_run_what_is_there():
    jobs = {
        path.name: yaml.safe_load(path.read_text())["jobs"]
        for path in (ROOT / ".github" / "workflows").iterdir()
    }
    said = {
        name: [step.get("run", step.get("uses")) for job in of.values() for step in job["steps"]]
        for name, of in jobs.items()
    }
    assert "bash .ci/run" in said["ci.yml"]
    assert any("cibuildwheel" in step for step in said["wheels.yml"])
