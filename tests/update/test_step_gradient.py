# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The kinds of optimizer steps: what they cost in passes over the model, and that their directions agree."""

import gc
import math
import weakref

import pytest
import torch
from peft import LoraConfig
from transformers import TrainerCallback

from trl_marble.balance import SeparateBackward


# With this preset the old policy is the trained one in the first step and lags behind from the second on.
STEPS = {"max_steps": 2, "max_grad_norm": 0.0, "learning_rate": 1e-6, "old_policy_preset": 1}


class Watch(TrainerCallback):
    """Keeps every step's flat gradient, and counts passes over the transformer during updates."""

    def __init__(self):
        self.gradients, self.forwards, self.backwards = [], [], []

    def attach(self, trainer):
        self.trainer = trainer
        transformer = trainer.flow.transformer
        transformer.register_forward_hook(self._forward)
        trainer.add_callback(self)
        return self

    def _forward(self, module, inputs, output):
        self._count["forwards"] += 1
        if output[0].requires_grad:
            output[0].register_hook(self._backward)

    def _backward(self, grad):
        self._count["backwards"] += 1

    def on_train_begin(self, args, state, control, **kwargs):
        self._count = {"forwards": 0, "backwards": 0}
        sample = self.trainer._sample

        def sample_uncounted(*positional):
            batch = sample(*positional)
            self._count = {"forwards": 0, "backwards": 0}
            return batch

        self.trainer._sample = sample_uncounted

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.trainer.weights.parameters]))
        self.forwards.append(self._count["forwards"])
        self.backwards.append(self._count["backwards"])


@pytest.fixture
def watched(make_trainer):
    def run(prepare=None, **overrides):
        trainer = make_trainer(**(STEPS | overrides))
        if prepare is not None:
            prepare(trainer)
        watch = Watch().attach(trainer)
        trainer.train()
        return watch

    return run


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def micro_steps(watch):
    return watch.trainer.args.gradient_accumulation_steps * watch.trainer.update.grid.per_sample


@pytest.mark.parametrize(
    ("balance_on", "beta", "passes"),
    [("advantage", 0.1, 2), ("advantage", 0.0, 2), ("loss", 0.0, 2), ("loss", 0.1, 3)],
)
def test_backward_passes_of_a_solving_step_do_not_depend_on_the_rewards(watched, rewards, balance_on, beta, passes):
    for reward_funcs in (rewards[:1], rewards):
        settings = {"balance_on": balance_on, "beta": beta, "old_policy_preset": 1}
        if beta > 0:
            settings["regularizer_fraction"] = 1.0
        watch = watched(reward_funcs=reward_funcs, balance_every=1, **settings)
        assert watch.backwards[1] == passes * micro_steps(watch)
        row = watch.trainer.state.log_history[1]
        assert math.isfinite(row["balance/heldout_cos_min"])  # which cost none of them


def test_other_steps_take_one_backward_pass(watched):
    mixing = watched(balance_every=2, balance_on="loss", beta=0.1, regularizer_fraction=1.0)
    assert mixing.backwards == [3 * micro_steps(mixing), micro_steps(mixing)]
    summing = watched(multi_objective_aggregation="sum_then_normalize")
    assert summing.backwards == [micro_steps(summing)] * 2


def test_the_old_policy_is_not_run_where_it_is_the_trained_one(watched):
    def mean_old_forwards(**overrides):
        watch = watched(beta=0.0, **overrides)
        return [forwards / micro_steps(watch) for forwards in watch.forwards]

    assert mean_old_forwards(old_policy_preset=0) == [1, 1]  # follows at once
    assert mean_old_forwards(old_policy_preset=1, max_steps=3) == [1, 2, 2]  # lags from the first step on
    dropout = LoraConfig(r=4, target_modules=["attn.to_q"], lora_dropout=0.5)
    assert mean_old_forwards(old_policy_preset=0, peft_config=dropout) == [2, 2]


def test_skipping_the_old_policy_changes_nothing(watched):
    skipped = watched(old_policy_preset=0, balance_on="advantage")
    run = watched(
        old_policy_preset=0, balance_on="advantage", prepare=lambda t: setattr(t.weights, "_has_dropout", True)
    )
    assert run.forwards[0] > skipped.forwards[0]
    for a, b in zip(run.gradients, skipped.gradients, strict=True):
        assert relative_error(a, b) < 1e-6


def fix_weights(trainer):
    """The same weights over the gradients in every step, whatever was measured."""
    weights, gradient = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), trainer.update.gradient
    solve = gradient._solve
    gradient._solve = lambda *arguments: solve(*arguments)._replace(weights=weights)
    trainer.schedule.weights = lambda active: weights


def use_separate_passes(trainer):
    trainer.update.gradient.linears = None


@pytest.mark.parametrize("balance_on", ["loss", "advantage"])
@pytest.mark.parametrize(
    "peft", [{}, {"use_rslora": True}, {"lora_dropout": 0.3}], ids=["lora", "rslora", "lora_dropout"]
)
def test_weighted_passes_give_the_direction_of_separate_ones(watched, balance_on, peft):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["attn.to_q", "attn.add_v_proj", "attn.to_out.0"], **peft)
    settings = {"balance_on": balance_on, "balance_every": 1, "beta": 0.1, "peft_config": config}
    weighted = watched(**settings)
    separate = watched(use_separate_passes, **settings)
    assert separate.backwards[1] > weighted.backwards[1]
    for a, b in zip(weighted.gradients, separate.gradients, strict=True):
        assert relative_error(a, b) < 2e-5


def test_dora_takes_separate_passes_and_says_so(watched, caplog):
    config = LoraConfig(r=4, target_modules=["attn.to_q"], use_dora=True)
    watch = watched(peft_config=config, balance_on="loss", beta=0.0)
    assert watch.trainer.update.gradient.linears is None
    assert "not plain LoRA on linear layers" in caplog.text
    assert watch.backwards[1] == 3 * micro_steps(watch)
    assert watch.gradients[1].abs().sum() > 0
    assert not any("heldout" in key for row in watch.trainer.state.log_history for key in row)


@pytest.mark.parametrize("balance_on", ["loss", "advantage"])
def test_a_streaming_step_with_known_weights_is_the_solving_step(watched, balance_on):
    settings = {"balance_on": balance_on, "balance_every": 1, "beta": 0.1, "gradient_accumulation_steps": 2}
    settings |= {"per_device_train_batch_size": 4, "regularizer_fraction": 1.0}
    solving = watched(fix_weights, **settings)
    streaming = watched(fix_weights, balance_fraction=0.5, **settings)
    steps = micro_steps(streaming)
    assert streaming.backwards[0] == solving.backwards[0]  # nothing is known yet: the whole step is measured
    per_solve = solving.backwards[1] // steps
    assert streaming.backwards[1] == steps // 2 * per_solve + steps // 2
    assert relative_error(streaming.gradients[1], solving.gradients[1]) < 1e-5


def test_streaming_keeps_the_balance_fresh(watched):
    watch = watched(balance_fraction=0.25, balance_every=1, balance_ema=0.0, max_steps=3)
    logs = [entry for entry in watch.trainer.state.log_history if "balance/cos_min" in entry]
    assert len(logs) == 3  # every step has measured
    used = [[v for k, v in entry.items() if k.startswith("balance/alpha/")] for entry in logs]
    assert used[1] == pytest.approx(used[0], abs=1e-6)  # the second step uses what the first one found
    assert used[2] != pytest.approx(used[1], abs=1e-3)  # the third what the second one measured


def test_the_measured_part_of_a_streaming_step_is_another_one_at_every_step(watched):
    gradient = watched(balance_fraction=0.3, balance_every=1).trainer.update.gradient
    gradient._solves = False
    first, second = gradient._draw_measured(7, 20), gradient._draw_measured(8, 20)
    assert len(first) == len(second) == 6 and first != second  # 30% of 20
    assert first | second <= set(range(20))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("backend", "checkpointing", "beta"),
    [("inductor", False, 0.0), ("aot_eager", True, 0.1)],  # without `beta` the first step has one backward pass
)
def test_compiled_blocks_give_the_same_directions(watched, monkeypatch, backend, checkpointing, beta):
    # `torch_compile` sets this for the whole process; what is set here is taken back after the test.
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    torch.compiler.reset()  # blocks that were compiled before would be taken, whatever the backend
    settings = {"balance_every": 2, "balance_on": "advantage", "max_steps": 3, "learning_rate": 1e-3}
    settings |= {"beta": beta, "gradient_checkpointing": checkpointing}
    plain = watched(**settings)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        compiled = watched(torch_compile=True, torch_compile_backend=backend, **settings)
    assert all(block._compiled_call_impl is not None for block in compiled.trainer.flow.transformer.transformer_blocks)
    # Compiled blocks round otherwise, and so may a pixel, which is felt: these rewards spread by half a level only.
    tolerance = 1e-2 if backend == "inductor" else 1e-4
    for a, b in zip(compiled.gradients, plain.gradients, strict=True):
        assert relative_error(a, b) < tolerance


def test_separate_backward_is_what_trains_without_linears(watched):
    seen = []

    def prepare(trainer):
        use_separate_passes(trainer)
        begin = trainer.update.gradient.begin

        def begin_and_look(*args):
            begin(*args)
            seen.append(type(trainer.update.gradient._rows))

        trainer.update.gradient.begin = begin_and_look

    watched(prepare, balance_every=2)
    assert seen == [SeparateBackward, type(None)]


def test_the_buffers_of_a_step_do_not_outlive_it(watched):
    """They are as large as the adapter times the number of rewards, and sampling needs the memory."""
    buffers = []

    def prepare(trainer):
        begin = trainer.update.gradient.begin

        def begin_and_note(*args):
            begin(*args)
            buffers.append(weakref.ref(trainer.update.gradient._rows))

        trainer.update.gradient.begin = begin_and_note

    gc.disable()  # they must go by themselves
    try:
        watch = watched(prepare, balance_every=1)
        assert len(buffers) == 2 and [buffer() for buffer in buffers] == [None, None]
    finally:
        gc.enable()
    assert watch.backwards[1] > 0
