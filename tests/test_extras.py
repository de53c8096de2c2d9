# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""What works without the optional dependencies, and what an error says where one is missing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from evaluation_helpers import made_results
from PIL import Image
from trainer_helpers import small_config, small_trainer

from trl_marble.cli.main import main
from trl_marble.evaluation import image_grid, plot_balance
from trl_marble.extras import EXTRAS, MissingExtraError, has_extra, require_extra
from trl_marble.hub import card_from_evaluations


PACKAGE = Path(__file__).parents[1] / "trl_marble"


@pytest.fixture
def missing(monkeypatch):
    """Uninstall the modules of an extra, as far as this process can see."""

    def uninstall(extra):
        for module in EXTRAS[extra]:
            monkeypatch.setitem(sys.modules, module, None)

    return uninstall


def test_no_module_imports_an_extra_when_it_is_imported():
    """`server_http`, `vote_server` and `completion` do; nothing imports them before it has checked their extra."""
    extras = {module for modules in EXTRAS.values() for module in modules}
    found = {
        str(file.relative_to(PACKAGE))
        for file in PACKAGE.rglob("*.py")
        for node in ast.parse(file.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom) and not getattr(node, "level", 0)
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
        if name.partition(".")[0] in extras
    }
    assert found == {"cli/completion.py", "rewards/server_http.py", "rewards/vote_server.py"}


def test_the_error_names_the_extra_and_what_to_do(missing):
    require_extra("plots", "A picture")
    missing("plots")
    assert not has_extra("plots") and has_extra("server")
    with pytest.raises(MissingExtraError) as raised:
        require_extra("plots", "A picture", "draw it yourself")
    assert str(raised.value) == (
        "A picture needs matplotlib, which the extra `plots` installs: "
        'run `pip install ".[plots]"` in your clone of trl_marble, or `pip install matplotlib`; or draw it yourself.'
    )


def test_training_without_pictures_needs_no_plots(missing, tmp_path, caplog):
    missing("plots")
    trainer = small_trainer(tmp_path, max_steps=1, balance_every=1)
    trainer.train()
    trainer.save_model()
    assert (tmp_path / "README.md").is_file() and not (tmp_path / "balance.png").exists()
    assert "the extra `plots` is not installed" in caplog.text


def test_pictures_without_plots_are_refused_before_anything_is_trained(missing, tmp_path):
    missing("plots")
    with pytest.raises(MissingExtraError, match=r"`log_images=True`.*\[plots\].*or set `log_images=False`"):
        small_config(tmp_path, log_images=True)
    with pytest.raises(MissingExtraError, match=r"A picture needs matplotlib.*\[plots\]"):
        image_grid([[Image.new("RGB", (8, 8))]], ["a"], path=tmp_path / "a.png")
    with pytest.raises(MissingExtraError, match=r"A picture needs matplotlib.*\[plots\]"):
        plot_balance([{"step": 1, "balance/alpha/a": 1.0, "balance/cos_min": 0.5}], tmp_path / "b.png")


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio", "wandb"])
def test_a_missing_tracker_is_named(tracker, missing, tmp_path):
    missing(tracker)
    with pytest.raises(MissingExtraError, match=rf"`report_to='{tracker}'` needs {tracker}.*\[{tracker}\]"):
        small_config(tmp_path, report_to=[tracker])


def test_commands_say_what_is_missing_when_they_start(missing, tmp_path, capsys):
    missing("plots")
    assert main(["demo", "--output_dir", str(tmp_path / "demo")]) == 2
    assert "The demo, which leaves pictures, needs matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "demo").exists()
    missing("completion")
    with pytest.raises(SystemExit) as stopped:
        main(["--print-completion", "bash"])
    assert stopped.value.code == 2 and "`--print-completion` needs shtab" in capsys.readouterr().err


def test_a_card_with_two_evaluations_needs_plots(missing, tmp_path):
    results = made_results(tmp_path / "results", {"bright": [0.1, 0.2]})
    missing("plots")
    with pytest.raises(MissingExtraError, match="The picture of images before and after training needs matplotlib"):
        card_from_evaluations(tmp_path, {"before": results, "after": results})


@pytest.mark.slow
def test_everything_can_be_imported_without_extras():
    blocked = sorted({module for modules in EXTRAS.values() for module in modules})
    code = f"""
import sys
sys.modules.update(dict.fromkeys({blocked}))
import importlib, pkgutil
import trl_marble
needs_extra = {{
    "trl_marble.rewards.server",
    "trl_marble.rewards.server_http",
    "trl_marble.rewards.vote_server",
    "trl_marble.cli.completion",
}}
for module in pkgutil.walk_packages(trl_marble.__path__, "trl_marble."):
    if module.name not in needs_extra:
        importlib.import_module(module.name)
try:
    import trl_marble.rewards.server
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("The reward server needs fastapi and uvicorn, which the extra `server` installs")
