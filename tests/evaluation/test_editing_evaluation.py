# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Evaluations of pipelines that edit images, which come from the column `image` of the prompt set."""

import dataclasses

import pytest
from PIL import Image
from tiny_edits import edit_image, edit_set, edit_set_of_all_modes, tiny_flux_kontext

from trl_marble.evaluation import EvaluationConfig, EvaluationResults, evaluate_pipeline
from trl_marble.media import to_rgb
from trl_marble.pipelines import FlowPipeline


ROWS = [0, 4, 1]  # the first two have one prompt and different images


@pytest.fixture(scope="module")
def pipeline():
    return tiny_flux_kontext()


def config(folder) -> EvaluationConfig:
    return EvaluationConfig(
        str(folder),
        num_generations=2,
        num_inference_steps=2,
        batch_size=4,
        height=16,
        width=16,
        guidance_scale=3.5,
        max_sequence_length=24,
    )


def test_every_image_is_an_edit_of_its_row_and_the_evaluation_is_continued_as_it_was(pipeline, tmp_path):
    scored = []

    def note(images, image, **kwargs):
        scored.extend(image)
        return [0.5] * len(images)

    rows = edit_set().select(ROWS)
    results = evaluate_pipeline(pipeline, note, rows, config(tmp_path))
    assert scored == [rows[i]["image"] for i in (0, 0, 1, 1, 2, 2)]
    flow = FlowPipeline(pipeline, 16, 16, guidance_scale=3.5, max_sequence_length=24)
    for record in results.table.itertuples():
        row = rows[record.prompt_index]
        conditioning = flow.encode([row["prompt"]], [row["image"]])
        (edited,) = flow.rollout(conditioning, [record.seed], 2).images
        assert Image.open(results.folder / record.image).tobytes() == edited.tobytes()
    assert results.groups.tolist() == [0, 0, 1, 1, 2, 2] and len(results.prompt_diversity) == 3
    tagged = dataclasses.replace(results, table=results.table.assign(tag="a"))
    assert results.reward_names == ["note"] and tagged.averages("tag")["standard_error"].tolist() == [0.0]
    assert EvaluationResults.load(tmp_path).groups.tolist() == [0, 0, 1, 1, 2, 2]
    evaluate_pipeline(pipeline, note, edit_set().select(ROWS), config(tmp_path))  # the same images, as other objects
    assert len(scored) == 6


def test_images_of_any_mode_are_edited_and_scored_in_rgb(pipeline, tmp_path):
    scored = []

    def note(images, image, **kwargs):
        scored.extend(image)
        return [0.5] * len(images)

    rows = edit_set_of_all_modes()
    results = evaluate_pipeline(pipeline, note, rows, config(tmp_path))
    assert scored == [to_rgb(row["image"]) for row in rows for _ in range(2)]
    flow = FlowPipeline(pipeline, 16, 16, guidance_scale=3.5, max_sequence_length=24)
    for record in results.table.itertuples():
        conditioning = flow.encode([record.prompt], [scored[record.index]])
        (edited,) = flow.rollout(conditioning, [record.seed], 2).images
        assert Image.open(results.folder / record.image).tobytes() == edited.tobytes()


def test_an_evaluation_is_not_continued_with_other_images(pipeline, tmp_path):
    def note(images, **kwargs):
        return [0.5] * len(images)

    rows = edit_set().select(ROWS)
    evaluate_pipeline(pipeline, note, rows, config(tmp_path))
    others = rows.map(lambda row: {"image": edit_image("green black")})
    with pytest.raises(ValueError, match="`prompts_digest`"):
        evaluate_pipeline(pipeline, note, others, config(tmp_path))


def test_a_row_without_an_image_is_refused_before_anything_is_sampled(pipeline, tmp_path):
    holed = edit_set().map(lambda row: {"image": None if row["tag"] == "b" else row["image"]})
    with pytest.raises(ValueError, match="Row 1 of `prompts` has no image"):
        evaluate_pipeline(pipeline, lambda images, **kwargs: [0.5] * len(images), holed, config(tmp_path))
    assert list(tmp_path.iterdir()) == []
