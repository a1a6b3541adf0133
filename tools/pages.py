"""What the documentation needs besides its pages; mkdocs.yml names this file as a hook and as a griffe extension.

Pages: files of the repository that lie outside ``docs/`` become pages too, and links between files become links between pages.
Docstrings: Sphinx roles become code, "Example:" becomes a section, and the comment behind a field becomes its description.
"""

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
OUTSIDE = {
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "model-card.md": "evidence/MODEL_CARD.md",
}
_LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")
_FENCE = re.compile(r"(^```.*?^```)", re.DOTALL | re.MULTILINE)
_ROLE = re.compile(r":(?:class|func|meth|mod|attr):`~?([^`]+)`")
_COMMENT = re.compile(r"[^#]*#\s+(?!type:|noqa)(.+)$")


def on_files(files: Files, config: Any) -> Files:
    """Add the files outside ``docs/``."""
    for page, path in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they work in the repository, turned into those of the site."""
    source = PurePosixPath(OUTSIDE.get(page.file.src_uri, f"docs/{page.file.src_uri}"))
    pages = {path: name for name, path in OUTSIDE.items()}

    def target(found: re.Match[str]) -> str:
        path = os.path.normpath(source.parent / found[1])
        return pages.get(path, path.removeprefix("docs/"))

    parts = _FENCE.split(markdown)  # code blocks are at the odd places
    return "".join(part if i % 2 else _LINK.sub(target, part) for i, part in enumerate(parts))


class Docstrings(griffe.Extension):
    """Docstrings of the package as the reference page shows them."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            text = _ROLE.sub(r"`\1`", obj.docstring.value)
            obj.docstring.value = re.sub(r"^(\s*)Example:$", r"\1Examples:", text, flags=re.MULTILINE)
        elif obj.is_attribute and obj.parent is not None and obj.parent.is_class and obj.lines:
            comment = _COMMENT.match(obj.lines[0])
            if comment:
                obj.docstring = griffe.Docstring(comment[1], parent=obj)
