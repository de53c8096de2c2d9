# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""An OpenAI-compatible endpoint whose answers each test sets, and what tests see of its requests."""

import base64
import io
import json
import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler

from http_servers import BusyServer
from PIL import Image


KEY = "sk-very-secret-0123456789"
# A test that would wait for ever fails after this many seconds instead.
PATIENCE = 60


class Endpoint:
    """
    An OpenAI-compatible endpoint on a free port. `behave(handler, request, number)` answers request `number` (from 0)
    by returning the text of a completion, or by anything else that it does to the handler, and then returns `None`.
    """

    def __init__(self, behave):
        self.behave = behave
        self.requests, self.headers, self.paths = [], [], []
        self.under_way = self.most_under_way = 0
        self.lock = threading.Lock()
        self.stop = threading.Event()  # ends every hanging answer
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with endpoint.lock:
                    number = len(endpoint.requests)
                    endpoint.requests.append(request)
                    endpoint.headers.append(self.headers)
                    endpoint.paths.append(self.path)
                    endpoint.under_way += 1
                    endpoint.most_under_way = max(endpoint.most_under_way, endpoint.under_way)
                try:
                    text = endpoint.behave(self, request, number)
                finally:
                    with endpoint.lock:  # before the answer, which makes room for the next request
                        endpoint.under_way -= 1
                if text is not None:
                    send(self, 200, completion(text))

            def log_message(self, *args):
                pass

        self.server = BusyServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # clients go away here on purpose
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


@contextmanager
def endpoint(behave):
    served = Endpoint(behave)
    thread = threading.Thread(target=served.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        served.stop.set()
        served.server.shutdown()
        served.server.server_close()
        thread.join()


def completion(text, **choice):
    return {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": "stop", **choice}]}


def send(handler, status, content, **headers):
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def die(handler):
    """Close the connection without an answer."""
    handler.connection.shutdown(socket.SHUT_RDWR)


def hang(server):
    server.stop.wait(PATIENCE)


def seen_images(request):
    """The images of a request, decoded."""
    (message,) = request["messages"]
    urls = [part["image_url"]["url"] for part in message["content"] if part["type"] == "image_url"]
    prefix = "data:image/png;base64,"
    assert all(url.startswith(prefix) for url in urls)
    return [Image.open(io.BytesIO(base64.b64decode(url.removeprefix(prefix), validate=True))) for url in urls]


def seen_image(request):
    """The only image of a request, decoded."""
    (image,) = seen_images(request)
    return image


def seen_text(request):
    """The question of a request, which comes last."""
    return request["messages"][0]["content"][-1]["text"]


def level(request):
    """The red channel of the first pixel, by which the tests tell images apart."""
    return levels(request)[0]


def levels(request):
    """The levels of all images of a request, in their order."""
    return [image.getpixel((0, 0))[0] for image in seen_images(request)]


def pictures(*levels):
    return [Image.new("RGB", (3, 2), (red, 0, 0)) for red in levels]
