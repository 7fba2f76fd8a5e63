"""What mkdocs reads: the repository's pages, the pictures in them, and the source files that they
link to, each at its place in the repository.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[2]
PAGES = ("*.md", "docs/**/*.md", "benchmarks/results/*.md")
PICTURES = (".png", ".svg")


def on_files(files: Files, config: Any) -> Files:
    """Adds them to what mkdocs found itself, which is the style sheet."""
    pages = [path for pattern in PAGES for path in ROOT.glob(pattern)]
    linked = {target for page in pages for target in _targets(page)}
    for path in sorted({*pages, *linked}):
        name = path.relative_to(ROOT).as_posix()
        file = File.generated(config, name, abs_src_path=str(path))
        if path.suffix not in (".md", *PICTURES):
            file.dest_uri += ".txt"  # which a browser shows and does not save
        files.append(file)
    return files


def _targets(page: Path) -> set[Path]:
    """The files of the repository that a page links to."""
    found = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    paths = {(page.parent / target).resolve() for target in found}
    return {path for path in paths if path.is_file() and ROOT in path.parents}
