# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""GenEval: whether an image shows the objects, counts, colors and positions that its prompt asks for."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    CLIPImageProcessorPil,
    CLIPModel,
    CLIPTokenizer,
    Mask2FormerForUniversalSegmentation,
    Mask2FormerImageProcessorPil,
)

from .clip_features import crop_square, image_features, text_features
from .geneval_scoring import (
    CLASSES,
    COLORS,
    THRESHOLD,
    Detection,
    Request,
    parse_request,
    partial_score,
    select_objects,
    strict_score,
)
from .model_reward import ModelReward


MAX_DETECTIONS = 100  # per image, over all classes
BACKGROUND = "#999"  # behind an object whose color is named
COLOR_PROMPTS = ("a photo of a {color} {name}", "a photo of a {color}-colored {name}", "a photo of a {color} object")


class GenEval(ModelReward):
    """
    [GenEval](https://huggingface.co/papers/2310.11513): a Mask2Former finds the objects in an image, CLIP names their
    colors, and rules compare them with what the prompt asks for.

    It reads these columns:

    - `include`: a list of `{"class": str, "count": int, "color": str, "position": [relation, index]}`, the last two
      optional, or the same as JSON. Classes are the 80 of COCO, colors GenEval's ten, relations `"left of"`,
      `"right of"`, `"above"` and `"below"`, each to the objects of the list's item `index`.
    - `tag`: `"single_object"`, `"two_object"`, `"counting"`, `"colors"`, `"position"` or `"color_attr"`. With
      `"counting"` the detector must be more confident (0.9) than with the others (0.3).
    - `exclude`, optional: like `include`, without colors and positions; forbids `count` or more objects of a class.
      Only the strict score reads it, because the other one requires exact counts anyway.

    The rules are those of the original, see [`~trl_marble.rewards.geneval_scoring.partial_score`] and
    [`~trl_marble.rewards.geneval_scoring.strict_score`]. The detector is another one: that of GenEval has the same
    architecture and data, but was trained by MMDetection. So scores can differ from published ones by some percent.

    Args:
        detector (`str`, *optional*, defaults to `"facebook/mask2former-swin-small-coco-instance"`):
            Hub id or local folder of a Mask2Former for COCO instances.
        clip (`str`, *optional*, defaults to `"openai/clip-vit-large-patch14"`):
            Hub id or local folder of the CLIP model that names colors.
        strict (`bool`, *optional*, defaults to `False`):
            Whether the score is that of GenEval, 1 if everything is right and otherwise 0, or the partial credit of
            Flow-GRPO's GenEval reward: at most 1, and negative for more than twice the objects asked for.
        max_overlap (`float`, *optional*, defaults to `1.0`):
            Intersection over union, in (0, 1], from which the less confident one of two objects of a class is left
            out; 1, as in the original, keeps all.
        batch_size (`int`, *optional*, defaults to `16`):
            Number of images in one forward pass.
        dtype (`torch.dtype`, *optional*):
            Dtype of the weights. Defaults to the trainer's dtype, and to float32, that of the original scores,
            without a trainer.
        offload (`bool`, *optional*, defaults to `False`):
            Whether the weights move to the CPU between generation batches.

    Raises:
        `ValueError`: If `max_overlap` is not in (0, 1]. When images are scored: a column is missing, `include`,
            `exclude` or `tag` of a prompt cannot be used, or the detector does not have 80 classes.
        `OSError`: When the first image is scored: a file of `detector` or `clip` is missing.
    """

    applies_to = "images whose `include` is neither `None` nor empty"

    def __init__(
        self,
        detector: str = "facebook/mask2former-swin-small-coco-instance",
        clip: str = "openai/clip-vit-large-patch14",
        strict: bool = False,
        max_overlap: float = 1.0,
        batch_size: int = 16,
        dtype: torch.dtype | None = None,
        offload: bool = False,
    ) -> None:
        super().__init__(batch_size=batch_size, dtype=dtype, offload=offload)
        if not 0 < max_overlap <= 1:
            raise ValueError(f"`max_overlap` must be in (0, 1], got {max_overlap}; 1 keeps all objects.")
        self.detector_id = detector
        self.clip_id = clip
        self.strict = strict
        self.max_overlap = max_overlap
        self.value_range = "0 or 1" if strict else "at most 1, negative for more than twice the objects asked for"
        self._known_color_features: dict[tuple[str, torch.dtype], Tensor] = {}

    def load(self) -> nn.Module:
        # With Pillow: torchvision, where it is installed, resizes differently.
        self.detector_processor = Mask2FormerImageProcessorPil.from_pretrained(self.detector_id)
        self.detector: Any = Mask2FormerForUniversalSegmentation.from_pretrained(self.detector_id)
        if self.detector.config.num_labels != len(CLASSES):
            raise ValueError(
                f"The detector {self.detector_id!r} has {self.detector.config.num_labels} classes; use one for COCO "
                f"instances, which has {len(CLASSES)}."
            )
        self.clip: Any = CLIPModel.from_pretrained(self.clip_id)
        self.clip_processor = CLIPImageProcessorPil.from_pretrained(self.clip_id)
        self.tokenizer = CLIPTokenizer.from_pretrained(self.clip_id)
        return nn.ModuleList([self.detector, self.clip])

    def applies(self, prompts: list[str], **columns: list) -> list[bool]:
        return [request is not None for request in _requests(prompts, columns)]

    def score(self, images: list[Image.Image], prompts: list[str], **columns: list) -> list[float | None]:
        scores: list[float | None] = []
        for image, request, objects in zip(images, _requests(prompts, columns), self.detect(images), strict=True):
            assert request is not None  # see `applies`
            found = {name: select_objects(each, request.tag, self.max_overlap) for name, each in objects.items()}
            colors_of = partial(self.name_colors, image)
            if self.strict:
                scores.append(strict_score(request.include, request.exclude, found, colors_of))
            else:
                scores.append(partial_score(request.include, found, colors_of))
        return scores

    def detect(self, images: list[Image.Image]) -> list[dict[str, list[Detection]]]:
        """
        Find objects.

        Args:
            images (`list[PIL.Image.Image]`):
                RGB images of any size.

        Returns:
            `list[dict[str, list[Detection]]]`: for each image, the objects by class, in any order. Classes without
                objects, and objects with a confidence below 0.3, may be missing.
        """
        found: list[dict[str, list[Detection]]] = [{} for _ in images]
        # Images of different sizes are not padded to one size: a result must not depend on the rest of the batch.
        places = defaultdict(list)
        for i, image in enumerate(images):
            places[image.size].append(i)
        for (width, height), same_size in places.items():
            pixels = self.detector_processor([images[i] for i in same_size], return_tensors="pt").pixel_values
            outputs = self.detector(pixel_values=pixels.to(self.device, self.dtype))
            for i, classes, masks in zip(
                same_size, outputs.class_queries_logits, outputs.masks_queries_logits, strict=True
            ):
                found[i] = read_detections(classes.float(), masks.float(), pixels.shape[-2:], (height, width))
        return found

    def name_colors(self, image: Image.Image, name: str, objects: Sequence[Detection]) -> list[str]:
        """
        Name the colors of objects, each alone on a grey background.

        Args:
            image (`PIL.Image.Image`):
                The image.
            name (`str`):
                The class of the objects.
            objects (`Sequence[Detection]`):
                The objects, at least one.

        Returns:
            `list[str]`: of `COLORS`.
        """
        grey = Image.new("RGB", image.size, BACKGROUND)
        alone = [Image.composite(image, grey, Image.fromarray(each.mask)).crop(each.box) for each in objects]
        squares = [crop_square(each, self.clip.config.vision_config.image_size) for each in alone]
        features = image_features(self.clip, self.clip_processor(squares, return_tensors="pt").pixel_values)
        return [COLORS[i] for i in (features @ self._color_features(name).T).argmax(dim=1)]

    def _color_features(self, name: str) -> Tensor:
        """One feature of length 1 per color of a class of objects, the mean over its prompts. `[colors, D]`"""
        key = (name, self.dtype)
        if key not in self._known_color_features:
            texts = [prompt.format(color=color, name=name) for color in COLORS for prompt in COLOR_PROMPTS]
            features = text_features(self.clip, self.tokenizer, texts).unflatten(0, (len(COLORS), len(COLOR_PROMPTS)))
            self._known_color_features[key] = F.normalize(features.mean(dim=1), dim=-1)
        return self._known_color_features[key].to(self.device)


def read_detections(
    class_logits: Tensor, mask_logits: Tensor, input_size: Sequence[int], image_size: Sequence[int]
) -> dict[str, list[Detection]]:
    """
    Read the objects from the output of a Mask2Former for one image, by the rules of MMDetection, as GenEval does.

    An object's confidence is its class probability times the mean probability of the pixels of its mask. A query may
    give several objects.

    Args:
        class_logits (`Tensor` of shape `[Q, 81]`):
            Logits of the classes; the last one is "no object".
        mask_logits (`Tensor` of shape `[Q, h, w]`):
            Logits of the masks, in the detector's own resolution.
        input_size (`Sequence[int]`):
            Height and width of the detector's input.
        image_size (`Sequence[int]`):
            Height and width of the image.

    Returns:
        `dict[str, list[Detection]]`: the objects by class.
    """
    probabilities = class_logits.softmax(dim=-1)[:, :-1].flatten()
    best = probabilities.topk(min(MAX_DETECTIONS, len(probabilities)))
    likely = best.values > THRESHOLD  # the mask can only lower the confidence, so the others do not count
    found: dict[str, list[Detection]] = defaultdict(list)
    # One mask after the other: a hundred masks in full size need gigabytes.
    for probability, place in zip(best.values[likely], best.indices[likely].tolist(), strict=True):
        query, label = divmod(place, len(CLASSES))
        mask = mask_logits[query][None, None]
        for size in (input_size, image_size):
            mask = F.interpolate(mask, size=tuple(size), mode="bilinear", align_corners=False)
        mask = mask[0, 0]
        inside = mask > 0
        pixels = inside.cpu().numpy()
        if not pixels.any():
            continue
        score = probability * (mask.sigmoid() * inside).sum() / (inside.sum() + 1e-6)
        columns, rows = np.flatnonzero(pixels.any(axis=0)), np.flatnonzero(pixels.any(axis=1))
        box = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
        found[CLASSES[label]].append(Detection(box, score.item(), pixels))
    return dict(found)


def _requests(prompts: Sequence[str], columns: Mapping[str, list]) -> list[Request | None]:
    if "include" not in columns or "tag" not in columns:
        raise ValueError(
            f"GenEval needs the columns `include` and `tag`; the dataset has {', '.join(columns) or 'no columns'}. "
            "Add them, with `None` where GenEval does not apply."
        )
    exclude = columns.get("exclude", [None] * len(prompts))
    return [parse_request(*row) for row in zip(prompts, columns["include"], columns["tag"], exclude, strict=True)]
