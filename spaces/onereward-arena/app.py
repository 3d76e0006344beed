"""
OneReward arena: paint, compare, vote. Research use only, not for clinical use.

    python app.py

Settings are read from the environment, so that a Space can set them as variables and secrets:

    ONEREWARD_PIPELINE       folder or Hub id of the pipeline; the embedded base, or the one README.md names
    ONEREWARD_ADAPTERS       folder of adapters to pick from; adapters/ beside this file
    ONEREWARD_REWARD_MODEL   folder or Hub id of a reward model; reward_model/ beside this file
    ONEREWARD_STUDY          folder of a study made with `onereward study make`; study/ beside this file
    ONEREWARD_DATA_DIR       where votes are kept: /data on a Space with storage, else data/ beside this file
    ONEREWARD_VOTES_REPO     data set on the Hub that votes are sent to as well (needs the secret HF_TOKEN)
    ONEREWARD_SALT           secret that makes pseudonyms of raters; made once and kept beside the votes if left out
    ONEREWARD_ACCESS         open, password or oauth
    ONEREWARD_USERS          secret: raters and passwords, `name:password` a line
    ONEREWARD_ORGANISER_KEY  secret that opens the results
"""

import gc
import json
import os
import secrets
import signal
from pathlib import Path

import gradio as gr
from access import passwords
from generate import GenerateTab
from guard import MAX_UPLOAD, Gate, Page
from huggingface_hub import RepoCard
from painting import Painter
from results import ResultsTab
from starlette.middleware import Middleware
from theme import theme
from vote import VoteTab

from onereward.data.whole_file import whole_file
from onereward.hub.vote_sync import VoteSync
from onereward.preferences.study import Study


HERE = Path(__file__).parent


def read(name: str) -> str:
    """A text file beside this one."""
    return (HERE / name).read_text(encoding="utf-8")


TEXT = json.loads(read("texts.json"))


def setting(name: str, *places: Path) -> str | None:
    """What the environment says, else the first of the places that exists."""
    return os.environ.get(f"ONEREWARD_{name}") or next((str(place) for place in places if place.exists()), None)


def salt(folder: Path) -> str:
    """The secret that names of raters are hidden with, the same after each restart."""
    if given := os.environ.get("ONEREWARD_SALT"):
        return given
    if os.environ.get("SPACE_ID") and os.environ.get("ONEREWARD_VOTES_REPO") and not folder.is_relative_to("/data"):
        raise ValueError(
            "ONEREWARD_SALT is not set, and this Space has no storage to keep one on: after a restart all raters "
            "would be strangers. Set it as a secret, to 16 characters or more."
        )
    path = folder / "salt"
    if not path.exists():
        with whole_file(path) as partial:
            partial.touch(mode=0o600)
            partial.write_text(secrets.token_hex(16))
    return path.read_text()


def pipeline() -> str:
    """The pipeline that paints: of the settings, beside this file, of the checkout, or the one that the card names."""
    places = [folder / "pipelines/onereward-brats" for folder in (HERE, HERE.parent.parent)]
    return setting("PIPELINE", *places) or RepoCard.load(HERE / "README.md").data["preload_from_hub"][0].split()[0]


def build(painter: Painter, study: Study, sync: VoteSync | None) -> gr.Blocks:
    """The page."""
    generate, vote, results = GenerateTab(painter, TEXT), VoteTab(study, TEXT), ResultsTab(study, sync, TEXT)
    with Page(title=TEXT["title"], analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(TEXT["notice"], elem_id="notice")
        gr.Markdown(f"# {TEXT['title']}\n{TEXT['subtitle']}", elem_id="heading")
        vote.remember()
        with gr.Tabs():
            with gr.Tab(TEXT["tabs"]["generate"], id="generate"):
                generate.build()
            with gr.Tab(TEXT["tabs"]["vote"], id="vote"):
                vote.build()
            with gr.Tab(TEXT["tabs"]["results"], id="results"):
                results.build()
            with gr.Tab(TEXT["tabs"]["about"], id="about"):
                gr.Markdown(TEXT["about"])
        function, inputs, outputs, js = vote.on_load
        page.load(function, inputs, outputs, js=js, show_progress="hidden", api_visibility="private")
    return page.queue(default_concurrency_limit=40, max_size=256)


def main() -> None:
    data = Path(setting("DATA_DIR") or (Path("/data") if os.access("/data", os.W_OK) else HERE / "data"))
    data.mkdir(parents=True, exist_ok=True)
    study = Study(setting("STUDY", HERE / "study"), salt(data), state=data)
    sync = None
    if repo_id := os.environ.get("ONEREWARD_VOTES_REPO"):
        sync = VoteSync(
            study.votes,
            repo_id,
            data / "outbox",
            undo_seconds=study.settings.undo_seconds,
            candidates=study.folder / "candidates.parquet",
        )
        sync.read_back()
        sync.start()

    def end(*_) -> None:
        # how a Space is stopped; without this, Python ends before anything could be sent
        study.votes.stop()  # an answer that came now would be acknowledged, and not be sent
        sent = sync is None or sync.flush(timeout=25)
        os._exit(0 if sent else 1)  # everything is on the disk; else Python waits for whoever still talks to us

    signal.signal(signal.SIGTERM, end)
    painter = Painter(
        pipeline(),
        Path(setting("ADAPTERS") or HERE / "adapters"),
        setting("REWARD_MODEL", HERE / "reward_model"),
    )
    page = build(painter, study, sync)
    gc.collect()
    gc.freeze()  # all this stays; to look through it for garbage, Python would make raters wait for 0.4 s
    page.launch(
        server_port=int(os.environ["PORT"]) if "PORT" in os.environ else None,
        auth=passwords(),
        max_file_size=MAX_UPLOAD,
        blocked_paths=[str(data), str(study.folder)],
        state_session_capacity=1000,
        app_kwargs={"middleware": [Middleware(Gate)]},
        show_error=True,
        ssr_mode=False,
        footer_links=["api"],
        theme=theme(),
        # not as `css`, to which Gradio adds a prefix that keeps it from the page's own margins
        head=f"<style>{read('arena.css')}</style><script>{read('arena.js')}</script>",
    )


if __name__ == "__main__":
    main()
