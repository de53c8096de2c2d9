# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Settings of an evaluation that cannot work are refused."""

import pytest
from transformers import HfArgumentParser

from trl_marble.evaluation import EvaluationConfig


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_generations": 0}, "`num_generations` is 0; it must be an integer of at least 1"),
        ({"num_generations": 2.5}, "`num_generations` is 2.5"),
        ({"seed": -1}, "`seed` is -1"),
        ({"num_inference_steps": True}, "`num_inference_steps` is True"),
        ({"height": 0}, "`height` is 0; .* leave it out to use the pipeline's own"),
        ({"width": 2.5}, "`width` is 2.5; .* leave it out to use the pipeline's own"),
        ({"batch_size": 0}, "`batch_size` is 0"),
        ({"guidance_scale": float("nan")}, "`guidance_scale` is nan"),
        ({"reward_failure": "ignore"}, "'ignore'; it must be one of 'raise', 'mask'"),
        ({"reward_timeout": 0.0}, "`reward_timeout` is 0.0"),
        ({"output_dir": " "}, "`output_dir` is ' '"),
    ],
)
def test_bad_settings(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        EvaluationConfig(**({"output_dir": "out"} | settings))


def test_a_parser_of_the_command_line_reads_it() -> None:
    words = "--output_dir out --adapter me/lora --height 48 --width 64 --bf16 --reward_timeout 1.5"
    (config,) = HfArgumentParser(EvaluationConfig).parse_args_into_dataclasses(words.split())
    wanted = {"adapter": "me/lora", "height": 48, "width": 64, "bf16": True, "reward_timeout": 1.5}
    assert config == EvaluationConfig("out", **wanted)
