"""Plans as users give them on a command line."""

from ..plan import Plan


def read_plan(text: str) -> Plan:
    """The plan that ``text`` is, names or holds: :meth:`saint.Plan.load` of text."""
    return Plan.load(text)
