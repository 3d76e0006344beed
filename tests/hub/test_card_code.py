"""What a card tells people to type works as written: published, and run in fresh processes that know only the Hub."""

import os
import re
import subprocess
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from handmade_votes import make_votes
from huggingface_hub import hf_hub_download
from peft import LoraConfig
from PIL import Image
from tiny_judge import tiny_parts

from onereward import OneRewardConfig, OneRewardModel
from onereward.data.synthetic import is_synthetic
from onereward.hub.adapters import save_adapter
from onereward.hub.publish import publish
from onereward.preferences import save_votes
from onereward.trainers.judge import CARD


BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REPOS = {
    "pipeline": ("org/code-pipeline", "model"),
    "adapter": ("org/code-adapter", "model"),
    "reward-model": ("org/code-reward", "model"),
    "dataset": ("org/code-rows", "dataset"),
    "votes": ("org/code-votes", "dataset"),
    "space": ("org/code-space", "space"),
}
RUN = """
import sys
from pathlib import Path
if sys.argv[1] == "stranger":
    sys.modules["onereward"] = None  # as if it was not installed
for block in sys.argv[2:]:
    print(block, flush=True)
    exec(compile(Path(block).read_text(encoding="utf-8"), block, "exec"), {"__name__": "__main__"})
"""


@pytest.fixture
def published(tmp_path, tiny_pipeline, phantom, hub):
    """The published cards, kind -> text; what they are of lies on the Hub."""
    made, folder = tiny_pipeline(), tmp_path / "made"
    made.save_pretrained(folder / "pipeline")
    made.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    save_adapter(made, folder / "adapter", base_model=str(folder / "pipeline"))
    OneRewardModel(OneRewardConfig(image_size=16)).save_pretrained(folder / "reward-model")
    datasets.DatasetDict(train=phantom.select(range(2)), test=phantom.select(range(6, 8))).save_to_disk(
        folder / "dataset"
    )
    save_votes(make_votes(pairs=4), folder / "votes.parquet")
    (folder / "space").mkdir()
    (folder / "space" / "app.py").write_text("print('the app runs')\n")
    (folder / "space" / "requirements.txt").write_text("# nothing more\n")
    cards = {}
    for kind, (repo_id, repo_type) in REPOS.items():
        path = folder / ("votes.parquet" if kind == "votes" else kind)
        publish(kind, path, repo_id, base_model=REPOS["pipeline"][0] if kind == "adapter" else None)
        cards[kind] = Path(hf_hub_download(repo_id, "README.md", repo_type=repo_type)).read_text(encoding="utf-8")
    return cards


def test_every_block_of_every_card_runs(published, tmp_path, hub):
    work = tmp_path / "work"
    work.mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(work / "image.png")
    Image.fromarray(np.pad(np.full((8, 8), 255, np.uint8), 4)).save(work / "mask.png")
    blocks, languages = {"ours": [], "stranger": [], "shell": []}, {}
    for kind, card in published.items():
        for number, (language, code) in enumerate(BLOCK.findall(card)):
            languages.setdefault(kind, []).append(language)
            if language not in ("python", "bash"):
                continue
            side = "shell" if language == "bash" else "stranger" if "trust_remote_code" in code else "ours"
            blocks[side].append(f"{kind}-{number}")
            (work / blocks[side][-1]).write_text(code, encoding="utf-8")
    known = {"python", "bash", "text", "bibtex"}  # text is what was run once, bibtex no code
    assert all(set(found) <= known and found[-1] == "bibtex" for found in languages.values()), languages
    assert all({"python", "bash"} & set(found) for found in languages.values()), languages

    environment = {
        **os.environ,
        **hub.env(str(tmp_path / "home"), "alice"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PIP_NO_INDEX": "1",
        "PYTHONPATH": str(Path(__file__).parents[2] / "src"),
    }

    def run(*command):
        result = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    said = run(sys.executable, "-c", RUN, "ours", *blocks["ours"])
    assert "fill" in said and "realism" in said  # a row, a vote
    mark = is_synthetic(work / "generated.png")
    assert mark["model"] == "org/code-pipeline"
    source, mask, painted = (np.asarray(Image.open(work / f"{name}.png")) for name in ("image", "mask", "generated"))
    np.testing.assert_array_equal(painted[mask == 0], source[mask == 0])
    assert (painted != source).any()
    (work / "generated.png").unlink()
    run(sys.executable, "-c", RUN, "stranger", *blocks["stranger"])
    assert (work / "generated.png").is_file()
    assert "the app runs" in run("bash", "-e", *blocks["shell"])


def test_the_code_of_a_judges_card_runs(tmp_path, monkeypatch, capsys):
    for part in tiny_parts():
        part.save_pretrained(tmp_path / "judge")
    for name in ("generated", "image"):
        Image.new("L", (16, 16), 99).save(tmp_path / f"{name}.png")
    (code,) = (code for language, code in BLOCK.findall(CARD) if language == "python")
    monkeypatch.chdir(tmp_path)
    exec(code.format(repo_id=tmp_path / "judge", criterion="realism"), {})
    assert "tensor([0.5" in capsys.readouterr().out  # of a picture and itself
