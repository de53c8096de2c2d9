# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The command line as a whole: help without waiting, errors in a line, completion by tab."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import trl_marble
from trl_marble.cli.env import environment
from trl_marble.cli.environment import prepare_environment
from trl_marble.cli.main import main


COMMANDS = ("train", "estimate", "eval", "compare", "card", "push", "demo", "vote", "selftest", "env")


def test_help_imports_nothing_that_takes_long():
    code = """
import sys
from trl_marble.cli.main import main
for words in (["--help"], ["env", "--help"], ["compare", "--hepl", "x"]):
    try:
        main(words)
    except SystemExit as stopped:
        assert stopped.code == 0
print(sorted({"torch", "transformers", "diffusers", "datasets", "pandas", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n")
    for command in COMMANDS:
        assert f"\n    {command} " in done.stdout


def test_the_package_gives_its_trainer_when_it_is_asked_for():
    from trl_marble.trainer import MarbleConfig, MarbleNFTTrainer

    assert trl_marble.MarbleConfig is MarbleConfig and trl_marble.MarbleNFTTrainer is MarbleNFTTrainer
    with pytest.raises(AttributeError, match="has no attribute 'MarbleTrainer'"):
        trl_marble.MarbleTrainer  # noqa: B018


def test_version_and_bare_command(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0 and capsys.readouterr().out.strip() == trl_marble.__version__
    assert main([]) == 0 and "COMMAND" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train", "--config", "nowhere.yaml"], "`--config nowhere.yaml`: there is no such file"),
        (["train", "--model", "base"], "the following arguments are required: --prompts"),
        (["train", "--model", "base", "--prompts", "prompts.txt"], "name `rewards`, `teachers` or both"),
        (["train", "--config", "run.yaml", "--teachers", "x"], "teacher 'x' is not of the form `source=adapter`"),
        (["train", "--config", "run.yaml", "--teachers", "text=run"], "`train_dataset` has no column `source`"),
        (["train", "--config", "run.yaml", "--heigth", "8"], "`--heigth`; did you mean `--height`?"),
        (["train", "--config", "run.yaml", "--heigth=8"], "`--heigth`; did you mean `--height`?"),
        (["train", "--config", "typo.yaml"], "`--max_step`; did you mean `--max_steps`?"),
        (["train", "--config", "run.yaml", "--num_proceses", "2"], "did you mean `--num_processes`?"),
        (["train", "--config", "run.yaml", "--max_steps", "1", "more"], "unexpected 'more'"),
        (["train", "--config", "run.yaml", "--accelerate_config", "x.yaml"], "`--accelerate_config x.yaml`: there is"),
        (["train", "--config", "run.yaml", "--balance_ema", "2"], "`balance_ema` is 2.0; a decay must be in [0, 1)."),
        (["train", "--config", "run.yaml", "--prompts", "x.txt"], "There is no file or folder 'x.txt'."),
        (["train", "--config", "run.yaml", "--rewards", "pikscore"], "Did you mean 'pickscore'?"),
        (["train", "--config", "run.yaml", "--model", "empty"], "has no diffusers pipeline"),
        (["train", "--config", "run.yaml", "--resume_from_checkpoint", "latest"], "There is no checkpoint in `run`"),
        (["train", "--config", "run.yaml", "--resume_from_checkpoint", "x"], "There is no folder `x` to resume from"),
        (["train", "--config", "run.yaml", "--resume_from_checkpoint", "empty"], "no valid checkpoint: it is empty"),
        (["train", "--config", "run.yaml", "--reward_weights", "1"], "has 1 values ([1.0]) for 2 rewards"),
        (
            ["eval", "--config", "run.yaml"],
            "and 5 more: options of `trl-marble train`, which `trl-marble eval` does not",
        ),
        (["train", "--config", "run.yaml", "--batch_sise", "2"], "there is no option `--batch_sise`"),
        (["train", "--config", "run.yaml", "--adapter", "x"], "`adapter`: options of `trl-marble eval`"),
        (["train", "--config", "run.yaml", "--log_completions"], "did you mean `--log_images`?"),
        (["train", "--config", "run.yaml", "--batch_size", "4"], "did you mean `--per_device_train_batch_size`?"),
        (["train", "--config", "run.yaml", "--num_processes", "two"], "invalid int value: 'two'"),
        (["train", "--config", "hyphen.yaml"], "there is no option `max-steps` in files; write `max_steps`"),
        (["train", "--config", "run.yaml", "--lora_rank", "2"], "did you mean `--lora_r`?"),
        (
            ["train", "--config", "run.yaml", "--epsilon", "2"],
            "`--epsilon`; the default loss has no likelihood ratio to clip",
        ),
        (["train", "--config", "run.yaml", "--warmup_steps", "2"], "`warmup_steps=2.0` has no effect with"),
        (["train", "--config", "run.yaml", "--eval_prompts", "prompts.txt"], "`eval_prompts` are never evaluated"),
        (
            ["train", "--config", "run.yaml", "--eval_rewards", "my_rewards.blue"],
            "has no effect without `eval_prompts`",
        ),
        (["train", "--config", "run.yaml", "--eval_split", "x"], "`eval_split` has no effect without `eval_prompts`"),
        (["train", "--config", "run.yaml", "--eval_strategy", "steps"], "`eval_strategy` needs `eval_prompts`"),
        (["train", "--config", "run.yaml", "--eval_on_start"], "`eval_on_start` needs `eval_prompts`"),
        (["eval", "--adaptor", "x"], "required: --model, --prompts, --rewards, --output_dir"),
        (["compare", "empty"], "there is nothing to compare with"),
        (["compare", "empty", "nowhere"], "there is no folder 'nowhere'"),
        (["compare", "a=empty", "a=empty"], "two evaluations are named 'a'"),
        (["compare", "a=empty", "b=empty"], "`empty` has no finished evaluation"),
        (["compare", "empty", "b=empty", "--outputdir", "x"], "`--outputdir`; did you mean `--output"),
        (["card", "empty", "--after", "empty"], "`empty` has no finished evaluation"),
        (["compare", "x=y", "a=empty"], "there is no folder 'y'"),
        (["compare", "x=y=empty", "a=empty"], "there is no folder 'y=empty'"),
        (["compare", "x=cfg=1", "cfg=1"], "`x=cfg=1` has no finished evaluation"),
        (["compare", "checkpoint", "empty"], "'checkpoint' is a training run and 'empty' is not"),
        (["compare", "checkpoint", "b=checkpoint"], "'checkpoint' has no gains: its log has no evaluation before"),
        (["compare", "empty", "b=empty", "--at_kl", "0.1", "-1"], "`--at_kl` is -1; a KL is a finite number"),
        (["compare", "empty", "b=empty", "--at_kl", "0.1"], "`--at_kl` needs training runs"),
        (["push", "empty", "me/x"], "has no adapter"),
        (["push", "empty", "me/x", "me/y"], "unexpected 'me/y'"),
    ],
)
def test_mistakes_are_one_message_and_status_2(workplace, capsys, words, message):
    (workplace / "empty").mkdir()
    (workplace / "cfg=1").mkdir()
    (workplace / "checkpoint").mkdir()
    (workplace / "checkpoint" / "trainer_state.json").write_text('{"log_history": []}')
    (workplace / "x=cfg=1").mkdir()
    (workplace / "typo.yaml").write_text((workplace / "run.yaml").read_text().replace("max_steps", "max_step"))
    (workplace / "hyphen.yaml").write_text((workplace / "run.yaml").read_text().replace("max_steps", "max-steps"))
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.splitlines()[-1] == f"See `trl-marble {words[0]} --help`."
    assert "Traceback" not in error


def test_an_error_in_the_users_own_module_keeps_its_traceback(workplace):
    (workplace / "my_rewards.py").write_text("raise ValueError('my own mistake')\n")
    with pytest.raises(ValueError, match="my own mistake"):
        main(["train", "--config", "run.yaml"])


def test_help_of_training_imports_no_diffusers():
    code = """
import sys
from trl_marble.cli.main import main
try:
    main(["train", "--help"])
except SystemExit:
    print(sorted({"diffusers", "datasets", "pandas", "matplotlib"} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.endswith("[]\n")


PREPARED = """
import logging, os, sys
from trl_marble.cli import environment
environment.ACCELERATORS = sys.argv[1:]
from trl_marble.cli.main import main
main([])
import transformers.utils.import_utils as utils
utils.logger.warning("`A` requires torchvision (not installed); falling back to `B`")
utils.logger.warning("something else")
print(os.environ.get("OMP_WAIT_POLICY"), "torch" in sys.modules)
"""


@pytest.mark.parametrize(
    ("set_before", "devices", "policy"),
    [(None, ["/nowhere"], "passive"), ("active", ["/nowhere"], "active"), (None, [os.sep], "None")],
    ids=["none", "set by the user", "with an accelerator"],
)
def test_waiting_threads_sleep_on_machines_without_an_accelerator(set_before, devices, policy):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {} if set_before is None else {"OMP_WAIT_POLICY": set_before}
    words = [sys.executable, "-c", PREPARED, *devices]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env=environment)
    assert done.stdout.splitlines()[-1].split()[0] == policy
    assert "torchvision" not in done.stderr and "something else" in done.stderr


def test_types_are_shipped():
    assert (Path(trl_marble.__file__).parent / "py.typed").is_file()


def test_whole_help_of_training(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for option in ("--prompts", "--eval_rewards", "--balance_every", "--learning_rate", "--config", "--num_processes"):
        assert option in shown


COMPLETE = """
source ./script
shown() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _shtab_trl_marble; echo "${COMPREPLY[@]}"; }
complete -p trl-marble
shown trl-marble ''
shown trl-marble train --balance_e
shown trl-marble train --balance_on ''
shown trl-marble train --rewards ocr picks
shown trl-marble train --num_pr
shown trl-marble eval --config ru
shown trl-marble compare ba
shown trl-marble demo --se
"""


def test_bash_completes_commands_options_choices_rewards_and_files(workplace, capsys):
    assert main(["--print-completion", "bash"]) == 0
    (workplace / "script").write_text(capsys.readouterr().out)
    bash = shutil.which("bash")
    # Without a PATH: a tab press starts no Python.
    done = subprocess.run([bash, "-c", COMPLETE], check=True, capture_output=True, text=True, env={"PATH": ""})
    declared, *shown = done.stdout.splitlines()
    # The option depends on shtab's version.
    assert declared.startswith("complete -o ") and declared.endswith(" -F _shtab_trl_marble trl-marble")
    assert shown == [
        " ".join(COMMANDS),
        "--balance_every --balance_ema",
        "loss advantage",
        "pickscore",
        "--num_processes",
        "run.yaml",
        "base",
        "--seed",
    ]


@pytest.mark.parametrize("shell", ["zsh", "tcsh"])
def test_other_shells_have_scripts_too(capsys, shell):
    assert main(["--print-completion", shell]) == 0
    assert "balance_every" in capsys.readouterr().out


def test_env_is_a_list_without_secrets(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_do_not_show_this")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["env"]) == 0
    shown = capsys.readouterr().out
    assert all(line.startswith("- ") and ": " in line for line in shown.splitlines())
    assert "hf_do" not in shown and str(tmp_path) not in shown
    found = environment()
    assert found["trl_marble"].startswith(trl_marble.__version__)
    for name in ("Python", "torch", "diffusers", "peft", "trl", "accelerator", "torchjd (optional)"):
        assert found[name]


def test_warnings_of_the_package_are_sentences(monkeypatch):
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)
    prepare_environment()
    own, other = str(Path(trl_marble.__file__).parent / "data" / "loading.py"), "/elsewhere/plot.py"
    assert warnings.formatwarning("3 blank lines.", UserWarning, own, 7) == "Warning: 3 blank lines.\n"
    assert "plot.py:7: UserWarning: no room" in warnings.formatwarning("no room", UserWarning, other, 7)
