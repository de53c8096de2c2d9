# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Every code block of the README and the documents runs; tests/support/doc_runner.py says how, and what is small."""

import pytest
from doc_blocks import Block, pages, parse_blocks, read_blocks
from doc_runner import DocRunner
from little_hub import little_hub


PAGES = [page for page in pages() if read_blocks(page)]
# Pages whose blocks take more than a few seconds. The README's do so too, and always run.
LONG = {
    f"docs/{name}.md"
    for name in (
        "cli distillation evaluation gpu hub losses metrics one_adapter_many_balances pipelines quickstart "
        "reproducing scaling step_cost trainer troubleshooting"
    ).split()
}
assert set(PAGES) >= LONG


@pytest.fixture(scope="module")
def runner(tmp_path_factory):
    """The process that runs pages, and the Hub that it talks to."""
    with little_hub() as hub:
        settings = {"TORCHDYNAMO_DISABLE": "1", "TRACKIO_DIR": str(tmp_path_factory.mktemp("trackio"))}
        runner = DocRunner(hub.environment(tmp_path_factory.mktemp("home")) | settings)
        yield runner
        runner.close()


@pytest.fixture
def run(runner, tmp_path):
    """Run a page in an empty folder; gives what went wrong."""

    def run(page):
        (tmp_path / "page").mkdir()
        return runner.run(page, tmp_path / "page")

    return run


@pytest.mark.parametrize(
    "page", [pytest.param(page, marks=pytest.mark.slow) if page in LONG else page for page in PAGES]
)
def test_the_blocks_of_a_page_run(page, run):
    error = run(page)
    assert error is None, error


# What must not pass: a block, and what is said about it.
WRONG = {
    "python": (
        "```python\nfrom trl_marble import MarbleConfig\n\nMarbleConfig('run', betta=1)\n```",
        'page.md", line 4',
    ),
    "setting": (
        "```python\nfrom trl_marble import MarbleConfig\n\nMarbleConfig('r', num_generations=1)\n```",
        "at least 2",
    ),
    "alone": ("```python\nx = 1\n```\n\n<!-- doctest: alone -->\n```python\nprint(x)\n```", "'x' is not defined"),
    "syntax of a file": ('```python title="a.py"\ndef f(:\n```', "SyntaxError"),
    "missing program": ("```bash\nno-such-program\n```", "page.md:2: bash ended with status 127"),
    "script": (
        "```bash\npython examples/benchmarks/step_cost.py --modell tiny\n```",
        "unrecognized arguments: --modell",
    ),
    "missing script": ("```bash\npython examples/none.py\n```", "No such file"),
    "launcher": ("```bash\naccelerate launch --num_proceses 8 examples/none.py\n```", "status"),
    "command": ("```bash\ntrl-marble trian\n```", "invalid choice: 'trian'"),
    "extra": ('```bash\npip install ".[clipp]"\n```', "no extra clipp"),
    "name": ("```bash\npip install trl_marble\n```", "not on PyPI"),
    "make": ("```bash\nmake no-such-target\n```", "No rule to make target"),
    "yaml": ("```yaml\noutput_dir: run\nnum_generation: 8\n```", "num_generation is no setting"),
    "yaml value": ("```yaml\noutput_dir: run\nnum_generations: 1\n```", "at least 2"),
    "language": ("```\nsomething\n```", "the block is ''"),
    "unclosed": ("```python\nx = 1\n", "has no end"),
    "directive": ("<!-- doctest: skip -->\n```python\nx = 1\n```", "no `doctest: skip`"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_work_is_found(name, run, tmp_path):
    markdown, message = WRONG[name]
    page = tmp_path / "page.md"
    page.write_text(markdown)
    error = run(str(page))
    assert error is not None and message in error, error


def test_blocks_share_names_files_and_variables(run, tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        '```python title="mine.py"\ndef reward(images, **kwargs):\n    return [0.5] * len(images)\n```\n'
        "```bash\nexport ANSWER=$(python -c 'print(42)')  # a comment\n"
        "make help > /dev/null && printenv ANSWER > answer.txt\n```\n"
        "```python\nimport os\nfrom mine import reward\n\nanswer = os.environ['ANSWER']\n```\n"
        "Text.\n"
        "```python\nassert answer + '\\n' == open('answer.txt').read() and reward(images=[1, 2]) == [0.5, 0.5]\n```\n"
        "```text\nnot run\n```\n"
    )
    error = run(str(page))
    assert error is None, error


def test_blocks_are_found_as_markdown_has_them():
    markdown = (
        "Text with `code`.\n\n"
        "```python\na = 1\n```\n"
        '- item\n\n  ```bash title="run.sh"\n  make test\n  ```\n\n'
        "<!-- doctest: alone -->\n\n"
        "````text\n```python\n```\n````\n"
    )
    assert parse_blocks(markdown, "p.md") == [
        Block("p.md", 4, "python", "a = 1\n"),
        Block("p.md", 9, "bash", "make test\n", title="run.sh"),
        Block("p.md", 15, "text", "```python\n```\n", alone=True),
    ]
