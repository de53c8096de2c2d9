# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Print the table of the demo in docs/shapeworld.md, and below it the evaluations of each run:

python docs/_tools/demo_table.py runs/demo runs/demo-1 runs/demo-2

The first folder is that of seed 42; the others are those of further seeds.
"""

import json
import sys
from pathlib import Path
from typing import Any


def main(folders: list[str]) -> None:
    first, *others = (json.loads(Path(folder, "report.json").read_text(encoding="utf-8")) for folder in folders)
    titles = [
        "reward",
        "before",
        "after",
        "change",
        "in standard errors",
        *(Path(folder).name for folder in folders[1:]),
    ]
    print_row(titles)
    print_row(["---", *["--:"] * (len(titles) - 1)])
    for name, reward in first["rewards"].items():
        before, after = (
            f"{reward[when]['mean']:.4f} ± {reward[when]['standard_error']:.4f}" for when in ("before", "after")
        )
        further = [f"{change(other, name)} ({ratio(other, name)})" for other in others]
        print_row([f"`{name}`", before, after, change(first, name), ratio(first, name), *further])
    for folder, report in zip(folders, (first, *others), strict=True):
        print(f"\n{folder}, {report['seconds']:.0f} s, gains in standard deviations:\n")
        print_row(["step", "KL", *first["rewards"], "worst", "mean", "all rose"])
        print_row(["--:"] * (5 + len(first["rewards"])))
        for each in report["evaluations"]:
            gains = [each["gains"][name] for name in first["rewards"]] + [each["worst"], each["mean"]]
            cells = [f"{gain['mean']:+.2f} ± {gain['standard_error']:.2f}" for gain in gains]
            print_row([str(each["step"]), f"{each['kl']['mean']:.3f}", *cells, f"{each['joint_gain']['mean']:.0%}"])


def change(report: dict[str, Any], name: str) -> str:
    return f"{report['rewards'][name]['change']['mean']:+.4f}"


def ratio(report: dict[str, Any], name: str) -> str:
    measured = report["rewards"][name]["change"]
    return f"{measured['mean'] / measured['standard_error']:+.1f}"


def print_row(cells: list[str]) -> None:
    print("| " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main(sys.argv[1:])
