# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What only a GPU shows, on ShapeWorld: where tensors are, and that results are those of a CPU. `pytest -m gpu`"""

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch import nn

from trl_marble.rewards import ModelReward
from trl_marble.selftest.compilation import check_compilation
from trl_marble.selftest.costs import check_costs
from trl_marble.selftest.gradients import check_gradients
from trl_marble.selftest.offloading import check_offloading
from trl_marble.selftest.precision import check_precision
from trl_marble.selftest.resuming import check_resuming
from trl_marble.selftest.rewards import PROMPTS, REWARDS
from trl_marble.selftest.subject import SETTINGS, Subject
from trl_marble.shapeworld import load_pipeline
from trl_marble.trainer import MarbleConfig, MarbleNFTTrainer


DEVICE = "cuda"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


@pytest.fixture
def subject():
    return Subject(bf16=True)


@pytest.fixture
def make_trainer(tmp_path):
    """Trainers of ShapeWorld on the GPU, or on the CPU."""

    def make(rewards=REWARDS, device=DEVICE, **settings):
        given = SETTINGS | {"output_dir": str(tmp_path / "run"), "use_cpu": device == "cpu"} | settings
        prompts = Dataset.from_dict({"prompt": PROMPTS})
        return MarbleNFTTrainer(load_pipeline(), list(rewards), MarbleConfig(**given), prompts, prompts)

    return make


def on_device(tensors):
    return {tensor.device.type for tensor in tensors} == {DEVICE}


def relative_error(found, expected):
    return ((found.cpu().float() - expected.float()).norm() / expected.float().norm()).item()


def test_every_tensor_of_a_step_is_on_the_gpu(make_trainer):
    trainer = make_trainer()
    trainer.train()
    for name, component in trainer.pipeline.components.items():
        if isinstance(component, nn.Module):
            assert on_device([*component.parameters(), *component.buffers()]), name
    for shadow in (trainer.weights.old, trainer.weights.averaged):
        assert on_device(shadow.state_dict().values())
    moments = [state[name] for state in trainer.optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    assert on_device(moments)
    batch = trainer._batch
    assert on_device([batch.latents, batch.advantages, batch.first_half, batch.counts])
    assert on_device(batch.conditioning.kwargs.values())


class Projection(ModelReward):
    """A random projection of the picture, by a network that takes long enough to run beside the sampling."""

    value_range = "any"

    def load(self):
        network = nn.Sequential(nn.Linear(64 * 64 * 3, 2048), *(nn.Linear(2048, 2048) for _ in range(8)))
        generator = torch.Generator().manual_seed(0)  # its own: others draw from torch's in the meantime
        for parameter in network.parameters():
            parameter.data.normal_(std=0.02, generator=generator)
        return network

    def score(self, images, prompts, **columns):
        pixels = torch.stack([torch.from_numpy(np.asarray(image).copy()).flatten().float() for image in images])
        self.current_device = torch.cuda.current_device()
        return self.model(pixels.to(self.device) / 255).mean(dim=1).tolist()


def test_rewards_on_their_own_streams_score_what_was_sampled(make_trainer):
    """In a step whose images are scored two by two while the next two are sampled."""
    reward = Projection()
    settings = {"per_device_train_batch_size": 16, "num_generations": 4, "rollout_batch_size": 2}
    trainer = make_trainer([reward, *REWARDS], **settings)
    _, record = trainer.rollouts.sample([number // 4 for number in range(16)], 0, trainer.state)
    assert reward.current_device == trainer.args.device.index
    alone = Projection()
    alone.to(torch.device(DEVICE), torch.float32)
    expected = alone(images=record.images, prompts=record.prompts)
    assert record.all_rewards[0].tolist() == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_gradients_in_bf16_point_where_those_in_fp32_do(subject):
    assert check_gradients(subject).measured["relative_error"] < 1e-3
    assert min(check_precision(subject).measured["cosines"]) > 0.99


def test_offloaded_components_leave_the_gpu(subject):
    finding = check_offloading(subject)
    assert finding.measured["relative_error"] < 1e-3 and "only the transformer stays" in finding.reason


def test_compiled_blocks_give_the_same_gradients(subject):
    assert check_compilation(subject).measured["relative_error"] < 1e-3


def test_the_same_seeds_give_the_same_latents_as_on_a_cpu(make_trainer):
    rows = [0, 0, 1, 1]
    first, second, other = (make_trainer()._sample(rows, generation).latents for generation in (0, 0, 1))
    assert torch.equal(first, second)
    assert relative_error(first, make_trainer(device="cpu")._sample(rows, 0).latents) < 1e-3
    assert relative_error(other, first.cpu()) > 0.1


def test_the_measured_peak_is_the_computed_one_and_the_librarys_workspace(subject):
    memory = check_costs(subject).measured["memory"]
    assert 0.8 * memory["computed_gb"] < memory["measured_gb"] < memory["computed_gb"] + 0.2


def test_a_resumed_run_ends_as_the_uninterrupted_one(subject):
    measured = check_resuming(subject).measured
    assert measured["bitwise"] or measured["relative_error"] < 0.05


def test_decoded_images_are_those_of_a_cpu(make_trainer):
    pictures = []
    for device in (DEVICE, "cpu"):
        flow = make_trainer(device=device).flow
        images = flow.rollout(flow.encode(PROMPTS[:2]), [0, 1], 3).images
        pictures.append(np.stack([np.asarray(image, dtype=np.float32) for image in images]))
    assert np.abs(pictures[0] - pictures[1]).mean() < 1 and pictures[1].std() > 5  # of 255 levels


def test_an_evaluation_gives_what_it_gives_on_a_cpu(make_trainer):
    found, expected = (make_trainer(device=device, num_generations_eval=2).evaluate() for device in (DEVICE, "cpu"))
    names = [name for name in expected if name.startswith("eval_reward") or name.startswith("eval_rewards")]
    assert names
    for name in names:
        assert found[name] == pytest.approx(expected[name], abs=1e-2, nan_ok=True), name
