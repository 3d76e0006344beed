"""A rater who answers over HTTP, as a script would, and sends again whatever was not acknowledged."""

import base64
import hashlib
import json
import random
import time
import uuid
from dataclasses import dataclass

import httpx


ANSWERS = ("left", "right", "tie", "both_unacceptable")


class Refused(Exception):
    """The Space has said no, in words for people."""


@dataclass(frozen=True)
class Sent:
    """An answer to a pair: by whom, what, and which of the two pictures that were seen it chooses."""

    key: str
    comment: str
    criterion: str
    answer: str
    left: str
    right: str


class Rater:
    """
    One rater of the Space.

    Args:
        url (`str`):
            The Space.
        key (`str`, *optional*):
            Secret that `/join` is given. A new one by default.
        seed (`int`, *optional*, defaults to 0):
            Seed of the answers and pauses.
        patience (`float`, *optional*, defaults to 180):
            Seconds for which a call is sent again while the Space is away.

    Attributes:
        sent (`list[Sent]`):
            All answers that were sent, each once.
        kept (`list[Sent]`):
            Those that were acknowledged.
        seconds, next_seconds (`list[float]`):
            Of each acknowledged answer, and of each question, the time from sending to the reply; of what was sent
            again, the last time.
    """

    def __init__(self, url: str, key: str | None = None, seed: int = 0, patience: float = 180.0):
        self.url, self.key, self.patience = url, key or f"rater-{uuid.uuid4().hex}", patience
        self.random = random.Random(seed)
        self.session = uuid.uuid4().hex  # as of a page; without it, the Space sets up a new one for each call
        self.client = httpx.Client(timeout=30)
        self.sent: list[Sent] = []
        self.kept: list[Sent] = []
        self.seconds: list[float] = []
        self.next_seconds: list[float] = []

    def call(self, name: str, *values):
        """One call of the API; the key goes last. [`Refused`] or `httpx.HTTPError` where it fails."""
        place = f"{self.url}/gradio_api/call/{name}"
        reply = self.client.post(place, json={"data": [*values, self.key], "session_hash": self.session})
        reply.raise_for_status()
        event = None
        with self.client.stream("GET", f"{place}/{reply.json()['event_id']}") as lines:
            lines.raise_for_status()
            for line in lines.iter_lines():
                if line.startswith("event: "):
                    event = line.removeprefix("event: ")
                elif line.startswith("data: ") and event in ("complete", "error"):
                    value = json.loads(line.removeprefix("data: "))
                    if event == "complete":
                        return value[0]
                    raise Refused(value["error"] if isinstance(value, dict) else value)
        raise httpx.RemoteProtocolError("the answer broke off")

    def insist(self, name: str, *values):
        """A call that is sent again until it is answered, one way or the other."""
        deadline = time.monotonic() + self.patience
        while True:
            try:
                begun = time.monotonic()
                reply = self.call(name, *values)
                self.last = time.monotonic() - begun
                return reply
            except (httpx.HTTPError, Refused) as error:
                passing = not isinstance(error, Refused) or "send it again" in str(error)
                if not passing or time.monotonic() > deadline:
                    raise
            time.sleep(0.1 + 0.2 * self.random.random())

    def join(self) -> dict:
        return self.insist("join", "radiologist", True)

    def next(self) -> dict:
        """The next question; who is unknown, as after the loss of a disk, joins anew."""
        try:
            return self.insist("next")
        except Refused:
            self.join()
            return self.insist("next")

    def vote(self, item: dict, criterion: str, answer: str) -> dict:
        left, right = (hashlib.sha256(base64.b64decode(url.partition(",")[2])).hexdigest() for url in item["images"])
        vote = Sent(self.key, uuid.uuid4().hex, criterion, answer, left, right)
        self.sent.append(vote)
        receipt = self.insist("vote", item["item_id"], criterion, answer, vote.comment, 1.5)
        self.kept.append(vote)
        self.seconds.append(self.last)
        return receipt

    def answer(self, number: int, pause: tuple[float, float] = (0.0, 0.0)) -> None:
        """Answer so many criteria, with pauses between."""
        done = 0
        while done < number:
            item = self.next()
            self.next_seconds.append(self.last)
            assert item, "there are no more questions"
            for criterion in item["criteria"]:
                if criterion not in item["answered"] and done < number:
                    time.sleep(self.random.uniform(*pause))
                    self.vote(item, criterion, self.random.choice(ANSWERS))
                    done += 1
