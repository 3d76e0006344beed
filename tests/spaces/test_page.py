"""The page in a real browser: open, paint, generate, look closely, vote by mouse and by keys, take an answer back."""

import base64
import io
import json
import shutil
import time
import zipfile
from pathlib import Path

import datasets
import nibabel as nib
import numpy as np
import pytest
from PIL import Image

from onereward.data.synthetic import is_synthetic
from onereward.preferences.schema import encoded_rows
from onereward.preferences.store import VoteStore
from onereward.preferences.study_design import StudySettings, make_study


playwright = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="there is no Chromium on this machine (`apt install chromium`)"
)
SPACE = Path(__file__).parents[2] / "spaces/onereward-arena"
CONSENT = {"instructions": "Look closely.", "consent": "Research only.", "roles": ["radiologist", "lay"], "goal": 6}


@pytest.fixture(scope="module")
def chromium():
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def arena(running_space):
    """The Space as it comes, with the study that is in it."""
    with running_space(ONEREWARD_ORGANISER_KEY="the-organisers-own-key") as space:
        yield space


@pytest.fixture
def open_page(chromium):
    """`open_page(url, width)` -> a page in a browser of its own; what goes wrong on it fails the test."""
    contexts, errors = [], []

    def make(url, width=1280):
        context = chromium.new_context(viewport={"width": width, "height": 1000}, accept_downloads=True)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto(url)
        page.wait_for_selector("#run")
        return page

    yield make
    for context in contexts:
        context.close()
    assert errors == []


def start_voting(page):
    page.get_by_role("tab", name="Vote").click()
    page.locator("#role label").first.click()
    page.locator("#agree input").check()
    page.click("#start")
    page.wait_for_selector("#pictures figure")


def answered(page):
    return int(page.locator("#progress progress").get_attribute("value"))


def wait_for_answers(page, number):
    page.wait_for_function("n => document.querySelector('#progress progress')?.value === n", arg=number)


def transforms(page, box):
    return set(page.locator(f"{box} .view img").evaluate_all("all => all.map(e => getComputedStyle(e).transform)"))


def judged(page):
    return page.locator("#pictures [id^=image-] img.image").evaluate_all("all => all.map(e => e.src)")


def test_one_click_on_an_example_paints_it(arena, open_page):
    page = open_page(arena.url)
    page.locator("#examples button").first.click()
    page.wait_for_selector("#details figure", timeout=60_000)
    assert page.locator("#results img").count() == 2
    assert "not for clinical use" in page.locator("#notice").inner_text()
    alts = page.locator("#details .view img:first-child").evaluate_all("all => all.map(e => e.alt)")
    assert alts == ["Source", "Synthetic image 1", "Difference"]


def test_a_picture_is_opened_painted_on_generated_and_taken_home(arena, open_page, tmp_path):
    picture = Image.open(SPACE / "examples/1-image.png").resize((96, 96))
    picture.save(tmp_path / "Mustermann Erika.png")
    page = open_page(arena.url)
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "Mustermann Erika.png")
    page.wait_for_selector("#editor canvas")
    page.wait_for_timeout(2500)  # the editor has no event for being ready
    box = page.locator("#editor canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    for row in range(-30, 31, 10):
        page.mouse.move(x - 30, y + row)
        page.mouse.down()
        page.mouse.move(x + 30, y + row, steps=8)
        page.mouse.up()
    page.wait_for_timeout(1500)
    page.click("#run")
    page.wait_for_selector("#details figure", timeout=60_000)

    page.locator("#details [data-zoom-by='1.4']").click()
    assert transforms(page, "#details") == {"matrix(1.4, 0, 0, 1.4, 0, 0)"}  # all pictures in step
    page.locator("#details [data-zoom-by='0']").click()
    assert transforms(page, "#details") == {"matrix(1, 0, 0, 1, 0, 0)"}
    slider = page.locator("#details input[data-sets='--blend']")
    slider.fill("40")
    opacity = page.locator("#details img.over").evaluate("e => getComputedStyle(e).opacity")
    assert float(opacity) == pytest.approx(0.4)

    with page.expect_download() as download:
        page.click("#download")
    archive = zipfile.ZipFile(io.BytesIO(Path(download.value.path()).read_bytes()))
    names = archive.namelist()
    assert sorted(Path(name).suffix for name in names) == [".json", ".json", ".png", ".png"]
    assert not any(b"Mustermann" in archive.read(name) for name in names) and "Mustermann" not in str(names)
    for name in (name for name in names if name.endswith(".png")):
        archive.extract(name, tmp_path)
        assert is_synthetic(tmp_path / name)["model"] == "onereward-brats"
        changed = np.asarray(Image.open(tmp_path / name)) != np.asarray(picture)
        assert 0 < changed.mean() < 0.2  # what was painted on, and nothing else: a square in the middle
        rows, columns = np.nonzero(changed)
        assert 28 < rows.min() and rows.max() < 68 and 28 < columns.min() and columns.max() < 68


def test_who_looks_at_another_slice_meanwhile_does_not_move_what_is_painted(arena, open_page, tmp_path):
    pixels = np.random.default_rng(0).integers(100, 900, (48, 48, 20)).astype(np.int16)
    inside = np.zeros(pixels.shape, np.uint8)
    inside[16:32, 16:32] = 1
    for name, content in (("scan", pixels), ("mask", inside)):
        nib.save(nib.Nifti1Image(content, np.diag([1.0, 1.0, 3.0, 1.0])), tmp_path / f"{name}.nii.gz")
    page = open_page(arena.url)
    page.locator("#upload input[type=file]").set_input_files(tmp_path / "scan.nii.gz")
    page.wait_for_selector("#slice input[type=range]")
    page.wait_for_timeout(2500)  # the editor has no event for being ready
    page.locator("#mask-upload input[type=file]").set_input_files(tmp_path / "mask.nii.gz")
    page.wait_for_timeout(2000)
    page.click("#run")
    page.locator("#results", has_text="steps").wait_for()
    page.locator("#slice input[type=range]").focus()
    page.keyboard.press("Home")
    page.wait_for_selector("#details figure", timeout=60_000)
    page.locator("#results button").nth(1).click()  # a choice among the images does not ask for the slice either
    page.locator("#details figcaption", has_text="Synthetic image 2").wait_for()
    with page.expect_download() as download:
        page.click("#download")
    with zipfile.ZipFile(download.value.path()) as archive:
        archive.extract("synthetic-fill-seed0.nii.gz", tmp_path)
    result = np.asarray(nib.load(tmp_path / "synthetic-fill-seed0.nii.gz").dataobj)
    assert set(np.argwhere(result != pixels)[:, 2]) == {10}
    assert np.array_equal(result[inside == 0], pixels[inside == 0])


def test_waiting_can_be_stopped_and_the_next_example_is_painted(arena, open_page):
    page, other = open_page(arena.url), open_page(arena.url)
    page.get_by_role("button", name="Settings").click()
    for setting, value in (("Denoising steps", "50"), ("Images", "8")):  # for as long as this test looks
        number = page.get_by_label(f"number input for {setting}")
        number.fill(value)
        number.press("Enter")
    page.locator("#examples button").first.click()
    page.locator("#results", has_text="/400 steps").wait_for()
    other.locator("#examples button").first.click()
    other.locator("#results", has_text="queue").wait_for()
    other.click("#cancel")
    other.locator("#message", has_text="Stopped").wait_for()
    page.click("#cancel")
    page.locator("#results", has_text="steps").wait_for(state="detached")
    assert other.locator("#details figure").count() == 0

    other.locator("#examples button").first.click()
    other.locator("#results", has_text="/40 steps").wait_for()
    other.locator("#examples button").nth(3).click()
    third = json.loads((SPACE / "examples/examples.json").read_text())[3]
    other.locator("#message", has_text=third["prompt"]).wait_for(timeout=60_000)
    assert other.locator("#details figure").count() == 3


def test_layers_are_named_and_cannot_be_moved_or_deleted(arena, open_page):
    page = open_page(arena.url)
    page.locator("#upload input[type=file]").set_input_files(SPACE / "examples/1-image.png")
    page.wait_for_selector("#editor canvas")
    page.wait_for_timeout(1500)
    page.click("#editor .layer-title-button")
    rows = page.locator("#editor .layer-wrap li")
    assert [row.inner_text().strip()[:6] for row in rows.all()] == ["1. rep", "2. NCR", "3. ED", "4. ET"]
    for row in rows.all():
        assert row.locator("button:visible").count() == 2  # show it, choose it


def test_votes_by_mouse_and_by_keys_and_undo(arena, open_page):
    page = open_page(arena.url)
    start_voting(page)
    assert answered(page) == 0
    page.click("#answer-right")
    wait_for_answers(page, 1)
    for number, key in enumerate(["ArrowLeft", "ArrowDown", "ArrowRight", "x"], start=2):
        page.keyboard.press(key)
        wait_for_answers(page, number)
    page.keyboard.press("u")
    wait_for_answers(page, 4)
    page.locator("#undo").click()
    wait_for_answers(page, 3)
    # typing is no voting
    page.locator("#comment textarea").fill("x marks nothing")
    page.locator("#comment textarea").press("ArrowLeft")
    page.wait_for_timeout(500)
    assert answered(page) == 3
    page.locator("#pictures input[data-sets='--outline']").click()  # nor does a click on it keep the keys
    page.keyboard.press("ArrowLeft")
    wait_for_answers(page, 4)
    page.locator("#pictures").hover()
    page.locator("#pictures [data-zoom-by='1.4']").click()
    assert len(transforms(page, "#pictures")) == 1
    page.get_by_text("Use via API").click()
    page.wait_for_selector("[aria-modal=true]")
    page.keyboard.press("ArrowDown")  # what is not seen is not answered
    page.wait_for_timeout(500)
    assert answered(page) == 4


def test_a_reload_goes_on_and_a_second_browser_is_somebody_else(arena, open_page):
    page = open_page(arena.url)
    tab = page.context.new_page()
    tab.goto(arena.url)
    tab.wait_for_selector("#run")
    start_voting(page)
    page.keyboard.press("ArrowLeft")
    wait_for_answers(page, 1)
    start_voting(tab)  # opened before the other one had a name
    tab.keyboard.press("ArrowLeft")
    wait_for_answers(tab, 2)
    seen = tab.locator("#pictures img").first.get_attribute("src")
    page.reload()
    page.get_by_role("tab", name="Vote").click()
    wait_for_answers(page, 2)
    assert page.locator("#pictures img").first.get_attribute("src") == seen  # the same question, on the same sides

    tab.reload()  # another tab of the same browser is the same rater
    tab.get_by_role("tab", name="Vote").click()
    tab.keyboard.press("ArrowLeft")
    wait_for_answers(tab, 3)

    other = open_page(arena.url)
    other.get_by_role("tab", name="Vote").click()
    assert other.locator("#start").is_visible()
    start_voting(other)
    assert answered(other) == 0


def test_the_second_of_two_tabs_cannot_answer_a_question_twice(arena, open_page):
    page = open_page(arena.url)
    start_voting(page)
    tab = page.context.new_page()
    tab.goto(arena.url)
    tab.get_by_role("tab", name="Vote").click()
    tab.wait_for_selector("#pictures figure")
    page.click("#answer-left")
    wait_for_answers(page, 1)
    tab.click("#answer-right")
    tab.get_by_text("undo", exact=False).first.wait_for()
    page.click("#answer-left")
    wait_for_answers(page, 2)


def test_the_time_of_an_answer_is_that_since_its_question_came(arena, open_page):
    page = open_page(arena.url)
    start_voting(page)
    tab = page.context.new_page()
    tab.goto(arena.url)
    tab.get_by_role("tab", name="Vote").click()
    tab.wait_for_selector("#pictures figure")
    begun = time.monotonic()
    tab.wait_for_timeout(1500)
    page.click("#answer-left")
    wait_for_answers(page, 1)
    tab.click("#answer-right")
    tab.get_by_text("undo", exact=False).first.wait_for()  # which was refused, and is no new question
    page.click("#undo")
    wait_for_answers(page, 0)
    tab.click("#answer-right")
    wait_for_answers(tab, 1)
    tab.wait_for_timeout(500)
    tab.click("#answer-right")
    wait_for_answers(tab, 2)
    with VoteStore(arena.data / "votes.sqlite") as store:
        first, second = store.votes(pictures=False)["seconds"][-2:]
    assert 1.5 <= first <= time.monotonic() - begun - 0.5
    assert 0.5 <= second <= time.monotonic() - begun - 1.5


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_sticks_out_of_the_screen(arena, open_page, width):
    page = open_page(arena.url, width)
    for tab in ("Generate", "Vote", "Results", "About"):
        page.get_by_role("tab", name=tab).click()
        page.wait_for_timeout(300)
        assert page.evaluate("document.documentElement.scrollWidth") <= width, tab
    start_voting(page)
    boxes = [page.locator(f"#answer-{name}").bounding_box() for name in ("left", "tie", "neither", "right")]
    assert all(box["x"] >= 0 and box["x"] + box["width"] <= width and box["height"] >= 44 for box in boxes)
    assert page.locator("#notice").is_visible()


def test_a_screen_reader_is_told_what_everything_is(arena, open_page):
    page = open_page(arena.url)
    start_voting(page)
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select, [role=slider]")]
            .filter(e => e.offsetParent !== null && !e.labels?.length && !e.innerText?.trim()
                && !e.getAttribute("aria-label") && !e.title && !e.getAttribute("aria-labelledby"))
            .map(e => e.outerHTML.slice(0, 200))"""
    )
    assert nameless == []
    assert page.locator("#pictures img:not([alt])").count() == 0
    assert page.locator("#progress progress").get_attribute("aria-label")


def test_results_are_for_organisers_while_the_study_runs(arena, open_page):
    page = open_page(arena.url)
    start_voting(page)
    for number in range(1, 4):
        page.keyboard.press("ArrowLeft")
        wait_for_answers(page, number)
    page.get_by_role("tab", name="Results").click()
    page.click("#show-results")
    page.get_by_text("organisers alone see the results").first.wait_for()
    assert not page.locator("#summary").is_visible()
    page.locator("#organiser-key input").fill("the-organisers-own-key")
    page.click("#show-results")
    page.wait_for_selector("#summary")
    page.wait_for_function("() => /votes of/.test(document.querySelector('#summary').innerText)", timeout=60_000)


@pytest.mark.parametrize("mode", ["best_worst", "turing"])
def test_the_other_kinds_of_study(mode, running_space, open_page, tmp_path):
    candidates = datasets.Dataset.from_parquet(str(SPACE / "study/candidates.parquet"))
    if mode == "turing":
        real = np.arange(len(candidates)) % 3 == 0
        models = ["real" if is_real else "base" for is_real in real]
        candidates = candidates.remove_columns("model").add_column("model", models)
        criteria = {task: ["realism"] for task in ("fill", "remove")}
    else:
        criteria = {"fill": ["quality"], "remove": ["removal_quality"]}
    settings = StudySettings(title=mode, mode=mode, criteria=criteria, images_per_set=3, repeat_share=0.0, **CONSENT)
    make_study(tmp_path / "study", candidates.cast(candidates.features), settings)
    with running_space(ONEREWARD_STUDY=str(tmp_path / "study")) as space:
        page = open_page(space.url)
        start_voting(page)
        if mode == "turing":
            assert page.locator("#pictures figure").count() == 1
            assert page.locator("#question p").count() == 0  # what was asked for would tell that it was painted
            page.keyboard.press("r")
            wait_for_answers(page, 1)
            page.click("#answer-synthetic")
            wait_for_answers(page, 2)
        else:
            shown = [base64.b64decode(src.partition(",")[2]) for src in judged(page)]
            page.keyboard.press("2")
            page.get_by_text("Image 2 is the best").wait_for()
            page.keyboard.press("2")  # changed my mind
            page.locator("#choice", has_text="Press the number of the best").wait_for()
            page.keyboard.press("3")  # faster than any server
            page.keyboard.press("1")
            wait_for_answers(page, 1)
            with VoteStore(space.data / "votes.sqlite") as store:
                votes = list(encoded_rows(store.votes()))
            won = [vote[f"image_{int(vote['label_0'] != 1)}"]["bytes"] for vote in votes]
            assert [won.count(image) for image in shown] == [0, 1, 2]
            page.keyboard.press("0")
            wait_for_answers(page, 2)
        page.keyboard.press("u")
        wait_for_answers(page, 1)
