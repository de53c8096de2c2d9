# Copyright 2026 The trl_marble Authors. Licensed under the Apache License, Version 2.0.
"""When a request to a reward server or a judge is sent again, and when it is given up: one policy for all clients."""

import email.utils
import logging
import math
import random
import ssl
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime


logger = logging.getLogger(__name__)

NEVER_LATER = frozenset({501, 505})  # of the 5xx: what the server cannot do now, it cannot do later
LONGEST_PAUSE = 8.0  # seconds, unless the server asks for more
SHORTEST_PAUSE = 0.1
BETWEEN_WARNINGS = 60.0


def means_later(status: int) -> bool:
    """
    Whether a status says that the same request may be answered later.

    These are 408 (the request came too slowly), 425 and 429 (too early, too many) and all 5xx but 501 and 505: what
    stands in front of a server answers 502 to 504, or numbers of its own up to 530, while the server restarts or is
    busy, and judges answer 500 when a worker dies.
    """
    return status in (408, 425, 429) or (500 <= status <= 599 and status not in NEVER_LATER)


def asked_delay(retry_after: str | None) -> float:
    """
    Seconds to wait that a server asks for.

    Args:
        retry_after (`str`, *optional*):
            Its header `Retry-After`: seconds, or a date.

    Returns:
        `float`: 0 where it does not ask, or asks in no way that is understood.
    """
    try:
        seconds = float(retry_after or 0)
    except ValueError:
        try:
            date = email.utils.parsedate_to_datetime(retry_after or "")
        except ValueError:
            return 0.0
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return seconds if 0 < seconds < math.inf else 0.0


def is_permanent(error: Exception) -> bool:
    """Whether a connection failed because of a certificate, which no later attempt can fix."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, ssl.SSLCertVerificationError):
        cause = cause.__cause__ or cause.__context__
    return cause is not None


@dataclass
class RetryPolicy:
    """
    How long a client tries, and how often.

    Connections that fail, refused ones included, and answers for which [`means_later`] is true are tried again until
    `timeout` is over. The pause doubles each time up to 8 seconds, with jitter, and is at least as long as the server
    asks for; if it asks for more time than there is left, the request is given up at once.

    Args:
        timeout (`float`):
            Longest time in seconds for a request, all its attempts and pauses included.
        max_retries (`int`, *optional*):
            Largest number of attempts after the first. Defaults to as many as there is time for.

    Raises:
        `ValueError`: If the timeout is not a positive number of seconds, or the number of retries is negative.
    """

    timeout: float
    max_retries: int | None = None
    last_warning: float = field(default=-math.inf, init=False)

    def __post_init__(self) -> None:
        if not 0 < self.timeout < math.inf:
            raise ValueError(f"`timeout` is {self.timeout}; it must be a number of seconds greater than 0.")
        if self.max_retries is not None and self.max_retries < 0:
            raise ValueError(f"`max_retries` must be at least 0, got {self.max_retries}.")


class Attempts:
    """
    The attempts of one request, whose time starts now.

    Args:
        who (`str`):
            Who is asked, for messages: `"The judge at http://..."`.
        policy ([`RetryPolicy`]):
            How long and how often to try.

    Attributes:
        made (`int`): Number of attempts that failed so far.
        problem (`str`): Why the last one failed.
    """

    def __init__(self, who: str, policy: RetryPolicy) -> None:
        self.who = who
        self.policy = policy
        self.made = 0
        self.problem = ""
        self.deadline = time.monotonic() + policy.timeout

    @property
    def left(self) -> float:
        """Seconds until the time is over."""
        return max(self.deadline - time.monotonic(), 0.0)

    def pause(self, problem: str, asked: float = 0.0, permanent: bool = False) -> float | None:
        """
        Note that an attempt failed.

        Args:
            problem (`str`):
                Why, with no secret in it.
            asked (`float`, *optional*, defaults to `0.0`):
                Seconds that the server asks to wait.
            permanent (`bool`, *optional*, defaults to `False`):
                Whether every other attempt would fail, too.

        Returns:
            `float` or `None`: Seconds to wait before the next attempt; `None` if there is to be none.
        """
        self.made += 1
        self.problem = problem
        limit = self.policy.max_retries
        left = self.left
        if permanent or (limit is not None and self.made > limit):
            return None
        if asked >= left:
            if asked:
                self.problem += f"; it asks to wait {asked:g} seconds, more than are left of {self.policy.timeout:g}"
            return None
        backoff = min(LONGEST_PAUSE, 0.25 * 2 ** min(self.made - 1, 10)) * random.uniform(0.5, 1.0)
        # Towards the end the pauses become shorter, so that none of the time is given away.
        delay = max(asked, min(backoff, left / 2))
        if delay < SHORTEST_PAUSE and delay < backoff:
            return None
        if time.monotonic() - self.policy.last_warning >= BETWEEN_WARNINGS:
            self.policy.last_warning = time.monotonic()
            logger.warning("%s: %s. It is asked again, for up to %.0f seconds more.", self.who, problem, left)
        return delay

    @property
    def summary(self) -> str:
        """What was tried, for messages."""
        return f"attempts: {self.made}; the last: {self.problem}"
