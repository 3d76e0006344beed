"""The whole loop on one machine: votes, reward model, DDPO, evaluation on unseen cases, and a report."""

import gc
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
import torch
from peft import LoraConfig
from rich.console import Console
from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from onereward.data.phantom import load_phantom
from onereward.data.schema import rows_to_tensors, split_by_case
from onereward.data.whole_file import whole_file, write_json
from onereward.evaluation.figures import before_after_figure, reward_curve_figure
from onereward.evaluation.heldout import compare, evaluate_pipeline
from onereward.evaluation.segmenter import load_segmenter
from onereward.hub.adapters import load_adapter
from onereward.hub.cards import adapter_card, save_card
from onereward.hub.data_cards import PHANTOM_ORIGIN, vote_agreement
from onereward.hub.environment import current_environment, source_commit
from onereward.hub.gallery import write_gallery
from onereward.hub.provenance import describe_data, describe_parent, write_provenance
from onereward.pipelines import OneRewardMaskPipeline
from onereward.preferences import CRITERIA, load_votes, make_candidates, save_votes, simulate_votes
from onereward.rewards import OneRewardConfig, OneRewardModel
from onereward.trainers.ddpo import DDPOTrainer
from onereward.trainers.ddpo_config import DDPOConfig
from onereward.trainers.reward import RewardConfig, RewardTrainer
from onereward.trainers.sft import SFTConfig, SFTTrainer


DISCLAIMER = "Research use only, not for clinical use."
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass(frozen=True)
class DemoSettings:
    r"""
    What [`run_demo`] does.

    Args:
        pipeline (`str`):
            Folder or Hub id of the pipeline to tune.
        data (`str`, *optional*):
            Folder of rows that `onereward data` wrote; the built-in phantom when left out.
        seed (`int`, *optional*, defaults to `0`):
            Seed of everything.
        num_vote_cases (`int`, *optional*, defaults to `240`):
            Cases of the phantom that are voted on, one condition of each.
        num_train_cases (`int`, *optional*, defaults to `160`):
            Cases of the phantom that DDPO trains on, one condition of each.
        num_unseen_cases (`int`, *optional*, defaults to `96`):
            Cases of the phantom that are evaluated on, one condition of each.
        sft_max_steps (`int`, *optional*, defaults to `250`):
            Updates of the adapter that fits the pipeline to `data`; not used with the phantom.
        reward_epochs (`float`, *optional*, defaults to `8`):
            Passes of the reward model over the votes.
        ddpo_max_steps (`int`, *optional*, defaults to `30`):
            Updates of DDPO, one for each rollout of 64 images.
        num_inference_steps (`int`, *optional*, defaults to `10`):
            Denoising steps in DDPO and in the evaluation.
    """

    pipeline: str
    data: str | None = None
    seed: int = 0
    num_vote_cases: int = 240
    num_train_cases: int = 160
    num_unseen_cases: int = 96
    sft_max_steps: int = 250
    reward_epochs: float = 8
    ddpo_max_steps: int = 30
    num_inference_steps: int = 10


def run_demo(output_dir: str | os.PathLike, settings: DemoSettings, restart: bool = False) -> dict:
    r"""
    Runs the loop, stage by stage, and writes `report.md`, `report.json`, `before_after.png`, `reward_curve.png`,
    `votes.parquet`, `reward_model/` and `adapter/` into `output_dir`. A stage that is finished is not run again, so
    that a run that was stopped goes on where it was.

    Args:
        output_dir (`str` or `os.PathLike`):
            Where everything goes.
        settings ([`DemoSettings`]):
            What to do.
        restart (`bool`, *optional*, defaults to `False`):
            Whether to delete what an earlier run left in `output_dir`.

    Returns:
        `dict`: what `report.json` holds.

    Raises:
        `ValueError`: if `output_dir` holds a run with other settings.
    """
    folder, console = Path(output_dir), Console(highlight=False)
    if restart and (folder / "state.json").exists():
        shutil.rmtree(folder)
    state = _read_state(folder, settings)
    if "report" in state["seconds"]:
        console.print(f"This run is finished: see {folder / 'report.md'}. Start over with [bold]--restart[/bold].")
        return json.loads((folder / "report.json").read_text())

    def stage(name: str, text: str, run: Callable, *args):
        """Runs one stage, unless it is done, and remembers how long it took."""
        if name in state["seconds"]:
            return
        console.print(f"\n[bold]{name}[/bold]  {text}")
        start = time.perf_counter()
        torch.manual_seed(settings.seed)  # a run that goes on draws what a run in one piece would
        state["results"][name] = run(folder, settings, *args)
        gc.collect()
        state["seconds"][name] = round(time.perf_counter() - start, 1)
        write_json(folder / "state.json", state)

    console.print(f"OneReward demo, in {folder}. {DISCLAIMER}")
    stage("data", "Conditions to vote on, to train on, and unseen ones to judge by.", prepare_data)
    if settings.data is not None:
        stage("sft", "Fitting the pipeline to your images with an adapter.", fit_to_data)
    stage("votes", "Sampling candidates; simulated raters compare them by three criteria.", collect_votes)
    stage("reward", "Training one reward model with a head for each criterion on the votes.", train_reward_model)
    stage("ddpo", "Tuning an adapter so that the denoiser earns more reward.", tune)
    stage("evaluation", "Judging unseen cases by measures that were never a reward.", evaluate)
    stage("report", "Writing the report.", write_report, state)
    report = json.loads((folder / "report.json").read_text())
    console.print(f"\nReward on unseen conditions: {report['ddpo']['reward_before']:.3f} -> ", end="")
    console.print(f"{report['ddpo']['reward_after']:.3f}, a gain of {report['ddpo']['gain']:.2f} standard deviations")
    console.print(f"within a group. Read [bold]{folder / 'report.md'}[/bold], look at {folder / 'before_after.png'}.")
    return report


# ----------------------------------------------------------------------------------------------------------- stages


def prepare_data(folder: Path, settings: DemoSettings) -> dict:
    """`data/{votes,train,unseen}`: rows of different cases."""
    if settings.data is not None:
        parts = datasets.load_from_disk(settings.data)
        if isinstance(parts, datasets.Dataset):
            parts = split_by_case(parts, {"train": 0.8, "test": 0.2}, settings.seed)
        parts = {"votes": parts["train"], "train": parts["train"], "unseen": parts["test"]}
    else:
        count = settings.num_vote_cases + settings.num_train_cases
        seen = one_condition_per_case(load_phantom(count, seed=settings.seed))
        parts = {
            "votes": seen.select(range(settings.num_vote_cases)),
            "train": seen.select(range(settings.num_vote_cases, count)),
            "unseen": one_condition_per_case(
                load_phantom(settings.num_unseen_cases, seed=settings.seed, split="test")
            ),
        }
    for name, rows in parts.items():
        rows.save_to_disk(folder / "data" / name)
    return {name: len(rows) for name, rows in parts.items()}


def one_condition_per_case(rows: datasets.Dataset) -> datasets.Dataset:
    """Of all contrasts and tasks of a phantom case one, another for each case."""
    per_case = len(rows) // len(set(rows["case_id"]))
    return rows.select([case * per_case + 5 * case % per_case for case in range(len(rows) // per_case)])


def fit_to_data(folder: Path, settings: DemoSettings) -> dict:
    """`sft_adapter/` and `pipeline/`, the pipeline with that adapter fused in."""
    rows = datasets.load_from_disk(folder / "data" / "train")
    rows = rows.filter(lambda row: row["target"] is not None)
    if not len(rows):
        raise ValueError(
            "`data` has no row with a target to learn from. Bring images to fill, whose own pixels are the target, or "
            "`target_file_name` for those to remove."
        )
    pipeline = OneRewardMaskPipeline.from_pretrained(settings.pipeline)
    args = SFTConfig(
        output_dir=str(folder / "sft_adapter"),
        max_steps=settings.sft_max_steps,
        learning_rate=2e-3,
        lr_scheduler_type="cosine",
        warmup_steps=20,
        per_device_train_batch_size=16,
        ema_decay=0.98,
        save_steps=50,
        save_total_limit=1,
        dataloader_pin_memory=False,  # warns where there is no GPU
        report_to="none",
        seed=settings.seed,
    )
    peft_config = LoraConfig(r=16, lora_alpha=32, target_modules=[*ATTENTION, "conv1", "conv2"])
    trainer = SFTTrainer(pipeline, args, rows, peft_config=peft_config, callbacks=[ProgressBar("Fitting")])
    trainer.dataset_name = settings.data
    train(trainer)
    trainer.ema.swap()
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(folder / "pipeline")
    parents = [describe_parent("base_model", settings.pipeline), describe_data("train_data", rows, settings.data)]
    write_provenance(folder / "pipeline", "pipeline", parents=parents, seed=settings.seed)
    return {"max_steps": settings.sft_max_steps, "loss": trainer.state.log_history[-1]["train_loss"]}


def base_path(folder: Path, settings: DemoSettings) -> str:
    """The pipeline that DDPO starts from."""
    return settings.pipeline if settings.data is None else str(folder / "pipeline")


def load_base(folder: Path, settings: DemoSettings) -> OneRewardMaskPipeline:
    """The pipeline that DDPO starts from, without a progress bar of its own."""
    pipeline = OneRewardMaskPipeline.from_pretrained(base_path(folder, settings))
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def collect_votes(folder: Path, settings: DemoSettings) -> dict:
    """`votes.parquet`, and apart from it `votes_truth.parquet`, which no model is trained on."""
    rows = datasets.load_from_disk(folder / "data" / "votes")
    candidates = make_candidates(
        load_base(folder, settings), rows, num_candidates=3, num_degraded=6, seed=settings.seed
    )
    votes, truths = simulate_votes(candidates, pairs_per_condition=36, seed=settings.seed)
    truths.to_parquet(folder / "votes_truth.parquet")
    save_votes(votes, folder / "votes.parquet")
    parents = [
        describe_data("train_data", rows, settings.data or "phantom"),
        describe_parent("base_model", base_path(folder, settings)),
    ]
    write_provenance(folder / "votes.parquet", "votes", parents=parents, seed=settings.seed)
    return {
        "num_votes": len(votes),
        "num_pairs": len(set(votes["pair_id"])),
        "num_candidates": len(candidates),
        "raters": {"simulated": len(set(votes["rater"]))},
    }


def train_reward_model(folder: Path, settings: DemoSettings) -> dict:
    """`reward_model/`."""
    votes = load_votes(folder / "votes.parquet")
    parts = split_by_case(votes, {"train": 0.75, "test": 0.25}, settings.seed)
    image = votes[0]["image"]
    labels = OneRewardMaskPipeline.load_config(base_path(folder, settings)).get("labels")
    config = OneRewardConfig(labels=labels, image_channels=len(image.getbands()), image_size=image.height)
    args = RewardConfig(
        output_dir=str(folder / "reward_model"),
        num_train_epochs=settings.reward_epochs,
        per_device_train_batch_size=144,  # the pairs of four conditions
        save_strategy="no",
        dataloader_pin_memory=False,  # warns where there is no GPU
        report_to="none",
        seed=settings.seed,
    )
    trainer = RewardTrainer(
        OneRewardModel(config),
        args,
        parts["train"],
        parts["test"],
        datasets.Dataset.from_parquet(str(folder / "votes_truth.parquet")),
        callbacks=[ProgressBar("Training the reward model", "loss")],
    )
    trainer.dataset_name = str(folder / "votes.parquet")
    train(trainer)
    metrics = {name.removeprefix("eval_"): value for name, value in trainer.evaluate().items()}
    trainer.save_model()
    return {
        "pair_accuracy": {criterion: metrics[f"accuracy/{criterion}"] for criterion in CRITERIA},
        "ceiling": {criterion: metrics[f"ceiling/{criterion}"] for criterion in CRITERIA},
        "calibration_error": {criterion: metrics[f"ece/{criterion}"] for criterion in CRITERIA},
        "unseen_votes": len(parts["test"]),
    }


def tune(folder: Path, settings: DemoSettings) -> dict:
    """`adapter/`."""
    args = DDPOConfig(
        output_dir=str(folder / "adapter"),
        max_steps=settings.ddpo_max_steps,
        learning_rate=1e-3,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr": 1e-4},
        warmup_steps=4,
        weight_decay=1e-4,
        per_device_generation_batch_size=64,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=32,
        num_generations=8,
        num_inference_steps=settings.num_inference_steps,
        window_size=3,
        beta=0.02,
        ema_decay=0.8,
        eval_strategy="steps",
        eval_steps=settings.ddpo_max_steps // 2,
        eval_on_start=True,
        save_steps=10,
        save_total_limit=2,
        log_samples_steps=10,
        report_to="none",
        seed=settings.seed,
    )
    trainer = DDPOTrainer(
        load_base(folder, settings),
        OneRewardModel.from_pretrained(folder / "reward_model"),
        args,
        datasets.load_from_disk(folder / "data" / "train"),
        datasets.load_from_disk(folder / "data" / "unseen"),
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules=[*ATTENTION, "conv1", "conv2"]),
        callbacks=[ProgressBar("Tuning", "reward")],
    )
    trainer.dataset_name = settings.data or "phantom"
    train(trainer)
    trainer.save_model()
    history = trainer.state.log_history
    reward_curve_figure(history, folder / "reward_curve.png")
    evaluations = [entry for entry in history if "eval_reward" in entry]
    first, last = evaluations[0], evaluations[-1]
    heads = [name.split("/")[1] for name in first if name.startswith("eval_rewards/") and name.endswith("/mean")]
    return {
        "reward_before": first["eval_reward"],
        "reward_after": last["eval_reward"],
        "reward_std_within_group": first["eval_reward_std"],
        "gain": last["eval_reward_gain"],
        "per_head": {
            head: {
                "before": first[f"eval_rewards/{head}/mean"],
                "after": last[f"eval_rewards/{head}/mean"],
                "std_within_group": first[f"eval_rewards/{head}/std"],
            }
            for head in heads
        },
        "kl": [entry["kl"] for entry in history if "kl" in entry][-1],
        "updates": trainer.state.global_step,
    }


def evaluate(folder: Path, settings: DemoSettings) -> dict:
    """`before_after.png`, and the measures that were never a reward."""
    rows = datasets.load_from_disk(folder / "data" / "unseen")
    pipeline = load_base(folder, settings)
    load_adapter(pipeline, folder / "adapter")
    arguments = {
        "segmenter": None if settings.data is not None else load_segmenter(),
        "num_inference_steps": settings.num_inference_steps,
    }
    before = evaluate_pipeline(pipeline, rows, adapter=False, description="Without the adapter", **arguments)
    after = evaluate_pipeline(pipeline, rows, description="With the adapter", **arguments)

    by_task = [[i for i, task in enumerate(rows["task"]) if task == wanted] for wanted in ("fill", "remove", "extend")]
    shown = [i for indices in by_task for i in indices[: 4 if indices is by_task[0] else 3]][:8]
    shown_rows = [rows[i] for i in shown]
    truth = None
    if all(row["target"] is not None for row in shown_rows):
        truth = rows_to_tensors(shown_rows)["targets"]
    pictures, labels = (before.images[shown], after.images[shown]), pipeline.config.labels
    before_after_figure(shown_rows, *pictures, truth, folder / "before_after.png", labels=labels)
    widget = write_gallery(folder / "adapter", shown_rows, *pictures, labels=labels)
    return {"measures": compare(before, after), "widget": widget}


def write_report(folder: Path, settings: DemoSettings, state: dict) -> None:
    """`report.json`, `report.md` and the card of the adapter."""
    results = state["results"]
    report = {
        "disclaimer": DISCLAIMER,
        "settings": asdict(settings),
        "seconds": state["seconds"],
        "data": results["data"],
        "votes": results["votes"],
        "reward_model": results["reward"],
        "ddpo": results["ddpo"],
        "heldout": results["evaluation"]["measures"],
        "environment": current_environment(),
        "commit": source_commit(),
    }
    write_json(folder / "report.json", report)
    _write_text(folder / "report.md", report_text(report))

    prompt = datasets.load_from_disk(folder / "data" / "unseen")[0]["prompt"]
    data = "the built-in phantom" if settings.data is None else "images from a folder"
    card = adapter_card(
        name=folder.name,
        base_model=base_path(folder, settings),
        repo_id=str(folder / "adapter"),
        raters=results["votes"]["raters"],
        num_votes=results["votes"]["num_votes"],
        training_data=(
            f"{results['data']['train']} conditions of {data}: {results['ddpo']['updates']} DDPO updates."
            + (f"\n\n{PHANTOM_ORIGIN}" if settings.data is None else "")
        ),
        agreement=vote_agreement(load_votes(folder / "votes.parquet")),
        evaluation={
            name: {column: entry[column] for column in ("before", "after", "real")}
            | {"95 % interval of after - before": entry["ci95"], "n": entry["n"]}
            for name, entry in results["evaluation"]["measures"].items()
        }
        | {
            f"rewards/{head}/mean": {"before": values["before"], "after": values["after"]}
            for head, values in results["ddpo"]["per_head"].items()
        },
        eval_dataset=f"{results['data']['unseen']} unseen conditions of {data}",
        command=shlex.join(["onereward", *sys.argv[1:]]),
        seed=settings.seed,
        limits=["Its raters were simulated.", "It was tuned for minutes, to show the loop, not to be used."],
        example_prompt=prompt,
        widget=results["evaluation"]["widget"],
        commit=source_commit(),
    )
    save_card(card, folder / "adapter")


def report_text(report: dict) -> str:
    """The report as Markdown."""
    reward, ddpo = report["reward_model"], report["ddpo"]
    heads = "\n".join(
        f"| {criterion} | {reward['pair_accuracy'][criterion]:.3f} | {reward['ceiling'][criterion]:.3f} | "
        f"{reward['pair_accuracy'][criterion] / reward['ceiling'][criterion]:.1%} | "
        f"{reward['calibration_error'][criterion]:.3f} |"
        for criterion in reward["pair_accuracy"]
    )
    per_head = "\n".join(
        f"| {head} | {values['before']:.3f} | {values['after']:.3f} | "
        f"{(values['after'] - values['before']) / values['std_within_group']:+.2f} |"
        for head, values in ddpo["per_head"].items()
    )
    heldout = "\n".join(
        f"| {name} | {'higher' if entry['higher_is_better'] else 'lower'} | {_figure(entry['before'])} | "
        f"{_figure(entry['after'])} | {_figure(entry['real'])} | {_figure(entry['ci95'][0])} to "
        f"{_figure(entry['ci95'][1])} | {entry['n']} | {entry['n_failed']} | {entry['verdict']} |"
        for name, entry in report["heldout"].items()
    )
    seconds = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())
    votes, base = report["votes"], ""
    if report["settings"]["data"] is not None:
        base = """

The adapter belongs on `pipeline/`, the base fitted to your images, and on no other: `onereward evaluate --pipeline`
and `onereward generate --pipeline` take that folder. Publish it first and name it as the adapter's `--base-model`."""
    return f"""# OneReward demo

**{DISCLAIMER}** All raters are simulated; all "after" images are synthetic.

![Source with mask, label map, before, after, truth](before_after.png)

## Did the reward rise?

On {report["data"]["unseen"]} unseen conditions the mean reward went from {ddpo["reward_before"]:.3f} to
{ddpo["reward_after"]:.3f}: {ddpo["gain"]:+.2f} standard deviations within a group of images of one condition
({ddpo["reward_std_within_group"]:.3f}). The reward was what the adapter was tuned for, so this is no result by
itself. Divergence from the base: {ddpo["kl"]:.2g} nats per masked element, after {ddpo["updates"]} updates.

| head | before | after | gain, in standard deviations within a group |
|---|---|---|---|
{per_head}

![Reward over the tuning](reward_curve.png)

## Did anything else get better or worse?

Measures that were never a reward, on the same unseen conditions. The interval is that of the difference
after - before, by case (paired bootstrap, 95 %). "Real" is the same measure of the ground truth. Of this many measures
one in twenty leaves its interval by chance. Simulated raters judge `remove` and `extend` against the truth too, though
by another measure than the ones here. A sharper image lies further from the truth pixel by pixel than a smooth one,
even where it is as likely (https://huggingface.co/papers/1711.06077): `mae` and `ssim` tell how close an image is;
Dice, residual tumour and kernel distance tell how plausible.

| measure | better | before | after | real | interval of the difference | n | failed | verdict |
|---|---|---|---|---|---|---|---|---|
{heldout}

## How good is the reward model?

Trained on {votes["num_votes"]} votes on {votes["num_pairs"]} pairs by {votes["raters"]["simulated"]} simulated raters;
judged on {reward["unseen_votes"]} votes on unseen cases. The ceiling is the accuracy that nobody can beat, given the
raters' noise.

| criterion | pair accuracy | ceiling | share of it | calibration error |
|---|---|---|---|---|
{heads}

## What is here

`adapter/` loads into diffusers (`pipeline.load_lora_weights`) and PEFT; `reward_model/` into transformers
(`AutoModel`); `votes.parquet` holds every vote with both images.{base}

Time: {seconds}. Seed {report["settings"]["seed"]}, base `{report["settings"]["pipeline"]}`.
"""


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


# ----------------------------------------------------------------------------------------------- progress and state


class ProgressBar(TrainerCallback):
    """One line that lives while a trainer trains, in place of Trainer's own, which prints every log."""

    def __init__(self, description: str, metric: str = "loss"):
        self.description, self.metric, self.bar = description, metric, None

    def on_train_begin(self, args, state, control, **kwargs):
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.description, unit="update")

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update(state.global_step - self.bar.n)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.bar is not None and self.metric in logs:
            self.bar.set_postfix({self.metric: f"{logs[self.metric]:.3f}"})

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()


def train(trainer) -> None:
    """Trains from the last checkpoint if there is one, with our progress bar alone."""
    for callback in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(callback)
    checkpoints = list(Path(trainer.args.output_dir).glob("checkpoint-*"))
    trainer.train(resume_from_checkpoint=bool(checkpoints))


def _read_state(folder: Path, settings: DemoSettings) -> dict:
    path = folder / "state.json"
    if path.exists():
        state = json.loads(path.read_text())
        if state["settings"] != asdict(settings):
            changed = [name for name, value in asdict(settings).items() if state["settings"].get(name) != value]
            raise ValueError(
                f"`{folder}` holds a run with other settings ({', '.join(changed)}). Start over with --restart, which "
                f"deletes it, or write elsewhere with --output."
            )
        return state
    folder.mkdir(parents=True, exist_ok=True)
    state = {"settings": asdict(settings), "seconds": {}, "results": {}}
    write_json(path, state)
    return state


def _write_text(path: Path, text: str) -> None:
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
