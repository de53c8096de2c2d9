# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
UnifiedReward 2.0 (https://github.com/CodeGoat24/UnifiedReward): alignment, coherence and style of an image, each 1 to
5; the reward is their mean. The text below asks for what the authors' own text asks for, in other words.
"""

import re

import torch
from qwen_vl_utils import process_vision_info
from transformers import AutoProcessor, Qwen2_5_VLForConditionalGeneration


MODEL, AXES = "CodeGoat24/UnifiedReward-2.0-qwen-7b", ("Alignment", "Coherence", "Style")
TEXT = """Judge this generated image and its caption. Give three scores from 1 to 5: alignment (does it show what the \
caption says), coherence (is it free of glitches and distorted objects) and style (does it look good, whatever the \
caption). Answer in this format:

Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z

Text Caption: [{}]"""


class Scorer:
    def __init__(self):
        self.processor = AutoProcessor.from_pretrained(MODEL)
        self.model = Qwen2_5_VLForConditionalGeneration.from_pretrained(MODEL, torch_dtype="auto", device_map="cuda")

    def __call__(self, images, prompts, columns):
        return [read(self.answer(image, prompt)) for image, prompt in zip(images, prompts)]  # noqa: B905

    def answer(self, image, prompt):
        content = [{"type": "image", "image": image}, {"type": "text", "text": TEXT.format(prompt)}]
        messages = [{"role": "user", "content": content}]
        text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        shown, _ = process_vision_info(messages)
        inputs = self.processor(text=[text], images=shown, padding=True, return_tensors="pt").to(self.model.device)
        with torch.no_grad():
            tokens = self.model.generate(**inputs, max_new_tokens=256, do_sample=False)
        new = tokens[:, inputs.input_ids.shape[1] :]
        return self.processor.batch_decode(new, skip_special_tokens=True)[0]


def read(answer):
    """The mean of the three scores, or an error, which is one of this image alone, if they are not all certain."""
    scores = []
    for axis in AXES:
        found = set(re.findall(rf"{axis} Score \(1-5\):\s*([-\d.,/]*\d)", answer))
        score = found.pop() if len(found) == 1 else ""
        if not re.fullmatch(r"[1-5](\.\d+)?", score) or float(score) > 5:
            return ValueError(f"the answer has not all three scores from 1 to 5: {answer[:200]!r}")
        scores.append(float(score))
    return sum(scores) / len(scores)
