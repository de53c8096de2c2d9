# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Rewards built on CLIP, against their formulas computed in another way, on tiny random models loaded from disk."""

import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_scorers import open_clip_weights
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPTokenizer

from trl_marble.extras import MissingExtraError
from trl_marble.rewards import load_reward
from trl_marble.rewards.aesthetic import AestheticScore
from trl_marble.rewards.clip_features import crop_square, image_features, text_cleaner, text_features
from trl_marble.rewards.clip_score import CLIPScore
from trl_marble.rewards.hps import HPSv2, letterbox
from trl_marble.rewards.pickscore import PickScore


SCORERS = ["PickScore", "CLIPScore", "AestheticScore", "HPSv2"]
READERS = ["PickScore", "CLIPScore", "HPSv2"]  # all but the one that does not look at the prompt

SIZE = 28  # of the models' images
LENGTH = 40  # of the models' texts, in tokens
LOGIT_SCALE = 4.6052  # of every published CLIP; exp gives 100
MEAN = np.array([0.48145466, 0.4578275, 0.40821073], dtype=np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], dtype=np.float32)

# One token a byte (without and with the mark of a word's end), and the two special tokens last, as in the real one.
BYTES = sorted(ByteLevel.alphabet())
VOCABULARY = [*BYTES, *(f"{byte}</w>" for byte in BYTES), "<|startoftext|>", "<|endoftext|>"]
START, END = 512, 513

# Prompt, and its words after the original's cleaning.
PROMPTS = {
    "a cat": ["a", "cat"],
    "": [],
    "  \n ": [],
    "UPPER  CASE": ["upper", "case"],
    "a sign": ["a", "sign"],
    "猫 на 🐈": ["猫", "на", "🐈"],
    "long " * 30: ["long"] * 30,
    "one unbroken" + "n" * 100: ["one", "unbroken" + "n" * 100],
}
SHAPES = [(28, 28), (56, 56), (1, 1), (64, 30), (31, 28), (28, 83), (50, 51), (3, 90)]  # width, height


def pictures(shapes=SHAPES):
    """Soft random images: bicubic enlargements of noise."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8)) for _ in shapes]
    return [image.resize(shape, Image.Resampling.BICUBIC) for image, shape in zip(noise, shapes, strict=True)]


def tiny_clip(activation, seed=1):
    """A random CLIPModel whose features really differ from input to input, with the head widths of ViT-H-14."""
    torch.manual_seed(seed)
    alike = {"num_hidden_layers": 2, "intermediate_size": 64, "hidden_act": activation, "num_attention_heads": 2}
    model = CLIPModel(
        CLIPConfig(
            projection_dim=768,
            text_config=alike
            | {
                "hidden_size": 128,
                "vocab_size": len(VOCABULARY),
                "max_position_embeddings": LENGTH,
                "bos_token_id": START,
                "eos_token_id": END,
                "pad_token_id": END,
            },
            vision_config=alike | {"hidden_size": 160, "image_size": SIZE, "patch_size": 14},
        )
    ).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "logit_scale":
                parameter.fill_(LOGIT_SCALE)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def linear_layers():
    """Weights and biases of the aesthetic predictor, by their names in the file."""
    torch.manual_seed(1)
    sizes = {0: (768, 1024), 2: (1024, 128), 4: (128, 64), 6: (64, 16), 7: (16, 1)}
    weights = {f"layers.{place}.weight": torch.randn(size[::-1]) / size[0] ** 0.5 for place, size in sizes.items()}
    return weights | {f"layers.{place}.bias": torch.randn(size[1]) for place, size in sizes.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Everything that the four load, as on the Hub."""
    path = tmp_path_factory.mktemp("clip")
    vocabulary = {token: number for number, token in enumerate(VOCABULARY)}
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=LENGTH).save_pretrained(path)
    CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE).save_pretrained(path)
    tiny_clip("quick_gelu").save_pretrained(path)
    torch.save(linear_layers(), path / "aesthetic-model.pth")
    torch.save({"epoch": 3, "state_dict": open_clip_weights(tiny_clip("gelu"))}, path / "HPS_v2.1_compressed.pt")
    return path


@pytest.fixture
def make(folder):
    """A factory of scorers."""

    def make(name, **kwargs):
        if name == "PickScore":
            return PickScore(str(folder), str(folder), **kwargs)
        if name == "CLIPScore":
            return CLIPScore(str(folder), **kwargs)
        if name == "AestheticScore":
            return AestheticScore(str(folder), str(folder), **kwargs)
        return HPSv2(str(folder), tokenizer=str(folder), **kwargs)

    return make


def tokens(words):
    """Token ids of words, cut to what the model can read."""
    alphabet = ByteLevel(add_prefix_space=False)
    ids = []
    for word in words:
        units = list(alphabet.pre_tokenize_str(word)[0][0])
        ids += [VOCABULARY.index(unit) for unit in units[:-1]] + [VOCABULARY.index(f"{units[-1]}</w>")]
    return torch.tensor([[START, *ids[: LENGTH - 2], END]])


def cosines(model, pixels, words):
    """Cosine of each image and its words, one pair at a time and without padding."""
    values = []
    for one, each in zip(pixels, words, strict=True):
        with torch.no_grad():
            output = model(input_ids=tokens(each), pixel_values=torch.tensor(one[None]))
        values.append((output.image_embeds * output.text_embeds).sum().item())
    return np.array(values)


def normalized(pixels):
    """Bytes `[H, W, 3]` as CLIP takes them, `[3, H, W]`."""
    return ((np.asarray(pixels, dtype=np.float32) / 255 - MEAN) / STD).transpose(2, 0, 1)


def middle(image, rounded):
    """The square that CLIP sees, with margins that are rounded or, as transformers does, rounded down."""
    shorter = min(image.size)
    width, height = (side * SIZE // shorter for side in image.size)
    left, top = (round(margin / 2) if rounded else margin // 2 for margin in (width - SIZE, height - SIZE))
    pixels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return normalized(pixels[top : top + SIZE, left : left + SIZE])


def turn_where_negative(reward, image, prompt):
    """Turn the features of images around if CLIPScore would count their cosine as 0."""
    if reward([image], [prompt]) == [0.0]:
        reward.model.visual_projection.weight.neg_()


def expected(name, folder, images):
    words = list(PROMPTS.values())
    if name == "AestheticScore":
        model = CLIPModel.from_pretrained(folder)
        pixels = torch.tensor(np.stack([middle(image, rounded=True) for image in images]))
        with torch.no_grad():
            x = model.get_image_features(pixel_values=pixels).pooler_output.numpy()
        x = x / np.sqrt((x**2).sum(axis=1, keepdims=True))
        layers = linear_layers()
        for place in (0, 2, 4, 6, 7):
            x = x @ layers[f"layers.{place}.weight"].numpy().T + layers[f"layers.{place}.bias"].numpy()
        return x[:, 0]
    if name == "HPSv2":
        return cosines(tiny_clip("gelu"), [letterbox(image, SIZE).numpy() for image in images], words)
    model = CLIPModel.from_pretrained(folder)
    if name == "PickScore":
        return np.exp(LOGIT_SCALE) * cosines(model, [middle(image, rounded=False) for image in images], words)
    captions = [["a", "photo", "depicts", *each] for each in words]
    return 2.5 * np.maximum(cosines(model, [middle(image, rounded=True) for image in images], captions), 0)


@pytest.mark.parametrize("name", SCORERS)
def test_the_value_is_that_of_the_formula(name, make, folder):
    images = pictures()
    want = expected(name, folder, images)
    assert np.unique(want.round(4)).size > 4  # the model tells the pairs apart
    got = make(name, batch_size=3)(images, list(PROMPTS))
    assert all(isinstance(value, float) for value in got)
    np.testing.assert_allclose(got, want, rtol=2e-5, atol=1e-5 if name == "PickScore" else 1e-6)


def test_clip_score_is_never_negative(make):
    reward = make("CLIPScore")
    images = pictures()
    before = np.array(reward(images, list(PROMPTS)))
    reward.model.visual_projection.weight.neg_()
    after = np.array(reward(images, list(PROMPTS)))
    assert (before >= 0).all() and (after >= 0).all()
    assert ((before > 0) ^ (after > 0)).all()


def test_clip_score_without_its_prefix_reads_the_prompt_alone(make, folder):
    images, prompts = pictures(SHAPES[:2]), ["a cat", "upper case"]
    reward = make("CLIPScore", prefix="")
    pixels = [middle(image, rounded=True) for image in images]
    model = CLIPModel.from_pretrained(folder)
    want = cosines(model, pixels, [prompt.split() for prompt in prompts])
    np.testing.assert_allclose(reward(images, prompts), 2.5 * np.maximum(want, 0), atol=1e-6)
    assert reward(images, prompts) != make("CLIPScore")(images, prompts)


@pytest.mark.parametrize("name", SCORERS)
def test_a_value_does_not_depend_on_the_batch(name, make):
    images, prompts = pictures(), list(PROMPTS)
    reward = make(name)
    together = reward(images, prompts)
    backwards = reward(images[::-1], prompts[::-1])[::-1]
    alone = [reward([image], [prompt])[0] for image, prompt in zip(images, prompts, strict=True)]
    shared = reward(images * 2, prompts * 2)  # every prompt twice, as in a group of generations
    for other in (backwards, alone, shared[: len(images)], shared[len(images) :]):
        np.testing.assert_allclose(other, together, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", READERS)
def test_what_comes_after_the_last_token_is_not_read(name, make):
    reward, (image,) = make(name), pictures([(28, 28)])
    room = LENGTH - 2 - (len("aphotodepicts") if name == "CLIPScore" else 0)
    turn_where_negative(reward, image, "a " * room)
    full, cut, cut_elsewhere, other = reward(
        [image] * 4, ["a " * room, "a " * room + "and more", "a " * 500, "a " * (room - 1) + "b"]
    )
    assert full == cut == cut_elsewhere
    assert other != pytest.approx(full, rel=1e-3)


@pytest.mark.parametrize("name", SCORERS)
def test_bfloat16_is_near_and_keeps_scales_in_float32(name, make):
    images, prompts = pictures(), list(PROMPTS)
    exact = np.array(make(name)(images, prompts))
    reward = make(name).to("cpu", torch.bfloat16)
    rough = np.array(reward(images, prompts))
    assert {parameter.dtype for parameter in reward.model.parameters()} == {torch.bfloat16}
    spread = {"PickScore": 1.5, "CLIPScore": 0.04, "AestheticScore": 0.05, "HPSv2": 0.015}[name]
    np.testing.assert_allclose(rough, exact, atol=spread)
    assert (rough != exact).any()
    if name == "PickScore":
        assert reward.logit_scale == pytest.approx(100, rel=1e-4)  # a bfloat16 scale would be 98.9
    if name == "AestheticScore":
        assert reward.head[0].weight.dtype == torch.float32


def test_features_of_a_bfloat16_model_are_unit_vectors_in_float32(folder):
    model = tiny_clip("gelu").to(torch.bfloat16)
    with torch.no_grad():
        seen = image_features(model, torch.randn(3, 3, SIZE, SIZE))
        asked = text_features(model, CLIPTokenizer.from_pretrained(folder), ["a cat", "", "a cat"])
    for features in (seen, asked):
        assert features.dtype == torch.float32
        torch.testing.assert_close(features.norm(dim=-1), torch.ones(3), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", SCORERS)
def test_everything_goes_to_the_device_of_the_model(name, make):
    reward, devices = make(name).to("meta"), []
    if name in READERS:  # meta weights read tokens from anywhere, so look where they are
        reward.model.text_model.register_forward_pre_hook(
            lambda module, args, kwargs: devices.extend(value.device.type for value in kwargs.values()),
            with_kwargs=True,
        )
    with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):  # all but the last step works
        reward(pictures([(28, 28)]), ["a cat"])
    assert set(devices) <= {"meta"} and bool(devices) is (name in READERS)


@pytest.mark.parametrize("name", SCORERS)
def test_scoring_goes_on_after_a_release(name, make):
    images, prompts = pictures(), list(PROMPTS)
    reward = make(name, offload=True)
    before = reward(images, prompts)
    reward.release()
    assert {parameter.device.type for parameter in reward.model.parameters()} == {"cpu"}
    assert reward(images, prompts) == before


@pytest.mark.parametrize("name", SCORERS)
def test_transparent_grey_and_single_pixels(name, make):
    reward = make(name)
    see_through = Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    white, grey = Image.new("RGB", (28, 28), "white"), Image.new("RGB", (28, 28), (90, 90, 90))
    dot = Image.new("L", (1, 1), 90)
    values = reward([see_through, white, dot, grey], ["a cat"] * 4)
    assert values[0] == pytest.approx(values[1], rel=1e-4, abs=1e-6)
    assert values[2] == pytest.approx(values[3], rel=1e-4, abs=1e-6)
    if name != "CLIPScore":  # may be 0 for both
        assert values[0] != pytest.approx(values[2], rel=1e-3)


def test_only_the_prompt_of_the_others_counts(make):
    (image,) = pictures([(28, 28)])
    values = make("AestheticScore")([image] * 3, ["a cat", "", "猫"])
    assert len(set(values)) == 1


def test_the_text_encoder_of_the_aesthetic_score_is_not_kept(make):
    names = [name for name, _ in make("AestheticScore").model.named_parameters()]
    assert names and not any(name.startswith("text_model") for name in names)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("It’s “quoted”", 'it\'s "quoted"'),
        ("salt &amp; pepper &lt;b&gt;", "salt & pepper <b>"),
        ("<b> salt &amp;amp; pepper", "<b> salt & pepper"),  # ftfy leaves entities alone where there are tags
        ("schÃ¶n", "schön"),
        ("ﬁne ＦＵＬＬ", "fine full"),
        ("  Ünïcode 猫 ", "ünïcode 猫"),
        ("", ""),
    ],
)
def test_prompts_are_cleaned_as_by_the_original_tokenizer(text, cleaned):
    assert text_cleaner()(text) == cleaned


@pytest.mark.parametrize(("name", "cleans"), [("CLIPScore", True), ("HPSv2", True), ("PickScore", False)])
def test_which_rewards_clean_prompts(name, cleans, make):
    reward, (image,) = make(name), pictures([(28, 28)])
    turn_where_negative(reward, image, "it's &")
    typographic, plain = reward([image] * 2, ["it’s &amp;", "it's &"])
    assert (typographic == plain) is cleans


@pytest.mark.parametrize("name", ["CLIPScore", "HPSv2"])
def test_a_missing_ftfy_is_an_error_when_the_reward_is_made(name, monkeypatch):
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(MissingExtraError, match=r"needs ftfy.*`pip install \"\.\[clip\]\"`"):
        load_reward(name.lower())


@pytest.mark.parametrize("shape", SHAPES)
def test_a_cropped_square_is_not_changed_by_the_image_processor(shape):
    (image,) = pictures([shape])
    processor = CLIPImageProcessorPil(size={"shortest_edge": SIZE}, crop_size=SIZE)
    pixels = processor([crop_square(image, SIZE)], return_tensors="pt").pixel_values[0]
    np.testing.assert_allclose(pixels.numpy(), middle(image, rounded=True), atol=1e-6)


def test_margins_are_rounded_where_transformers_rounds_them_down():
    (image,) = pictures([(31, 28)])  # a margin of 3 pixels
    assert np.abs(middle(image, rounded=True) - middle(image, rounded=False)).max() > 0.1


@pytest.mark.parametrize(
    ("shape", "box"),  # left, top, right and bottom of the picture among the bars
    [
        ((28, 28), (0, 0, 28, 28)),
        ((1, 1), (0, 0, 28, 28)),
        ((112, 56), (0, 7, 28, 21)),
        ((30, 60), (7, 0, 21, 28)),
        ((38, 100), (8, 0, 19, 28)),  # 10.64 pixels wide, and the odd pixel of the bars on the right
        ((28, 11), (0, 8, 28, 19)),  # the original fails here: it leaves out the bars
        ((900, 3), (0, 13, 28, 14)),  # and here: the height would be 0
    ],
)
def test_letterbox_shows_the_whole_image_among_black_bars(shape, box):
    (image,) = pictures([shape])
    pixels = letterbox(image, SIZE).numpy().transpose(1, 2, 0) * STD + MEAN
    left, top, right, bottom = box
    inside = pixels[top:bottom, left:right].copy()
    pixels[top:bottom, left:right] = 0
    np.testing.assert_allclose(pixels, 0, atol=1e-6)
    resized = image.resize((right - left, bottom - top), Image.Resampling.BICUBIC)
    np.testing.assert_allclose(inside.clip(0, 1), np.asarray(resized) / 255, atol=1.1 / 255)  # Pillow rounds and clips


def test_letterbox_keeps_the_overshoot_of_bicubic_resizing():
    stripes = Image.fromarray(np.kron([[0, 255], [255, 0]], np.ones((7, 7))).astype(np.uint8)).convert("RGB")
    pixels = letterbox(stripes, SIZE).numpy().transpose(1, 2, 0) * STD + MEAN
    assert pixels.max() > 1.02 and pixels.min() < -0.02


def test_converted_weights_give_the_same_features(make):
    converted, model = make("HPSv2").model, tiny_clip("gelu")
    assert converted.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(converted.state_dict()[name], tensor), name
    for side in ("text_config", "vision_config"):
        ours, theirs = getattr(converted.config, side), getattr(model.config, side)
        for field in ("num_attention_heads", "hidden_act", "layer_norm_eps", "hidden_size", "num_hidden_layers"):
            assert getattr(ours, field) == getattr(theirs, field), field


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_a_checkpoint_in_half_precision_is_scored_in_float32(half, folder, tmp_path):
    weights = {name: tensor.to(half) for name, tensor in open_clip_weights(tiny_clip("gelu")).items()}
    torch.save({"state_dict": weights}, tmp_path / "half.pt")
    reward = HPSv2(str(tmp_path), filename="half.pt", tokenizer=str(folder))
    value = reward(pictures([(28, 28)]), ["a cat"])
    assert {parameter.dtype for parameter in reward.model.parameters()} == {torch.float32}
    reference = tiny_clip("gelu")
    reference.load_state_dict({name: tensor.to(half).float() for name, tensor in reference.state_dict().items()})
    want = cosines(reference, [letterbox(pictures([(28, 28)])[0], SIZE).numpy()], [["a", "cat"]])
    np.testing.assert_allclose(value, want, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda weights: weights.pop("text_projection"),
            "`other.pt` of .* is not a checkpoint of HPSv2: it has no 'text_pr",
        ),
        (
            lambda weights: weights.pop("ln_final.bias"),
            r"missing \['text_model.final_layer_norm.bias'\], unknown \[\]",
        ),
        (lambda weights: weights.update(score=torch.zeros(1)), r"missing \[\], unknown \['score'\]"),
    ],
)
def test_other_checkpoints_are_refused_with_the_missing_weights(change, message, folder, tmp_path):
    weights = open_clip_weights(tiny_clip("gelu"))
    change(weights)
    torch.save({"state_dict": weights}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=message):
        _ = HPSv2(str(tmp_path), filename="other.pt", tokenizer=str(folder)).model


def test_a_checkpoint_without_a_state_dict_is_refused(folder, tmp_path):
    torch.save(open_clip_weights(tiny_clip("gelu")), tmp_path / "bare.pt")
    with pytest.raises(ValueError, match="`bare.pt` of .* is not a checkpoint of HPSv2: it has no 'state_dict'"):
        _ = HPSv2(str(tmp_path), filename="bare.pt", tokenizer=str(folder)).model


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_checkpoint_cannot_run_code(folder, tmp_path):
    for filename in ("HPS_v2.1_compressed.pt", "aesthetic-model.pth"):
        torch.save({"state_dict": Malicious(tmp_path / "ran")}, tmp_path / filename)
    for reward in (
        HPSv2(str(tmp_path), tokenizer=str(folder)),
        AestheticScore(str(folder), str(tmp_path)),
    ):
        with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
            _ = reward.model
    assert not (tmp_path / "ran").exists()


def test_the_aesthetic_score_needs_embeddings_of_its_size(folder, tmp_path):
    config = CLIPConfig.from_pretrained(folder)
    config.projection_dim = 32
    CLIPModel(config).save_pretrained(tmp_path)
    CLIPImageProcessorPil().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="reads 768 numbers per image, and .* has 32; use a CLIP ViT-L/14"):
        _ = AestheticScore(str(tmp_path), str(folder)).model


@pytest.mark.parametrize("reward", [PickScore, CLIPScore, AestheticScore, HPSv2])
def test_making_one_loads_nothing_and_passes_its_settings_on(reward):
    made = reward(batch_size=7, dtype=torch.float16, offload=True)
    assert (made.batch_size, made.dtype, made.offload, made._model) == (7, torch.float16, True, None)
    assert made.applies_to.startswith("every image") and made.value_range
