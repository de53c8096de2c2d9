# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The local Hub of other tests answers the real client as the real Hub does."""

import json

import pytest
from local_hub import card_errors, local_hub


def test_the_real_client_creates_uploads_lists_downloads_and_deletes(tmp_path):
    (tmp_path / "folder" / "images").mkdir(parents=True)
    (tmp_path / "folder" / "a.txt").write_text("hello")
    (tmp_path / "folder" / "images" / "b.bin").write_bytes(bytes(range(256)) * 4000)
    script = """
import json, os, sys
from huggingface_hub import HfApi, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

api, folder = HfApi(), sys.argv[1]
seen = {"name": api.whoami()["name"], "created": str(api.create_repo("repo").repo_id)}
api.create_repo("me/repo", exist_ok=True)
api.create_repo("me/private", private=True)
first = api.upload_folder(folder_path=folder, repo_id="me/repo", commit_message="first").oid
seen["files"] = sorted(api.list_repo_files("me/repo"))
seen["moved"] = api.model_info("me/repo").sha == first
here, there = folder + "/images/b.bin", hf_hub_download("me/repo", "images/b.bin")
seen["same"] = open(here, "rb").read() == open(there, "rb").read()
seen["snapshot"] = sorted(os.listdir(snapshot_download("me/repo")))
api.delete_file("a.txt", "me/repo", commit_message="delete")
seen["after"] = api.list_repo_files("me/repo")
seen["errors"] = []
for call in (
    lambda: hf_hub_download("me/repo", "a.txt"),
    lambda: api.model_info("me/none"),
    lambda: HfApi(token="hf_wrong").create_repo("me/other"),
    lambda: api.upload_file(path_or_fileobj=b"---\\ntags: 3\\n---\\n", path_in_repo="README.md", repo_id="me/repo"),
):
    try:
        call()
    except (EntryNotFoundError, RepositoryNotFoundError, HfHubHTTPError, ValueError) as error:
        seen["errors"].append(type(error).__name__)
print(json.dumps(seen))
"""
    with local_hub() as hub:
        seen = json.loads(hub.run(script, str(tmp_path / "folder"), home=tmp_path / "home").stdout)
        assert hub.commits == {"me/repo": ["first", "delete"], "me/private": []}
        assert hub.private == {"me/repo": False, "me/private": True}
    assert seen == {
        "name": "me",
        "created": "me/repo",
        "files": ["a.txt", "images/b.bin"],
        "moved": True,
        "same": True,
        "snapshot": ["a.txt", "images"],
        "after": ["images/b.bin"],
        "errors": ["RemoteEntryNotFoundError", "RepositoryNotFoundError", "HfHubHTTPError", "ValueError"],
    }


def test_a_failing_script_shows_its_output(tmp_path):
    with local_hub() as hub:
        with pytest.raises(AssertionError, match="exit status 3\nwords"):
            hub.run("print('words'); raise SystemExit(3)", home=tmp_path)
        assert hub.run("raise SystemExit(3)", home=tmp_path, check=False).returncode == 3


RESULT = "task: {type: t}, dataset: {type: my/set, name: the set}, metrics: [{type: m, value: 1.5}]"


@pytest.mark.parametrize(
    ("metadata", "error"),
    [
        ("tags: [lora]", None),
        ("base_model: acme/model", None),
        ("base_model: /home/someone/model", "base_model"),
        ("base_model: model", "base_model"),
        ("datasets: [/data/prompts]", "datasets"),
        ("tags: 3", "tags"),
        ("library_name: [diffusers]", "library_name"),
        ("widget: [{text: a}]", "widget"),
        ("model-index: [{name: a, results: [{task: {type: t}, dataset: {type: d}, metrics: []}]}]", "dataset"),
        (f"model-index: [{{name: a, results: [{{{RESULT}}}]}}]", None),
        (f"model-index: [{{results: [{{{RESULT}}}]}}]", 'model-index[0].name" is required'),
        ("model-index: {name: a}", "must be an array"),
        (f"model-index: [{{name: a, results: [{{{RESULT.replace('1.5', '.nan')}}}]}}]", 'value" is required'),
        (f"model-index: [{{name: a, results: [{{{RESULT.replace('1.5', '')}}}]}}]", 'value" is required'),
        (f"model-index: [{{name: a, results: [{{{RESULT.replace('my/set', 'a set')}}}]}}]", "dataset.type"),
        (f"model-index: [{{name: a, results: [{{{RESULT.replace('the set', '7')}}}]}}]", "dataset.name"),
        (f"model-index: [{{name: a, results: [{{{RESULT}, source: {{name: a}}}}]}}]", "source.url"),
        ("base_model_relation: finetuned", "base_model_relation"),
        ("base_model: a--b/c", "base_model"),
        ("tags: [lora]\ntags: [lora]", "duplicated"),
        ("- a list", "mapping"),
        ("a: [", "YAML"),
    ],
)
def test_bad_metadata_is_found(metadata, error):
    errors = card_errors(f"---\n{metadata}\n---\n\n# Title\n")
    assert (errors == []) if error is None else error in errors[0]


def test_a_card_needs_metadata():
    assert "does not start with" in card_errors("# Title\n")[0]
