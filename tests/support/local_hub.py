# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""A Hub that lives in the memory of the test process, spoken to by the real `huggingface_hub` client.

It knows model repositories and as much of the Hub's HTTP interface as pushing and loading an adapter needs.
`huggingface_hub` reads its settings from the environment when it is imported, so code that shall talk to this server
runs in a process of its own: [`LocalHub.run`].
"""

import base64
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from urllib.parse import unquote, urlparse

import yaml
from http_servers import BusyServer


USER = "me"
TOKEN = "hf_local"
ROOT = Path(__file__).resolve().parents[2]

REPO = r"(?P<repo>[^/]+/[^/]+)"
METADATA = re.compile(r"\A---\r?\n(?P<yaml>.*?)\r?\n---\r?\n", re.DOTALL)


class LocalHub:
    """
    An in-memory Hub on a free port of the loopback interface. Use it through [`local_hub`], which also stops it.

    Attributes:
        url (`str`): the value for `HF_ENDPOINT`.
        files (`dict[str, dict[str, bytes]]`): repository id -> path in the repository -> content, newest commit.
        commits (`dict[str, list[str]]`): repository id -> titles of its commits, oldest first.
        private (`dict[str, bool]`): repository id -> whether it was created as a private one.
        requests (`list[tuple[str, str]]`): method and path of every request, in the order of arrival.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.commits: dict[str, list[str]] = {}
        self.private: dict[str, bool] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        self.server = BusyServer(("127.0.0.1", 0), _handler_for(self))
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)

    def sha(self, repo: str) -> str:
        """The commit id of a repository: changes whenever a file does, or another commit is made."""
        content = {path: hashlib.sha1(data).hexdigest() for path, data in sorted(self.files[repo].items())}
        return hashlib.sha1(json.dumps([content, len(self.commits[repo])]).encode()).hexdigest()

    def text(self, repo: str, path: str) -> str:
        """The content of a text file, for assertions."""
        return self.files[repo][path].decode("utf-8")

    def environment(self, home: str | os.PathLike) -> dict[str, str]:
        """
        The environment of a process that talks to this Hub.

        Args:
            home (`str` or `os.PathLike`): an empty folder for `HF_HOME`, so that no cache of another test or of the
                machine is seen. The same folder twice shares the cache between two processes.
        """
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        return kept | {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests" / "support")]),
        }

    def run(
        self, script: str, *args: str, home: str | os.PathLike, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """
        Run Python source in a fresh process whose Hub this is.

        Args:
            script (`str`): the source; the package and the helpers in `tests/support/` can be imported.
            *args (`str`): `sys.argv[1:]` of the process.
            home (`str` or `os.PathLike`): see [`LocalHub.environment`].
            check (`bool`, *optional*, defaults to `True`): raise `AssertionError` with the process's output where it
                fails.
        """
        process = subprocess.run(
            [sys.executable, "-c", script, *args],
            env=self.environment(home),
            capture_output=True,
            text=True,
            timeout=300,
        )
        if check and process.returncode != 0:
            raise AssertionError(f"exit status {process.returncode}\n{process.stdout}\n{process.stderr}")
        return process


@contextmanager
def local_hub() -> Iterator[LocalHub]:
    """A running [`LocalHub`], stopped at the end of the block."""
    hub = LocalHub()
    hub.thread.start()
    try:
        yield hub
    finally:
        hub.server.shutdown()
        hub.server.server_close()
        hub.thread.join()


def card_errors(content: str) -> list[str]:
    """
    What the Hub would refuse in a model card: its rules for the metadata fields that this package writes, as its
    answers to bad cards show them.

    Args:
        content (`str`): the whole `README.md`.
    """
    match = METADATA.match(content)
    if match is None:
        return ["the card does not start with a metadata block between two lines of ---"]
    try:
        metadata = yaml.load(match["yaml"], _StrictLoader)
    except yaml.YAMLError as error:
        return [f"the metadata is not YAML: {error}"]
    if not isinstance(metadata, dict):
        return ["the metadata is not a mapping"]

    errors = []
    for key in ("library_name", "pipeline_tag", "license"):
        if key in metadata and not isinstance(metadata[key], str):
            errors.append(f'"{key}" must be a string')
    for key in ("tags", "datasets", "base_model"):
        values = metadata.get(key, [])
        values = [values] if isinstance(values, str) else values
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            errors.append(f'"{key}" must be a string or a list of strings')
        elif key != "tags":
            errors += [
                f'"{key}" with value "{value}" is not valid'
                for value in values
                if not re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", value) or "--" in value or ".." in value
            ]
    if metadata.get("base_model_relation", "adapter") not in ("adapter", "finetune", "merge", "quantized"):
        errors.append('"base_model_relation" must be one of [adapter, finetune, merge, quantized]')
    for item in metadata.get("widget", []):
        if not isinstance(item.get("text"), str) or not isinstance(item.get("output", {}).get("url"), str):
            errors.append(f'"widget" items need a text and an output url: {item}')
    index = metadata.get("model-index", [])
    if not isinstance(index, list):
        return [*errors, '"model-index" must be an array']
    for i, model in enumerate(index):
        errors += _model_errors(f"model-index[{i}]", model)
    return errors


def _model_errors(place: str, model: object) -> list[str]:
    """What is wrong with an entry of a model index."""
    if not isinstance(model, dict):
        return [f'"{place}" must be of type object']
    errors = _string_errors(place, model, required=("name",))
    results = model.get("results")
    if not isinstance(results, list):
        return [*errors, f'"{place}.results" must be an array']
    for i, result in enumerate(results):
        here = f"{place}.results[{i}]"
        errors += _string_errors(f"{here}.task", result.get("task", {}), ("type",), ("name",))
        dataset = result.get("dataset", {})
        errors += _string_errors(f"{here}.dataset", dataset, ("type", "name"), ("config", "split", "revision"))
        if not re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", str(dataset.get("type", ""))):
            errors.append(f'"{here}.dataset.type" with value "{dataset.get("type")}" is not valid')
        if "source" in result:
            errors += _string_errors(f"{here}.source", result["source"], ("url",), ("name",))
        if not isinstance(result.get("metrics"), list):
            errors.append(f'"{here}.metrics" must be an array')
            continue
        for k, metric in enumerate(result["metrics"]):
            errors += _string_errors(f"{here}.metrics[{k}]", metric, ("type",), ("name", "config"))
            value = metric.get("value")
            if value is None or (isinstance(value, float) and not math.isfinite(value)):
                errors.append(f'"{here}.metrics[{k}].value" is required')
    return errors


def _string_errors(
    place: str, mapping: dict[str, object], required: tuple[str, ...], optional: tuple[str, ...] = ()
) -> list[str]:
    """Which of a mapping's fields are missing, empty or no strings."""
    errors = [f'"{place}.{key}" is required' for key in required if mapping.get(key) in (None, "")]
    present = [key for key in (*required, *optional) if mapping.get(key) is not None]
    return errors + [f'"{place}.{key}" must be a string' for key in present if not isinstance(mapping[key], str)]


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a mapping has each key once, as for the Hub; plain PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[object, object]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [key for key in keys if keys.count(key) > 1]:
            raise yaml.YAMLError(f"duplicated mapping key {repeated[0]!r}")
        return super().construct_mapping(node, deep)


def _handler_for(hub: LocalHub) -> type[BaseHTTPRequestHandler]:
    """The request handler class of a server that reads and writes `hub`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 (the base class's name)
            pass

        def handle_request(self) -> None:
            body = self.read_body()
            path = unquote(urlparse(self.path).path)
            with hub.lock:
                hub.requests.append((self.command, path))
                for pattern, answer in ROUTES:
                    if match := re.fullmatch(pattern, path):
                        return answer(self, match, body)
                self.not_found("RepoNotFound", f"this local Hub has no route {self.command} {path}")

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

        def read_body(self) -> bytes:
            if self.headers.get("Transfer-Encoding") != "chunked":
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)

        def reply(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

        def not_found(self, code: str, message: str) -> None:
            self.reply(404, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

        def authorized(self) -> bool:
            if self.headers.get("Authorization") == f"Bearer {TOKEN}":
                return True
            self.reply(401, {"error": "Invalid user token."})
            return False

        def create(self, match: re.Match[str], body: bytes) -> None:
            if not self.authorized():
                return
            request = json.loads(body)
            repo = f"{request.get('organization') or USER}/{request['name']}"
            answer = {"url": f"{hub.url}/{repo}", "name": repo, "id": repo}
            if repo in hub.files:
                return self.reply(409, answer | {"error": "You already created this model repo"})
            hub.files[repo], hub.commits[repo] = {}, []
            hub.private[repo] = bool(request.get("private") or request.get("visibility") == "private")
            self.reply(200, answer)

        def whoami(self, match: re.Match[str], body: bytes) -> None:
            if self.authorized():
                token = {"displayName": "local", "role": "write"}
                self.reply(200, {"type": "user", "name": USER, "orgs": [], "auth": {"accessToken": token}})

        def validate_yaml(self, match: re.Match[str], body: bytes) -> None:
            errors = card_errors(json.loads(body)["content"])
            messages = [{"message": message} for message in errors]
            self.reply(400 if errors else 200, {"errors": messages, "warnings": []})

        def preupload(self, match: re.Match[str], body: bytes) -> None:
            if not self.known(match["repo"]) or not self.authorized():
                return
            # "regular" for every file: the content then comes with the commit, and no large-file storage is needed.
            paths = [file["path"] for file in json.loads(body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.reply(200, {"files": files})

        def commit(self, match: re.Match[str], body: bytes) -> None:
            repo = match["repo"]
            if not self.known(repo) or not self.authorized():
                return
            operations = [json.loads(line) for line in body.splitlines()]
            for operation in operations:
                value = operation["value"]
                if operation["key"] == "header":
                    hub.commits[repo].append(value["summary"])
                elif operation["key"] == "file":
                    hub.files[repo][value["path"]] = base64.b64decode(value["content"])
                elif operation["key"] == "deletedFile":
                    del hub.files[repo][value["path"]]
                elif operation["key"] == "deletedFolder":
                    folder = value["path"].rstrip("/") + "/"
                    for path in [path for path in hub.files[repo] if path.startswith(folder)]:
                        del hub.files[repo][path]
                else:
                    return self.reply(400, {"error": f"this local Hub cannot do {operation['key']} in a commit"})
            sha = hub.sha(repo)
            self.reply(200, {"success": True, "commitOid": sha, "commitUrl": f"{hub.url}/{repo}/commit/{sha}"})

        def tree(self, match: re.Match[str], body: bytes) -> None:
            if self.known(match["repo"]):
                files = hub.files[match["repo"]].items()
                oids = {path: hashlib.sha1(data).hexdigest() for path, data in files}
                self.reply(200, [{"type": "file", "path": p, "size": len(d), "oid": oids[p]} for p, d in files])

        def info(self, match: re.Match[str], body: bytes) -> None:
            repo = match["repo"]
            if self.known(repo):
                siblings = [{"rfilename": path} for path in hub.files[repo]]
                about = {"id": repo, "modelId": repo, "sha": hub.sha(repo), "private": False, "tags": []}
                self.reply(200, about | {"siblings": siblings})

        def resolve(self, match: re.Match[str], body: bytes) -> None:
            repo, path = match["repo"], match["path"]
            if not self.known(repo):
                return
            if path not in hub.files[repo]:
                return self.not_found("EntryNotFound", f"{path} is not in {repo}")
            data = hub.files[repo][path]
            etag = hashlib.sha1(data).hexdigest()
            self.reply(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": hub.sha(repo)})

        def known(self, repo: str) -> bool:
            if repo not in hub.files:
                self.not_found("RepoNotFound", f"no repository {repo}")
            return repo in hub.files

    ROUTES = [
        (r"/api/repos/create", Handler.create),
        (r"/api/whoami-v2", Handler.whoami),
        (r"/api/validate-yaml", Handler.validate_yaml),
        (rf"/api/models/{REPO}/preupload/[^/]+", Handler.preupload),
        (rf"/api/models/{REPO}/commit/[^/]+", Handler.commit),
        (rf"/api/models/{REPO}/tree/[^/]+", Handler.tree),
        (rf"/api/models/{REPO}(/revision/[^/]+)?", Handler.info),
        (rf"/{REPO}/resolve/[^/]+/(?P<path>.+)", Handler.resolve),
    ]
    return Handler
