# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The second world of the benchmarks: captions, pictures, rewards, networks, and the script that trains all of it."""

import base64
import hashlib
import sys
import tarfile

import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES
from PIL import Image, ImageDraw


sys.path += [str(EXAMPLES / "benchmarks"), str(EXAMPLES / "scripts")]
import emojiworld  # noqa: E402
import pretrain_emojiworld  # noqa: E402
from emojiworld import load_prompts, pictures, rewards  # noqa: E402
from emojiworld.captions import (  # noqa: E402
    BACKGROUNDS,
    SOURCES,
    all_words,
    emoji_images,
    pair,
    plain,
    random_caption,
    scene,
    split_captions,
)
from emojiworld.degradations import HELD_OUT, LEARNED, degrade  # noqa: E402
from emojiworld.drawing import COLOUR_JITTER, SIZE, draw_picture, generate  # noqa: E402
from emojiworld.networks import NETWORKS, NETWORKS_FOLDER, build_network, load_network, save_network  # noqa: E402
from emojiworld.pictures import read_emoji  # noqa: E402
from emojiworld.rewards import background, simple, vivid  # noqa: E402


PROGRAMS = (background, vivid, simple)
needs_networks = pytest.mark.skipif(
    not NETWORKS_FOLDER.is_dir(), reason="EmojiWorld's networks are not here: run pretrain_emojiworld.py"
)
needs_pipeline = pytest.mark.skipif(
    not emojiworld.PIPELINE_FOLDER.is_dir(), reason="EmojiWorld's pipeline is not here: run pretrain_emojiworld.py"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Stand-ins for the pictures of the emoji: rings and bars, each in its own colours, with transparent margins."""
    folder = tmp_path_factory.mktemp("emoji")
    rng = np.random.default_rng(0)
    for image in emoji_images().values():
        canvas = Image.new("RGBA", (64, 64), (255, 0, 255, 0))
        draw = ImageDraw.Draw(canvas)
        outer, inner, bar = (tuple(rng.integers(0, 256, 3).tolist()) for _ in range(3))
        draw.ellipse((6, 6, 57, 57), fill=outer)
        draw.ellipse((20, 20, 44, 44), fill=inner)
        draw.rectangle((14, 28, 50, 34), fill=bar)
        canvas.save(folder / image)
    return folder


@pytest.fixture(scope="module")
def emoji(folder):
    return read_emoji(folder)


def columns(captions):
    return {"prompts": [c.prompt for c in captions], "background": [c.background for c in captions]}


def test_names_are_short_and_distinct():
    names = list(emoji_images())
    assert len(names) == len(set(emoji_images().values())) == 240
    assert all(1 <= len(name.split()) <= 2 and name.replace(" ", "").isalpha() for name in names)
    assert all(name == name.lower() for name in names)


def test_splits_share_no_prompt_and_have_equal_shares_of_the_sources():
    train, test = load_prompts("train"), load_prompts("test")
    assert not set(train["prompt"]) & set(test["prompt"])
    for dataset, size in ((train, 134), (test, 16)):
        assert dataset.column_names == ["prompt", "source", "background"]
        assert len(set(dataset["prompt"])) == len(dataset)
        assert [dataset["source"].count(source) for source in SOURCES] == [size] * 3
    pairs = [c.names for split in ("train", "test") for c in split_captions(split) if c.source == "pair"]
    assert len({frozenset(names) for names in pairs}) == len(pairs)
    assert load_prompts("test")[:] == test[:]
    with pytest.raises(ValueError, match="validation"):
        load_prompts("validation")


def test_columns_say_what_the_prompt_asks_for():
    for row in load_prompts("train"):
        assert (row["background"] is not None) == (row["source"] == "scene")
        if row["background"] is not None:
            assert row["prompt"].endswith(f" on a {row['background']} background")
        assert (" and " in row["prompt"]) == (row["source"] == "pair")


def test_every_word_is_one_token_and_no_prompt_is_too_long():
    arguments = pretrain_emojiworld.argparse.Namespace(
        initial_vae=pretrain_emojiworld.Path("none"), initial_transformer=pretrain_emojiworld.Path("none")
    )
    tokenizer = pretrain_emojiworld.build_untrained(arguments).tokenizer
    rng = np.random.default_rng(0)
    prompts = [c.prompt for split in ("train", "test") for c in split_captions(split)]
    for prompt in prompts + [random_caption(rng).prompt for _ in range(200)] + list(emoji_images()):
        assert tokenizer.tokenize(prompt) == [word + "</w>" for word in prompt.split()]
        assert len(prompt.split()) + 2 <= tokenizer.model_max_length == 10
        assert set(prompt.split()) <= set(all_words())


def test_drawing_is_deterministic(emoji):
    first, again, other = (list(generate(12, seed, emoji)) for seed in (3, 3, 4))
    assert [c for c, _ in first] == [c for c, _ in again] != [c for c, _ in other]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))
    assert all(image.size == (SIZE, SIZE) and image.mode == "RGB" for _, image in first)


def changed(caption, emoji, seed):
    """Where a picture is not its background, `[64, 64]`, and the colour of the background."""
    pixels = np.asarray(draw_picture(caption, emoji, np.random.default_rng(seed))).astype(int)
    colours, counts = np.unique(pixels.reshape(-1, 3), axis=0, return_counts=True)
    ground = colours[counts.argmax()]
    return (pixels != ground).any(axis=2), ground


@pytest.mark.parametrize("colour", list(BACKGROUNDS))
def test_the_background_has_the_asked_colour_and_the_emoji_its_size(emoji, colour):
    shown, ground = changed(scene("fox", colour), emoji, 0)
    assert np.abs(ground - BACKGROUNDS[colour]).max() <= COLOUR_JITTER
    height, width = (np.flatnonzero(shown.any(axis=axis)) for axis in (1, 0))
    for side in (np.ptp(height) + 1, np.ptp(width) + 1):
        assert 0.5 * SIZE <= side <= SIZE


def test_pairs_stand_side_by_side(emoji):
    shown, _ = changed(pair("fox", "pizza"), emoji, 0)
    for half in (shown[:, :32], shown[:, 32:]):
        assert 0.1 < half.mean() < 0.8


def test_transparent_colours_do_not_leak(emoji):
    pixels = np.asarray(draw_picture(scene("fox", "green"), emoji, np.random.default_rng(0))).astype(int)
    # The transparent pixels of the stand-ins are magenta.
    assert np.abs(pixels - (255, 0, 255)).sum(axis=2).min() > 100


def test_pictures_that_are_missing_or_others_are_refused(tmp_path, folder, monkeypatch):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_emoji(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="lacks 240 of the 240 pictures"):
        read_emoji(tmp_path)
    path = tmp_path / "emoji.tgz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(folder, f"package/{pictures.IMAGES}")
    with pytest.raises(ValueError, match="SHA-512"):
        read_emoji(path)
    monkeypatch.setattr(pictures, "SHA512", base64.b64encode(hashlib.sha512(path.read_bytes()).digest()).decode())
    read = read_emoji(path)
    assert list(read) == list(emoji_images()) and read["fox"].size == read_emoji(folder)["fox"].size == (52, 52)


@pytest.mark.parametrize("kinds", [LEARNED, HELD_OUT])
def test_damage_grows_with_its_strength(emoji, kinds):
    batch = np.stack([np.asarray(image) for _, image in generate(8, 0, emoji)]).astype(np.float32)
    for kind in kinds:
        damage = []
        for strength in (0.0, 0.3, 1.0):
            rng = np.random.default_rng(0)
            worse = [kind(batch[i], batch[i - 1], strength, rng) for i in range(len(batch))]
            damage.append(np.abs(np.stack(worse) - batch).mean())
        assert damage[0] == pytest.approx(0, abs=1e-3) and damage[0] < damage[1] < damage[2], kind.__name__


def test_a_batch_is_damaged_by_the_strengths_that_are_returned(emoji):
    batch = np.stack([np.asarray(image) for _, image in generate(64, 0, emoji)])
    (worse, strengths), (again, _) = (degrade(batch, LEARNED, 0.5, np.random.default_rng(0)) for _ in range(2))
    assert worse.dtype == np.uint8 and worse.shape == batch.shape and np.array_equal(worse, again)
    assert strengths.min() == 0 and 0.4 < strengths.max() <= 0.5
    same = np.array([np.array_equal(a, b) for a, b in zip(worse, batch, strict=True)])
    assert same[strengths == 0].all() and not same[strengths > 0.05].any()


def test_background_applies_to_scenes_only(emoji):
    rng = np.random.default_rng(0)
    captions = [scene("fox", "red"), pair("fox", "pizza"), plain("fox"), scene("fox", "blue")]
    images = [draw_picture(caption, emoji, rng) for caption in captions]
    right = background(images=images, **columns(captions))
    assert [value is None for value in right] == [False, True, True, False]
    assert min(right[0], right[3]) > 0.75
    wrong = background(images=images[:1], prompts=[""], background=["blue"])[0]
    assert wrong < 0.15


def test_drawn_pictures_spread_and_vivid_and_simple_conflict(emoji):
    captions, images = zip(*generate(150, 0, emoji), strict=True)
    spread = {f.__name__: f(images=list(images), **columns(captions)) for f in (vivid, simple)}
    for values in spread.values():
        assert all(0 <= value <= 1 for value in values)
        assert np.std(values) > 0.05 and 0.05 < np.mean(values) < 0.95
    assert np.corrcoef(spread["vivid"], spread["simple"])[0, 1] < -0.2


def trivial_pictures():
    rng = np.random.default_rng(0)
    blocks = (rng.integers(0, 2, (8, 8, 3)) * 255).astype(np.uint8)
    return {
        "noise": Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)),
        "blocks": Image.fromarray(blocks).resize((64, 64), Image.Resampling.NEAREST),
        "halves": Image.fromarray(np.uint8([[BACKGROUNDS["red"], BACKGROUNDS["blue"]]])).resize((64, 64), 0),
        **{colour: Image.new("RGB", (64, 64), value) for colour, value in BACKGROUNDS.items()},
    }


def test_no_trivial_picture_has_all_of_the_programs_rewards(emoji):
    for name, image in trivial_pictures().items():
        values = [f(images=[image], prompts=["fox"], background=["red"])[0] for f in PROGRAMS]
        assert min(values) < 0.05, name
    rng = np.random.default_rng(0)
    drawn = [draw_picture(scene(name, "red"), emoji, rng) for name in emoji_images()]
    assert np.mean([min(f(images=[image], background=["red"])[0] for f in PROGRAMS) for image in drawn]) > 0.1


def test_sizes_that_the_patches_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="60x64"):
        vivid(images=[Image.new("RGB", (60, 64))])


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_are_small_and_survive_a_file(tmp_path, name):
    torch.manual_seed(0)
    network = build_network(name, all_words())
    assert 100_000 < sum(p.numel() for p in network.parameters()) < 250_000
    save_network(network, tmp_path / f"{name}.safetensors")
    assert (tmp_path / f"{name}.safetensors").stat().st_size < 600_000
    loaded = load_network(name, tmp_path)
    batch = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    inputs = (batch, ["fox", "fox and pizza", "fox on a red background"]) if "matching" in name else (batch,)
    with torch.no_grad():
        assert torch.allclose(loaded(*inputs), network(*inputs), atol=2e-2)
    assert loaded(*inputs).shape == (3,) and not loaded(*inputs).requires_grad


def test_the_held_out_networks_have_another_architecture():
    shapes = {name: [p.shape for p in build_network(name, all_words()).trunk.parameters()] for name in NETWORKS}
    assert shapes["matching"] != shapes["matching_heldout"] and shapes["quality"] != shapes["quality_heldout"]


def test_words_order_does_not_count_and_unknown_ones_are_refused():
    scorer = build_network("matching", all_words())
    one, other = scorer.encode_captions(["fox and pizza", "pizza and fox"])
    assert torch.allclose(one, other, atol=1e-6) and one.norm().item() == pytest.approx(1)
    with pytest.raises(ValueError, match="'automobile'"):
        scorer.encode_captions(["fox", "automobile"])


def test_missing_networks_and_names_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="pretrain_emojiworld"):
        load_network("quality", tmp_path)
    with pytest.raises(ValueError, match="'beauty'"):
        build_network("beauty", all_words())
    with pytest.raises(FileNotFoundError, match="pretrain_emojiworld"):
        emojiworld.load_pipeline(tmp_path / "nothing")


def test_equal_captions_are_not_negatives_of_each_other():
    torch.manual_seed(0)
    scorer = build_network("matching", all_words())
    batch = torch.randn(3, 3, 64, 64)
    batch[1] = batch[0]
    same = pretrain_emojiworld.contrastive_loss(scorer, batch, ["fox", "fox", "pizza"])
    alone = pretrain_emojiworld.contrastive_loss(scorer, batch[1:], ["fox", "pizza"])
    # Each fox competes with the pizza only, in both directions; the pizza competes with two foxes.
    with torch.no_grad():
        logits = scorer.log_scale.exp() * scorer.encode_pictures(batch) @ scorer.encode_captions(["fox", "pizza"]).T
        fox = torch.logsumexp(logits[0], 0) - logits[0, 0] + torch.logsumexp(logits[[0, 2], 0], 0) - logits[0, 0]
        numbers = torch.stack([logits[2, 0], logits[2, 0], logits[2, 1]])
        down = torch.stack([logits[0, 1], logits[0, 1], logits[2, 1]])
        pizza = torch.logsumexp(numbers, 0) + torch.logsumexp(down, 0) - 2 * logits[2, 1]
    assert same.item() == pytest.approx(((2 * fox + pizza) / 6).item(), rel=1e-4)
    assert alone.item() != pytest.approx(same.item(), rel=1e-4)


def test_the_learned_rewards_use_the_networks(tmp_path, monkeypatch, emoji):
    for name in NETWORKS:
        save_network(build_network(name, all_words()), tmp_path / f"{name}.safetensors")
    monkeypatch.setattr(rewards, "_network", lambda name: load_network(name, tmp_path))
    captions, images = zip(*generate(6, 0, emoji), strict=True)
    functions = rewards.reward_funcs() + rewards.heldout_funcs()
    names = ["matching", "quality", "background", "vivid", "simple", "matching_heldout", "quality_heldout"]
    assert [f.__name__ for f in functions] == names
    for function in functions:
        values = function(images=list(images), source=[c.source for c in captions], **columns(captions))
        assert len(values) == 6 and all(value is None or 0 <= value <= 1 for value in values)
    larger = [image.resize((128, 128), Image.Resampling.NEAREST) for image in images]
    assert rewards.quality(images=larger) == pytest.approx(rewards.quality(images=list(images)), abs=0.1)


@needs_networks
def test_the_trained_networks_know_damage_and_their_files_are_small():
    for function in (rewards.reward_funcs()[1], rewards.heldout_funcs()[1]):
        assert function(images=[Image.new("RGB", (64, 64), BACKGROUNDS["red"])])[0] < 0.5
    files = list(NETWORKS_FOLDER.glob("*.safetensors"))
    assert len(files) == 4 and sum(file.stat().st_size for file in files) < 6_000_000


@needs_pipeline
@needs_networks
def test_samples_of_the_pipeline_match_their_prompts_better_than_others():
    pipeline = emojiworld.load_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    prompts = list(load_prompts("test")["prompt"])
    generators = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    images = pipeline(prompts, num_inference_steps=8, guidance_scale=1.0, generator=generators).images
    for function in (emojiworld.reward_funcs()[0], emojiworld.heldout_funcs()[0]):
        right, wrong = (function(images=images, prompts=p) for p in (prompts, prompts[1:] + prompts[:1]))
        assert np.mean(right) > np.mean(wrong) + 0.05


@pytest.mark.slow
def test_the_script_makes_everything_and_continues(tmp_path, folder, monkeypatch, capsys):
    sizes = {"num_pictures": 48, "vae_steps": 2, "flow_steps": 2, "network_steps": 2, "save_every": 1}
    batches = {"vae_batch_size": 8, "flow_batch_size": 12, "network_batch_size": 8}
    words = [text for name, value in (sizes | batches).items() for text in (f"--{name}", str(value))]
    command = ["pretrain_emojiworld.py", "--emoji", str(folder), "--output_dir", str(tmp_path), "--no-compile", *words]
    monkeypatch.setattr(sys, "argv", command)
    monkeypatch.setattr(pretrain_emojiworld, "GRID_PROMPTS", ("fox", "frog and pizza"))
    monkeypatch.setattr(pretrain_emojiworld, "NEW_PICTURES", 16)
    pretrain_emojiworld.main()
    assert "trained for" in capsys.readouterr().out
    assert all((tmp_path / name).is_file() for name in ("drawn.png", "vae.png", "samples.png", "networks.json"))
    pipeline = emojiworld.load_pipeline(tmp_path / "pipeline")
    assert pipeline("fox", num_inference_steps=1, guidance_scale=1.0).images[0].size == (64, 64)
    first = {name: load_network(name, tmp_path / "networks").state_dict() for name in NETWORKS}

    (tmp_path / "quality.pt").unlink()  # as if the run had been interrupted there
    pretrain_emojiworld.main()
    for name, weights in first.items():
        again = load_network(name, tmp_path / "networks").state_dict()
        assert all(torch.equal(again[key], weights[key]) for key in weights)
