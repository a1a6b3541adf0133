"""What measures, shows, loads by name and ships. It imports the core; the core imports none of it.

Needs more than torch and numpy: ``pip install ".[lab]"``, and the extras that its rooms name.
"""

from ..extras import require

for _name in ("PIL", "rich", "typer"):
    require(_name, "lab")
