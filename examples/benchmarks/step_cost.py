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
its cost is calculated from one measured step of each kind.

`update` is gradients and optimizer. `loop` is sampling, scoring and update; sampling and scoring are the same in all
modes, so their median is counted in each. Memory is the peak of existing tensors during
the update, with the weights. Forward and backward passes of the transformer are counted in one update.
"""

import argparse
import gc
import json
import platform
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import torch
from datasets import Dataset
from random_models import SIZES, random_pipeline
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.selftest.passes import count_passes
from trl_marble.shapeworld import load_pipeline, load_prompts, reward_funcs
from trl_marble.trainer import construction


MODES = ("single", "weighted_sum", "naive", "exact", "streaming", "every_10")
COMPILED = ("weighted_sum_compiled", "exact_compiled")


def parse_args(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rewards", type=int, nargs="+", default=[5], metavar="K")
    parser.add_argument("--model", choices=(*SIZES, "shapeworld"), default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--balance_on", choices=("loss", "advantage"), default="advantage")
    parser.add_argument("--beta", type=float, default=0.0, help="Penalty on the distance to the base model.")
    parser.add_argument("--prompts", type=int, default=2, help="Prompts in a step.")
    parser.add_argument("--num_generations", type=int, default=8, help="Images of each prompt.")
    parser.add_argument("--batch_size", type=int, default=8, help="Images in a forward pass.")
    parser.add_argument("--num_inference_steps", type=int, default=8)
    parser.add_argument("--timestep_fraction", type=float, default=0.25)
    parser.add_argument("--balance_fraction", type=float, default=0.125, help="Of the mode `streaming`.")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=None, help="Default: on a GPU only.")
    parser.add_argument("--activation_checkpointing", action="store_true")
    parser.add_argument("--torch_compile", action="store_true", help="Measure two modes with compiled blocks too.")
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
        self.balance_fraction = args.balance_fraction
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
        for parameter in self.trainer.weights.parameters:
            torch.nn.init.normal_(parameter, std=0.02)

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

    def switch(self, mode: str) -> None:
        """Switch the trainer to another mode."""
        mode = mode.removesuffix("_compiled")
        trainer, args = self.trainer, self.trainer.args
        sums = mode in ("single", "weighted_sum")
        args.multi_objective_aggregation = "sum_then_normalize" if sums else "marble"
        args.balance_fraction = self.balance_fraction if mode == "streaming" else 1.0
        trainer.schedule.balance_every = 10 if mode == "every_10" else 1
        shared = trainer.accelerator, trainer.metrics
        trainer.rollouts = construction.build_source(
            trainer.sampler, trainer.scorer, trainer.train_dataset, trainer.edits, *shared, args
        )
        trainer.update = construction.build_update(
            trainer.weights,
            construction.build_policy_loss(args),
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
        if mode == "naive":
            trainer.update.gradient.linears = None

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def timed(self, function: Callable[[], None]) -> float:
        gc.collect()
        self.synchronize()
        start = time.perf_counter()
        function()
        self.synchronize()
        return time.perf_counter() - start

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

        batches = {}  # the aggregation of rewards is part of the batch, so every mode has its own
        for mode in args.modes:
            status.update(f"K = {num_rewards}, warming up: {mode}")
            bench = benches[mode]
            bench.switch(mode)
            bench.sample()
            bench.update(solves=True)  # there are weights from here on
            batches[mode] = bench.trainer._batch
            update = partial(bench.update, solves=mode != "every_10")
            with count_passes(bench.trainer.flow.transformer) as counts[mode]:
                update()
            memory[mode] = bench.peak_memory(update)

        for repeat in range(args.repeats):
            for bench in dict.fromkeys(benches.values()):
                rollouts.setdefault(bench, []).append(bench.timed(bench.sample))
            # Forward and backward, so that no mode always follows the same other one.
            for mode in args.modes if repeat % 2 else reversed(args.modes):
                status.update(f"K = {num_rewards}, repeat {repeat}: {mode}")
                bench = benches[mode]
                bench.switch(mode)
                bench.trainer._batch = batches[mode]
                seconds[mode].append(bench.timed(partial(bench.update, solves=mode != "every_10")))

    if "every_10" in args.modes:
        seconds["every_10"] = [
            0.9 * mixes + 0.1 * solves for mixes, solves in zip(seconds["every_10"], seconds["exact"], strict=True)
        ]
        memory["every_10"] = max(memory["every_10"], memory["exact"])
        counts["every_10"] = {k: 0.9 * n + 0.1 * counts["exact"][k] for k, n in counts["every_10"].items()}
    sampling = {mode: median(rollouts[benches[mode]]) for mode in args.modes}
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
            "memory_bytes": memory[mode],
            "update_seconds": median(seconds[mode]),
            "sampling_seconds": sampling[mode],
            **counts[mode],
        }
    size = sum(parameter.numel() for parameter in several.trainer.weights.parameters) * 4 / 2**20
    updates = sampling["weighted_sum"] / median(seconds["weighted_sum"])
    console.print(f"One gradient buffer has {size:.1f} MiB; sampling takes {updates:.2f} updates.")
    return results


def describe_machine(device: str) -> str:
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or "CPU"
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def main() -> None:
    args = parse_args()
    if "weighted_sum" not in args.modes:
        raise SystemExit("--modes needs weighted_sum: all ratios are to it")
    if "every_10" in args.modes and "exact" not in args.modes:
        raise SystemExit("--modes with every_10 needs exact: one step in ten is one")
    if args.model == "shapeworld" and max(args.rewards) > 5:
        raise SystemExit("--model shapeworld has five rewards")
    if args.torch_compile:
        args.modes += COMPILED
    console = Console(width=100)
    console.print(f"{args.model}, {describe_machine(args.device)}, balance_on={args.balance_on}, beta={args.beta}")
    report = {}
    for num_rewards in args.rewards:
        report[str(num_rewards)] = results = measure(args, num_rewards, console)
        table = Table(title=f"{num_rewards} rewards: ratio to weighted_sum, median (min to max of {args.repeats})")
        for column in ("mode", "update", "loop", "memory", "MiB", "forwards", "backwards"):
            table.add_column(column, justify="left" if column == "mode" else "right", no_wrap=True)
        for mode, row in results.items():
            spans = [
                f"{row[f'{part}_ratio']:.2f} ({row[f'{part}_range'][0]:.2f}-{row[f'{part}_range'][1]:.2f})"
                for part in ("update", "loop")
            ]
            sizes = [f"{row['memory_ratio']:.3f}", f"{row['memory_bytes'] / 2**20:.0f}"]
            table.add_row(mode, *spans, *sizes, f"{row['forwards']:g}", f"{row['backwards']:g}")
        console.print(table)
    if args.json:
        args.json.write_text(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
