"""Training state on disk: written whole or not at all, checked before it is read, resumable to the bit.

    <out_dir>/step_0001000/
        config.json, model*.safetensors, tokenizer.json    what any model directory holds
        optimizer.pt       the optimizer's state (tensors only: read with weights_only=True)
        shard-*.safetensors   instead of these two, where --parallel=fsdp: each rank's share of weights and optimizer state,
                              by torch.distributed.checkpoint
        ranks.pt           per rank: random generators, and the metrics not yet logged
        state.json         step, tokens, flops, losses, config, data, W&B id, world size
        checksums.json     SHA-256 of every other file

What is saved is first copied to the host's memory; training goes on while it is written, as step_0001000.partial, flushed
to disk, then renamed: a plain name is a complete checkpoint. One that was damaged later is named and the one before it is
used. Either kind is resumed on any number of ranks, sharded or not.

    python checkpoint.py export STEP_DIR OUT_DIR     a model directory out of a saved step, as final_model is one
    python checkpoint.py merge LORA_DIR OUT_DIR      a plain model of what a run with --lora saved: step or final_model
    … --push_to_hub=user/name                        and it is uploaded
"""

import copy
import json
import re
import shutil
import sys
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import torch

import lora
import publish
from configurator import cli, configure
from errors import CheckpointError, ConfigError
from files import append_lines, flush, folder_written_whole, sha256, write_whole
from model import ModelConfig, Transformer
from parallel import of_all, rank
from tokenizer import TOKENIZER_FILES
from weights import INDEX, find_model, local_rows

NEEDED = {"config.json", "ranks.pt", "state.json"}  # and weights and optimizer state, whole or sharded
TRAINING = {"optimizer.pt", "ranks.pt", "state.json", "checksums.json"}  # what a model directory does not hold
STEP = re.compile(r"step_\d{7,}")
WRITER = ThreadPoolExecutor(1)  # what it has begun is finished before Python ends


# ---------------------------------------------------------------------------------------------------------------------
# Saving


def steps(run):
    """The complete checkpoints of a run directory, oldest first."""
    found = [p for p in Path(run).glob("step_*") if STEP.fullmatch(p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]))


def save(out_dir, state, model, optimizer, of_rank, tokenizer_dir, keep_last, lines=(), group=None):
    """Begin to write `<out_dir>/step_{state["step"]:07d}` as everything is now; every rank calls it.

    state: what state.json holds; its "val_loss" is that of this step, or None. of_rank: this rank's part of ranks.pt, a
    dict of tensors. lines: of metrics.jsonl, which go first: no checkpoint without the metrics up to it. group: a gloo
    group of its own where the model is sharded. When the step is there, all but the last `keep_last` and the best are
    dropped. Returns a future: the path, or CheckpointError with every earlier checkpoint untouched.
    """
    path, metrics = Path(out_dir) / f"step_{state['step']:07d}", Path(out_dir) / "metrics.jsonl"
    partial = path.with_name(path.name + ".partial")
    begun, problem = ExitStack(), None
    if rank() == 0:
        try:
            if lines:
                append_lines(metrics, lines)
            if metrics.exists():
                flush(metrics)
            begun.enter_context(folder_written_whole(path))  # unless it is finished, it vanishes with `begun`
            if group is not None:
                model.save_config(partial)
        except (CheckpointError, OSError) as e:
            problem = str(e)
    parts, problems = zip(*of_all((of_rank, problem)), strict=True)
    if problems[0]:
        future = Future()
        future.set_exception(CheckpointError(problems[0]))
        return future
    if group is not None:
        write = sharded_writer(partial, model, optimizer, group)
    else:
        write = whole_writer(partial, model, optimizer)

    def finish():
        with begun:  # on the other ranks there is nothing to finish
            write()
            if rank() == 0:
                copy_tokenizer(tokenizer_dir, partial)
                torch.save(list(parts), partial / "ranks.pt")
                write_whole(partial / "state.json", state)
                sums = {file.name: sha256(file) for file in sorted(partial.iterdir())}
                write_whole(partial / "checksums.json", sums)
        if rank() == 0:
            drop_old(out_dir, keep_last)
        return path

    return WRITER.submit(finish)


def whole_writer(partial, model, optimizer):
    """Copies everything to the host's memory; returns the function that writes the copies. Only the main rank writes."""
    if rank() > 0:
        return lambda: None
    then = copy.copy(model)  # its configuration may change while it is written
    weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.own_state().items()}
    stored = optimizer.state_dict()
    for i, entries in stored["state"].items():
        stored["state"][i] = {k: v.to("cpu", copy=True) if torch.is_tensor(v) else v for k, v in entries.items()}

    def write():
        then.save_pretrained(partial, weights)
        torch.save(stored, partial / "optimizer.pt")

    return write


def sharded_writer(partial, model, optimizer, group):
    """The same where each rank holds, and writes, its own part."""
    import torch.distributed.checkpoint as dcp

    storage = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
    writing = dcp.async_save(named_state(model, optimizer), storage_writer=storage, process_group=group)

    def write():
        try:
            writing.result()
        except dcp.CheckpointException as e:  # a BaseException that holds those of all ranks
            path, reason = partial.with_suffix(""), next(iter(e.failures.values()))[0]
            raise CheckpointError(f"cannot write {path}: {reason}") from e

    return write


def copy_tokenizer(tokenizer_dir, directory):
    for name in TOKENIZER_FILES:
        if (Path(tokenizer_dir) / name).exists():
            shutil.copyfile(Path(tokenizer_dir) / name, Path(directory) / name)


def drop_old(out_dir, keep_last):
    """Delete all checkpoints but the last `keep_last` and the one with the best validation loss."""
    losses = {}
    for step in steps(out_dir):
        try:
            losses[step] = read_state(step).get("val_loss")
        except CheckpointError:
            losses[step] = None
    best = min((step for step in losses if losses[step] is not None), key=losses.get, default=None)
    for step in list(losses)[:-keep_last]:
        if step != best:
            shutil.rmtree(step, ignore_errors=True)


# ---------------------------------------------------------------------------------------------------------------------
# Sharded checkpoints, by torch.distributed.checkpoint


def named_state(model, optimizer):
    """The tensors of a sharded checkpoint: weights under their names, the optimizer's under exp_avg/<name> and so on."""
    tensors = dict(model.state_dict())
    for name, p in model.named_parameters():
        tensors |= {f"{key}/{name}": tensor for key, tensor in optimizer.state.get(p, {}).items()}
    return tensors


def is_sharded(path):
    return any(Path(path).glob("shard-*.safetensors"))


def stored_entries(path):
    """{name: its size and type} of the tensors of a sharded checkpoint."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    return HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata


def read_shards(path, tensors):
    """Fill `tensors`, by name, from a sharded checkpoint: whole ones, or a rank's rows of sharded ones."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)


# ---------------------------------------------------------------------------------------------------------------------
# Going on from a checkpoint


def load_model(path, shard=None, **config_overrides):
    """The model of a checkpoint; `shard` as in Transformer.from_pretrained."""
    if not is_sharded(path):
        return Transformer.from_pretrained(path, shard=shard, **config_overrides)
    config = json.loads((Path(path) / "config.json").read_text())
    model = empty_model(ModelConfig.from_dict(config, **config_overrides), shard)
    read_shards(path, model.state_dict())
    return model


def empty_model(config, shard=None):
    """A model whose weights are yet to be drawn or read."""
    with torch.device("meta"):
        model = Transformer(config)
    if shard is None:
        model.to_empty(device="cpu")
    else:
        shard(model)
    return model


def load_optimizer(path, model, optimizer):
    """Fill an optimizer's state from a checkpoint of the same parameters; rates and decay stay what they are.

    Which entries a parameter's state has, the checkpoint says: those that the optimizer kept when it was written.
    """
    if is_sharded(path):
        parameters, places = dict(model.named_parameters()), {}
        for key, entry in stored_entries(path).items():
            kind, _, name = key.partition("/")  # exp_avg/<name>; a weight's key is its name alone
            if name:
                p = parameters[name]
                places[key] = optimizer.state[p][kind] = empty_state(p, entry.size, entry.properties.dtype)
        read_shards(path, places)
        return
    # memory-mapped: a rank reads its rows
    stored = torch.load(Path(path) / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)["state"]
    for i, p in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        for kind, value in stored.get(i, {}).items():
            if torch.is_tensor(value):
                place = empty_state(p, value.shape, value.dtype)
                local, rows = local_rows(place)
                local.copy_(value if rows is None else value[rows])
                value = place
            optimizer.state[p][kind] = value


def empty_state(p, size, dtype) -> torch.Tensor:
    """Room for an entry of p's state: of p's own shape, and then divided as it is, or a number beside it."""
    if size == p.shape:
        return torch.zeros_like(p, dtype=dtype, requires_grad=False)
    return torch.zeros(size, dtype=dtype, device=p.device)


def read_state(path):
    """state.json of a checkpoint. Raises CheckpointError where it cannot be read."""
    try:
        return json.loads((Path(path) / "state.json").read_text())
    except (OSError, ValueError) as e:
        raise CheckpointError(f"checkpoint {path} is damaged: state.json: {e}") from e


def verify(path):
    """Raise CheckpointError that names the first file of a checkpoint which is missing or not as it was written."""
    try:
        sums = json.loads((Path(path) / "checksums.json").read_text())
    except (OSError, ValueError):
        sums = None
    if not isinstance(sums, dict) or not all(Path(name).name == name for name in sums):
        raise CheckpointError(f"checkpoint {path} is damaged: checksums.json is missing or unreadable")
    whole = {"optimizer.pt"} if not any(name.startswith("shard-") for name in sums) else set()
    for name in sorted(NEEDED | whole | set(sums)):
        try:
            intact = sha256(Path(path) / name) == sums.get(name)
        except OSError:
            intact = False
        if not intact:
            raise CheckpointError(f"checkpoint {path} is damaged: {name} is missing or altered")


def find(resume, out_dir, warn=print):
    """The checkpoint that a run starts from, or None for a new run.

    resume="none": a new run, refused where `out_dir` already holds one. "auto": the newest intact step of `out_dir`,
    None where there is none yet. A path: that step, or the newest intact one of that run directory. Damaged steps that
    were passed over are reported through `warn`. Raises CheckpointError.
    """
    out_dir, path = Path(out_dir), Path(resume)
    if resume == "none":
        metrics = out_dir / "metrics.jsonl"
        if steps(out_dir) or (out_dir / "final_model").exists() or (metrics.exists() and metrics.stat().st_size):
            raise CheckpointError(
                f"out_dir {out_dir} already holds a run: --resume=auto continues it, another --out_dir starts a new one"
            )
        return None
    if resume != "auto" and (STEP.fullmatch(path.name) or (path / "state.json").exists()):
        if not path.is_dir():
            raise CheckpointError(f"resume={resume}: no such checkpoint; auto, none, a step or a run directory")
        verify(path)
        return path
    run = out_dir if resume == "auto" else path
    for step in reversed(steps(run)):
        try:
            verify(step)
            return step
        except CheckpointError as e:
            warn(f"warning: {e}; trying the one before it")
    if steps(run):
        raise CheckpointError(f"no checkpoint of {run} is intact: start again with another --out_dir")
    if resume == "auto" and (run / "final_model").exists():
        raise CheckpointError(
            f"out_dir {run} holds a finished model but no checkpoint to go on from: another --out_dir"
        )
    if resume != "auto":
        raise CheckpointError(f"resume={resume} holds no checkpoint (step_*); auto, none, a step or a run directory")
    return None


def rewind(out_dir, step, complete):
    """Make a run directory what it was at `step` (-1: before the first), so that two histories never mix.

    Later checkpoints are renamed to .abandoned, and so is final_model unless the run is complete at this step; what a
    crash left half-written is deleted, and metrics.jsonl is cut.
    """
    out_dir = Path(out_dir)
    for partial in out_dir.glob("*.partial"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    later = [path for path in steps(out_dir) if int(path.name[5:]) > step]
    final = out_dir / "final_model"
    if final.exists() and (later or not complete):
        later.append(final)
    for path in later:
        aside = path.with_name(path.name + ".abandoned")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    metrics, kept = out_dir / "metrics.jsonl", []
    for line in metrics.read_text(errors="replace").splitlines() if metrics.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # torn by a crash
            break
    write_whole(metrics, "".join(kept))


# ---------------------------------------------------------------------------------------------------------------------
# A model directory out of a step


def export(step_dir, out_dir, model=None, shard_size=5 * 10**9):
    """The model directory of a checkpoint: weights, config, tokenizer, the ids that end a text, a card, a routed one's code.

    model: written instead of the checkpoint's own weights. shard_size: bytes of a file, where the checkpoint is sharded.
    Raises CheckpointError.
    """
    step_dir = Path(step_dir)
    with folder_written_whole(out_dir) as partial:
        if model is not None:
            model.save_pretrained(partial)
            copy_tokenizer(step_dir, partial)
        elif is_sharded(step_dir):
            gather(step_dir, partial, shard_size)
        else:
            for file in step_dir.iterdir():
                if file.name not in TRAINING:
                    shutil.copyfile(file, partial / file.name)
        publish.write_code(partial)
        if not (step_dir / "state.json").exists():  # a final_model, which says already where it comes from
            for name in ("README.md", "generation_config.json"):
                if (step_dir / name).exists():  # save_pretrained alone writes neither
                    shutil.copyfile(step_dir / name, partial / name)
            return
        try:
            publish.describe(partial, read_state(step_dir))
        except (KeyError, TypeError) as e:
            raise CheckpointError(f"{step_dir}: state.json was written by another version of train.py: {e}") from e


def merged(directory) -> Transformer:
    """The plain model of what a run with --lora saved, in float32. Raises ConfigError where there is no adapter."""
    model = Transformer.from_pretrained(directory)
    if not model.lora_rank:
        raise ConfigError(f"{directory} is a plain model already: only what a run with --lora saved can be merged")
    lora.merge(model)
    return model


def gather(step_dir, directory, shard_size):
    """The model directory of a sharded checkpoint; one file of it is in memory at a time."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file

    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in stored_entries(step_dir).items()
        if "/" not in name  # the optimizer's state
    }
    split = split_torch_state_dict_into_shards(weights, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: torch.empty_like(weights[name], device="cpu") for name in names}
        read_shards(step_dir, tensors)
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_whole(directory / INDEX, index)
    shutil.copyfile(Path(step_dir) / "config.json", directory / "config.json")
    copy_tokenizer(step_dir, directory)


@dataclass
class ExportConfig:
    command: list[str] = field(default_factory=list)  # export STEP_DIR OUT_DIR, or merge LORA_DIR OUT_DIR
    push_to_hub: str = ""  # user/name: upload OUT_DIR to the hub (a new repository is private)


def main(argv):
    (settings,) = configure(__doc__, argv, ExportConfig, positional="command")
    cfg = ExportConfig(**settings)
    if len(cfg.command) != 3 or cfg.command[0] not in ("export", "merge"):
        usage = "usage is python checkpoint.py export STEP_DIR OUT_DIR, or merge"
        raise ConfigError(f"{' '.join(argv) or 'no command'}: {usage}")
    what, step_dir, out_dir = cfg.command[0], *map(Path, cfg.command[1:])
    if out_dir.exists():
        raise ConfigError(f"{out_dir} already exists: {what} writes a new directory")
    merged_model = None
    if what == "export" and not (step_dir / "state.json").exists():
        inside = steps(step_dir)
        cure = f"name one, such as {inside[-1]}" if inside else "train.py writes them, as step_*"
        raise ConfigError(f"{step_dir} is no saved step: {cure}")
    if what == "merge":
        step_dir = Path(find_model(str(step_dir)))
    if (step_dir / "checksums.json").exists() or what == "export":
        verify(step_dir)
    if what == "merge":
        merged_model = merged(step_dir)
    if cfg.push_to_hub:
        publish.reserve(cfg.push_to_hub)
    export(step_dir, out_dir, merged_model)
    architecture = json.loads((out_dir / "config.json").read_text())["architecture"]
    print(f"{out_dir}: {architecture}, from {step_dir}", file=sys.stderr)
    if cfg.push_to_hub:
        print(f"uploaded: {publish.push(out_dir, cfg.push_to_hub)}", file=sys.stderr)


if __name__ == "__main__":
    cli(main)
