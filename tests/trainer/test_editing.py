# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Training pipelines that edit images, which come from the column `image` of the dataset."""

from pathlib import Path

import pytest
import torch
from datasets import Image as ImageFeature
from PIL import Image
from tiny_edits import edit_image, edit_set, edit_set_of_all_modes, tiny_flux_kontext, tiny_qwen_image_edit
from trainer_helpers import blue, bright, small_trainer

from trl_marble.balance import SeparateBackward, WeightedBackward
from trl_marble.evaluation.evaluator import image_seed
from trl_marble.media import to_rgb
from trl_marble.update import step_gradient


KONTEXT = {"height": 16, "width": 16, "guidance_scale": 3.5, "max_sequence_length": 24}
# Checkpoints inside a generation batch (1, 3) and between two (2).
RESUMING = {"steps_per_generation": 2, "max_steps": 4, "save_strategy": "steps", "save_steps": 1}


def editing_trainer(folder, **overrides):
    settings = {"pipeline": tiny_flux_kontext(), "train_dataset": edit_set(), **KONTEXT}
    return small_trainer(folder, **(settings | overrides))


def weights(trainer) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in trainer.weights.parameters])


def test_rewards_see_the_edited_image_and_the_one_to_be_edited(tmp_path):
    dataset, seen = edit_set(), []

    def note(images, prompts, image, tag, **kwargs):
        seen.extend(zip(images, prompts, image, tag, strict=True))
        return [float(i) for i in range(len(images))]

    trainer = editing_trainer(tmp_path, reward_funcs=[note], max_steps=1)
    trainer.train()
    assert len(seen) == 4
    for edited, prompt, source, tag in seen:
        row = dataset["abcdef".index(tag)]
        assert isinstance(source, Image.Image) and edited.size == (16, 16)
        assert (source, prompt) == (row["image"], row["prompt"])


def test_images_of_any_mode_have_the_colours_for_rewards_that_they_have_for_the_pipeline(tmp_path):
    dataset, seen = edit_set_of_all_modes(), []

    def note(images, image, tag, **kwargs):
        seen.extend(zip(images, image, tag, strict=True))
        return [float(i) for i in range(len(images))]

    trainer = editing_trainer(
        tmp_path,
        reward_funcs=[note],
        train_dataset=dataset,
        eval_dataset=dataset,
        num_generations_eval=1,
        max_steps=3,
    )
    trainer.train()
    assert {tag for *_, tag in seen} == set("abcdef")
    for _, source, tag in seen:
        assert source == to_rgb(dataset["abcdef".index(tag)]["image"])
    seen.clear()
    trainer.evaluate()
    assert [tag for *_, tag in seen] == list("abcdef")
    args, flow = trainer.args, trainer.flow
    with trainer.weights.averaged.swapped_in():
        for i, (edited, source, _) in enumerate(seen):
            assert source == to_rgb(dataset[i]["image"])
            conditioning = flow.encode([dataset[i]["prompt"]], [source])
            seed = image_seed(args.seed, i, 0)
            assert flow.rollout(conditioning, [seed], args.num_inference_steps).images[0] == edited


def test_the_samples_are_edits_of_their_own_images(tmp_path):
    """Of the same seeds, other images make other samples, and the same images make the same ones."""

    def latents(colours: str):
        red, dog = edit_set()[0]["image"], edit_image(colours)
        dataset = edit_set().map(lambda row: {"image": dog if row["image"] == red else row["image"]})
        trainer = editing_trainer(tmp_path, train_dataset=dataset.select([0, 1]), max_steps=1)
        trainer.train()
        batch = trainer._batch
        order = batch.sample_ids.argsort()
        return batch.latents[order], batch.prompt_index[order]

    (first, of_sample), (second, again) = latents("red"), latents("black white")
    assert torch.equal(of_sample, again) and of_sample.unique().tolist() == [0, 1]
    same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
    assert sorted(same) == [False, False, True, True]
    assert same[0] == same[1]  # the two samples of a row


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = editing_trainer(tmp_path_factory.mktemp("whole"), **RESUMING)
    trainer.train()
    return trainer


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_equals_the_uninterrupted_run(uninterrupted, tmp_path, step):
    checkpoint = Path(uninterrupted.args.output_dir) / f"checkpoint-{step}"
    resumed = editing_trainer(tmp_path, **RESUMING)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert resumed.state.global_step == 4
    assert torch.equal(weights(resumed), weights(uninterrupted))


def test_a_generation_batch_is_not_trained_on_with_other_images(uninterrupted, tmp_path):
    checkpoint = Path(uninterrupted.args.output_dir) / "checkpoint-1"
    dataset = edit_set().map(lambda row: {"image": edit_image("green black")})
    resumed = editing_trainer(tmp_path, train_dataset=dataset, **RESUMING)
    with pytest.raises(ValueError, match="sampled from other rows than those of this run .*Resume with the same"):
        resumed.train(resume_from_checkpoint=str(checkpoint))


def test_micro_batches_of_one_sample_take_one_backward_pass_for_all_rewards(tmp_path, monkeypatch):
    made = []
    for kind in (SeparateBackward, WeightedBackward):

        def watched(*args, kind=kind):
            made.append(kind)
            return kind(*args)

        monkeypatch.setattr(step_gradient, kind.__name__, watched)

    def train(size):
        made.clear()
        trainer = editing_trainer(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            balance_every=1,
            max_steps=1,
        )
        trainer.train()
        return set(made), weights(trainer)

    kinds, together = train(4)
    assert kinds == {SeparateBackward}
    kinds, alone = train(1)
    assert kinds == {WeightedBackward}
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-5)


def test_evaluation_edits_the_images_of_its_dataset(tmp_path):
    seen = []

    def note(images, image, **kwargs):
        seen.extend(zip(images, image, strict=True))
        return [1.0] * len(images)

    rows = edit_set().select([0, 4])  # one prompt, two images
    assert rows[0]["prompt"] == rows[1]["prompt"]
    trainer = editing_trainer(tmp_path, reward_funcs=[note], eval_dataset=rows, num_generations_eval=1)
    metrics = trainer.evaluate()
    assert metrics["eval_rewards/note/mean"] == 1.0
    assert [source for _, source in seen] == [rows[0]["image"], rows[1]["image"]]
    args, flow = trainer.args, trainer.flow
    for i, (edited, source) in enumerate(seen):
        conditioning = flow.encode([rows[i]["prompt"]], [source])
        assert flow.rollout(conditioning, [image_seed(args.seed, i, 0)], args.num_inference_steps).images[0] == edited


def test_images_that_are_missing_are_refused_before_anything_is_sampled(tmp_path):
    with_images, without = edit_set(), edit_set().remove_columns("image")
    qwen = {"pipeline": tiny_qwen_image_edit(), "height": 16, "width": 16, "max_sequence_length": None}
    with pytest.raises(ValueError, match="QwenImageEditPipeline edits images, but `train_dataset` has no column"):
        small_trainer(tmp_path, train_dataset=without, **qwen)
    with pytest.raises(ValueError, match="QwenImageEditPipeline edits images, but `eval_dataset` has no column"):
        small_trainer(tmp_path, train_dataset=with_images, eval_dataset=without, **qwen)
    holed = with_images.map(lambda row: {"image": None if row["tag"] == "c" else row["image"]})
    with pytest.raises(ValueError, match="Row 2 of `train_dataset` has no image"):
        editing_trainer(tmp_path, train_dataset=holed)


def test_for_a_pipeline_of_text_alone_the_column_is_one_for_the_rewards(tmp_path):
    seen = []

    def note(images, image, **kwargs):
        seen.extend(image)
        return [1.0] * len(images)

    trainer = small_trainer(tmp_path, reward_funcs=[note, bright, blue], train_dataset=edit_set(), max_steps=1)
    trainer.train()
    assert len(seen) == 4 and all(isinstance(image, Image.Image) for image in seen)
    assert not trainer.edits


@pytest.fixture
def decoded(monkeypatch):
    """The images of prompt sets that were decoded, one entry for each time."""
    images, decode = [], ImageFeature.decode_example

    def noted(self, value, *args, **kwargs):
        images.append(decode(self, value, *args, **kwargs))
        return images[-1]

    monkeypatch.setattr(ImageFeature, "decode_example", noted)
    return images


@pytest.mark.slow
def test_images_are_decoded_once_for_a_generation_batch(tmp_path, decoded):
    """Not for each micro-batch, of which an optimizer step has six here, and not for each sample of a prompt."""
    trainer = editing_trainer(
        tmp_path,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=6,
        num_generations=4,
        num_iterations=2,
        max_steps=4,
    )
    assert not decoded
    trainer.train()
    assert len(decoded) == 2 * 3, "two generation batches of three prompts"


def test_an_evaluation_decodes_each_image_once(tmp_path, decoded):
    """Where batches hold all samples of a row, as here: eight are two rows of four."""
    trainer = editing_trainer(tmp_path, eval_dataset=edit_set(), num_generations_eval=4)
    trainer.evaluate()
    assert len(decoded) == 6


def test_a_micro_batch_holds_row_numbers_only(tmp_path):
    trainer = editing_trainer(tmp_path, gradient_accumulation_steps=3, num_generations=4)
    batches = list(trainer.get_train_dataloader())
    assert batches and all(type(row) is int for batch in batches for row in batch)
