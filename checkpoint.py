"""Training state on disk: written whole or not at all, checked before it is read, resumable to the bit.

    <out_dir>/step_0001000/
        config.json, model.safetensors, tokenizer.json     what any model directory holds
        optimizer.pt       AdamW's state (tensors only: read with weights_only=True)
        ranks.pt           per rank: random generators, and the sums of the metrics not yet logged
        state.json         step, tokens, flops, losses, config, data, W&B id, world size
        checksums.json     SHA-256 of every other file

A step is written as step_0001000.partial, flushed to disk, then renamed: a plain name is a complete checkpoint. One that
was damaged later is named and the one before it is used.

    python checkpoint.py export STEP_DIR OUT_DIR     weights, config and tokenizer of a saved step, nothing else
"""

import hashlib
import json
import os
import re
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from configurator import ConfigError, cli
from model import ModelError, Transformer

NEEDED = {"config.json", "optimizer.pt", "ranks.pt", "state.json"}  # and the weights, whatever their shards are called


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or continued; the message is one line."""


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
        raise CheckpointError(f"cannot write {path}: {e}") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def write_model(model, directory, tokenizer_dir):
    """A model directory: weights and config from the model, the tokenizer copied from `tokenizer_dir`."""
    model.save_pretrained(directory)
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


def save(out_dir, state, model, optimizer, ranks, tokenizer_dir, keep_last):
    """Write `<out_dir>/step_{state["step"]:07d}`, then drop all but the last `keep_last` and the best one.

    `state` is what state.json holds; its "val_loss" is that of this step, or None. `ranks` is a list of one dict of
    tensors per rank. Returns the path. Raises CheckpointError with every earlier checkpoint untouched.
    """
    path = Path(out_dir) / f"step_{state['step']:07d}"
    with written_whole(path) as partial:
        write_model(model, partial, tokenizer_dir)
        torch.save(optimizer.state_dict(), partial / "optimizer.pt")
        torch.save(ranks, partial / "ranks.pt")
        (partial / "state.json").write_text(json.dumps(state, indent=1))
        sums = {file.name: digest(file) for file in sorted(partial.iterdir())}
        (partial / "checksums.json").write_text(json.dumps(sums, indent=1))

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
    return path


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
    for name in sorted(NEEDED | set(sums)):
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


def rewind(out_dir, step):
    """Make a run directory what it was at `step` (-1: before the first), so that two histories never mix.

    Later checkpoints are renamed to .abandoned, what a crash left half-written is deleted, and metrics.jsonl is cut.
    """
    out_dir = Path(out_dir)
    for partial in out_dir.glob("*.partial"):
        shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
    for later in steps(out_dir):
        if int(later.name[5:]) > step:
            aside = later.with_name(later.name + ".abandoned")
            shutil.rmtree(aside, ignore_errors=True)
            later.rename(aside)
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


def main(argv):
    if not argv or argv[0] in ("--help", "-h"):
        return print(__doc__.strip())
    if argv[0] != "export" or len(argv) != 3:
        raise ConfigError(f"{' '.join(argv)}: usage is python checkpoint.py export STEP_DIR OUT_DIR")
    step_dir, out_dir = map(Path, argv[1:])
    if out_dir.exists():
        raise ConfigError(f"{out_dir} already exists: export writes a new directory")
    verify(step_dir)
    model = Transformer.from_pretrained(step_dir)
    with written_whole(out_dir) as partial:
        write_model(model, partial, step_dir)
    print(f"{out_dir}: {model.config.architecture} of step {read_state(step_dir)['step']}", file=sys.stderr)


if __name__ == "__main__":
    cli(main, CheckpointError, ModelError)
