"""The pages as a site, as a browser sees them. `make docs` builds them and runs this."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

# The address of each kind of page, and what has to be read there: text that mkdocstrings wrote.
SEEN = {
    "index.html": "A PEFT model, accelerated",
    "docs/methods/lora/index.html": "numerator of the scale",
    "docs/operators/gated_adapter/index.html": "one member for the batch",
    "docs/model/index.html": "pelt_model.safetensors",
}
NARROW = 390  # pixels, a telephone's
# The page beside a frame of that width tells by how much the page in the frame is wider.
FRAME = """<iframe id=frame src="{}" width={} height=800></iframe><script>
frame.onload = () => setTimeout(() => {{
  const page = frame.contentDocument.documentElement;
  document.title = "wider by " + (page.scrollWidth - page.clientWidth);
}}, 500);
</script>"""


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest) -> Path:
    folder = request.config.getoption("--site")
    if not folder:
        pytest.skip("no site was named: make docs builds one and runs this")
    return Path(folder).resolve(strict=True)


def test_nothing_is_loaded_from_elsewhere(site: Path) -> None:
    """Links lead there; scripts, styles, pictures and fonts do not come from there."""
    for page in site.rglob("*.html"):
        text = page.read_text()
        assert not re.findall(r"<(?:script|img|iframe)[^>]+src=\"?(?:https?:)?//[^ >]+", text), page
        for link in re.findall(r"<link[^>]+>", text):
            assert "canonical" in link or not re.search(r"href=\"?(?:https?:)?//", link), page
    for style in site.rglob("*.css"):
        assert not re.search(r"(?:@import|url\()[ \"']*(?:https?:)?//", style.read_text()), style


def test_links_lead_somewhere(site: Path) -> None:
    """Also those to folders, of which mkdocs knows nothing."""
    for page in site.rglob("index.html"):
        for link in set(re.findall(r"<a [^>]*href=\"?([^\"#> ]+)", page.read_text())):
            if "://" not in link:
                target = page.parent / link
                assert (target / "index.html" if target.is_dir() else target).is_file(), (
                    page,
                    link,
                )


@pytest.mark.parametrize("address", SEEN)
def test_a_page_shows_its_text_and_fits_a_narrow_screen(
    site: Path, address: str, tmp_path: Path
) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on PATH")
    assert SEEN[address] in (site / address).read_text()
    outer = tmp_path / "outer.html"
    outer.write_text(FRAME.format((site / address).as_uri(), NARROW))
    done = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={tmp_path / 'profile'}", "--virtual-time-budget=5000", "--dump-dom",
         outer.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert "<title>wider by 0</title>" in done.stdout
