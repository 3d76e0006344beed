"""After `import onereward`, the plain Hugging Face loaders give our classes: no flag, no code of the repository run.

    DiffusionPipeline.from_pretrained(repo)   gives the installed `OneRewardMaskPipeline`, or one of its two sisters
    AutoConfig / AutoModel.from_pretrained(repo)   give the installed `OneRewardConfig` / `OneRewardModel`
    pipeline("image-reward", model=repo)   gives the installed `ImageRewardPipeline`

A pipeline repository names its class as `["pipeline", "OneRewardMaskPipeline"]`, which tells diffusers to run the
repository's `pipeline.py` (and to ask for `trust_remote_code=True` first); a reward model has the model type
`onereward`, which transformers does not know. Both libraries read the repository's JSON file through one class
method. We wrap these two methods: when the file names a class of ours, the installed class is made known before the
method returns. Files that name anything else pass through as they are.

`DiffusionPipeline.from_pretrained` is wrapped too. A repository of ours it passes on to the installed class, which
reads weights from safetensors alone; by itself it would take pickles where there is nothing else.

The wrapping happens right after the library's module has been imported, now or later, so that `import onereward` does
not have to import the library. Only the standard library is needed here.
"""

import functools
import json
import sys
from pathlib import Path


PIPELINE_CLASSES = ("OneRewardMaskPipeline", "OneRewardFluxFillPipeline", "OneRewardSD3InpaintPipeline")
MODEL_TYPE = "onereward"


def _wrap_classmethod(owner, name, after):
    """Let `after(result)` see, and change, what the class method `owner.name` returns. Wrapping twice does nothing."""
    original = getattr(owner, name).__func__
    if hasattr(original, "_onereward"):
        return

    @functools.wraps(original)
    def wrapper(cls, *args, **kwargs):
        result = original(cls, *args, **kwargs)
        after(result)
        return result

    wrapper._onereward = True
    setattr(owner, name, classmethod(wrapper))


def _name_installed_pipeline(model_index):
    class_name = _named_class(model_index)
    if class_name in PIPELINE_CLASSES:
        # diffusers looks a plain class name up as an attribute of its own top-level module
        setattr(sys.modules["diffusers"], class_name, _installed_pipeline(class_name))
        model_index["_class_name"] = class_name


def _installed_pipeline(class_name):
    import onereward.pipelines

    return getattr(onereward.pipelines, class_name)


def _named_class(model_index):
    """The name of the pipeline's class, from `["pipeline", "Name"]` or plain."""
    class_name = model_index.get("_class_name")
    return class_name[1] if isinstance(class_name, list) and len(class_name) == 2 else class_name


def _read_model_index(name, kwargs):
    """The model_index.json of a folder or repository, empty where it cannot be read."""
    from huggingface_hub import hf_hub_download

    where = {key: kwargs[key] for key in ("cache_dir", "local_files_only", "revision", "token") if key in kwargs}
    try:
        path = Path(name, "model_index.json")
        if not Path(name).is_dir():
            path = Path(hf_hub_download(str(name), "model_index.json", **where))
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # no such name, file or JSON: diffusers finds out as well, and says what is wrong
        return {}


def _pass_our_pipelines_on(plain):
    """Let `DiffusionPipeline.from_pretrained` call that of the installed class, for repositories of ours."""
    original = plain.__dict__["from_pretrained"].__func__
    if hasattr(original, "_onereward"):
        return

    @functools.wraps(original)
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        if cls is plain:
            class_name = _named_class(_read_model_index(pretrained_model_name_or_path, kwargs))
            if class_name in PIPELINE_CLASSES:
                return _installed_pipeline(class_name).from_pretrained(pretrained_model_name_or_path, **kwargs)
        return original(cls, pretrained_model_name_or_path, **kwargs)

    from_pretrained._onereward = True
    plain.from_pretrained = classmethod(from_pretrained)


def _patch_diffusers(module):
    _wrap_classmethod(module.DiffusionPipeline, "_dict_from_json_file", _name_installed_pipeline)
    _pass_our_pipelines_on(module.DiffusionPipeline)


def _register_reward_model(config_and_kwargs):
    if config_and_kwargs[0].get("model_type") == MODEL_TYPE:
        import onereward.rewards  # noqa: F401  (registers our classes with the Auto classes and `pipeline`)

        # names the pipeline's file in the repository, for those who have not got ours
        config_and_kwargs[0].pop("custom_pipelines", None)


# module -> what to do right after it has been executed
_PATCHES = {
    "diffusers.pipelines.pipeline_utils": _patch_diffusers,
    "transformers.configuration_utils": lambda module: _wrap_classmethod(
        module.PreTrainedConfig, "get_config_dict", _register_reward_model
    ),
}


class _PatchAfterImport:
    """Entry of `sys.meta_path` that finds nothing itself: the others find the module, it patches it once executed."""

    def __init__(self, patches):
        self.patches = dict(patches)

    def find_spec(self, name, path=None, target=None):
        if name not in self.patches:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None:
            execute = spec.loader.exec_module

            def execute_and_patch(module):
                execute(module)
                self.patches.pop(name)(module)
                if not self.patches:
                    sys.meta_path.remove(self)

            spec.loader.exec_module = execute_and_patch
        return spec


def install_import_hook():
    """Patch the two modules where they have been imported already, and the others when they are."""
    for name in [name for name in _PATCHES if name in sys.modules]:
        _PATCHES[name](sys.modules[name])
    missing = {name: patch for name, patch in _PATCHES.items() if name not in sys.modules}
    if missing:
        sys.meta_path.insert(0, _PatchAfterImport(missing))
