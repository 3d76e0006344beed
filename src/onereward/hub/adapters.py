"""Adapters, on disk and on the Hub: files that diffusers and PEFT both load, with the same result to the last bit."""

import copy
import json
import os
import tempfile
from pathlib import Path

from huggingface_hub import hf_hub_download, list_repo_files
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from peft import PeftType
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


DIFFUSERS_WEIGHTS = "pytorch_lora_weights.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def denoiser_of(pipeline):
    """
    The denoiser of a pipeline.

    Args:
        pipeline (`DiffusionPipeline`):
            Pipeline with a `unet`, or a `transformer` as the flow-matching ones have.

    Returns:
        `torch.nn.Module`.
    """
    return getattr(pipeline, denoiser_name(pipeline))


def denoiser_name(pipeline):
    """Under which name a pipeline has its denoiser: `"unet"` or `"transformer"`."""
    return "unet" if "unet" in pipeline.components else "transformer"


def save_adapter(pipeline, folder, *, base_model, adapter_name="default", state_dict=None):
    """
    Write the adapter of the pipeline's denoiser in both formats: `pytorch_lora_weights.safetensors`, which
    `pipeline.load_lora_weights` reads, and `adapter_config.json` with `adapter_model.safetensors`, which
    `PeftModel.from_pretrained` reads. Adapters of another kind than LoRA (LoHa, LoKr, OFT, ...) exist in the format of
    PEFT alone.

    The diffusers file carries the LoRA configuration in its header. Without it a reader takes alpha for the rank,
    and the adapter comes back too weak without a word.

    Args:
        pipeline (`DiffusionPipeline`):
            Pipeline whose `unet` or `transformer` has the adapter. It is not changed.
        folder (`str` or `os.PathLike`):
            Where to write; made if needed. Each file is replaced in one step.
        base_model (`str` or `None`):
            Repository or folder of the pipeline without the adapter; `None` when it was never saved.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Name of the adapter inside the denoiser.
        state_dict (`dict[str, torch.Tensor]`, *optional*):
            State dict of the denoiser, where it had to be gathered from several processes. Defaults to its own.

    Raises:
        ValueError: when the denoiser has no adapter of that name, or one that diffusers cannot load
            (`modules_to_save`).

    Example:

    ```python
    >>> from peft import LoraConfig
    >>> from onereward import OneRewardMaskPipeline
    >>> from onereward.hub.adapters import load_adapter, save_adapter

    >>> pipeline = OneRewardMaskPipeline.from_pretrained("pipelines/onereward-brats")
    >>> pipeline.unet.add_adapter(LoraConfig(r=8, lora_alpha=16, target_modules=["to_q", "to_v"]))
    >>> save_adapter(pipeline, "runs/adapter", base_model="pipelines/onereward-brats")
    ```
    """
    component, denoiser = denoiser_name(pipeline), denoiser_of(pipeline)
    configs = getattr(denoiser, "peft_config", {})
    if adapter_name not in configs:
        raise ValueError(
            f"`adapter_name` is {adapter_name!r}, but the denoiser has the adapters {sorted(configs)}. Add one "
            f"with `pipeline.{component}.add_adapter(LoraConfig(...))` or name one of these."
        )
    config = copy.deepcopy(configs[adapter_name])
    if getattr(config, "modules_to_save", None):
        raise ValueError(
            f"The adapter has `modules_to_save={config.modules_to_save}`, which diffusers cannot load. Make these "
            "layers LoRA targets (`target_modules`) instead."
        )
    for name in ("target_modules", "exclude_modules"):
        setattr(config, name, _in_order(getattr(config, name, None)))
    config.inference_mode = True
    config.base_model_name_or_path = None if base_model is None else str(base_model)
    config.auto_mapping = {
        "base_model_class": type(denoiser).__name__,
        "parent_library": type(denoiser).__module__,
    }
    # without the last argument PEFT asks the Hub whether the base model's vocabulary has grown
    weights = get_peft_model_state_dict(denoiser, state_dict, adapter_name, save_embedding_layers=False)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".adapter-") as temporary:
        if config.peft_type == PeftType.LORA:
            layers = {f"{component}_lora_layers": weights, f"{component}_lora_adapter_metadata": config.to_dict()}
            pipeline.save_lora_weights(temporary, **layers)
            sort_header(Path(temporary, DIFFUSERS_WEIGHTS))
        save_file(
            {f"base_model.model.{name}": tensor for name, tensor in weights.items()},
            Path(temporary, PEFT_WEIGHTS),
            metadata={"format": "pt"},
        )
        config.save_pretrained(temporary)
        for path in Path(temporary).iterdir():
            os.replace(path, folder / path.name)


def sort_header(path):
    """
    Put the entries of a safetensors file's metadata into order. They are written in an order that chance decides, and
    the same adapter would be another file each time it is saved.

    Args:
        path (`str` or `os.PathLike`):
            The file. Its tensors stay where they are.
    """
    with open(path, "rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        if len(text) > size:
            raise ValueError(f"{path} has a header that cannot be put into order: {len(text)} bytes for {size}.")
        file.seek(8)
        file.write(text.ljust(size))


def load_adapter(pipeline, name, adapter_name="default", trainable=False, revision=None):
    """
    Load an adapter that [`save_adapter`], or `save_lora_weights` of diffusers, wrote, and make sure that it arrived:
    the loaders of diffusers take a folder without an adapter for an empty one, and say nothing.

    Args:
        pipeline (`DiffusionPipeline`):
            Pipeline with a `unet` or `transformer`. The adapter is added to it and made active.
        name (`str` or `os.PathLike`):
            Folder with `pytorch_lora_weights.safetensors`, or a repository that has it on the Hub. Pickle files are
            neither downloaded nor read.
        adapter_name (`str`, *optional*, defaults to `"default"`):
            Name to give the adapter inside the denoiser.
        trainable (`bool`, *optional*, defaults to `False`):
            Whether the adapter's weights get gradients. The denoiser's other weights get none in either case.
        revision (`str`, *optional*):
            Branch, tag or commit on the Hub. Defaults to the newest.

    Raises:
        ValueError: when there is no adapter, only pickle files, or one for another denoiser, when the denoiser has an
            adapter of that name already, or when a `revision` is given for a folder.
        OSError: when the Hub does not give the adapter out: it is gated, private or not there, or out of reach.

    Example:

    ```python
    >>> from onereward import OneRewardMaskPipeline
    >>> from onereward.hub.adapters import load_adapter

    >>> pipeline = OneRewardMaskPipeline.from_pretrained("org/onereward-brats")
    >>> load_adapter(pipeline, "org/adapter", revision="v1.0.0")
    ```
    """
    path = _find_weights(name, revision)
    component, denoiser = denoiser_name(pipeline), denoiser_of(pipeline)
    if adapter_name in getattr(denoiser, "peft_config", {}):
        raise ValueError(
            f"`adapter_name` is {adapter_name!r}, and the denoiser has an adapter of that name already. Choose "
            f"another name or remove it with `pipeline.delete_adapters({adapter_name!r})`."
        )
    misfits = _misfits(denoiser, _weights(path, component))
    if misfits:
        raise ValueError(
            f"{str(name)!r} does not fit this denoiser: {len(misfits)} of the tensors in {DIFFUSERS_WEIGHTS} have no "
            f"place there, {misfits[0]!r} among them. {_made_for(name, path.parent)}"
        )

    pipeline.load_lora_weights(str(path.parent), weight_name=DIFFUSERS_WEIGHTS, adapter_name=adapter_name)
    pipeline.set_adapters(adapter_name)
    for parameter_name, parameter in denoiser.named_parameters():
        parameter.requires_grad_(trainable and f".{adapter_name}." in f"{parameter_name}.")


def _find_weights(name, revision):
    """Path of the weights in diffusers' format, of a folder or, once downloaded, of a repository on the Hub."""
    folder = Path(name)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(
                f"`revision` is {revision!r}, but {str(name)!r} is a folder, which has no revisions. Leave it out, or "
                "name a repository on the Hub."
            )
        if not (folder / DIFFUSERS_WEIGHTS).is_file():
            names = sorted(entry.name for entry in folder.iterdir())
            raise ValueError(f"`name` is {str(name)!r}, {_what_is_wrong(names)}")
        return folder / DIFFUSERS_WEIGHTS
    name = str(name)
    try:
        return Path(hf_hub_download(name, DIFFUSERS_WEIGHTS, revision=revision))
    except HFValidationError as error:
        raise ValueError(
            f"`name` is {name!r}, which is no folder here and no name on the Hub (like 'org/adapter'). Correct the "
            "path or the name."
        ) from error
    except GatedRepoError as error:
        raise OSError(
            f"{name!r} is gated: its owners want to know who takes it. Ask for access on its page, and log in with "
            "`hf auth login`."
        ) from error
    except RepositoryNotFoundError as error:
        raise OSError(
            f"{name!r} is no folder here, and the Hub shows no such repository. Correct the name; if it is private, "
            "log in with `hf auth login` as somebody who may read it."
        ) from error
    except RevisionNotFoundError as error:
        raise OSError(f"{name!r} has no revision {revision!r}. Pass one of its branches, tags or commits.") from error
    except LocalEntryNotFoundError as error:
        raise OSError(
            f"{name!r} is no folder here, it is not in the cache, and the Hub cannot be reached. Go online (or unset "
            "HF_HUB_OFFLINE) and load it once."
        ) from error
    except EntryNotFoundError as error:
        names = list_repo_files(name, revision=revision)
        raise ValueError(f"`name` is {name!r}, {_what_is_wrong(names)}") from error


def _weights(path, component):
    try:
        weights = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path} is no safetensors file ({error}). Write or download the adapter anew.") from error
    prefix = f"{component}."
    ours = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if not ours:
        raise ValueError(
            f"{path} has no tensor whose name begins with {prefix!r}, only {sorted(weights)[:3]}: nothing would be "
            "loaded. Write it with `save_adapter`, or with `save_lora_weights` of the pipeline."
        )
    return ours


def _misfits(denoiser, weights):
    """Names of the LoRA tensors whose layer the denoiser does not have, or has in another size."""
    layers = dict(denoiser.named_modules())
    misfits = []
    for name, tensor in sorted(weights.items()):
        layer, _, part = name.partition(".lora_")
        weight = getattr(layers.get(layer), "weight", None)
        axis = {"A": 1, "B": 0}.get(part[:1])  # A reads the layer's input, B writes its output
        if weight is None or (axis is not None and tensor.shape[axis] != weight.shape[axis]):
            misfits.append(name)
    return misfits


def _in_order(names):
    """PEFT keeps module names in a set; a list in order makes the files the same bytes each time."""
    return sorted(names) if isinstance(names, set) else names


def _what_is_wrong(names):
    if PEFT_WEIGHTS in names:
        return (
            f"which holds an adapter in PEFT format only ({PEFT_WEIGHTS}). Load it with "
            "`PeftModel.from_pretrained` on the denoiser, or write it anew with `save_adapter`."
        )
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        return f"which holds {pickles}: pickle files can run code and are not read. Convert them to safetensors."
    return f"which holds no {DIFFUSERS_WEIGHTS}, only {names}. Pass what `save_adapter` wrote."


def _made_for(name, folder):
    """Which base an adapter says that it was made for; `folder` is `name`, or the commit of it in the cache."""
    try:
        path = (
            folder / PEFT_CONFIG if Path(name).is_dir() else hf_hub_download(name, PEFT_CONFIG, revision=folder.name)
        )
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError:  # it does not say, or cannot be asked now
        return "Load the pipeline that the adapter was made for."
    return f"It was made for {config.get('base_model_name_or_path')!r}."
