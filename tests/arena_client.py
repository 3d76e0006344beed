"""A client that sends the Space anything, right or wrong, and looks at what the process does."""

import contextlib
import json
import os
import re
from pathlib import Path

import httpx


ORGANISER_KEY = "organiser-key-1234567"
# Python imports this at its start: whatever the process asks for outside of this machine is written down
WATCH = """
import os, sys
HOME = ("127.", "localhost", "::1", "0.0.0.0", "None")
def watch(event, args):
    host = None
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = str(args[1][0])
    elif event == "socket.getaddrinfo":
        host = args[0].decode() if isinstance(args[0], bytes) else str(args[0])
    if host is not None and host and not host.startswith(HOME):
        with open(os.environ["WATCHED"], "a") as file:
            file.write(host + "\\n")
sys.addaudithook(watch)
"""


@contextlib.contextmanager
def running_arena(running_space, folder: Path, **settings):
    """
    The Space, with the uploads and temporary files in `folder / "temp"`, and in `folder / "left"` the hosts outside of
    this machine that it asked for. `running_space` is the fixture.
    """
    for path in (folder / "temp", folder / "watch"):
        path.mkdir(parents=True)
    (folder / "watch/sitecustomize.py").write_text(WATCH)
    own = {
        "PYTHONPATH": os.pathsep.join([str(folder / "watch"), str(Path(__file__).parents[1] / "src")]),
        "WATCHED": folder / "left",
        "TMPDIR": folder / "temp",
        "GRADIO_TEMP_DIR": folder / "temp/gradio",
        "ONEREWARD_DATA_DIR": folder / "data",
        "ONEREWARD_ORGANISER_KEY": ORGANISER_KEY,
        "HF_HUB_OFFLINE": "0",
    }
    with running_space(**{name: str(value) for name, value in {**own, **settings}.items()}) as space:
        yield ArenaClient(space, folder)


class ArenaClient:
    """Calls a Space."""

    def __init__(self, space, folder: Path):
        self.space, self.temp, self.left = space, folder / "temp", folder / "left"
        self.url, self.api = space.url, f"{space.url}/gradio_api"
        self.data, self.log = folder / "data", space.log
        self.calls = 0

    def memory(self, what: str = "VmRSS") -> float:
        """Of the process, in MB; `VmHWM` is the most there was."""
        status = Path(f"/proc/{self.space.process.pid}/status").read_text()
        return int(re.search(rf"{what}:\s+(\d+) kB", status)[1]) / 1024

    def client(self, **options) -> httpx.Client:
        """As if from another computer each time: limits are counted by address."""
        self.calls += 1
        source = f"127.1.{self.calls // 250}.{2 + self.calls % 250}"
        return httpx.Client(transport=httpx.HTTPTransport(local_address=source), timeout=120, **options)

    def call(self, name: str, *arguments, client: httpx.Client | None = None):
        """What an endpoint answers: `(status, results or None, message or None)`."""
        client = client or self.client()
        body = json.dumps({"data": arguments})  # NaN and half characters too, which httpx refuses to send
        answer = client.post(f"{self.api}/call/{name}", content=body, headers={"Content-Type": "application/json"})
        if answer.status_code != 200:
            return answer.status_code, None, answer.text
        found = client.get(f"{self.api}/call/{name}/{answer.json()['event_id']}")
        event, data = re.search(r"event: (complete|error)\ndata: (.*)\n", found.text).groups()
        data = json.loads(data)
        return (200, data, None) if event == "complete" else (200, None, data["error"])

    def ask(self, name: str, *arguments, client: httpx.Client | None = None):
        """The first result of an endpoint that must answer."""
        status, results, message = self.call(name, *arguments, client=client)
        assert status == 200 and message is None, (name, status, message)
        return results[0]

    def refused(self, name: str, *arguments, client: httpx.Client | None = None) -> str:
        """The message of an endpoint that must refuse."""
        status, results, message = self.call(name, *arguments, client=client)
        assert results is None and message, (name, status, results)
        return message

    def upload(self, content: bytes, name: str, client: httpx.Client | None = None) -> dict:
        """A file as an argument."""
        answer = (client or self.client()).post(f"{self.api}/upload", files={"files": (name, content)})
        assert answer.status_code == 200, answer.text
        return file_data(answer.json()[0])

    def download(self, found: dict, client: httpx.Client | None = None) -> bytes:
        """The content of a file that an endpoint gave."""
        answer = (client or self.client()).get(f"{self.api}/file={found['path']}")
        assert answer.status_code == 200, answer.text
        return answer.content

    def generate(self, image, mask, client: httpx.Client | None = None, **other):
        """As `call("generate", ...)`, with one image of one step unless told otherwise."""
        arguments = {
            **{"image": image, "mask": mask, "task": "fill", "prompt": "", "num_inference_steps": 1},
            **{"guidance_scale": 1, "seed": 0, "num_images": 1, "adapter": "base", "adapter_strength": 1},
            **{"slice": None, "axis": "axial", "window_center": None, "window_width": None, "label_map": None},
            **other,
        }
        return self.call("generate", *arguments.values(), client=client)


def file_data(path: str, **other) -> dict:
    return {"path": path, "meta": {"_type": "gradio.FileData"}, **other}
