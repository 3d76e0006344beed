"""The Space as a process of its own: started on a free port, with a data folder and settings of its own, and ended."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path


ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "spaces/onereward-arena"
SALT = "a salt of the tests, 32 letters."


def elsewhere() -> dict[str, str]:
    """The environment of a process that is not told where this checkout is."""
    return {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "ONEREWARD"))}


class RunningSpace:
    """
    The Space on this machine.

    Args:
        folder (`Path`):
            Its log, and its data folder unless the settings name another.
        settings (`dict[str, str | None]`):
            Environment of app.py; `None` for what it is not to have.
        command (`list[str]`, *optional*):
            What is run. `app.py` by default.
        where (`Path`, *optional*):
            Folder it is run in. That of the checkout by default.

    Attributes:
        url (`str`):
            Where it answers, the same after a restart.
        data (`Path`):
            Its data folder.
        log (`Path`):
            What it wrote to the terminal.
    """

    def __init__(
        self,
        folder: Path,
        settings: dict[str, str | None],
        command: list[str] | tuple[str, ...] = (sys.executable, "app.py"),
        where: Path = SPACE,
    ):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.url, self.log, self.process = f"http://127.0.0.1:{port}", folder / "space.log", None
        self.command, self.where = command, where
        settings = {
            "PORT": str(port),
            "ONEREWARD_DATA_DIR": str(folder / "data"),
            "ONEREWARD_SALT": SALT,
            "PYTHONPATH": str(ROOT / "src"),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "GRADIO_TEMP_DIR": str(folder / "uploads"),
            **settings,
        }
        self.environment = {key: value for key, value in {**elsewhere(), **settings}.items() if value is not None}
        self.data = Path(self.environment.get("ONEREWARD_DATA_DIR", where / "data"))

    def start(self, seconds: float = 240.0) -> None:
        """Start it, and wait until it answers."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command,
                cwd=self.where,
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        deadline = time.monotonic() + seconds
        while not self.answers():
            if self.process.poll() is not None or time.monotonic() > deadline:
                status = self.process.poll()
                self.end(signal.SIGKILL)
                raise RuntimeError(f"The Space did not start ({status}):\n{self.log.read_text()[-5000:]}")
            time.sleep(0.2)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/config", timeout=5):
                return True
        except urllib.error.HTTPError as error:  # of somebody who is not logged in
            return error.code == 401
        except OSError:
            return False

    def end(self, how: signal.Signals = signal.SIGTERM, seconds: float = 60.0) -> int:
        """Send it the signal, and wait for its end. Returns its exit status."""
        self.process.send_signal(how)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise
