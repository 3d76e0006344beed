"""What all trainers have in common on the way to the Hub: checkpoints without pickles, provenance, publishing."""

import json
import os
import random
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import torch
from diffusers import DiffusionPipeline
from huggingface_hub import HfApi, ModelCard, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import HubStrategy, rotate_checkpoints
from transformers.utils import logging

from onereward.data.whole_file import write_json
from onereward.hub.artefacts import CHECKPOINT
from onereward.hub.cards import save_card
from onereward.hub.provenance import describe_data, describe_parent, write_provenance
from onereward.hub.publish import Published, publish
from onereward.trainers.checkpoints import (
    check_checkpoint,
    last_whole_checkpoint,
    load_state,
    save_state,
    seal_checkpoint,
)


logger = logging.get_logger(__name__)


def download_checkpoint(name: str, token: str | None = None) -> str:
    """
    Fetch the checkpoint that a training with `hub_strategy="checkpoint"` left on the Hub. Only safetensors and JSON
    files are fetched.

    Args:
        name (`str`):
            `org/name`, or `org/name@revision`.
        token (`str`, *optional*):
            Token of somebody who may read it.

    Returns:
        `str`: its folder in the cache.

    Raises:
        `ValueError`: when there is no such repository or revision, or no checkpoint in it.
    """
    repo_id, _, revision = name.partition("@")
    wanted = f"`resume_from_checkpoint` is {name!r}"
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise ValueError(
            f"{wanted}, which is no folder here; expected a checkpoint's folder, `true`, or org/name[@revision]."
        )
    patterns = [f"{CHECKPOINT}/*{suffix}" for suffix in (".safetensors", ".json")]
    try:
        folder = snapshot_download(repo_id, revision=revision or None, allow_patterns=patterns, token=token)
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise ValueError(
            f"{wanted}, which is no folder here, and on the Hub it could not be read ({error}). Check the name, the "
            "revision and who is logged in (`hf auth whoami`)."
        ) from error
    folder = Path(folder, CHECKPOINT)
    if not folder.is_dir():
        raise ValueError(
            f"{wanted}, and that repository has no {CHECKPOINT}/: only a training with "
            "`hub_strategy='checkpoint'` can go on from the Hub. To start from its weights load it as an adapter."
        )
    return str(folder)


def loaded_revision(pipeline: DiffusionPipeline) -> str | None:
    """The commit that a pipeline was loaded from, as the cache's folders have it in their names, or `None`."""
    for component in pipeline.components.values():
        path = getattr(getattr(component, "config", None), "_name_or_path", "")
        found = re.search(r"snapshots[/\\]([0-9a-f]{40})[/\\]", str(path))
        if found:
            return found.group(1)
    return None


class HubTrainer(Trainer):
    r"""
    [`~transformers.Trainer`] for what this package publishes. What is different:

    - Checkpoints are safetensors and JSON, sealed once they are whole, and hold no pickle. (FSDP and DeepSpeed write
      their own formats, which stay on this disk.)
    - `resume_from_checkpoint` refuses by name a checkpoint that is not whole, or is of another run; `True` takes the
      newest whole one of `output_dir` and starts at the beginning where there is none; `"org/name[@revision]"` takes
      the one that `hub_strategy="checkpoint"` left on the Hub.
    - `push_to_hub=True` publishes as `onereward publish` does: in one commit, with card and provenance, without
      pickles. A push in the middle of the training that fails is a warning, and the next save makes it good; one at
      its end raises.
    - Each folder that is saved tells in `provenance.json` what it was made from.

    A trainer sets `kind`, what [`~onereward.hub.publish.publish`] knows it as, and has `loaded_from` and `model_card`.
    Scripts set `dataset_name` and `dataset_revision`, by which the data are known, and `sources`.
    """

    kind: str
    data_role = "train_data"
    dataset_name: str | None = None
    dataset_revision: str | None = None
    sources: tuple[tuple[str, str, str | None], ...] = ()  # (role, name, revision) of what a script loaded besides
    newest_checkpoint: Path | None = None

    def loaded_from(self) -> list[tuple[str, str, str | None]]:
        """(role, name, revision) of each model that the training started from, as far as the trainer can tell."""
        raise NotImplementedError

    def training_data(self) -> datasets.Dataset:
        """The rows that were trained on."""
        return self.train_dataset

    def model_card(self, model_name: str | None = None, dataset_name: str | None = None, **fields) -> ModelCard:
        """The card of what is trained, as it is now."""
        raise NotImplementedError

    # ------------------------------------------------------------------------------------------------- state files

    @property
    def _engine_has_own_formats(self) -> bool:
        return self.is_fsdp_enabled or self.is_deepspeed_enabled

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._engine_has_own_formats:
            super()._save_optimizer_and_scheduler(output_dir)
        elif self.args.should_save:
            save_state(Path(output_dir, "optimizer.safetensors"), self.optimizer.state_dict())
            save_state(Path(output_dir, "scheduler.safetensors"), self.lr_scheduler.state_dict())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None or self._engine_has_own_formats:
            super()._load_optimizer_and_scheduler(checkpoint)
        elif Path(checkpoint, "optimizer.safetensors").is_file():  # not with `save_only_model`
            self.optimizer.load_state_dict(load_state(Path(checkpoint, "optimizer.safetensors")))
            self.lr_scheduler.load_state_dict(load_state(Path(checkpoint, "scheduler.safetensors")))

    def _save_scaler(self, output_dir: str) -> None:
        scaler = getattr(self.accelerator, "scaler", None)  # of float16
        if scaler is not None and self.args.should_save:
            save_state(Path(output_dir, "scaler.safetensors"), scaler.state_dict())

    def _load_scaler(self, checkpoint: str | None) -> None:
        if checkpoint is not None and Path(checkpoint, "scaler.safetensors").is_file():
            self.accelerator.scaler.load_state_dict(load_state(Path(checkpoint, "scaler.safetensors")))

    def _save_rng_state(self, output_dir: str) -> None:
        name, keys, *rest = np.random.get_state()
        state = {"python": random.getstate(), "numpy": (name, keys.tolist(), *rest), "cpu": torch.get_rng_state()}
        if self.args.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state()
        save_state(Path(output_dir, f"rng_state_{self.args.process_index}.safetensors"), state)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        path = Path(checkpoint or "", f"rng_state_{self.args.process_index}.safetensors")
        if checkpoint is None or not path.is_file():  # of fewer processes, or with `save_only_model`
            return
        state = load_state(path)
        random.setstate(state["python"])
        np.random.set_state(state["numpy"])
        torch.set_rng_state(state["cpu"])
        if "cuda" in state and self.args.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"])

    # ------------------------------------------------------------------------------------------ saving and resuming

    @property
    def run_description(self) -> dict:
        """What a run that goes on from a checkpoint must agree with, see [`seal_checkpoint`]."""
        return {}

    def save_state_besides(self, folder: Path) -> None:
        """Write what a checkpoint needs besides model, optimizer, schedule and random states; on each process."""

    @property
    def checkpoint_folder(self) -> Path:
        """The checkpoint of the present update."""
        return Path(self.args.output_dir, f"checkpoint-{self.state.global_step}")

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        """
        As [`~transformers.Trainer.train`]; it waits for a push that is under way.

        Args:
            resume_from_checkpoint (`str` or `bool`, *optional*):
                A checkpoint's folder; `True` for the newest of `output_dir` that is whole, or the beginning where
                there is none, so that the same command starts and resumes; or `"org/name[@revision]"` for the one
                that `hub_strategy="checkpoint"` left on the Hub.

        Raises:
            `ValueError`: when the checkpoint is not there, not whole, of another run or of an older version.
        """
        return self.train_from(self.find_checkpoint(resume_from_checkpoint), **kwargs)

    def train_from(self, checkpoint: str | None, **kwargs):
        """Train, from a checkpoint that has been found good, or from the beginning."""
        if self.args.push_to_hub and self.is_world_process_zero() and not self._engine_has_own_formats:
            self._check_that_it_can_be_published()
        try:
            return super().train(resume_from_checkpoint=checkpoint, **kwargs)
        finally:
            self._finish_current_push()

    def find_checkpoint(self, resume_from_checkpoint: str | bool | None) -> str | None:
        """The folder of the checkpoint that was asked for, see [`~HubTrainer.train`], once it has been checked."""
        if resume_from_checkpoint is True or str(resume_from_checkpoint).lower() == "true":
            folder = last_whole_checkpoint(self.args.output_dir, self.run_description)
            if folder is None:
                logger.warning(f"There is no whole checkpoint in {self.args.output_dir}: starting at the beginning.")
            else:
                self.newest_checkpoint = Path(folder)
            return folder
        if not resume_from_checkpoint or str(resume_from_checkpoint).lower() == "false":
            return None
        folder = str(resume_from_checkpoint)
        if not os.path.isdir(folder):
            folder = download_checkpoint(folder, self.args.hub_token)
        check_checkpoint(folder, self.run_description)
        self.newest_checkpoint = Path(folder)
        return folder

    def _save_checkpoint(self, model, trial) -> None:
        # The seal comes when all else is there, publishing after it, and older checkpoints are deleted last.
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit = limit
        folder = self.checkpoint_folder
        self.save_state_besides(folder)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal_checkpoint(folder, self.run_description)
        self.newest_checkpoint = folder
        if self.args.push_to_hub and self.is_world_process_zero():
            self._publish_checkpoint(folder)
        if self.args.should_save:
            rotate_checkpoints(self.args.output_dir, limit, self.state.best_model_checkpoint, use_mtime=True)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """The Trainer calls this before the checkpoint is whole: see `_save_checkpoint`."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """
        Write what was trained, and what it was made from. With `push_to_hub=True` it is published too.

        Args:
            output_dir (`str`, *optional*):
                Where to write. Defaults to `args.output_dir`.
        """
        if self.args.push_to_hub and not _internal_call and output_dir in (None, self.args.output_dir):
            self.push_to_hub(commit_message="Model saved.")
        else:
            self.write_model(output_dir)

    def write_model(self, output_dir: str | None = None) -> None:
        """[`~HubTrainer.save_model`] without publishing."""
        super().save_model(output_dir, _internal_call=True)
        if self.args.should_save:
            self._write_provenance(output_dir or self.args.output_dir)

    # ------------------------------------------------------------------------------------------------------ provenance

    def made_from(self) -> list[tuple[str, str, str | None]]:
        """(role, name, revision) of all models that the training started from; what a script says comes first."""
        models = {(role, str(name)): revision for role, name, revision in [*self.loaded_from(), *self.sources]}
        return [(*model, revision) for model, revision in models.items()]

    @cached_property
    def parents(self) -> list[dict]:
        """What the result is made from, with revisions and fingerprints, see [`describe_parent`]."""
        parents = [describe_parent(role, name, revision) for role, name, revision in self.made_from()]
        if self.train_dataset is not None:
            rows = self.training_data()
            parents.append(describe_data(self.data_role, rows, self.dataset_name, self.dataset_revision))
        return parents

    def provenance_besides(self) -> dict:
        """Further entries of `provenance.json`."""
        return {}

    def _write_provenance(self, folder: str | os.PathLike) -> None:
        write_provenance(
            folder,
            self.kind,
            parents=self.parents,
            config=self.args,
            seed=self.args.seed,
            updates=self.state.global_step,
            **self.provenance_besides(),
        )

    # ------------------------------------------------------------------------------------------------------ publishing

    def create_model_card(
        self, model_name: str | None = None, dataset_name: str | None = None, tags: list[str] | None = None, **fields
    ) -> None:
        """
        Write the card, `README.md`, to `args.output_dir`, with what the trainer knows.

        Args:
            model_name (`str`, *optional*):
                Title of the card. Defaults to the name of `args.output_dir`.
            dataset_name (`str`, *optional*):
                Name of the data that were trained on.
            tags (`list[str]`, *optional*):
                Unused: the tags of a card are those of all cards of its kind.
            **fields:
                Further fields of the card, in place of the trainer's own.
        """
        if self.is_world_process_zero():
            save_card(self.model_card(model_name, dataset_name, **fields), self.args.output_dir)

    def push_to_hub(
        self,
        commit_message: str = "End of training.",
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **fields,
    ) -> Published | None:
        """
        Save what was trained, with its card, and publish it in one commit, see [`~onereward.hub.publish.publish`].
        With `hub_strategy="checkpoint"` the newest checkpoint goes with it. To be called on all processes.

        Args:
            commit_message (`str`, *optional*, defaults to `"End of training."`):
                What is new, for the changelog.
            token (`str`, *optional*):
                Defaults to `args.hub_token`.
            revision (`str`, *optional*):
                Branch to publish on. Defaults to `args.hub_revision`.
            private (`bool`, *optional*):
                Whether a repository that is made is private. Defaults to `args.hub_private_repo`.
            **fields:
                Arguments of [`~HubTrainer.create_model_card`].

        Returns:
            [`~onereward.hub.publish.Published`], or `None` on other processes than the first.

        Raises:
            `ValueError` or `OSError`: when it cannot be published. Nothing then is.
        """
        self.callback_handler.on_push_begin(self.args, self.state, self.control)
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.write_model()
        if not self.is_world_process_zero():
            return None
        self.create_model_card(**{"model_name": self.hub_model_id.split("/")[-1], **fields})
        self._finish_current_push()
        with tempfile.TemporaryDirectory() as stage:
            given = {"token": token, "revision": revision, "private": private}
            given = {name: value for name, value in given.items() if value is not None}
            checkpoint = self._stage_checkpoint(self.newest_checkpoint, Path(stage))
            return self._publish(self.args.output_dir, changes=commit_message, checkpoint=checkpoint, **given)

    def _publish(self, folder: str | os.PathLike, **given) -> Published:
        args = self.args
        settings = {
            "private": bool(args.hub_private_repo),
            "revision": args.hub_revision,
            "base_model": getattr(args, "hub_base_model", None),
            "token": args.hub_token,
        }
        return publish(self.kind, folder, self.hub_model_id, **{**settings, **given})

    def _check_that_it_can_be_published(self) -> None:
        """What would be refused in the end is refused at the start: a base nobody can load, data under agreement."""
        private = HfApi().repo_info(self.hub_model_id, token=self.args.hub_token).private
        with tempfile.TemporaryDirectory() as folder:
            self.write_model(folder)
            save_card(self.model_card(self.hub_model_id.split("/")[-1]), folder)
            self._publish(folder, private=private, dry_run=True)

    def _publish_checkpoint(self, folder: Path) -> None:
        """Publish what a checkpoint holds, in the background, from a copy that later saves do not touch."""
        args = self.args
        if args.hub_strategy == HubStrategy.END:
            return
        if not args.hub_always_push and self.push_in_progress is not None and not self.push_in_progress.done():
            return  # as the Trainer does: the next save brings more
        step, stage = self.state.global_step, Path(tempfile.mkdtemp(prefix="onereward-push-"))
        self.write_result(folder, stage / "result")
        self._write_provenance(stage / "result")
        save_card(self.model_card(self.hub_model_id.split("/")[-1]), stage / "result")
        checkpoint = self._stage_checkpoint(folder, stage)

        def push():
            try:
                self._publish(stage / "result", changes=f"Training in progress, step {step}.", checkpoint=checkpoint)
            except Exception as error:  # whatever it is, it must not end a night of training
                logger.warning(
                    f"Step {step} was not published, the training goes on, and the next save makes it good: {error}"
                )
            finally:
                shutil.rmtree(stage)

        self.push_in_progress = self._pusher.submit(push)

    @cached_property
    def _pusher(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="push")  # one after the other

    def write_result(self, checkpoint: Path, folder: Path) -> None:
        """Write what a checkpoint holds as [`~HubTrainer.save_model`] would have written it then."""
        shutil.copytree(checkpoint, folder)

    def _stage_checkpoint(self, folder: Path | None, stage: Path) -> Path | None:
        """A copy of the checkpoint that is to be published, without the names of places on this disk, or `None`."""
        if folder is None or self.args.hub_strategy != HubStrategy.CHECKPOINT:
            return None
        if self._engine_has_own_formats:
            logger.warning_once(
                "`hub_strategy` is 'checkpoint', but FSDP and DeepSpeed write checkpoints in formats of their own, "
                "pickles among them: these stay on this disk. What is trained is published without them."
            )
            return None
        copy = stage / CHECKPOINT
        shutil.copytree(folder, copy)
        state = json.loads((copy / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
        write_json(copy / TRAINER_STATE_NAME, {**state, "best_model_checkpoint": None})
        seal_checkpoint(copy, self.run_description)
        return copy

    def _finish_current_push(self) -> None:
        if getattr(self, "push_in_progress", None) is not None:
            if not self.push_in_progress.done():
                logger.warning("Waiting for the push of the last checkpoint.")
            self.push_in_progress.result()
            self.push_in_progress = None
