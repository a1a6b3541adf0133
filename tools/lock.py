"""Write constraints.txt: names and versions of what is installed here, for anybody to install the same.

    python tools/lock.py

Only names and versions, never where a package came from. What torch itself fixes (its CUDA libraries) is left to torch.
"""

import importlib.metadata
from pathlib import Path

from packaging.utils import canonicalize_name
from packaging.version import Version

PATH = Path(__file__).parents[1] / "constraints.txt"
TORCHS = ("nvidia-", "cuda-", "triton")
OURS = {"saint-vlm", "pip", "setuptools"}
HEAD = """\
# The versions that the whole suite has passed on together; `make setup` installs them.
# After `make setup CONSTRAINTS=` (whatever the index has) and a green `make test`, `make lock` writes this file anew.
"""


def main() -> None:
    lines = []
    for distribution in importlib.metadata.distributions():
        name = distribution.metadata["Name"]
        if canonicalize_name(name) not in OURS and not canonicalize_name(name).startswith(TORCHS):
            lines.append(f"{name}=={Version(distribution.version).public}")  # without a local part such as +cpu
    PATH.write_text(HEAD + "\n".join(sorted(set(lines), key=str.lower)) + "\n")


if __name__ == "__main__":
    main()
