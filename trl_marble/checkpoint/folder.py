# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Checkpoint folders: written completely or not at all, checked before they are read, deleted oldest first."""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Collection
from pathlib import Path

from accelerate.utils import gather_object
from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging


logger = logging.get_logger(__name__)

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 1
# Neither is taken for a checkpoint, by this module or by `transformers`.
UNFINISHED = "tmp-"  # before the name of a folder that is being written
DISCARDED = "tmp-old-"  # before that of one that is being deleted


class DamagedCheckpointError(ValueError):
    """A folder is no checkpoint as it was written. The message says what is wrong, and what to resume from instead."""


class CheckpointWriteError(OSError):
    """A checkpoint could not be written. Those before it are as they were."""


def check_writable(folder: Path) -> None:
    """
    Make a run's output folder, and see that files can be made in it.

    Args:
        folder (`Path`):
            The folder.

    Raises:
        `OSError`: If it cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(
            f"The output folder `{folder}` cannot be written ({error}); pass another `output_dir` to `MarbleConfig`."
        ) from error


# ---- Writing ----


def write_checkpoint(folder: Path, write_files: Callable[[Path], None], makes_folder: bool) -> None:
    """
    Write a checkpoint that is there under its name only when it is complete, however the run may end meanwhile.

    All files go to a folder beside it, then their sizes and digests, and all of it to the disk; then the folder gets
    its name. What earlier writes left unfinished is removed. To be called by all processes.

    Args:
        folder (`Path`):
            The checkpoint, `<output_dir>/checkpoint-<step>`. An earlier one of that name is replaced.
        write_files (`Callable[[Path], None]`):
            Writes this process's files to the folder that it is given.
        makes_folder (`bool`):
            Whether this process makes the folder and gives it its name: one a file system.

    Raises:
        [`CheckpointWriteError`]: On all processes, if any of them could not write. Nothing is left of the attempt.
    """
    staged = folder.with_name(UNFINISHED + folder.name)
    try:
        _on_all_processes(folder, lambda: _make_empty(staged) if makes_folder else None)
        _on_all_processes(folder, lambda: _fill(staged, write_files))
        _on_all_processes(folder, lambda: _finish(staged, folder) if makes_folder else None)
    except Exception:
        if makes_folder:
            shutil.rmtree(staged, ignore_errors=True)
        raise


def _on_all_processes(folder: Path, action: Callable[[], None]) -> None:
    """Do something on all processes; where it fails on one, raise on all, so that none waits for another for ever."""
    error = None
    try:
        action()
    except Exception as caught:
        error = caught
    told = gather_object([None if error is None else _tell(error, folder)])
    failures = [(process, *each) for process, each in enumerate(told) if each is not None]
    if not failures:
        return
    process, text, of_disk = failures[0]
    if of_disk:
        raise CheckpointWriteError(text) from error
    if error is not None and len(told) == 1:
        raise error
    raise RuntimeError(f"Process {process} of {len(told)} failed with {text}") from error


def _tell(error: Exception, folder: Path) -> tuple[str, bool]:
    """What to tell of an error, and whether the disk is to blame."""
    if not isinstance(error, OSError | SafetensorError):
        return f"{type(error).__name__}: {error}", False
    parent = folder.parent
    free = f"{shutil.disk_usage(parent).free / 1e6:,.1f} MB are free there" if parent.is_dir() else "it is gone"
    return (
        f"`{folder}` could not be written: {error} ({free}). The checkpoints before it are as they were. Make room (a "
        "smaller `save_total_limit` keeps fewer checkpoints) or make the folder writable, then go on with "
        "`resume_from_checkpoint=True`."
    ), True


def _make_empty(staged: Path) -> None:
    """Make the folder to write to."""
    staged.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(staged.parent)
    staged.mkdir()


def _fill(staged: Path, write_files: Callable[[Path], None]) -> None:
    if not staged.is_dir():
        raise FileNotFoundError(
            f"the first process made `{staged}` and this one does not see it: put `output_dir` on a file system that "
            "all nodes share, or set `save_on_each_node=True`"
        )
    write_files(staged)


def _finish(staged: Path, folder: Path) -> None:
    """Write the manifest, bring everything to the disk, and only then give the folder its name."""
    paths = sorted(path for path in staged.rglob("*") if path.is_file())
    files = {
        path.relative_to(staged).as_posix(): {"bytes": path.stat().st_size, "blake2b": _digest(path)} for path in paths
    }
    manifest = staged / MANIFEST_FILE
    manifest.write_text(json.dumps({"format_version": MANIFEST_VERSION, "files": files}, indent=2) + "\n")
    for path in (*paths, manifest):
        _to_disk(path)
    _to_disk(staged)
    if folder.exists():  # of an older run, or damaged: a folder with files in it cannot be replaced in one go
        _discard(folder)
    os.replace(staged, folder)
    _to_disk(folder.parent)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def _to_disk(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, would survive a loss of power."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError:
        if not is_folder:  # not every system can do it for folders
            raise


# ---- Deleting ----


def prune_checkpoints(output_dir: Path, limit: int | None, keep: Collection[Path]) -> None:
    """
    Delete the oldest checkpoints beyond a number, and what runs that were killed left half written or half deleted.

    Args:
        output_dir (`Path`):
            Where the checkpoints are.
        limit (`int`, *optional*):
            `save_total_limit`; `None` or 0 keeps all.
        keep (`Collection[Path]`):
            Checkpoints that are not deleted whatever their age: the newest one and the best one.
    """
    _remove_leftovers(output_dir)
    if not limit or limit < 0:
        return
    folders = _checkpoints(output_dir)
    old = [folder for folder in folders if folder not in keep]
    delete_checkpoints(old[: max(0, len(folders) - limit)])


def delete_checkpoints(folders: Collection[Path]) -> None:
    """
    Delete checkpoints; one that the process is stopped in is not found again.

    Args:
        folders (`Collection[Path]`):
            The checkpoints.
    """
    for folder in folders:
        _discard(folder)


def _remove_leftovers(output_dir: Path) -> None:
    for prefix in (UNFINISHED, DISCARDED):
        for leftover in output_dir.glob(f"{prefix}{PREFIX_CHECKPOINT_DIR}-*"):
            shutil.rmtree(leftover)


def _discard(folder: Path) -> None:
    """Take a checkpoint's name from it first, so that no half of it is ever found under it; then delete it."""
    doomed = folder.with_name(DISCARDED + folder.name)
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed, ignore_errors=True)  # what is left goes at the next save


# ---- Reading ----


def find_checkpoint(wanted: str | bool | None, output_dir: Path) -> Path | None:
    """
    The checkpoint that `resume_from_checkpoint` means.

    Args:
        wanted (`str` or `bool`, *optional*):
            The folder of a checkpoint; `True`, `"true"` or `"latest"` for the latest valid one in the output folder;
            `"auto"` for the same where there is one, so that one command begins a run and goes on with it; `None`,
            `False` or `"false"` for none.
        output_dir (`Path`):
            The output folder of the run.

    Returns:
        `Path`: The checkpoint's folder, whose files are as they were written; or `None` to begin anew. A warning names
        later checkpoints that are not valid, and with `"auto"` all that there are.

    Raises:
        `FileNotFoundError`: If there is no such folder, or no valid checkpoint and one is needed.
        [`DamagedCheckpointError`]: If the files of the checkpoint are not those that were written.
    """
    word = str(wanted).lower()
    if wanted is None or word == "false":
        return None
    if word not in ("true", "latest", "auto"):
        check_checkpoint(Path(str(wanted)))
        return Path(str(wanted))
    found, passed_over = _search(output_dir)
    names = ", ".join(passed_over)
    if found is None and word != "auto":
        instead = f"; found: {names}" if names else ""
        raise FileNotFoundError(
            f"There is no checkpoint in `{output_dir}` to resume from{instead}. Leave out `resume_from_checkpoint` to "
            "begin anew."
        )
    if names:
        what = "Training begins anew" if found is None else f"Resuming from `{found}`"
        logger.warning(f"{what}. Passed over: {names}.")
    return found


def _search(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The latest valid checkpoint, and what is wrong with later ones."""
    unfinished = sorted(output_dir.glob(f"{UNFINISHED}{PREFIX_CHECKPOINT_DIR}-*"))
    passed_over = [f"`{folder.name}` (it was not written to its end)" for folder in unfinished]
    for folder in reversed(_checkpoints(output_dir)):
        damage = find_damage(folder)
        if damage is None:
            return folder, passed_over
        passed_over.append(f"`{folder.name}` ({damage})")
    return None, passed_over


def find_replaced(
    output_dir: Path, wanted: str | bool | None, resumed: Path | None, overwrite: bool, warns: bool
) -> list[Path]:
    """
    See that a run does not write its checkpoints among those of another run, whose latest would be taken for its own.

    Args:
        output_dir (`Path`):
            The output folder of the run.
        wanted (`str` or `bool`, *optional*):
            `resume_from_checkpoint`. With `"auto"` a run may begin among checkpoints of which none is valid.
        resumed (`Path`, *optional*):
            The checkpoint that it resumes from, see [`find_checkpoint`].
        overwrite (`bool`):
            Whether the checkpoints that it does not go on from are to be deleted: all others, or those after `resumed`
            where that is one of them.
        warns (`bool`):
            Whether this process warns: one is enough.

    Returns:
        `list[Path]`: The checkpoints to delete, when all of `resumed` is loaded.

    Raises:
        `FileExistsError`: If there are such checkpoints and they are to be kept. Those after `resumed` in the same
            folder are only warned of.
    """
    others = _checkpoints(output_dir)
    goes_on = resumed is not None and resumed.resolve() in [folder.resolve() for folder in others]
    if resumed is not None and goes_on:
        others = [folder for folder in others if _step(folder) > _step(resumed)]
    if not others or overwrite:
        return others
    if resumed is None and str(wanted).lower() == "auto":
        return []
    names = ", ".join(folder.name for folder in others)
    if not goes_on:
        raise FileExistsError(
            f"`{output_dir}` has checkpoints of an earlier run ({names}). Resume that run with "
            "`resume_from_checkpoint=True` (`--resume_from_checkpoint latest`), choose another `output_dir`, or set "
            "`overwrite_output_dir=True` to delete them."
        )
    if warns and any(find_damage(folder) is None for folder in others):
        logger.warning(
            f"`{output_dir}` has checkpoints after the one that this run resumes from ({names}). Each is replaced "
            "when this run comes to its step; until then the latest checkpoint is not one of this run. "
            "`overwrite_output_dir=True` deletes them."
        )
    return []


def check_checkpoint(folder: Path) -> None:
    """
    See that a checkpoint's files are those that were written, byte for byte.

    Args:
        folder (`Path`):
            The checkpoint folder.

    Raises:
        `FileNotFoundError`: If there is no such folder.
        [`DamagedCheckpointError`]: Naming what is wrong, and the latest valid checkpoint beside it.
    """
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder `{folder}` to resume from. Pass the path of a `checkpoint-<step>` folder, or `True` "
            "for the latest valid one in `output_dir`."
        )
    damage = find_damage(folder)
    if damage is None:
        return
    others = [other for other in reversed(_checkpoints(folder.parent)) if other.name != folder.name]
    valid = next((other for other in others if find_damage(other) is None), None)
    how = "there is no valid one beside it" if valid is None else f"resume from `{valid}`, the latest valid one"
    raise DamagedCheckpointError(f"`{folder}` is no valid checkpoint: {damage}; {how}.")


def find_damage(folder: Path) -> str | None:
    """
    What is wrong with a checkpoint folder.

    Args:
        folder (`Path`):
            The folder.

    Returns:
        `str`: The first fault that was found, or `None` if the folder holds what was written.
    """
    manifest = folder / MANIFEST_FILE
    if not manifest.is_file():
        if not any(folder.iterdir()):
            return "it is empty"
        if (folder / "optimizer.pt").is_file():
            return f"it has no `{MANIFEST_FILE}`; it is of a version before checkpoints had one, and holds pickles"
        return f"it has no `{MANIFEST_FILE}`"
    try:
        content = json.loads(manifest.read_bytes())
        version, files = content["format_version"], content["files"]
        expected = {name: (entry["bytes"], entry["blake2b"]) for name, entry in files.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        return f"`{MANIFEST_FILE}` cannot be read ({type(error).__name__}: {error})"
    if version != MANIFEST_VERSION:
        return f"`{MANIFEST_FILE}` has format {version!r}, this version of trl_marble reads {MANIFEST_VERSION}"
    for name, (size, digest) in expected.items():
        path = folder / name
        if not path.is_file():
            return f"`{name}` is missing"
        try:
            if path.stat().st_size != size:
                return f"`{name}` has {path.stat().st_size:,} bytes of {size:,}"
            if _digest(path) != digest:
                return f"the content of `{name}` is not what was written"
        except OSError as error:
            return f"`{name}` cannot be read ({error})"
    return None


def _checkpoints(output_dir: Path) -> list[Path]:
    """The folders named as checkpoints, by step."""
    name = rf"{PREFIX_CHECKPOINT_DIR}-\d+"
    return sorted(
        (path for path in output_dir.glob("*") if re.fullmatch(name, path.name) and path.is_dir()), key=_step
    )


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])
