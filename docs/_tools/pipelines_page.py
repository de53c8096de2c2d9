# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Put the table of families into docs/pipelines.md: python docs/_tools/pipelines_page.py"""

from pathlib import Path

from trl_marble.pipelines import FAMILIES, Family


PAGE = Path(__file__).resolve().parents[1] / "pipelines.md"
BEGIN, END = "<!-- families: begin -->\n", "<!-- families: end -->\n"


def families_table() -> str:
    """`FAMILIES` as a Markdown table."""
    lines = ["| Pipeline class | Guidance | LoRA on | To know |", "|---|---|---|---|"]
    lines += [
        f"| `{family.pipeline_class.__name__}` | {_guidance(family)} | {_targets(family)} | {_notes(family)} |"
        for family in FAMILIES
    ]
    return "\n".join(lines) + "\n"


def updated(page: str) -> str:
    """The page with the table as it is now between its two marks."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{families_table()}\n{END}{after}"


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
        return "`" + targets.replace("|", "\\|") + "`"
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
        notes.append("one time a call: slower, a call for each different time and a backward pass a reward")
    if family.checkpointing_fault is not None:
        notes.append("no gradient checkpointing")
    return "; ".join(notes)


if __name__ == "__main__":
    PAGE.write_text(updated(PAGE.read_text()))
