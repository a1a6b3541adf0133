"""Plans as users give them: JSON, a file, or the name of a recipe."""

import json
from pathlib import Path

from ..plan import Plan
from ..presets import recipe


def read_plan(text: str) -> Plan:
    """The plan that ``text`` is (JSON), is in (a ``.json`` file) or names (a recipe).

    Raises:
        ValueError: none of these.
        OSError: the file cannot be read.
    """
    text = text.strip()
    if text.endswith(".json"):
        return Plan.from_json(Path(text).read_text(encoding="utf-8"))
    if text.startswith(("{", "[")) or _is_json(text):
        return Plan.from_json(text)
    return recipe(text)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True  # 5, null or "text": no plan, and no recipe either
