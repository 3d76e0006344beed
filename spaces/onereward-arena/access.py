"""Who is asking, and how often: the three ways in, and a limit for each person."""

import hmac
import os
import threading
import time
from collections import deque

import gradio as gr


ACCESS = os.environ.get("ONEREWARD_ACCESS", "open")  # "open", "password" or "oauth"
ORGANISER_KEY = os.environ.get("ONEREWARD_ORGANISER_KEY", "")

if ACCESS not in ("open", "password", "oauth"):
    raise ValueError(f"ONEREWARD_ACCESS is {ACCESS!r}; it must be open, password or oauth.")


def passwords() -> list[tuple[str, str]] | None:
    """
    The raters and their passwords, from the secret `ONEREWARD_USERS`: `name:password`, one in a line or with commas
    between. `None` where no password is asked for.
    """
    if ACCESS != "password":
        return None
    lines = os.environ.get("ONEREWARD_USERS", "").replace(",", "\n").splitlines()
    users = [tuple(line.strip().split(":", 1)) for line in lines if ":" in line]
    if not users or any(len(password) < 8 for _, password in users):
        raise ValueError(
            "ONEREWARD_ACCESS is password: ONEREWARD_USERS must hold one `name:password` a line, passwords of 8 "
            "characters or more."
        )
    return users


def who(key: str | None, request: gr.Request, profile: gr.OAuthProfile | None) -> str | None:
    """
    Name of the person who asks: the login, or, where there is none, the secret key that `/join` gave and the browser
    keeps. Without the key nobody can answer in another's place. `None` for somebody unknown.
    """
    if ACCESS == "oauth":
        return None if profile is None else f"hf:{profile.username}"
    if ACCESS == "password":
        return f"user:{request.username}" if request.username else None
    return f"key:{key}" if isinstance(key, str) and 20 <= len(key) <= 64 and key.isascii() else None


def is_organiser(name: str | None, key: str | None, organisers: list[str]) -> bool:
    """Whether somebody may see results and end the study: by the organisers' key, or by a login that is listed."""
    given = key.encode(errors="surrogatepass") if isinstance(key, str) else b""
    if ORGANISER_KEY and hmac.compare_digest(given, ORGANISER_KEY.encode()):
        return True
    return name is not None and not name.startswith("key:") and name.partition(":")[2] in organisers


class RateLimit:
    """
    Lets each person do something so many times a minute.

    Args:
        per_minute (`int`):
            The limit.
        people (`int`, *optional*, defaults to `10000`):
            Of how many people times are kept; those who came first are forgotten first.
    """

    def __init__(self, per_minute: int, people: int = 10_000):
        self.per_minute, self.people = per_minute, people
        self.times: dict[str, deque] = {}
        self.lock = threading.Lock()

    def check(self, name: str) -> None:
        """Counts once more; raises a `ValueError` that says when to try again."""
        with self.lock:
            now = time.monotonic()
            times = self.times.pop(name, deque())
            self.times[name] = times
            if len(self.times) > self.people:
                del self.times[next(iter(self.times))]
            while times and now - times[0] > 60:
                times.popleft()
            if len(times) >= self.per_minute:
                wait = 60 - now + times[0]
                raise ValueError(f"That is more than {self.per_minute} a minute; try again in {wait:.0f} s.")
            times.append(now)


def caller(request: gr.Request) -> str:
    """Whom to count a request against: the login, else the address."""
    return request.username or address(request.request.scope)


def address(scope: dict) -> str:
    """Where a request comes from. On a Space, what its proxy says: the last entry, which nobody else can write."""
    forwarded = dict(scope["headers"]).get(b"x-forwarded-for", b"").decode("latin-1")
    if os.environ.get("SPACE_ID") and forwarded:
        return forwarded.rpartition(",")[2].strip()
    return scope["client"][0] if scope.get("client") else "unknown"
