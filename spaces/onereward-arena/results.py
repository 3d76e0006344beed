"""The Results tab: who won, how far raters agree, and the votes to take home. For organisers while the study runs."""

import gradio as gr
import pandas as pd
from access import RateLimit, caller, is_organiser, who
from guard import fresh_folder

from onereward.evaluation.reader_study import turing_test
from onereward.preferences import save_votes
from onereward.preferences.preference_report import preference_report
from onereward.preferences.study import Study


class ResultsTab:
    """
    The tab and the functions behind it.

    Args:
        study ([`~onereward.preferences.study.Study`]):
            The study.
        sync ([`~onereward.hub.vote_sync.VoteSync`], *optional*):
            Where votes are sent; `None` where they stay here.
        text (`dict`):
            The words, `texts.json`.
    """

    def __init__(self, study: Study, sync, text: dict):
        self.study, self.sync, self.text = study, sync, text["results"]
        self.limit = RateLimit(per_minute=30)  # intervals take time, and keys must not be guessed

    def allow(self, key, request, profile) -> None:
        if not self.study.settings.closed:
            self.organise(key, request, profile)
        else:
            self.hurry(request)

    def organise(self, key, request, profile) -> None:
        self.hurry(request)
        if not is_organiser(who(key, request, profile), key, self.study.settings.organisers):
            raise gr.Error(self.text["closed_to_you"], print_exception=False)

    def hurry(self, request) -> None:
        try:
            self.limit.check(caller(request))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from None

    # ---------------------------------------------------------------------------------------- what the API offers

    def results(self, key: str, request: gr.Request, profile: gr.OAuthProfile | None = None) -> dict:
        """Ranking of the models, agreement for each criterion, and votes over time."""
        self.allow(key, request, profile)
        return self.study.results()

    def export(self, key: str, request: gr.Request, profile: gr.OAuthProfile | None = None) -> str:
        """All votes as a Parquet file."""
        self.allow(key, request, profile)
        path = fresh_folder() / "votes.parquet"
        save_votes(self.study.votes.votes(), path)
        return str(path)

    def report(self, key: str, request: gr.Request, profile: gr.OAuthProfile | None = None) -> str:
        """The whole report on the votes, one HTML file."""
        self.allow(key, request, profile)
        return str(preference_report(self.study.votes.votes(), fresh_folder(), title=self.study.settings.title))

    def close(self, closed: bool, key: str, request: gr.Request, profile: gr.OAuthProfile | None = None) -> dict:
        """End the study, or open it again. For organisers."""
        self.organise(key, request, profile)
        self.study.close() if closed else self.study.reopen()
        return {"closed": self.study.settings.closed}

    # --------------------------------------------------------------------------------------------------- the page

    def build(self) -> None:
        """Draws the tab; to be called inside `gr.Blocks`."""
        text = self.text
        key = gr.Textbox(label=text["key"], type="password", elem_id="organiser-key")
        show = gr.Button(text["show"], variant="primary", elem_id="show-results")
        with gr.Column(visible=False) as panel:
            summary = gr.Markdown(elem_id="summary")
            ranking = gr.Dataframe(headers=text["ranking_columns"], label=text["ranking"], interactive=False)
            agreement = gr.Dataframe(headers=text["agreement_columns"], label=text["agreement"], interactive=False)
            turing = gr.Dataframe(
                headers=text["turing_columns"],
                label=text["turing"],
                interactive=False,
                visible=self.study.settings.mode == "turing",
            )
            over_time = gr.BarPlot(x=text["day"], y=text["votes"], title=text["over_time"], height=220)
            with gr.Row():
                export = gr.DownloadButton(text["export"])
                report = gr.DownloadButton(text["report"])
                end, reopen = gr.Button(text["end"]), gr.Button(text["reopen"])

        def on_show(key, request: gr.Request, profile: gr.OAuthProfile | None = None):
            found = self.results(key, request, profile)
            votes = found["votes"]
            state = text["ended"] if self.study.settings.closed else text["running"]
            counts = {"votes": len(votes), "raters": len({vote["rater"] for vote in votes})}
            words = text["summary"].format(**counts, state=state, storage=self.storage())
            if not votes:
                return [gr.Column(visible=True), text["nothing"], None, None, None, None, gr.skip(), gr.skip()]
            return [
                gr.Column(visible=True),
                words,
                ranking_table(found["summary"]),
                agreement_table(found["summary"]),
                turing_table(votes) if self.study.settings.mode == "turing" else None,
                days_table(found["over_time"], text),
                self.export(key, request, profile),
                self.report(key, request, profile),
            ]

        private = {"api_visibility": "private"}
        shown = [panel, summary, ranking, agreement, turing, over_time, export, report]
        show.click(on_show, key, shown, **private)

        def on_close(key, request: gr.Request, profile: gr.OAuthProfile | None = None):
            self.close(True, key, request, profile)
            return on_show(key, request, profile)

        def on_reopen(key, request: gr.Request, profile: gr.OAuthProfile | None = None):
            self.close(False, key, request, profile)
            return on_show(key, request, profile)

        end.click(on_close, key, shown, **private)
        reopen.click(on_reopen, key, shown, **private)
        reply, file = gr.JSON(visible=False), gr.File(visible=False)
        hidden_key, closed = gr.Textbox(visible=False, label="key"), gr.Checkbox(visible=False, label="closed")
        for function, inputs, output in (
            (self.results, [hidden_key], reply),
            (self.export, [hidden_key], file),
            (self.report, [hidden_key], file),
            (self.close, [closed, hidden_key], reply),
        ):
            gr.Button(visible=False).click(function, inputs, output, api_name=function.__name__)

    def storage(self) -> str:
        """Where votes are, and how many have not been sent."""
        if self.sync is None:
            return self.text["stored_here"]
        state = self.sync.state()
        problems = " ".join([state["last_error"] or "", *state["refused"]])
        return self.text["stored_on_hub"].format(repo=state["repo_id"], waiting=state["waiting"], problems=problems)


def ranking_table(summary: dict) -> list[list]:
    """Of each criterion the models, best first: criterion, model, strength, its interval, votes."""
    rows = []
    for found in summary["rankings"]:
        ranking = found["ranking"]
        for place, model in enumerate(ranking["items"]):
            low, high = ranking["score_interval"][place]
            interval = f"{low:+.2f} to {high:+.2f}" if low is not None and high is not None else "–"
            rows.append(
                [found["criterion"], model, f"{ranking['score'][place]:+.2f}", interval, found["votes"][place]]
            )
    return rows


def agreement_table(summary: dict) -> list[list]:
    """Of each criterion the agreement: criterion, alpha, its interval, items that two raters or more have judged."""
    rows = []
    for found in summary["agreement"]:
        alpha = found["alpha"]
        value, low, high = alpha["value"], alpha["low"], alpha["high"]
        interval = f"{low:.2f} to {high:.2f}" if low is not None and high is not None else "–"
        rows.append([found["criterion"], "–" if value is None else f"{value:.2f}", interval, found["items"]])
    return rows


def turing_table(votes: list[dict]) -> list[list]:
    """Share of right answers of all raters and of each role, with intervals."""
    study = turing_test(votes, criterion="realism", real="real")
    shares = {"all raters": study.accuracy, **study.roles}
    return [[name, f"{share.value:.2f}", f"{share.low:.2f} to {share.high:.2f}"] for name, share in shares.items()]


def days_table(over_time: list[dict], text: dict) -> pd.DataFrame:
    """Votes of each day, for the plot."""
    days = {text["day"]: [row["day"] for row in over_time], text["votes"]: [row["votes"] for row in over_time]}
    return pd.DataFrame(days)
