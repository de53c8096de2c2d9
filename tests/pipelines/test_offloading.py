# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Which components are on the device when their weights are used. A second device is not needed for that: `cpu:0` is
another one than `cpu` to the code that moves modules, and the same to the one that computes.
"""

import pytest
import torch
from tiny_edits import TINY_EDITS, edit_image, edit_instruction
from tiny_families import TINY
from tiny_videos import TINY_VIDEOS
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainer_helpers import small_trainer

from trl_marble.pipelines import FAMILIES, FlowPipeline
from trl_marble.pipelines.offloading import offload_components


DEVICE = "cpu:0"
# Its text encoder's layers are called one by one, so that no hook runs; the pipeline runs them where they are.
STAYS_ON_CPU = {("Ideogram4Pipeline", "text_encoder")}


class DeviceRecord(TorchDispatchMode):
    """The latest device of each component, and the components on the device whenever weights were used."""

    def __init__(self, pipeline) -> None:
        super().__init__()
        self.places: dict[str, str] = {}
        self.uses: set[tuple[str, tuple[str, ...]]] = set()
        self.owners: dict[int, str] = {}
        for name, component in pipeline.components.items():
            if isinstance(component, nn.Module):
                self._watch(name, component)

    def _watch(self, name: str, component: nn.Module) -> None:
        def to(place):
            self.places[name] = str(place)  # not moved, so that the addresses of its weights stay
            return component

        component.to = to
        self.owners |= {parameter.data_ptr(): name for parameter in component.parameters()}

    @property
    def on_device(self) -> tuple[str, ...]:
        return tuple(sorted(name for name, place in self.places.items() if place == DEVICE))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:  # as in `parameter.data`: nothing is computed
            return func(*args, **(kwargs or {}))
        for leaf in tree_leaves((args, kwargs or {})):
            if isinstance(leaf, torch.Tensor) and (name := self.owners.get(leaf.data_ptr())) is not None:
                self.uses.add((name, self.on_device))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [family.pipeline_class.__name__ for family in FAMILIES])
def test_components_are_on_the_device_while_they_are_used_and_only_then(name):
    make, options = (TINY_EDITS | TINY | TINY_VIDEOS)[name]
    pipeline = make()
    num_frames = options.get("num_frames", options.get("frames"))
    flow = FlowPipeline(
        pipeline, options["height"], options["width"], 1.0, options.get("max_sequence_length"), num_frames
    )
    prompts, images = ["a red dog", "a cat"], None
    if flow.family.takes_image != "no":
        prompts = [edit_instruction(prompt) for prompt in prompts] if name == "BriaFiboEditPipeline" else prompts
        images = [edit_image("red green white"), edit_image("blue yellow")]

    def use() -> list[torch.Tensor]:
        conditioning = flow.encode(prompts, images)
        rollout = flow.rollout(conditioning, [0, 1], 2, output_type="pt")
        with torch.no_grad():
            velocity = flow.velocity(rollout.latents, torch.full((2,), 0.5), conditioning)
        return [rollout.latents, rollout.images, velocity]

    plain = use()
    with DeviceRecord(pipeline) as record:
        offload_components(pipeline, DEVICE)
        offloaded = use()
    for before, after in zip(plain, offloaded, strict=True):
        torch.testing.assert_close(before, after, rtol=0, atol=0)
    resident = {name for name in record.places if "transformer" in name}
    users = {name for name, _ in record.uses}
    assert {"transformer", "vae", "text_encoder"} <= users
    for user, present in record.uses:
        visits = set() if (name, user) in STAYS_ON_CPU else {user}
        assert set(present) == resident | visits, f"{present} were on the device when {user} was used"
    assert set(record.on_device) == resident  # the transformer was used last


def test_a_trainer_offloads_only_when_asked(tmp_path):
    losses = {}
    for offload in (False, True):
        trainer = small_trainer(tmp_path, offload_components=offload)
        assert ("_MoveOthersToCpu" in repr(getattr(trainer.pipeline.transformer, "_hf_hook", None))) == offload
        trainer.train()
        losses[offload] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[True] == losses[False] != []


def test_hooks_can_be_removed():
    pipeline = TINY["StableDiffusion3Pipeline"][0]()
    offload_components(pipeline, DEVICE)
    pipeline.remove_all_hooks()
    record = DeviceRecord(pipeline)
    flow = FlowPipeline(pipeline, 16, 16, max_sequence_length=24)
    flow.rollout(flow.encode(["a"]), [0], 1)
    assert record.places == {}
