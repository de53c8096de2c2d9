# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The methods of [`~transformers.Trainer`] that have no meaning for rewards and images: each says what to use."""

from typing import Any, NoReturn

from transformers import Trainer


_EVALUATE = "call `trainer.evaluate(prompts)`, which samples images and scores them with the rewards"


class WithoutPredictions(Trainer):
    """A [`~transformers.Trainer`] without labels, logits and predictions. Raises `NotImplementedError` for each."""

    def predict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: there are no predictions."""
        _refuse("predict", f"{_EVALUATE}, or `trl_marble.evaluation.evaluate_pipeline` for a report with its images")

    def prediction_step(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: there are no predictions."""
        _refuse("prediction_step", _EVALUATE)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: there are no predictions."""
        _refuse("evaluation_loop", _EVALUATE)

    def get_eval_dataloader(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: an evaluation reads its prompts from the dataset itself."""
        _refuse("get_eval_dataloader", "read `trainer.eval_dataset`")

    def get_test_dataloader(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: there are no predictions."""
        _refuse("get_test_dataloader", _EVALUATE)

    def compute_loss(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: the loss needs rollouts and rewards."""
        _refuse("compute_loss", "the loss belongs to a whole optimizer step, see `trainer.training_step`")

    def hyperparameter_search(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not supported: it makes a new model for each trial by `model_init`."""
        _refuse(
            "hyperparameter_search", "make a new `MarbleNFTTrainer` for each trial, with a freshly loaded pipeline"
        )


def _refuse(method: str, instead: str) -> NoReturn:
    raise NotImplementedError(f"`MarbleNFTTrainer` has no `{method}`: {instead}.")
