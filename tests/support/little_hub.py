# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
A local Hub that has tiny models and data sets under the names that the documents use.

What a reader's command downloads, a test downloads too: the same ids, files and code, but random weights of a few
kilobytes. Pipelines make images of 16 pixels.
"""

import hashlib
import importlib.util
import json
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from local_hub import REPO, LocalHub, local_hub
from tiny import _clip_tokenizer, tiny_flux, tiny_sd3
from tiny_families import tiny_flux2_klein
from tiny_scorers import _random_clip, open_clip_weights, tiny_detector
from transformers import BertTokenizer, CLIPImageProcessorPil, CLIPModel, Mask2FormerImageProcessorPil


PROMPTS = ["a castle at dawn", "portrait of a fox", "a red car", "an old tree", "two cats", "the sea at night"]


@contextmanager
def little_hub() -> Iterator[LocalHub]:
    """A running Hub with everything in it that the documents load."""
    with local_hub() as hub, tempfile.TemporaryDirectory() as folder:
        _serve_datasets(hub)
        for pipeline in ("stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-3.5-large"):
            sd3 = tiny_sd3(num_layers=1)
            sd3.transformer.register_to_config(sample_size=8)  # 16 pixels where no size is asked for
            _add(hub, pipeline, sd3, folder)
        for pipeline in ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell"):
            _add(hub, pipeline, tiny_flux(guidance_embeds=pipeline.endswith("dev")), folder)

        _add(hub, "black-forest-labs/FLUX.2-klein-base-4B", tiny_flux2_klein(), folder)

        # The text and image preparation of all scorers on CLIP, and the model itself.
        processors = (_clip_tokenizer(), CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28))
        clip = _random_clip("quick_gelu")
        _add(hub, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", (clip, *processors), folder)
        _add(hub, "yuvalkirstain/PickScore_v1", clip, folder)
        clip.config.projection_dim = 768  # what the aesthetic predictor reads
        _add(hub, "openai/clip-vit-large-patch14", (CLIPModel(clip.config), *processors), folder)
        detector = (
            tiny_detector(),
            Mask2FormerImageProcessorPil(size={"shortest_edge": 64, "longest_edge": 128}),
        )
        _add(hub, "facebook/mask2former-swin-small-coco-instance", detector, folder)
        checkpoint = Path(folder, "HPS_v2.1_compressed.pt")
        torch.save({"state_dict": open_clip_weights(_random_clip("gelu"))}, checkpoint)
        _add_files(hub, "xswu/HPSv2", {checkpoint.name: checkpoint.read_bytes()})
        checkpoint = Path(folder, "aesthetic-model.pth")
        torch.save(_aesthetic_layers(), checkpoint)
        _add_files(hub, "trl-lib/ddpo-aesthetic-predictor", {checkpoint.name: checkpoint.read_bytes()})
        image_reward = _image_reward()
        checkpoint = Path(folder, "ImageReward.pt")
        torch.save(image_reward.checkpoint(), checkpoint)
        sizes = json.dumps(image_reward.TEXT).encode()
        _add_files(hub, "zai-org/ImageReward", {checkpoint.name: checkpoint.read_bytes(), "med_config.json": sizes})
        vocabulary = {token: index for index, token in enumerate(image_reward.VOCABULARY)}
        _add(hub, "google-bert/bert-base-uncased", BertTokenizer(vocab=vocabulary), folder)

        for name, column in (("Gustavosta/Stable-Diffusion-Prompts", "Prompt"), ("user/captions", "caption")):
            rows = "\n".join(json.dumps({column: prompt}) for prompt in PROMPTS)
            _add_files(hub, f"datasets/{name}", {"train.jsonl": rows.encode()})
        yield hub


def _aesthetic_layers() -> dict[str, torch.Tensor]:
    """The aesthetic predictor's weights, by their places in the original."""
    sizes = {0: (1024, 768), 2: (128, 1024), 4: (64, 128), 6: (16, 64), 7: (1, 16)}
    random = torch.Generator().manual_seed(0)
    layers = {}
    for place, shape in sizes.items():
        layers[f"layers.{place}.weight"] = torch.randn(shape, generator=random) * shape[1] ** -0.5
        layers[f"layers.{place}.bias"] = torch.zeros(shape[0])
    return layers


def _image_reward() -> Any:
    """The tests of ImageReward, where its checkpoint is written down tensor by tensor."""
    path = Path(__file__).parents[1] / "rewards" / "test_image_reward.py"
    spec: Any = importlib.util.spec_from_file_location("image_reward_checkpoint", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _add(hub: LocalHub, repo: str, parts: Any, folder: str) -> None:
    """Put what `save_pretrained` writes into a repository."""
    saved = Path(folder, repo)
    for part in parts if isinstance(parts, tuple) else (parts,):
        part.save_pretrained(saved)
    files = (path for path in saved.rglob("*") if path.is_file())
    _add_files(hub, repo, {path.relative_to(saved).as_posix(): path.read_bytes() for path in files})


def _add_files(hub: LocalHub, repo: str, files: dict[str, bytes]) -> None:
    hub.files[repo], hub.commits[repo] = files, ["Initial commit"]


def _serve_datasets(hub: LocalHub) -> None:
    """
    Answer for data sets too, which are kept under `datasets/<id>`, and for folders of models: as much as
    `datasets.load_dataset` and the tokenizers of transformers ask for.
    """
    handler: Any = hub.server.RequestHandlerClass

    class Handler(handler):
        def handle_request(self) -> None:
            path = self.path.partition("?")[0].replace("%2F", "/")
            for pattern, answer in ROUTES:
                if match := re.fullmatch(pattern, path):
                    body = self.read_body()
                    repo = match["repo"] if path.startswith("/api/models/") else f"datasets/{match['repo']}"
                    with hub.lock:
                        hub.requests.append((self.command, path))
                        return answer(self, repo, match, body) if self.known(repo) else None
            super().handle_request()

        do_GET = do_HEAD = do_POST = handle_request

        def about(self, repo: str, match: re.Match[str], body: bytes) -> None:
            siblings = [{"rfilename": path} for path in hub.files[repo]]
            name = repo.removeprefix("datasets/")
            self.reply(200, {"id": name, "sha": hub.sha(repo), "private": False, "tags": [], "siblings": siblings})

        def listing(self, repo: str, match: re.Match[str], body: bytes) -> None:
            folder = match.groupdict().get("path")
            if folder and not any(path.startswith(f"{folder}/") for path in hub.files[repo]):
                return self.not_found("EntryNotFound", f"{folder} is not in {repo}")
            wanted = list(hub.files[repo])
            if self.command == "POST":
                wanted = [path for path in wanted if path in json.loads(body)["paths"]]
            inside = f"{folder}/" if folder else ""
            files = [(path, hub.files[repo][path]) for path in wanted if path.startswith(inside)]
            rows = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for path, data in files
            ]
            self.reply(200, rows)

        def content(self, repo: str, match: re.Match[str], body: bytes) -> None:
            path = match["path"]
            if path not in hub.files[repo]:
                return self.not_found("EntryNotFound", f"{path} is not in {repo}")
            data = hub.files[repo][path]
            etag = hashlib.sha1(data).hexdigest()
            self.reply(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": hub.sha(repo)})

    ROUTES = [
        (rf"/api/models/{REPO}/tree/[^/]+/(?P<path>.+)", Handler.listing),
        (rf"/api/datasets/{REPO}/(tree|paths-info)/[^/]+(/(?P<path>.+))?", Handler.listing),
        (rf"/api/datasets/{REPO}(/revision/[^/]+)?", Handler.about),
        (rf"/datasets/{REPO}/resolve/[^/]+/(?P<path>.+)", Handler.content),
    ]
    hub.server.RequestHandlerClass = Handler
