# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The servers of scorers in environments of their own, with stand-ins that have the signatures of the real models."""

import importlib.util
import sys
from contextlib import contextmanager
from unittest.mock import MagicMock

import numpy as np
import pytest
from example_scripts import EXAMPLES
from PIL import Image

from trl_marble.rewards import RemoteReward, RewardError
from trl_marble.rewards.server import TOKEN_VARIABLE, RewardServer


FOLDER = EXAMPLES / "reward_servers"

# What is imported in the environments of the scorers, by file. Signatures are those of the repositories.
TORCH = """
import contextlib
bfloat16 = "bfloat16"
no_grad = contextlib.nullcontext
class Number(float):
    def item(self):
        return float(self)
"""
STAND_INS = {
    "hps_v3.py": {
        "torch.py": TORCH,
        "hpsv3/__init__.py": "",
        "hpsv3/inference.py": """
from PIL import Image
from torch import Number
class HPSv3RewardInferencer:
    def __init__(self, config_path=None, checkpoint_path=None, device="cuda", differentiable=False):
        print("loading")  # as real ones do
    def reward(self, image_paths, prompts):
        reds = [Image.open(path).getpixel((0, 0))[0] for path in image_paths]
        return [(Number(red + len(prompt)), Number(99)) for red, prompt in zip(reds, prompts)]
""",
    },
    "video_align.py": {
        "torch.py": TORCH,
        "cv2.py": """
import pickle
VideoWriter_fourcc = lambda *letters: "".join(letters)
class VideoWriter:
    def __init__(self, path, fourcc, fps, size):
        assert fourcc == "mp4v" and fps == 16.0
        self.path, self.size, self.frames = path, size, []
    def write(self, frame):
        assert frame.flags["C_CONTIGUOUS"] and frame.shape[1::-1] == self.size
        self.frames.append(frame[0, 0].tolist())
    def release(self):
        pickle.dump(self.frames, open(self.path, "wb"))
""",
        "inference.py": """
import pickle, torch
class VideoVLMRewardInference:
    def __init__(self, load_from_pretrained, load_from_pretrained_step=-1, device="cuda", dtype=torch.bfloat16):
        assert load_from_pretrained == "checkpoints"
    def reward(self, video_paths, prompts, fps=None, num_frames=None, max_pixels=None, use_norm=True):
        videos = [pickle.load(open(path, "rb")) for path in video_paths]
        # Frames are blue, green, red.
        return [{"VQ": 0, "MQ": 0, "TA": 0, "Overall": sum(frame[2] for frame in frames)} for frames in videos]
""",
    },
    "edit_score.py": {
        "editscore/__init__.py": """
class EditScore:
    def __init__(self, backbone="gpt-4.1", openai_url="", key=None, model_name_or_path="", score_range: int=25,
                 temperature: float=0.7, tensor_parallel_size: int=1, max_model_len: int=1536,
                 max_num_batched_tokens: int=1536, max_num_seqs: int=32, num_pass: int=1,
                 reduction: str="average_last", seed: int=42, lora_path=None, cache_dir=None):
        assert (backbone, score_range) == ("qwen3vl", 25)
    def evaluate(self, image_prompts, text_prompt):
        before, after = image_prompts
        assert before.size == (6, 4) and after.size == (3, 2)
        return {"overall": after.getpixel((0, 0))[0] - before.getpixel((0, 0))[0] + len(text_prompt)}
""",
    },
    "unified_reward.py": {
        "torch.py": TORCH,
        "qwen_vl_utils.py": """
def process_vision_info(conversations):
    return [part["image"] for part in conversations[0]["content"] if part["type"] == "image"], None
""",
        "transformers.py": """
import numpy
class Inputs(dict):
    def to(self, device):
        assert device == "cuda"
        return self
    input_ids = property(lambda self: self["input_ids"])
class AutoProcessor:
    @classmethod
    def from_pretrained(cls, name):
        assert name == "CodeGoat24/UnifiedReward-2.0-qwen-7b"
        return cls()
    def apply_chat_template(self, messages, tokenize, add_generation_prompt):
        return messages[0]["content"][1]["text"]
    def __call__(self, text, images, padding, return_tensors):
        assert "Text Caption: [a dog]" in text[0]
        return Inputs(input_ids=numpy.array([[7, 7, images[0].getpixel((0, 0))[0]]]))
    def batch_decode(self, tokens, skip_special_tokens):
        (red,) = tokens[0]
        if red == 0:
            return ["I cannot say."]
        if red == 1:
            return ["Alignment Score (1-5): 45\\nCoherence Score (1-5): 3\\nStyle Score (1-5): 2.0"]
        return [f"Alignment Score (1-5): {red}.5\\nCoherence Score (1-5): 3\\nStyle Score (1-5): 2.0"]
class Qwen2_5_VLForConditionalGeneration:
    device = "cuda"
    @classmethod
    def from_pretrained(cls, name, torch_dtype, device_map):
        return cls()
    def generate(self, input_ids, max_new_tokens, do_sample):
        return numpy.concatenate([input_ids, input_ids[:, -1:]], axis=1)
""",
    },
    "geneval2.py": {
        "evaluation.py": """
from PIL import Image
print("Loading Qwen")
def soft_tifa(vqa_list, image_filepath):
    red = Image.open(image_filepath).getpixel((0, 0))[0]
    scores = [red / 255 if question.startswith("How many") else 1.0 for question, answer in vqa_list]
    return sum(scores) / len(scores), scores
""",
    },
}


def load(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(red, size=(3, 2)):
    return Image.new("RGB", size, (red, 0, 0))


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Serves a scorer in a process where the stand-ins are all that it finds; gives its `RemoteReward`."""
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")

    @contextmanager
    def serve(file):
        for name, text in STAND_INS[file].items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(text)
        scorer = load("serve").ScorerProcess(FOLDER / file, sys.executable, str(tmp_path))
        try:
            with RewardServer(scorer, port=0) as server:
                yield RemoteReward(server.url, file.removesuffix(".py"), max_retries=0)
        finally:
            scorer.close()

    return serve


def test_hpsv3(served):
    with served("hps_v3.py") as remote:
        assert remote(images=[picture(5), picture(9)], prompts=["ab", ""]) == [7.0, 9.0]
        assert remote(images=[picture(1)], prompts=["c"]) == [2.0]  # the process goes on


def test_video_align_gets_videos_as_film_strips(served):
    videos = [[picture(10), picture(20), picture(30)], [picture(1)]]
    with served("video_align.py") as remote:
        reward = load("pictures").of_videos(remote)
        assert reward.__name__ == "video_align"
        assert reward(videos=videos, prompts=["a", "b"], trainer_state=None) == [60.0, 1.0]


def test_edit_score_gets_both_images(served):
    with served("edit_score.py") as remote:
        reward = load("pictures").of_edits(remote)
        found = reward(images=[picture(50)], prompts=["abc"], image=[picture(20, (6, 4))], trainer_state=None)
        assert found == [33.0]


def test_unified_reward_reads_three_scores_and_refuses_other_answers(served):
    with served("unified_reward.py") as remote:
        assert remote(images=[picture(4)], prompts=["a dog"]) == [pytest.approx((4.5 + 3 + 2) / 3)]
        values = remote(images=[picture(0), picture(1), picture(3)], prompts=["a dog"] * 3)
    assert values[2] == pytest.approx((3.5 + 3 + 2) / 3)  # one bad answer is a failure of its image only
    for value, answer in zip(values, ("'I cannot say.'", "'Alignment Score (1-5): 45"), strict=False):
        assert isinstance(value, RewardError) and f"not all three scores from 1 to 5: {answer}" in str(value)


@pytest.mark.parametrize(
    ("alignment", "is_score"),
    [("4", True), ("4.5", True), ("5", True), ("1.", True), ("5.0", True)]
    + [(text, False) for text in ("45", "0", "0.5", "5.5", "6", "-4", "4/10", "4-5", "4,5", "4.5.1", "X", "")]
    + [("4\nAlignment Score (1-5): 2", False), ("4\nAlignment Score (1-5): 4", True)],
)
def test_unified_reward_scores_are_from_1_to_5(alignment, is_score, monkeypatch):
    for module in ("qwen_vl_utils", "transformers", "torch"):
        monkeypatch.setitem(sys.modules, module, MagicMock())
    read = load("unified_reward").read
    value = read(f"Alignment Score (1-5): {alignment}\nCoherence Score (1-5): 3\nStyle Score (1-5): 2.0")
    assert isinstance(value, float if is_score else ValueError)


def test_geneval2_applies_where_there_are_questions(served):
    questions = [[["How many dogs are in the image?", "two"], ["Are there any dogs?", "Yes"]], None]
    with served("geneval2.py") as remote:
        found = remote(images=[picture(51), picture(51)], prompts=["two dogs", "sky"], vqa_list=questions)
        assert found == [pytest.approx(0.6), None]


def test_film_strips_are_taken_apart_as_they_were_made():
    pictures = load("pictures")
    noise = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    frames = [Image.fromarray(noise), picture(7, (2, 9)), Image.fromarray(noise[::-1].copy())]
    again = pictures.frames_of(*pictures.film_strip(frames))
    assert [np.array_equal(a, b) for a, b in zip(again, frames, strict=True)] == [True] * 3


def test_a_scorer_that_cannot_be_loaded_or_ends_is_told(tmp_path, capfd):
    serve = load("serve")
    (tmp_path / "broken.py").write_text("import a_library_that_is_not_there")
    with pytest.raises(RuntimeError, match="The scorer `broken` has ended with status 1"):
        serve.ScorerProcess(tmp_path / "broken.py", sys.executable)
    assert "No module named 'a_library_that_is_not_there'" in capfd.readouterr().err
    (tmp_path / "ends.py").write_text("import os\nclass Scorer:\n    def __call__(self, *given):\n        os._exit(3)")
    scorer = serve.ScorerProcess(tmp_path / "ends.py", sys.executable)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="The scorer `ends` has ended with status 3"):
            scorer(images=[picture(1)], prompts=[""])


def test_the_token_is_not_told_to_scorers(tmp_path, monkeypatch):
    monkeypatch.setenv(TOKEN_VARIABLE, "secret")
    text = (
        f"import os\nclass Scorer:\n    def __call__(self, *given):\n        return [{TOKEN_VARIABLE!r} in os.environ]"
    )
    (tmp_path / "curious.py").write_text(text)
    scorer = load("serve").ScorerProcess(tmp_path / "curious.py", sys.executable)
    assert scorer(images=[picture(1)], prompts=[""]) == [0.0]
    scorer.close()


def test_a_file_that_is_not_there_is_refused(capsys):
    with pytest.raises(SystemExit):
        load("serve").main(["nothing.py", "--python", sys.executable])
    assert "there is no file nothing.py" in capsys.readouterr().err
