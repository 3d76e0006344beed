"""A DDPO training small enough for tests. As a script, with a JSON configuration, it is one process of several."""

import json
import os
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import torch
import yaml
from accelerate import PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig
from PIL import Image
from transformers import TrainerCallback


os.environ.setdefault("HF_HUB_OFFLINE", "1")
REPOSITORY = Path(__file__).parents[2]
sys.path.append(str(REPOSITORY / "tests"))

from tiny_components import tiny_components  # noqa: E402

from onereward.data.schema import FEATURES  # noqa: E402
from onereward.pipelines import OneRewardMaskPipeline  # noqa: E402
from onereward.trainers.ddpo import DDPOTrainer  # noqa: E402
from onereward.trainers.ddpo_config import DDPOConfig  # noqa: E402


def make_rows(count=8, size=16, seed=0):
    """Random pictures with a random box to repaint; one prompt for all, as is common in inpainting."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(count):
        mask, labels = np.zeros((2, size, size), np.uint8)
        top, left = rng.integers(2, 7, 2)
        mask[top : top + 6, left : left + 7] = 255
        labels[top + 2 : top + 4, left + 2 : left + 4] = rng.integers(1, 4)
        image = Image.fromarray(rng.integers(0, 256, (size, size), dtype=np.uint8))
        rows.append(
            {
                "image": image,
                "mask": Image.fromarray(mask),
                "label_map": Image.fromarray(labels),
                "target": image,
                "prompt": "oedema",
                "task": "fill",
                "modality": "t1c",
                "case_id": f"case-{i}",
                "source": "random",
            }
        )
    return datasets.Dataset.from_list(rows, features=FEATURES)


def brightness(images, masks, **columns):
    return (images * masks).sum(dim=(1, 2, 3)) / masks.sum(dim=(1, 2, 3))


def make_pipeline(scheduler=None, **kwargs):
    pipeline = OneRewardMaskPipeline(**tiny_components(**kwargs))
    if scheduler is not None:
        pipeline.scheduler = type(pipeline.scheduler).from_config(pipeline.scheduler.config, **scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def make_trainer(
    output_dir,
    reward_funcs=brightness,
    pipeline=None,
    rows=None,
    eval_rows=None,
    lora=None,
    eval_reward_funcs=None,
    callbacks=None,
    full=False,
    **config,
):
    defaults = {
        "per_device_generation_batch_size": 8,
        "per_device_train_batch_size": 4,
        "num_generations": 4,
        "num_inference_steps": 6,
        "window_size": 2,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "epsilon": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 0,
    }
    torch.manual_seed(0)  # of the adapter's first weights
    adapter = {"r": 2, "lora_alpha": 4, "target_modules": ["to_q", "to_v", "conv1"], **(lora or {})}
    return DDPOTrainer(
        pipeline or make_pipeline(),
        reward_funcs,
        DDPOConfig(output_dir=str(output_dir), **{**defaults, **config}),
        make_rows() if rows is None else rows,
        eval_rows,
        None if full else LoraConfig(**adapter),
        eval_reward_funcs,
        callbacks,
    )


def logged(trainer, name):
    return [entry[name] for entry in trainer.state.log_history if name in entry]


class Pause(TrainerCallback):
    """Waits after some update until somebody ends the process."""

    def __init__(self, step):
        self.step = step

    def on_save(self, args, state, control, **kwargs):
        while state.global_step == self.step:
            time.sleep(0.1)


def without_gpus(engine):
    """accelerate offers FSDP and DeepSpeed on GPUs alone; both work over gloo too, so that they can be tested."""
    settings = yaml.safe_load((REPOSITORY / "trainers" / "accelerate" / f"{engine}.yaml").read_text())
    if engine == "fsdp":
        start = PartialState.__init__

        def start_as_if_on_gpus(self, *args, **kwargs):
            start(self, *args, **kwargs)
            if self.distributed_type == DistributedType.MULTI_CPU:
                self.distributed_type = DistributedType.MULTI_XPU

        PartialState.__init__ = start_as_if_on_gpus
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        os.environ.update({name.upper(): str(value).lower() for name, value in settings["fsdp_config"].items()})
        os.environ["FSDP_AUTO_WRAP_POLICY"] = settings["fsdp_config"]["fsdp_auto_wrap_policy"]
        os.environ["FSDP_STATE_DICT_TYPE"] = settings["fsdp_config"]["fsdp_state_dict_type"]
    else:
        finish = DDPOConfig.__post_init__

        def forget_that_it_is_a_cpu(self):
            finish(self)
            os.environ.pop("ACCELERATE_USE_CPU", None)

        DDPOConfig.__post_init__ = forget_that_it_is_a_cpu
        os.environ["ACCELERATE_USE_DEEPSPEED"], os.environ["DS_ACCELERATOR"] = "true", "cpu"
        names = {"zero_stage": "ZERO_STAGE", "offload_optimizer_device": "OFFLOAD_OPTIMIZER_DEVICE"}
        names["offload_param_device"] = "OFFLOAD_PARAM_DEVICE"
        for name, variable in names.items():
            os.environ[f"ACCELERATE_DEEPSPEED_{variable}"] = str(settings["deepspeed_config"][name])


if __name__ == "__main__":
    torch.set_num_threads(1)
    config = json.loads(sys.argv[1])
    if "engine" in config:
        without_gpus(config.pop("engine"))
    resume, pause, delay = (config.pop(name, None) for name in ("resume_from_checkpoint", "pause_at", "slow_rewards"))
    unscored = config.pop("unscored", [])
    if "num_eval_rows" in config:
        config["eval_rows"] = make_rows(config.pop("num_eval_rows"), seed=1)

    def reward(images, masks, case_id, **columns):
        if delay:
            Path(config["output_dir"], "first_rollout").touch()
            time.sleep(delay)
        rewards = brightness(images, masks)
        return [None if case in unscored else value for case, value in zip(case_id, rewards.tolist(), strict=True)]

    trainer = make_trainer(**config, reward_funcs=reward, callbacks=[Pause(pause)])
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    parameters = [p.detach() for p in trainer.denoiser.parameters() if p.requires_grad]
    weights = torch.cat([(p.full_tensor() if hasattr(p, "full_tensor") else p).flatten() for p in parameters])
    path = Path(config["output_dir"], f"result_{trainer.args.process_index}.json")
    result = {"weights": weights.tolist(), "world": trainer.args.world_size, "beta": trainer.beta}
    path.write_text(json.dumps(result | {"eval_rewards": logged(trainer, "eval_reward")}))
