# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.

# /// script
# dependencies = ["trl_marble", "torch", "diffusers", "transformers", "rich"]
# ///
"""What balancing costs: time and peak memory of a complete optimizer step, relative to a weighted sum of the rewards.

```bash
python examples/benchmarks/step_cost.py --rewards 5 20 --model small
```

All modes train the same pipeline on the same batches in alternation, so that other load on the machine affects them
equally. The pipelines have random weights and rewards without cost, except `shapeworld`, the demo's pipeline with its
prompts and rewards. `single` has one reward. `weighted_sum` sums the rewards and is the baseline of all ratios.
`naive` balances every step with one backward pass per reward, as the paper does. `exact` balances every step.
`streaming` balances every step from some of its forward passes. `every_10` computes new weights at every tenth step;
its cost is calculated from one measured step of each kind. `awm` balances every step, with AWM's loss.

In all of these the old policy lags. With `_on_policy` it is the trained policy (`old_policy_preset=0`; AWM then has no
trust region). With `_sampled` the penalties are taken from a part of the forward passes (`--regularizer_fraction`).

`update` is gradients and optimizer: CPU time of all threads, on a GPU the time on the clock. `loop` is sampling,
scoring and update; sampling and scoring are the same in all modes, so their median is counted in each. Memory is the
peak of existing tensors during the update, with the weights; `less rows` is without one gradient buffer for each
reward in the modes that have them. Forward and backward passes of the transformer are counted in one update.

`--paper_passes` measures no time. It counts the passes of the transformer for each image, sampling included, in the
second step of a training with five rewards and a KL: of the weighted sum as DiffusionNFT runs it, and of exact
balancing with what is recommended here.
"""

import argparse
import gc
import json
import platform
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from evidence.costs import StepCosts
from random_models import SIZES, random_pipeline
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.balance import OLD_POLICY_PRESETS, old_policy_decay
from trl_marble.selftest.passes import count_passes
from trl_marble.shapeworld import load_pipeline, load_prompts, reward_funcs
from trl_marble.trainer import construction


@dataclass(frozen=True)
class Mode:
    """
    One way to take an optimizer step.

    Args:
        settings (`Mapping[str, Any]`, *optional*, defaults to none):
            Settings of `MarbleConfig`.
        sampled (`bool`, *optional*, defaults to `False`):
            Whether the penalties are taken from a part of the forward passes.
        streams (`bool`, *optional*, defaults to `False`):
            Whether per-reward gradients are.
        one_by_one (`bool`, *optional*, defaults to `False`):
            Whether each reward has a backward pass of its own.
    """

    settings: Mapping[str, Any] = field(default_factory=dict)
    sampled: bool = False
    streams: bool = False
    one_by_one: bool = False

    @property
    def has_rows(self) -> bool:
        """Whether each reward has a gradient of its own."""
        return self.settings.get("multi_objective_aggregation") != "sum_then_normalize"


SUM = {"multi_objective_aggregation": "sum_then_normalize"}
AWM = {"policy_loss": "awm", "old_policy_preset": 3}
ON_POLICY = {"old_policy_preset": 0}


def _variants(name: str, settings: Mapping[str, Any]) -> dict[str, Mode]:
    return {
        f"{name}_sampled": Mode(settings, sampled=True),
        f"{name}_on_policy": Mode({**settings, **ON_POLICY}),
        f"{name}_on_policy_sampled": Mode({**settings, **ON_POLICY}, sampled=True),
    }


MODES = {
    "single": Mode(SUM),
    "weighted_sum": Mode(SUM),
    "naive": Mode(one_by_one=True),
    "exact": Mode(),
    "streaming": Mode(streams=True),
    "every_10": Mode({"balance_every": 10}),
    **_variants("weighted_sum", SUM),
    **_variants("exact", {}),
    "awm": Mode(AWM),
    **_variants("awm", AWM),
}
COMPILED = {f"{name}_compiled": MODES[name] for name in ("weighted_sum", "exact")}
# The step whose place in the schedule of the old policy is measured.
LATE_STEP = 500

# The penalties from a quarter of the forward passes.
REGULARIZER_FRACTION = 0.25
# What `--paper_passes` counts, in addition to defaults that are the paper's: 25 solver steps, 24 of them trained, no
# guidance.
RECOMMENDED: dict[str, Any] = {
    "num_inference_steps": 10,
    "old_policy_preset": 0,
    "regularizer_fraction": REGULARIZER_FRACTION,
}
PAPER_MODES: dict[str, dict[str, Any]] = {
    "weighted_sum": {**SUM, "beta": 1e-4, "old_policy_preset": 1, "regularizer_fraction": 1.0},
    "exact_nft": RECOMMENDED,
    # On-policy, and with its trust region around a moving average.
    "exact_awm": {**RECOMMENDED, **AWM},
}
PAPER_REWARDS = 5
# Two prompts with four images each, in four micro-batches. The first step is on-policy whatever the settings.
PAPER_BATCH: dict[str, Any] = {
    "num_generations": 4,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
}
PAPER_STEPS = 2


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", type=int, nargs="+", default=[5], metavar="K")
    parser.add_argument("--model", choices=(*SIZES, "shapeworld"), default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--modes",
        nargs="+",
        choices=list(MODES),
        default=list(MODES),
        metavar="MODE",
        help=f"of {', '.join(MODES)}; default: all",
    )
    parser.add_argument("--balance_on", choices=("loss", "advantage"), default="advantage")
    parser.add_argument(
        "--beta",
        type=float,
        default=MarbleConfig.beta,
        help="Penalty on the distance to the base model; default: %(default)s",
    )
    parser.add_argument("--prompts", type=int, default=2, help="Prompts in a step.")
    parser.add_argument("--num_generations", type=int, default=8, help="Images of each prompt.")
    parser.add_argument("--batch_size", type=int, default=8, help="Images in a forward pass.")
    parser.add_argument("--num_inference_steps", type=int, default=8)
    parser.add_argument("--timestep_fraction", type=float, default=0.25)
    parser.add_argument("--balance_fraction", type=float, default=0.125, help="Of the mode `streaming`.")
    parser.add_argument("--regularizer_fraction", type=float, default=REGULARIZER_FRACTION, help="Of `..._sampled`.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None, help="Default: on a GPU only.")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--torch_compile", action="store_true", help="Measure two modes with compiled blocks too.")
    parser.add_argument("--paper_passes", action="store_true", help="Count passes at the paper's settings.")
    parser.add_argument("--json", type=Path, help="Write the table here too.")
    return parser.parse_args(words)


# --------------------------------------------------------------------------------------------------------------------
# One optimizer step in each mode
# --------------------------------------------------------------------------------------------------------------------


def make_rewards(count: int) -> list[Callable[..., list[float | None]]]:
    """Rewards without cost; every second one applies to every second prompt only."""

    def make(k: int) -> Callable[..., list[float | None]]:
        def reward(images: list, number: list[int], **kwargs) -> list[float | None]:
            values = torch.rand(len(images), generator=torch.Generator().manual_seed(k)).tolist()
            return [None if k % 2 and n % 2 else v for n, v in zip(number, values, strict=True)]

        reward.__name__ = f"reward_{k}"
        return reward

    return [make(k) for k in range(count)]


class Bench:
    """A trainer that takes single steps, each in a given mode."""

    def __init__(self, args: argparse.Namespace, num_rewards: int, folder: str, compiled: bool = False) -> None:
        self.device = torch.device(args.device)
        self.fractions = {
            "balance_fraction": args.balance_fraction,
            "regularizer_fraction": args.regularizer_fraction,
        }
        bf16 = self.device.type == "cuda" if args.bf16 is None else args.bf16
        size = args.prompts * args.num_generations
        config = MarbleConfig(
            folder,
            per_device_train_batch_size=args.batch_size,
            gradient_accumulation_steps=size // args.batch_size,
            num_generations=args.num_generations,
            rollout_batch_size=args.batch_size,
            num_inference_steps=args.num_inference_steps,
            timestep_fraction=args.timestep_fraction,
            balance_on=args.balance_on,
            beta=args.beta,
            old_policy_preset=1,  # of modes that do not say otherwise
            bf16=bf16,
            activation_checkpointing=args.activation_checkpointing,
            torch_compile=compiled,
            use_cpu=self.device.type == "cpu",
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            log_images=False,
        )
        dtype = torch.bfloat16 if bf16 else torch.float32
        if args.model == "shapeworld":
            every = load_prompts("train")
            prompts = every.select(range(0, len(every), len(every) // args.prompts)).select(range(args.prompts))
            pipeline, rewards = load_pipeline().to(dtype), reward_funcs()[:num_rewards]
        else:
            numbers = range(args.prompts)
            prompts = Dataset.from_dict({"prompt": [f"prompt {n}" for n in numbers], "number": numbers})
            pipeline, rewards = random_pipeline(args.model, dtype, self.device), make_rewards(num_rewards)
        self.trainer = MarbleNFTTrainer(pipeline, rewards, config, prompts)
        self.trainer.create_optimizer()
        self.rows = [n // args.num_generations for n in range(size)]
        self.generation = 0
        # The policy differs from the old one, as at almost every step.
        self.first_weights = {name: value.clone() for name, value in self.trainer.weights.old.state_dict().items()}
        for parameter in self.trainer.weights.parameters:
            torch.nn.init.normal_(parameter, std=0.02)
        settings = {name for mode in MODES.values() for name in mode.settings}
        self.settings = {name: getattr(config, name) for name in settings}

    def sample(self) -> None:
        """The rollout of one generation batch."""
        self.trainer._batch = self.trainer._sample(self.rows, self.generation)
        self.generation += 1

    def update(self, solves: bool) -> None:
        """Gradients and optimizer, on the latest generation batch."""
        trainer, update, batch = self.trainer, self.trainer.update, self.trainer._batch
        positions = [trainer.layout.locate(number) for number in range(trainer.args.gradient_accumulation_steps)]
        update.begin(0 if solves else 1, batch, positions[0])
        for position in positions:
            update.accumulate(batch, position)
        update.finish()
        torch.nn.utils.clip_grad_norm_(trainer.weights.parameters, 1.0)
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()
        update.commit()
        self._let_old_follow()

    def _let_old_follow(self) -> None:
        preset = OLD_POLICY_PRESETS[self.trainer.args.old_policy_preset]
        self.trainer.weights.old.lerp_(old_policy_decay(LATE_STEP, *preset))

    def switch(self, mode: Mode) -> None:
        """Switch the trainer to another mode."""
        trainer, args = self.trainer, self.trainer.args
        for name, value in {**self.settings, **mode.settings}.items():
            setattr(args, name, value)
        args.balance_fraction = self.fractions["balance_fraction"] if mode.streams else 1.0
        args.regularizer_fraction = self.fractions["regularizer_fraction"] if mode.sampled else 1.0
        trainer.weights.old.load_state_dict(self.first_weights)
        self._let_old_follow()
        trainer.schedule.balance_every = args.balance_every
        trainer.policy_loss = construction.build_policy_loss(args)
        shared = trainer.accelerator, trainer.metrics
        trainer.rollouts = construction.build_source(
            trainer.sampler, trainer.scorer, trainer.train_dataset, trainer.edits, *shared, args
        )
        trainer.update = construction.build_update(
            trainer.weights,
            trainer.policy_loss,
            trainer.schedule,
            None,
            trainer.scorer.names,
            trainer.layout,
            trainer.edits,
            *shared,
            trainer.progress,
            trainer.times,
            args,
        )
        if mode.one_by_one:
            trainer.update.gradient.linears = None

    def timed(self, function: Callable[[], None]) -> float:
        """Seconds that a function takes: of CPU time, or on a GPU on the clock."""
        gc.collect()
        start = self._seconds()
        function()
        return self._seconds() - start

    def _seconds(self) -> float:
        if self.device.type == "cpu":
            return time.process_time()
        torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def peak_memory(self, function: Callable[[], None]) -> int:
        """Peak of existing tensors, in bytes, while the function runs."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            function()
            return torch.cuda.max_memory_allocated(self.device)
        tensors = [*self.trainer.pipeline.transformer.parameters(), *self.trainer.pipeline.vae.parameters()]
        for shadow in (self.trainer.weights.old, self.trainer.weights.averaged):
            tensors.extend(shadow.state_dict().values())
        for state in self.trainer.optimizer.state.values():
            tensors.extend(value for value in state.values() if torch.is_tensor(value))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            function()
        events = recorded.profiler.kineto_results.events()
        changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
        live = peak = 0
        for _, change in changes:
            live += change
            peak = max(peak, live)
        return peak + sum(tensor.nbytes for tensor in tensors)


# --------------------------------------------------------------------------------------------------------------------
# All modes in turns
# --------------------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace, num_rewards: int, console: Console) -> dict[str, dict[str, object]]:
    """Measure all modes with one number of rewards."""
    seconds: dict[str, list[float]] = {mode: [] for mode in args.modes}
    rollouts: dict[Bench, list[float]] = {}
    memory: dict[str, int] = {}
    counts: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as folder, console.status(f"K = {num_rewards}") as status:
        several = Bench(args, num_rewards, folder)
        benches = dict.fromkeys(args.modes, several)
        if "single" in args.modes:
            benches["single"] = Bench(args, 1, folder)
        if args.torch_compile:
            benches |= dict.fromkeys(COMPILED, Bench(args, num_rewards, folder, compiled=True))
        modes = MODES | COMPILED

        batches = {}  # the aggregation of rewards is part of the batch, so every mode has its own
        for mode in args.modes:
            status.update(f"K = {num_rewards}, warming up: {mode}")
            bench = benches[mode]
            bench.switch(modes[mode])
            bench.sample()
            bench.update(solves=True)  # there are weights from here on
            batches[mode] = bench.trainer._batch
            update = partial(bench.update, solves=mode != "every_10")
            with count_passes(bench.trainer.flow.transformer) as passes:
                update()
            counts[mode] = {"forwards": passes.forwards, "backwards": passes.backwards}
            memory[mode] = bench.peak_memory(update)

        for repeat in range(args.repeats):
            for bench in dict.fromkeys(benches.values()):
                rollouts.setdefault(bench, []).append(bench.timed(bench.sample))
            # Forward and backward, so that no mode always follows the same other one.
            for mode in args.modes if repeat % 2 else reversed(args.modes):
                status.update(f"K = {num_rewards}, repeat {repeat}: {mode}")
                bench = benches[mode]
                bench.switch(modes[mode])
                bench.trainer._batch = batches[mode]
                seconds[mode].append(bench.timed(partial(bench.update, solves=mode != "every_10")))

    if "every_10" in args.modes:
        seconds["every_10"] = [
            0.9 * mixes + 0.1 * solves for mixes, solves in zip(seconds["every_10"], seconds["exact"], strict=True)
        ]
        memory["every_10"] = max(memory["every_10"], memory["exact"])
        counts["every_10"] = {k: 0.9 * n + 0.1 * counts["exact"][k] for k, n in counts["every_10"].items()}
    sampling = {mode: median(rollouts[benches[mode]]) for mode in args.modes}
    buffer = sum(parameter.numel() for parameter in several.trainer.weights.parameters) * 4
    results: dict[str, dict[str, object]] = {}
    for mode in args.modes:
        base = seconds["weighted_sum"]
        update = [own / sums for own, sums in zip(seconds[mode], base, strict=True)]
        loop = [
            (sampling[mode] + own) / (sampling["weighted_sum"] + sums)
            for own, sums in zip(seconds[mode], base, strict=True)
        ]
        results[mode] = {
            "update_ratio": median(update),
            "update_range": [min(update), max(update)],
            "loop_ratio": median(loop),
            "loop_range": [min(loop), max(loop)],
            "memory_ratio": memory[mode] / memory["weighted_sum"],
            "memory_less_rows_ratio": (memory[mode] - num_rewards * buffer * modes[mode].has_rows)
            / memory["weighted_sum"],
            "memory_bytes": memory[mode],
            "update_seconds": median(seconds[mode]),
            "sampling_seconds": sampling[mode],
            **counts[mode],
        }
    updates = sampling["weighted_sum"] / median(seconds["weighted_sum"])
    console.print(f"One gradient buffer has {buffer / 2**20:.1f} MiB; sampling takes {updates:.2f} updates.")
    return results


# --------------------------------------------------------------------------------------------------------------------
# Passes at the paper's settings
# --------------------------------------------------------------------------------------------------------------------


def paper_passes(settings: Mapping[str, Any]) -> tuple[float, float]:
    """Forward and backward passes for each image of a step, counted in a training of a tiny model."""
    pipeline = random_pipeline("tiny", torch.float32)
    counted = StepCosts()
    with tempfile.TemporaryDirectory() as folder:
        config = MarbleConfig(
            folder,
            **PAPER_BATCH,
            **settings,
            max_steps=PAPER_STEPS,
            use_cpu=True,
            disable_tqdm=True,
            report_to="none",
            save_strategy="no",
            log_images=False,
        )
        prompts = Dataset.from_dict({"prompt": ["prompt 0", "prompt 1"], "number": [0, 1]})
        rewards = make_rewards(PAPER_REWARDS)
        MarbleNFTTrainer(pipeline, rewards, config, prompts, callbacks=[counted]).train()
    cost, images = counted.steps[PAPER_STEPS], config.generation_batch_size
    return cost.forwards / images, cost.backwards / images


def count_at_papers_settings(console: Console) -> dict[str, float]:
    """The passes of all of `PAPER_MODES`, each counted as 1."""
    counted = {name: paper_passes(settings) for name, settings in PAPER_MODES.items()}
    table = Table(title="Passes of the transformer for each image, at the paper's settings")
    for column in ("", "forward", "backward", "together", "ratio", "ratio, backward as two"):
        table.add_column(column, justify="right" if column else "left")
    base_forward, base_backward = counted["weighted_sum"]
    for name, (forward, backward) in counted.items():
        ratios = [(forward + n * backward) / (base_forward + n * base_backward) for n in (1, 2)]
        numbers = [f"{number:g}" for number in (forward, backward, forward + backward)]
        table.add_row(name, *numbers, *(f"{ratio:.3f}" for ratio in ratios))
    console.print(table)
    return {name: forward + backward for name, (forward, backward) in counted.items()}


def describe_machine(device: str) -> str:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "CPU"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    args = parse_args()
    console = Console(width=140)
    if args.paper_passes:
        write_json(args.json, {"paper_passes": count_at_papers_settings(console)})
        return
    if "weighted_sum" not in args.modes:
        raise SystemExit("--modes needs weighted_sum: all ratios are to it")
    if "every_10" in args.modes and "exact" not in args.modes:
        raise SystemExit("--modes with every_10 needs exact: one step in ten is one")
    if args.model == "shapeworld" and max(args.rewards) > 5:
        raise SystemExit("--model shapeworld has five rewards")
    if args.beta == 0 and (named := [name for name in args.modes if MODES[name].sampled]):
        raise SystemExit(f"--beta 0 leaves no penalty to take from a part of a step; leave out {', '.join(named)}")
    if args.torch_compile:
        args.modes += COMPILED
    console.print(f"{args.model}, {describe_machine(args.device)}, balance_on={args.balance_on}, beta={args.beta}")
    report = {}
    for num_rewards in args.rewards:
        report[str(num_rewards)] = results = measure(args, num_rewards, console)
        table = Table(title=f"{num_rewards} rewards: ratio to weighted_sum, median (min to max of {args.repeats})")
        for column in ("mode", "update", "loop", "memory", "less rows", "MiB", "forwards", "backwards"):
            table.add_column(column, justify="left" if column == "mode" else "right", no_wrap=True)
        for mode, row in results.items():
            spans = [
                f"{row[f'{part}_ratio']:.2f} ({row[f'{part}_range'][0]:.2f}-{row[f'{part}_range'][1]:.2f})"
                for part in ("update", "loop")
            ]
            memory = [f"{row[f'memory{part}_ratio']:.3f}" for part in ("", "_less_rows")]
            sizes = [*memory, f"{row['memory_bytes'] / 2**20:.0f}"]
            table.add_row(mode, *spans, *sizes, f"{row['forwards']:g}", f"{row['backwards']:g}")
        console.print(table)
    write_json(args.json, report)


def write_json(path: Path | None, content: Mapping[str, Any]) -> None:
    """Write a report where one was asked for."""
    if path is not None:
        path.write_text(json.dumps(content, indent=2))


if __name__ == "__main__":
    main()
