# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Runs the documents: what a page shows is executed as it stands, only small.

[`DocRunner`] starts this file as a process that imports torch, diffusers and the package once, and then forks for each
page. In the page's process

- Python blocks run in order and share their names;
- bash blocks run in bash, with commands in front of the `PATH` that hand what they were called with back to the page's
  process, which runs it in a fork of itself: no second import, and the same small settings;
- yaml blocks are read as the command line reads them.

What is small: `MarbleConfig` and `EvaluationConfig` take at most the values below wherever they are made, evaluations
use a few of their prompts, benchmarks get further arguments, everything is on the CPU, and the Hub is that of
tests/support/little_hub.py. The files that pages rely on are made in `prepare`.
"""

import contextlib
import functools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from PIL import Image


ROOT = Path(__file__).resolve().parents[2]
PAGE_SECONDS = 150

SMALL_TRAINING = {
    "max_steps": 2,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 4,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 1,
    "rollout_batch_size": 4,
    "num_generations": 2,
    "num_generations_eval": 1,
    "num_inference_steps": 2,
    "eval_steps": 1,
    "save_steps": 1,
    "logging_steps": 1,
    "height": 16,
    "width": 16,
}
SMALL_EVALUATION = {"num_generations": 4, "num_inference_steps": 2, "batch_size": 8, "height": 16, "width": 16}
# Left as they are where a page does not set them, because nothing is the smallest there is.
ONLY_IF_GIVEN = ("eval_steps", "height", "width", "steps_per_generation", "rollout_batch_size")
EVALUATED_PROMPTS = 6

# What a program gets besides the arguments that are shown; of two values the later one counts.
SMALL_ARGUMENTS = {
    "examples/benchmarks/step_cost.py": (
        "--model tiny --rewards 2 --repeats 1 --prompts 1 --num_generations 4 --batch_size 4 --num_inference_steps 2 "
        "--modes weighted_sum exact"
    ),
    "examples/benchmarks/balance_schedules.py": "--seeds 1 --schedules 'every step'",
    "examples/benchmarks/memory.py": "--models tiny",
    "examples/benchmarks/gpu_table.py": "--size tiny --device cpu --parts machine",
    "examples/scripts/sd3_five_rewards.py": "--num_generated_prompts 8",
    "trl-marble selftest": "--minutes 0.1",
    "trl-marble vote": "--port 0",
}
# Commands that a page takes for granted, such as the demo, whose adapter it goes on with.
EVALUATE = "trl-marble eval --model shapeworld --prompts shapeworld --rewards shapeworld --num_inference_steps 8"
PREPARED = {
    "docs/evaluation.md": "trl-marble demo",
    "docs/hub.md": f"""
trl-marble demo
trl-marble demo --seed 1 --output_dir runs/dark
{EVALUATE} --output_dir evals/base
{EVALUATE} --adapter runs/demo --output_dir evals/demo
""",
    "docs/troubleshooting.md": """
trl-marble train --model stabilityai/stable-diffusion-3.5-medium --prompts captions.txt --rewards clipscore \\
    --height 512 --width 512 --output_dir sd3.5m-marble
""",
}
MY_REWARDS = """
def sharpness(images, **kwargs):
    return [image.convert("L").getextrema()[1] / 255 for image in images]
"""
# Of the quick start, for the pages that come later.
TRAIN_YAML = "model: shapeworld\nprompts: [shapeworld]\nrewards: [shapeworld]\noutput_dir: runs/mine\n"

PATH = os.pathsep.join([os.path.dirname(sys.executable), "/usr/local/bin", "/usr/bin", "/bin"])
PROGRAMS = ("python", "python3", "accelerate", "trl-marble", "pip", "make")

SHIM = """#!{python} -SE
import json, os, socket, sys
if sys.argv[1:2] == ["-c"]:
    os.execv({real!r}, [{real!r}, *sys.argv[1:]])
call = {{"words": [os.path.basename(sys.argv[0]), *sys.argv[1:]], "cwd": os.getcwd(), "environment": dict(os.environ)}}
with socket.socket(socket.AF_UNIX) as page:
    page.connect({address!r})
    socket.send_fds(page, [b"x"], [0, 1, 2])
    page.sendall(json.dumps(call).encode() + b"\\n")
    sys.exit(int(page.makefile().readline() or 1))
"""


class DocRunner:
    """
    The process that runs pages.

    Args:
        environment (`dict[str, str]`):
            Its environment, see `LocalHub.environment`.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, page: str, folder: Path) -> str | None:
        """
        Run a page.

        Args:
            page (`str`):
                Its path in the repository.
            folder (`Path`):
                An empty folder to run it in.

        Returns:
            `str`, *optional*: What went wrong, with the page's output, or `None` if nothing did.
        """
        assert self.process.stdin is not None and self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # there is no answer then
            self.process.stdin.write(json.dumps({"page": page, "folder": str(folder)}) + "\n")
            self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            return f"the process that runs pages ended with status {self.process.wait()}"
        return json.loads(answer)["error"]

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait(timeout=30)


def prepare(page: str) -> None:
    """Make in the current folder what the page takes for granted."""
    Path("examples").symlink_to(ROOT / "examples")
    prompts = ["a red apple", "a street at night", 'a sign that says "open"', "two dogs", "a boat", "an old clock"]
    lines = "".join(f"{prompt}\n" for prompt in prompts)
    rows = [
        {"prompt": f"a photo of two {name}s", "tag": "counting", "include": [{"class": name, "count": 2}]}
        for name in ("dog", "cat", "bird", "boat")
    ]
    files = {
        "prompts.txt": lines,
        "captions.txt": lines,
        "prompts.csv": "prompt\n" + lines.replace('"', ""),
        "my_rewards.py": MY_REWARDS,
    }
    files["train.yaml"] = TRAIN_YAML
    for split in ("train", "test"):
        files |= {f"dataset/{name}/{split}.txt": lines for name in ("pickscore", "ocr")}
        files[f"dataset/geneval/{split}_metadata.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows)
    for name, text in files.items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text)
    Path("photos").mkdir()
    for name, colour in (("street", "grey"), ("harbour", "blue")):
        Image.new("RGB", (96, 64), colour).save(f"photos/{name}.png")
    if page in PREPARED:
        run_bash(PREPARED[page], f"what is prepared for {page}")


# ---- Small settings ----


def at_most(config: type, limits: dict[str, int], fixed: dict[str, Any]) -> None:
    """Make every new object of a dataclass small."""
    original = config.__init__

    @functools.wraps(original)
    def small(self: Any, output_dir: str | None = None, **settings: Any) -> None:
        for name, limit in limits.items():
            value = settings.get(name)
            if value is None and name in ONLY_IF_GIVEN:
                continue
            # A value that is not allowed stays, so that it is refused as the page says.
            if value is None or (name == "max_steps" and value < 0) or value > limit:
                settings[name] = limit
        if settings.get("policy_loss") == "grpo" or "regularizer_fraction" in settings:
            settings["num_inference_steps"] = 3  # more than add noise; a part of one trained step would be refused
        if settings.get("per_device_train_batch_size", 0) > 0:  # else the groups of a prompt would not be whole
            settings["per_device_train_batch_size"] = limits["per_device_train_batch_size"]
        positional = () if output_dir is None else (output_dir,)
        original(self, *positional, **(settings | fixed))

    config.__init__ = small  # type: ignore[misc]


def some_rows(dataset: Any) -> Any:
    """A few rows from all over a prompt set."""
    if dataset is None or len(dataset) <= EVALUATED_PROMPTS:
        return dataset
    return dataset.select(range(0, len(dataset), -(-len(dataset) // EVALUATED_PROMPTS)))


def make_small() -> None:
    """Replace, in this process and its forks, what would take long or needs a GPU."""
    import diffusers

    import trl_marble
    import trl_marble.evaluation

    at_most(trl_marble.MarbleConfig, SMALL_TRAINING, {"use_cpu": True})
    evaluate_policy = trl_marble.MarbleNFTTrainer.evaluate

    @functools.wraps(evaluate_policy)
    def evaluate(self: Any, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        return evaluate_policy(
            self, some_rows(self.eval_dataset if eval_dataset is None else eval_dataset), *args, **kwargs
        )

    trl_marble.MarbleNFTTrainer.evaluate = evaluate  # type: ignore[method-assign]

    at_most(trl_marble.evaluation.EvaluationConfig, SMALL_EVALUATION, {})
    evaluate_all = trl_marble.evaluation.evaluate_pipeline

    @functools.wraps(evaluate_all)
    def evaluate_some(pipeline: Any, reward_funcs: Any, prompts: Any, args: Any) -> Any:
        return evaluate_all(pipeline, reward_funcs, some_rows(prompts), args)

    trl_marble.evaluation.evaluate_pipeline = evaluate_some

    move = diffusers.DiffusionPipeline.to

    @functools.wraps(move)
    def stay(self: Any, *args: Any, **kwargs: Any) -> Any:
        return move(self, *("cpu" if str(each).startswith("cuda") else each for each in args), **kwargs)

    diffusers.DiffusionPipeline.to = stay

    for pipeline in (diffusers.StableDiffusion3Pipeline, diffusers.FluxPipeline):
        pipeline.__call__ = at_tiny_size(pipeline.__call__)


def at_tiny_size(sample: Callable[..., Any]) -> Callable[..., Any]:
    """A pipeline's call that makes images of 16 pixels where more than a hundred are asked for."""

    @functools.wraps(sample)
    def small(self: Any, *args: Any, **kwargs: Any) -> Any:
        for side in ("height", "width"):
            if (kwargs.get(side) or 0) > 100:
                kwargs[side] = SMALL_TRAINING[side]
        return sample(self, *args, **kwargs)

    return small


# ---- The page's process ----


def run_page(page: str) -> None:
    """Run every block of a page in the current folder; raises what the first that fails raises."""
    from doc_blocks import CHECKED, SHOWN, read_blocks

    prepare(page)
    sys.path.insert(0, os.getcwd())
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in read_blocks(page):
        place = f"{page}:{block.line}"
        print(f"---- {place} {block.language}", flush=True)
        if block.language not in (*CHECKED, *SHOWN):
            raise ValueError(f"{place}: the block is {block.language!r}; use one of {', '.join((*CHECKED, *SHOWN))}.")
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.code)
        if block.language == "python":
            # With the page's line numbers, so that a traceback leads to the document.
            code = compile("\n" * (block.line - 1) + block.code, str(ROOT / page), "exec")
            if block.title is None:
                if block.alone:
                    names = {"__name__": "__main__"}
                exec(code, names)
        elif block.language == "bash":
            run_bash(block.code, place)
        elif block.language == "yaml":
            check_yaml(block.code, place)
    print("---- end", flush=True)


def run_bash(code: str, place: str) -> None:
    """Run a block in bash; what it exports is in the environment of what follows."""
    Path(".bin").mkdir(exist_ok=True)
    address = str(Path(".bin", "page").resolve())
    Path(address).unlink(missing_ok=True)
    for program in PROGRAMS:
        shim = Path(".bin", program)
        shim.write_text(SHIM.format(python=sys.executable, real=sys.executable, address=address))
        shim.chmod(0o755)
    script = f"set -euo pipefail\n{code}\nenv -0 > .bin/environment\n"
    path = os.pathsep.join([str(Path(".bin").resolve()), PATH])
    with socket.socket(socket.AF_UNIX) as listener:
        os.chdir(".bin")  # the name of a socket may be no longer than a hundred characters
        listener.bind("page")
        os.chdir("..")
        listener.listen()
        listener.settimeout(0.05)
        bash = subprocess.Popen(["bash", "-c", script], env=os.environ | {"PATH": path, "HOME": os.getcwd()})
        while bash.poll() is None:
            with contextlib.suppress(TimeoutError):
                answer_call(listener.accept()[0])
    if bash.returncode != 0:
        raise RuntimeError(f"{place}: bash ended with status {bash.returncode}")
    after = dict(line.split("=", 1) for line in Path(".bin/environment").read_text().split("\0") if line)
    os.environ.update(
        {name: value for name, value in after.items() if name not in ("PATH", "HOME", "PWD", "_", "SHLVL")}
    )


def answer_call(connection: socket.socket) -> None:
    """Run what a shim was called with, in a fork whose output is the shim's, and tell it the exit status."""
    with connection:
        _, files, _, _ = socket.recv_fds(connection, 1, 3)
        call = json.loads(connection.makefile().readline())
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            status = 1
            try:
                renew_threads()
                for number, file in enumerate(files):
                    os.dup2(file, number)
                os.chdir(call["cwd"])
                os.environ.clear()
                os.environ.update(call["environment"])
                os.environ["PATH"] = PATH  # a command that runs others runs the real ones
                run_command(call["words"])
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                with contextlib.suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)
        for file in files:
            os.close(file)
        _, status = os.waitpid(child, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status) % 256}\n".encode())


def renew_threads() -> None:
    """Let torch make its threads anew after a fork, before several threads ask for them at once and one fails."""
    import torch

    torch.set_num_threads(1)


def run_command(words: list[str]) -> None:
    """Run a command of a document in this process."""
    program, *words = words
    if program == "make":
        sys.exit(subprocess.run(["make", "-n", "-C", str(ROOT), *words], stdout=subprocess.DEVNULL).returncode)
    elif program == "pip":
        check_installation(words)
    elif program == "trl-marble":
        run_cli(words)
    elif program == "accelerate":
        from accelerate.commands.launch import launch_command_parser

        if words[:1] != ["launch"]:
            raise ValueError(f"accelerate {shlex.join(words)}: only `accelerate launch` can be run.")
        arguments = launch_command_parser().parse_args(words[1:])  # in one process, whatever it says
        run_python((["-m"] if arguments.module else []) + [arguments.training_script, *arguments.training_script_args])
    else:
        run_python(words)


def run_cli(words: list[str]) -> None:
    from trl_marble.cli import launching
    from trl_marble.cli.main import main

    os.environ[launching.LAUNCHED] = "1"  # in one process, whatever the command says
    if words[0] == "vote":
        from trl_marble.rewards.vote_server import VoteServer

        os.environ["TRL_MARBLE_VOTE_TOKEN"] = "of-the-page"  # its output is no terminal
        VoteServer.run = lambda self: None  # type: ignore[method-assign]
    words = [*words, *shlex.split(SMALL_ARGUMENTS.get(f"trl-marble {words[0]}", ""))]
    sys.argv = ["trl-marble", *words]
    sys.exit(main(words))


def run_python(words: list[str]) -> None:
    """Run `python` with these arguments: a module or a script."""
    import runpy

    if words[:2] == ["-m", "pip"]:
        check_installation(words[2:])
    elif words[:2] == ["-m", "trl_marble.rewards.server"]:
        run_server(words[2:])
    elif words[:2] == ["-m", "trl_marble.cli.main"]:
        run_cli(words[2:])
    elif words[0] == "-m":
        raise ValueError(f"python {shlex.join(words)}: say in tests/support/doc_runner.py how to run this module.")
    else:
        script, *arguments = words
        sys.argv = [script, *arguments, *shlex.split(SMALL_ARGUMENTS.get(script, ""))]
        sys.path[0] = str(Path(script).resolve().parent)
        runpy.run_path(script, run_name="__main__")


def run_server(arguments: list[str]) -> None:
    """Start the reward server on a free port, and stop it as soon as it serves."""
    from trl_marble.rewards import server

    say = print

    def stop_when_serving(*text: Any, **how: Any) -> None:
        say(*text, **how)
        if str(text[0]).startswith("Serving"):
            raise KeyboardInterrupt  # not the signal, which is ignored in the background of a shell

    server.print = stop_when_serving  # type: ignore[attr-defined]
    sys.argv = ["server", *arguments, "--device", "cpu", "--port", "0"]
    server.main()


def check_installation(words: list[str]) -> None:
    """Refuse an installation of this package by its name, or with extras that it does not have."""
    import tomllib

    from packaging.requirements import InvalidRequirement, Requirement

    if words[:1] != ["install"]:
        raise ValueError(f"pip {shlex.join(words)}: only `pip install` can be checked.")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in words[1:]:
        checkout = re.fullmatch(r"\.(\[[\w,-]+\])?", word)  # "-e .[dev]"
        with contextlib.suppress(InvalidRequirement):  # an option
            requirement = Requirement(project["name"] + word[1:] if checkout else word)
            if requirement.name.replace("-", "_") == project["name"]:
                if not checkout:
                    raise ValueError(f"{project['name']} is not on PyPI; write `pip install .`")
                if unknown := requirement.extras - set(project["optional-dependencies"]):
                    raise ValueError(f"{project['name']} has no extra {', '.join(sorted(unknown))}")


def check_yaml(text: str, place: str) -> None:
    """Refuse a configuration with a key that nothing reads, or a value that is refused."""
    import dataclasses
    import runpy

    import yaml
    from accelerate.commands.config.config_args import ClusterConfig

    from trl_marble import MarbleConfig
    from trl_marble.cli import train
    from trl_marble.cli.eval import ScriptArguments as EvaluationArguments
    from trl_marble.evaluation import EvaluationConfig

    settings = yaml.safe_load(text)
    if not isinstance(settings, dict):
        raise ValueError(f"{place}: this is no configuration: {settings!r}")
    if "compute_environment" in settings or "distributed_type" in settings:
        known = {field.name for field in dataclasses.fields(ClusterConfig)}
        candidates: list[tuple[type, ...]] = []
    else:
        known = {"env"}
        recipe = runpy.run_path(str(ROOT / "examples/scripts/sd3_five_rewards.py"))["ScriptArguments"]
        candidates = [
            (train.ScriptArguments, MarbleConfig),
            (recipe, MarbleConfig),
            (EvaluationArguments, EvaluationConfig),
        ]
    failures = []
    for classes in candidates or [()]:
        fields = [{field.name for field in dataclasses.fields(each) if field.init} for each in classes]
        if unknown := set(settings) - known.union(*fields):
            failures.append(f"{', '.join(sorted(unknown))} is no setting of {[each.__name__ for each in classes]}")
            continue
        if classes:
            own = {name: value for name, value in settings.items() if name in fields[-1]}
            classes[-1](**({"output_dir": "run"} | own))
        return
    raise ValueError(f"{place}: {'; '.join(failures)}")


# ---- The process that forks for each page ----


@contextlib.contextmanager
def output_to(path: Path) -> Iterator[None]:
    """Send everything that this process and its children write to a file."""
    with path.open("wb") as file:
        for number in (1, 2):
            os.dup2(file.fileno(), number)
        yield


def in_fork(function: Callable[[], None], log: Path) -> str | None:
    """Call a function in a fork of this process; what it raised and wrote if it failed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            renew_threads()
            with output_to(log):
                signal.alarm(PAGE_SECONDS)
                function()
                status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            with contextlib.suppress(Exception):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(status)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code == 0:
        return None
    why = f"longer than {PAGE_SECONDS} s" if code == -signal.SIGALRM else f"status {code}"
    return f"{why}\n{log.read_text(errors='replace')[-12000:]}"


def main() -> None:
    """Answer one line of JSON for each page that is asked for, until there is no more."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    import diffusers  # noqa: F401
    import torch
    import trl  # noqa: F401

    torch.set_num_threads(1)
    make_small()
    for line in sys.stdin:
        request = json.loads(line)

        def run(page: str = request["page"], folder: str = request["folder"]) -> None:
            os.chdir(folder)
            run_page(page)

        error = in_fork(run, Path(request["folder"]).parent / (Path(request["folder"]).name + ".log"))
        replies.write(json.dumps({"error": error}) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
