# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint folders: whole or absent, damage is found and named, the oldest go first."""

import json
from pathlib import Path

import pytest
from transformers.trainer_utils import get_last_checkpoint

from trl_marble.checkpoint.folder import (
    MANIFEST_FILE,
    CheckpointWriteError,
    DamagedCheckpointError,
    check_checkpoint,
    find_checkpoint,
    find_damage,
    prune_checkpoints,
    write_checkpoint,
)


CONTENT = {"weights.bin": bytes(range(256)) * 40, "images/0.txt": b"a picture", "empty": b""}


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_content(folder: Path, content: dict[str, bytes] = CONTENT) -> None:
    for name, data in content.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(data)


def save(output_dir: Path, step: int, content: dict[str, bytes] = CONTENT) -> Path:
    folder = output_dir / f"checkpoint-{step}"
    write_checkpoint(folder, lambda staged: write_content(staged, content), makes_folder=True)
    return folder


def names(output_dir: Path) -> list[str]:
    return sorted(path.name for path in output_dir.iterdir())


# ---- Writing ----


def test_a_checkpoint_holds_what_was_written_and_its_manifest(tmp_path) -> None:
    folder = save(tmp_path / "run", 3)
    files = files_of(folder)
    manifest = json.loads(files.pop(MANIFEST_FILE))
    assert files == CONTENT
    assert {name: entry["bytes"] for name, entry in manifest["files"].items()} == {
        n: len(d) for n, d in CONTENT.items()
    }
    assert find_damage(folder) is None
    assert names(tmp_path / "run") == ["checkpoint-3"]


def test_it_has_no_name_before_it_is_whole(tmp_path) -> None:
    def write(staged: Path) -> None:
        write_content(staged)
        assert names(tmp_path) == ["tmp-checkpoint-3"] and get_last_checkpoint(str(tmp_path)) is None

    write_checkpoint(tmp_path / "checkpoint-3", write, makes_folder=True)
    assert get_last_checkpoint(str(tmp_path)) == str(tmp_path / "checkpoint-3")


def test_what_killed_runs_left_is_removed_at_the_next_save(tmp_path) -> None:
    for leftover in ("tmp-checkpoint-2", "tmp-checkpoint-3", "tmp-old-checkpoint-1"):
        write_content((tmp_path / leftover).mkdir() or tmp_path / leftover, {"stale": b"x"})
    write_content(tmp_path, {"tmp-notes.txt": b"mine"})
    folder = save(tmp_path, 3)
    assert names(tmp_path) == ["checkpoint-3", "tmp-notes.txt"] and "stale" not in files_of(folder)


def test_an_earlier_checkpoint_of_that_name_is_replaced(tmp_path) -> None:
    save(tmp_path, 3, {"old": b"1"})
    folder = save(tmp_path, 3, {"new": b"2"})
    assert files_of(folder).keys() == {"new", MANIFEST_FILE} and names(tmp_path) == ["checkpoint-3"]


def test_a_write_that_fails_leaves_the_checkpoints_before_it_and_says_what_to_do(tmp_path) -> None:
    save(tmp_path, 2)

    def fails(staged: Path) -> None:
        write_content(staged)
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointWriteError) as caught:
        write_checkpoint(tmp_path / "checkpoint-4", fails, makes_folder=True)
    message = str(caught.value)
    for part in (str(tmp_path / "checkpoint-4"), "No space left on device", "MB are free", "`save_total_limit`"):
        assert part in message
    assert names(tmp_path) == ["checkpoint-2"] and find_damage(tmp_path / "checkpoint-2") is None


def test_a_mistake_in_what_is_written_keeps_its_type(tmp_path) -> None:
    with pytest.raises(ZeroDivisionError):
        write_checkpoint(tmp_path / "checkpoint-4", lambda staged: 1 / 0, makes_folder=True)  # type: ignore[arg-type]
    assert names(tmp_path) == []


def test_a_process_that_does_not_see_the_folder_says_so(tmp_path) -> None:
    with pytest.raises(CheckpointWriteError, match="that all nodes share, or set `save_on_each_node=True`"):
        write_checkpoint(tmp_path / "checkpoint-4", write_content, makes_folder=False)


# ---- Damage ----


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(folder: Path) -> None:
    for name in (*CONTENT, MANIFEST_FILE):
        (folder / name).unlink()
    (folder / "images").rmdir()


DAMAGE = {
    "truncated": (lambda f: (f / "weights.bin").write_bytes(b"abc"), "`weights.bin` has 3 bytes of 10,240"),
    "bit flip": (lambda f: flip_a_bit(f / "weights.bin"), "the content of `weights.bin` is not what was written"),
    "missing file": (lambda f: (f / "images/0.txt").unlink(), "`images/0.txt` is missing"),
    "empty": (empty, "it is empty"),
    "no manifest": (lambda f: (f / MANIFEST_FILE).unlink(), f"it has no `{MANIFEST_FILE}`"),
    "older layout": (
        lambda f: (f / MANIFEST_FILE).rename(f / "optimizer.pt"),
        "it is of a version before checkpoints had one, and holds pickles",
    ),
    "cut manifest": (lambda f: (f / MANIFEST_FILE).write_text('{"format_ver'), "cannot be read .JSONDecodeError"),
    "no list": (lambda f: (f / MANIFEST_FILE).write_text("[1]"), "cannot be read .TypeError"),
    "newer": (
        lambda f: (f / MANIFEST_FILE).write_text('{"format_version": 9, "files": {}}'),
        "has format 9, this version of trl_marble reads 1",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_and_passed_over(tmp_path, kind, caplog) -> None:
    break_it, message = DAMAGE[kind]
    for step in (2, 9, 10):
        save(tmp_path, step)
    break_it(tmp_path / "checkpoint-10")
    with pytest.raises(DamagedCheckpointError, match=message) as caught:
        check_checkpoint(tmp_path / "checkpoint-10")
    assert f"resume from `{tmp_path / 'checkpoint-9'}`, the latest valid one" in str(caught.value)
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-9"
    (warning,) = caplog.messages
    assert "Passed over: `checkpoint-10` (" in warning and str(find_damage(tmp_path / "checkpoint-10")) in warning


def test_whole_checkpoints_pass_in_silence(tmp_path, caplog) -> None:
    for step in (9, 10):
        save(tmp_path, step)
    write_content(tmp_path / "checkpoint-10", {"added-by-a-callback": b"x", "optimizer.pt": b"never read"})
    check_checkpoint(tmp_path / "checkpoint-10")
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-10" and caplog.messages == []


def test_a_write_that_was_cut_off_is_told_of(tmp_path, caplog) -> None:
    save(tmp_path, 2)
    write_content((tmp_path / "tmp-checkpoint-4").mkdir() or tmp_path / "tmp-checkpoint-4")
    assert find_checkpoint("latest", tmp_path) == tmp_path / "checkpoint-2"
    assert "`tmp-checkpoint-4` (it was not written to its end)" in caplog.messages[0]


def test_without_a_whole_checkpoint_there_is_an_error_with_what_was_found(tmp_path) -> None:
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint in `{folder}` to resume from. Leave out"):
            find_checkpoint("latest", folder)
    (save(tmp_path, 2) / "empty").unlink()
    with pytest.raises(FileNotFoundError, match="found: `checkpoint-2` .`empty` is missing.. Leave out"):
        find_checkpoint("latest", tmp_path)
    with pytest.raises(DamagedCheckpointError, match="there is no valid one beside it"):
        check_checkpoint(tmp_path / "checkpoint-2")
    with pytest.raises(FileNotFoundError, match="There is no folder `.*nowhere` to resume from. Pass the path of"):
        check_checkpoint(tmp_path / "nowhere")


# ---- Deleting ----


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, 4, [4, 9, 10, 12]),
        (0, 4, [4, 9, 10, 12]),
        (5, 4, [4, 9, 10, 12]),
        (3, 4, [4, 10, 12]),
        (2, 4, [4, 12]),
        (1, 4, [4, 12]),  # neither the newest nor the best
        (2, 10, [10, 12]),
        (1, 12, [12]),
    ],
)
def test_the_oldest_go_first_and_never_the_newest_or_the_best(tmp_path, limit, best, left) -> None:
    folders = {step: save(tmp_path, step) for step in (10, 9, 12, 4)}
    prune_checkpoints(tmp_path, limit, {folders[12], folders[best]})
    assert names(tmp_path) == sorted(f"checkpoint-{step}" for step in left)


@pytest.mark.parametrize("limit", [None, 1])
def test_deletions_that_were_cut_off_are_finished(tmp_path, limit) -> None:
    folder = save(tmp_path, 3)
    for leftover in ("tmp-checkpoint-2", "tmp-old-checkpoint-1"):
        write_content((tmp_path / leftover).mkdir() or tmp_path / leftover)
    prune_checkpoints(tmp_path, limit, {folder})
    assert names(tmp_path) == ["checkpoint-3"]


def test_only_checkpoints_are_deleted(tmp_path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step)
    for other in ("checkpoint-x", "checkpoint-1-kept", "my-checkpoint-1"):
        (tmp_path / other).mkdir()
    prune_checkpoints(tmp_path, 1, {tmp_path / "checkpoint-3"})
    assert names(tmp_path) == sorted(["checkpoint-3", "checkpoint-x", "checkpoint-1-kept", "my-checkpoint-1"])
