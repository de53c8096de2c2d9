# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The compared methods: those of the main table, and the variants of the ablations.

The published code's way to mix advantages, and other Gram matrices, are not settings of the package; they are in
`experiments.py`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from trl_marble import MarbleConfig
from trl_marble.balance import mgda_weights
from trl_marble.shapeworld import reward_funcs

from .drift import DRIFT_CONTROLS
from .worlds import WORLDS


REWARDS = tuple(reward.__name__ for reward in reward_funcs())

# Rewards for some prompts and for all prompts alternate, so that the first K of them are a mixed set.
MIXED_ORDER = ("composition", "coverage", "reader", "centring", "calm")


# What all methods share, whatever their own settings, in the runs of 25 steps.
SHARED_SETTINGS: dict[str, Any] = {
    "lr_scheduler_type": "linear",
    "num_generations": 16,
    "per_device_train_batch_size": 256,
    "gradient_accumulation_steps": 1,
    "rollout_batch_size": 128,
    "num_inference_steps": 8,
    "timestep_fraction": 0.75,
    "old_policy_preset": 1,
    "beta": 0.0,
}


@dataclass(frozen=True)
class Method:
    """
    One way to train the pipeline.

    Args:
        label (`str`):
            Its name in tables and pictures.
        stages (`tuple[tuple[str, ...], ...]`, *optional*, defaults to one stage with all rewards):
            The rewards of each stage. Each stage starts from the adapter of the previous one, and all share the steps
            of a run. Without a stage nothing is trained.
        settings (`Mapping[str, Any]`, *optional*, defaults to none):
            Settings of `MarbleConfig`, in addition to those that all methods share.
        weighting (`str`, *optional*, defaults to `"mgda"`):
            `"mgda"`, `"floor"` (MGDA with `FLOOR`) or a name of `TORCHJD`.
        experiment (`str`, *optional*):
            A name of `EXPERIMENTS`. Defaults to none.
        tuned_as (`str`, *optional*):
            The method whose learning rate is used. By default it is tuned itself.
        beside (`str`, *optional*):
            The method that an ablation compares it with. Defaults to `tuned_as`.
        drift (`tuple[str, float]`, *optional*):
            A name of `DRIFT_CONTROLS` and its strength. Defaults to none.
        costs_as (`str`, *optional*):
            A run has as many steps as cost what a run of this method costs. By default all have equally many.
        beta_unit (`float`, *optional*, defaults to `1.0`):
            The first coefficient of a KL that is held, in that of DiffusionNFT's loss.
        kl_unit (`float`, *optional*, defaults to `1.0`):
            The KL that the loss logs and holds, in the mean of (v - v_base)^2.
        composite (`str`, *optional*):
            A name of `COMPOSITES`: several trainings, whose settings are for the specialists among them. Defaults to
            none.
        final_kl (`float`, *optional*):
            The KL that the result is scaled to.
        every_layer (`bool`, *optional*, defaults to `False`):
            Whether all linear layers of the transformer have an adapter, not only those of attention.
    """

    label: str
    stages: tuple[tuple[str, ...], ...] = (REWARDS,)
    settings: Mapping[str, Any] = field(default_factory=dict)
    weighting: str = "mgda"
    experiment: str | None = None
    tuned_as: str | None = None
    beside: str | None = None
    drift: tuple[str, float] | None = None
    costs_as: str | None = None
    beta_unit: float = 1.0
    kl_unit: float = 1.0
    composite: str | None = None
    final_kl: float | None = None
    every_layer: bool = False

    @property
    def rewards(self) -> tuple[str, ...]:
        """All rewards that any stage trains on, in the order of `REWARDS`."""
        trained = {name for stage in self.stages for name in stage}
        return tuple(name for name in REWARDS if name in trained)

    @property
    def opponent(self) -> str | None:
        """The method that an ablation compares it with, per seed; `None` for a method of the main table."""
        return self.beside or self.tuned_as


BASE = "base"
WEIGHTED_SUM: dict[str, Any] = {"multi_objective_aggregation": "sum_then_normalize"}
# Advantages are normalized per group, as in its paper (docs/papers.md).
GDPO: dict[str, Any] = {"multi_objective_aggregation": "normalize_then_sum", "scale_rewards": "group"}
# As GDPO, with weights that are found.
PROGRESS: dict[str, Any] = {"multi_objective_aggregation": "progress", "scale_rewards": "group"}
# With the code published with MARBLE, between two solves the advantages are mixed by the smoothed alpha.
REFERENCE: dict[str, Any] = {"balance_every": 10, "balance_on": "loss"}

SPECIALISTS = {name: f"specialist_{name}" for name in REWARDS}

METHODS: dict[str, Method] = {
    BASE: Method("not trained", stages=()),
    # With one reward all aggregations are equal; the weighted sum needs one backward pass less.
    **{key: Method(f"{name} alone", ((name,),), WEIGHTED_SUM) for name, key in SPECIALISTS.items()},
    "weighted_sum": Method("weighted sum", settings=WEIGHTED_SUM),
    "gdpo": Method("GDPO", settings=GDPO),
    "equal": Method("equal alpha", settings={"multi_objective_aggregation": "equal"}),
    "sequential": Method("one after the other", tuple((name,) for name in REWARDS), WEIGHTED_SUM),
    "marble": Method("MARBLE, N = 1"),
    "marble_10": Method("MARBLE, N = 10", settings={"balance_every": 10}),
    "marble_reference": Method("MARBLE, published code", settings=REFERENCE, experiment="published_amortization"),
}


def _ema(decay: float) -> Method:
    # With N = 1 the moving average is not used, so its decay matters with N = 10.
    settings = {"balance_every": 10, "balance_ema": decay}
    return Method(f"MARBLE, N = 10, rho = {decay:g}", settings=settings, tuned_as="marble_10")


def _few_rewards(count: int) -> dict[str, Method]:
    stages, sum_key = (MIXED_ORDER[:count],), f"sum_{count}_rewards"
    return {
        f"marble_{count}_rewards": Method(f"MARBLE, K = {count}", stages, tuned_as="marble", beside=sum_key),
        sum_key: Method(f"weighted sum, K = {count}", stages, WEIGHTED_SUM, tuned_as="weighted_sum"),
    }


# One forward pass of a step: all of its images, each at one of its timesteps.
FORWARD_PASSES = round(SHARED_SETTINGS["num_inference_steps"] * SHARED_SETTINGS["timestep_fraction"])
MICRO_BATCH = 32  # images; the published code had 9 on each GPU
MICRO_BATCHES = SHARED_SETTINGS["per_device_train_batch_size"] // MICRO_BATCH

# Groups of variants. Each changes one thing of a method of `METHODS`.
ABLATIONS: dict[str, dict[str, Method]] = {
    # The main table has 0.7.
    "Smoothing of alpha": {f"ema_{round(100 * rho):02d}": _ema(rho) for rho in (0.0, 0.1, 0.3, 0.5, 0.9)},
    "What is balanced": {
        "on_loss": Method("MARBLE, N = 1, whole losses", settings={"balance_on": "loss"}, tuned_as="marble"),
    },
    # A measurement on a part of a step takes effect in the next step, through the moving average.
    "What of the step the Gram matrix sees": {
        "gram_micro_batch": Method(
            f"one micro-batch of {MICRO_BATCH} images at one timestep",
            settings={
                "per_device_train_batch_size": MICRO_BATCH,
                "gradient_accumulation_steps": MICRO_BATCHES,
                "balance_fraction": 1 / (FORWARD_PASSES * MICRO_BATCHES),
            },
            tuned_as="marble",
        ),
    },
    "Weighting": {
        "upgrad": Method("UPGrad", weighting="upgrad", tuned_as="marble"),
        "cagrad": Method("CAGrad", weighting="cagrad", tuned_as="marble"),
        "nash_mtl": Method("Nash-MTL", weighting="nash_mtl", tuned_as="marble"),
        "floor": Method("MGDA, every alpha at least 0.1", weighting="floor", tuned_as="marble"),
    },
    "Gram matrix": {
        "raw_gram": Method("of the gradients as they are", experiment="raw_gram", tuned_as="marble"),
        "cross_gram": Method("between halves of the step", experiment="cross_gram", tuned_as="marble"),
        "optimizers_metric": Method("in AdamW's metric", experiment="optimizers_metric", tuned_as="marble"),
    },
    # In the main table GDPO scales per prompt group, MARBLE per batch.
    "Scale of the advantages": {
        "gdpo_batch": Method("GDPO, by the batch", settings={**GDPO, "scale_rewards": "batch"}, tuned_as="gdpo"),
        "marble_group": Method("MARBLE, N = 1, by the group", settings={"scale_rewards": "group"}, tuned_as="marble"),
    },
    "Number of rewards": {key: method for count in (2, 3, 4) for key, method in _few_rewards(count).items()},
}
VARIANTS = {key: method for group in ABLATIONS.values() for key, method in group.items()}

FLOOR = 0.1  # half of an equal weight

# The weightings of TorchJD, and the packages that they need.
TORCHJD: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "upgrad": ("UPGradWeighting", {}, ("torchjd", "qpsolvers")),
    "cagrad": ("CAGradWeighting", {"c": 0.5}, ("torchjd", "cvxpy")),
    "nash_mtl": ("NashMTL", {}, ("torchjd", "cvxpy", "ecos")),
}


# How far a policy drifts, more than how it balances, decides where a long run ends: every method is run at several
# strengths of the KL to the base.
DRIFT_BETAS = {"target": 0.5, "move": 0.1}
LONG_BASES: dict[str, Method] = {
    "weighted_sum": METHODS["weighted_sum"],
    "gdpo": METHODS["gdpo"],
    "equal": METHODS["equal"],
    "marble": METHODS["marble"],
    "progress": Method("weights by progress", settings=PROGRESS),
    "progress_cold": Method(
        "weights by progress, temperature 0.05", settings={**PROGRESS, "progress_temperature": 0.05}
    ),
    "progress_sum": Method("weights by progress, one sum", settings=PROGRESS, experiment="progress_of_sums"),
    "marble_progress": Method("MARBLE times progress", experiment="progress_times_marble"),
    # As a user has it who has not tuned the scale of one reward.
    **{
        f"weighted_sum_x{factor}": Method(
            f"weighted sum, calm x {factor}", settings={**WEIGHTED_SUM, "reward_weights": [1, 1, 1, 1, float(factor)]}
        )
        for factor in ("0.1", "0.33", "3", "10")
    },
    **{key: METHODS[key] for key in SPECIALISTS.values()},
}


# The method that is recommended, and its strength.
RECIPE = "progress@0.2"
RECIPE_METHOD, _, RECIPE_STRENGTH = RECIPE.partition("@")


# ---- Ways to make and use samples: one setting each, and some of them together ----

# In the order in which a tie is decided, the simplest first.
SAMPLES: dict[str, tuple[str, dict[str, Any]]] = {
    "solver4": ("4 solver steps, trained at 3", {"num_inference_steps": 4, "timestep_fraction": 0.75}),
    "times2": ("trained at 2 of 5 timesteps", {"timestep_fraction": 0.4}),
    "times5": ("trained at all of 5 timesteps", {"timestep_fraction": 1.0}),
    "solver8": ("8 solver steps, trained at 6", {"num_inference_steps": 8, "timestep_fraction": 0.75}),
    "group4": ("4 images of each prompt, twice the prompts", {"num_generations": 4}),
    "group16": ("16 images of each prompt, half the prompts", {"num_generations": 16}),
    "images64": ("64 images a step", {"per_device_train_batch_size": 64}),
    "images32": ("32 images a step", {"per_device_train_batch_size": 32}),
    "split2": (
        "two optimizer steps of 64 images from each generation batch",
        {"per_device_train_batch_size": 64, "steps_per_generation": 2},
    ),
    "twice": ("each generation batch trains two optimizer steps", {"num_iterations": 2}),
    "images64_kl4": (
        "64 images a step, the KL in 1 of 4 forward passes",
        {"per_device_train_batch_size": 64, "regularizer_fraction": 0.25},
    ),
    "images64_group4": (
        "64 images a step, 4 of each prompt",
        {"per_device_train_batch_size": 64, "num_generations": 4},
    ),
    "images64_times2": (
        "64 images a step, trained at 2 of 5 timesteps",
        {"per_device_train_batch_size": 64, "timestep_fraction": 0.4},
    ),
    "images64_solver4": (
        "64 images a step, 4 solver steps, trained at 3",
        {"per_device_train_batch_size": 64, "num_inference_steps": 4, "timestep_fraction": 0.75},
    ),
}
SAMPLE_ENTRIES = (RECIPE, *(f"{RECIPE_METHOD}_{name}@{RECIPE_STRENGTH}" for name in SAMPLES))
# These are run with twice the learning rate too.
FAST_ENTRIES = (RECIPE, f"{RECIPE_METHOD}_images64@{RECIPE_STRENGTH}")

# Of these, what the demo has.
DEMO_SAMPLES = "images64_kl4"

# Of the policy that samples. In the demo it is the trained one, preset 0.
OLD_POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "preset1": ("a policy that lags more and more samples (DiffusionNFT)", {"old_policy_preset": 1}),
    "preset2": ("a policy that lags from step 75 on samples", {"old_policy_preset": 2}),
}


def _vary(
    method: str, variants: Mapping[str, tuple[str, dict[str, Any]]], costs_as: str | None = None
) -> dict[str, Method]:
    """`<method>_<variant>` for each variant."""
    base = LONG_BASES[method]
    return {
        f"{method}_{name}": replace(
            base,
            label=f"{base.label}, {what}",
            settings={**base.settings, **settings},
            costs_as=costs_as,
        )
        for name, (what, settings) in variants.items()
    }


LONG_BASES["awm"] = replace(
    LONG_BASES[RECIPE_METHOD],
    label=f"{LONG_BASES[RECIPE_METHOD].label}, AWM",
    settings={**LONG_BASES[RECIPE_METHOD].settings, "policy_loss": "awm"},
)
LONG_BASES |= _vary(RECIPE_METHOD, SAMPLES, costs_as=RECIPE)
# With the demo's samples: `progress_demo` is the demo.
for _name in (RECIPE_METHOD, "gdpo", "marble", "awm"):
    LONG_BASES |= _vary(_name, {"demo": ("the demo's samples", SAMPLES[DEMO_SAMPLES][1])})

# ---- Losses: `gdpo_awm` is the demo's settings with GDPO and AWM, see `compare_losses.py` ----

# Name -> label, settings, and the units of the KL (see `Method`). All sample from the trained policy, but the last.
# The units of beta are ratios of gradient norms over the first six steps, without a KL; that of GRPO's KL a ratio of
# what it logs to what evaluations measure. With 1000 for `gdro_beta`, and 5000 for `dpo_beta`, its default, the policy
# hardly moved in the tuning (docs/evidence/losses.md): the higher they are, the nearer the optimum is to the base.
LOSSES: dict[str, tuple[str, dict[str, Any], float, float]] = {
    "nft": ("DiffusionNFT", {}, 1.0, 1.0),
    "awm": ("AWM", {"policy_loss": "awm"}, 0.2, 1.0),
    "crd": ("CRD", {"policy_loss": "crd"}, 1.4, 1.0),
    "dgpo": ("DGPO", {"policy_loss": "dgpo"}, 0.35, 1.0),
    "gdro": ("GDRO", {"policy_loss": "gdro", "gdro_beta": 30.0}, 240.0, 1.0),
    "dpo": ("pairs", {"policy_loss": "dpo", "dpo_beta": 100.0}, 80.0, 1.0),
    "grpo": (
        "GRPO",
        {"policy_loss": "grpo", "timestep_fraction": MarbleConfig.timestep_fraction},  # which it does not use
        1.7,
        0.014,
    ),
    "crd_published": (
        "CRD, its old policy and sampling policy",
        {"policy_loss": "crd", "old_policy_preset": 4, "sampling_policy_preset": 2},
        1.4,
        1.0,
    ),
}
# Of both ways to combine rewards, the first is the one that learning rates are chosen with.
LOSS_AGGREGATIONS = ("gdpo", "marble")
LOSS_KL = 0.03  # aimed at in all runs: about what the demo's recipe has after as many steps
_FIRST_LOSS = f"{LOSS_AGGREGATIONS[0]}_demo@target{LOSS_KL:g}"  # has the cost that all others have
for _name in LOSS_AGGREGATIONS:
    LONG_BASES |= {
        f"{_name}_{_loss}": replace(
            LONG_BASES[f"{_name}_demo"],
            label=f"{_label}, {LONG_BASES[_name].label}",
            settings={**LONG_BASES[f"{_name}_demo"].settings, "old_policy_preset": 0, **_settings},
            costs_as=_FIRST_LOSS,
            beta_unit=_beta,
            kl_unit=_kl,
        )
        for _loss, (_label, _settings, _beta, _kl) in LOSSES.items()
    }


def loss_entry(aggregation: str, loss: str) -> str:
    """The entry of a loss with a way to combine rewards."""
    return f"{aggregation}_{loss}@target{LOSS_KL:g}"


# MARBLE has per-reward gradients, and so held-out cosines.
for _name in (f"{RECIPE_METHOD}_demo", "marble_demo"):
    LONG_BASES |= _vary(_name, OLD_POLICIES)


def long_method(name: str) -> Method:
    """
    A method of long runs: `<method>@<strength>`, such as `marble@0.1`.

    The strength is the `beta` of the KL, or another way to limit the drift and its strength: `lag` (`beta`, with the
    paper's old policy, which lags behind), `average` (`beta`, with weights averaged over about 50 steps), `target` (a
    `kl_target`, such as `target0.05`), or one of `DRIFT_CONTROLS`.
    """
    base, _, strength = name.partition("@")
    method = LONG_BASES[base]
    kind = strength.rstrip("0123456789.")
    if kind not in ("", "lag", "average", "target", *DRIFT_CONTROLS):
        raise ValueError(f"`{name}`: there is no way to limit the drift that is called `{kind}`.")
    value = float(strength.removeprefix(kind))
    settings: dict[str, Any] = {"regularizer_fraction": 1.0, **method.settings, "beta": DRIFT_BETAS.get(kind, value)}
    if not settings["beta"]:
        del settings["regularizer_fraction"]  # of what is not there
    if kind == "lag":
        settings["old_policy_preset"] = 1
    if kind == "average":
        settings["weight_ema_decay"] = 0.98
    if kind == "target":
        settings |= {"beta": DRIFT_BETAS[kind] * method.beta_unit, "kl_target": value * method.kl_unit}
    drift = (kind, value) if kind in DRIFT_CONTROLS else None
    return replace(method, label=f"{method.label}, {kind or 'beta'} {value:g}", settings=settings, drift=drift)


# At equal `beta` methods drift differently far. These are the strengths with which each ends near the recipe's KL, or
# with more and with less.
LONG_STRENGTHS = {
    "progress": ("0.2",),
    "progress_sum": ("0.1",),
    "weighted_sum": ("0.1", "0.2"),
    "gdpo": ("0.2", "0.4"),
    "marble": ("0.1",),
}
LONG_MAIN = tuple(f"{method}@{beta}" for method, strengths in LONG_STRENGTHS.items() for beta in strengths)
# With the first seed only: what each reward reaches alone, a reward's scale that is off, and no limit at all.
LONG_ONCE = (
    *(f"{method}@0.1" for method in SPECIALISTS.values()),
    # Which drift twice as far as the recipe with that.
    *(f"{SPECIALISTS[name]}@0.2" for name in ("centring", "calm")),
    *(f"{method}@0.1" for method in LONG_BASES if method.startswith("weighted_sum_x")),
    "progress@0.1",
    "equal@0.1",
    *(f"{method}@0" for method in ("progress", "weighted_sum", "gdpo", "marble")),
)
LONG_TUNING = (
    "weighted_sum@0.1",
    "marble@0.1",
    "progress@0.1",
    "progress@0.2",
    "weighted_sum@0.03",
    "weighted_sum@0.3",
    "weighted_sum@target0.06",
    "marble_progress@0.1",
    "progress_cold@0.1",
    "progress_sum@0.1",
    "weighted_sum@gate0.1",
    "weighted_sum@move0.05",
    "weighted_sum@norm0.3",
    "weighted_sum@lag0.1",
    "weighted_sum@average0.1",
)


# The demo's recipe, and what is run with another policy that samples, see `recipe_variants.py`.
DEMO_RECIPE = f"{RECIPE_METHOD}_demo@{RECIPE_STRENGTH}"


def _old_policies(method: str, strength: str) -> tuple[str, ...]:
    return tuple(f"{name}@{strength}" for name in (method, *(f"{method}_{variant}" for variant in OLD_POLICIES)))


OLD_POLICY_ENTRIES = _old_policies(f"{RECIPE_METHOD}_demo", RECIPE_STRENGTH)
OLD_POLICY_NO_KL = _old_policies(f"{RECIPE_METHOD}_demo", "0")
OLD_POLICY_COSINES = _old_policies("marble_demo", LONG_STRENGTHS["marble"][0])

# In units of AWM's loss: the gradient of its rewards' part is DiffusionNFT's divided by the clip of the advantages, 5,
# up to how they weight the matching error.
AWM_STRENGTH = f"{float(RECIPE_STRENGTH) / 5:g}"

# ---- Time to the same rewards: what is compared, and with what ----

EARLIER_DEMO = "demo_61ec878"
PAPER: dict[str, Any] = {**SHARED_SETTINGS, **REFERENCE, "beta": 1e-4, "regularizer_fraction": 1.0}
BASELINES: dict[str, Method] = {
    # Eight solver steps, six of them trained, 256 images, an old policy that lags, no KL, balanced at every step.
    EARLIER_DEMO: Method("the demo at 61ec878", settings=SHARED_SETTINGS),
    # New weights at every tenth step, from whole losses, and a KL of 1e-4 at each timestep; sizes as above.
    "paper": Method("MARBLE's paper", settings=PAPER),
}
TIMED_ENTRIES = (
    DEMO_RECIPE,
    f"gdpo_demo@{LONG_STRENGTHS['gdpo'][0]}",
    f"marble_demo@{LONG_STRENGTHS['marble'][0]}",
    f"awm_demo@{AWM_STRENGTH}",
)


# ---- Recipes: balance, distil or average? See `compare_recipes.py` ----

RECIPES_KL = 0.04  # of all results
FIRST_RECIPE = f"r_{RECIPE_METHOD}@target{RECIPES_KL:g}"  # what it costs is the budget of all
_DEMO = {**SAMPLES[DEMO_SAMPLES][1], "old_policy_preset": 0}


def _balanced(name: str, method: Method, settings: Mapping[str, Any] | None = None, every_layer: bool = True) -> None:
    LONG_BASES[name] = replace(
        method,
        settings={**method.settings, **_DEMO, **(settings or {})},
        tuned_as=None,
        costs_as=FIRST_RECIPE,
        final_kl=RECIPES_KL,
        every_layer=every_layer,
    )


_balanced("r_progress", replace(LONG_BASES[RECIPE_METHOD], label="weights by progress, temperature 0.15"))
_balanced(
    "r_attention",
    replace(LONG_BASES[RECIPE_METHOD], label="weights by progress, adapter on attention only"),
    every_layer=False,
)
# Closer to equal weights: the mean counts for more.
_EVEN = 0.3
_balanced(
    "r_even",
    replace(LONG_BASES[RECIPE_METHOD], label=f"weights by progress, temperature {_EVEN:g}"),
    {"progress_temperature": _EVEN},
)
_balanced("r_weighted_sum", METHODS["weighted_sum"])
_balanced("r_gdpo", METHODS["gdpo"])
_balanced("r_equal", replace(METHODS["equal"], label="equal weights of unit gradients"))
_balanced("r_marble", METHODS["marble"])
_balanced("r_marble_group", replace(VARIANTS["marble_group"], label="MARBLE, scaled by group"))
_balanced("r_marble_floor", replace(VARIANTS["floor"], label=f"MARBLE, every weight at least {FLOOR:g}"))
_balanced("r_upgrad", VARIANTS["upgrad"])
# Of the other losses CRD has the largest sum of mean and worst gain (docs/evidence/losses.md).
_balanced(
    "r_crd",
    replace(LONG_BASES[RECIPE_METHOD], label="weights by progress, CRD", beta_unit=LOSSES["crd"][2]),
    LOSSES["crd"][1],
)
_balanced(
    "r_published",
    replace(METHODS["marble_reference"], label="MARBLE as in its published code"),
    {"old_policy_preset": 1, "regularizer_fraction": 1.0},
)
for _name, _label in {
    "soup": "soup of specialists",
    "mapreduce": "MapReduce LoRA",
    "distilled": "DiffusionOPD",
    "distilled_balanced": "balanced distillation",
}.items():
    LONG_BASES[f"r_{_name}"] = Method(
        _label,
        settings={**WEIGHTED_SUM, **_DEMO},
        composite=_name,
        final_kl=RECIPES_KL,
        costs_as=FIRST_RECIPE,
        every_layer=True,
    )


for _world in WORLDS.values():
    for _name in _world.rewards:
        _balanced(f"r_alone_{_name}", Method(f"{_name} alone", ((_name,),), WEIGHTED_SUM))


def alone_entry(reward: str) -> str:
    """One reward alone, at the cost and the KL of the recipes."""
    return f"r_alone_{reward}@target{RECIPES_KL:g}"


RECIPE_ENTRIES = (
    FIRST_RECIPE,
    *(
        f"r_{name}@target{RECIPES_KL:g}"
        for name in (
            "weighted_sum",
            "gdpo",
            "equal",
            "marble",
            "marble_floor",
            "upgrad",
            "published",
            "crd",
            "even",
            "attention",
        )
    ),
)
COMPOSITE_ENTRIES = tuple(
    f"r_{name}@{beta:g}"
    for name in ("soup", "mapreduce", "distilled", "distilled_balanced")
    for beta in (0.05, 0.2)  # of the specialists
)


def find_method(name: str) -> Method:
    """The method or variant with this name."""
    if "@" in name:
        return long_method(name)
    return {**METHODS, **BASELINES, **VARIANTS}[name]


def missing_packages(method: Method) -> list[str]:
    """Packages that the method needs and that are not installed."""
    needed = TORCHJD[method.weighting][2] if method.weighting in TORCHJD else ()
    return [package for package in needed if find_spec(package) is None]


def make_weighting(method: Method) -> Callable[[Tensor], Tensor] | None:
    """The value for `MarbleNFTTrainer(weighting=...)`: `None` for MGDA, which it uses by itself."""
    if method.weighting == "floor":
        return partial(mgda_weights, floor=FLOOR)
    if method.weighting == "mgda":
        return None
    import torchjd.aggregation

    name, arguments, _ = TORCHJD[method.weighting]
    make = getattr(torchjd.aggregation, name)
    return _NashMTL(make) if method.weighting == "nash_mtl" else make(**arguments)


class _NashMTL:
    """
    Nash-MTL as a weighting of the Gram matrix. TorchJD's takes the gradients, of which it uses only inner products:
    any rows that have them will do. It starts from its last solution, so there is one for each number of gradients.
    """

    def __init__(self, make: Callable[..., Any]) -> None:
        self.make = make
        self.made: dict[int, Callable[[Tensor], Tensor]] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> "_NashMTL":
        """Its solvers cannot be copied: what is asked for the halves of a step starts from the beginning."""
        return _NashMTL(self.make)

    def __call__(self, gram: Tensor) -> Tensor:
        size = len(gram)
        if size not in self.made:
            self.made[size] = self.make(n_tasks=size).weighting
        values, vectors = torch.linalg.eigh(gram.double())
        return self.made[size](vectors * values.clamp(min=0).sqrt()).to(gram)
