"""Section of `saint advise`: what the pictures are like, what each lever reached, and which to take."""

from collections.abc import Mapping
from typing import Any

from .blocks import Block, Cell, PlanBox, Sheet, Table, Text
from .reading import Record
from .told import conditions, skipped
from .words import interval, number


def advise_sheet(record: Record) -> Sheet:
    """`saint advise`."""
    data = record.data
    kept = any("agreement" in lever for lever in data["levers"])
    measure = "agreement with the unpruned output" if kept else f"{data['measure']} (lower is better)"
    rows = [_row(lever, "agreement" if kept else "loss", data["advice"]) for lever in data["levers"]]
    missing = [f"{one['name']}: {one['why']}" for one in data["levers"] if one["plan"] is None]
    blocks: list[Block | None] = [
        Text(_pictures(data["pictures"])),
        Table(
            ["lever", "share of the FLOPs left", measure, ""],
            rows,
            "Each lever on the same pictures, mean [95 % interval]",
        ),
        Text("Not possible here: " + "; ".join(missing)) if missing else None,
        None if data["plan"] is None else PlanBox(data["plan"], name=data["advice"], file="plan.json"),
        skipped(record),
    ]
    asked = f"What should be done first to leave {number(100 * data['target'], 1)} % of the FLOPs of {data['model']}?"
    more = {"images": f"{data['pictures']['count']}" + (f" ({data['set']})" if data.get("set") else "")}
    return Sheet(f"Advice: {data['model']}", asked, _verdict(data), conditions(record, **more), blocks)


def _row(lever: Mapping[str, Any], shown: str, taken: str) -> list[Any]:
    if lever["plan"] is None:
        return [lever["name"], "-", "-", "not possible"]
    value = lever[shown]
    text = interval(value["mean"], value["low"], value["high"], 4)
    share = Cell(f"{number(100 * lever['flops'], 1)} %", lever["flops"])
    return [lever["name"], share, Cell(text, value["mean"]), "take this" if lever["name"] == taken else ""]


def _pictures(pictures: Mapping[str, Any]) -> str:
    """Describe the pictures in a sentence."""
    said = [f"{pictures['count']} pictures"]
    if pictures["tokens"] is not None:
        said[0] += f" of {number(pictures['tokens'], 0)} patches or squares of patches"
    if pictures["copies"] is not None:
        said.append(f"{number(100 * pictures['copies'], 1)} % of these are exact copies of others")
    if pictures["flat"] is not None:
        said.append(f"{number(100 * pictures['flat'], 1)} % could leave as parts of blocks of one colour")
    if pictures["detail"] is not None:
        kind = "like pages of text" if pictures["fine"] else "like photographs"
        said.append(f"fine detail {number(pictures['detail'], 2)}, {kind}")
    return "; ".join(said) + "."


def _verdict(data: Mapping[str, Any]) -> str:
    taken = next(lever for lever in data["levers"] if lever["name"] == data["advice"])
    what = f"Take {data['advice']}: {number(100 * taken['flops'], 1)} % of the FLOPs are left"
    if "agreement" in taken:
        what += f", agreement {number(taken['agreement']['mean'], 4)}"
    what += "."
    if not data["reached"]:
        what += f" No lever leaves {number(100 * data['target'], 1)} %."
    copies = next((lever for lever in data["levers"] if lever["name"] == "duplicates"), None)
    if data["copies"] and copies is not None and copies is not taken:
        saved = number(100 * (1 - copies["flops"]), 1)
        what += f" Drop copies first: that alone saves {saved} % and loses less than half as much."
    return what
