# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The script for Flux from its command line, on a tiny pipeline, with a real reward server and a judge's endpoint."""

import json
import threading
from http.server import BaseHTTPRequestHandler

import numpy as np
import pytest
from example_scripts import as_options, command_in_docstring, load_script, parse
from http_servers import BusyServer
from safetensors import safe_open

from trl_marble.rewards.server import RewardServer


@pytest.fixture
def script():
    return load_script("flux_remote_rewards")


@pytest.fixture
def judge():
    """An OpenAI-compatible endpoint that finds every picture worth 4 of 5."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            answer = json.dumps({"choices": [{"message": {"content": "Final Score: 4"}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *args):
            pass

    server = BusyServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()
    thread.join()


class PickScore:
    """A reward with the name that the script asks the server for."""

    def __call__(self, images, **kwargs):
        return [float(np.asarray(image).mean()) for image in images]


class ImageReward(PickScore):
    pass


def test_the_command_in_the_docstring_is_one_that_the_script_takes(script, tmp_path):
    command = command_in_docstring(script, tmp_path)
    _, args, model_args = parse(script, *command, "--use_cpu")
    assert model_args.model_name_or_path == "black-forest-labs/FLUX.1-dev"
    assert args.generation_batch_size * 8 == 48 * 24 and args.guidance_scale == 3.5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The prompt .* has .* tokens:UserWarning")
def test_the_script_trains_with_rewards_from_servers(script, tmp_path, judge, tiny_flux):
    tiny_flux().save_pretrained(tmp_path / "flux")
    (tmp_path / "prompts.txt").write_text("a cat\na street at night\n")
    with RewardServer([PickScore(), ImageReward()], port=0) as server:
        arguments = {
            "model_name_or_path": tmp_path / "flux",
            "prompts": tmp_path / "prompts.txt",
            "reward_server": server.url,
            "judge": judge,
            "use_peft": True,
            "lora_r": 2,
            "attn_implementation": "native",
            "output_dir": tmp_path / "run",
            "per_device_train_batch_size": 4,
            "gradient_accumulation_steps": 1,
            "num_generations": 2,
            "num_inference_steps": 2,
            "max_steps": 1,
            "max_sequence_length": 16,
            "report_to": "none",
        }
        command = as_options(arguments)
        script.main(*parse(script, *command, "--use_cpu"))
    card = (tmp_path / "run" / "README.md").read_text()
    for name in ("PickScore", "ImageReward", "VLMJudge", "OCRAccuracy"):
        assert name in card
    with safe_open(tmp_path / "run" / "pytorch_lora_weights.safetensors", framework="pt") as file:
        assert all(file.get_tensor(key).shape[0] == 2 for key in file.keys() if "lora_A" in key)
