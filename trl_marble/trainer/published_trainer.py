# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What a trainer leaves for others: the adapter, its model card, and both on the Hub."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from datasets import Dataset
from diffusers import DiffusionPipeline
from huggingface_hub import CommitInfo
from torch import Tensor
from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from ..evaluation import Evaluation
from ..hub.publishing import (
    RunSummary,
    card_settings,
    push_checkpoint,
    push_folder,
    write_card,
    write_card_beside_adapter,
)
from ..hub.slider import part_names
from ..media import Sample
from ..pipelines import FlowPipeline, Teacher
from ..rewards import RewardScorer
from .checkpointed_trainer import CheckpointedTrainer


class PublishedTrainer(CheckpointedTrainer):
    """A [`CheckpointedTrainer`] that writes a model card for its adapter and pushes both."""

    hub_model_id: Any  # transformers sets it later than where it declares it as `None`
    pipeline: DiffusionPipeline
    flow: FlowPipeline
    scorers: list[RewardScorer]
    evaluations: list[Evaluation]
    edits: bool
    weighting: Callable[[Tensor], Tensor] | None
    teachers: list[Teacher]
    train_dataset: Dataset

    def summarize(self) -> RunSummary:
        """What the card of the run is made from, as it is now."""
        args, family = self.args, self.flow.family
        source = self.pipeline.config.get("_name_or_path")  # diffusers keeps it as given, `Path` or string
        config = self.flow.transformer.peft_config["default"]
        settings = card_settings(
            vars(args), args.unused_settings, [(each.step, each.settings) for each in self.settings_history]
        )
        if not self.flow.is_listed:  # the card cannot look its guidance up
            settings |= family.guidance_arguments(settings.pop("guidance_scale"))
        settings |= {"optimizer_steps": self.state.global_step, "processes": args.world_size}
        names = self.scorers[0].names
        parts = part_names(names) if args.balance_slider else []
        settings |= {"lora_rank": config.r // max(1, len(parts)), "lora_alpha": config.lora_alpha}
        if parts:
            settings["balance_slider"] = True
        if self.teachers and not args.balances_gradients:
            settings["teacher_weight"] = args.teacher_weight
        if not names:
            settings["teacher_states"] = args.teacher_states
        if self.weighting is not None:  # in the place of the one that `args` names
            settings["weighting"] = getattr(self.weighting, "__name__", type(self.weighting).__name__)
        return RunSummary(
            history=self.state.log_history,
            reward_names=names,
            held_out_names=[name for scorer in self.scorers[1:] for name in scorer.names],
            pipeline_class=family.pipeline_class.__name__,
            base_model=None if source is None else str(source),
            dataset_name=self.train_dataset.info.dataset_name,
            settings={name: value for name, value in settings.items() if value is not None},
            gallery=self._adapter_gallery(),
            edits_images=self.edits,
            model_id=self.hub_model_id,
            adapter_step=self.adapter_step,
            teachers={teacher.key: teacher.adapter for teacher in self.teachers},
            parts=parts,
        )

    def _adapter_gallery(self) -> Mapping[str, Sequence[Sample]]:
        """The images of the latest evaluation up to the adapter's step."""
        own = [each.gallery for each in self.evaluations if each.step <= self.adapter_step]
        return own[-1] if own else {}

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Save the adapter, with the averaged weights, and its model card.

        A `README.md` that this package did not write, or that was changed since, is left as it is, with a warning.

        Args:
            output_dir (`str`, *optional*):
                The folder. Defaults to `args.output_dir`.
            _internal_call (`bool`, *optional*, defaults to `False`):
                Whether the trainer itself saves, as for a checkpoint, which gets no card.
        """
        super().save_model(output_dir, _internal_call=True)
        if _internal_call:
            return
        if self.args.should_save:
            write_card_beside_adapter(self.summarize(), Path(output_dir or self.args.output_dir))
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def create_model_card(  # type: ignore[override]
        self, model_name: str | None = None, **kwargs: Any
    ) -> None:
        """
        Write the model card, with its pictures, to the output folder. It is rendered anew from this run.

        Args:
            model_name (`str`, *optional*):
                Title of the card. Defaults to the name of the output folder.
            kwargs:
                Accepted for compatibility with [`~transformers.Trainer.push_to_hub`]; not used.
        """
        if self.is_world_process_zero():
            write_card(self.summarize(), Path(self.args.output_dir), model_name)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        model_name: str | None = None,
        **kwargs: Any,
    ) -> CommitInfo | Future[CommitInfo] | None:
        """
        Push the adapter and its card, rendered anew from this run, with the card's pictures.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training"`):
                Title of the commit.
            blocking (`bool`, *optional*, defaults to `True`):
                Whether to return only when everything is pushed.
            token (`str`, *optional*):
                An access token with the right to write. Defaults to `args.hub_token`.
            revision (`str`, *optional*):
                The branch to push to. Defaults to `args.hub_revision`.
            private (`bool`, *optional*):
                Whether a repository that is created here is private. Defaults to `args.hub_private_repo`.
            model_name (`str`, *optional*):
                Title of the card. Defaults to the repository's name.
            kwargs:
                Accepted for compatibility with [`~transformers.Trainer.push_to_hub`]; not used.

        Returns:
            The commit, or its future where `blocking` is `False`; `None` in all processes but the first.
        """
        args = self.args
        self.callback_handler.on_push_begin(args, self.state, self.control)
        token = args.hub_token if token is None else token
        if self.hub_model_id is None:  # not asked for in the configuration
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if not self.is_world_process_zero():
            return None
        self.create_model_card(model_name=model_name or self.hub_model_id.split("/")[-1])
        self._finish_current_push()
        revision = args.hub_revision if revision is None else revision
        folder = Path(args.output_dir)
        return push_folder(
            folder, self.hub_model_id, commit_message, token=token, revision=revision, blocking=blocking
        )

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        args = self.args
        if not self.is_world_process_zero() or args.hub_strategy == HubStrategy.END:
            return
        is_pushing = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if is_pushing and not args.hub_always_push:
            return
        self.callback_handler.on_push_begin(args, self.state, self.control)
        jobs: Any = push_checkpoint(
            Path(checkpoint_folder),
            Path(args.output_dir),
            self.hub_model_id,
            self.state.global_step,
            HubStrategy(args.hub_strategy),
            lambda: self.create_model_card(model_name=self.hub_model_id.split("/")[-1]),
            token=args.hub_token,
            revision=args.hub_revision,
        )
        if is_pushing:
            self.push_in_progress.jobs.extend(jobs)
        else:
            self.push_in_progress = PushInProgress(jobs)
