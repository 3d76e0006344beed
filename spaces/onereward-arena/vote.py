"""The Vote tab: consent once, then one question after another, each answer kept before the next one is shown."""

import io
import json
import secrets
from html import escape

import gradio as gr
import numpy as np
from access import ACCESS, who
from PIL import Image
from views import checkbox, figure, outline, side_by_side, to_url

from onereward.preferences.study import Study, StudyError


TIMER = "arenaSeconds()"  # arena.js


def strangers(key, request, profile) -> str:
    """Name of the rater; an error in words for people where there is none."""
    name = who(key, request, profile)
    if name is None:
        wanted = {
            "open": "call /join first and pass its key",
            "password": "log in",
            "oauth": "sign in with Hugging Face",
        }
        raise gr.Error(f"I do not know who you are: {wanted[ACCESS]}.", print_exception=False)
    return name


class VoteTab:
    """
    The tab and the functions behind it. Nothing is kept in the session: whoever comes back, after a restart of the
    server too, goes on where they were.

    Args:
        study ([`~onereward.preferences.study.Study`]):
            What is asked, and where answers are kept.
        text (`dict`):
            The words, `texts.json`.
    """

    def __init__(self, study: Study, text: dict):
        self.study, self.text = study, text

    # ---------------------------------------------------------------------------------------- what the API offers

    def rater(self, key, request, profile) -> str:
        try:
            return self.study.rater(strangers(key, request, profile))
        except StudyError as error:
            raise gr.Error(str(error), print_exception=False) from None

    def join(
        self, role: str, consent: bool, key: str, request: gr.Request, profile: gr.OAuthProfile | None = None
    ) -> dict:
        """Take part in the study. Gives a secret `key` to pass on in every other call, where there is no login."""
        if ACCESS == "open" and not key:
            key = secrets.token_urlsafe(24)
        try:
            rater = self.study.join(strangers(key, request, profile), role, consent)
        except StudyError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return {"key": key, **self.study.progress(rater)}

    def next(self, key: str, request: gr.Request, profile: gr.OAuthProfile | None = None) -> dict:
        """The question that is open, or the next one; `{}` when all has been answered. Pictures are data URLs."""
        item = self._next(self.rater(key, request, profile))
        if item is None:
            return {}
        pictures = {name: getattr(item, name) for name in ("source", "mask", "label_map")}
        return {
            **{
                name: getattr(item, name)
                for name in ("item_id", "mode", "task", "prompt", "criteria", "answered", "window")
            },
            **{name: None if picture is None else to_url(picture) for name, picture in pictures.items()},
            "images": [to_url(picture) for picture in item.images],
        }

    def vote(
        self,
        item_id: str,
        criterion: str,
        answer: str | dict,
        comment: str,
        seconds: float,
        key: str,
        request: gr.Request,
        profile: gr.OAuthProfile | None = None,
    ) -> dict:
        """
        Answer one criterion of a question: "left", "right", "tie", "both_unacceptable"; "real" or "synthetic"; or
        {"best": 0, "worst": 2} or "no_difference". When this returns, the vote is on the disk.
        """
        rater = self.rater(key, request, profile)
        try:
            receipt = self.study.answer(
                rater, str(item_id), str(criterion), answer, comment=comment or None, seconds=seconds
            )
        except StudyError as error:
            raise gr.Error(str(error), print_exception=False) from None
        except OSError:  # the disk is full, or the server is about to end
            raise gr.Error(self.text["vote"]["not_stored"], print_exception=False) from None
        return {name: getattr(receipt, name) for name in ("remaining", "answered", "goal", "comment_warning")}

    def undo(self, key: str, request: gr.Request, profile: gr.OAuthProfile | None = None) -> dict:
        """Take your last answer back; its question is open again."""
        rater = self.rater(key, request, profile)
        try:
            item_id, criterion = self.study.undo(rater)
        except StudyError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return {"item_id": item_id, "criterion": criterion}

    def skip(
        self, item_id: str, reason: str, key: str, request: gr.Request, profile: gr.OAuthProfile | None = None
    ) -> dict:
        """Leave a question out, and say why."""
        rater = self.rater(key, request, profile)
        try:
            self.study.skip(rater, str(item_id), str(reason))
        except StudyError as error:
            raise gr.Error(str(error), print_exception=False) from None
        return self.study.progress(rater)

    def progress(self, key: str, request: gr.Request, profile: gr.OAuthProfile | None = None) -> dict:
        """How many answers you have given, and how many were asked of you."""
        return self.study.progress(self.rater(key, request, profile))

    def _next(self, rater):
        try:
            return self.study.next_item(rater)
        except StudyError as error:
            raise gr.Error(str(error), print_exception=False) from None

    # --------------------------------------------------------------------------------------------------- the page

    def remember(self) -> None:
        """
        The rater's key, which the browser keeps. To be called inside `gr.Blocks` but outside of the tabs, whose parts
        are not there before they are looked at.
        """
        self.key = gr.Textbox(visible="hidden")
        # not `gr.BrowserState`, which is read once: of two tabs, the second to start would be another rater
        self.kept = f"localStorage[{json.dumps('onereward-' + self.study.settings.title)}]"

    def build(self) -> None:
        """Draws the tab; to be called inside `gr.Blocks`."""
        text, settings, key = self.text["vote"], self.study.settings, self.key
        with gr.Column(elem_id="consent") as consent_panel:
            gr.Markdown(settings.instructions)
            gr.Markdown(settings.consent)
            role = gr.Radio(settings.roles, label=text["role"], elem_id="role")
            agreed = gr.Checkbox(label=text["agree"], elem_id="agree")
            if ACCESS == "oauth":
                gr.LoginButton(text["login"])
            start = gr.Button(text["start"], variant="primary", elem_id="start")

        with gr.Column(visible=False, elem_id="voting") as voting_panel:
            bar = gr.HTML(elem_id="progress")
            question = gr.HTML(elem_id="question")
            pictures = gr.HTML(elem_id="pictures")
            item_id, criterion = gr.Textbox(visible=False), gr.Textbox(visible=False)
            answer, seconds = gr.JSON(visible=False), gr.Number(visible=False)
            mode, buttons = settings.mode, {}
            with gr.Row(elem_id="answers"):
                if mode == "pairs":
                    shown = (("left", "left"), ("tie", "tie"), ("neither", "both_unacceptable"), ("right", "right"))
                elif mode == "turing":
                    shown = (("real", "real"), ("synthetic", "synthetic"))
                else:
                    shown = (("no-difference", "no_difference"),)
                for name, value in shown:
                    buttons[value] = gr.Button(text[f"answer_{value}"], elem_id=f"answer-{name}")
            if mode == "best_worst":  # arena.js keeps the best until the worst is chosen, and then presses the button
                with gr.Row(elem_id="numbers"):
                    for number in range(settings.images_per_set):
                        gr.Button(str(number + 1), elem_id=f"number-{number + 1}")
                buttons["best_worst"] = gr.Button(visible="hidden", elem_id="answer-best-worst")
            with gr.Row(elem_id="skipping"):
                undo = gr.Button(text["undo"], size="sm", elem_id="undo")
                skip_reason = gr.Dropdown(
                    text["skip_reasons"], label=text["skip_reason"], scale=2, elem_id="skip-reason"
                )
                skip = gr.Button(text["skip"], size="sm", elem_id="skip")
            comment = gr.Textbox(
                label=text["comment"], info=text["comment_info"], max_length=500, lines=1, elem_id="comment"
            )
            message = gr.Markdown(elem_id="vote-message")
            gr.Markdown(text[f"keys_{mode}"], elem_id="keys")

        screen = [consent_panel, voting_panel, bar, question, pictures, item_id, criterion, comment, message]

        def draw(rater: str, note: str = "") -> list:
            """All of the screen for what is open now."""
            item = self._next(rater)
            progress = self.progress_bar(self.study.progress(rater))
            shown = [gr.Column(visible=False), gr.Column(visible=True), progress]
            if item is None:
                return [*shown, f"<h2>{escape(text['done'])}</h2>", "", "", "", "", note]
            name = next(name for name in item.criteria if name not in item.answered)
            return [*shown, self.question(item, name), self.pictures(item), item.item_id, name, "", note]

        def first_screen(key, request: gr.Request, profile: gr.OAuthProfile | None = None):
            """Who has consented before goes on at once."""
            name = who(key, request, profile)
            if name is None:
                return [gr.skip()] * (1 + len(screen))
            try:
                rater = self.study.rater(name)
            except StudyError:
                return [gr.skip()] * (1 + len(screen))
            return [key, *draw(rater)]

        def on_start(role, agreed, key, request: gr.Request, profile: gr.OAuthProfile | None = None):
            joined = self.join(role, agreed, key, request, profile)
            return [joined["key"], *draw(self.rater(joined["key"], request, profile))]

        def on_answer(
            item_id,
            criterion,
            answer,
            comment,
            seconds,
            key,
            request: gr.Request,
            profile: gr.OAuthProfile | None = None,
        ):
            receipt = self.vote(item_id, criterion, answer, comment, seconds, key, request, profile)
            return draw(self.rater(key, request, profile), receipt["comment_warning"] or text["kept"])

        def on_undo(key, request: gr.Request, profile: gr.OAuthProfile | None = None):
            self.undo(key, request, profile)
            return draw(self.rater(key, request, profile), text["undone"])

        def on_skip(item_id, reason, key, request: gr.Request, profile: gr.OAuthProfile | None = None):
            self.skip(item_id, reason, key, request, profile)
            return draw(self.rater(key, request, profile), text["skipped"])

        quiet = {"show_progress": "hidden", "api_visibility": "private"}
        js = f"(role, agreed) => [role, agreed, {self.kept} ?? '']"
        started = start.click(on_start, [role, agreed, key], [key, *screen], js=js, **quiet)
        started.success(None, [key], js=f"(key) => {{ {self.kept} = key }}")
        given = [item_id, criterion, answer, comment, seconds, key]
        for value, button in buttons.items():
            # the answer and the time come from the browser; the button's own name is all that tells them apart
            value = "arenaChoice()" if value == "best_worst" else f"'{value}'"
            js = f"(item, criterion, _, comment, __, key) => [item, criterion, {value}, comment, {TIMER}, key]"
            button.click(on_answer, given, screen, js=js, trigger_mode="once", **quiet)
        undo.click(on_undo, [key], screen, **quiet)
        skip.click(on_skip, [item_id, skip_reason, key], screen, **quiet)
        self.on_load = (first_screen, [key], [key, *screen], f"() => [{self.kept} ?? '']")

        for function, signature in (
            (self.join, [role, agreed]),
            (self.next, []),
            (self.vote, [item_id, criterion, answer, comment, seconds]),
            (self.undo, []),
            (self.skip, [item_id, skip_reason]),
            (self.progress, []),
        ):
            key_box, reply = gr.Textbox(visible=False, label="key"), gr.JSON(visible=False)
            hidden = gr.Button(visible=False)
            hidden.click(function, [*signature, key_box], reply, api_name=function.__name__)

    def progress_bar(self, progress: dict) -> str:
        text = self.text["vote"]["progress"].format(**progress)
        return (
            f'<div class="progress"><progress max="{progress["goal"]}" value="{progress["answered"]}" '
            f'aria-label="{escape(text)}"></progress><span>{escape(text)}</span></div>'
        )

    def question(self, item, criterion: str) -> str:
        text = self.text["vote"]
        words = text["criteria"].get(criterion, {})
        asked = words.get("question", text["ask"].format(criterion=criterion.replace("_", " ")))
        if item.mode != "pairs":
            asked = text[f"ask_{item.mode}"].format(criterion=words.get("name", criterion.replace("_", " ")))
        place = f"{item.criteria.index(criterion) + 1}/{len(item.criteria)}"
        wanted = f"<p>{escape(text['tasks'][item.task])}</p>" if item.task else ""
        wanted += f"<p>{escape(text['prompt'].format(prompt=item.prompt))}</p>" if item.prompt else ""
        if item.mode == "best_worst":  # filled in by arena.js
            words = (f'data-{name}="{escape(text[f"best_{name}"])}"' for name in ("chosen", "unchosen"))
            wanted += f'<p id="choice" role="status" {" ".join(words)}></p>'
        # by its name the browser's clock knows a new question; the words may be those of the last one
        name = escape(f"{item.item_id} {criterion}")
        heading = f'<h3 aria-live="polite" data-question="{name}">{escape(asked)} <small>({place})</small></h3>'
        return heading + wanted

    def pictures(self, item) -> str:
        text = self.text["vote"]
        edge = [] if item.mask is None else [("outline", outline(np.asarray(_opened(item.mask))))]
        captions = {"pairs": [text["left"], text["right"]], "turing": [text["image"]]}.get(
            item.mode, [text["numbered"].format(number=i + 1) for i in range(len(item.images))]
        )
        judged = [
            figure(caption, [("image", picture), *(edge if item.mode != "turing" else [])], f"image-{i}")
            for i, (caption, picture) in enumerate(zip(captions, item.images, strict=True))
        ]
        if item.source is not None and item.mode != "turing":
            source = figure(text["source"], [("image", item.source), *edge], "source")
            judged = [judged[0], source, judged[1]] if item.mode == "pairs" else [source, *judged]
        width, height = _opened(item.images[0]).size
        tools = [checkbox(self.text["view"]["outline"], "--outline")] if edge and item.mode != "turing" else []
        return side_by_side(judged, tools, self.text["view"], width / height)


def _opened(png: bytes) -> Image.Image:
    return Image.open(io.BytesIO(png))
