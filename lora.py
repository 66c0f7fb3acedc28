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
model.py uses this file where a model or a directory has an adapter, and imports it only then.
"""

import hashlib
import json
import os

import torch

from model import Transformer, is_routed_part
from weights import ModelError, find_model, replacing, weight_paths

TARGETS = r".*\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"  # not the *_proj of priors and transition networks
CONFIG, ADAPTER, ROUTED = "adapter_config.json", "adapter_model.safetensors", "routed.safetensors"


def digest(directory: str) -> str:
    """SHA-256 over the weights of a model directory."""
    whole = hashlib.sha256()
    for path in weight_paths(directory):
        with open(path, "rb") as f:
            whole.update(hashlib.file_digest(f, "sha256").digest())
    return whole.hexdigest()


def inject(model: Transformer, r: int, alpha: float, dropout: float, base: str):
    """Puts new adapters into a model that was opened from `base` (a directory or a hub id) and freezes everything else but
    the routed parts. B starts as zero: the model computes what it did. Raises ModelError without peft.
    """
    name, _, revision = (base, "", "") if os.path.isdir(base) else base.partition("@")
    adapt(model, r=r, lora_alpha=alpha, lora_dropout=dropout, base_model_name_or_path=name, revision=revision or None)
    model.base_digest = digest(find_model(base))


def adapt(model: Transformer, **settings):
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ModelError("LoRA needs the package: pip install peft") from None
    inject_adapter_in_model(LoraConfig(target_modules=TARGETS, **settings), model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".lora_" in name or is_routed_part(name))


def own_state(model: Transformer) -> dict[str, torch.Tensor]:
    """What a directory of `model` holds, by the model's own names: adapters and routed parts, without the frozen base."""
    return {name: t for name, t in model.state_dict().items() if ".lora_" in name or is_routed_part(name)}


def file_name(name: str) -> str:
    """The name that peft gives a tensor of an adapter in a file."""
    return "base_model.model." + name.replace(".default.", ".")


def save(model: Transformer, directory: str, state: dict[str, torch.Tensor]):
    """Writes the adapter and the routed tensors of `state`, which is what own_state gave."""
    from safetensors.torch import save_file

    files = {ADAPTER: {}, ROUTED: {}}
    for name, tensor in state.items():
        file, name = (ADAPTER, file_name(name)) if ".lora_" in name else (ROUTED, name)
        files[file][name] = tensor.detach().contiguous()
    for file, tensors in files.items():
        if tensors:
            with replacing(os.path.join(directory, file)) as temporary:
                save_file(tensors, temporary, metadata={"base_sha256": model.base_digest})
    with replacing(os.path.join(directory, CONFIG)) as temporary, open(temporary, "w") as f:
        json.dump(model.peft_config["default"].to_dict() | {"inference_mode": True}, f, indent=2)


def load(directory: str, config: dict, dtype: torch.dtype) -> Transformer:
    """The model of a directory that `save` wrote: its base, opened with the fields `config`, and what was trained on it.

    Raises ModelError where the base cannot be found or has changed, or a tensor is missing, unknown or of another shape.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with open(os.path.join(directory, CONFIG), encoding="utf-8") as f:
            settings = json.load(f)
        keys = ("r", "lora_alpha", "lora_dropout", "base_model_name_or_path", "revision")
        settings, targets = {key: settings[key] for key in keys}, settings["target_modules"]
        name, revision = settings["base_model_name_or_path"], settings["revision"]
        base = f"{name}@{revision}" if revision else name
    except (ValueError, KeyError, TypeError):
        targets = None
    if targets != TARGETS:
        raise ModelError(f"{directory}: {CONFIG} is not one that this program wrote: merge the adapter with peft first")
    try:
        model = Transformer.from_pretrained(base, dtype=dtype, **config)
    except ModelError as error:
        raise ModelError(f"{directory} holds an adapter, not its base: {error}") from None
    initialized = model.initialized
    adapt(model, **settings)

    state = own_state(model)
    expected = {file_name(name) if ".lora_" in name else name: tensor for name, tensor in state.items()}
    for file in (ADAPTER, ROUTED) if any(is_routed_part(name) for name in state) else (ADAPTER,):
        path = os.path.join(directory, file)
        try:
            with safe_open(path, framework="pt") as f, torch.no_grad():
                model.base_digest = (f.metadata() or {}).get("base_sha256")
                for name in f.keys():  # noqa: SIM118 (no dict)
                    tensor, place = f.get_tensor(name), expected.pop(name, None)
                    if place is None or place.shape != tensor.shape:
                        raise ModelError(f"{path}: {name} {tuple(tensor.shape)} has no place in this model")
                    place.copy_(tensor)
        except FileNotFoundError:
            raise ModelError(f"{path} is missing") from None
        except SafetensorError as error:
            raise ModelError(f"{path} is damaged: {error}") from None
    if expected:
        raise ModelError(f"{directory}: missing tensors {', '.join(sorted(expected)[:5])}" + " …" * (len(expected) > 5))
    if digest(find_model(base)) != model.base_digest:
        raise ModelError(f"{directory}: the weights of {base} are not those that this adapter was trained on")
    model.initialized = sorted(set(initialized) - set(state))
    model.loaded = sorted(set(model.loaded) | set(state))
    return model.eval()


def merge(model: Transformer):
    """Makes it a plain model: adapters are added to the weights in float32 (in bfloat16 their small changes would drown)."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.float()
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge(safe_merge=True)
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config, model.base_digest
