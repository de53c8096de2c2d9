# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Training on videos: a tiny Wan, a reward of whole videos and one of their frames."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanPipeline
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_videos import tiny_wan
from trainer_helpers import bright, prompt_set, small_trainer

from trl_marble.media import open_sample
from trl_marble.rewards import FrameReward


def motion(videos, **kwargs):
    """Mean absolute difference between a frame and the next, in [0, 1]."""
    return [np.abs(np.diff([np.asarray(f, dtype=float) / 255 for f in video], axis=0)).mean() for video in videos]


def video_trainer(output_dir, **overrides):
    settings = {"height": 16, "width": 32, "num_frames": 9, "num_generations_eval": 2, "balance_every": 1}
    settings |= {"pipeline": tiny_wan(), "reward_funcs": [motion, FrameReward(bright, num_frames=3)]}
    return small_trainer(output_dir, **(settings | overrides))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps with all its pictures, its evaluations and its card."""
    folder = tmp_path_factory.mktemp("video")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TENSORBOARD_LOGGING_DIR", str(folder / "tensorboard"))
        trainer = video_trainer(
            folder / "run",
            eval_dataset=prompt_set(),
            log_images=True,
            log_images_steps=1,
            num_images_to_log=2,
            report_to="tensorboard",
        )
    trainer.before = {name: parameter.detach().clone() for name, parameter in trainer.weights.trained.items()}
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    trainer.save_model()
    trainer.create_model_card()
    return trainer


def test_two_rewards_train_the_adapter(trained):
    assert any(not parameter.equal(trained.before[name]) for name, parameter in trained.weights.trained.items())
    rows = [row for row in trained.state.log_history if "loss" in row]
    assert len(rows) == 2
    for row in rows:
        assert math.isfinite(row["loss"]) and row["drift/diversity"] > 0
        for name in ("motion", "bright"):  # the reward in `FrameReward` has its own name
            assert row[f"rewards/{name}/valid"] == 1 and row[f"rewards/{name}/std"] > 0


def test_evaluations_keep_videos_and_score_them(trained):
    before, after = trained.evaluations
    assert before.rewards.shape == (2, 12) and not before.rewards.isnan().any()
    video = after.gallery[prompt_set()["prompt"][0]][0]
    assert isinstance(video, list) and len(video) == 9 and video[0].size == (32, 16)
    first = [videos[0] for videos in after.gallery.values()]
    assert motion(first) == pytest.approx([after.rewards[0, i].item() for i in (0, 6)])  # of prompts 0 and 3
    assert bright([video[0], video[4], video[8]]) != [bright(video[:1])[0]] * 3
    assert np.mean(bright([video[0], video[4], video[8]])) == pytest.approx(after.rewards[1, 0].item())


@pytest.mark.parametrize("grid", ["train_step_000001", "eval_step_000002"])
def test_each_grid_is_a_picture_and_an_animation_of_the_same(trained, grid):
    folder = Path(trained.args.output_dir) / "images"
    assert Image.open(folder / f"{grid}.png").format == "PNG"
    with Image.open(folder / f"{grid}.webp") as playing:
        assert playing.n_frames == 9
        frames = []
        for place in range(9):
            playing.seek(place)
            frames.append(np.asarray(playing.convert("RGB"), dtype=float))
    moved = np.abs(np.diff(frames, axis=0)).mean(axis=(0, 3)) > 8
    assert 0.1 < moved.mean() < 0.9  # the videos move, the paper and its text do not


def test_trackers_get_the_still_grid(trained):
    folder = Path(trained.args.output_dir)
    found = EventAccumulator(str(folder.parent / "tensorboard"), size_guidance={"images": 0})
    found.Reload()
    assert [event.step for event in found.Images("train/images")] == [1, 2]
    assert [event.step for event in found.Images("eval/images")] == [0, 2]
    with Image.open(folder / "images" / "eval_step_000002.png") as grid:
        assert (found.Images("eval/images")[-1].width, found.Images("eval/images")[-1].height) == grid.size


def test_the_card_plays_its_videos_and_says_how_to_make_one(trained, tmp_path):
    folder = Path(trained.args.output_dir)
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: text-to-video" in card and "text-to-image" not in card
    assert "(images/sample_0.webp)" in card and "url: images/sample_0.webp" in card
    video = trained.evaluations[-1].gallery[prompt_set()["prompt"][0]][0]
    read = open_sample(folder / "images" / "sample_0.webp")
    assert len(read) == 9 and np.abs(np.subtract(read[4], video[4], dtype=float)).mean() < 12
    assert "height=16, width=32, num_frames=9" in card
    # The example, as a reader runs it.
    code = card.split("```python\n")[1].split("```")[0]
    tiny_wan().save_pretrained(tmp_path / "base")
    code = code.replace("path/to/the/base/pipeline", str(tmp_path / "base")).replace(
        "path/to/this/folder", str(folder)
    )
    code = code.replace("export_to_video(frames,", "written.append(frames);(").replace(", fps=16", "")
    written: list = []
    exec(code, {"written": written})
    assert len(written[0]) == 9


def test_the_adapter_loads_into_the_pipeline(trained):
    pipeline = tiny_wan()
    pipeline.load_lora_weights(trained.args.output_dir)
    assert isinstance(pipeline, WanPipeline) and "default_0" in pipeline.transformer.peft_config


def test_a_resumed_run_ends_as_the_whole_one(tmp_path):
    settings = {"max_steps": 3, "save_strategy": "steps", "save_steps": 1}
    whole = video_trainer(tmp_path / "whole", **settings)
    whole.train()
    resumed = video_trainer(tmp_path / "resumed", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-1"))
    for name, parameter in whole.weights.trained.items():
        assert torch.equal(parameter, resumed.weights.trained[name]), name


@pytest.mark.parametrize("argument", ["reward_funcs", "eval_reward_funcs"])
def test_rewards_of_images_are_refused_at_once(tmp_path, argument):
    given = {"reward_funcs": [motion]} | {argument: [bright]}
    with pytest.raises(
        ValueError, match=r"Reward `bright` scores images, and WanPipeline makes videos. Pass `FrameReward\("
    ):
        video_trainer(tmp_path, **given)


def test_rewards_and_frames_of_videos_are_refused_for_a_pipeline_of_images(tmp_path):
    with pytest.raises(ValueError, match="Reward `motion` scores videos, and StableDiffusion3Pipeline makes images"):
        small_trainer(tmp_path, reward_funcs=[motion])
    with pytest.raises(ValueError, match="num_frames=9 would be ignored: StableDiffusion3Pipeline makes images"):
        small_trainer(tmp_path, num_frames=9)
    with pytest.raises(ValueError, match="`num_frames` is 0; it must be at least 1"):
        small_trainer(tmp_path, num_frames=0)
