# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "torch", "diffusers", "transformers", "rich"]
# ///
"""The table of docs/gpu.md: what a step costs on a GPU, measured by one command in less than 8 minutes.

```bash
python examples/benchmarks/gpu_table.py
```

The transformer has the size of Stable Diffusion 3.5 Medium and random weights, images have 512 pixels, and the step is
the paper's in small: no download, no rewards that are models. There are five parts: the `machine`; the `costs` of a
step that sums its rewards, of one that balances them exactly, and of one with a backward pass for each reward; a
`profile` of the first step; the `memory`; and what is `computed` of it, for comparison. Each part is a process with a
time limit of its own. A part that fails does not stop the others. The results are in `results.json`, from which the
same command goes on with the parts that are not finished, and in `table.md`.

`--size tiny --device cpu` tries it without a GPU.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trl_marble.selftest.anonymous import anonymous


# What imports torch does so in the functions below: `--help` does not need it.

SECONDS = {"machine": 30, "costs": 220, "profile": 70, "memory": 70, "computed": 85}  # limits on a GPU; 475 in all
SIZES = ("tiny", "sd3.5m")
REWARDS = 5
# As few images as show what a pass takes; the ratios do not depend on their number.
STEP = "--prompts 2 --num_generations 8 --batch_size 8 --num_inference_steps 8 --timestep_fraction 0.25 --repeats 2"
TINY_STEP = (
    "--prompts 1 --num_generations 4 --batch_size 4 --num_inference_steps 2 --timestep_fraction 0.5 --repeats 1"
)
FIRST_STEP = "--prompts 1 --num_generations 8 --batch_size 8 --num_inference_steps 4 --timestep_fraction 0.25"
MODES = {
    "weighted_sum": "weighted sum",
    "exact": "exact balancing",
    "naive": "a backward pass for each reward",
}
OPERATIONS = 15
WAITS = ("Synchronize", "DtoH", "aten::_local_scalar_dense")  # in names of what waits for the device
GB = 1e9


# --------------------------------------------------------------------------------------------------------------------
# The parts; each runs in a separate process
# --------------------------------------------------------------------------------------------------------------------


def measure_machine(size: str, device: str) -> dict[str, Any]:
    """Versions and hardware."""
    import torch

    from trl_marble.cli.env import environment

    memory = torch.cuda.get_device_properties(device).total_memory / GB if device != "cpu" else None
    date = datetime.now(UTC).date().isoformat()
    return {"date": date, "device_memory_gb": memory, "environment": environment()}


def measure_costs(size: str, device: str) -> dict[str, Any]:
    """Time and memory of a step in each mode."""
    import step_cost
    from rich.console import Console

    words = [*(TINY_STEP if size == "tiny" else STEP).split(), "--model", size, "--device", device]
    args = step_cost.parse_args([*words, "--modes", *MODES])
    return step_cost.measure(args, REWARDS, Console(width=100))


def measure_memory(size: str, device: str) -> dict[str, float | str | None]:
    """Peak memory of each setting of the table in docs/scaling.md, in GB; on a GPU only."""
    import memory
    import torch

    measured: dict[str, float | str | None] = {}
    for name, setting in memory.settings_in_turn().items():
        measured[name] = None
        if device != "cpu" and not setting.nf4:  # which would need weights that are quantized
            try:
                measured[name] = memory.measure(memory.MODELS[size], setting, REWARDS, device) / GB
            except torch.OutOfMemoryError:
                measured[name] = "out of memory"
    return measured


def compute_memory(size: str, device: str) -> dict[str, float]:
    """What that table computes, in GB: on any machine, by its CPU."""
    import memory

    settings = memory.settings_in_turn()
    needs = memory.compute(memory.MODELS[size], list(settings.values()), REWARDS)
    return {name: need.peak / GB for name, need in zip(settings, needs, strict=True)}


def measure_profile(size: str, device: str) -> dict[str, Any]:
    """Where the time of the first step goes: its parts, its operations, and what waits for the device."""
    import step_cost
    from torch.profiler import ProfilerActivity, profile

    words = [*(TINY_STEP if size == "tiny" else FIRST_STEP).split(), "--model", size, "--device", device]
    with tempfile.TemporaryDirectory() as folder:
        bench = step_cost.Bench(step_cost.parse_args(words), REWARDS, folder)
        bench.switch(step_cost.MODES["exact"])
        activities = [ProfilerActivity.CPU, *([] if device == "cpu" else [ProfilerActivity.CUDA])]
        with profile(activities=activities) as recorded:
            first = _timed_step(bench)
        second = _timed_step(bench)
    events = recorded.key_averages()
    on_device = "self_cpu_time_total" if device == "cpu" else "self_device_time_total"
    total = sum(getattr(event, on_device) for event in events)
    largest = sorted(events, key=lambda event: getattr(event, on_device), reverse=True)[:OPERATIONS]
    waits = [event for event in events if any(word in event.key for word in WAITS)]
    return {
        "first": first,
        "second": second,
        "operations": [
            {"name": event.key, "calls": event.count, "share": getattr(event, on_device) / total} for event in largest
        ],
        "waits": [{"name": event.key, "calls": event.count} for event in waits],
    }


def _timed_step(bench: Any) -> dict[str, float]:
    """Seconds of a step and of its parts. To read them waits for the device."""
    times = bench.trainer.times
    times.clear()
    times.begin("step")
    bench.sample()
    bench.update(solves=True)
    times.end("step")
    return {name: seconds for name, seconds in times.flush().items() if name.startswith("time/")}


MEASURE: dict[str, Callable[[str, str], Any]] = {
    "machine": measure_machine,
    "costs": measure_costs,
    "profile": measure_profile,
    "memory": measure_memory,
    "computed": compute_memory,
}


# --------------------------------------------------------------------------------------------------------------------
# The table
# --------------------------------------------------------------------------------------------------------------------


def to_markdown(results: Mapping[str, Any]) -> str:
    """The results as a section of docs/gpu.md."""
    parts, size, device = results["parts"], results["size"], results["device"]
    content = {name: part["result"] for name, part in parts.items() if part["status"] == "done"}
    lines = []
    if "machine" in content:
        machine = content["machine"]
        about = machine["environment"]
        memory = "" if machine["device_memory_gb"] is None else f" with {machine['device_memory_gb']:.0f} GB"
        lines += [
            f"Measured on {machine['date']}: {about['accelerator']}{memory}, torch {about['torch']}, diffusers "
            f"{about['diffusers']}, trl_marble {about['trl_marble']}; `--size {size} --device {device}`.",
            "",
        ]
    if "costs" in content:
        base = content["costs"]["weighted_sum"]
        rows = [
            [
                MODES[mode],
                f"{row['update_seconds']:.2f}",
                f"{row['sampling_seconds']:.2f}",
                f"{row['update_ratio']:.2f}",
                f"{row['loop_ratio']:.2f}",
                f"{row['memory_bytes'] / GB:.2f}",
                f"{row['memory_bytes'] / base['memory_bytes']:.3f}",
                f"{row['forwards']:g}",
                f"{row['backwards']:g}",
            ]
            for mode, row in content["costs"].items()
        ]
        columns = ["update, s", "sampling, s", "update", "sampling + update", "peak, GB", "peak"]
        lines += _table(f"{REWARDS} rewards", [*columns, "forward passes", "backward passes"], rows)
    if "memory" in content:
        computed = content.get("computed", {})
        rows = [[name, _number(computed.get(name)), _number(own)] for name, own in content["memory"].items()]
        lines += _table("peak memory, GB", ["computed", "measured"], rows)
    if "profile" in content:
        first, second = content["profile"]["first"], content["profile"]["second"]
        rows = [[name.removeprefix("time/"), f"{first[name]:.3f}", f"{second[name]:.3f}"] for name in first]
        lines += _table("part of a step, s", ["first step", "second step"], rows)
        rows = [
            [f"`{row['name']}`", str(row["calls"]), f"{row['share']:.1%}"] for row in content["profile"]["operations"]
        ]
        lines += _table("operation of the first step", ["calls", "share of the time"], rows)
        rows = [[f"`{row['name']}`", str(row["calls"])] for row in content["profile"]["waits"]]
        lines += _table("what waits for the device in the first step", ["calls"], rows)
    lines += [f"The part `{name}` failed: {part['error']}" for name, part in parts.items() if part["status"] != "done"]
    return "\n".join(lines).rstrip() + "\n"


def _table(first: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [[first, *columns], ["---", *["--:" for _ in columns]], *rows]
    return [*(f"| {' | '.join(cells)} |" for cells in lines), ""]


def _number(value: float | str | None) -> str:
    return "–" if value is None else value if isinstance(value, str) else f"{value:.2f}"


# --------------------------------------------------------------------------------------------------------------------
# One after the other
# --------------------------------------------------------------------------------------------------------------------


def run_part(name: str, size: str, device: str) -> dict[str, Any]:
    """Measure one part in another process, which on a GPU is ended when its time is over."""
    start, limit = time.monotonic(), None if device == "cpu" else SECONDS[name]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "result.json")
        words = [sys.executable, __file__, "--size", size, "--device", device, "--part", name, str(file)]
        try:
            done = subprocess.run(words, stderr=subprocess.PIPE, text=True, timeout=limit)
            error = None if done.returncode == 0 else _last_line(done.stderr, done.returncode)
        except subprocess.TimeoutExpired:
            error = f"it was not done after {limit} s"
        seconds = round(time.monotonic() - start, 1)
        if error is not None:
            return {"status": "failed", "seconds": seconds, "error": error}
        return {"status": "done", "seconds": seconds, "result": json.loads(file.read_text(encoding="utf-8"))}


def _last_line(text: str, status: int) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return anonymous(lines[-1]) if lines else f"exit status {status}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="sd3.5m")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=MEASURE, default=list(MEASURE))
    parser.add_argument("--output_dir", type=Path, default=Path("runs/gpu"))
    parser.add_argument("--part", nargs=2, help=argparse.SUPPRESS)  # what this script calls itself with
    args = parser.parse_args()
    if args.part is not None:
        name, file = args.part
        Path(file).write_text(json.dumps(MEASURE[name](args.size, args.device)), encoding="utf-8")
        return
    import torch

    from trl_marble.evaluation.records import write_atomically

    if args.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("no GPU is visible; `--size tiny --device cpu` shows without one what this does")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    file = args.output_dir / "results.json"
    results: dict[str, Any] = {"size": args.size, "device": args.device, "parts": {}}
    if file.exists():
        results = json.loads(file.read_text(encoding="utf-8"))
        if (results["size"], results["device"]) != (args.size, args.device):
            raise SystemExit(
                f"{file} is of --size {results['size']} --device {results['device']}; give another --output_dir."
            )
    for name in args.parts:
        if results["parts"].get(name, {}).get("status") == "done":
            print(f"{name}: done before", flush=True)
            continue
        print(f"{name}: at most {SECONDS[name]} s on a GPU", flush=True)
        part = results["parts"][name] = run_part(name, args.size, args.device)
        print(f"{name}: {part['status']} after {part['seconds']:.0f} s {part.get('error', '')}", flush=True)
        write_atomically(file, json.dumps(results, indent=2).encode())
        write_atomically(args.output_dir / "table.md", to_markdown(results).encode())
    if any(results["parts"][name]["status"] != "done" for name in args.parts):
        raise SystemExit("Some parts failed; the same command tries them again.")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("Interrupted. The same command measures what is missing.") from None
