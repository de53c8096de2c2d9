# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Put the families and the layers that they train into docs/pipelines.md: python docs/_tools/pipelines_page.py"""

import json
import sys
from pathlib import Path

from trl_marble.pipelines import FAMILIES, Family


ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "pipelines.md"
PARTS = ("families", "layers")
TINY_LEVEL = "tiny"
# Level -> pipeline class -> where and when it was reached. What reaches a level writes it here: a test, or a person.
LEVELS = Path(__file__).with_name("verified_levels.json")


def families_table() -> str:
    """`FAMILIES` as a Markdown table."""
    reached = levels()
    lines = ["| Pipeline class | Guidance | Verified | Notes |", "|---|---|---|---|"]
    for family in FAMILIES:
        verified = ", ".join(level for level, names in reached.items() if family.pipeline_class.__name__ in names)
        lines.append(f"| {_name(family)} | {_guidance(family)} | {verified or '-'} | {_notes(family)} |")
    return "\n".join(lines) + "\n"


def levels() -> dict[str, set[str]]:
    """
    Level of verification -> the classes that have reached it, the lowest level first: those that the tests have a tiny
    pipeline of, and those of verified_levels.json.
    """
    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from tiny_edits import TINY_EDITS
    from tiny_families import TINY
    from tiny_videos import TINY_VIDEOS

    higher = json.loads(LEVELS.read_text())
    return {TINY_LEVEL: {*TINY, *TINY_VIDEOS, *TINY_EDITS}} | {name: set(found) for name, found in higher.items()}


def layers_list() -> str:
    """
    The layers that a LoRA is put on, as a Markdown list: one line for all families that share them, those of most
    families last. A list, because regular expressions are too wide for a table, where `|` would have to be escaped.
    """
    sharing: dict[str, list[str]] = {}
    for family in FAMILIES:
        sharing.setdefault(_targets(family), []).append(_name(family))
    most = max(sharing, key=lambda targets: len(sharing[targets]))
    lines = [f"- {', '.join(names)}: {targets}" for targets, names in sharing.items() if targets != most]
    return "\n".join([*lines, f"- all others: {most}"]) + "\n"


def updated(page: str) -> str:
    """The page with table and list as they are now, each between its two marks."""
    for name, text in zip(PARTS, (families_table(), layers_list()), strict=True):
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"
        before, rest = page.split(begin)
        _, after = rest.split(end)
        page = f"{before}{begin}\n{text}\n{end}{after}"
    return page


def _name(family: Family) -> str:
    return f"`{family.pipeline_class.__name__}`"


def _guidance(family: Family) -> str:
    if family.guidance == "embedded":
        return "an input of the transformer"
    (argument, off), *_ = family.guidance_arguments(1.0).items()
    return (
        "classifier-free"
        if (argument, off) == ("guidance_scale", 1.0)
        else f"classifier-free; `{argument}={off:g}` is off"
    )


def _targets(family: Family) -> str:
    targets = family.lora_target_modules
    if isinstance(targets, str):
        return f"`{targets}` (a regular expression)"
    return ", ".join(f"`{name}`" for name in sorted(targets))


def _notes(family: Family) -> str:
    notes = []
    if family.output == "video":
        notes.append("makes videos")
    if family.takes_image != "no":
        notes.append("edits images" + (", or makes them from text alone" if family.takes_image == "optional" else ""))
    if family.encoded_names is None and family.takes_image != "required":
        notes.append("called with text: the text encoders run for every micro-batch")
    if family.one_time:
        notes.append("one time per call: slower, a call for each different time and a backward pass per reward")
    if family.checkpointing_fault is not None:
        notes.append("no gradient checkpointing")
    return "; ".join(notes)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
