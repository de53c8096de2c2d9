# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Real runs that say everything about themselves, to be compared between numbers of processes.

`run_scenario` trains in this process. As a script, under torchrun, this module runs several scenarios one after the
other in the same processes: `scenarios.py FOLDER '{"name": {"max_steps": 3, ...}, ...}'`.
"""

import json
import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from adapter_helpers import add_trained_adapter
from datasets import Dataset
from PIL import Image
from safetensors.torch import save_file
from tiny import tiny_sd3
from trainer_helpers import PROMPTS, blue, small_trainer
from transformers import TrainerCallback

from trl_marble.balance import get_weighting
from trl_marble.hub import save_adapter
from trl_marble.rewards import AdversarialReward, LearningReward, SetReward


SETTINGS = {
    "num_generations": 4,
    "max_steps": 3,
    "balance_every": 1,
    # Plain gradient descent: Adam's first step has full size even where a gradient is only a rounding error.
    "optim": "sgd",
    "learning_rate": 10.0,
    "max_grad_norm": 0.0,
    "beta": 0.1,
    "num_generations_eval": 1,
    "timestep_fraction": 1.0,
}


# ---- Rewards: rounded, so that they do not see rounding in a pixel of 8 bits ----


def bright(images, **kwargs):
    return [round(float(np.asarray(image).mean()) / 255, 3) for image in images]


def left(images, **kwargs):
    """How much brighter the left half is than the right one."""
    grey = [np.asarray(image).mean(axis=2) / 255 for image in images]
    return [round(float(pixels[:, :8].mean() - pixels[:, 8:].mean()), 3) for pixels in grey]


def colours(images):
    return torch.tensor([[bright([image])[0], left([image])[0]] for image in images], dtype=torch.float64)


def red_only(images, prompts, **kwargs):
    """Does not apply to half of the prompts, so that one process may have no valid sample."""
    return [value if "red" in prompt else None for value, prompt in zip(bright(images), prompts, strict=True)]


def dark(images, **kwargs):
    return [-value for value in bright(images)]


def is_rank_1():
    return PartialState().process_index == 1


def raises_on_rank_1(images, **kwargs):
    if is_rank_1():
        raise ConnectionError("scorer went away")
    return blue(images)


def answers_nonsense_on_rank_1(images, **kwargs):
    return ["bright"] * len(images) if is_rank_1() else blue(images)


def logs(images, prompts, log_metric, log_extra, **kwargs):
    """Different names on the two processes, in different orders."""
    log_metric("on 1" if is_rank_1() else "on 0", 5.0)
    log_metric("on both", len(images) if is_rank_1() else math.nan)
    log_metric("a", 1.0 + is_rank_1())
    log_extra("on 1" if is_rank_1() else "on 0", prompts)
    return blue(images)


def left_if_long(images, prompts, **kwargs):
    """The same for all images of a short prompt."""
    return [value if len(prompt) > 5 else 0.0 for value, prompt in zip(left(images), prompts, strict=True)]


def dark_rank_if_long(images, prompts, groups, **kwargs):
    """The rank in the group, the same for all images of a short prompt."""
    ranks = rank_in_group(images, groups)
    return [rank if len(prompt) > 5 else 0 for rank, prompt in zip(ranks, prompts, strict=True)]


dark_rank_if_long.scope = "group"


def rank_in_group(images, groups, **kwargs):
    """How many images of the group are darker."""
    own = list(zip(bright(images), groups, strict=True))
    return [sum(other < value for other, its in own if its == group) for value, group in own]


rank_in_group.scope = "group"


def rank_in_batch(images, prompts, groups, log_metric, log_extra, **kwargs):
    """How many images of the whole batch are darker."""
    values = bright(images)
    log_metric("batch size", len(images))
    log_extra("group", groups)
    return [sum(v < value for v in values) for value in values]


rank_in_batch.scope = "batch"


class ColourDistance(SetReward):
    """How far from the mean colour of the batch; called on the colours only."""

    def features(self, images, prompts, **kwargs):
        return colours(images)

    def credit(self, features, groups):
        return (features - features.mean(dim=0)).norm(dim=1).round(decimals=3)


class Novelty(LearningReward):
    """How far from the mean colour of all images so far."""

    def __init__(self):
        self.mean = torch.zeros(2, dtype=torch.float64)

    def features(self, images, prompts, **kwargs):
        return colours(images)

    def score(self, features):
        return (features - self.mean).norm(dim=1).round(decimals=3)

    def update(self, features, rewards, trainer_state):
        self.mean = 0.5 * self.mean + 0.5 * features.mean(dim=0)

    def state_dict(self):
        return {"mean": self.mean}

    def load_state_dict(self, state_dict):
        self.mean = state_dict["mean"]


class Unlike:
    """How far from the mean brightness of the images that another reward liked so far; learns from images."""

    def __init__(self):
        self.level = torch.zeros((), dtype=torch.float64)

    def __call__(self, images, **kwargs):
        return [round(abs(value - self.level.item()), 3) for value in bright(images)]

    def update(self, images, rewards, trainer_state, prompts, log_metric):
        assert len(images) == len(prompts) == len(rewards["left"]) and not is_rank_1()
        liked = [value for value, other in zip(bright(images), rewards["left"], strict=True) if other > 0]
        self.level = self.level + 0.1 * sum(liked)
        log_metric("liked", len(liked))

    def state_dict(self):
        return {"level": self.level}

    def load_state_dict(self, state_dict):
        self.level = state_dict["level"]


class Dark(AdversarialReward):
    """An adversarial reward with dark images as the reference."""

    def __init__(self):
        reference = [Image.new("RGB", (16, 16), (i, i, i)) for i in range(0, 60, 3)]
        super().__init__(reference, lambda images: colours(images).float(), learning_rate=0.1)

    def state_dict(self):
        state = super().state_dict()
        return state | {f"head/{name}": value for name, value in state["head"].items()}


colour_distance = ColourDistance()
colour_distance.__name__ = "colour_distance"
REWARDS = {
    f.__name__: f
    for f in (
        bright,
        blue,
        left,
        red_only,
        raises_on_rank_1,
        answers_nonsense_on_rank_1,
        logs,
        left_if_long,
        rank_in_group,
        dark_rank_if_long,
        rank_in_batch,
        colour_distance,
        Novelty,  # a class: each run has one of its own, which has learned nothing
        Unlike,
        Dark,
    )
}


# ---- Faults, all in the second optimizer step, so that there is something to save ----


class Fault(TrainerCallback):
    """Breaks something of one process after the first optimizer step."""

    def __init__(self, name, trainer):
        self.name, self.trainer, self.broken, self.overflowed = name, trainer, False, False
        if name == "row":
            trainer.train_dataset.set_transform(self.read)

    def read(self, rows):
        if self.broken and is_rank_1():
            raise OSError("row cannot be read")
        return rows

    def on_step_end(self, args, state, control, **kwargs):
        self.broken = True
        main = not is_rank_1()
        if self.name == "rollout" and not main:
            self.trainer.pipeline.vae.decoder.register_forward_hook(self.fail)
        elif self.name == "update" and not main:
            self.trainer.flow.transformer.register_forward_hook(self.fail_with_gradients)
        elif self.name in ("latent", "loss") and not main:
            self.trainer.flow.transformer.register_forward_hook(self.overflow)
        elif self.name == "save" and main and state.global_step == 2:
            self.trainer._save = self.fail
        elif self.name == "picture" and main:
            self.trainer.latest_rollout = "no pictures"
        elif self.name == "kill" and not main:
            os.kill(os.getpid(), signal.SIGKILL)

    def fail(self, *args, **kwargs):
        raise OSError("no space left")

    def overflow(self, module, inputs, output):
        """Of the first sample, once: while the next images are sampled, or in the update."""
        if self.overflowed or output[0].requires_grad != (self.name == "loss"):
            return None
        self.overflowed = True
        factor = torch.ones(len(output[0]), 1, 1, 1)
        factor[0] = torch.nan
        return (output[0] * factor, *output[1:])

    def fail_with_gradients(self, *args, **kwargs):
        if torch.is_grad_enabled():
            raise FloatingPointError("update went wrong")


# ---- A run ----


class NotedWeighting:
    """MGDA, which keeps the Gram matrices that it gets. What a copy gets, for half of a step, it does not see."""

    def __init__(self):
        self.solve = get_weighting("mgda")
        self.grams: list[torch.Tensor] = []

    def __call__(self, gram):
        self.grams.append(gram.clone())
        return self.solve(gram)


class Record(TrainerCallback):
    """Keeps the gradient, Gram matrices and advantages of every optimizer step."""

    def __init__(self):
        self.tensors: dict[str, torch.Tensor] = {}
        self.weighting = NotedWeighting()

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        step, batch = state.global_step, self.trainer._batch
        parameters = self.trainer.weights.parameters
        if parameters[0].grad is not None:  # a step that is skipped has none
            self.tensors[f"gradient/{step}"] = torch.cat([p.grad.flatten() for p in parameters])
        order = batch.sample_ids.argsort()
        self.tensors[f"sample_ids/{step}"] = batch.sample_ids[order]
        self.tensors[f"advantages/{step}"] = batch.advantages[:, order]
        self.tensors[f"first_half/{step}"] = batch.first_half[order]
        self.tensors[f"active/{step}"] = batch.active


def make_teacher(folder: Path, seed: int) -> Path:
    """An adapter, the same on all processes."""
    pipeline = tiny_sd3(num_layers=1)
    add_trained_adapter(pipeline, seed=seed, std=0.2)
    return save_adapter(pipeline, folder / f"teacher-{seed}-{PartialState().process_index}")


def run_scenario(
    folder: Path,
    rewards: tuple[str, ...] = ("bright", "left", "red_only"),
    prompts: list[str] = PROMPTS,
    eval_prompts: int = 6,
    fault: str | None = None,
    resume: str | None = None,
    sources: list[str] | None = None,
    teachers: list[str] | None = None,
    **settings: Any,
) -> None:
    """Train and evaluate; what happened goes to `folder`, one file of tensors and one of text a process."""
    folder.mkdir(parents=True, exist_ok=True)
    record = Record()
    train_dataset = Dataset.from_dict({"prompt": prompts} | ({} if sources is None else {"source": sources}))
    balances = settings.get("multi_objective_aggregation", "marble") == "marble"
    trainer = small_trainer(
        folder / "out",
        [func() if isinstance(func := REWARDS[name], type) else func for name in rewards] or None,
        pipeline=tiny_sd3(num_layers=1),
        train_dataset=train_dataset,
        eval_dataset=Dataset.from_dict({"prompt": [f"{i} dogs" for i in range(eval_prompts)]}),
        eval_reward_funcs=dark,
        weighting=record.weighting if balances else None,
        callbacks=[record],
        teachers=None if teachers is None else {key: make_teacher(folder, seed) for seed, key in enumerate(teachers)},
        **(SETTINGS | settings),
    )
    record.trainer = trainer
    start = torch.cat([p.detach().flatten() for p in trainer.weights.parameters])
    if fault is not None:
        trainer.add_callback(Fault(fault, trainer))
    # A sharded parameter holds this process's part.
    held = [p.to_local() if hasattr(p, "to_local") else p for p in trainer.flow.transformer.parameters()]
    told: dict[str, Any] = {"parameters held": sum(p.numel() for p in held)}
    rank = trainer.args.process_index
    sampled: list[int] = []
    trainer.pipeline.vae.decoder.register_forward_hook(lambda *_: sampled.append(1))
    try:
        trainer.train(resume_from_checkpoint=None if resume is None else str(folder.parent / resume))
    except Exception as error:
        told |= {"error": f"{type(error).__name__}: {error}", "cause": repr(error.__cause__)}
    else:
        told |= {"evaluation": trainer.evaluate(), "log": trainer.state.log_history}
        record.tensors["evaluated"] = trainer.evaluations[-1].rewards.contiguous()
        if trainer.rollouts.learning is not None:
            for reward, state in trainer.rollouts.learning.state_dict().items():
                learned = {key: value for key, value in state.items() if torch.is_tensor(value)}
                record.tensors |= {f"learned/{reward}/{key}": value for key, value in learned.items()}
    told["pipeline calls"] = len(sampled)
    tensors = record.tensors | {f"gram/{i}": gram for i, gram in enumerate(record.weighting.grams)}
    tensors["change"] = torch.cat([p.detach().flatten() for p in trainer.weights.parameters]) - start
    for name, shadow in (("old", trainer.weights.old), ("average", trainer.weights.averaged)):
        tensors[name] = torch.cat([value.flatten() for value in shadow.state_dict().values()]) - start
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / f"rank{rank}.safetensors")
    (folder / f"rank{rank}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, scenario in json.loads(sys.argv[2]).items():
        run_scenario(Path(sys.argv[1]) / name, **scenario)
