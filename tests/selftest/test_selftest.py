# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The self-test finds what is broken, and says nothing of its user."""

import getpass
import json
import signal
import time
from contextlib import contextmanager

import pytest
import torch
from quantized import quantized_sd3
from torch import nn

from trl_marble.balance import per_reward_gradients
from trl_marble.cli.main import main
from trl_marble.pipelines import FlowPipeline, WeightShadow
from trl_marble.selftest import quantized, runner, subject
from trl_marble.selftest.anonymous import anonymous
from trl_marble.selftest.compilation import check_compilation
from trl_marble.selftest.costs import check_costs
from trl_marble.selftest.gradients import check_gradients
from trl_marble.selftest.offloading import check_offloading
from trl_marble.selftest.policies import check_policies
from trl_marble.selftest.precision import check_precision
from trl_marble.selftest.processes import ProcessCheck
from trl_marble.selftest.quantized import check_quantized
from trl_marble.selftest.resuming import check_resuming
from trl_marble.selftest.runner import Check, OutOfTime, limited, run_checks
from trl_marble.selftest.subject import Subject
from trl_marble.selftest.verdicts import Failed, Finding, Skipped
from trl_marble.trainer import MarbleNFTTrainer


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A folder with a tiny pipeline, as a user's own model."""
    import tiny

    folder = tmp_path_factory.mktemp("model")
    tiny.tiny_sd3(num_layers=1).save_pretrained(folder)
    return folder


@pytest.fixture
def model(tiny_model, monkeypatch):
    monkeypatch.setattr(subject, "SIDE", 16)
    return Subject(str(tiny_model))


@pytest.fixture
def command(tiny_model, monkeypatch, tmp_path, capsys):
    """Runs the command with some of the checks; gives its status, lines and report."""
    monkeypatch.setattr(subject, "SIDE", 16)

    def run(*checks, minutes=3):
        monkeypatch.setattr(runner, "all_checks", lambda *_: list(checks))
        output = tmp_path / "report.json"
        words = ["selftest", "--model", str(tiny_model), "--minutes", str(minutes), "--output", str(output)]
        status = main(words)
        return status, capsys.readouterr().out.splitlines(), json.loads(output.read_text())

    return run


GRADIENTS = Check("per-reward gradients", check_gradients, 1)
POLICIES = Check("old and base weights", check_policies, 1)


def test_verdicts_are_lines_and_json(command, tiny_model):
    status, lines, report = command(GRADIENTS, POLICIES)
    assert status == 0 and len(lines) == 3
    assert lines[0].startswith("pass        per-reward gradients  relative error ")
    assert [check["verdict"] for check in report["checks"]] == ["pass", "pass"]
    assert report["checks"][0]["measured"]["relative_error"] < 1e-4
    assert report["environment"]["torch"] == torch.__version__ and report["minutes"] == 3
    assert report["model"] == "a local folder"
    assert str(tiny_model.parent) not in json.dumps(report)


def test_a_broken_gradient_fails_and_the_other_checks_go_on(command, monkeypatch):
    backward = per_reward_gradients._RowProduct.backward

    def broken(ctx, *grads):
        into, weight, rows, coefficients = backward(ctx, *grads)
        return into, weight, 1.01 * rows, coefficients

    monkeypatch.setattr(per_reward_gradients._RowProduct, "backward", staticmethod(broken))
    status, lines, report = command(GRADIENTS, POLICIES)
    assert status == 1
    assert lines[0].startswith("fail        per-reward gradients  per-reward gradients are not those of autograd")
    assert [check["verdict"] for check in report["checks"]] == ["fail", "pass"]
    assert report["checks"][0]["measured"]["relative_error"] == pytest.approx(0.01, rel=0.1)


def test_gradients_that_are_not_finite_fail_and_are_in_the_report(command, monkeypatch):
    def broken(destination, phantom):
        destination.fill_(torch.nan)

    monkeypatch.setattr(per_reward_gradients, "_move_gradient", broken)
    status, lines, report = command(GRADIENTS)
    assert status == 1 and "relative error inf" in lines[0]
    assert report["checks"][0]["measured"]["relative_error"] == "inf"


def test_a_check_that_raises_fails_in_one_line_without_paths(command):
    def raises(subject):
        raise OSError(f"no disk at /home/{getpass.getuser()}/models/x.bin\nand more")

    def skips(subject):
        raise Skipped("there are no two GPUs")

    status, lines, report = command(Check("raises", raises, 1), Check("skips", skips, 1))
    assert status == 1 and len(lines) == 3
    assert lines[0].startswith("fail        raises                OSError: no disk at x.bin (")
    assert report["checks"][1] | {"seconds": 0} == {
        "name": "skips",
        "verdict": "skipped",
        "reason": "there are no two GPUs",
        "seconds": 0,
        "measured": {},
    }


def test_what_the_time_does_not_allow_is_not_run_or_stopped(model):
    def takes(seconds):
        def run(subject):
            time.sleep(seconds)
            return Finding("done")

        return run

    short, longer, stuck = Check("short", takes(0.2), 1), Check("longer", takes(0), 1e6), Check("stuck", takes(600), 1)
    start, shown = time.monotonic(), []
    verdicts = run_checks([short, longer, stuck, short], model, start + 2, shown.append)
    assert time.monotonic() - start < 60
    assert [verdict.verdict for verdict in verdicts] == ["pass", "not run", "out of time", "not run"]
    assert verdicts == shown and verdicts[1].reason.startswith("it takes about 2")


def test_a_slow_start_keeps_no_later_check_from_running(model):
    seconds = iter([0.5, 0.01])

    def run(subject):
        time.sleep(next(seconds, 0))
        return Finding("done")

    checks = [Check("warms up", run, 1), Check("fast", run, 1), Check("four times", run, 4)]
    verdicts = run_checks(checks, model, time.monotonic() + 1.5, lambda verdict: None)
    assert [verdict.verdict for verdict in verdicts] == ["pass"] * 3


def test_an_interruption_keeps_the_verdicts_so_far(command):
    def interrupts(subject):
        raise KeyboardInterrupt

    status, _, report = command(GRADIENTS, Check("interrupts", interrupts, 1))
    assert status == 130 and [check["name"] for check in report["checks"]] == ["per-reward gradients"]


def test_a_model_that_takes_too_long_to_load_is_said_to(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Subject, "load", lambda self: time.sleep(600))
    start = time.monotonic()
    assert main(["selftest", "--minutes", "0.02", "--output", str(tmp_path / "report.json")]) == 2
    assert time.monotonic() - start < 60
    assert "the model was not loaded when the minutes were over" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes", "0"], "`--minutes` is 0; give a number above 0"),
        (["--output", "nowhere/report.json"], "is no file in a folder that exists"),
        (["--model", "nowhere"], "No pipeline could be loaded from 'nowhere'"),
    ],
)
def test_mistakes_are_one_message(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["selftest", *words]) == 2
    assert message in capsys.readouterr().err


def test_texts_lose_paths_names_and_tokens():
    assert anonymous("OSError: no /home/me/a.bin\n here") == "OSError: no a.bin here"
    assert anonymous(r"C:\Users\me\x.py and ~/y/z.py") == "x.py and z.py"
    assert anonymous("see https://huggingface.co/docs/hub") == "see https://huggingface.co/docs/hub"
    assert anonymous("hf_AbCdEfGhIjKlMnOpQrStUv") == "TOKEN"
    assert anonymous(f"of {getpass.getuser()}") == "of USER"
    assert len(anonymous("x " * 500)) == 300


def test_stopping_is_no_error_that_something_on_the_way_could_handle():
    with pytest.raises(OutOfTime), limited(0.05):
        try:
            time.sleep(5)
        except Exception:
            pass
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)  # the clock is off again


# ---- Each check passes here, and fails where what it checks is broken ----


def test_further_checks_pass_on_a_users_model(model):
    names = ("resumed checkpoint", "bf16 directions")  # others are run in other tests
    checks = [check for check in runner.all_checks() if check.name in names]
    verdicts = run_checks(checks, model, time.monotonic() + 300, lambda verdict: None)
    assert {verdict.name: (verdict.verdict, verdict.reason) for verdict in verdicts if verdict.verdict != "pass"} == {}
    assert len(verdicts) == 2


def test_the_cost_has_passes_times_and_memory(model):
    measured = check_costs(model).measured
    micro_steps = 3 * 2  # steps, timesteps
    assert measured["passes"]["backwards"] == 2 * micro_steps
    # Three solver steps and one to find the times; trained and base policy in each micro-step, and from the second
    # step on the old one.
    assert measured["passes"]["forwards"] >= 3 * 3 + 2 * micro_steps + 2 * 2
    assert measured["images_per_second"] > 0 and measured["seconds"]["rollout"] > 0
    assert measured["memory"]["measured_gb"] is None and 0 < measured["memory"]["computed_gb"] < 1


def test_more_backward_passes_than_two_are_found(model, monkeypatch):
    from trl_marble.update import step_gradient

    def slow(self, number):
        return step_gradient.SeparateBackward(number, self.parameters)

    monkeypatch.setattr(step_gradient.StepGradient, "_new_rows", slow)
    with pytest.raises(Failed, match="backward passes in 6 micro-steps; there have to be two in each"):
        check_costs(model)


def test_trained_weights_that_do_not_come_back_are_found(model, monkeypatch):
    put_into = WeightShadow.put_into

    @contextmanager
    def rounds(self, places):
        with put_into(self, places):
            yield
        for parameter in self._parameters.values():
            parameter.data = parameter.data.bfloat16().float()

    monkeypatch.setattr(WeightShadow, "put_into", rounds)
    with pytest.raises(Failed, match="changed .* trained weights"):
        check_policies(model)


def test_a_checkpoint_that_loses_the_optimizer_is_found(model, monkeypatch):
    monkeypatch.setattr(MarbleNFTTrainer, "_load_optimizer_and_scheduler", lambda self, checkpoint: None)
    with pytest.raises(Failed, match="the resumed run differs in"):
        check_resuming(model)


def test_a_precision_that_changes_directions_is_found(model, monkeypatch):
    velocity = FlowPipeline.velocity

    def wrong(self, x_t, t, conditioning):
        return velocity(self, x_t if self.autocast_dtype is None else -x_t, t, conditioning)

    monkeypatch.setattr(FlowPipeline, "velocity", wrong)
    with pytest.raises(Failed, match="bf16 and fp32 disagree"):
        check_precision(model)


def test_components_that_stay_where_they_were_are_found(model, monkeypatch):
    from trl_marble.selftest import offloading

    monkeypatch.setattr(offloading, "_is_on", lambda module, device: isinstance(module, nn.Linear))
    with pytest.raises(Failed, match="not where they belong: .*vae"):
        check_offloading(model)


def test_a_quantized_base_is_checked(model, monkeypatch, tmp_path):
    monkeypatch.setattr(quantized, "load_quantized", lambda *_: quantized_sd3("nf4", tmp_path))
    finding = check_quantized(model)
    assert finding.measured["relative_error"] < 1e-4 and finding.reason.startswith("bitsandbytes nf4: ")


def test_two_processes_need_two_gpus(model):
    # No matter how little time is left.
    checks = [check for check in runner.all_checks(num_gpus=1) if check.name in ("two processes", "quantized base")]
    verdicts = run_checks(checks, model, time.monotonic() - 1, lambda verdict: None)
    assert [verdict.verdict for verdict in verdicts] == ["skipped", "skipped"]
    assert verdicts[1].reason == "it needs two GPUs, and there is one"


@pytest.mark.slow
def test_two_processes_take_the_step_of_one():
    assert ProcessCheck(0)(Subject()).measured["relative_error"] < 1e-4


@pytest.mark.slow
def test_compiled_blocks_are_checked(model):
    assert check_compilation(model).measured["relative_error"] < 1e-3


def test_a_compiler_that_is_switched_off_is_no_fault(model, monkeypatch):
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "1")
    with pytest.raises(Skipped, match="switched off"):
        check_compilation(model)


def test_after_an_error_the_pipeline_is_loaded_anew(model):
    with model.pipeline() as first:
        pass
    with pytest.raises(ValueError), model.pipeline() as again:
        raise ValueError
    assert again is first
    with model.pipeline() as other:
        assert other is not first
