# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""Serves a scorer that runs in an environment of its own, with the reward server of trl_marble.

```bash
python examples/reward_servers/serve.py hps_v3.py --python envs/hpsv3/bin/python --port 8101
```

Run it in the environment of trl_marble, which needs the extra `server`. `README.md` says how to make that of each
scorer. The reward has the name of the scorer's file without its suffix. The token that clients must know is the value
of the environment variable TRL_MARBLE_REWARD_TOKEN, and is needed where others than this machine can connect.
"""

import argparse
import base64
import json
import os
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from trl_marble.rewards.http_client import encode_png
from trl_marble.rewards.server import TOKEN_VARIABLE, RewardServer


HERE = Path(__file__).parent


class ScorerProcess:
    """
    A reward that another Python computes, in a process of its own that is started at once and ends with this one.

    Args:
        script (`Path`):
            A file with a class `Scorer`.
        python (`str`):
            The Python of its environment.
        path (`str`, *optional*):
            Where its imports are looked for too: the folder of a repository that is no package.

    Raises:
        `RuntimeError`: If it cannot be loaded; it has said why.
    """

    def __init__(self, script: Path, python: str, path: str | None = None) -> None:
        self.__name__ = script.stem  # what `reward_names` reads
        environment = {name: value for name, value in os.environ.items() if name != TOKEN_VARIABLE}
        if path is not None:
            environment["PYTHONPATH"] = path
        self._process = subprocess.Popen(
            [python, str(HERE / "worker.py"), str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        self._read()

    def __call__(
        self,
        images: list[Image.Image],
        prompts: list[str],
        trainer_state: Any = None,
        log_metric: Any = None,
        log_extra: Any = None,
        **columns: list,
    ) -> list[float | Exception | None]:
        encoded = [base64.b64encode(encode_png(image)).decode("ascii") for image in images]
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, which is seen where its answer is read
            self._process.stdin.write(json.dumps({"images": encoded, "prompts": prompts, "columns": columns}) + "\n")
            self._process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return [RuntimeError(value["error"]) if isinstance(value, dict) else value for value in answer["values"]]

    def close(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(
                f"The scorer `{self.__name__}` has ended with status {self._process.wait()}; see above."
            )
        return json.loads(line)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scorer", help="a file of this folder, such as hps_v3.py, or the path of another one")
    parser.add_argument("--python", required=True, help="the Python of the scorer's environment")
    parser.add_argument("--path", help="the folder of the scorer's repository, where that is no package")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; default: %(default)s")
    parser.add_argument("--port", type=int, default=8100, help="port to listen on; default: %(default)s")
    args = parser.parse_args(arguments)
    script = HERE / args.scorer if (HERE / args.scorer).is_file() else Path(args.scorer)
    if not script.is_file():
        parser.error(f"there is no file {args.scorer}")
    try:
        scorer = ScorerProcess(script, args.python, args.path)
        server = RewardServer(scorer, args.host, args.port, os.environ.get(TOKEN_VARIABLE))
    except (OSError, RuntimeError, ValueError) as error:
        parser.error(str(error))
    with suppress(KeyboardInterrupt):
        print(f"Serving {', '.join(server.names)} at {server.url}", flush=True)
        server.run()
    server.close()
    scorer.close()


if __name__ == "__main__":
    main()
