# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The pipeline that is checked, and small trainers of it."""

import gc
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from diffusers import DiffusionPipeline
from transformers import PrinterCallback

from ..pipelines import find_family, load_pipeline
from ..pipelines.compilation import transformer_blocks
from ..rewards import FrameReward
from ..shapeworld.pretrained import PIPELINE_FOLDER, ShapeWorldPipeline
from ..trainer import MarbleConfig, MarbleNFTTrainer
from .rewards import PROMPTS, REWARDS


# Two prompts of two images each, which are trained on at two of three timesteps.
SETTINGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "num_generations": 2,
    "num_inference_steps": 3,
    "timestep_fraction": 0.7,
    "learning_rate": 1e-3,
    "max_steps": 1,
    "logging_steps": 1,
    "save_strategy": "no",
    "log_images": False,
    "disable_tqdm": True,
    "report_to": "none",
}
# Of a model that is not the package's own: small, so that a check takes seconds.
SIDE, FRAMES = 256, 5


class Subject:
    """
    The pipeline that is checked.

    Args:
        source (`str`, *optional*):
            A Hub id or a local folder. Defaults to the pipeline that comes with the package.
        bf16 (`bool`, *optional*, defaults to `False`):
            Whether its users would train it in bf16. The package's own is loaded in fp32 all the same, so that checks
            can be strict.

    Attributes:
        dtype (`torch.dtype`):
            What the base weights are loaded in, and velocities computed in unless a check says otherwise.
    """

    def __init__(self, source: str | None = None, bf16: bool = False) -> None:
        self.source, self.bf16 = source, bf16
        self.dtype = torch.bfloat16 if bf16 and source is not None else torch.float32
        self._pipeline: DiffusionPipeline | None = None

    @property
    def tolerance(self) -> float:
        """The largest relative error of a gradient that is rounding."""
        return 1e-3 if self.dtype == torch.float32 else 5e-2

    def load(self, **components: Any) -> DiffusionPipeline:
        """
        Load the pipeline.

        Args:
            components (`Any`):
                As for [`~trl_marble.pipelines.load_pipeline`].
        """
        if self.source is not None:
            return load_pipeline(self.source, self.dtype, **components)
        components |= {"text_encoder_3": None, "tokenizer_3": None}
        return ShapeWorldPipeline.from_pretrained(PIPELINE_FOLDER, dtype=self.dtype, **components)

    @contextmanager
    def pipeline(self) -> Iterator[DiffusionPipeline]:
        """
        The pipeline as it was loaded.

        It is loaded once. What a check adds to it is taken off again; after an error it is loaded anew.
        """
        pipeline, self._pipeline = self._pipeline or self.load(), None
        try:
            yield pipeline
            pipeline.remove_all_hooks()
            pipeline.transformer.unload_lora()
            for block in transformer_blocks(pipeline.transformer):
                block._compiled_call_impl = None  # type: ignore[assignment]
            self._pipeline = pipeline
        finally:
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    @contextmanager
    def trainer(self, pipeline: DiffusionPipeline | None = None, **settings: Any) -> Iterator[MarbleNFTTrainer]:
        """
        A small trainer.

        Args:
            pipeline (`DiffusionPipeline`, *optional*):
                What it trains. Defaults to the subject's own.
            settings (`Any`):
                Of `MarbleConfig`, in the place of `SETTINGS`. Without `output_dir` the folder exists inside the
                context only.
        """
        if pipeline is None:
            with self.pipeline() as own, self.trainer(own, **settings) as trainer:
                yield trainer
            return
        with tempfile.TemporaryDirectory(prefix="selftest") as folder:
            yield self._trainer(pipeline, {"output_dir": folder} | settings)

    def _trainer(self, pipeline: DiffusionPipeline, settings: dict[str, Any]) -> MarbleNFTTrainer:
        family, rewards = find_family(pipeline), REWARDS
        given = SETTINGS | {"bf16": self.dtype == torch.bfloat16}
        if self.source is not None:
            given |= {"height": SIDE, "width": SIDE}
            if family is not None and family.output == "video":
                given |= {"num_frames": FRAMES}
                rewards = [FrameReward(reward) for reward in rewards]
        prompts = Dataset.from_dict({"prompt": PROMPTS})
        trainer = MarbleNFTTrainer(pipeline, rewards, MarbleConfig(**(given | settings)), prompts)
        trainer.remove_callback(PrinterCallback)
        return trainer
