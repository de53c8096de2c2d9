# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What TensorBoard, Weights & Biases and Trackio really keep of a run, read back from their files."""

import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest


WORKER = Path(__file__).parents[1] / "support" / "tracked_run.py"
HISTOGRAMS = {
    f"train/rewards/{name}/histogram{source}" for name in ("bright", "blue") for source in ("", "/even", "/odd")
}
# Name -> optimizer steps. Images come at least two steps apart; plots with the end of training.
EXPECTED = dict.fromkeys(HISTOGRAMS, [1, 3]) | {
    "train/images": [1, 3],
    "eval/images": [0, 3],
    "plots/balance": [3],
    "plots/rewards": [3],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tracked")
    own = {
        "HOME": str(folder / "home"),
        "TENSORBOARD_LOGGING_DIR": str(folder / "tensorboard"),
        "TRACKIO_DIR": str(folder / "trackio"),
        "WANDB_DIR": str(folder),
        "WANDB_MODE": "offline",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    result = subprocess.run(
        [sys.executable, str(WORKER), str(folder)], env=os.environ | own, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stderr
    return folder


@pytest.mark.slow
def test_tensorboard(folder):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(folder / "tensorboard"), size_guidance={"images": 0, "histograms": 0})
    found.Reload()
    steps = {name: [event.step for event in found.Images(name)] for name in found.Tags()["images"]}
    steps |= {name: [event.step for event in found.Histograms(name)] for name in found.Tags()["histograms"]}
    assert steps == EXPECTED
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2, 3]
    assert [event.step for event in found.Scalars("eval/drift/diversity")] == [0, 3]
    for event in range(2):  # the sources' histograms hold all of the reward's
        counts = [
            found.Histograms(f"train/rewards/bright/histogram{part}")[event].histogram_value.num
            for part in ("", "/even", "/odd")
        ]
        assert counts[0] == 4 == counts[1] + counts[2]


@pytest.mark.slow
def test_trackio(folder):
    pytest.importorskip("trackio")
    logs = json.loads((folder / "trackio.json").read_text())
    media = [row for row in logs if any("_type" in value for value in row.values() if isinstance(value, dict))]
    steps: dict[str, list[int]] = {}
    for row in media:
        for name, value in row.items():
            if isinstance(value, dict):
                kind = "trackio.histogram" if "histogram" in name else "trackio.image"
                assert value["_type"] == kind
                steps.setdefault(name, []).append(row["train/global_step"])
                assert kind == "trackio.histogram" or (folder / "trackio" / "media" / value["file_path"]).is_file()
    assert steps == EXPECTED
    assert [row["train/global_step"] for row in logs if "train/loss" in row] == [1, 2, 3]


@pytest.mark.slow
def test_wandb(folder):
    pytest.importorskip("wandb")
    (file,) = (folder / "wandb").glob("offline-run-*/run-*.wandb")
    steps: dict[str, list[int]] = {}
    for row in wandb_history(file):  # what is not a number is spread over several keys
        for name in (key.removesuffix("/_type") for key in row if key.endswith("/_type")):
            assert row[f"{name}/_type"] == ("histogram" if "histogram" in name else "image-file")
            steps.setdefault(name, []).append(row["train/global_step"])
            assert "histogram" in name or (file.parent / "files" / row[f"{name}/path"]).is_file()
    assert steps == EXPECTED
    assert [row["train/global_step"] for row in wandb_history(file) if "train/loss" in row] == [1, 2, 3]


def test_no_tracker_is_imported_for_a_run_that_reports_to_none():
    """Importing one takes seconds, and it may not be installed."""
    script = """
import sys
import trl_marble.trainer
assert not {"wandb", "trackio", "torch.utils.tensorboard"} & set(sys.modules), "imported"
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=300, capture_output=True)


def wandb_history(file: Path) -> list[dict]:
    """The logged rows of an offline run: protocol buffers in a log of LevelDB's format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, place, record, rows = file.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:  # no room for a header: the rest of the block is empty
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        part = data[place + 7 : place + 7 + length]
        place += 7 + length
        record = part if kind in (1, 2) else record + part  # whole, first; middle, last
        if kind in (1, 4):
            message = Record.FromString(record)
            if message.WhichOneof("record_type") == "history":
                items = [(item.key or "/".join(item.nested_key), item.value_json) for item in message.history.item]
                rows.append({key: json.loads(value) for key, value in items})
    return rows
