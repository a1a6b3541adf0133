"""The documentation site: every page is in it, it builds without warnings, and it asks nobody for anything."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import saint
from saint.lab.cli import COMMANDS

ROOT = Path(__file__).parents[2]
CONFIG = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
needs_mkdocs = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("mkdocs", "material", "mkdocstrings")),
    reason="mkdocs, mkdocs-material or mkdocstrings is not installed: `make docs` installs the extra docs",
)


def pages(entry: object) -> list[str]:
    """File names of a (part of a) navigation, in order."""
    if isinstance(entry, str):
        return [entry]
    return [page for part in (entry.values() if isinstance(entry, dict) else entry) for page in pages(part)]


def test_the_navigation_names_every_page():
    outside = ["changelog.md", "contributing.md", "model-card.md"]  # tools/pages.py brings them
    found = [path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")]
    assert sorted(pages(CONFIG["nav"])) == sorted([*found, *outside])


def test_nothing_is_fetched_by_configuration():
    assert CONFIG["theme"]["font"] is False
    assert CONFIG["strict"] is True
    assert not [url for url in CONFIG.get("extra_css", []) + CONFIG.get("extra_javascript", []) if "//" in url]


def test_the_reference_names_the_public_surface():
    named = re.findall(r"^::: (\S+)", (ROOT / "docs" / "reference.md").read_text(), re.MULTILINE)
    members = set(
        re.findall(r"\w+", " ".join(re.findall(r"members: \[(.*)\]", (ROOT / "docs" / "reference.md").read_text())))
    )
    errors = {name for name in dir(saint) if name.endswith("Error")}  # all of them, by their module
    modules = {"__version__", "graph", "methods", "testing", "plan"}
    assert {f"saint.{name}" for name in set(dir(saint)) - modules - errors} <= set(named)
    assert {f"saint.methods.{saint.methods.get(name).__name__}" for name in saint.methods.names()} <= {
        *named,
        "saint.methods.Saint",
        "saint.methods.SaintFullGraph",
    }
    assert "saint.errors" in named
    assert set(saint.testing.__all__) - {"CONTRACTS", "Inputs", "tensors"} <= members


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src"), "http_proxy": "", "https_proxy": ""},
    )
    assert done.returncode == 0, done.stderr
    return folder


@needs_mkdocs
def test_the_site_builds_strictly(site):
    for page in pages(CONFIG["nav"]):
        assert (site / page).with_suffix(".html").stat().st_size > 1000, page


@needs_mkdocs
def test_pages_load_nothing_from_elsewhere(site):
    """Links may lead away; scripts, styles, fonts and pictures may not come from there."""
    elsewhere = re.compile(
        r"""<(?:script|img|iframe|source|video)\b[^>]*\bsrc=["']?(?:https?:)?//[^>]*>"""
        r"""|<link\b(?![^>]*rel=["']?(?:canonical|next|prev))[^>]*\bhref=["']?(?:https?:)?//[^>]*>"""
    )
    for page in site.rglob("*.html"):
        assert not elsewhere.findall(page.read_text()), page.name
    for style in site.rglob("*.css"):
        assert not re.findall(r"""(?:url\(|@import )["']?(?:https?:)?//[^)]*""", style.read_text()), style.name


@needs_mkdocs
def test_docstrings_read_as_pages(site):
    text = (site / "reference.html").read_text()
    assert not re.findall(r":(?:class|func|meth|attr):", text)
    assert 'id="saint.Saint.threshold"' in text, "the comment behind a field is its description"
    assert "cosine from which two tokens count as similar" in text
    assert not re.findall(r"<b><code><span title=[^>]*>[^<]*,", text), (
        "an entry describes several names: give each a line"
    )
    assert not re.findall(r"&gt;&gt;&gt; </p>|<blockquote>\s*<blockquote>", text), "an example is shown as a quotation"


def test_the_command_line_page_has_every_command_with_an_example():
    sections = re.split(r"^## saint ", (ROOT / "docs" / "cli.md").read_text(), flags=re.MULTILINE)[1:]
    found = {section.split("\n", 1)[0]: section for section in sections}
    assert len(sections) == len(found), "a section is there twice"
    assert sorted(found) == sorted(COMMANDS)
    for name, section in found.items():
        assert re.search(rf"^```bash\n(?:.*\n)*?saint {name}\b", section, re.MULTILINE), name
