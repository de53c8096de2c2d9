# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Prompts become embeddings: the text encoders run, or what they returned before is read from disk."""

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from ..media import to_rgb
from .conditioning import Conditioning, Rows
from .embedding_cache import EmbeddingCache, encoder_fingerprint, in_chunks, join_rows
from .pipeline_calls import PipelineCalls, known_arguments
from .pipeline_checks import check_images
from .prompt_length import describe_long_prompts
from .quantization import base_dtype


class PromptEncoder:
    """
    What is known of the text encoders of a pipeline: where they are, where their embeddings are kept, and whether it
    was said already that they do not read a prompt to its end.

    The methods are those of [`~trl_marble.pipelines.FlowPipeline`]. They take in addition how the pipeline is called,
    and whether prompts are encoded `with_negatives`: together with the empty negative prompt.
    """

    def __init__(self) -> None:
        self._embeddings: EmbeddingCache | None = None
        self._device: torch.device | None = None  # where it is not the transformer's
        self._has_text_encoders = True
        self._warned_of_long_prompt = False

    @torch.no_grad()
    def encode(
        self,
        calls: PipelineCalls,
        prompts: Sequence[str],
        images: Sequence[PIL.Image.Image] | None,
        with_negatives: bool,
    ) -> Conditioning:
        """See [`~trl_marble.pipelines.FlowPipeline.encode`], whose caller a warning is for."""
        family = calls.family
        if isinstance(prompts, str):
            raise TypeError(f"`prompts` must be a sequence of strings, got one string: pass [{prompts!r}].")
        if len(prompts) == 0:
            raise ValueError("`prompts` is empty; pass at least one prompt.")
        check_images(calls.pipeline, family, prompts, images)
        if self._has_text_encoders and not self._warned_of_long_prompt:  # whose limits count
            message = describe_long_prompts(calls.pipeline, family, calls.max_sequence_length, prompts)
            if message is not None:
                # The caller's caller, beyond the no_grad decorator.
                warnings.warn(message, UserWarning, stacklevel=4)
                self._warned_of_long_prompt = True
        rows: dict[str, Rows] = {} if images is None else {"image": [to_rgb(image) for image in images]}
        if family.encoded_names is None:
            return Conditioning({**rows, "prompt": list(prompts)})
        rows |= self._encode_in_chunks(calls, list(prompts), family.encoded_names, with_negatives)
        if with_negatives and family.negative_names is not None:
            rows |= self._encode_in_chunks(calls, [""] * len(prompts), family.negative_names, with_negatives)
        conditioning = Conditioning(rows)
        return conditioning if self._embeddings is None else conditioning.to(calls.transformer.device)

    def cache_embeddings(
        self,
        calls: PipelineCalls,
        folder: str | os.PathLike,
        device: torch.device | str | None,
        with_negatives: bool,
    ) -> None:
        """See [`~trl_marble.pipelines.FlowPipeline.cache_embeddings`]."""
        pipeline, family = calls.pipeline, calls.family
        if family.encoded_names is None:
            raise ValueError(
                f"{type(pipeline).__name__} takes no embeddings but text, so there are none to keep. Set "
                "cache_embeddings=False."
            )
        settings = [
            type(pipeline).__name__,
            sorted(family.arguments.items()),
            family.encoded_names,
            family.negative_names,
            calls.max_sequence_length,
            with_negatives,
            base_dtype(calls.transformer),
        ]
        self._embeddings = EmbeddingCache(Path(folder), encoder_fingerprint(pipeline, settings))
        if device is not None:
            self._device = torch.device(device)
            for name in _text_encoders(calls):
                pipeline.components[name].to(device)

    def drop_text_encoders(self, calls: PipelineCalls) -> None:
        """See [`~trl_marble.pipelines.FlowPipeline.drop_text_encoders`]."""
        if self._embeddings is None:
            raise RuntimeError("Without text encoders nothing can be encoded; call `cache_embeddings` first.")
        for name in _text_encoders(calls):
            setattr(calls.pipeline, name, None)
        self._has_text_encoders = False

    def _encode_in_chunks(
        self, calls: PipelineCalls, prompts: list[str], names: tuple[str | None, ...], with_negatives: bool
    ) -> dict[str, Rows]:
        def run(chunk: list[str]) -> dict[str, Rows]:
            return self._run_encoders(calls, chunk, names, with_negatives)

        if self._embeddings is not None:
            return self._embeddings.rows(prompts, names, run)
        return join_rows([run(chunk) for chunk in in_chunks(prompts)])

    def _run_encoders(
        self, calls: PipelineCalls, prompts: list[str], names: tuple[str | None, ...], with_negatives: bool
    ) -> dict[str, Rows]:
        """Run `encode_prompt`; its outputs by the names of the `__call__` arguments, each with one row per prompt."""
        if not self._has_text_encoders:
            raise ValueError(
                f"The prompt {prompts[0]!r} is not in the cache of embeddings, and the text encoders were dropped. "
                "Only prompts of the `train_dataset` and the `eval_dataset` that the trainer was made with can be "
                "used; for others set cache_embeddings=False."
            )
        arguments = {
            **calls.family.arguments,
            "max_sequence_length": calls.max_sequence_length,
            "do_classifier_free_guidance": with_negatives,
            "device": self._device or calls.transformer.device,
        }
        pipeline_class: Any = calls.family.pipeline_class
        known = known_arguments(pipeline_class.encode_prompt, arguments)
        outputs = calls.pipeline.encode_prompt(prompts, **known)
        if not isinstance(outputs, tuple):
            outputs = (outputs,)
        dtype = base_dtype(calls.transformer)
        return {
            name: _cast(output, dtype)
            for name, output in zip(names, outputs, strict=True)
            if name is not None and output is not None and len(output) > 0  # some return [] without negative prompts
        }


def _text_encoders(calls: PipelineCalls) -> list[str]:
    """The names of the text encoders that the pipeline has."""
    components = calls.pipeline.components.items()
    return [name for name, part in components if name.startswith("text_encoder") and part is not None]


def _cast(rows: Rows, dtype: torch.dtype) -> Rows:
    """Convert embeddings to the transformer's dtype; masks of integers and truth values keep theirs."""
    if not isinstance(rows, Tensor):
        return [_cast(row, dtype) for row in rows]
    return rows.to(dtype) if rows.is_floating_point() else rows
