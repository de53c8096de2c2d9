# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
GenEval 2 (https://github.com/facebookresearch/GenEval2): the mean probability of the right answers to questions about
an image (Soft-TIFA), 0 to 1. The questions are the column `vqa_list` of its prompts; without any it does not apply.
"""

import evaluation  # of the repository: it loads its model when it is imported
from pictures import saved


class Scorer:
    def __call__(self, images, prompts, columns):
        with saved(images) as paths:
            return [
                evaluation.soft_tifa(questions, path)[0] if questions else None
                for questions, path in zip(columns["vqa_list"], paths)  # noqa: B905
            ]
