"""Training state on disk: written whole or not at all, checked before it is read, resumable to the bit.

    <out_dir>/step_0001000/
        config.json, model*.safetensors, tokenizer.json    what any model directory holds
        optimizer.pt       AdamW's state (tensors only: read with weights_only=True)
        shard-*.safetensors   instead of these two, where --parallel=fsdp: each rank's share of weights and AdamW's state,
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
import hashlib
import json
import os
import re
import shutil
import sys
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError

import lora
import publish
from configurator import ConfigError, cli, configure
from errors import CheckpointError
from model import ModelConfig, Transformer
from weights import INDEX, local_rows

NEEDED = {"config.json", "ranks.pt", "state.json"}  # and weights and optimizer state, whole or sharded
TRAINING = {"optimizer.pt", "ranks.pt", "state.json", "checksums.json"}  # what a model directory does not hold
WRITER = ThreadPoolExecutor(1)  # what it has begun is finished before Python ends


def flush(path):
    """Force a file, or the names in a directory, to disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


@contextmanager
def written_whole(path):
    """Yield an empty directory that becomes `path` when the block ends, and vanishes when the block fails.

    Raises CheckpointError where the disk is full or the files cannot be written; `path` is then as it was.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        for file in [*partial.iterdir(), partial]:
            flush(file)
        if path.exists():
            shutil.rmtree(path)  # rename() replaces no directory that holds files
        partial.rename(path)
        flush(path.parent)
    except (OSError, RuntimeError, SafetensorError) as e:  # what os, torch.save and safetensors say to a full disk
        free = shutil.disk_usage(path.parent).free / 1e6  # torch does not say that it is the disk
        raise CheckpointError(f"cannot write {path}: {e} ({free:.1f} MB free)") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(model, directory, tokenizer_dir, state_dict=None):
    """A model directory: weights (or `state_dict`) and config from the model, the tokenizer from `tokenizer_dir`."""
    model.save_pretrained(directory, state_dict)
    copy_tokenizer(tokenizer_dir, directory)


def copy_tokenizer(tokenizer_dir, directory):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if (Path(tokenizer_dir) / name).exists():
            shutil.copyfile(Path(tokenizer_dir) / name, Path(directory) / name)


def digest(file):
    with open(file, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def steps(run):
    """The complete checkpoints of a run directory, oldest first."""
    found = [p for p in Path(run).glob("step_*") if re.fullmatch(r"step_\d{7,}", p.name)]
    return sorted(found, key=lambda p: int(p.name[5:]))


def save(out_dir, state, model, optimizer, mine, tokenizer_dir, keep_last, lines=(), group=None):
    """Begin to write `<out_dir>/step_{state["step"]:07d}` as everything is now; every rank calls it.

    state: what state.json holds; its "val_loss" is that of this step, or None. mine: this rank's part of ranks.pt, a dict
    of tensors. lines: of metrics.jsonl, which go first: no checkpoint without the metrics up to it. group: a gloo group
    of its own where the model is sharded. When the step is there, all but the last `keep_last` and the best are dropped.
    Returns a future: the path, or CheckpointError with every earlier checkpoint untouched.
    """
    path, partial = (Path(out_dir) / f"step_{state['step']:07d}{end}" for end in ("", ".partial"))
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    begun, problem, metrics = ExitStack(), None, Path(out_dir) / "metrics.jsonl"
    if rank == 0:
        try:
            if lines:
                append_lines(metrics, lines)
            if metrics.exists():
                flush(metrics)
            begun.enter_context(written_whole(path))
            if group is not None:
                model.save_config(partial)
        except (CheckpointError, OSError) as e:
            problem = str(e)
    ranks = [(mine, problem)] * world
    if world > 1:
        dist.all_gather_object(ranks, (mine, problem))
    if problem := ranks[0][1]:
        future = Future()
        future.set_exception(CheckpointError(problem))
        return future

    def finish(write):
        with begun:  # on the other ranks there is nothing to finish
            write()
            if rank == 0:
                torch.save([each for each, _ in ranks], partial / "ranks.pt")
                (partial / "state.json").write_text(json.dumps(state, indent=1))
                sums = {file.name: digest(file) for file in sorted(partial.iterdir())}
                (partial / "checksums.json").write_text(json.dumps(sums, indent=1))
        if rank == 0:
            drop_old(out_dir, keep_last)
        return path

    if group is not None:
        import torch.distributed.checkpoint as dcp

        writer = dcp.HuggingFaceStorageWriter(str(partial), save_distributed=True)
        tensors = named_state(model, optimizer)
        writing = dcp.async_save(tensors, storage_writer=writer, process_group=group)

        def write():
            try:
                writing.result()
            except dcp.CheckpointException as e:  # a BaseException that holds those of all ranks
                raise CheckpointError(f"cannot write {path}: {next(iter(e.failures.values()))[0]}") from e
            if rank == 0:
                copy_tokenizer(tokenizer_dir, partial)

    elif rank == 0:
        then = copy.copy(model)  # its configuration may change while it is written
        weights = {name: tensor.detach().to("cpu", copy=True) for name, tensor in model.own_state().items()}
        stored = optimizer.state_dict()
        for i, tensors in stored["state"].items():
            stored["state"][i] = {key: tensor.to("cpu", copy=True) for key, tensor in tensors.items()}

        def write():
            write_model(then, partial, tokenizer_dir, weights)
            torch.save(stored, partial / "optimizer.pt")

    else:
        write = int  # the main rank writes
    return WRITER.submit(finish, write)


def drop_old(out_dir, keep_last):
    """Delete all checkpoints but the last `keep_last` and the one with the best validation loss."""
    losses = {}
    for step in steps(out_dir):
        try:
            losses[step] = read_state(step)["val_loss"]
        except CheckpointError:
            losses[step] = None
    best = min((step for step in losses if losses[step] is not None), key=losses.get, default=None)
    for step in list(losses)[:-keep_last]:
        if step != best:
            shutil.rmtree(step, ignore_errors=True)


def named_state(model, optimizer):
    """The tensors of a sharded checkpoint: weights under their names, AdamW's state under exp_avg/<name> and so on."""
    tensors = dict(model.state_dict())
    for name, p in model.named_parameters():
        tensors |= {f"{key}/{name}": tensor for key, tensor in optimizer.state.get(p, {}).items()}
    return tensors


def is_sharded(path):
    return any(Path(path).glob("shard-*.safetensors"))


def read_shards(path, tensors):
    """Fill `tensors`, by name, from a sharded checkpoint: whole ones, or a rank's rows of sharded ones."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # each rank reads for itself
        dcp.load(tensors, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)


def load_model(path, shard=None, **config_overrides):
    """The model of a checkpoint; `shard` as in Transformer.from_pretrained."""
    if not is_sharded(path):
        return Transformer.from_pretrained(path, shard=shard, **config_overrides)
    with torch.device("meta"):
        config = json.loads((Path(path) / "config.json").read_text())
        model = Transformer(ModelConfig.from_dict(config, **config_overrides))
    if shard is None:
        model.to_empty(device="cpu")
    else:
        shard(model)
    read_shards(path, model.state_dict())
    return model


def load_optimizer(path, model, optimizer):
    """Fill AdamW's state from a checkpoint of the same parameters; rates and decay stay what they are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    names = {p: name for name, p in model.named_parameters()}
    if is_sharded(path):
        from torch.distributed.checkpoint import HuggingFaceStorageReader

        there = HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata
        there = [p for p in parameters if f"exp_avg/{names[p]}" in there]
    else:  # memory-mapped: a rank reads its rows
        stored = torch.load(Path(path) / "optimizer.pt", map_location="cpu", weights_only=True, mmap=True)["state"]
        there = [p for i, p in enumerate(parameters) if i in stored]
    for p in there:
        optimizer.state[p] = {"step": torch.zeros((), device=p.device)}
        optimizer.state[p] |= {key: torch.zeros_like(p, requires_grad=False) for key in ("exp_avg", "exp_avg_sq")}
    if is_sharded(path):
        read_shards(path, {f"{key}/{names[p]}": t for p in there for key, t in optimizer.state[p].items()})
        return
    for i, p in enumerate(parameters):
        for key, tensor in optimizer.state.get(p, {}).items():
            mine, rows = local_rows(tensor)
            mine.copy_(stored[i][key] if rows is None else stored[i][key][rows])


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
            intact = digest(Path(path) / name) == sums.get(name)
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
    if resume != "auto" and (path.name.startswith("step_") or (path / "state.json").exists()):
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
    for path in later + [final] * (final.exists() and bool(later or not complete)):
        aside = path.with_name(path.name + ".abandoned")
        shutil.rmtree(aside, ignore_errors=True)
        path.rename(aside)
    path, kept = out_dir / "metrics.jsonl", []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except ValueError:  # torn by a crash
            break
    partial = path.with_name("metrics.jsonl.partial")
    partial.write_text("".join(kept))
    flush(partial)
    partial.replace(path)


def append_lines(path, lines):
    """Append `lines` to a file and empty the list. On an OSError the file is as before and the list still full."""
    size = os.path.getsize(path)
    try:
        with open(path, "a") as f:
            f.writelines(lines)
    except OSError:
        os.truncate(path, size)
        raise
    lines.clear()


def export(step_dir, out_dir, model=None, shard_size=5 * 10**9):
    """The model directory of a checkpoint: weights, config, tokenizer, the ids that end a text, and a card.

    model: written instead of the checkpoint's own weights. shard_size: bytes of a file, where the checkpoint is sharded.
    Raises CheckpointError.
    """
    step_dir = Path(step_dir)
    with written_whole(out_dir) as partial:
        if model is not None:
            write_model(model, partial, step_dir)
        elif is_sharded(step_dir):
            gather(step_dir, partial, shard_size)
        else:
            for file in step_dir.iterdir():
                if file.name not in TRAINING:
                    shutil.copyfile(file, partial / file.name)
        if not (step_dir / "state.json").exists():  # a final_model, which says already where it comes from
            for name in ("README.md", "generation_config.json"):
                shutil.copyfile(step_dir / name, partial / name)
            return
        try:
            publish.describe(partial, read_state(step_dir))
        except (KeyError, TypeError) as e:
            raise CheckpointError(f"{step_dir}: state.json was written by another version of train.py: {e}") from e


def gather(step_dir, directory, shard_size):
    """The model directory of a sharded checkpoint; one file of it is in memory at a time."""
    from huggingface_hub import split_torch_state_dict_into_shards
    from safetensors.torch import save_file
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    stored = HuggingFaceStorageReader(str(step_dir)).read_metadata().state_dict_metadata
    weights = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
        for name, entry in stored.items()
        if "/" not in name  # AdamW's state
    }
    split = split_torch_state_dict_into_shards(weights, max_shard_size=shard_size)
    for file, names in split.filename_to_tensors.items():
        tensors = {name: torch.empty_like(weights[name], device="cpu") for name in names}
        read_shards(step_dir, tensors)
        save_file(tensors, directory / file, metadata={"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (directory / INDEX).write_text(json.dumps(index, indent=2))
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
    merged = None
    if (step_dir / "checksums.json").exists() or what == "export":
        verify(step_dir)
    if what == "merge":
        merged = Transformer.from_pretrained(step_dir)
        if not merged.lora_rank:
            raise ConfigError(f"{step_dir} is a plain model already: only what a run with --lora saved can be merged")
        lora.merge(merged)
    if cfg.push_to_hub:
        publish.reserve(cfg.push_to_hub)
    export(step_dir, out_dir, merged)
    architecture = json.loads((out_dir / "config.json").read_text())["architecture"]
    print(f"{out_dir}: {architecture}, from {step_dir}", file=sys.stderr)
    if cfg.push_to_hub:
        print(f"uploaded: {publish.push(out_dir, cfg.push_to_hub)}", file=sys.stderr)


if __name__ == "__main__":
    cli(main)
