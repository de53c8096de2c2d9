# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""`trl-marble estimate`: the passes are those that a trainer makes, the memory is the documented table."""

import re
from pathlib import Path

import pytest
import yaml
from trainer_helpers import PROMPTS, small_trainer

from trl_marble.cli.estimate import GPUS, read_settings
from trl_marble.cli.main import main
from trl_marble.cli.model_costs import find_costs
from trl_marble.cli.step_passes import compute_passes


SD35 = "stabilityai/stable-diffusion-3.5-medium"
SETTINGS = {"model": SD35, "prompts": ["ocr:8"], "rewards": ["pickscore", "ocr"], "bf16": True}
SIZE = {"height": 512, "width": 512}
SCALING = Path(__file__).parents[2] / "docs" / "scaling.md"


@pytest.fixture
def estimate(tmp_path, monkeypatch, capsys):
    """Run the command on settings; gives what it prints, and its errors."""
    monkeypatch.chdir(tmp_path)

    def run(*words, **settings):
        Path("run.yaml").write_text(yaml.safe_dump(SETTINGS | SIZE | settings))
        status = main(["estimate", "--config", "run.yaml", *words])
        shown = capsys.readouterr()
        return shown.out if status == 0 else shown.err

    return run


def test_the_papers_step_and_that_of_the_defaults(estimate):
    shown = estimate("--gpu", "h100", max_steps=100, beta=1e-4, old_policy_preset=1, regularizer_fraction=1.0)
    assert "1152 images (48 prompts x 24)" in shown
    # 25 solver steps, and 24 timesteps with three forward and two backward passes each. The first step is on-policy.
    assert 1152 * (25 + 24 * 4.9) < passes_in(shown) < 1152 * (25 + 24 * 5)
    # By default one forward and one backward pass, and one more of both at a quarter of the timesteps.
    assert passes_in(estimate("--gpu", "h100", max_steps=100)) == 1152 * (25 + 24 * 2.5)
    assert shown.count("minutes per step") == 1 and "hours in all" in shown and "not measured" in shown


def passes_in(shown: str) -> int:
    return int(re.search(r"Passes per step: ([\d,]+)", shown)[1].replace(",", ""))


def minutes_in(shown: str) -> float:
    return float(re.search(r"([\d.]+) minutes per step", shown)[1])


def test_more_processes_share_the_work_and_change_no_pass(estimate):
    one = estimate("--gpu", "h100", gradient_accumulation_steps=144)
    eight = estimate("--gpu", "h100", gradient_accumulation_steps=18, num_processes=8)
    assert passes_in(one) == passes_in(eight)
    assert minutes_in(eight) == pytest.approx(minutes_in(one) / 8, abs=0.06)
    # A process alone has no whole group of a prompt here.
    assert "48 images (2 prompts x 24)" in estimate(
        "--num_processes", "8", per_device_train_batch_size=2, gradient_accumulation_steps=3
    )


def test_options_of_train_override_the_file(estimate):
    assert "576 images" in estimate("--gradient_accumulation_steps", "72")
    assert "recomputed" in estimate("--activation_checkpointing", "True")


def test_every_known_gpu_is_shown_and_faster_ones_take_less(estimate):
    fits_all = {"offload_components": True, "rollout_batch_size": 4, "activation_checkpointing": True}
    shown = estimate(**fits_all)
    minutes = {name: float(re.search(rf"^{name} .* ([\d.]+) minutes", shown, re.MULTILINE)[1]) for name in GPUS}
    assert minutes["h100"] < minutes["a100"] < minutes["rtx4090"]
    half = minutes_in(estimate("--gpu", "a100", "--utilization", "0.6", **fits_all))
    assert half == pytest.approx(minutes["a100"] / 2, abs=0.1)


def test_measured_seconds_stand_for_an_assumption(estimate):
    settings = dict(multi_objective_aggregation="sum_then_normalize", beta=0.0, old_policy_preset=0, num_generations=2)
    settings |= dict(per_device_train_batch_size=2, gradient_accumulation_steps=1, num_inference_steps=4)
    shown = estimate("--seconds_per_pass", "6", model="somebody/model", timestep_fraction=1.0, **settings)
    assert passes_in(shown) == 2 * (4 + 4 + 4) and minutes_in(shown) == pytest.approx(2.4)
    assert "Peak memory" not in shown
    memory = re.search("Peak memory.*", estimate())[0]
    assert memory in estimate("--seconds_per_pass", "6")  # which it does not depend on
    assert "give `--seconds_per_pass`" in estimate(model="somebody/model", **settings)


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        (["--utilization", "30"], {}, "`--utilization` is 30.0; it must be in (0, 1]"),
        (["--seconds_per_pass", "0"], {}, "`--seconds_per_pass` is 0.0; it must be greater than 0"),
        (["--seconds_per_pass", "1", "--gpu", "h100"], {}, "leave one of them out"),
        (["--gpu", "voodoo2"], {}, "invalid choice: 'voodoo2'"),
        ([], {"num_generation": 8}, "did you mean"),
        ([], {"balance_ema": 2}, "a decay must be in [0, 1)"),
        ([], {"height": None}, "`height`"),
        ([], {"eval_strategy": "steps", "eval_steps": 10}, "`eval_strategy` needs `eval_prompts`"),
        ([], {"rewards": ["pikscore"]}, "Did you mean 'pickscore'?"),
        (["--num_processes", "0"], {}, "`num_processes` is 0; at least one process has to train"),
    ],
)
def test_mistakes_are_one_message(estimate, words, settings, message):
    error = estimate(*words, **settings)
    assert message in error and "Traceback" not in error


def test_a_size_that_only_the_pipeline_knows_is_asked_for(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text(yaml.safe_dump(SETTINGS))
    assert main(["estimate", "--config", "run.yaml"]) == 2
    assert "set `height` and `width`" in capsys.readouterr().err


# Name -> settings and prompts; on three optimizer steps of two rewards.
COUNTED = {
    "marble": {},
    "marble, on-policy": {"old_policy_preset": 0},
    "complete losses": {"balance_on": "loss"},
    "every second step": {"balance_every": 2},
    "streaming": {"balance_fraction": 0.5},
    "a part of the KL": {"regularizer_fraction": 0.5},
    "a part of the KL, on-policy": {"regularizer_fraction": 0.5, "old_policy_preset": 0},
    "no KL": {"beta": 0.0},
    "weighted sum": {"multi_objective_aggregation": "sum_then_normalize"},
    "progress": {"multi_objective_aggregation": "progress", "old_policy_preset": 0},
    "two steps per batch": {"steps_per_generation": 4, "old_policy_preset": 0, "num_generations": 4},
    "AWM": {"policy_loss": "awm", "old_policy_preset": 3},
    "GRPO": {"policy_loss": "grpo", "timestep_fraction": 0.99},
    "GRPO, two passes over a batch": {"policy_loss": "grpo", "timestep_fraction": 0.99, "num_iterations": 2},
    "CRD": {"policy_loss": "crd", "reference_guidance_scale": 4.0, "sampling_policy_preset": 2},
    "CRD, complete losses": {"policy_loss": "crd", "balance_on": "loss", "regularizer_fraction": 0.5},
    "DGPO": {"policy_loss": "dgpo", "old_policy_preset": 3, "beta": 0.0},
    "guidance": {"guidance_scale": 4.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COUNTED)
def test_the_passes_are_those_that_a_trainer_makes(name, tmp_path):
    settings = {"num_inference_steps": 4, "timestep_fraction": 0.5, "max_steps": 4, "gradient_accumulation_steps": 2}
    settings |= COUNTED[name]
    if settings.get("multi_objective_aggregation", "marble") == "marble":
        settings.setdefault("balance_every", 1)
    trainer = small_trainer(tmp_path, **settings)
    counted = {"forward": 0, "backward": 0}

    def count_backward(gradient):
        counted["backward"] += len(gradient)

    def count(module, inputs, output):
        counted["forward"] += len(output[0])
        if output[0].requires_grad:
            output[0].register_hook(count_backward)

    trainer.flow.transformer.register_forward_hook(count)
    trainer.train()
    passes = compute_passes(trainer.args, 1, True, num_rewards=2, num_prompts=len(PROMPTS))
    assert counted == {"forward": round(4 * passes.forward), "backward": round(4 * passes.backward)}


ROWS = {
    "defaults": {},
    "`activation_checkpointing=True`": {"activation_checkpointing": True},
    "`rollout_batch_size=4`": {"rollout_batch_size": 4},
    "`offload_components=True`": {"offload_components": True},
    "`--quantize_base nf4`": {"quantize_base": "nf4"},
    "`per_device_train_batch_size=1`": {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 1152},
}


@pytest.mark.parametrize(
    ("column", "model"), [(2, SD35), (3, "black-forest-labs/FLUX.1-dev"), (4, "Qwen/Qwen-Image")], ids=str
)
def test_the_memory_is_that_of_the_documented_table(column, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    lines = SCALING.read_text(encoding="utf-8").splitlines()
    rewards = ["pickscore", "hpsv2", "clipscore", "ocr", "geneval"]
    settings = SETTINGS | SIZE | {"model": model, "rewards": rewards}
    for label, change in ROWS.items():
        settings |= change
        Path("run.yaml").write_text(yaml.safe_dump(settings))
        _, script_args, args, _ = read_settings(["--config", "run.yaml"])
        (row,) = (line for line in lines if line.startswith(f"| {label}"))
        assert find_costs(model).peak_memory(script_args, args, 5) / 1e9 == pytest.approx(
            float(row.split("|")[column]), rel=2e-3, abs=0.1
        ), label


def test_an_adapter_on_every_layer_needs_more_memory_and_one_on_other_layers_is_not_computed(estimate):
    def peak(*layers):
        return re.search(r"Peak memory of one GPU: (.*)", estimate(lora_target_modules=list(layers)))[1]

    of_all = peak("all-linear")
    assert peak("All-Linear") == of_all
    assert float(of_all.split()[0]) > float(re.search(r"Peak memory of one GPU: ([0-9.]+)", estimate())[1])
    assert peak("attn.to_q").startswith("computed only with") and "all-linear" in peak("attn.to_q")


def test_an_adapter_for_every_balance_has_a_part_for_each_reward(estimate):
    settings = {"multi_objective_aggregation": "normalize_then_sum"}

    def peak(**changes):
        return float(re.search(r"Peak memory of one GPU: ([0-9.]+)", estimate(**settings, **changes))[1])

    assert peak(balance_slider=True, lora_r=64) == peak(lora_r=128) > peak(lora_r=64)


def peak_in(shown: str) -> float:
    return float(re.search(r"Peak memory of one GPU: ([0-9.]+)", shown)[1])


def test_gpus_that_are_too_small_are_named(estimate):
    shown = estimate()
    assert 24 < peak_in(shown) < 48
    assert "rtx4090: does not fit its 24 GB\n" in shown and shown.count("minutes per step") == len(GPUS) - 1
    assert "does not fit" not in estimate("--gpu", "h100")
    assert "8 x rtx4090: does not fit its 24 GB" in estimate("--num_processes", "8")


def test_text_encoders_are_gone_where_embeddings_are_cached(estimate):
    saved = peak_in(estimate()) - peak_in(estimate(cache_embeddings=True))
    assert 10 < saved < 12  # the docs say about 11 GB
    # The largest encoder has to be there once, alone or not.
    tight = {"offload_components": True, "quantize_base": "nf4", "per_device_train_batch_size": 1}
    tight["gradient_accumulation_steps"] = 1152
    assert peak_in(estimate(**tight)) == peak_in(estimate(**tight, cache_embeddings=True))
