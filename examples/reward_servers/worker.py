# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""
Runs a scorer in the scorer's own environment, which needs nothing of trl_marble. `serve.py` starts it and talks to it:
each request is a line of JSON on stdin, and each answer one on stdout.
"""

import base64
import importlib.util
import io
import json
import os
import sys
import traceback

from PIL import Image


def load_scorer(path):
    """An object of the class `Scorer` of a file; the modules beside the file can be imported there."""
    sys.path.insert(0, os.path.dirname(os.path.abspath(path)))
    spec = importlib.util.spec_from_file_location("scorer", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.Scorer()


def answer(scorer, request):
    """One value per image, or what went wrong for all of them."""
    files = [io.BytesIO(base64.b64decode(text)) for text in request["images"]]
    images = [Image.open(file, formats=["PNG"]).convert("RGB") for file in files]
    try:
        values = scorer(images, request["prompts"], request["columns"])
        return {"values": [encode(value) for value in values]}
    except Exception as error:
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def encode(value):
    """A value of an image as JSON has it: a number, none, or what went wrong for this image alone."""
    if isinstance(value, Exception):
        return {"error": f"{type(value).__name__}: {value}"}
    return None if value is None else float(value)


def main():
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a scorer prints must not be taken for an answer
    scorer = load_scorer(sys.argv[1])
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(scorer, json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
