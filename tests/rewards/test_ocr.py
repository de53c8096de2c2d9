# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The OCR reward: which text is asked for, how it is compared, and whether drawn words are really read."""

import functools
import logging
import random
import sys
import time
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from trl_marble.extras import MissingExtraError
from trl_marble.rewards.ocr import OCRAccuracy, comparable, edit_distance, is_read, text_accuracy
from trl_marble.rewards.protocol import reward_names, reward_tensor
from trl_marble.rewards.quotes import read_quotes


FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
STYLES = ("Sans", "Sans-Bold", "Sans-Oblique", "SansMono", "Serif", "Serif-Bold")
WORDS = """
harbor window garden silver mountain coffee orange pepper bridge candle planet ticket rocket hammer basket mirror
forest winter summer autumn spring thunder lantern compass journal picture diamond kitchen library station railway
captain painter teacher student doctor nurse farmer baker writer singer dancer pilot sailor hunter open closed exit
push pull sale free new hot cold stop slow fast danger caution welcome hello goodbye thanks bread butter cheese
tomato potato carrot onion garlic lemon cherry banana grape melon apple peach tiger zebra monkey rabbit turtle
dolphin penguin falcon sparrow beetle spider lizard camel donkey guitar violin piano trumpet drum flute music rhythm
melody chorus quantum vector matrix tensor kernel gradient reward policy sample noise January October Monday Friday
Sunday midnight morning evening Paris London Tokyo Berlin Madrid Oslo Cairo Lima Delhi Sydney happy angry brave quiet
gentle clever honest curious proud lucky seven eleven twelve twenty hundred thousand jacket sweater trousers gloves
button zipper pocket collar ribbon velvet engine wheel brake signal tunnel highway corner village castle tower palace
market museum theater wizard dragon knight legend treasure island pirate anchor voyage horizon oxygen carbon copper
nickel cobalt helium keyboard monitor printer camera battery magnet pencil eraser marker notebook yellow marble river
""".split()


def draw(text, size=40, side=256, ink="black", paper="white", style="Sans", place=(16, 90), mode="RGB"):
    image = Image.new(mode, (side, side), paper)
    font = ImageFont.truetype(str(FONTS / f"DejaVu{style}.ttf"), size)
    ImageDraw.Draw(image).multiline_text(place, text, fill=ink, font=font)
    return image


def draw_somewhere(word, rng, side=256):
    """A word in a font, size, place and colours of its own; the brightness of ink and paper differs by at least 80."""
    style, size = rng.choice(STYLES), rng.randint(14, 48)
    while True:
        left, top, right, bottom = ImageFont.truetype(str(FONTS / f"DejaVu{style}.ttf"), size).getbbox(word)
        if right - left <= side - 16:
            break
        size -= 2
    while True:
        ink, paper = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
        if abs(np.dot(np.subtract(ink, paper), (0.299, 0.587, 0.114))) >= 80:
            break
    place = (rng.randint(4, side - 4 - right + left) - left, rng.randint(4, side - 4 - bottom + top) - top)
    return draw(word, size, side, ink, paper, style, place)


@pytest.fixture(scope="module")
def reward():
    return OCRAccuracy(num_threads=1)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "Open"', "Open"),
        ("a sign that says “Open”", "Open"),
        ("„Offen“ an der Tür, „Zu„", "Offen Zu"),
        ("„Otwarte” na drzwiach", "Otwarte"),
        ("une porte « Ouvert »", " Ouvert "),
        ("eine Tür, »Offen«", "Offen"),
        ('写着"你好"的牌子', "你好"),
        ("写着“你好”的牌子", "你好"),
        ("「営業中」と『準備中』", "営業中 準備中"),
        ("写着＂你好＂", "你好"),
        ('"Hello" above "World 5"', "Hello World 5"),
        ('"one", “two” and «three»', "one two three"),
        ('"He said “hi”"', "He said “hi”"),
        ("a dog that doesn't bark at the dogs' house", ""),
        ('a sign "Don\'t panic"', "Don't panic"),
        ('a 5" by 7" photograph', ""),
        ('a 12" plate with "Best Mum"', "Best Mum"),
        ('nothing "" here', ""),
        ("no quotes", ""),
        ("", ""),
        # Doubled, by CSV, typewriters and LaTeX, and what CSV, JSON and HTML make of quotes.
        ('a sign ""Open""', "Open"),
        ('a sign """Open"""', "Open"),
        ("a sign ''Open'' or ``Shut''", "Open Shut"),
        ("a sign ””Open””", "Open"),
        ('"""Open"" on a sign"', "Open"),
        ('"a sign that says ""Open"""', "Open"),
        ('a sign \\"Open\\"', "Open"),
        ("a sign &quot;Open&quot;", "Open"),
        ("a sign &ldquo;Open&rdquo; and &#34;Shut&#34;", "Open Shut"),
        ("a sign ❝Open❞", "Open"),
        # The same mark on both sides, as in Swedish and Finnish, and marks of two kinds.
        ("en skylt ”Öppet” och ”Stängt”", "Öppet Stängt"),
        ("en skylt »Öppet»", "Öppet"),
        ("写着”你好”的牌子", "你好"),
        ('a sign “Open"', "Open"),
        ('a sign "Open”', "Open"),
        ('a sign „Open"', "Open"),
        ("a sign “Open“ or ”Shut“", "Open Shut"),
        ("a sign ″Open″, ‹Shut›, 〝Push〟", "Open Shut Push"),
        # What stands around the marks.
        ('("Open"), "Shut","Push"', "Open Shut Push"),
        ('says:"Open!" and "...so?"', "Open! ...so?"),
        ("une porte « Ouvert », rouge", " Ouvert "),
        ('"$5", "5%", "Room 12"', "$5 5% Room 12"),
        ('a sign " Open "', " Open "),
        ('他说"我看到“好”字"了', "我看到“好”字"),
        ('"say "hi" now"', 'say "hi" now'),
        ('“"Open"”', "Open"),
        ('"“hi” he said"', "“hi” he said"),
        ("“don’t stop”, 'n' 6'2\" tall", "don’t stop"),
        ('a 32” screen, a 5" x 7" print of "Open"', "Open"),
    ],
)
def test_the_text_between_quotes(prompt, text):
    assert read_quotes(prompt) == (text, False)


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('an open "quote', ""),
        ("an open “quote", ""),
        ('a quote" that ends', ""),
        ('dogs" and cats"', ""),
        ("„Offen", ""),
        ("「営業中", ""),
        ('"Open” and "closed', "Open"),
        ('"Open and "closed"', "closed"),
        ('a sign "Open "now', "Open "),
        ("it says 'Open', don't ask", ""),
        ("it says ‘Open’, don’t ask", ""),
        ("‚Offen‘ an der Tür", ""),
    ],
)
def test_quotes_that_do_not_pair_up_are_in_doubt(prompt, text):
    assert read_quotes(prompt) == (text, True)


def test_quotes_are_read_in_time_that_grows_with_the_length():
    n = 20_000
    start = time.thread_time()
    for prompt in (
        '"' * n,
        '" ' * n,
        "“a " * n,
        " 'a" * n,
        "'" + "a " * n,
        '"a"' * n,
        "“" * n + "a" + "”" * n,
        "“a «" * n,
    ):
        read_quotes(prompt)
    assert time.thread_time() - start < 5


def test_the_edit_distance_is_the_least_number_of_edits():
    @functools.cache
    def definition(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(definition(a[1:], b) + 1, definition(a, b[1:]) + 1, definition(a[1:], b[1:]) + (a[0] != b[0]))

    rng = random.Random(0)
    texts = ["".join(rng.choice("abé文") for _ in range(rng.randint(0, 6))) for _ in range(60)]
    for a in texts:
        for b in texts:
            assert edit_distance(a, b) == definition(a, b)


@pytest.mark.parametrize(
    ("target", "read", "value"),
    [
        ("Hello", "Hello", 1.0),
        ("Hello World", "HELLO\nwor ld", 1.0),
        ("Hello", "say hello to all", 1.0),
        ("Hello", "Hallo", 0.8),
        ("Hello", "Hell", 0.8),
        ("Hello", "", 0.0),
        ("abc", "xyz", 0.0),
        ("abc", "much longer than what was wanted", 0.0),
        ("你好世界", "你好", 0.5),
        ("café", "cafe\N{COMBINING ACUTE ACCENT}", 1.0),
        ("Don’t stop—go!", "don't stop-go！", 1.0),
        ("STRASSE", "Straße", 1.0),
        ("１２３", "123", 1.0),
        ("1\N{ZERO WIDTH SPACE}2\N{NO-BREAK SPACE}3", "123", 1.0),
    ],
)
def test_how_two_texts_are_compared(target, read, value):
    assert text_accuracy(target, read) == pytest.approx(value)


@pytest.mark.parametrize("text", ["", " ", "\t\n", "\N{ZERO WIDTH SPACE}\N{NO-BREAK SPACE}"])
def test_a_text_without_visible_characters_is_empty(text):
    assert comparable(text) == ""


@pytest.mark.filterwarnings("ignore:.*unpaired quotes")
def test_it_applies_where_a_text_is_asked_for(reward):
    image = draw("Open")
    prompts = ["a door", "don't", 'a "" b', 'a " " b', '"open"', '"closed', "“Open”"]
    assert reward(images=[image] * 7, prompts=prompts) == [None, None, None, None, 1.0, None, 1.0]


def test_the_column_comes_before_the_quotes(reward):
    images = [draw("Open")] * 5
    prompts = ['a "Closed" door', 'a "Open" door', "a door", 'a "Open" door', "a door"]
    values = reward(images=images, prompts=prompts, text=["Open", None, "Oven", "", None], trainer_state=None)
    assert values == [1.0, 1.0, 0.75, None, None]
    by_name = OCRAccuracy(column="sign", num_threads=1)
    assert "`sign`" in by_name.applies_to
    assert by_name(images=images[:1], prompts=['"Zebu"'], sign=["Open"], text=["Zebu"]) == [1.0]


def test_a_column_of_something_else_is_refused(reward):
    with pytest.raises(TypeError, match=r"column `text` has 7 \(int\) for the prompt 'a sign'; it must have strings"):
        reward(images=[draw("7")], prompts=["a sign"], text=[7])


def test_all_lines_count_from_top_to_bottom(reward):
    image = draw("Hello\nWorld")
    assert reward.read(image) == "Hello World"
    values = reward(images=[image] * 2, prompts=['"Hello World"', 'says "Hello" and below it "World"'])
    assert values == [1.0, 1.0]


def test_nothing_read_is_zero(reward):
    images = [Image.new("RGB", (256, 256), "teal"), draw("Open")]
    assert reward(images=images, prompts=['"Open"', '"Open"']) == [0.0, 1.0]
    assert reward.read(images[0]) == ""


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "L", "P", "1"])
@pytest.mark.parametrize("size", [(1, 1), (3, 200), (1, 4000), (4000, 1)])
def test_images_of_any_mode_and_size(reward, mode, size):
    assert reward(images=[Image.new(mode, size)], prompts=['"Open"']) == [0.0]


def test_what_is_transparent_is_seen_on_white(reward):
    black_on_nothing = draw("Open", ink=(0, 0, 0, 255), paper=(0, 0, 0, 0), mode="RGBA")
    white_on_nothing = draw("Open", ink=(255, 255, 255, 255), paper=(0, 0, 0, 0), mode="RGBA")
    assert reward(images=[black_on_nothing, white_on_nothing], prompts=['"Open"'] * 2) == [1.0, 0.0]


def test_prompts_in_doubt_are_counted_in_a_warning():
    reward, image = OCRAccuracy(num_threads=1), Image.new("RGB", (8, 8))

    def warned(prompts, **columns):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            reward(images=[image] * len(prompts), prompts=prompts, **columns)
        return [str(warning.message) for warning in caught]

    assert warned(['a "sign"', "don't"]) == []
    assert warned(['a "sign', "b"], text=["Open", ""]) == []  # the column says it
    (message,) = warned(['a "sign', "b"])
    assert "so far 1 prompt has unpaired quotes" in message
    assert 'Put it between "...", or in a column `text`' in message and "'a \"sign'" in message
    assert warned(['a "sign'] * 24) == []  # the same prompt
    (message,) = warned(['a "sign', "says 'Open'", "a sign”"])
    assert "so far 3 prompts have" in message
    assert warned(['"x', '"y']) == []  # again when there are twice as many
    assert len(warned(['"z'])) == 1
    (message,) = warned(['says "привет"', 'says "Open"', 'says "10 µm"'])
    assert "so far 1 prompt has a text in a script that the OCR model does not read" in message


@pytest.mark.parametrize(
    "text", ["Open", "Ñandú ß æ", "你好", "カタカナ ひらがな 々", "42!", "10 µm", "🙂", "Ｆｕｌｌ"]
)
def test_scripts_that_are_read(text):
    assert is_read(text)


@pytest.mark.parametrize("text", ["αβγδ", "привет", "안녕 🙂", "سلام", "שלום", "ไทย"])
def test_scripts_that_are_not_read(text):
    assert not is_read(text)


@pytest.mark.filterwarnings("ignore:.*script that the OCR model does not read")
def test_other_scripts(reward):
    languages = "Ñandú café|Geöffnet|Zavřeno|Łódź|Öppet|Açık|Kijárat|Noël".split("|")
    values = reward(images=[draw(text) for text in languages], prompts=[f'"{text}"' for text in languages])
    assert values == [1.0] * len(languages)
    # The reader has no letters for these, and the font no glyphs for the last.
    values = reward(images=[draw("привет"), draw("Open"), draw("你好")], prompts=['"привет"', "「你好」", '"안녕 🙂"'])
    assert values == [0.0, 0.0, 0.0]


def test_a_value_does_not_depend_on_the_batch(reward):
    words = ["Open", "Closed", "Exit"]
    images, prompts = [draw(word) for word in words], ['"Open"', '"Cloned"', '"Sale"']
    together = reward(images=images, prompts=prompts)
    assert together == [
        reward(images=[image], prompts=[prompt])[0] for image, prompt in zip(images, prompts, strict=True)
    ]
    assert reward(images=[], prompts=[]) == []
    assert len(set(together)) == 3


def test_an_error_of_the_reader_is_raised(reward):
    with pytest.raises(Exception, match="(?i)empty"):
        reward(images=[draw("Open"), Image.new("RGB", (0, 5))], prompts=['"Open"', '"Open"'])


def test_a_missing_reader_is_an_error_when_the_reward_is_made(monkeypatch):
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    with pytest.raises(MissingExtraError, match=r"needs rapidocr.*`pip install \"\.\[ocr\]\"`"):
        OCRAccuracy()


def test_the_reader_is_loaded_when_it_is_needed(monkeypatch):
    reward = OCRAccuracy()
    monkeypatch.setitem(sys.modules, "rapidocr", None)
    assert reward(images=[draw("Open")], prompts=["a door"]) == [None]
    with pytest.raises(ImportError):
        reward(images=[draw("Open")], prompts=['"Open"'])


def test_the_reader_is_quiet_but_for_errors(reward):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logger = logging.getLogger("RapidOCR")
    logger.addHandler(handler)
    try:
        OCRAccuracy(num_threads=1)(images=[Image.new("RGB", (64, 64)), draw("Open")], prompts=['"Open"'] * 2)
        assert records == []
        logger.error("This is seen.")
        assert len(records) == 1
    finally:
        logger.removeHandler(handler)


def test_the_reader_is_loaded_once(reward):
    reward.read(draw("Open"))
    reader = reward._reader
    reward.read(draw("Open"))
    assert reward._reader is reader


def test_the_number_of_threads_reaches_the_networks(reward):
    reward.read(draw("Open"))
    for part in (reward._reader.text_det, reward._reader.text_rec):
        options = part.session.session.get_session_options()
        assert (options.intra_op_num_threads, options.inter_op_num_threads) == (1, 1)
    with pytest.raises(ValueError, match="`num_threads` must be at least 1, got 0"):
        OCRAccuracy(num_threads=0)


def test_it_is_a_reward(reward):
    assert reward_names([reward, OCRAccuracy()]) == ["OCRAccuracy", "OCRAccuracy_1"]
    values = reward(images=[draw("Open")] * 2, prompts=['"Oven"', "a door"])
    tensor = reward_tensor(values, "OCRAccuracy", ['"Oven"', "a door"])
    assert tensor[0] == 0.75 and tensor[1].isnan()


@pytest.mark.slow
def test_drawn_words_are_read(reward):
    """Of 200 drawn words, the right word is worth at least 0.95 on average, and another one at most 0.4."""
    assert len(set(WORDS)) == 200
    rng = random.Random(0)
    read = [reward.read(draw_somewhere(word, rng)) for word in WORDS]
    right = np.mean([text_accuracy(word, text) for word, text in zip(WORDS, read, strict=True)])
    other = np.mean([text_accuracy(word, text) for word, text in zip(WORDS[1:] + WORDS[:1], read, strict=True)])
    print(f"\nmean reward of 200 drawn words at 256 px: {right:.4f} for the right word, {other:.4f} for another one")
    assert right >= 0.95
    assert other <= 0.4
