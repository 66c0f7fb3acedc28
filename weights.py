"""Model directories: safetensors in and out, single files or several, local or from the hub. This file knows no model.

Nothing in a directory is executed, and no path from an index leaves it.
"""

import json
import os
import re
from functools import partial

import torch

from errors import ModelError

INDEX = "model.safetensors.index.json"  # which file holds which tensor of a model in several


def find_model(name: str) -> str:
    """A directory, or the local snapshot of a hub id: "user/name" or "user/name@revision". Raises ModelError for neither."""
    if os.path.isdir(name):
        if not os.path.exists(os.path.join(name, "config.json")):
            raise ModelError(f"{name} holds no config.json: name a directory that a model was saved in")
        return name
    hub_id, _, revision = name.partition("@")
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/")):
        raise ModelError(f"{name} is neither a directory nor a hub id like Qwen/Qwen2.5-0.5B or user/name@revision")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(hub_id, revision=revision or None, allow_patterns=["*.json", "*.safetensors"])
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(f"cannot fetch {name} from the hub: {reason}") from None


def weight_paths(directory: str) -> list[str]:
    """The safetensors files of a model directory, in order. Raises ModelError where there are none."""
    index = os.path.join(directory, INDEX)
    if os.path.exists(index):
        try:
            with open(index, encoding="utf-8") as f:
                shards = sorted(set(json.load(f)["weight_map"].values()))
            escaping = [shard for shard in shards if os.path.basename(shard) != shard]
        except (ValueError, KeyError, TypeError, AttributeError):
            raise ModelError(f"{index} is not an index of safetensors files") from None
        if escaping:
            raise ModelError(f"{index} points outside its directory: {escaping[0]}")
    elif os.path.exists(os.path.join(directory, "model.safetensors")):
        shards = ["model.safetensors"]
    else:
        if any(name.startswith("shard-") for name in os.listdir(directory)):
            raise ModelError(f"{directory} is a sharded checkpoint: python checkpoint.py export makes a model of it")
        pickles = [name for name in sorted(os.listdir(directory)) if name.endswith((".bin", ".pt", ".pth"))]
        found = f" but pickled weights ({pickles[0]})" if pickles else ""
        raise ModelError(f"{directory} holds no model.safetensors{found}: convert the model to safetensors first")
    return [os.path.join(directory, shard) for shard in shards]


def weight_files(directory: str):
    """Yields every tensor of a safetensors checkpoint, single or sharded: its name, shape, and a function that reads it.

    The function takes the rows to read, a slice; None for all. It opens the file anew: what a file has once mapped would
    stay in this process's memory, the checkpoint a second time. Raises ModelError for files that are missing, damaged or
    no safetensors.
    """
    from safetensors import SafetensorError, safe_open

    for path in weight_paths(directory):

        def read(name, rows, path=path):
            with safe_open(path, framework="pt") as f:
                return f.get_tensor(name) if rows is None else f.get_slice(name)[rows]

        try:
            with safe_open(path, framework="pt") as f:
                shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 (no dict)
        except FileNotFoundError:
            raise ModelError(f"{path} is missing, though {INDEX} names it") from None
        except SafetensorError as error:
            raise ModelError(f"{path} is damaged: {error}") from None
        for name, shape in shapes.items():
            yield name, shape, partial(read, name)


def local_rows(tensor: torch.Tensor) -> tuple[torch.Tensor, slice | None]:
    """What this rank holds of a tensor, and which rows of the whole these are: None for all, unless FSDP sharded it."""
    if not hasattr(tensor, "to_local"):
        return tensor, None
    n, mesh = tensor.size(0), tensor.device_mesh
    each = -(-n // mesh.size())  # the last ranks may hold fewer, or none
    first = min(n, each * mesh.get_local_rank())
    return tensor.to_local(), slice(first, min(n, first + each))


def write_weights(directory: str, tensors: dict[str, torch.Tensor], shard_size: int):
    """model.safetensors, or several files and their index where it would pass shard_size bytes; earlier weights go."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    split = split_torch_state_dict_into_shards(tensors, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        with replacing(os.path.join(directory, file)) as temporary:
            save_file({name: tensors[name] for name in names}, temporary, metadata={"format": "pt"})
    written = set(split.filename_to_tensors)
    if split.is_sharded:
        written.add(INDEX)
        with replacing(os.path.join(directory, INDEX)) as temporary, open(temporary, "w") as f:
            json.dump({"metadata": split.metadata, "weight_map": split.tensor_to_filename}, f, indent=2)
    for name in sorted(os.listdir(directory), reverse=True):  # the index before the files that it names
        if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name) and name not in written:
            os.remove(os.path.join(directory, name))


class replacing:
    """`with replacing(path) as temporary:` the file written under the temporary name takes its place when complete."""

    def __init__(self, path: str):
        self.path, self.temporary = path, f"{path}.partial"

    def __enter__(self) -> str:
        return self.temporary

    def __exit__(self, kind, value, traceback):
        if kind is None:
            with open(self.temporary, "rb") as f:
                os.fsync(f.fileno())
            os.replace(self.temporary, self.path)
        elif os.path.exists(self.temporary):
            os.remove(self.temporary)
