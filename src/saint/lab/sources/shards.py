"""Tar shards in the webdataset layout: members of one sample are neighbours that share the name up to the first dot."""

import tarfile
from pathlib import Path
from typing import NamedTuple

from .listing import Left, known, printable


class Member(NamedTuple):
    """A file inside a shard; it is read in place."""

    name: str
    offset: int  # bytes from the start of the shard
    size: int  # bytes


def groups(shard: Path, left: Left) -> tuple[dict[str, dict[str, Member]], str | None]:
    """The samples of an uncompressed shard: by key, then by lower-case ending ("jpg", "cls").

    Args:
        shard: the file.
        left: gets members that are of no sample: reason -> names.

    Returns:
        The samples, and why the shard could not be read to its end; None where it could.

    Raises:
        OSError: the file cannot be read.
    """
    found: dict[str, dict[str, Member]] = {}
    try:
        with tarfile.open(shard, "r:") as tar:  # members are read in place: not compressed
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, ending = base.partition(".")
                name = printable(member.name)
                if member.isdir():
                    continue
                if not member.isfile() or not stem or not ending:
                    why = "no plain file" if not member.isfile() else "no ending" if stem else "hidden"
                    left.setdefault(f"{why}, in a shard", []).append(f"{printable(shard.name)}/{name}")
                    continue
                key = printable(f"{folder}/{stem}".lstrip("./"))
                found.setdefault(key, {})[ending.lower()] = Member(name, member.offset_data, member.size)
    except tarfile.TarError as error:
        return found, f"not a complete, uncompressed .tar file: {error}"
    return found, None


def picture(members: dict[str, Member]) -> Member | None:
    """The image among the members of a sample, if there is one."""
    return next((members[ending] for ending in members if f".{ending}" in known()), None)


def contents(shard: Path, member: Member) -> bytes:
    """What a member holds.

    Raises:
        ValueError: the shard ends inside it.
        OSError: the shard cannot be read.
    """
    with shard.open("rb") as file:
        file.seek(member.offset)
        data = file.read(member.size)
    if len(data) < member.size:
        raise ValueError(f"the shard ends inside {member.name}")
    return data
