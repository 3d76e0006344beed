"""The Space as a process of its own, for the tests of this folder."""

import contextlib
import signal

import pytest
from running_space import RunningSpace


@pytest.fixture
def make_space(tmp_path):
    """`make_space(ONEREWARD_STUDY=..., ...)` -> a [`RunningSpace`], not started yet, that ends with the test."""
    pytest.importorskip("gradio", reason="the Space needs onereward[space]")
    made = []

    def make(**settings) -> RunningSpace:
        made.append(RunningSpace(tmp_path / f"space-{len(made)}", {k: str(v) for k, v in settings.items()}))
        return made[-1]

    yield make
    for space in made:
        if space.process is not None and space.process.poll() is None:
            space.end(signal.SIGKILL)


@pytest.fixture
def space(make_space):
    """The Space with its own study, open to all, running."""
    running = make_space()
    running.start()
    return running


@pytest.fixture(scope="session")
def running_space(tmp_path_factory):
    """`with running_space(ONEREWARD_STUDY=..., ...) as space`: a [`RunningSpace`] for several tests at once."""
    pytest.importorskip("gradio", reason="the Space needs onereward[space]")

    @contextlib.contextmanager
    def run(**settings):
        space = RunningSpace(tmp_path_factory.mktemp("space"), settings)
        space.start()
        try:
            yield space
        finally:
            space.end()

    return run
