# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""The server that stands in for a Hub or a judge."""

from http.server import ThreadingHTTPServer


class BusyServer(ThreadingHTTPServer):
    """A server of many clients at once."""

    request_queue_size = 128  # the default of 5 resets connections that come at once
