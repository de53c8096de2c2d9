# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""ImageReward on a tiny random checkpoint in the original's layout, against a forward pass written with its names."""

import json
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import BertTokenizer

from trl_marble.rewards import ModelReward
from trl_marble.rewards.image_reward import ImageReward


WIDTH, DEPTH, PATCH, GRID = 128, 2, 8, 4  # of the image encoder: two heads of 64, images of 32 pixels
TEXT = {
    "vocab_size": 0,  # set from the vocabulary
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-12,
    "pad_token_id": 0,
    "add_cross_attention": True,
    "encoder_width": 77,  # overwritten in the original, too
}
LETTERS = "abcdefghijklmnopqrstuvwxyz猫коша"
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *LETTERS, *(f"##{letter}" for letter in LETTERS)]
TEXT["vocab_size"] = len(VOCABULARY) + 2
HEAD = {0: (1024, 32), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}

PROMPTS = ["a cat", "", "a cat on a mat", "猫 и кошка", "Ä sign [ENC] x", "word " * 60]
SIZES = [(32, 32), (96, 64), (1, 1), (40, 131), (35, 32), (32, 200)]


def checkpoint():
    """Random weights under the names, and in the shapes, of ImageReward.pt."""
    width, hidden, inner = WIDTH, TEXT["hidden_size"], TEXT["intermediate_size"]
    shapes = {
        "blip.visual_encoder.cls_token": (1, 1, width),
        "blip.visual_encoder.pos_embed": (1, GRID**2 + 1, width),
        "blip.visual_encoder.patch_embed.proj.weight": (width, 3, PATCH, PATCH),
        "blip.visual_encoder.patch_embed.proj.bias": (width,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (TEXT["vocab_size"], hidden),
        "blip.text_encoder.embeddings.position_embeddings.weight": (TEXT["max_position_embeddings"], hidden),
        "blip.text_proj.weight": (7, hidden),  # takes no part in the score
    }
    linear = {f"mlp.layers.{number}": shape for number, shape in HEAD.items()}
    norms = {"blip.visual_encoder.norm": width, "blip.text_encoder.embeddings.LayerNorm": hidden}
    for i in range(DEPTH):
        block = f"blip.visual_encoder.blocks.{i}"
        linear |= {f"{block}.attn.qkv": (3 * width, width), f"{block}.attn.proj": (width, width)}
        linear |= {f"{block}.mlp.fc1": (96, width), f"{block}.mlp.fc2": (width, 96)}
        norms |= {f"{block}.norm1": width, f"{block}.norm2": width}
    for i in range(TEXT["num_hidden_layers"]):
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for kind, source in (("attention", hidden), ("crossattention", width)):
            linear |= {f"{layer}.{kind}.self.{part}": (hidden, source) for part in ("key", "value")}
            linear |= {
                f"{layer}.{kind}.self.query": (hidden, hidden),
                f"{layer}.{kind}.output.dense": (hidden, hidden),
            }
            norms[f"{layer}.{kind}.output.LayerNorm"] = hidden
        linear |= {f"{layer}.intermediate.dense": (inner, hidden), f"{layer}.output.dense": (hidden, inner)}
        norms[f"{layer}.output.LayerNorm"] = hidden
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, size in norms.items():
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    random = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in shapes.items():
        spread = shape[-1] ** -0.5 if name.removesuffix(".weight") in linear else 0.3
        weights[name] = torch.randn(shape, generator=random) * spread + (name.removesuffix(".weight") in norms)
    weights["blip.text_encoder.embeddings.position_ids"] = torch.arange(TEXT["max_position_embeddings"]).expand(1, -1)
    return weights


def original_score(w, image, token_ids):
    """The score of one image and one prompt's tokens, step by step as in the paper's code. Padding is left out."""

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name, eps):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps)

    def attend(q, k, v, heads):
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
        weights = (q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])).softmax(dim=-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    side = PATCH * GRID
    short = min(image.size)
    image = image.resize([int(side * length / short) for length in image.size], Image.Resampling.BICUBIC)
    left, top = (int(round((length - side) / 2.0)) for length in image.size)
    pixels = torch.tensor(np.asarray(image)[top : top + side, left : left + side] / 255.0).float()
    pixels = (pixels - torch.tensor([0.48145466, 0.4578275, 0.40821073])) / torch.tensor(
        [0.26862954, 0.26130258, 0.27577711]
    )
    vision = "blip.visual_encoder"
    patches = F.conv2d(
        pixels.permute(2, 0, 1), w[f"{vision}.patch_embed.proj.weight"], w[f"{vision}.patch_embed.proj.bias"], PATCH
    )
    x = torch.cat([w[f"{vision}.cls_token"][0], patches.flatten(1).T]) + w[f"{vision}.pos_embed"][0]
    for i in range(DEPTH):
        block = f"{vision}.blocks.{i}"
        q, k, v = linear(norm(x, f"{block}.norm1", 1e-6), f"{block}.attn.qkv").chunk(3, dim=-1)
        x = x + linear(attend(q, k, v, heads=2), f"{block}.attn.proj")
        x = x + linear(F.gelu(linear(norm(x, f"{block}.norm2", 1e-6), f"{block}.mlp.fc1")), f"{block}.mlp.fc2")
    seen = norm(x, f"{vision}.norm", 1e-6)

    embeddings = "blip.text_encoder.embeddings"
    positions = w[f"{embeddings}.position_embeddings.weight"][: len(token_ids)]
    x = norm(w[f"{embeddings}.word_embeddings.weight"][token_ids] + positions, f"{embeddings}.LayerNorm", 1e-12)
    for i in range(TEXT["num_hidden_layers"]):
        layer = f"blip.text_encoder.encoder.layer.{i}"
        for kind in ("attention", "crossattention"):
            source = x if kind == "attention" else seen
            name = f"{layer}.{kind}.self"
            mixed = attend(
                linear(x, f"{name}.query"), linear(source, f"{name}.key"), linear(source, f"{name}.value"), heads=4
            )
            x = norm(x + linear(mixed, f"{layer}.{kind}.output.dense"), f"{layer}.{kind}.output.LayerNorm", 1e-12)
        inner = linear(F.gelu(linear(x, f"{layer}.intermediate.dense")), f"{layer}.output.dense")
        x = norm(x + inner, f"{layer}.output.LayerNorm", 1e-12)
    x = x[0]
    for number in HEAD:
        x = linear(x, f"mlp.layers.{number}")
    return (x.item() - 0.16717362830052426) / 1.0333394966054072


def pictures():
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)) for _ in SIZES]
    return [image.resize(size, Image.Resampling.BICUBIC) for image, size in zip(noise, SIZES, strict=True)]


@pytest.fixture(scope="module")
def weights():
    return checkpoint()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, weights):
    """The files of the Hub repository, and a tokenizer like that of bert-base-uncased."""
    folder = tmp_path_factory.mktemp("image-reward")
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(TEXT))
    BertTokenizer(vocab={token: i for i, token in enumerate(VOCABULARY)}).save_pretrained(folder / "tokenizer")
    return folder


def reward(folder, **kwargs):
    return ImageReward(model=str(folder), tokenizer=str(folder / "tokenizer"), **kwargs)


def token_ids(prompt):
    """What BERT makes of words in the small vocabulary: letters, and the same with ## inside of a word."""
    pieces = []
    for word in prompt.split():
        if word == "[ENC]":
            pieces.append(word)
        elif set(word.lower().replace("ä", "a")) <= set(LETTERS):
            letters = word.lower().replace("ä", "a")  # lower case, and without accents
            # Every Chinese character is a word of its own.
            pieces += [letter if i == 0 or letter == "猫" else f"##{letter}" for i, letter in enumerate(letters)]
        else:
            pieces.append("[UNK]")
    known = [*VOCABULARY, "[DEC]", "[ENC]"]
    return [known.index(piece) for piece in ["[CLS]", *pieces[:33], "[SEP]"]]


def test_scores_are_those_of_the_original_network(folder, weights):
    images = pictures()
    expected = [original_score(weights, image, token_ids(p)) for image, p in zip(images, PROMPTS, strict=True)]
    values = reward(folder)(images=images, prompts=PROMPTS, trainer_state=None, tag=["x"] * 6)
    assert values == pytest.approx(expected, abs=1e-5)
    assert np.std(expected) > 0.1  # or else the comparison would say little


def test_image_and_prompt_both_count(folder):
    images = pictures()
    scorer = reward(folder)
    by_image = scorer(images=images, prompts=["a cat"] * 6)
    by_prompt = scorer(images=[images[0]] * 6, prompts=PROMPTS)
    for values in (by_image, by_prompt):
        assert len({round(value, 3) for value in values}) == 6


def test_a_prompt_counts_up_to_35_tokens(folder):
    image, *_ = pictures()
    start = "a " * 32  # and the first and the last token
    values = reward(folder)(images=[image] * 3, prompts=[start + "b", start + "b c d", start + "c"])
    assert values[0] == pytest.approx(values[1], abs=1e-5)
    assert values[0] != pytest.approx(values[2], abs=1e-3)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_the_batch_does_not_change_a_score(folder, batch_size):
    images = pictures()
    together = reward(folder)(images=images, prompts=PROMPTS)
    backwards = reward(folder, batch_size=batch_size)(images=images[::-1], prompts=PROMPTS[::-1])
    assert backwards[::-1] == pytest.approx(together, abs=1e-5)


def test_what_is_transparent_is_white(folder):
    clear, grey = Image.new("RGBA", (5, 4), (255, 0, 0, 0)), Image.new("L", (5, 4), 255)
    values = reward(folder)(images=[clear, grey, Image.new("RGB", (5, 4), "white")], prompts=["a cat"] * 3)
    assert values == [pytest.approx(values[2], abs=1e-6)] * 3


def test_bfloat16_comes_close(folder):
    images = pictures()
    exact = reward(folder)(images=images, prompts=PROMPTS)
    scorer = reward(folder).to("cpu", torch.bfloat16)
    assert scorer(images=images, prompts=PROMPTS) == pytest.approx(exact, abs=0.03)
    assert {parameter.dtype for parameter in scorer.model.parameters()} == {torch.bfloat16}


def test_it_applies_to_every_image_and_loads_nothing_until_then():
    scorer = ImageReward(model="nowhere")
    assert isinstance(scorer, ModelReward)
    assert scorer.applies(["", "a cat"]) == [True, True]


def test_loading_draws_no_random_numbers(folder):
    before = torch.random.get_rng_state()
    reward(folder)(images=pictures()[:1], prompts=["a cat"])
    assert torch.equal(torch.random.get_rng_state(), before)


def write(folder, tmp_path, weights):
    torch.save(weights, tmp_path / "ImageReward.pt")
    (tmp_path / "med_config.json").write_text(json.dumps(TEXT))
    return ImageReward(model=str(tmp_path), tokenizer=str(folder / "tokenizer"))


@pytest.mark.parametrize(
    ("lost", "named"),
    [
        ("mlp.layers.4.bias", "head.4.bias"),
        ("blip.visual_encoder.pos_embed", "vision.embeddings.position_embedding"),
        ("blip.text_encoder.encoder.layer.1.crossattention.self.key.weight", "text.*layer.1.crossattention.self.key"),
    ],
)
def test_a_checkpoint_without_all_weights_is_refused(folder, tmp_path, weights, lost, named):
    scorer = write(folder, tmp_path, {name: weight for name, weight in weights.items() if name != lost})
    with pytest.raises(ValueError, match=f"not one of ImageReward: it has no {named}"):
        scorer(images=pictures()[:1], prompts=["a cat"])


def test_a_checkpoint_of_another_model_is_refused(folder, tmp_path):
    scorer = write(folder, tmp_path, {"weight": torch.zeros(1)})
    with pytest.raises(ValueError, match="not one of ImageReward"):
        scorer(images=pictures()[:1], prompts=["a cat"])


def test_a_checkpoint_with_code_in_it_is_not_run(folder, tmp_path):
    scorer = write(folder, tmp_path, {"weight": Harmful(tmp_path / "ran")})
    with pytest.raises(pickle.UnpicklingError):
        scorer(images=pictures()[:1], prompts=["a cat"])
    assert not (tmp_path / "ran").exists()


class Harmful:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_a_folder_without_weights_is_refused(folder, tmp_path):
    with pytest.raises(OSError, match="med_config.json"):
        ImageReward(model=str(tmp_path), tokenizer=str(folder / "tokenizer")).model  # noqa: B018
