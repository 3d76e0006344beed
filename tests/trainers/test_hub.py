"""Trainers and the Hub: what is pushed is whole and holds no pickle, and a training goes on from there."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from huggingface_hub import HfApi, ModelCard, hf_hub_download
from peft import LoraConfig
from transformers import TrainerCallback


sys.path.append(str(Path(__file__).parent))

from ddpo_setup import REPOSITORY, brightness, make_pipeline, make_rows, make_trainer  # noqa: E402

from onereward.hub import publish as publishing  # noqa: E402
from onereward.hub.adapters import PEFT_WEIGHTS, load_adapter  # noqa: E402
from onereward.hub.provenance import read_provenance, trace  # noqa: E402
from onereward.pipelines import OneRewardMaskPipeline  # noqa: E402
from onereward.rewards import OneRewardConfig, OneRewardModel  # noqa: E402
from onereward.trainers import SFTConfig, SFTTrainer, VAEConfig, VAETrainer  # noqa: E402
from onereward.trainers import ddpo as ddpo_module  # noqa: E402
from onereward.trainers import hub as trainers_hub  # noqa: E402
from onereward.trainers.hub import HubTrainer  # noqa: E402


SAVING = {"save_strategy": "steps", "save_steps": 1, "ema_decay": 0.5, "gradient_accumulation_steps": 2}
PUSHING = {**SAVING, "push_to_hub": True, "hub_always_push": True, "hub_strategy": "every_save"}
WEIGHTS = {"pytorch_lora_weights.safetensors", "adapter_model.safetensors", "adapter_config.json"}


def flat(parameters):
    return torch.cat([p.detach().flatten() for p in parameters])


@pytest.fixture
def base(hub, tmp_path, monkeypatch):
    """`org/base` on the Hub, and no waiting between tries."""
    monkeypatch.setattr(publishing.time, "sleep", lambda seconds: None)
    if not HfApi().repo_exists("org/base"):
        make_pipeline().save_pretrained(tmp_path / "base")
        publishing.publish("pipeline", tmp_path / "base", "org/base")
    return "org/base"


def from_hub(base, revision=None):
    pipeline = OneRewardMaskPipeline.from_pretrained(base, revision=revision)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def files_of(repo_id, revision=None):
    return {entry.path for entry in HfApi().list_repo_tree(repo_id, recursive=True, revision=revision)}


def releases(repo_id):
    """Titles of the commits that publishing made, the first one first."""
    titles = [commit.title for commit in HfApi().list_repo_commits(repo_id)]
    return [title for title in reversed(titles) if title.startswith("Release")]


def test_every_save_is_one_commit_that_is_whole(base, tmp_path):
    trainer = make_trainer(tmp_path, pipeline=from_hub(base), hub_model_id="org/every", **PUSHING)
    trainer.train()
    trainer.push_to_hub(dataset_name="boxes")
    assert len(releases("org/every")) == 3
    for version in ("v0.1.0", "v0.1.1", "v0.1.2"):
        files = files_of("org/every", version)
        assert {*WEIGHTS, "README.md", "provenance.json", "CHANGELOG.md"} <= files
        assert not [name for name in files if name.endswith((".bin", ".pt", ".pth", ".pkl")) or "checkpoint" in name]
    log = Path(hf_hub_download("org/every", "CHANGELOG.md")).read_text()
    assert log.index("End of training.") < log.index("in progress, step 2.") < log.index("in progress, step 1.")

    pipeline = from_hub(base)
    load_adapter(pipeline, "org/every", revision="v0.1.0")
    first = {name: p for name, p in pipeline.unet.named_parameters() if "lora" in name}
    del pipeline
    pipeline = from_hub(base)
    load_adapter(pipeline, "org/every")
    last = {name: p for name, p in pipeline.unet.named_parameters() if "lora" in name}
    with trainer.ema.applied():
        trained = dict(trainer.denoiser.named_parameters())
        assert last and all(torch.equal(last[name], trained[name]) for name in last)
    assert any(not torch.equal(first[name], last[name]) for name in last)


def test_saving_pushes_once_and_the_same_again_is_no_new_commit(base, tmp_path):
    settings = {**PUSHING, "save_strategy": "no"}
    trainer = make_trainer(tmp_path, pipeline=from_hub(base), hub_model_id="org/end", **settings)
    trainer.train()
    trainer.save_model()
    trainer.push_to_hub()
    assert len(releases("org/end")) == 1


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def test_a_training_goes_on_from_the_hub_to_the_same_weights(base, tmp_path):
    config = {**SAVING, "max_steps": 4, "lr_scheduler_type": "linear", "baseline": "running", "running_min_count": 4}
    whole = make_trainer(tmp_path / "whole", pipeline=from_hub(base), **config)
    whole.train()

    pushing = {"push_to_hub": True, "hub_always_push": True, "hub_strategy": "checkpoint", "hub_model_id": "org/on"}
    cut = make_trainer(tmp_path / "cut", pipeline=from_hub(base), callbacks=[StopAt(3)], **config, **pushing)
    cut.train()
    assert "last-checkpoint/optimizer.safetensors" in files_of("org/on")
    assert str(tmp_path) not in Path(hf_hub_download("org/on", "last-checkpoint/trainer_state.json")).read_text()

    for name, steps in (("org/on", [4]), ("org/on@v0.1.1", [3, 4])):  # of update 3, and of update 2
        resumed = make_trainer(tmp_path / f"resumed{len(steps)}", pipeline=from_hub(base), **config)
        resumed.train(resume_from_checkpoint=name)
        assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry][-len(steps) :] == steps
        assert torch.equal(flat(resumed.policy_parameters), flat(whole.policy_parameters))
        assert torch.equal(flat(resumed.ema.averages), flat(whole.ema.averages))

    other = make_trainer(tmp_path / "other", pipeline=from_hub(base), **{**config, "seed": 1})
    with pytest.raises(ValueError, match="of another run: `seed` was 0 and is 1"):
        other.train(resume_from_checkpoint="org/on")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/nothing/here", "no folder here; expected a checkpoint's folder"),
        ("org/nothing", "no folder here, and on the Hub it could not be read"),
        ("org/base@v9", "no folder here, and on the Hub it could not be read"),
        ("org/base", "has no last-checkpoint/"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(base, tmp_path, name, message):
    with pytest.raises(ValueError, match=f"`resume_from_checkpoint` is '{name}'.*{message}"):
        make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=name)


def test_a_push_that_fails_in_the_training_is_a_warning_and_made_good(base, tmp_path, hub, caplog):
    trainer = make_trainer(tmp_path, pipeline=from_hub(base), hub_model_id="org/shaky", **PUSHING)

    def fail(method, path):  # while the first checkpoint goes up
        return (503, "down") if "/commit/" in path and trainer.state.global_step < 2 else None

    class Wait(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            trainer._finish_current_push()

    trainer.add_callback(Wait())
    hub.fail = fail
    trainer.train()
    hub.fail = None
    assert [r.message for r in caplog.records if "Step 1 was not published, the training goes on" in r.message]
    assert len(releases("org/shaky")) == 1
    assert {*WEIGHTS, "README.md"} <= files_of("org/shaky")
    assert "step 2" in Path(hf_hub_download("org/shaky", "CHANGELOG.md")).read_text()


@pytest.mark.slow
def test_a_last_push_that_fails_raises_and_can_be_repeated(base, tmp_path, hub):
    trainer = make_trainer(tmp_path, pipeline=from_hub(base), hub_model_id="org/late", **{**PUSHING, "save_steps": 9})
    trainer.args.hub_strategy = "end"
    trainer.train()
    hub.fail = lambda method, path: (503, "down") if "/commit/" in path else None
    with pytest.raises(ConnectionError, match="503"):
        trainer.push_to_hub()
    assert releases("org/late") == [] and WEIGHTS.isdisjoint(files_of("org/late"))
    hub.fail = None
    trainer.push_to_hub()
    assert {*WEIGHTS} <= files_of("org/late")


@pytest.mark.slow
def test_private_and_revision_are_honoured(base, tmp_path):
    settings = {"hub_private_repo": True, "hub_revision": "trial", "hub_model_id": "org/hidden"}
    trainer = make_trainer(tmp_path, pipeline=from_hub(base), push_to_hub=True, **settings)
    trainer.train()
    trainer.push_to_hub()
    assert HfApi().repo_info("org/hidden").private
    assert {*WEIGHTS} <= files_of("org/hidden", "trial") and WEIGHTS.isdisjoint(files_of("org/hidden"))


@pytest.mark.slow
def test_what_cannot_be_published_is_refused_before_the_training(base, tmp_path, monkeypatch):
    monkeypatch.setattr(ddpo_module.DDPOTrainer, "_make_rollout", lambda *a: pytest.fail("it trained"))
    settings = {"push_to_hub": True, "hub_model_id": "org/refused"}
    make_pipeline().save_pretrained(tmp_path / "base")
    trainer = make_trainer(tmp_path / "out", pipeline=from_hub(tmp_path / "base"), **settings)
    with pytest.raises(ValueError, match="base model is .*which nobody else can load"):
        trainer.train()
    marked = make_rows().remove_columns("source").add_column("source", ["BraTS 2023"] * 8)
    trainer = make_trainer(tmp_path / "out", pipeline=from_hub(base), rows=marked, **settings)
    with pytest.raises(ValueError, match="(?i)brats"):
        trainer.train()


@pytest.mark.slow
def test_a_base_from_a_folder_is_named_by_its_id_on_the_hub(base, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "base")
    settings = {"push_to_hub": True, "hub_model_id": "org/renamed", "hub_base_model": "org/base"}
    trainer = make_trainer(tmp_path / "out", pipeline=from_hub(tmp_path / "base"), **settings)
    trainer.train()
    trainer.push_to_hub()
    card = ModelCard.load("org/renamed")
    assert card.data.base_model == "org/base" and str(tmp_path) not in str(card)
    config = json.loads(Path(hf_hub_download("org/renamed", "adapter_config.json")).read_text())
    assert config["base_model_name_or_path"] == "org/base"


@pytest.mark.slow
def test_all_weights_are_pushed_as_a_whole_pipeline(base, tmp_path):
    trainer = make_trainer(tmp_path, pipeline=from_hub(base), full=True, hub_model_id="org/full", **PUSHING)
    trainer.train()
    trainer.push_to_hub()
    saved = from_hub("org/full", "v0.1.1").unet.state_dict()  # of the last save, before the end
    with trainer.ema.applied():
        trained = trainer.denoiser.state_dict()
        assert all(torch.equal(saved[name], trained[name]) for name in trained)


def small_reward_model(folder):
    torch.manual_seed(0)
    labels = {"background": 0, "NCR": 1, "ED": 2, "ET": 3}
    model = OneRewardModel(OneRewardConfig(criteria=["quality"], labels=labels, image_size=16))
    model.save_pretrained(folder)
    parent = {"role": "votes", "name": "org/votes", "repo_type": "dataset", "revision": None, "fingerprint": None}
    parent |= {"agreements": [], "num_rows": 40, "raters": {"radiologist": 3}}
    trainers_hub.write_provenance(folder, "reward-model", parents=[parent])
    publishing.publish("reward-model", folder, "org/reward")


def test_provenance_leads_from_the_adapter_back_to_the_votes(base, tmp_path):
    small_reward_model(tmp_path / "reward")
    start = make_trainer(tmp_path / "start", pipeline=from_hub(base), **PUSHING, hub_model_id="org/start")
    start.train()
    start.push_to_hub()

    pipeline = from_hub(base)
    load_adapter(pipeline, "org/start", trainable=True)
    settings = {"full": True, "hub_model_id": "org/second", **PUSHING}  # `full`: no new adapter
    rewards = [OneRewardModel.from_pretrained("org/reward"), brightness]
    trainer = make_trainer(tmp_path / "second", reward_funcs=rewards, pipeline=pipeline, **settings)
    trainer.sources, trainer.dataset_name = (("adapter", "org/start", None),), "org/boxes"
    trainer.train()
    trainer.push_to_hub()

    api = HfApi()
    record = read_provenance("org/second")
    revisions = {parent["role"]: parent["revision"] for parent in record["parents"]}
    assert revisions["base_model"] == api.repo_info("org/base").sha
    assert revisions["adapter"] == api.repo_info("org/start").sha
    assert revisions["reward_model"] == api.repo_info("org/reward").sha
    (rows,) = [parent for parent in record["parents"] if parent["role"] == "train_data"]
    assert (rows["name"], rows["num_rows"], rows["sources"]) == ("org/boxes", 8, ["random"])
    assert record["kind"] == "adapter" and record["seed"] == 0 and record["config"]["num_generations"] == 4
    assert "votes: org/votes" in str(trace("org/second"))
    assert "3 human raters" in str(ModelCard.load("org/second")) or "radiologist" in str(ModelCard.load("org/second"))
    saved = read_provenance(Path(trainer.args.output_dir, "checkpoint-2"))
    assert {parent["role"] for parent in saved["parents"]} == set(revisions)


def test_the_card_shows_the_base_and_the_adapter_from_the_same_noise(base, tmp_path, monkeypatch):
    shown = {}
    write_gallery = ddpo_module.write_gallery

    def spy(folder, rows, before, after, **options):
        shown.update(rows=rows, before=before, after=after)
        return write_gallery(folder, rows, before, after, **options)

    monkeypatch.setattr(ddpo_module, "write_gallery", spy)
    rows = make_rows(6, seed=1)
    settings = {"push_to_hub": True, "hub_model_id": "org/gallery", "learning_rate": 0.1}
    trainer = make_trainer(tmp_path, pipeline=from_hub(base), eval_rows=rows, **settings)
    untouched = make_trainer(tmp_path / "untouched", pipeline=from_hub(base), eval_rows=rows)
    trainer.train()
    trainer.push_to_hub()
    assert {"images/before_after.png", "images/0.png", "images/3.png"} <= files_of("org/gallery")
    card = ModelCard.load("org/gallery")
    assert [entry["output"]["url"] for entry in card.data.widget] == [f"images/{i}.png" for i in range(4)]
    numbers = [rows["case_id"].index(row["case_id"]) for row in shown["rows"]]
    conditions, _ = untouched._encode(rows, numbers)
    keys = [(0, ddpo_module.EVALUATION, number) for number in numbers]
    expected = untouched.sampler.generate(conditions, keys).images  # a new adapter does nothing
    assert torch.equal(shown["before"], expected) and not torch.equal(shown["after"], expected)


def make_sft(folder, **config):
    rows = make_rows()
    pipeline = make_pipeline()
    arguments = SFTConfig(str(folder), per_device_train_batch_size=4, report_to="none", use_cpu=True, **config)
    lora = LoraConfig(r=2, lora_alpha=4, target_modules=["to_q", "to_v"])
    return SFTTrainer(pipeline, arguments, rows, peft_config=lora)


def make_vae(folder, **config):
    arguments = VAEConfig(str(folder), per_device_train_batch_size=4, report_to="none", use_cpu=True, **config)
    return VAETrainer(make_pipeline().vae, arguments, make_rows())


@pytest.mark.parametrize("make", [make_trainer, make_sft, make_vae], ids=["ddpo", "sft", "vae"])
def test_checkpoints_hold_no_pickle_and_are_sealed(tmp_path, make):
    trainer = make(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    assert isinstance(trainer, HubTrainer)
    trainer.train()
    trainer.save_model()
    names = {path.name for path in (tmp_path / "checkpoint-1").rglob("*") if path.is_file()}
    assert {"optimizer.safetensors", "scheduler.safetensors", "rng_state_0.safetensors", "checkpoint.json"} <= names
    assert {"provenance.json"} <= names & {path.name for path in tmp_path.iterdir()}
    assert {Path(name).suffix for name in names} <= {".safetensors", ".json", ".py"}


@pytest.mark.slow
def test_sft_and_vae_are_published_with_their_cards(base, tmp_path):
    pushing = {"max_steps": 1, "push_to_hub": True}
    sft = make_sft(tmp_path / "sft", hub_model_id="org/sft", hub_base_model="org/base", **pushing)
    sft.train()
    sft.push_to_hub(dataset_name="boxes")
    assert {*WEIGHTS} <= files_of("org/sft") and "supervised training on 8 rows of boxes" in str(
        " ".join(ModelCard.load("org/sft").text.split())
    )
    vae = make_vae(tmp_path / "vae", hub_model_id="org/vae", **pushing)
    vae.train()
    vae.push_to_hub()
    loaded = type(vae.vae).from_pretrained("org/vae", use_safetensors=True).state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in vae.vae.state_dict().items())
    assert "not for clinical use" in ModelCard.load("org/vae").text


def test_a_checkpoint_of_an_older_version_is_refused_by_name(tmp_path):
    trainer = make_trainer(tmp_path, **SAVING)
    trainer.train()
    torch.save({}, tmp_path / "checkpoint-2" / "optimizer.pt")
    with pytest.raises(ValueError, match="checkpoint-2 was written by an older version: its optimizer.pt is a pickle"):
        make_trainer(tmp_path, **SAVING).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


@pytest.mark.slow
def test_resuming_downloads_no_pickle(base, tmp_path, hub):
    config = {**PUSHING, "hub_strategy": "checkpoint", "hub_model_id": "org/evil"}
    make_trainer(tmp_path / "first", pipeline=from_hub(base), **config).train()
    HfApi().upload_file(path_or_fileobj=b"evil", path_in_repo="last-checkpoint/scheduler.pt", repo_id="org/evil")
    hub.calls.clear()
    resumed = make_trainer(tmp_path / "second", pipeline=from_hub(base), **{**SAVING, "max_steps": 3})
    resumed.train(resume_from_checkpoint="org/evil")
    assert resumed.state.global_step == 3
    assert not [call for call in hub.calls if "scheduler.pt" in str(call)]


@pytest.mark.slow
def test_the_script_takes_everything_from_the_hub_and_goes_on_there(base, tmp_path):
    small_reward_model(tmp_path / "reward")
    parts = datasets.DatasetDict(train=make_rows(12), validation=make_rows(2, seed=1))
    parts.push_to_hub("org/rows")
    start = make_trainer(tmp_path / "start", pipeline=from_hub(base), push_to_hub=True, hub_model_id="org/begin")
    start.train()
    start.push_to_hub()
    revisions = {name: HfApi().repo_info(name).sha for name in (base, "org/begin", "org/reward")}
    rows = HfApi().dataset_info("org/rows").sha
    command = [sys.executable, str(REPOSITORY / "trainers" / "ddpo.py"), "--model_name_or_path", base]
    command += ["--revision", revisions[base], "--adapter", "org/begin", "--adapter_revision", revisions["org/begin"]]
    command += ["--reward_model", "org/reward", "--reward_revision", revisions["org/reward"], "--dataset_name"]
    command += ["org/rows", "--dataset_revision", rows, "--streaming", "true", "--max_rows", "8", "--max_steps", "2"]
    command += ["--per_device_generation_batch_size", "8", "--per_device_train_batch_size", "4", "--save_steps", "1"]
    command += ["--num_generations", "4", "--num_inference_steps", "6", "--window_size", "2", "--epsilon", "1e-3"]
    command += ["--use_cpu", "true", "--report_to", "none", "--output_dir", str(tmp_path / "run"), "--push_to_hub"]
    command += ["true", "--hub_model_id", "org/scripted", "--hub_strategy", "checkpoint"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    record = read_provenance("org/scripted")
    assert {parent["name"]: parent["revision"] for parent in record["parents"]} == {**revisions, "org/rows": rows}
    assert "last-checkpoint/checkpoint.json" in files_of("org/scripted") and str(tmp_path) not in json.dumps(record)

    shutil.rmtree(tmp_path / "run")
    command += ["--resume_from_checkpoint", "org/scripted@v0.1.0"]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    before, after = (Path(hf_hub_download("org/scripted", PEFT_WEIGHTS, revision=r)) for r in ("v0.1.1", "main"))
    assert before.read_bytes() == after.read_bytes()  # update 2 once more
