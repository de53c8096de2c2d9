# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A `transformers.Trainer` whose checkpoints are whole and hold no pickles, and that saves one when training fails."""

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerState
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, TrainOutput
from transformers.utils import logging

from ..checkpoint.folder import (
    CheckpointWriteError,
    delete_checkpoints,
    find_checkpoint,
    find_replaced,
    prune_checkpoints,
    write_checkpoint,
)
from ..checkpoint.random_state import find_random_file, random_file, random_state, set_random_state
from ..checkpoint.settings import (
    Changes,
    SettingsFrom,
    describe_changes,
    describe_settings,
    find_changes,
    group_settings,
    load_settings,
    save_settings,
    use_own_settings,
)
from ..checkpoint.tensor_tree import load_tree, save_tree
from ..processes import FailingTogether
from .marble_config import MarbleConfig


logger = logging.get_logger(__name__)

OPTIMIZER_FILE = "optimizer.safetensors"
SCHEDULER_FILE = "scheduler.safetensors"


class CheckpointedTrainer(Trainer):
    """
    [`~transformers.Trainer`] that loses nothing: a checkpoint has its name only when all of it is on the disk, older
    ones are deleted only after that, and resuming takes none that is not as it was written.

    Everything is stored in safetensors and JSON. A subclass adds files of its own in `_write_run_state`, reads them in
    `_load_from_checkpoint`, and says in `_between_steps` whether all that is trained is that of `state.global_step`.
    """

    args: MarbleConfig
    model: Any
    optimizer: Any  # what `transformers` declares leaves out that a run has them
    lr_scheduler: Any
    push_in_progress: Any = None
    current_flos: Any  # set by `transformers`
    together: FailingTogether
    settings_history: Sequence[SettingsFrom] = ()  # none before training
    _changed_settings: Changes
    _replaced: Sequence[Path] = ()  # checkpoints of another run
    _saved_step = _resumed_step = 0
    _best_step: int | None = None  # of the checkpoint that was loaded at the end as the best one
    _between_steps = False

    @property
    def bare_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer without what `accelerate` wraps around it."""
        return self.optimizer.optimizer if isinstance(self.optimizer, AcceleratedOptimizer) else self.optimizer

    @property
    def adapter_step(self) -> int:
        """The optimizer step that the trained weights are from: the last one, or that of the best checkpoint."""
        return self.state.global_step if self._best_step is None else self._best_step

    @abstractmethod
    def _write_run_state(self, folder: Path) -> None:
        """Write this process's part of what else a resumed run needs, as it is after `state.global_step` steps."""

    @abstractmethod
    def _load_run_state(self, folder: Path) -> None:
        """Make everything that is trained as it is in a checkpoint."""

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> TrainOutput:  # type: ignore[override]
        """Train from the start or from a valid checkpoint; if training stops by an exception, save one first."""
        folder = Path(self._get_output_dir(None))
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        checkpoint = find_checkpoint(wanted, folder)
        resume_from_checkpoint = None if checkpoint is None else str(checkpoint)
        overwrite, warns = self.args.overwrite_output_dir, self.args.should_save
        self._replaced = find_replaced(folder, wanted, checkpoint, overwrite, warns)
        if checkpoint is None and str(wanted).lower() == "auto" and self.is_world_process_zero():
            logger.warning(f"There is no valid checkpoint in `{folder}`: training begins anew.")
        self.together.failed = False
        self._resumed_step, self._best_step = 0, None
        self.settings_history, self._changed_settings = [SettingsFrom(0, describe_settings(self.args))], {}
        if checkpoint is not None:
            state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
            self._resumed_step = state.global_step
            self._compare_settings(checkpoint)
        self._saved_step, self._between_steps = self._resumed_step, False
        with self.together.ending_on_sigterm():  # also while a checkpoint is saved because of it
            try:
                output = super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
            except BaseException as error:
                self._save_on_failure(error)
                raise
        if self._saved_step > 0:
            self._catch_up(Path(self._get_output_dir(None)) / f"{PREFIX_CHECKPOINT_DIR}-{self._saved_step}")
        return output

    def _compare_settings(self, checkpoint: Path) -> None:
        """Say where the run goes on, and with which settings that have changed."""
        now, history = describe_settings(self.args), load_settings(checkpoint)
        if history:
            self._changed_settings = find_changes(history[-1].settings, now)
            if self._changed_settings:
                history.append(SettingsFrom(self._resumed_step, now))
            self.settings_history = history
        if self.is_world_process_zero():
            changes = describe_changes(self._changed_settings)
            note = f" These settings are not those that it was saved with: {changes}." if changes else ""
            logger.warning(f"Resuming from `{checkpoint}`, step {self._resumed_step}.{note}")

    # ---- Writing ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write everything that a resumed run needs to end as the uninterrupted one does, completely or not at all."""
        self.store_flos()
        run_folder, step = Path(self._get_output_dir(trial)), self.state.global_step
        folder = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        best_step = self.state.best_global_step
        best = run_folder / f"{PREFIX_CHECKPOINT_DIR}-{best_step}"
        if best_step and (best == folder or best.is_dir()):
            self.state.best_model_checkpoint = str(best)
        write_checkpoint(folder, self._write_checkpoint_files, makes_folder=self.args.should_save)
        self._saved_step = step
        self._prune(folder)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(folder))

    def _write_checkpoint_files(self, folder: Path) -> None:
        """Write this process's part of a checkpoint."""
        self.save_model(str(folder), _internal_call=True)
        self._write_run_state(folder)
        if self.args.should_save:
            self._write_trainer_state(folder)
            save_settings(folder, self.settings_history)
        if not self.args.save_only_model:
            self._write_optimizer(folder)

    def _write_trainer_state(self, folder: Path) -> None:
        """Write the step, the log, which checkpoint is best, and the states of the callbacks that have one."""
        states: dict[str, Any] = {}
        for callback in [*self.callback_handler.callbacks, self.control]:
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, []).append(callback.state())
        self.state.stateful_callbacks = states  # type: ignore[assignment]
        self.state.save_to_json(str(folder / TRAINER_STATE_NAME))

    def _write_optimizer(self, folder: Path) -> None:
        if self.args.should_save:
            optimizer, scheduler = self.bare_optimizer, self.lr_scheduler
            for file, what, part in (
                (OPTIMIZER_FILE, "optimizer", optimizer),
                (SCHEDULER_FILE, "learning rate scheduler", scheduler),
            ):
                kind = type(part).__name__
                save_tree(folder / file, {**part.state_dict(), "kind": kind}, f"the {what} {kind}")
        path = random_file(folder, self.args.process_index)
        save_tree(path, random_state(self.args.device), "the random generators")

    def _prune(self, newest: Path) -> None:
        """Delete old checkpoints, now that a newer one is complete; not while one of them may be being pushed."""
        if self.args.should_save and (self.push_in_progress is None or self.push_in_progress.is_done()):
            best = self.state.best_model_checkpoint
            keep = {newest} if best is None else {newest, Path(best)}
            prune_checkpoints(newest.parent, self.args.save_total_limit, keep)

    def _catch_up(self, newest: Path) -> None:
        """Do after the last step what a run that was killed right after its last checkpoint has not done."""
        took_no_step = self._saved_step == self._resumed_step == self.state.global_step
        if took_no_step and self.args.push_to_hub and newest.is_dir():
            self._push_from_checkpoint(str(newest))
            self._finish_current_push()
        self._prune(newest)  # all pushes have ended

    def _save_on_failure(self, error: BaseException) -> None:
        """Save a checkpoint of the last whole optimizer step, if there is one that was not saved."""
        step = self.state.global_step
        if step in (0, self._saved_step) or isinstance(error, CheckpointWriteError):
            return
        if not self._between_steps:
            logger.warning("Training stopped inside an update or while a checkpoint was read: nothing can be saved.")
            return
        if self.args.world_size > 1 and not self.together.failed:
            # The other processes may be anywhere, and would be waited for without end.
            logger.error(
                f"Process {self.args.process_index} of {self.args.world_size} stopped alone after step {step}. What "
                "was trained since the last checkpoint is not saved: that takes all processes."
            )
            return
        self.current_flos = 0  # of micro-batches that are lost; not every process counts as many
        folder = Path(self._get_output_dir(None)) / f"{PREFIX_CHECKPOINT_DIR}-{step}"
        try:
            self._save_checkpoint(self.model, trial=None)
        except Exception as failure:
            logger.error(f"Training failed, and saving step {step} to {folder} failed too: {failure}")
        else:
            logger.warning(f"Training stopped after step {step}; it is saved in {folder}.")
            error.add_note(f"Training stopped after step {step}; it is saved in {folder}.")  # a traceback ends with it

    # ---- Reading ----

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """Also delete the checkpoints that are overwritten: only now that the run is known to fit the one it loads."""
        prepared = super()._prepare_for_training(*args, **kwargs)
        if self.args.should_save:
            delete_checkpoints(self._replaced)
        return prepared

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Not if training was over at the checkpoint: `transformers` looks only after a step, and takes one more."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def _load_best_model(self) -> None:
        """With `load_best_model_at_end`: everything that was trained is as it was at the best evaluation."""
        folder = Path(str(self.state.best_model_checkpoint))
        logger.warning(f"Loading the best checkpoint, `{folder}` ({self.state.best_metric}).")
        self._load_run_state(folder)
        self._best_step = int(folder.name.rpartition("-")[2])

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        for name in ("learning_rate", "lr_scheduler_kwargs"):
            before, now = self._changed_settings.get(name, (None, None))
            if before != now and not isinstance(self.lr_scheduler, LambdaLR):
                raise ValueError(
                    f"`{name}` was {before} in `{checkpoint}` and is {now} in this run, but "
                    f"{type(self.lr_scheduler).__name__} continues from its saved value. Resume with "
                    f"`{name}={before}`."
                )
        own = group_settings(self.bare_optimizer)
        optimizer = load_tree(Path(checkpoint) / OPTIMIZER_FILE)
        scheduler = load_tree(Path(checkpoint) / SCHEDULER_FILE)
        self._check_kind(checkpoint, "optimizer", self.bare_optimizer, optimizer)
        self._check_kind(checkpoint, "lr_scheduler", self.lr_scheduler, scheduler)
        self.optimizer.load_state_dict(optimizer)
        self.lr_scheduler.load_state_dict(scheduler)
        use_own_settings(self.bare_optimizer, self.lr_scheduler, own)

    def _check_kind(self, checkpoint: str, what: str, mine: Any, saved: dict[str, Any]) -> None:
        kind = saved.pop("kind")
        if kind != type(mine).__name__:
            raise ValueError(
                f"`{checkpoint}` was saved with the {what} {kind}, this run has {type(mine).__name__}, which cannot "
                "continue from that state. Resume with the `optim` and `lr_scheduler_type` that it was saved with."
            )

    def _load_rng_state(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            file = find_random_file(Path(checkpoint), self.args.process_index)
            set_random_state(load_tree(file), self.args.device)

    def _load_scaler(self, checkpoint: str | None) -> None:
        """Nothing: there is no loss scaling, and `transformers` would read a file that can run code."""
