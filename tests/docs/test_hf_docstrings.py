# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The reading of docstrings in Hugging Face's format, and that what they name can be found."""

import importlib
import importlib.util
import re
from pathlib import Path

import griffe
import pytest


ROOT = Path(__file__).parents[2]
OURS = {"Reward": "pkg.Reward", "pkg.rewards.Reward": "pkg.Reward"}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("hf_docstrings", ROOT / "docs" / "_tools" / "hf_docstrings.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def render(tool):
    def link(name):
        return f'<a href="#{OURS[name]}">{{}}</a>' if name in OURS else None

    return lambda text, anchor=None: tool.to_markdown(text, link, "pkg.function", anchor)


def test_every_section_in_one_docstring(render):
    text = """What it does, see [`Reward`] and [`~pkg.rewards.Reward`], not [`Unknown`].

Args:
    rewards (`list[Reward]`, *optional*, defaults to `(None, None)`):
        First line
        and the second.
    *args (`str` or [`Reward`]): In one line.

Returns:
    `dict[str, Reward]`: By name.

Raises:
    [`Reward`]: First.
    `ValueError`: Second, over
        two lines.
"""
    assert render(text, anchor="pkg.function") == "\n\n".join(
        [
            'What it does, see <code><a href="#pkg.Reward">Reward</a></code> and '
            '<code><a href="#pkg.Reward">Reward</a></code>, not `Unknown`.',
            "**Parameters**\n{ .doc-part }",
            '- <code id="pkg.function.rewards">rewards</code> '
            '(<code>list&#91;<a href="#pkg.Reward">Reward</a>&#93;</code>, '
            "*optional*, defaults to `(None, None)`): First line\n    and the second.\n"
            '- <code id="pkg.function.args">&#42;args</code> '
            '(`str` or <code><a href="#pkg.Reward">Reward</a></code>): '
            "In one line.",
            "**Returns**\n{ .doc-part }",
            '<code>dict&#91;str, <a href="#pkg.Reward">Reward</a>&#93;</code>: By name.',
            "**Raises**\n{ .doc-part }",
            '- <code><a href="#pkg.Reward">Reward</a></code>: First.\n- `ValueError`: Second, over\n    two lines.',
        ]
    )


def test_groups_of_parameters(render):
    first = "    > Parameters that control\n\n    a (`int`):\n        One.\n"
    text = f"Parameters:\n{first}\n    > Others\n\n    b (`int`):\n        Two."
    markdown = render(text)
    assert "*Parameters that control*\n{ .doc-group }" in markdown and "*Others*\n{ .doc-group }" in markdown
    assert markdown.index("control") < markdown.index("One.") < markdown.index("Others") < markdown.index("Two.")


def test_lists_and_paragraphs_of_a_parameter_stay_under_it(render):
    text = "Args:\n    a (`int`):\n        One of:\n\n        - this\n        - that\n\n        And more."
    assert "- `a` (`int`): One of:\n\n    - this\n    - that\n\n    And more." in render(text)


def test_code_is_left_alone(render):
    example = "Example:\n\n```python\nArgs = [`Reward`]\n\nprint(Args)\n```"
    assert example.removeprefix("Example:\n\n") in render(example)
    assert render('Args:\n    a (`str`, defaults to `"x/Reward"`): T.').endswith(
        '- `a` (`str`, defaults to `"x/Reward"`): T.'
    )


def test_prose_goes_on_after_a_section(render):
    markdown = render("Args:\n    a (`int`): One.\n\nWhat follows is prose.")
    assert markdown.endswith("- `a` (`int`): One.\n\nWhat follows is prose.")


def test_an_entry_that_cannot_be_read_is_refused_by_name(render):
    with pytest.raises(ValueError, match=r"pkg\.function: '`a` is the first' does not read"):
        render("Args:\n    `a` is the first")


@pytest.fixture(scope="module")
def package():
    return griffe.load("trl_marble", search_paths=[str(ROOT)])


def docstrings(obj):
    for member in obj.members.values():
        if not member.is_alias:
            if member.docstring is not None:
                yield member.path, member.docstring.value
            yield from docstrings(member)


def test_every_docstring_of_the_package_can_be_read(tool, package):
    found = 0
    for path, text in docstrings(package):
        markdown = tool.to_markdown(text, lambda name: None, path)
        assert not re.search(r"^(Args|Parameters|Attributes|Returns|Raises|Yields):$", markdown, re.MULTILINE), path
        found += 1
    assert found > 100


def test_other_libraries_have_what_is_linked(tool):
    for name in tool.FOREIGN:
        parts = name.split(".")
        for split in range(len(parts) - 1, 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:split]))
            except ImportError:
                continue
            for part in parts[split:]:
                found = getattr(found, part)
            break
        else:
            raise AssertionError(f"{name} cannot be imported")


def test_a_reference_to_another_library_is_one_that_is_linked_or_private(tool, package):
    names = {match["name"] for _, text in docstrings(package) for match in tool.REFERENCE.finditer(text)}
    foreign = {name for name in names if "." in name and not name.startswith("trl_marble.") and name[0].islower()}
    unknown = {name for name in foreign if name not in tool.FOREIGN}
    # Only named on pages that no public object is on.
    assert unknown <= {"transformers.BlipTextConfig", "transformers.BlipVisionConfig"}
