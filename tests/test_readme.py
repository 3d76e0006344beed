"""What the README and the docs tell people to type works.

The blocks of a page are run in their order: Python in one process, and the `onereward` and `python` commands of shell
blocks between them, which the slow tests do on every page and the others on the tutorials alone. JSON and YAML blocks
are parsed, and of every shell block the make targets, scripts, subcommands and options must exist. The Hub is that of
tests/conftest.py. A block that cannot run here (data of the reader's own, hours) is marked in the line above it:
`<!-- not run: reason -->`.
"""

import json
import os
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from trl import TrlParser


ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SHELL = ("bash", "sh", "shell", "console")
PYTHON = ("python", "py")
BLOCK = re.compile(
    r"(?P<skip><!-- not run: [^>]+ -->\n)?^```(?P<language>\w+)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL
)
ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": str(ROOT / "src"),
    "OMP_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",
    "COLUMNS": "300",
    "NO_COLOR": "1",
    "TERM": "dumb",
}
ONEREWARD = [sys.executable, "-c", "from onereward.cli import main; main()"]

each_page = pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])


def blocks(page, *languages):
    """`(line of the first line of code, language, code)` of each block that is not marked."""
    text = page.read_text(encoding="utf-8")
    for match in BLOCK.finditer(text):
        if match["language"] in languages and not match["skip"]:
            yield text.count("\n", 0, match.start("code")), match["language"], match["code"]


def command_lines(code):
    """The commands of one shell block as lists of words."""
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line.strip().removeprefix("$ "), comments=True):
            yield [Path(words[0]).name, *words[1:]]  # .venv/bin/onereward is onereward


def commands(page):
    for _, _, code in blocks(page, *SHELL):
        yield from command_lines(code)


def script_of(page, with_commands):
    """All blocks of a page as one Python script, each at its line, so that a traceback names the page's own lines."""
    lines = []
    for start, language, code in blocks(page, *PYTHON, *(SHELL if with_commands else ())):
        lines += [""] * (start - len(lines))
        if language in PYTHON:
            lines += code.splitlines()
            continue
        for program, *arguments in command_lines(code):
            if program in ("onereward", "python", "python3"):
                words = [*(ONEREWARD if program == "onereward" else [sys.executable]), *arguments]
                lines.append(f"__import__('subprocess').run({words}, check=True)")
    return "\n".join(lines) + "\n"


@pytest.fixture
def workplace(tmp_path):
    """The checkout by its usual relative names, where what an example writes does no harm."""
    for path in ROOT.iterdir():
        if path.name not in (".git", ".venv", "runs"):
            (tmp_path / path.name).symlink_to(path)
    return tmp_path


def run(command, folder):
    result = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=ENVIRONMENT, check=False)
    assert result.returncode == 0, f"{shlex.join(map(str, command))}\n{result.stdout}{result.stderr}"
    return result.stdout


@each_page
def test_page_runs(page, workplace):
    script = workplace / f"{page.stem}.py"
    script.write_text(script_of(page, with_commands=page.parent.name == "tutorials"), encoding="utf-8")
    if script.read_text(encoding="utf-8").strip():
        run([sys.executable, script], workplace)


@each_page
def test_json_and_yaml_parse(page):
    for _, _, code in blocks(page, "json"):
        assert json.loads(code) is not None
    for _, _, code in blocks(page, "yaml", "yml"):
        assert yaml.safe_load(code) is not None


@each_page
def test_commands_exist(page, workplace):
    for program, *arguments in commands(page):
        options = {word.split("=")[0] for word in arguments if re.match(r"--\w", word)}
        if program == "make":
            run(["make", "--dry-run", *arguments], ROOT)
        elif program == "onereward":
            subcommand = [word for word in arguments[:1] if not word.startswith("-")]
            known = run([*ONEREWARD, *subcommand, "--help"], workplace)
            assert options <= set(re.findall(r"--[\w-]+", known)), f"onereward {shlex.join(arguments)}"
        elif program in ("python", "python3", "accelerate"):
            for word in arguments:
                assert "/" not in word or word.startswith(("-", "runs/")) or (ROOT / word).exists(), word


@pytest.mark.parametrize("prefix", ["SFT", "Reward", "DDPO"])
def test_each_training_script_knows_the_settings_of_its_file(prefix, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = runpy.run_path(str(ROOT / "trainers" / f"{prefix.lower()}.py"))
    settings = str(ROOT / "trainers" / "configs" / f"{prefix.lower()}_phantom.yaml")
    arguments = ["--config", settings, "--use_cpu", "true", *(["--dataset_name", "votes"] * (prefix == "Reward"))]
    parser = TrlParser((script[f"{prefix}ScriptArguments"], script[f"{prefix}Config"]))
    parser.parse_args_and_config(arguments)  # raises on a setting that is unknown


@each_page
def test_relative_links_and_pictures_exist(page):
    text = page.read_text(encoding="utf-8")
    targets = re.findall(r"\]\(([^)#\s]+)", text) + re.findall(r"<img[^>]+src=\"([^\"]+)\"", text)
    for target in targets:
        assert re.match(r"[a-z]+:", target) or (page.parent / target).exists(), target


@pytest.mark.slow
@each_page
def test_page_runs_with_its_commands(page, workplace):
    script = workplace / f"{page.stem}.py"
    script.write_text(script_of(page, with_commands=True), encoding="utf-8")
    run([sys.executable, script], workplace)
