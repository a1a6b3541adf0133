"""The command ``saint``."""

import sys

from .errors import MissingExtraError


def main() -> None:
    """Run the command line of the lab, or say what it lacks."""
    try:
        from .lab.cli import main
    except MissingExtraError as error:
        sys.exit(f"saint: {error}")
    main()


if __name__ == "__main__":
    main()
