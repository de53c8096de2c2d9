# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The script for videos from its command line, on a tiny Wan and tiny scorers."""

import functools

import pytest
import torch
from example_scripts import as_options, command_in_docstring, load_script, parse
from tiny_scorers import five_rewards
from tiny_videos import tiny_wan


@pytest.fixture
def script():
    return load_script("wan_video_rewards")


def test_the_command_in_the_docstring_is_one_that_the_script_takes(script, tmp_path):
    command = command_in_docstring(script, tmp_path)
    script_args, args = parse(script, *command, "--use_cpu")
    assert args.generation_batch_size * 8 == 16 * 8 and args.num_generations == 8  # on eight devices
    assert (args.height, args.width, args.num_frames % 4) == (480, 832, 1) and script_args.num_scored_frames == 4


def test_its_rewards_of_videos_pull_against_each_other(script):
    """Four videos of a grey level over time: still, even movement, twice as fast, flicker."""
    levels = torch.tensor([[0.5] * 5, [0.1, 0.2, 0.3, 0.4, 0.5], [0.1, 0.3, 0.5, 0.7, 0.9], [0.1, 0.5, 0.1, 0.5, 0.1]])
    videos = levels[:, :, None, None, None].expand(4, 5, 3, 2, 2)
    assert script.motion(videos=videos) == pytest.approx([0, 0.1, 0.2, 0.4])
    assert script.smoothness(videos=videos) == pytest.approx([0, 0, 0, -0.8], abs=1e-6)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The prompt .* has .* tokens:UserWarning")
def test_the_script_trains_and_leaves_an_adapter_with_a_card(script, tmp_path, monkeypatch):
    five_rewards(tmp_path)  # leaves the folder that the scorers load
    clip = str(tmp_path / "clip")
    monkeypatch.setattr(script, "PickScore", functools.partial(script.PickScore, model=clip, processor=clip))
    monkeypatch.setattr(script, "HPSv2", functools.partial(script.HPSv2, model=clip, tokenizer=clip))
    tiny_wan().save_pretrained(tmp_path / "wan")
    (tmp_path / "prompts.txt").write_text("a cat jumps\na street at night\n")
    arguments = {
        "model": tmp_path / "wan",
        "prompts": tmp_path / "prompts.txt",
        "num_scored_frames": 2,
        "output_dir": tmp_path / "run",
        "height": 16,
        "width": 32,
        "num_frames": 9,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "num_generations": 2,
        "num_inference_steps": 2,
        "max_steps": 1,
        "max_sequence_length": 16,
        "report_to": "none",
    }
    command = as_options(arguments)
    script.main(*parse(script, *command, "--use_cpu", "--activation_checkpointing"))
    card = (tmp_path / "run" / "README.md").read_text()
    for name in ("PickScore", "HPSv2", "motion", "smoothness"):
        assert name in card
    assert "WanPipeline" in card and "export_to_video" in card
    assert (tmp_path / "run" / "pytorch_lora_weights.safetensors").is_file()
    assert (tmp_path / "run" / "images" / "train_step_000001.webp").is_file()
