"""Model directories: safetensors in and out, single files or several, local or from the hub. This file knows no model.

Nothing in a directory is executed, and no path from an index leaves it.
"""

import json
import math
import os
import re
from functools import partial

import torch

from errors import ModelError, first_line
from files import replacing, write_whole

INDEX = "model.safetensors.index.json"  # which file holds which tensor of a model in several


def find_model(name: str) -> str:
    """A model directory, a run's final_model, or the local snapshot of a hub id: "user/name" or "user/name@revision".

    Raises ModelError for none of them.
    """
    if os.path.isdir(name):
        for directory in (name, os.path.join(name, "final_model")):
            if os.path.exists(os.path.join(directory, "config.json")):
                return directory
        raise ModelError(f"{name} holds no config.json: name a directory that a model was saved in")
    hub_id, _, revision = name.partition("@")
    if hub_id.count("/") != 1 or hub_id.startswith((".", "/")):
        raise ModelError(f"{name} is neither a directory nor a hub id like Qwen/Qwen2.5-0.5B or user/name@revision")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(
            hub_id, revision=revision or None, allow_patterns=["*.json", "*.safetensors", "*.jinja"]
        )
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot fetch {name} from the hub: {first_line(error)}") from None


def weight_paths(directory: str) -> list[str]:
    """The safetensors files of a model directory, in order. Raises ModelError where there are none."""
    index = os.path.join(directory, INDEX)
    if os.path.exists(index):
        try:
            with open(index, encoding="utf-8") as f:
                shards = sorted(set(json.load(f)["weight_map"].values()))
            escaping = [shard for shard in shards if os.path.basename(shard) != shard or shard in (".", "..")]
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


def stored_tensors(path: str):
    """Yields every tensor of a safetensors file: its name, shape, and a function that reads it.

    The function takes the rows to read, a slice; None for all. It opens the file anew: what a file has once mapped would
    stay in this process's memory, the checkpoint a second time. Raises ModelError for a file that is missing or damaged.
    """
    from safetensors import SafetensorError, safe_open

    def read(name, rows):
        with safe_open(path, framework="pt") as f:
            return f.get_tensor(name) if rows is None else f.get_slice(name)[rows]

    try:
        with safe_open(path, framework="pt") as f:
            shapes = {name: tuple(f.get_slice(name).get_shape()) for name in f.keys()}  # noqa: SIM118 (no dict)
    except FileNotFoundError:
        indexed = os.path.exists(os.path.join(os.path.dirname(path), INDEX))
        raise ModelError(f"{path} is missing" + f", though {INDEX} names it" * indexed) from None
    except SafetensorError as error:
        raise ModelError(f"{path} is damaged: {error}") from None
    for name, shape in shapes.items():
        yield name, shape, partial(read, name)


def open_tensors(directory: str, paths: list[str], expected: dict[str, tuple], rename=lambda name: name) -> dict:
    """{name: the function that reads it} of all tensors in safetensors files.

    expected: {name: shape} of those that have a place. rename: a stored name → the name here, or None to leave it out.
    Raises ModelError for a tensor that has no place, or another shape.
    """
    readers = {}
    for path in paths:
        for stored_name, shape, read in stored_tensors(path):
            name = rename(stored_name)
            if name is None:
                continue
            if name not in expected:
                raise ModelError(f"{directory}: unknown tensor {name}, which has no place in this model")
            if shape != expected[name]:
                raise ModelError(f"{directory}: {name} has shape {shape}, {expected[name]} is expected")
            if name in readers:
                raise ModelError(f"{directory}: tensor {name} is in two files")
            readers[name] = read
    return readers


def refuse_missing(directory: str, names):
    """Raises ModelError that names the first of `names`, tensors that no file holds."""
    if names:
        raise ModelError(f"{directory}: missing tensors {', '.join(sorted(names)[:5])}" + " …" * (len(names) > 5))


@torch.no_grad()
def fill(places: dict[str, torch.Tensor], readers: dict):
    """Reads each tensor into its place, this rank's rows of it, 16 MB at a time."""
    for name, read in readers.items():
        local, rows = local_rows(places[name])
        if local.ndim == 0:
            local.copy_(read(None))
            continue
        first, piece = rows.start if rows else 0, max(1, 2**22 // math.prod(local.shape[1:]))
        for start in range(0, local.size(0), piece):
            part = local[start : start + piece]
            part.copy_(read(slice(first + start, first + start + part.size(0))))


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
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_whole(os.path.join(directory, INDEX), index)
    for name in sorted(os.listdir(directory), reverse=True):  # the index before the files that it names
        if re.fullmatch(r"model(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name) and name not in written:
            os.remove(os.path.join(directory, name))
