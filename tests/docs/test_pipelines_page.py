# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import importlib.util
import json
from pathlib import Path

from trl_marble.pipelines import FAMILIES


PATH = Path(__file__).resolve().parents[2] / "docs" / "_tools" / "pipelines_page.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("pipelines_page", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_table_and_list_as_they_are_now():
    tool = load_tool()
    page = tool.PAGE.read_text()
    assert tool.updated(page) == page, "run: python docs/_tools/pipelines_page.py"
    for family in FAMILIES:
        assert f"`{family.pipeline_class.__name__}`" in page
    # Both are written from FAMILIES, not kept from the page.
    assert tool.updated(page.replace("`QwenImagePipeline`", "`Gone`").replace("`attn.to_k`", "`gone`")) == page


def test_the_table_names_what_is_special():
    rows = {line.split("`")[1]: line for line in load_tool().families_table().splitlines()[2:]}
    assert "`guidance_scale=0` is off" in rows["ZImagePipeline"]
    assert "`true_cfg_scale=1` is off" in rows["QwenImagePipeline"]
    assert "no gradient checkpointing" in rows["ChromaPipeline"]
    assert "one time per call" in rows["AuraFlowPipeline"]
    assert "makes videos" in rows["WanPipeline"] and "makes videos" not in rows["QwenImagePipeline"]
    assert all(line.count("|") == 5 for line in rows.values()), "four cells each"
    assert max(len(code) for line in rows.values() for code in line.split("`")[1::2]) < 30, "too wide for a screen"


def test_every_family_says_which_levels_of_verification_it_has_reached(tmp_path, monkeypatch):
    tool = load_tool()
    known = {family.pipeline_class.__name__ for family in FAMILIES}
    reached = tool.levels()
    assert list(reached) == ["tiny", "published size", "GPU", "real weights"]
    assert known <= reached["tiny"], "the tests of families have a tiny pipeline of each"
    for level in list(reached)[1:]:
        assert reached[level] <= known, level
        assert f"- **{level}**" in tool.PAGE.read_text(), "the page explains it"
    monkeypatch.setattr(tool, "LEVELS", tmp_path / "levels.json")
    tool.LEVELS.write_text(json.dumps({"published size": {"WanPipeline": "2026-12-01"}, "GPU": {}}))
    rows = {line.split("`")[1]: line.split("|")[3].strip() for line in tool.families_table().splitlines()[2:]}
    assert rows["WanPipeline"] == "tiny, published size" and rows["FluxPipeline"] == "tiny"


def test_the_list_has_the_layers_of_every_family():
    lines = load_tool().layers_list().splitlines()
    assert lines[-1] == "- all others: `to_k`, `to_out.0`, `to_q`, `to_v`"
    for family in FAMILIES:
        name, targets = f"`{family.pipeline_class.__name__}`", family.lora_target_modules
        line = next((line for line in lines if name in line.split(": ")[0]), lines[-1])
        layers = line.split(": ", maxsplit=1)[1]
        if isinstance(targets, str):
            assert layers == f"`{targets}` (a regular expression)"
        else:
            assert layers == ", ".join(f"`{target}`" for target in sorted(targets))
