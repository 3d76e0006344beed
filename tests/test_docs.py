"""What the documentation says of the code and the tests is so, and its site is whole and fetches nothing."""

import ast
import dataclasses
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

import onereward


REPOSITORY = Path(__file__).parents[1]
SOURCES = REPOSITORY / "src" / "onereward"
DOCS = REPOSITORY / "docs"


def functions(path):
    tree = ast.parse((REPOSITORY / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


def test_every_test_that_the_table_of_peer_bugs_names_is_there():
    text = (DOCS / "peer_bugs.md").read_text(encoding="utf-8")
    named = re.findall(r"`(tests/[\w/.]+)::(\w+)`", text)
    assert len(named) > 60
    missing = [f"{path}::{name}" for path, name in named if name not in functions(path)]
    assert not missing


@pytest.mark.parametrize(("letter", "count"), [("B", 30), ("M", 6)])
def test_no_number_is_left_out(letter, count):
    text = (DOCS / "peer_bugs.md").read_text(encoding="utf-8")
    assert [int(n) for n in re.findall(rf"^\| {letter}(\d+) ", text, flags=re.M)] == list(range(1, count + 1))


class Page(HTMLParser):
    """What a page of the site shows, links to and loads."""

    def __init__(self, path):
        super().__init__()
        self.ids, self.links, self.loads, self.text, self.code = set(), [], [], [], 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.ids.add(attributes.get("id"))
        self.code += tag in ("pre", "code", "script", "style")
        if tag == "a":
            self.links.append(attributes.get("href", ""))
        elif tag == "link" and attributes.get("rel") not in ("canonical", "prev", "next", "alternate"):
            self.loads.append(attributes["href"])
        elif "src" in attributes:
            self.loads.append(attributes["src"])

    def handle_endtag(self, tag):
        self.code -= tag in ("pre", "code", "script", "style")

    def handle_data(self, data):
        if not self.code:
            self.text.append(data)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The site as `make docs` builds it: name of a page -> the page."""
    folder = tmp_path_factory.mktemp("site")
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPOSITORY / "src")}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    built = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    return {str(path.relative_to(folder)): Page(path) for path in sorted(folder.rglob("index.html"))}


def test_every_page_is_on_the_site(site):
    pages = {str(path.relative_to(DOCS).with_suffix("")) for path in DOCS.rglob("*.md")}
    built = {name.removesuffix("index.html").rstrip("/") for name in site}
    assert {"" if page == "index" else page.removesuffix("/index") for page in pages} == built
    reached = {link.split("#")[0].rstrip("/") for link in site["index.html"].links}
    assert built - {""} <= reached  # from the navigation of the first page


def test_the_site_fetches_nothing_from_elsewhere(site):
    foreign = [f"{name}: {load}" for name, page in site.items() for load in page.loads if "//" in load]
    assert not foreign


def test_every_public_name_is_in_the_reference(site):
    anchors = set().union(*(page.ids for page in site.values()))
    for name in onereward.__all__:
        value = getattr(onereward, name)
        if hasattr(value, "__module__"):
            assert f"{value.__module__}.{name}" in anchors


def test_every_module_is_in_the_reference():
    shown = {
        name for page in (DOCS / "api").glob("*.md") for name in re.findall(r"^::: (\S+)", page.read_text(), re.M)
    }
    paths = [path.relative_to(SOURCES.parent).with_suffix("") for path in SOURCES.rglob("*.py")]
    modules = {".".join(path.parts) for path in paths if path.name != "__init__"}
    assert modules - {"onereward.cli", "onereward.demo"} == shown  # these two are commands, which cli.md has


def test_docstrings_are_rendered_and_not_copied(site):
    for name, page in site.items():
        if name.startswith("api/"):
            text = "".join(page.text)
            assert not re.search(r"^(Args|Returns|Raises|Example):$", text, re.M), name
            assert not re.search(r"\[`|`\]|\\frac|\$\\|\*optional\*", text), name
    rewards = site["api/rewards/index.html"]
    assert any(link.endswith("#onereward.rewards.functions.sharpness_match") for link in rewards.links)


def test_every_command_is_described(site):
    from typer.main import get_command

    from onereward.cli import app

    def names(command, path):
        if not hasattr(command, "commands"):
            return {path}
        return set().union(*(names(part, f"{path}-{name}") for name, part in command.commands.items()))

    assert names(get_command(app), "onereward") <= site["api/cli/index.html"].ids


def test_every_name_that_the_migration_page_leads_to_is_a_setting():
    text = (DOCS / "migration.md").read_text(encoding="utf-8")
    table = text.split("Of `DDPOConfig`:")[1].split("\n## ")[0]
    settings = {field.name for field in dataclasses.fields(onereward.DDPOConfig)}
    arguments = {"resume_from_checkpoint"}  # of `train`, as the page says
    rows = [line.split("|")[1:3] for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 30
    named = {name for _, new in rows for name in re.findall(r"`(\w+)`", new)}
    assert named <= settings | arguments


@pytest.mark.parametrize("name", ["fill", "remove", "extend"])
def test_pictures_of_the_tutorials_are_marked_as_synthetic(name):
    with Image.open(DOCS / "images" / f"{name}.png") as picture:
        marks = " ".join(str(value) for value in picture.info.values())
    assert "http://cv.iptc.org/newscodes/digitalsourcetype/" in marks and "lgorithmicMedia" in marks
    assert "not for clinical use" in marks


def test_the_tutorial_shows_an_about_file_that_is_taken(tmp_path):
    from onereward.hub.about import About, read_about

    text = (DOCS / "tutorials" / "publish.md").read_text(encoding="utf-8")
    path = tmp_path / "about.yaml"
    path.write_text(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1], encoding="utf-8")
    about = read_about(path)
    filled = {field.name for field in dataclasses.fields(About) if getattr(about, field.name)}
    assert {field.name for field in dataclasses.fields(About)} - filled == {"version"}  # which publishing sets
