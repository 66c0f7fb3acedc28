"""LoRA (Hu et al. 2021, arXiv 2106.09685) through peft: pretrained weights stay as they are, small matrices beside them learn.

    model = Transformer.from_pretrained("Qwen/Qwen2.5-0.5B", architecture="dtf")
    inject(model, r=16, alpha=32, dropout=0.05, base="Qwen/Qwen2.5-0.5B")     # what train.py --lora does
    model.save_pretrained(directory)                                          # adapter and routed tensors, no base
    model = Transformer.from_pretrained(directory)                            # the base again, with these on it
    merge(model)                                                              # a plain model with the same logits

    directory/
        adapter_config.json, adapter_model.safetensors     as peft writes them: it opens them on the base itself
        routed.safetensors     routers, priors, transition networks, trained whole (not for a dense model)
        config.json            the model's, base included

Every linear layer of attention and MLP of every block gets y = W x + alpha / r · B A dropout(x), A (r, in), B (out, r).
This file knows no class of model: it asks one for its tensors' rate groups.
"""

import hashlib
import json
import os
from contextlib import suppress

import torch

from errors import ModelError
from files import replacing, sha256, write_whole
from weights import fill, find_model, open_tensors, refuse_missing, weight_paths

TARGETS = r".*\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"  # not the *_proj of what routing adds
CONFIG, ADAPTER, ROUTED = "adapter_config.json", "adapter_model.safetensors", "routed.safetensors"


def is_adapter(directory: str) -> bool:
    return os.path.exists(os.path.join(directory, CONFIG))


def weights_digest(directory: str) -> str:
    """SHA-256 over the digests of all weight files of a model directory."""
    digests = b"".join(bytes.fromhex(sha256(path)) for path in weight_paths(directory))
    return hashlib.sha256(digests).hexdigest()


def inject(model, r: int, alpha: float, dropout: float, base: str, keep_layers: list[int] | None = None):
    """Puts new adapters into a model that was opened from `base` (a directory or a hub id), of which keep_layers are left
    (unset: all), and freezes everything else but the routed parts. B starts as zero: the model computes what it did. Raises
    ModelError without peft.
    """
    name, _, revision = (base, "", "") if os.path.isdir(base) else base.partition("@")
    adapt(model, r=r, lora_alpha=alpha, lora_dropout=dropout, base_model_name_or_path=name, revision=revision or None)
    model.base_digest, model.kept_of_base = weights_digest(find_model(base)), keep_layers


def adapt(model, **settings):
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ModelError("LoRA needs the package: pip install peft") from None
    scheduled = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
    inject_adapter_in_model(LoraConfig(target_modules=TARGETS, **settings), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(model, name) and name not in scheduled)


def lower(model, dtype: torch.dtype):
    """Puts the frozen weights beside adapters into the format of products, half of their memory: as autocast, which keeps no
    copy of what is frozen, would in each micro-step. Not to be merged then: `merge` wants them as they were.
    """
    for layer in model.modules():
        if hasattr(layer, "get_base_layer"):
            layer.get_base_layer().to(dtype)


def is_trained(model, name: str) -> bool:
    return model.rate_group(name) != "base"


def own_state(model) -> dict[str, torch.Tensor]:
    """What a directory of `model` holds, by the model's own names: adapters and routed parts, without the frozen base."""
    return {name: tensor for name, tensor in model.state_dict().items() if is_trained(model, name)}


def file_and_name(name: str) -> tuple[str, str]:
    """The file that holds a tensor, and the name that it has there: of an adapter's, the one that peft gives it."""
    if ".lora_" not in name:
        return ROUTED, name
    return ADAPTER, "base_model.model." + name.replace(".default.", ".")


def save(model, directory: str, state: dict[str, torch.Tensor]):
    """Writes the adapter and the routed tensors of `state`, which is what own_state gave."""
    from safetensors.torch import save_file

    files = {ADAPTER: {}, ROUTED: {}}
    for name, tensor in state.items():
        file, stored_name = file_and_name(name)
        files[file][stored_name] = tensor
    for file, tensors in files.items():
        if tensors:
            with replacing(os.path.join(directory, file)) as temporary:
                save_file(tensors, temporary, metadata={"base_sha256": model.base_digest})
    settings = model.peft_config["default"].to_dict() | {"inference_mode": True}
    if model.kept_of_base:
        settings["keep_layers"] = model.kept_of_base
    write_whole(os.path.join(directory, CONFIG), settings)


def remove(directory: str):
    """Takes away what `save` has written there, the settings first: a plain model has taken its place."""
    for name in (CONFIG, ADAPTER, ROUTED):
        with suppress(FileNotFoundError):
            os.remove(os.path.join(directory, name))


def read_settings(directory: str) -> tuple[dict, str, list[int] | None]:
    """peft's settings of an adapter that `save` wrote, the base it belongs to, and its layers that are left (None: all).

    Raises ModelError.
    """
    keys = ("r", "lora_alpha", "lora_dropout", "base_model_name_or_path", "revision")
    try:
        with open(os.path.join(directory, CONFIG), encoding="utf-8") as f:
            stored = json.load(f)
        settings, targets = {key: stored[key] for key in keys}, stored["target_modules"]
        name, revision = stored["base_model_name_or_path"], stored["revision"]
        base = f"{name}@{revision}" if revision else f"{name}"
    except (ValueError, KeyError, TypeError):
        targets = None
    if targets != TARGETS:
        raise ModelError(f"{directory}: {CONFIG} is not one that this program wrote: merge the adapter with peft first")
    return settings, base, stored.get("keep_layers")


def load(directory: str, open_base):
    """The model of a directory that `save` wrote: its base, as open_base(name, keep_layers) gives it, and what was trained
    on it.

    Raises ModelError where the base cannot be found or has changed, or a tensor is missing, unknown or of another shape.
    """
    from safetensors import safe_open

    settings, base, keep_layers = read_settings(directory)
    if os.path.isdir(base) and is_adapter(find_model(base)):
        raise ModelError(f"{directory}: its base {base} is an adapter too: merge that one first, or name a plain model")
    try:
        model = open_base(base, keep_layers)
    except ModelError as error:
        raise ModelError(f"{directory} holds an adapter, not its base: {error}") from None
    initialized, model.kept_of_base = model.initialized, keep_layers
    adapt(model, **settings)
    state = own_state(model)
    files = {}  # {file: {the name there: tensor}}
    for name, tensor in state.items():
        file, stored_name = file_and_name(name)
        files.setdefault(os.path.join(directory, file), {})[stored_name] = tensor
    for path, places in files.items():
        readers = open_tensors(path, [path], {name: tuple(tensor.shape) for name, tensor in places.items()})
        refuse_missing(directory, places.keys() - readers.keys())
        fill(places, readers)
        with safe_open(path, framework="pt") as f:
            model.base_digest = (f.metadata() or {}).get("base_sha256")
    if weights_digest(find_model(base)) != model.base_digest:
        raise ModelError(f"{directory}: the weights of {base} are not those that this adapter was trained on")
    model.initialized = sorted(set(initialized) - set(state))
    model.loaded = sorted(set(model.loaded) | set(state))
    return model.eval()


def merge(model):
    """Makes it a plain model: adapters are added to the weights in float32 (in bfloat16 their small changes would drown)."""
    model.float()
    for name, layer in list(model.named_modules()):
        if hasattr(layer, "get_base_layer"):  # peft's; not imported, or whoever opens a copy of this file needs it
            layer.merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer())
    scheduled = {name for name, p in model.named_parameters() if not p.requires_grad and is_trained(model, name)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in scheduled)
    del model.peft_config, model.base_digest, model.kept_of_base
