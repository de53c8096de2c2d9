# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Docstrings in the format of TRL and Hugging Face as Markdown: an extension of griffe, with which mkdocstrings reads
Python.

Sections (`Args:`, `Parameters:`, `Returns:`, ...) become lists, and names become links: to our own pages where a name
is public here, to the documentation of another library where it is in `FOREIGN`, and code where it is neither.
"""

import html
import re
import textwrap
from collections.abc import Callable

import griffe


logger = griffe.get_logger("hf_docstrings")

SECTIONS = {
    "Args": "Parameters",
    "Parameters": "Parameters",
    "Attributes": "Attributes",
    "Returns": "Returns",
    "Yields": "Yields",
    "Raises": "Raises",
    "Example": "Example",
    "Examples": "Examples",
}
SECTION = re.compile(rf"^({'|'.join(SECTIONS)}):$")
# "name (`type`, *optional*, defaults to `x`): text"; the text may begin on the next line, and what a library passes on
# to its own has no type.
PARAMETER = re.compile(r"^(?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)*)(?: \((?P<type>.+?)\))?:(?: (?P<text>.*))?$")
REFERENCE = re.compile(r"\[`(?P<short>~?)(?P<name>[\w.]+)`\](?![(\[])")
CODE = re.compile(r"`(?P<code>[^`]+)`")
DOTTED_NAME = re.compile(r"[A-Za-z_][\w.]*")

HUGGING_FACE = "https://huggingface.co/docs"
FOREIGN = {
    "PIL.Image.Image": "https://pillow.readthedocs.io/en/stable/reference/Image.html#PIL.Image.Image",
    "accelerate.Accelerator": f"{HUGGING_FACE}/accelerate/package_reference/accelerator#accelerate.Accelerator",
    "argparse.ArgumentParser": "https://docs.python.org/3/library/argparse.html#argparse.ArgumentParser",
    "datasets.Dataset": f"{HUGGING_FACE}/datasets/package_reference/main_classes#datasets.Dataset",
    "diffusers.DiffusionPipeline": f"{HUGGING_FACE}/diffusers/api/pipelines/overview#diffusers.DiffusionPipeline",
    "diffusers.PipelineQuantizationConfig": (
        f"{HUGGING_FACE}/diffusers/api/quantization#diffusers.PipelineQuantizationConfig"
    ),
    "diffusers.SchedulerMixin": f"{HUGGING_FACE}/diffusers/api/schedulers/overview#diffusers.SchedulerMixin",
    "diffusers.StableDiffusion3Pipeline": (
        f"{HUGGING_FACE}/diffusers/api/pipelines/stable_diffusion/stable_diffusion_3"
        "#diffusers.StableDiffusion3Pipeline"
    ),
    "peft.LoraConfig": f"{HUGGING_FACE}/peft/package_reference/lora#peft.LoraConfig",
    "rich.console.Console": "https://rich.readthedocs.io/en/stable/reference/console.html#rich.console.Console",
    "rich.table.Table": "https://rich.readthedocs.io/en/stable/reference/table.html#rich.table.Table",
    "torch.Tensor": "https://docs.pytorch.org/docs/stable/tensors.html#torch.Tensor",
    "transformers.CLIPModel": f"{HUGGING_FACE}/transformers/model_doc/clip#transformers.CLIPModel",
    "transformers.Dinov2Model": f"{HUGGING_FACE}/transformers/model_doc/dinov2#transformers.Dinov2Model",
    "transformers.CLIPTokenizer": f"{HUGGING_FACE}/transformers/model_doc/clip#transformers.CLIPTokenizer",
    "transformers.Trainer": f"{HUGGING_FACE}/transformers/main_classes/trainer#transformers.Trainer",
    "transformers.Trainer.push_to_hub": (
        f"{HUGGING_FACE}/transformers/main_classes/trainer#transformers.Trainer.push_to_hub"
    ),
    "transformers.Trainer.train": f"{HUGGING_FACE}/transformers/main_classes/trainer#transformers.Trainer.train",
    "transformers.TrainerCallback": f"{HUGGING_FACE}/transformers/main_classes/callback#transformers.TrainerCallback",
    "transformers.TrainerState": f"{HUGGING_FACE}/transformers/main_classes/callback#transformers.TrainerState",
    "transformers.TrainingArguments": (
        f"{HUGGING_FACE}/transformers/main_classes/trainer#transformers.TrainingArguments"
    ),
    "trl.TrlParser": f"{HUGGING_FACE}/trl/script_utils#trl.TrlParser",
}
# Where a type is named without its library there is one that can be meant.
FOREIGN_SHORT = {"Tensor": FOREIGN["torch.Tensor"]}

Linker = Callable[[str], str | None]
"""From a name as written in a docstring to an HTML link with the text `{}`, or `None` where it has no page."""


def public_paths(package: griffe.Module) -> dict[str, str]:
    """
    What a package offers.

    Args:
        package (`griffe.Module`):
            A loaded package.

    Returns:
        `dict[str, str]`: for every object in an `__all__` of the package or of a package in it, the path of its
        definition and the path it is documented by: the shortest one that is public.
    """
    paths: dict[str, str] = {}
    modules = [package]
    while modules:
        module = modules.pop()
        modules += [member for member in module.modules.values() if not member.is_alias]
        for name in module.exports or []:
            name = str(getattr(name, "name", name))  # griffe has an expression where `__all__` adds up other lists
            if name.startswith("__"):
                continue
            member = module[name]
            target = member.final_target.path if member.is_alias else member.path
            path = f"{module.path}.{name}"
            if target not in paths or len(path) < len(paths[target]):
                paths[target] = path
    return paths


def to_markdown(docstring: str, link: Linker, where: str = "", anchor: str | None = None) -> str:
    """
    Turn a docstring into Markdown.

    Args:
        docstring (`str`):
            The docstring, without its indentation.
        link (`Callable[[str], str | None]`):
            See `Linker`.
        where (`str`, *optional*, defaults to `""`):
            Path of the object, for messages.
        anchor (`str`, *optional*):
            Where given, each parameter gets the anchor `<anchor>.<name>`.

    Raises:
        `ValueError`: If an entry of a section of parameters does not read ``name (`type`): text``.
    """
    parts = []
    for title, lines in _sections(docstring):
        text = textwrap.dedent("\n".join(lines)).strip("\n")
        if title is None:
            parts.append(_outside_fences(text, lambda prose: _references(prose, link)))
            continue
        if SECTIONS[title] in ("Parameters", "Attributes"):
            text = _parameters(text, link, where, anchor)
        elif SECTIONS[title] == "Raises":
            text = "\n".join(f"- {_indented(_leading_type(entry, link))}" for entry in _entries(text))
        elif SECTIONS[title] in ("Returns", "Yields"):
            # The text goes on below the type, at the same indentation or deeper: one paragraph either way.
            text = _leading_type(textwrap.dedent(text), link)
        parts.append(f"**{SECTIONS[title]}**\n{{ .doc-part }}\n\n{text}")
    return "\n\n".join(part for part in parts if part)


def _sections(docstring: str) -> list[tuple[str | None, list[str]]]:
    """The lines of a docstring by sections; what is under no title has the title `None`."""
    sections: list[tuple[str | None, list[str]]] = [(None, [])]
    for line in docstring.splitlines():
        if match := SECTION.match(line):
            sections.append((match[1], []))
        elif sections[-1][0] is not None and line and not line.startswith(" ") and not _is_example(sections[-1]):
            sections.append((None, [line]))
        else:
            sections[-1][1].append(line)
    return sections


def _is_example(section: tuple[str | None, list[str]]) -> bool:
    """Whether a section is an example, whose code may stand without indentation."""
    return section[0] is not None and section[0].startswith("Example")


def _entries(text: str) -> list[str]:
    """The entries of a section: each begins at the margin, and its further lines are indented."""
    entries: list[list[str]] = []
    for line in text.splitlines():
        if line and not line.startswith(" "):
            entries.append([line])
        elif entries:
            entries[-1].append(line)
    return [
        "\n".join([first, textwrap.dedent("\n".join(rest))]).strip() if rest else first for first, *rest in entries
    ]


def _parameters(text: str, link: Linker, where: str, anchor: str | None) -> str:
    items = []
    for entry in _entries(text):
        first, _, rest = entry.partition("\n")
        if first.startswith("> "):
            items.append(f"\n*{first.removeprefix('> ').rstrip('.:')}*\n{{ .doc-group }}\n")
            continue
        match = PARAMETER.match(first)
        if match is None:
            raise ValueError(f"{where}: {first!r} does not read `name (`type`): text`.")
        names = [
            # As HTML: mkdocstrings would put the object's path before the identifiers of attribute lists.
            f'<code id="{anchor}.{name.lstrip("*")}">{_escaped(name)}</code>' if anchor else f"`{name}`"
            for name in match["names"].split(", ")
        ]
        body = "\n".join(part for part in (match["text"], rest) if part)
        body = _outside_fences(body, lambda prose: _references(prose, link))
        kind = f" ({_types(match['type'], link)})" if match["type"] else ""
        items.append(f"- {', '.join(names)}{kind}: {_indented(body)}")
    return "\n".join(items)


def _leading_type(text: str, link: Linker) -> str:
    """A text that begins with a type, up to the first colon outside of code."""
    head = re.match(r"(?:`[^`]*`|[^`:])*:", text)
    if head is None:
        return _references(text, link)
    return _types(head[0], link) + _references(text[head.end() :], link)


def _types(text: str, link: Linker) -> str:
    """A description of types, with links from the names in its code."""
    return CODE.sub(lambda match: _linked_code(match["code"], link), _references(text, link))


def _linked_code(code: str, link: Linker) -> str:
    """Code as HTML, with links from the names that have a page; Markdown if no name has."""
    if '"' in code or "'" in code:
        return f"`{code}`"  # a value, not a type
    found = False

    def replace(match: re.Match[str]) -> str:
        nonlocal found
        page = link(match[0])
        found = found or page is not None
        return page.format(match[0]) if page else _escaped(match[0])

    pieces, end = [], 0
    for match in DOTTED_NAME.finditer(code):
        pieces += [_escaped(code[end : match.start()]), replace(match)]
        end = match.end()
    pieces.append(_escaped(code[end:]))
    return f"<code>{''.join(pieces)}</code>" if found else f"`{code}`"


def _escaped(code: str) -> str:
    """Code between HTML tags, where Markdown would go on to read it."""
    return re.sub(r"[*_\[\]`]", lambda match: f"&#{ord(match[0])};", html.escape(code, quote=False))


def _references(text: str, link: Linker) -> str:
    """Text in which [`name`] and [`~package.name`] are links."""

    def replace(match: re.Match[str]) -> str:
        name = match["name"]
        shown = name.rsplit(".", 1)[-1] if match["short"] else name
        page = link(name)
        return f"<code>{page.format(shown)}</code>" if page else f"`{shown}`"

    return REFERENCE.sub(replace, text)


def _outside_fences(text: str, change: Callable[[str], str]) -> str:
    """Change what is not in a fenced block."""
    parts = re.split(r"(^ *```.*?^ *```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if index % 2 else change(part) for index, part in enumerate(parts))


def _indented(text: str) -> str:
    """Text after the mark of a list: further lines under it."""
    return textwrap.indent(text, "    ").strip()


class HuggingFaceDocstrings(griffe.Extension):
    """Rewrites the docstrings of a package when it has been loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: object) -> None:
        """Rewrite every docstring of the package."""
        public = public_paths(pkg)
        # By the last part of the name too, where only one public object has it.
        by_name: dict[str, list[str]] = {}
        for path in public.values():
            by_name.setdefault(path.rsplit(".", 1)[-1], []).append(path)

        def find(name: str) -> str | None:
            """The path that a name is documented by."""
            if name in public.values():
                return name
            if name in public:
                return public[name]
            paths = by_name.get(name, [])
            if len(paths) == 1:
                return paths[0]
            owner, _, member = name.rpartition(".")
            found = find(owner) if owner and owner != pkg.path else None
            # A method of a public class: shown on the page of its class if it says what it does.
            if found is not None and (method := pkg[found.removeprefix(f"{pkg.path}.")].all_members.get(member)):
                return f"{found}.{member}" if method.has_docstring else None
            return None

        def linker(owner: str | None) -> Linker:
            def link(name: str) -> str | None:
                if address := FOREIGN.get(name) or FOREIGN_SHORT.get(name):
                    return f'<a href="{address}">{{}}</a>'
                path = find(name)
                if path is None and owner is not None and "." not in name:
                    path = find(f"{owner}.{name}")  # a method that a docstring of its own class names
                return f'<autoref identifier="{path}">{{}}</autoref>' if path else None

            return link

        def rewrite(obj: griffe.Object, owner: str | None) -> None:
            documented = public.get(obj.path) or (f"{owner}.{obj.name}" if owner and obj.is_public else None)
            of_class = documented if obj.is_class else owner
            if obj.docstring is not None:
                try:
                    obj.docstring.value = to_markdown(obj.docstring.value, linker(of_class), obj.path, documented)
                except ValueError as error:
                    logger.warning(str(error))
            for member in obj.members.values():
                if isinstance(member, griffe.Object):  # and not an alias of one that is elsewhere
                    rewrite(member, documented if obj.is_class else None)

        rewrite(pkg, None)
