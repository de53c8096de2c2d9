# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A real pipeline is sampled, scored, interrupted and continued."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from evaluation_helpers import bright, prompt_set, random_adapter, red_only, small_evaluation
from PIL import Image

from trl_marble.evaluation import EvaluationResults, evaluate_pipeline
from trl_marble.evaluation.evaluator import image_seed
from trl_marble.rewards import RewardError


WORKER = Path(__file__).parents[1] / "support" / "evaluation_worker.py"


@pytest.fixture(scope="module")
def pipeline():
    import tiny

    return tiny.tiny_sd3(t5=False, num_layers=1)


@pytest.fixture(scope="module")
def whole(pipeline, tmp_path_factory) -> EvaluationResults:
    """An evaluation that was not interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    return evaluate_pipeline(pipeline, [bright, red_only], prompt_set(), small_evaluation(folder))


def scores(folder) -> str:
    return (Path(folder) / "scores.csv").read_text()


def test_the_table_says_what_was_sampled_and_how_it_was_scored(whole) -> None:
    table = whole.table
    assert list(table)[:7] == ["index", "prompt_index", "generation", "seed", "prompt", "source", "tag"]
    assert list(table)[7:] == ["image", "bright", "red_only"]
    assert table["prompt_index"].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert table["seed"].nunique() == 12
    for row in table.itertuples():
        image = Image.open(whole.folder / row.image)
        assert np.float32(bright([image])[0]) == np.float32(row.bright)
    assert table["red_only"].notna().tolist() == [True] * 3 + [False] * 3 + [True] * 3 + [False] * 3
    assert whole.failed == {"bright": 0, "red_only": 0}
    assert {"evaluation.json", "scores.csv", "images", "records", "contact_sheet.html"} == set(
        os.listdir(whole.folder)
    )


def test_images_are_those_of_the_pipeline_itself(whole, pipeline) -> None:
    row = whole.table.iloc[7]
    image = pipeline(
        row["prompt"],
        generator=torch.Generator("cpu").manual_seed(int(row["seed"])),
        num_inference_steps=2,
        guidance_scale=1.0,
        max_sequence_length=16,
    ).images[0]
    ours = np.asarray(Image.open(whole.folder / row["image"]), dtype=int)
    assert np.abs(np.asarray(image, dtype=int) - ours).max() <= 1


def test_seeds_depend_on_nothing_but_their_place() -> None:
    seeds = {image_seed(seed, row, generation) for seed in (0, 1) for row in range(20) for generation in range(20)}
    assert len(seeds) == 800 and max(seeds) < 2**53
    assert image_seed(0, 3, 1) == image_seed(0, 3, 1)


def test_more_images_a_prompt_keep_those_there_were(whole, pipeline, tmp_path) -> None:
    more = evaluate_pipeline(pipeline, bright, prompt_set(), small_evaluation(tmp_path, num_generations=4))
    first = more.table[more.table["generation"] < 3].reset_index(drop=True)
    assert first["seed"].equals(whole.table["seed"])
    np.testing.assert_allclose(first["bright"], whole.table["bright"], atol=1 / 255)


def test_rewards_get_the_columns_of_the_prompt_set(pipeline, tmp_path) -> None:
    seen = []

    def remember(images, prompts, source, tag, trainer_state):
        seen.extend(zip(prompts, source, tag, strict=True))
        return [0.0] * len(images)

    evaluate_pipeline(pipeline, remember, prompt_set(), small_evaluation(tmp_path, num_generations=1))
    assert seen == [tuple(row[name] for name in ("prompt", "source", "tag")) for row in prompt_set()]


def test_an_interrupted_evaluation_does_only_what_is_missing(whole, pipeline, tmp_path) -> None:
    calls = []

    class Bright:
        __name__ = "bright"

        def __call__(self, images, **kwargs):
            calls.append(len(images))
            if len(calls) == 2:
                raise ConnectionError("scorer went away")
            return bright(images)

    task = [Bright(), red_only], prompt_set(), small_evaluation(tmp_path)
    with pytest.raises(RewardError, match="scorer went away.* evaluate again with the same settings to continue"):
        evaluate_pipeline(pipeline, *task)
    assert not (tmp_path / "evaluation.json").exists()
    with pytest.raises(FileNotFoundError, match="Continue it with the same settings"):
        EvaluationResults.load(tmp_path)
    before = calls.copy()
    evaluate_pipeline(pipeline, *task)
    assert sum(calls[len(before) :]) == 12 - 5
    assert scores(tmp_path) == scores(whole.folder)
    evaluate_pipeline(pipeline, *task)
    assert sum(calls[len(before) :]) == 12 - 5


@pytest.mark.slow
def test_an_evaluation_that_was_killed_is_continued(whole, pipeline, tmp_path) -> None:
    command = [sys.executable, str(WORKER), str(tmp_path), "kill"]
    ended = subprocess.run(command, capture_output=True, timeout=120, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert ended.returncode == -signal.SIGKILL, ended.stderr.decode()
    assert (tmp_path / "records" / "batch_00000.json").is_file()
    assert not (tmp_path / "records" / "batch_00002.json").exists()
    evaluate_pipeline(pipeline, [bright, red_only], prompt_set(), small_evaluation(tmp_path))
    assert scores(tmp_path) == scores(whole.folder)


@pytest.mark.parametrize("damage", ["record cut", "score changed", "image changed", "image missing"])
def test_what_was_damaged_is_done_again(whole, pipeline, tmp_path, damage, caplog) -> None:
    task = [bright, red_only], prompt_set(), small_evaluation(tmp_path)
    evaluate_pipeline(pipeline, *task)
    record, image = tmp_path / "records" / "batch_00001.json", tmp_path / "images" / "00002_00.png"
    if damage == "record cut":
        record.write_text(record.read_text()[:-40])
    elif damage == "score changed":
        content = json.loads(record.read_text())
        content["images"][0]["rewards"][0] = 1.0
        record.write_text(json.dumps(content))
    elif damage == "image changed":
        Image.new("RGB", (16, 16)).save(image)
    else:
        image.unlink()
    evaluate_pipeline(pipeline, *task)
    assert scores(tmp_path) == scores(whole.folder)
    assert image.read_bytes() == (whole.folder / "images" / "00002_00.png").read_bytes()


def test_a_folder_is_not_continued_with_other_settings(whole, pipeline, tmp_path, tiny_sd3) -> None:
    folder = whole.folder
    rewards = [bright, red_only]
    for changed, message in (
        ({"seed": 1}, "`seed` was 0 and is 1"),
        ({"num_inference_steps": 3, "num_generations": 2}, "`num_generations` was 3 and is 2; `num_inference_steps`"),
    ):
        with pytest.raises(ValueError, match=message):
            evaluate_pipeline(pipeline, rewards, prompt_set(), small_evaluation(folder, **changed))
    with pytest.raises(ValueError, match=r"`rewards` was \['bright', 'red_only'\] and is \['bright'\]"):
        evaluate_pipeline(pipeline, bright, prompt_set(), small_evaluation(folder))
    with pytest.raises(ValueError, match="`prompts_digest`"):
        evaluate_pipeline(pipeline, rewards, prompt_set().rename_column("tag", "kind"), small_evaluation(folder))
    with pytest.raises(ValueError, match="`pipeline_digest`"):
        other = tiny_sd3(t5=False, num_layers=1, seed=1)
        evaluate_pipeline(other, rewards, prompt_set(), small_evaluation(folder))
    adapter = random_adapter(tiny_sd3(t5=False, num_layers=1), tmp_path)
    with pytest.raises(ValueError, match="`adapter_digest` was None"):
        evaluate_pipeline(pipeline, rewards, prompt_set(), small_evaluation(folder, adapter=str(adapter)))
    assert EvaluationResults.load(folder).table.equals(whole.table)


def test_an_adapter_is_evaluated_and_taken_off_again(whole, pipeline, tmp_path, tiny_sd3) -> None:
    trained = tiny_sd3(t5=False, num_layers=1)
    adapter = random_adapter(trained, tmp_path / "adapter")
    names = list(pipeline.transformer.state_dict())
    args = small_evaluation(tmp_path / "loaded", adapter=str(adapter.parent))
    loaded = evaluate_pipeline(pipeline, bright, prompt_set(), args)
    assert list(pipeline.transformer.state_dict()) == names
    in_place = evaluate_pipeline(trained, bright, prompt_set(), small_evaluation(tmp_path / "in place"))
    assert loaded.table["bright"].equals(in_place.table["bright"])
    assert not np.allclose(loaded.table["bright"], whole.table["bright"], atol=1 / 255)
    assert loaded.title.startswith("adapter on ")

    def fails(images, **kwargs):
        raise ConnectionError("scorer went away")

    args = small_evaluation(tmp_path / "fails", adapter=str(adapter.parent))
    with pytest.raises(RewardError):
        evaluate_pipeline(pipeline, fails, prompt_set(), args)
    assert list(pipeline.transformer.state_dict()) == names


def test_a_pipeline_is_loaded_by_name(tmp_path, tiny_sd3) -> None:
    pipeline = tiny_sd3(num_layers=1)
    pipeline.save_pretrained(tmp_path / "saved")
    by_object = evaluate_pipeline(pipeline, bright, prompt_set(), small_evaluation(tmp_path / "object"))
    found = evaluate_pipeline(tmp_path / "saved", bright, prompt_set(), small_evaluation(tmp_path / "name"))
    assert found.table.equals(by_object.table)
    evaluate_pipeline(tmp_path / "saved", bright, prompt_set(), small_evaluation(tmp_path / "object"))  # is continued
    assert found.title == "saved"


def test_failed_images_are_masked_and_counted(pipeline, tmp_path) -> None:
    def fragile(images, prompts, **kwargs):
        return [ValueError("no cats") if "cat" in p else v for v, p in zip(bright(images), prompts, strict=True)]

    with pytest.raises(RewardError, match="no cats .*'a cat'"):
        evaluate_pipeline(pipeline, fragile, prompt_set(), small_evaluation(tmp_path))
    results = evaluate_pipeline(pipeline, fragile, prompt_set(), small_evaluation(tmp_path, reward_failure="mask"))
    assert results.failed == {"fragile": 3}
    assert results.table["fragile"].isna().tolist() == [False] * 3 + [True] * 3 + [False] * 6
    with pytest.raises(RewardError, match="failed for 3 of 12 images"):
        evaluate_pipeline(pipeline, fragile, prompt_set(), small_evaluation(tmp_path))


def test_a_reward_that_fails_everywhere_is_not_masked(pipeline, tmp_path) -> None:
    def broken(images, **kwargs):
        raise ConnectionError("no server")

    with pytest.raises(RewardError, match="`broken` failed for 12 of 12 images and scored 0"):
        args = small_evaluation(tmp_path, reward_failure="mask")
        evaluate_pipeline(pipeline, [bright, broken], prompt_set(), args)


def test_latents_that_are_not_finite_stop_an_evaluation_or_count_as_failed(pipeline, tmp_path) -> None:
    calls = []

    def overflow(module, inputs, output):
        """Of the third image, in the last solver step of the first batch."""
        calls.append(None)
        if len(calls) == 2:
            output[0][2] = torch.nan

    task = [bright, red_only], prompt_set()
    handle = pipeline.transformer.register_forward_hook(overflow)
    try:
        with pytest.raises(FloatingPointError, match="latents of 1 of 5 .*'a red dog'.*set `reward_failure='mask'`"):
            evaluate_pipeline(pipeline, *task, small_evaluation(tmp_path / "raise"))
        calls.clear()
        masked = evaluate_pipeline(pipeline, *task, small_evaluation(tmp_path / "mask", reward_failure="mask"))
    finally:
        handle.remove()
    assert masked.failed == {"bright": 1, "red_only": 1}
    assert masked.table["bright"].isna().tolist() == [place == 2 for place in range(12)]
    assert masked.diversity()[0] > 0
    # Sampled again, where it raised, it is as if nothing had been.
    again = evaluate_pipeline(pipeline, *task, small_evaluation(tmp_path / "raise"))
    left = again.table.drop(index=2)
    assert left["bright"].equals(masked.table["bright"].drop(index=2))


def test_bad_input_is_refused_before_anything_is_written(pipeline, tmp_path) -> None:
    args = small_evaluation(tmp_path / "out")

    def seed(images, **kwargs):
        return bright(images)

    with pytest.raises(ValueError, match="A reward is named 'seed'"):
        evaluate_pipeline(pipeline, seed, prompt_set(), args)
    with pytest.raises(ValueError, match="no `prompt`"):
        evaluate_pipeline(pipeline, bright, prompt_set().rename_column("prompt", "text"), args)
    with pytest.raises(TypeError, match="`args` is a str"):
        evaluate_pipeline(pipeline, bright, prompt_set(), str(tmp_path))
    with pytest.raises(OSError, match="has no adapter"):
        evaluate_pipeline(pipeline, bright, prompt_set(), small_evaluation(tmp_path / "out", adapter=str(tmp_path)))
    assert not (tmp_path / "out").exists()


def test_a_reward_that_cannot_be_called_is_refused_before_anything_is_sampled(pipeline, tmp_path) -> None:
    def narrow(images, prompts):
        return bright(images)

    def needs_a_target(images, target, log_metric, **kwargs):
        return bright(images)

    with pytest.raises(ValueError, match=r"`narrow` .* does not accept .*columns of `prompts` \(`source`, `tag`\)"):
        evaluate_pipeline(pipeline, [bright, narrow], prompt_set(), small_evaluation(tmp_path / "out"))
    with pytest.raises(ValueError, match="no value for `target`"):
        evaluate_pipeline(pipeline, needs_a_target, prompt_set(), small_evaluation(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_broken_reward_stops_an_evaluation_without_advice_to_mask_it(pipeline, tmp_path) -> None:
    calls = []

    def broken(images, log_metric, log_extra, **kwargs):
        calls.append(None)
        log_metric("n", 1)
        raise TypeError("takes no cats")

    with pytest.raises(RewardError, match="takes no cats.* Batches that were finished are kept") as caught:
        evaluate_pipeline(pipeline, broken, prompt_set(), small_evaluation(tmp_path))
    assert "mask" not in str(caught.value) and len(calls) <= 2


def test_bfloat16_is_close(whole, pipeline, tmp_path) -> None:
    results = evaluate_pipeline(pipeline, bright, prompt_set(), small_evaluation(tmp_path, bf16=True))
    assert not results.table["bright"].equals(whole.table["bright"])
    np.testing.assert_allclose(results.table["bright"], whole.table["bright"], atol=0.02)
    assert pipeline.dtype == torch.float32


def test_a_solver_that_draws_noise_gives_the_same_images_when_continued(tmp_path, tiny_sd3) -> None:
    pipeline = tiny_sd3(t5=False, num_layers=1)
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    state = torch.random.get_rng_state()
    whole = evaluate_pipeline(pipeline, bright, prompt_set(), small_evaluation(tmp_path / "whole"))
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.randn(5)
    evaluate_pipeline(pipeline, bright, prompt_set(), small_evaluation(tmp_path / "again"))
    (tmp_path / "again" / "records" / "batch_00001.json").unlink()
    again = evaluate_pipeline(pipeline, bright, prompt_set(), small_evaluation(tmp_path / "again"))
    assert again.table.equals(whole.table)


def test_processes_that_were_launched_and_do_not_work_together_are_refused(pipeline, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="2 processes were launched .* and 1 would work together"):
        evaluate_pipeline(pipeline, bright, prompt_set(), small_evaluation(tmp_path))
