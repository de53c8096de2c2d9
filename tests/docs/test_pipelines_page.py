# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
import importlib.util
from pathlib import Path

from trl_marble.pipelines import FAMILIES


PATH = Path(__file__).resolve().parents[2] / "docs" / "_tools" / "pipelines_page.py"


def load_tool():
    spec = importlib.util.spec_from_file_location("pipelines_page", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_has_the_table_as_it_is_now():
    tool = load_tool()
    page = tool.PAGE.read_text()
    assert tool.updated(page) == page, "run: python docs/_tools/pipelines_page.py"
    for family in FAMILIES:
        assert f"`{family.pipeline_class.__name__}`" in page
    # The table is written from FAMILIES, not kept from the page.
    assert tool.updated(page.replace("`QwenImagePipeline`", "`Gone`")) == page


def test_the_table_names_what_is_special():
    rows = {line.split("`")[1]: line for line in load_tool().families_table().splitlines()[2:]}
    assert "`guidance_scale=0` is off" in rows["ZImagePipeline"]
    assert "`true_cfg_scale=1` is off" in rows["QwenImagePipeline"]
    assert "no gradient checkpointing" in rows["ChromaPipeline"]
    assert "one time a call" in rows["AuraFlowPipeline"]
    assert "makes videos" in rows["WanPipeline"] and "makes videos" not in rows["QwenImagePipeline"]
    assert all(line.count("|") - line.count("\\|") == 5 for line in rows.values()), "four cells each"
