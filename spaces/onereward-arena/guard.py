"""What is let in, and what is let out: small requests, no addresses, folders that are cleared, plain messages."""

import inspect
import re
import shutil
import sys
import tempfile
import time
import traceback
from pathlib import Path

import gradio as gr
import pydantic
from access import RateLimit, address
from gradio.exceptions import InvalidPathError
from gradio.route_utils import FnIndexInferError
from starlette.responses import JSONResponse


MAX_UPLOAD = 64 * 2**20  # bytes of one file
MAX_BODY = 2**20  # bytes of any other request
MAX_MESSAGE = 300  # characters
KEEP = 3600  # seconds that downloads are kept
# what Gradio offers and nothing here needs: each of these fetches an address, writes to the disk, or spends time
UNUSED = ("proxy=", "file=http", "file/http", "deep_link", "process_recording", "vibe-", "undo-vibe-")
UNUSED += ("component_server", "stream/")


def one_line(words: str) -> str:
    """A message for people, however it was written: short, and of a path of this machine the last part alone."""
    words = str(words)[:10_000].replace("<", "‹").replace(">", "›")  # the page takes messages for HTML
    words = re.sub(r"(?<![\w.:/])(?:/[^\s/'\"`]+)+/(?=[^\s/'\"`])", "", " ".join(words.split()))
    return words if len(words) <= MAX_MESSAGE else words[: MAX_MESSAGE - 1] + "…"


def report_fault(error: BaseException, where: str) -> None:
    """A fault of ours, in the log. What the error says is left out: it may quote what somebody sent."""
    place = "".join(traceback.format_tb(error.__traceback__)[-3:])
    print(f"{where}: {type(error).__name__}\n{place}", file=sys.stderr, flush=True)


def fresh_folder() -> Path:
    """A folder for downloads. Those of an hour ago are gone: Gradio keeps a copy of what it serves, and clears it."""
    for folder in Path(tempfile.gettempdir()).glob("onereward-arena-*"):
        if time.time() - folder.stat().st_mtime > KEEP:
            shutil.rmtree(folder, ignore_errors=True)  # another thread may be at it
    return Path(tempfile.mkdtemp(prefix="onereward-arena-"))


class Page(gr.Blocks):
    """Blocks whose errors are one line for people: no traceback, and no path of this machine."""

    async def preprocess_data(self, block_fn, inputs, state, explicit_call=False):
        try:
            if has_address(inputs):
                raise gr.Error("Send the file itself: addresses are not fetched.", print_exception=False)
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except gr.Error as error:
            raise gr.Error(one_line(error.message), print_exception=False) from None
        except Exception as error:
            raise gr.Error(wrong_input(block_fn, inputs, error), print_exception=False) from None

    async def process_api(self, block_fn, inputs, *args, **kwargs):
        try:
            return await super().process_api(block_fn, inputs, *args, **kwargs)
        except gr.Error as error:
            raise gr.Error(one_line(error.message), error.duration, title=error.title, print_exception=False) from None
        except Exception as error:
            report_fault(error, f"/{getattr(block_fn, 'api_name', None) or 'page'}")
            raise gr.Error(
                f"Something went wrong here ({type(error).__name__}). Try again, or with another file or setting.",
                print_exception=False,
            ) from None


def has_address(value, depth: int = 0) -> bool:
    """Whether a file is named by an address that Gradio would fetch."""
    if depth > 100:
        raise ValueError("nested too deeply")
    if isinstance(value, dict):
        path = value.get("path")
        if isinstance(path, str) and "://" in path:
            return True
        value = list(value.values())
    return isinstance(value, (list, tuple)) and any(has_address(inner, depth + 1) for inner in value)


def wrong_input(block_fn, inputs, error: Exception) -> str:
    """What is wrong with arguments that did not even reach the function."""
    if len(inputs) < len(block_fn.inputs):
        names = ", ".join(list(inspect.signature(block_fn.fn).parameters)[: len(block_fn.inputs)])
        return one_line(f"{len(inputs)} arguments came, but {len(block_fn.inputs)} are wanted: {names}.")
    if isinstance(error, InvalidPathError):
        return "A file is named that was not uploaded here. Upload it first."
    if isinstance(error, pydantic.ValidationError):
        return "What stands where a file is wanted is none. Upload it first, then pass what the upload gave."
    return "An argument has a wrong type or value: see *Use via API* at the foot of the page for what is wanted."


class Gate:
    """
    ASGI middleware: refuses requests that are too large before they are read, routes that nothing here needs, and
    guessing of passwords; and answers in one line where Gradio would fail.

    Args:
        app (`Callable`):
            The application.
    """

    def __init__(self, app):
        self.app = app
        self.logins = RateLimit(per_minute=20)

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        path = scope["path"].removeprefix(scope.get("root_path", "")).lstrip("/")
        inner = path.removeprefix("gradio_api/").lower()
        refusal = None
        if inner.startswith(UNUSED) or path.lower().startswith(("monitoring", "file=")):
            refusal = 404, "There is nothing here."
        headers = dict(scope["headers"])
        is_upload = inner.rstrip("/") == "upload"
        most = MAX_UPLOAD + MAX_BODY if is_upload else MAX_BODY
        length = headers.get(b"content-length", b"0")
        if not length.isdigit():
            refusal = 400, "The request says a length that is none."
        elif int(length[:20]) > most:
            refusal = 413, f"The request has {int(length[:20]):,} bytes; at most {most:,} are read."
        if path.rstrip("/") == "login" and scope["method"] == "POST":
            try:
                self.logins.check(address(scope))
            except ValueError as error:
                refusal = 429, str(error)
        if refusal is not None:
            return await answer(scope, receive, send, *refusal)

        seen, begun, events = 0, False, False

        async def counted():
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                raise TooLarge
            return message

        async def noted(message):
            nonlocal begun, events
            if message["type"] == "http.response.start":
                begun, kind = True, dict(message["headers"]).get(b"content-type", b"")
                events = kind.startswith(b"text/event-stream")
                if message["status"] == 500 and inner.startswith(("run/", "api/")):
                    message = {**message, "status": 400}  # an error of the caller: ours are caught in `Page`
            await send(message)

        try:
            await self.app(scope, counted, noted)
        except Exception as error:
            if events:  # of an event that is over, or never was: Gradio has said so, and then fails
                return await send({"type": "http.response.body", "body": b"", "more_body": False})
            if begun:
                raise
            if seen > most:
                status, words = 413, f"The request has more than {most:,} bytes, the most that are read."
            elif isinstance(error, FnIndexInferError) or (isinstance(error, KeyError) and "api/" in path):
                status, words = 404, "There is no such endpoint."
            else:
                report_fault(error, path[:40])
                status, words = 400, f"The request cannot be answered ({type(error).__name__})."
            await answer(scope, receive, send, status, words)


class TooLarge(Exception):
    """More bytes came than are read."""


async def answer(scope, receive, send, status: int, words: str) -> None:
    await JSONResponse({"detail": words}, status)(scope, receive, send)
