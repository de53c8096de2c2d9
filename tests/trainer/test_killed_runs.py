# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Runs that are killed (SIGKILL) at any moment and started again end bit for bit as one that never was.

Killed while sampling, scoring, updating, writing a checkpoint, between the last byte of it and its name, while older
ones are deleted, and while the Hub is receiving a commit.
"""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from local_hub import LocalHub, local_hub
from safetensors.torch import load_file

from trl_marble.checkpoint.tensor_tree import load_tree


NURSERY = Path(__file__).parents[1] / "support" / "killed_run.py"
ADAPTER = "pytorch_lora_weights.safetensors"


class KillOnCommit(list):
    """The requests that a Hub has received; one of them, before it is answered, kills the run that sent it."""

    def __init__(self) -> None:
        super().__init__()
        self.run: Run | None = None
        self.number = 0

    def append(self, request: Any) -> None:
        super().append(request)
        if self.run is not None and "/commit/" in request[1]:
            self.number -= 1
            if self.number == 0:
                self.run.kill()


class Run:
    """One process of a run."""

    def __init__(self, nursery: subprocess.Popen, folder: Path, steps: int, kill_at: list | None = None) -> None:
        request = {"folder": str(folder), "steps": steps, "kill_at": kill_at, "log": f"{folder}.log"}
        print(json.dumps(request), file=nursery.stdin, flush=True)
        self.nursery, self.folder = nursery, folder
        self.pid: int | None = int(nursery.stdout.readline())
        self.lock = threading.Lock()
        self.ended = threading.Event()

    def kill(self) -> None:
        with self.lock:
            if self.pid is not None:
                os.kill(self.pid, signal.SIGKILL)

    def kill_later(self, seconds: float) -> threading.Thread:
        """Kill it some time after training began, in a thread that ends with the run."""

        def wait_and_kill() -> None:
            while not (self.folder / "resumed.txt").exists() and not self.ended.wait(0.01):
                pass
            self.ended.wait(seconds)
            self.kill()

        thread = threading.Thread(target=wait_and_kill)
        thread.start()
        return thread

    def wait(self) -> int:
        """The exit status; minus the signal's number where one ended it."""
        status = int(self.nursery.stdout.readline())
        with self.lock:
            self.pid = None
        self.ended.set()
        assert status in (0, -signal.SIGKILL), Path(f"{self.folder}.log").read_text()
        return status


@contextmanager
def nursery(hub: LocalHub, home: Path) -> Iterator[subprocess.Popen]:
    command = [sys.executable, str(NURSERY)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=hub.environment(home), **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.stdin.close()


def latest_valid_step(folder: Path) -> int:
    """The step of the newest checkpoint whose files have the sizes and digests of its manifest; 0 without one."""
    steps = [0]
    for checkpoint in folder.glob("checkpoint-*"):
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        contents = {name: (checkpoint / name).read_bytes() for name in files}
        assert {ADAPTER, "marble_state.safetensors", "optimizer.safetensors"} <= files.keys()
        for name, content in contents.items():
            digest = hashlib.blake2b(content, digest_size=16).hexdigest()
            assert files[name] == {"bytes": len(content), "blake2b": digest}, f"{checkpoint}: {name}"
        steps.append(int(checkpoint.name.split("-")[1]))
    return max(steps)


def final_tensors(folder: Path, steps: int) -> dict[str, Any]:
    """All four sets of a run (current, old, average, balance) and its optimizer's moments."""
    checkpoint = folder / f"checkpoint-{steps}"
    tensors = load_file(checkpoint / "marble_state.safetensors")
    assert {name.split("/")[0] for name in tensors} == {"current", "old", "average", "balance"}
    for number, moments in load_tree(checkpoint / "optimizer.safetensors")["state"].items():
        tensors |= {f"optimizer/{number}/{name}": value for name, value in moments.items()}
    return tensors


def assert_same_end(folder: Path, reference: Path, steps: int, hub: LocalHub) -> None:
    tensors, expected = final_tensors(folder, steps), final_tensors(reference, steps)
    assert tensors.keys() == expected.keys() and len(expected) > 100
    for name, tensor in tensors.items():
        assert tensor.numpy().tobytes() == expected[name].numpy().tobytes(), name
    adapter = (reference / ADAPTER).read_bytes()
    assert (folder / ADAPTER).read_bytes() == adapter
    assert sorted(path.name for path in folder.glob("*checkpoint-*")) == [
        f"checkpoint-{step}" for step in sorted((steps - 1, steps), key=str)
    ]
    published = hub.files[f"me/{folder.name}"]
    assert published[ADAPTER] == adapter
    for path in (folder / f"checkpoint-{steps}").iterdir():
        assert published[f"last-checkpoint/{path.name}"] == path.read_bytes(), path.name


def kill_and_restart(tmp_path: Path, plan: list[tuple[str, float]], steps: int) -> Counter[str]:
    """
    Kill runs by a plan, one start an entry, until it is through, and compare each run's end with the reference.

    Args:
        tmp_path (`Path`):
            An empty folder.
        plan (`list[tuple[str, float]]`):
            When to kill: a moment's name and the how manieth time; or `"after"` and so many seconds of training.
        steps (`int`):
            Optimizer steps of a run. Runs that end before the plan does are followed by others.

    Returns:
        `Counter[str]`: How many runs were killed in each moment.
    """
    killed: Counter[str] = Counter()
    with local_hub() as hub, nursery(hub, tmp_path / "home") as process:
        hub.requests = requests = KillOnCommit()
        assert Run(process, tmp_path / "reference", steps).wait() == 0
        plan, number = list(plan), 0
        while plan:
            number += 1
            folder, before = tmp_path / f"run-{number}", 0
            while True:
                kind, when = plan.pop(0) if plan else ("never", 0)
                targeted = kind not in ("after", "push", "never")
                (folder / "resumed.txt").unlink(missing_ok=True)
                run = Run(process, folder, steps, [kind, int(when)] if targeted else None)
                if kind == "push":
                    requests.run, requests.number = run, int(when)
                killer = run.kill_later(when) if kind == "after" else None
                status = run.wait()
                requests.run = None
                if killer is not None:
                    killer.join()
                if (folder / "resumed.txt").exists():
                    assert int((folder / "resumed.txt").read_text()) == before, f"after {killed}"
                if status == 0:
                    break
                moment = (folder / "moment.txt").read_text().strip() if (folder / "moment.txt").exists() else ""
                killed["push" if kind == "push" else moment or "start"] += 1
                whole = latest_valid_step(folder)
                assert whole >= before, f"step {before} was lost in {moment}"
                before = whole
            assert_same_end(folder, tmp_path / "reference", steps, hub)
    return killed


MOMENTS = ("rollout", "rewards", "update", "write", "rename", "prune", "delete", "push")


@pytest.mark.slow
def test_a_run_that_is_killed_ends_as_one_that_never_was(tmp_path) -> None:
    plan = [("rename", 2), ("update", 1)]
    killed = kill_and_restart(tmp_path, plan, steps=3)
    assert killed == Counter(moment for moment, _ in plan)


@pytest.mark.slow
def test_fifty_kills_lose_nothing(tmp_path) -> None:
    random_ = random.Random(0)
    plan = [(moment, random_.randint(1, 3)) for moment in MOMENTS for _ in range(3)]
    plan += [("after", random_.uniform(0, 3)) for _ in range(26 + 10)]  # some come after the end of a run
    random_.shuffle(plan)
    killed = kill_and_restart(tmp_path, plan, steps=16)
    print(f"killed {killed.total()} times: {dict(killed)}")
    assert killed.total() >= 50 and set(killed) >= set(MOMENTS), killed
