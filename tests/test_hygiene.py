"""What a contributor and a user may rely on without reading the code: versions, notices, layout, who imports whom."""

import ast
import re
import subprocess
from datetime import date
from pathlib import Path

import pytest
import yaml

import onereward


ROOT = Path(__file__).resolve().parents[1]
SOURCES = ROOT / "src" / "onereward"

# A module imports only from itself and from what stands to its right.
ORDER = "cli demo generate evaluate trainers hub evaluation rewards preferences data policy pipelines".split()

# Tests that do not bear the name of one module, and what they are about.
ABOUT = {
    "hub/test_card_code.py": "hub/cards.py",
    "hub/test_hf_cli.py": "hub/publish.py",
    "hub/test_pickles.py": "hub/autoload.py",
    "hub/test_round_trip.py": "hub/publish.py",
    "hub/test_without_package.py": "hub/autoload.py",
    "rewards/test_backbones.py": "rewards/modeling_onereward.py",
    "rewards/test_heads.py": "rewards/modeling_onereward.py",
    "rewards/test_modeling.py": "rewards/modeling_onereward.py",
    "test_docs.py": "../../docs/index.md",
    "test_hygiene.py": "../../CONTRIBUTING.md",
    "test_import.py": "__init__.py",
    "test_readme.py": "../../README.md",
}


def files():
    """Every file of the repository, with those that are not committed yet."""
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


def texts():
    for path in files():
        content = path.read_bytes()
        if path != Path(__file__).resolve() and b"\0" not in content:
            yield path, content.decode("utf-8")


def imported(path):
    """Full names of what a module of ours imports of ours, at the top and inside functions."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = ["onereward", *path.relative_to(SOURCES).parts[:-1]]
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "onereward")


def test_imports_never_go_up():
    wrong = []
    for path in sorted(SOURCES.rglob("*.py")):
        own = path.relative_to(SOURCES).parts[0].removesuffix(".py")
        for name in imported(path):
            other = name.split(".")[1]
            if own in ORDER and other in ORDER and ORDER.index(other) < ORDER.index(own):
                wrong.append(f"{path.relative_to(SOURCES)} imports {name}")
            if own == "pipelines" and other != "pipelines":
                wrong.append(f"{path.relative_to(SOURCES)} imports {name}, but must stand by itself")
    assert not wrong


def test_every_module_has_its_place_in_the_order():
    modules = {path.name.removesuffix(".py") for path in SOURCES.iterdir() if not path.name.startswith("__")}
    assert modules == set(ORDER)
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert ", ".join(f"`{name}`" for name in ORDER) in text


def test_the_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == onereward.__version__
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert headings[0] == "[Unreleased]"
    releases = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - (\d{4}-\d\d-\d\d)", heading) for heading in headings[1:]]
    assert all(releases), f"expected '## [1.2.3] - 2026-12-31', but found {headings[1:]}"
    versions = [tuple(int(number) for number in release.groups()[:3]) for release in releases]
    assert versions == sorted(set(versions), reverse=True)
    if releases:
        assert versions[0] == tuple(int(number) for number in onereward.__version__.split("."))
        assert releases[0][4] == citation["date-released"].isoformat()


def test_the_changelog_groups_changes_as_its_format_says():
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    groups = set(re.findall(r"^### (.+)$", text, flags=re.MULTILINE))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_is_one():
    """The keys and forms that schema 1.2.0 of the Citation File Format asks for."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    known = {"abstract", "authors", "cff-version", "commit", "contact", "date-released", "doi", "identifiers"}
    known |= {"keywords", "license", "license-url", "message", "preferred-citation", "references", "repository"}
    known |= {"repository-artifact", "repository-code", "title", "type", "url", "version"}
    assert set(citation) <= known
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["title"] and citation["message"] and citation["license"] == "Apache-2.0"
    assert isinstance(citation["date-released"], date)
    assert isinstance(citation["version"], str)
    for author in citation["authors"]:  # a person or an entity
        assert {"family-names", "given-names"} <= set(author) or "name" in author
    assert len(set(citation["keywords"])) == len(citation["keywords"])


def test_the_licence_is_the_one_that_is_declared():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8").splitlines()[1]
    assert 'license="Apache-2.0"' in (ROOT / "setup.py").read_text(encoding="utf-8")
    assert "MNI" in (ROOT / "NOTICE").read_text(encoding="utf-8")


def test_every_page_says_that_it_is_for_research_only():
    pages = [*sorted((ROOT / "docs").rglob("*.md")), *(ROOT / name for name in ("README.md", "CONTRIBUTING.md"))]
    pages += [ROOT / name for name in ("NOTICE", "SECURITY.md", "CITATION.cff", "mkdocs.yml")]
    for page in pages:
        text = re.sub(r"\s+", " ", page.read_text(encoding="utf-8"))
        assert re.search(r"research use only, not for clinical use", text, re.IGNORECASE), page


def test_code_that_travels_with_weights_says_whose_it_is(tmp_path):
    from onereward import OneRewardConfig, OneRewardModel

    OneRewardModel(OneRewardConfig()).save_pretrained(tmp_path)
    published = [*tmp_path.glob("*.py"), *(ROOT / "pipelines").rglob("*.py")]
    assert len(published) > 1
    for path in published:
        assert "Licensed under the Apache License, Version 2.0" in path.read_text(encoding="utf-8")[:200], path


def test_tests_mirror_the_sources():
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        name = path.relative_to(ROOT / "tests")
        if name.parts[0] == "spaces":  # they look at the Space at work, not at one module
            continue
        stem = path.stem.removeprefix("test_")
        modules = [module.stem for module in (SOURCES / name.parent).glob("*.py")]
        mirrored = any(stem == module or stem.startswith(f"{module}_") for module in modules)
        assert mirrored or str(name) in ABOUT, (
            f"tests/{name} bears the name of no module in src/onereward/{name.parent}"
        )
        assert not mirrored or str(name) not in ABOUT, f"{name} need not stand in ABOUT"
    for about in ABOUT.values():
        assert (SOURCES / about).is_file(), about


def lines_with(pattern):
    """`file:line: text` of each line in the repository that the pattern is found in."""
    return [
        f"{path.relative_to(ROOT)}:{number}: {line.strip()}"
        for path, text in texts()
        for number, line in enumerate(text.splitlines(), 1)
        if re.search(pattern, line)
    ]


def test_nothing_names_a_place_on_somebodys_machine():
    # Ann is the user of examples, and tests may ask that no temporary folder is named.
    place = r"(?<![\w.])(/root/|/opt/|/work/|/Users/|/tmp/(?!\" not in)|[A-Z]:\\Users|/home/(?!ann/)\w)"
    assert not lines_with(place)


def test_nothing_is_left_to_be_done_later():
    assert not lines_with(r"\b(TODO|FIXME|XXX|HACK)\b")


def test_no_pickle_and_no_scan_is_committed():
    suffixes = (
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".pkl",
        ".pickle",
        ".joblib",
        ".npy",
        ".npz",
        ".dcm",
        ".nii",
        ".nii.gz",
    )
    assert not [str(path) for path in files() if path.name.endswith(suffixes)]


def requirements(name):
    """Names of the packages in a list of setup.py."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    values = {node.targets[0].id: node.value for node in tree.body if isinstance(node, ast.Assign)}
    if name == "INSTALL_REQUIRES":
        return [re.split(r"[<>=\[]", line)[0] for line in ast.literal_eval(values["INSTALL_REQUIRES"])]
    return [re.split(r"[<>=\[]", line)[0] for line in ast.literal_eval(values["EXTRAS_REQUIRE"])[name]]


@pytest.mark.parametrize("name", ["INSTALL_REQUIRES", "dev", "docs", "space"])
def test_what_make_installs_is_pinned(name):
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [line.split("==")[0].lower() for line in lines if not line.startswith("#")]
    assert pinned == sorted(pinned)
    normal = {re.sub(r"[-_.]+", "-", package) for package in pinned}
    assert {re.sub(r"[-_.]+", "-", package.lower()) for package in requirements(name)} <= normal


def test_the_workflow_runs_every_python_that_is_promised():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text(encoding="utf-8"))
    promised = re.findall(r"Python :: (3\.\d+)", (ROOT / "setup.py").read_text(encoding="utf-8"))
    assert workflow["jobs"]["tests"]["strategy"]["matrix"]["python"] == promised
    steps = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert {"make test", "make docs", "python -m build"} <= {step.split("  #")[0] for step in steps}


@pytest.mark.parametrize(
    "form", sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml")), ids=lambda path: path.stem
)
def test_every_issue_form_asks_for_no_patient_data(form):
    content = yaml.safe_load(form.read_text(encoding="utf-8"))
    if form.stem == "config":
        assert content == {"blank_issues_enabled": False}  # nobody gets past the forms
        return
    assert content["name"] and content["description"]
    kinds = {"markdown", "textarea", "input", "dropdown", "checkboxes"}
    assert {part["type"] for part in content["body"]} <= kinds
    promise = next(part for part in content["body"] if part["type"] == "checkboxes")["attributes"]["options"][0]
    assert promise["required"] and "patient" in promise["label"]


def test_the_pull_request_form_asks_for_no_patient_data():
    assert "patient" in (ROOT / ".github" / "PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")
