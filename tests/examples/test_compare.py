# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The comparison of methods: its figures by hand, its runs in small, and its command from nothing to a report."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from example_scripts import EXAMPLES
from rich.console import Console

from trl_marble import MarbleConfig, MarbleNFTTrainer
from trl_marble.balance import assign_gradients
from trl_marble.evaluation import EvaluationConfig, clustered_mean, composite_scores, evaluate_pipeline
from trl_marble.shapeworld import load_pipeline, load_prompts, reward_funcs


FOLDER = EXAMPLES / "benchmarks"
sys.path.append(str(FOLDER))
import compare  # noqa: E402
from evidence import methods, report, runs, statistics, tables, workers  # noqa: E402
from evidence.experiments import EXPERIMENTS  # noqa: E402
from evidence.runs import MAIN, QUICK, TUNING, Run  # noqa: E402


NAN = math.nan


# ---- Figures ----


def test_mean_over_seeds():
    mean, error, prompt_error = statistics.mean_over_seeds(np.array([1.0, 2.0, 6.0]))
    assert mean == 3 and error == pytest.approx(math.sqrt(7 / 3)) and math.isnan(prompt_error)
    assert math.isnan(statistics.mean_over_seeds(np.array([1.0])).seed_error)


def test_a_change_has_an_error_over_seeds_and_one_over_prompts():
    groups = np.array([0, 0, 1, 1, 2])
    differences = np.array([[1.0, 3.0, 2.0, 2.0, NAN], [3.0, 5.0, 8.0, 8.0, NAN]])
    change = statistics.mean_change(differences, groups)
    assert change.mean == 4 and change.seed_error == pytest.approx(2)
    # Prompts 0 and 1 changed by 3 and 5 on average over seeds; prompt 2 does not have the reward.
    assert change.prompt_error == pytest.approx(1)
    assert change.prompt_error == clustered_mean(np.array([2.0, 4.0, 5.0, 5.0, NAN]), groups)[1]


def test_methods_are_compared_seed_by_seed():
    groups = np.array([0, 0, 1])
    differences = np.zeros((2, 3, 2))
    differences[:, :, 0] = [[0.1, 0.3, 0.4], [0.3, 0.5, 0.6]]
    differences[:, :, 1] = [[NAN, NAN, -0.1], [NAN, NAN, 0.3]]  # applies to the second prompt only
    spreads = np.array([0.1, 0.2])
    gap = statistics.compare_changes(differences, groups, spreads, [0, 1])
    assert [estimate.mean for estimate in gap.rewards] == pytest.approx([0.4 - 0.5 / 15, 0.1])
    assert gap.rewards[0].seed_error == pytest.approx(0.1) and gap.rewards[1].seed_error == pytest.approx(0.2)
    assert gap.mean.mean == pytest.approx((gap.rewards[0].mean / 0.1 + 0.5) / 2)
    # Of the seeds: (first / 0.1 + second / 0.2) / 2, which differ by (2 + 2) / 2.
    assert gap.mean.seed_error == pytest.approx(1)
    assert statistics.compare_changes(differences, groups, spreads, [1]).mean[:2] == pytest.approx((0.5, 1))


def test_composites_are_those_of_the_package_with_an_error():
    changes = np.random.default_rng(0).normal(size=(4, 3, 5))
    changes[:, :, 4] = 0.25  # a reward in which all are equal
    found = statistics.composites(changes)
    means = {str(m): dict(enumerate(row)) for m, row in enumerate(changes.mean(axis=1) + np.arange(5))}
    assert [score.mean for score in found] == pytest.approx(list(composite_scores(means).values()))
    spread = changes[:, :, :4].mean(axis=1).std(axis=0)
    by_seed = ((changes[0] - changes.mean(axis=0))[:, :4] / spread).sum(axis=1) / 5
    assert found[0].seed_error == pytest.approx(by_seed.std(ddof=1) / math.sqrt(3))


def test_worst_reward_is_the_least_fraction_of_the_specialists():
    # The third reward rises least, and is the one of which most of what is possible was reached.
    changes = np.array([[0.10, 0.30, 0.02], [0.20, 0.10, 0.02]])
    bounds = np.array([[0.20, 0.60, 0.02], [0.40, 0.60, 0.02]])
    assert statistics.reached_fractions(changes, bounds) == pytest.approx([0.5, 1 / 3, 1])
    worst = statistics.worst_reward(changes, bounds)
    assert worst.reward == 1 and worst.fraction == pytest.approx(1 / 3)
    # Without one seed the least is 1/6 (the second reward), without the other it is 1/2.
    assert worst.seed_error == pytest.approx(math.sqrt(0.5 * 2 * (1 / 6) ** 2))
    assert math.isnan(statistics.worst_reward(changes[:1], bounds[:1]).seed_error)


def test_the_jackknife_is_the_standard_error_where_bounds_are_constant():
    changes = np.array([[0.1], [0.2], [0.6]])
    worst = statistics.worst_reward(changes, np.full((3, 1), 2.0))
    assert worst.seed_error == pytest.approx(statistics.mean_over_seeds(changes[:, 0]).seed_error / 2)


def test_a_reward_without_a_bound_has_no_part_in_the_worst():
    changes, bounds = np.array([[-1.0, 0.1]]), np.array([[NAN, 0.2]])
    assert statistics.worst_reward(changes, bounds).reward == 1
    nothing = statistics.worst_reward(changes[:, :1], bounds[:, :1])
    assert nothing.reward is None and math.isnan(nothing.fraction)


@pytest.mark.parametrize(
    ("estimate", "known"),
    [
        ((0.2, 0.1, 0.1), True),
        ((0.2, 0.11, 0.1), False),
        ((0.2, 0.1, 0.11), False),
        ((0.2, NAN, 0.1), True),
        ((-0.2, 0.1, 0.1), False),
        ((0.0, NAN, NAN), False),
    ],
)
def test_a_bound_is_a_rise_of_two_standard_errors_of_both_kinds(estimate, known):
    assert statistics.upper_bound_is_known(statistics.Estimate(*estimate)) is known


def test_a_learning_rate_is_chosen_by_gain_in_standard_deviations():
    assert statistics.gain({"a": 0.2, "b": 0.1}, {"a": 0.4, "b": 0.05}) == pytest.approx((1.25, 0.5))
    assert statistics.gain({"a": 0.2, "b": 0.1}, {"a": 0.4, "b": 0.0}) == pytest.approx((0.3, 0.1))
    of = statistics.Gain
    gains = {1e-3: of(0.1, 0.0), 2e-3: of(0.3, 0.1), 4e-3: of(NAN, NAN), 5e-4: of(0.3, 0.2)}
    assert statistics.best_rate(gains) == 5e-4
    with pytest.raises(ValueError, match="No learning rate"):
        statistics.best_rate({1e-3: of(NAN, NAN)})


def test_a_learning_rate_with_which_a_reward_fell_is_chosen_only_if_one_always_did():
    of = statistics.Gain
    gains = {1e-3: of(0.1, 0.0), 2e-3: of(0.2, 0.1), 4e-3: of(0.4, -0.01)}
    assert statistics.best_rate(gains) == 2e-3
    assert statistics.best_rate({rate: of(own.mean, -0.1) for rate, own in gains.items()}) == 4e-3


def test_only_methods_with_the_whole_grid_get_a_rate():
    of = statistics.Gain
    gains = {"marble": {1e-3: of(0.1, 0.0), 2e-3: of(0.2, 0.0)}, "equal": {1e-3: of(0.1, 0.1)}}
    assert report.choose_rates(gains, [1e-3, 2e-3]) == {"marble": 2e-3}
    assert report.choose_rates({}, [1e-3])["equal"] == 1e-3


def method_result(name: str, changes: list[list[float]]) -> report.MethodResult:
    """Of a method with these changes `[S, K]`, one image of each of two prompts."""
    differences = np.repeat(np.array(changes)[:, None], 2, axis=1)
    estimates = {
        reward: statistics.mean_change(differences[:, :, k], np.arange(2)) for k, reward in enumerate(methods.REWARDS)
    }
    method = methods.find_method(name)
    shared = {"learning_rate": 1e-3, "wins": {}, "gaps": {}, "histories": [], "results": []}
    return report.MethodResult(
        method.label, method.rewards, differences=differences, changes=np.array(changes), estimates=estimates, **shared
    )


def test_methods_are_measured_by_the_specialists():
    # Specialist k raises its reward by 0.1 (k + 1), but for the last, who fails on one seed.
    specialists = {}
    for k, key in enumerate(methods.SPECIALISTS.values()):
        changes = np.zeros((2, 5))
        changes[:, k] = [0.1 * (k + 1), 0.1 * (k + 1) if k < 4 else -0.4]
        specialists[key] = method_result(key, changes.tolist())
    results = {
        "marble": method_result("marble", [[0.05, 0.05, 0.15, 0.2, -1.0]] * 2),
        "sum_2_rewards": method_result("sum_2_rewards", [[0.05, -0.5, 0.06, 0.2, 0.0]] * 2),
    }
    completed = report.compare_with_specialists({**specialists, **results}, specialists)
    assert list(completed["marble"].fractions.values()) == pytest.approx([0.5, 0.25, 0.5, 0.5, NAN], nan_ok=True)
    assert completed["marble"].worst[:2] == pytest.approx((1, 0.25))
    # This one trains on `composition` and `coverage`, the first and the third reward.
    assert completed["sum_2_rewards"].worst[:2] == pytest.approx((2, 0.2))
    assert completed["specialist_calm"].worst is None and completed["specialist_calm"].composite is None
    # Composites are for methods that train on the same rewards.
    assert completed["marble"].composite is None
    results["equal"] = method_result("equal", [[0.1] * 5] * 2)
    del results["sum_2_rewards"]
    completed = report.compare_with_specialists({**specialists, **results}, specialists)
    assert completed["marble"].composite.mean == pytest.approx(-completed["equal"].composite.mean) != 0
    del specialists["specialist_calm"]
    assert report.compare_with_specialists(results, specialists)["marble"].worst is None


# ---- Methods and runs ----


@pytest.mark.parametrize("name", [name for name in (*methods.METHODS, *methods.VARIANTS) if name != methods.BASE])
def test_settings_of_every_method_fit_together(name, tmp_path):
    method = methods.find_method(name)
    for scale in (runs.Scale(), QUICK):
        config = MarbleConfig(str(tmp_path), use_cpu=True, **{**scale.settings, **method.settings})
        # Whatever is varied, a step has the images of all others.
        if not scale.quick:
            assert config.generation_batch_size == 256
    if name in methods.VARIANTS:
        parent = methods.METHODS[method.tuned_as]
        varied = ("settings", "stages", "weighting", "experiment")
        assert any(getattr(method, key) != getattr(parent, key) for key in varied)


def test_stages_share_the_steps():
    assert runs.split_steps(25, 5) == [5, 5, 5, 5, 5]
    assert runs.split_steps(8, 3) == [3, 3, 2]
    assert runs.split_steps(25, 0) == []
    with pytest.raises(ValueError, match="2 steps cannot be shared by 5 stages"):
        runs.split_steps(2, 5)


def test_learning_rates_are_not_chosen_on_held_out_prompts():
    tuning, main = (runs.Scale().prompts(phase) for phase in (TUNING, MAIN))
    assert len(set(tuning["prompt"])) == len(set(main["prompt"])) == 48
    assert not set(tuning["prompt"]) & set(main["prompt"])
    for prompts in (tuning, main):
        assert {source: list(prompts["source"]).count(source) for source in set(prompts["source"])} == {
            "compositional": 16,
            "glyph": 16,
            "free": 16,
        }


@pytest.mark.slow
def test_a_run_goes_on_from_its_last_stage(tmp_path):
    run = Run(MAIN, "sequential", 1e-3, 1, replace(QUICK, steps=5))
    runs.execute(run, tmp_path)
    first = runs.load_scores(run, tmp_path).table[list(methods.REWARDS)].to_numpy()
    history = runs.load_report(run, tmp_path)["history"]
    assert [row["step"] for row in history if "loss" in row] == [1, 2, 3, 4, 5]
    trained = [
        {k for k in row if k.startswith("rewards/") and k.endswith("/mean")} for row in history if "loss" in row
    ]
    assert trained == [{f"rewards/{name}/mean"} for name in methods.REWARDS]

    folder = tmp_path / run.name
    kept = folder / "stage-4" / "pytorch_lora_weights.safetensors"
    written = kept.stat().st_mtime_ns
    for file in (folder / "report.json", folder / "stage-5" / "history.json"):
        file.unlink()
    for file in (folder / "evaluation").rglob("*.*"):
        file.unlink()
    assert not run.is_finished(tmp_path)
    runs.execute(run, tmp_path)
    assert run.is_finished(tmp_path) and kept.stat().st_mtime_ns == written
    again = runs.load_scores(run, tmp_path).table[list(methods.REWARDS)].to_numpy()
    np.testing.assert_array_equal(again, first)

    # A folder with other settings is neither taken for finished nor trained over.
    with pytest.raises(ValueError, match="`scale` is .* there and .* here"):
        replace(run, scale=replace(run.scale, images=3)).is_finished(tmp_path)


@pytest.mark.slow
def test_what_is_scored_is_the_adapter_that_was_saved(tmp_path):
    run = Run(MAIN, "equal", 1e-2, 1, QUICK)
    runs.execute(run, tmp_path)
    config = EvaluationConfig(
        str(tmp_path / "adapter"),
        adapter=str(tmp_path / run.name / "stage-1"),
        num_generations=QUICK.images,
        num_inference_steps=QUICK.settings["num_inference_steps"],
        batch_size=128,
    )
    loaded = evaluate_pipeline(load_pipeline(), [*reward_funcs()], QUICK.prompts(MAIN), config)
    base = evaluate_pipeline(
        load_pipeline(),
        [*reward_funcs()],
        QUICK.prompts(MAIN),
        replace(config, output_dir=str(tmp_path / "b"), adapter=None),
    )
    names = list(methods.REWARDS)
    fused = runs.load_scores(run, tmp_path).table[names].to_numpy()
    np.testing.assert_allclose(fused, loaded.table[names].to_numpy(), atol=2e-3)
    assert np.nanmax(np.abs(fused - base.table[names].to_numpy())) > 1e-2  # it does something


@pytest.mark.slow
def test_a_run_that_fails_does_not_stop_the_others(tmp_path, monkeypatch):
    for key in (*workers.ONE_THREAD, "TQDM_DISABLE"):  # are for the processes, not for the tests after this one
        monkeypatch.setenv(key, "1")
    broken, whole = Run(MAIN, "no_such_method", 1e-3, 1, QUICK), runs.base_run(MAIN, QUICK)
    failed = workers.execute_all([broken, whole], tmp_path, 1, Console(quiet=True))
    assert list(failed) == [broken] and "no_such_method" in failed[broken]
    assert whole.is_finished(tmp_path)
    assert "Traceback" in (tmp_path / broken.name / "log.txt").read_text()


# ---- Experiments ----


def logged_steps(name: str, folder: Path) -> list[dict]:
    run = Run(MAIN, name, 1e-2, 1, QUICK)
    runs.execute(run, folder)
    return [row for row in runs.load_report(run, folder)["history"] if "loss" in row]


@pytest.mark.slow
def test_experiments_have_the_gradients_of_marble_and_weigh_them_in_their_own_way(tmp_path):
    plain, halves, metric = (logged_steps(name, tmp_path) for name in ("marble", "cross_gram", "optimizers_metric"))
    norms = [key for key in plain[0] if key.startswith("balance/grad_norm/") and plain[0][key] > 0]
    assert len(norms) >= 3
    for steps in (halves, metric):
        assert {key: steps[0][key] for key in norms} == pytest.approx({key: plain[0][key] for key in norms}, rel=1e-4)
        assert steps[0]["balance/cos_min"] != pytest.approx(plain[0]["balance/cos_min"], abs=1e-4)
    assert any(row[f"experiment/signal/{norms[0].split('/')[-1]}"] != 1 for row in halves)
    # The shortest direction in the optimizer's metric is the one of which the least cosine there is the greatest.
    for row in metric:
        assert row["experiment/step_taken/cos_min"] > row["experiment/step_plain/cos_min"]
        assert row["experiment/step_taken/conflict"] == 0
    table = tables._metric_table(replace(method_result("optimizers_metric", [[0.0] * 5]), histories=[metric]))
    least = min(row["experiment/step_taken/cos_min"] for row in metric)
    assert table.splitlines()[-1].startswith(f"| taken | {len(metric)} | {least:+.2f} |") and "| 0.0% |" in table


@pytest.mark.slow
def test_the_raw_gram_matrix_favours_small_gradients(tmp_path):
    plain, raw = (logged_steps(name, tmp_path)[0] for name in ("marble", "raw_gram"))
    norms = {
        key.split("/")[-1]: plain[key] for key in plain if key.startswith("balance/grad_norm/") and plain[key] > 0
    }
    assert {name: raw[f"balance/grad_norm/{name}"] for name in norms} == pytest.approx(norms, rel=1e-4)
    small = min(norms, key=norms.get)
    assert raw[f"balance/alpha/{small}"] > plain[f"balance/alpha/{small}"] + 1e-3


def test_the_published_code_mixes_advantages_between_two_solves(tmp_path):
    settings = {**QUICK.settings, **methods.find_method("marble_reference").settings}
    trainer = MarbleNFTTrainer(
        load_pipeline(),
        reward_funcs=[*reward_funcs()][:2],
        args=MarbleConfig(str(tmp_path), use_cpu=True, **settings),
        train_dataset=load_prompts("train"),
    )
    step = EXPERIMENTS["published_amortization"](trainer)
    alpha = torch.tensor([0.75, 0.5])  # smoothed by reward, so that they need not sum to 1
    trainer.schedule.load_state_dict({"alpha": alpha, "norms": torch.tensor([1.0, 100.0]), "total": alpha.sum()})
    advantages = torch.tensor([[4.0, 5.0, NAN, NAN], [-2.0, 5.0, 1.0, NAN]])
    trainer._batch = SimpleNamespace(advantages=advantages, scored=torch.tensor([3]))
    positive, negative = step._of_mixed_advantages()
    # 0.75 * 4 - 0.5 * 2 = 2, clipped at 5, 0.5 where the first reward does not apply, and nothing.
    mixed, share = torch.tensor([2.0, 5.0, 0.5, 0.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    scale = 5.0 / trainer.args.nft_beta / (3 * trainer.update.grid.per_sample)
    torch.testing.assert_close(positive, (scale * share * (0.5 + mixed / 10))[None])
    torch.testing.assert_close(negative, (scale * share * (0.5 - mixed / 10))[None])
    # A step that does not solve: these are the coefficients of its terms.
    step.begin(1, torch.ones(2, 2), torch.ones(2, 2, dtype=torch.bool), 4, torch.ones(2))
    terms = [torch.zeros(4, requires_grad=True) for _ in range(2)]
    step.backward(terms, [torch.zeros(2, 4)] * 2, None)
    assert terms[0].grad.equal(positive[0]) and terms[1].grad.equal(negative[0])


def test_the_optimizers_metric_is_that_of_its_next_step(tmp_path):
    """What `P` scales a gradient by is how far AdamW goes along it, where momentum and weight decay have no part."""
    trainer = MarbleNFTTrainer(
        load_pipeline(),
        reward_funcs=[*reward_funcs()],
        args=MarbleConfig(str(tmp_path), use_cpu=True, weight_decay=0.0, adam_beta1=0.0, **QUICK.settings),
        train_dataset=load_prompts("train"),
    )
    step = EXPERIMENTS["optimizers_metric"](trainer)
    trainer.create_optimizer_and_scheduler(num_training_steps=2)
    rate = trainer.optimizer.param_groups[0]["lr"]
    for seed in (0, 1):
        generator = torch.Generator().manual_seed(seed)
        gradient = torch.cat([torch.randn(p.numel(), generator=generator) for p in trainer.weights.parameters])
        expected = step._preconditioner(gradient) * gradient
        before = torch.cat([p.detach().flatten() for p in trainer.weights.parameters])
        assign_gradients(gradient, trainer.weights.parameters)
        trainer.optimizer.step()
        moved = (before - torch.cat([p.detach().flatten() for p in trainer.weights.parameters])) / rate
        torch.testing.assert_close(moved, expected.float(), rtol=1e-3, atol=1e-3)


def test_nash_mtl_of_a_gram_matrix_is_that_of_its_gradients():
    """Without the package that it comes from: any function of inner products will do."""

    class Inner:
        def __init__(self, n_tasks: int) -> None:
            self.weighting = lambda rows: (rows @ rows.T).sum(dim=1) * n_tasks

    gradients = torch.randn(3, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gram = gradients @ gradients.T
    torch.testing.assert_close(methods._NashMTL(Inner)(gram), gram.sum(dim=1) * 3)


# ---- The command ----


@pytest.mark.slow
def test_from_nothing_to_a_report(tmp_path):
    command = ["--quick", "--jobs", "1", "--output_dir", str(tmp_path)]
    subprocess.run([sys.executable, FOLDER / "compare.py", *command], check=True)
    folder = tmp_path / "report"
    results = json.loads((folder / "results.json").read_text())
    assert list(results["main"]) == ["weighted_sum", "marble"] and not results["unfinished"]
    # Two methods are one standard deviation from their mean, on either side, in every reward that differs.
    composites = [row["composite"]["mean"] for row in results["main"].values()]
    assert sum(composites) == pytest.approx(0)
    marble = results["main"]["marble"]
    assert marble["cosines"]["steps"] == 2 and results["main"]["weighted_sum"]["cosines"] is None
    assert set(marble["wins"]) == {"base", "weighted_sum"}
    text = (folder / "report.md").read_text()
    for name in ("curves.png", "changes.png", "cosines.png", "images.png"):
        assert f"({name})" in text and (folder / name).stat().st_size > 5000
    assert "MARBLE, N = 1" in text and "nan" not in text.lower()

    # All is finished now, so that nothing is run.
    reports = {file: file.stat().st_mtime_ns for file in tmp_path.glob("main/**/report.json")}
    assert len(reports) == 3
    compare.main(command)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.glob("main/**/report.json")} == reports


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--seeds", "0", "1"], "leave it out"),
        (["--seeds", "1", "1"], "count twice"),
        (["--steps", "4", "--methods", "sequential"], "5 stages"),
        (["--jobs", "0"], "at least one"),
    ],
)
def test_commands_that_cannot_work_are_refused(arguments, complaint, capsys):
    with pytest.raises(SystemExit):
        compare.parse_args(arguments)
    assert complaint in capsys.readouterr().err


def test_the_main_stage_asks_for_learning_rates(tmp_path):
    with pytest.raises(SystemExit, match="run the stage `tune` first"):
        compare.main(["--stages", "main", "--methods", "marble", "--output_dir", str(tmp_path)])


def test_a_dry_run_says_how_long_and_runs_nothing(tmp_path, capsys):
    compare.main(["--dry_run", "--jobs", "2", "--output_dir", str(tmp_path / "out")])
    shown = capsys.readouterr().out
    # 12 methods with 3 rates or 3 seeds each, and the pipeline itself.
    assert "tune: 0 of 37 runs are finished" in shown and "main: 0 of 37 runs are finished" in shown
    assert not Path(tmp_path / "out").exists()
