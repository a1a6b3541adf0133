"""The sheet of each kind of record."""

import contextlib
from collections.abc import Callable, Iterator

from .advised import advise_sheet
from .blocks import Sheet
from .compared import compare_sheet
from .kept import demo_sheet, view_sheet
from .layers import analyze_sheet
from .measured import forward_sheet, generation_sheet, scores_sheet
from .reading import Record
from .tuned import tune_sheet

_SHEETS: dict[str, Callable[[Record], Sheet]] = {
    "advise": advise_sheet,
    "analyze": analyze_sheet,
    "bench/encoder": forward_sheet,
    "bench/generation": generation_sheet,
    "compare": compare_sheet,
    "demo": demo_sheet,
    "eval/images": scores_sheet,
    "eval/vqa": scores_sheet,
    "tune": tune_sheet,
    "view": view_sheet,
}
_STRUCTURE = (
    KeyError,
    TypeError,
    IndexError,
    AttributeError,
    ValueError,
    ArithmeticError,
)  # of a field of another shape


def sheet_of(record: Record) -> Sheet:
    """The sheet of a record.

    Raises:
        ValueError: it does not have the fields of its kind.
    """
    with named(record):
        return _SHEETS[record.kind](record)


@contextlib.contextmanager
def named(*records: Record) -> Iterator[None]:
    """Says of an error about fields in which records it was found."""
    try:
        yield
    except _STRUCTURE as error:
        what = f"no field {error}" if isinstance(error, KeyError) else str(error)
        files = ", ".join(record.name for record in records)
        kinds = ", ".join(dict.fromkeys(record.kind for record in records))
        raise ValueError(
            f"{files}: not what a record of the kind {kinds} holds ({what}): write it again with this version of saint"
        ) from error
