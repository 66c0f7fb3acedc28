"""Text sources -> token files.

    python prepare.py                                                   the text of Python's own standard library
    python prepare.py --input=book.txt                                  or several: --input='a.jsonl,folder,src/**/*.md'
    python prepare.py --input=rows.jsonl --text_key=content --tokenizer=Qwen/Qwen2.5-0.5B
    python prepare.py config/mixture.py                                 data sets of the Hugging Face hub
    python prepare.py config/mixture.py --shard=0/4                     a quarter of it; the last machine merges

A source is cut into units of work (sources.py). Each is read, encoded by all cores and sealed by itself: its token files
get their names when they are whole and on disk, and a record of them is written to sealed/. The manifest comes last. So
a killed run starts again at the unit where it stopped and ends with the same bytes, several machines can share the
units, and another mixture of the same sources only writes a manifest.
"""

import fcntl
import hashlib
import json
import os
import re
import signal
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Annotated

import numpy as np
from tqdm import tqdm

from configurator import Count, Range, cli, configure, problems
from data import SPLITS, VERSION
from errors import ConfigError, DataError, first_line
from files import publish, sha256, write_whole
from sources import plan, read_sources, read_unit, with_retries
from tokenizer import EOT, TOKENIZER_FILES, make_encoder, start_and_ends, train_tokenizer

BATCH = 1 << 20  # characters that a process encodes at a time
SAMPLE = 1 << 24  # characters that a new tokenizer is trained on


@dataclass
class PrepareConfig:
    input: list[str] = field(default_factory=list)  # .txt .md .py .jsonl .parquet (none: standard library)
    text_key: str = "text"  # column of .jsonl and .parquet, or a template over columns: "{title}: {body}"
    tokenizer: str | None = None  # folder, tokenizer.json or hub id (none: a byte-level BPE is trained on the text)
    vocab_size: Annotated[int, Range(257)] = 4096  # of the BPE that is trained: 256 bytes, <|endoftext|>, merges
    out_dir: str | None = None  # where the token files go (none: data/<name of the first source>)
    val_fraction: Annotated[float, Range(0, 1, open_high=True)] = 0.05  # share of documents held out, without val_split
    num_proc: Count | None = None  # processes that encode (none: one per core)
    shard: str = "0/1"  # i/n, i from 0: do only the i-th of n shares of the work
    sources: list[dict] = field(default_factory=list)  # instead of input: see class Source

    def __post_init__(self):
        found = problems(self)
        shard = re.fullmatch(r"(\d+)/(\d+)", self.shard)
        if not shard or int(shard[1]) >= int(shard[2]):
            found.append(f"shard={self.shard!r}: i/n with i from 0 to n-1, as in 0/4")
        if found:
            raise ConfigError("; ".join(found))


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


def held_out(text, fraction):
    """Whether a document belongs to validation: by a hash of its text, so the answer never changes."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def start_worker(tokenizer_path, kind, eot, dtype, val_fraction):
    """Make this process an encoder. It ignores Ctrl-C (its parent decides) and ends when its parent is killed."""
    global worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    encode, _ = make_encoder(tokenizer_path, kind)
    worker = encode, np.array([eot]), dtype, val_fraction


def encode_batch(split, texts):
    """In a worker: {split: (ids, number of documents)} of `texts`; split None: by the hash of each."""
    encode, end, dtype, val_fraction = worker
    ids = {name: [] for name in SPLITS}
    for text in texts:
        ids[split or ("val" if held_out(text, val_fraction) else "train")] += [encode(text), end]
    return {name: (np.concatenate(a).astype(dtype), len(a) // 2) for name, a in ids.items() if a}


def text_batches(documents):
    """Documents as lists of about BATCH characters, with the fraction of the unit that ends there. Empty ones go."""
    texts, size, done = [], 0, 0.0
    for text, done in documents:
        if text:
            texts.append(text)
            size += len(text)
        if size >= BATCH:
            yield texts, done
            texts, size = [], 0
    yield texts, done


def in_order(submit, batches, ahead):
    """(result of submit(texts), done) for (texts, done) in batches, in their order, at most `ahead` of them in memory."""
    waiting = deque()
    for texts, done in batches:
        waiting.append((submit(texts), done))
        if len(waiting) == ahead:
            future, done = waiting.popleft()
            yield future.result(), done
    for future, done in waiting:
        yield future.result(), done


class TokenFile:
    """A token file in the making: it gets its name when it is whole and on disk, and is gone when it fails."""

    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.part, self.digest = empty_part(), hashlib.sha256()
        self.file = open(self.partial, "ab")  # noqa: SIM115
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with this process, however that ends
        except BlockingIOError:
            raise DataError(f"{path}: another prepare.py is writing it; wait for it to end") from None
        self.file.truncate(0)

    def write(self, ids, documents):
        self.file.write(ids)
        self.digest.update(ids)
        self.part["tokens"] += len(ids)
        self.part["documents"] += documents

    def seal(self):
        """Publish the file, if there is anything in it; its part of the manifest."""
        if self.part["tokens"]:
            self.file.flush()
            publish(self.partial, self.path)
            name = f"{self.path.parent.name}/{self.path.name}"
            self.part["files"].append({"name": name, "tokens": self.part["tokens"], "sha256": self.digest.hexdigest()})
        return self.part

    def close(self):
        self.partial.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk, which write() told of
            self.file.close()


def empty_part():
    return {"tokens": 0, "documents": 0, "files": []}


def encode_unit(source, unit, paths, submit, ahead, report):
    """Encode a unit into the token files `paths` ({split: path}); the parts {split: part} of the manifest."""
    with ExitStack() as stack:
        files = {split: stack.enter_context(closing(TokenFile(path))) for split, path in paths.items()}
        try:
            batches = text_batches(read_unit(source, unit))
            for encoded, done in in_order(submit, batches, ahead):
                for split, (ids, documents) in encoded.items():
                    files[split].write(ids, documents)
                report(done, sum(file.part["tokens"] for file in files.values()))
            return {split: files[split].seal() if split in files else empty_part() for split in SPLITS}
        except OSError as e:
            if e.errno:
                e.filename = e.filename or str(next(iter(paths.values())))  # a full disk does not say where
            raise


class Progress:
    """The progress bar of a source; without a terminal, a line a minute. units, tokens: what is sealed."""

    def __init__(self, name, units):
        self.name = name
        self.units = self.tokens = 0
        self.began = self.last_line = time.monotonic()
        look = "{desc} {percentage:3.0f}%|{bar:30}| {elapsed}, {remaining} left{postfix}"
        self.bar = tqdm(total=units, desc=name, bar_format=look, disable=None)

    def report(self, done, new_tokens):
        """Of the unit at work, this fraction is done and so many tokens are written."""
        units, tokens, seconds = self.units + done, self.tokens + new_tokens, time.monotonic() - self.began
        share, rate = units / self.bar.total, f"{tokens:,} tokens, {tokens / seconds:,.0f} tokens/s"
        if self.bar.disable and share and time.monotonic() > self.last_line + 60:
            left = tqdm.format_interval(seconds / share - seconds)
            print(f"{self.name}: {share:.0%}, {rate}, {left} left", flush=True)
            self.last_line = time.monotonic()
        self.bar.set_postfix_str(rate, refresh=False)
        self.bar.update(units - self.bar.n)


def encode_source(name, jobs, pool, ahead, out_dir):
    """Encode and seal the jobs (see list_jobs) of one source, one after another, each by all processes of the pool."""
    progress = Progress(name, len(jobs))
    with progress.bar:
        for source, unit, record in jobs:
            splits = [unit["split"]] if unit["split"] else SPLITS
            paths = {split: out_dir / split / f"{name}-{unit['number']:05d}.bin" for split in splits}
            submit = partial(pool.submit, encode_batch, unit["split"])
            parts = with_retries(encode_unit, source, unit, paths, submit, ahead, progress.report)
            write_json(record, parts)
            progress.units += 1
            progress.tokens += sum(part["tokens"] for part in parts.values())
    tokens, seconds = progress.tokens, time.monotonic() - progress.began
    print(f"{name}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s", flush=True)


def encode_share(cfg, jobs, out_dir, eot, width):
    """Encode and seal what is not sealed yet of this machine's share of the jobs, source by source."""
    number, shares = map(int, cfg.shard.split("/"))
    todo = [job for job in jobs[number::shares] if read_record(job[2], out_dir, width) is None]
    if not todo:
        return
    for source, unit, record in todo:
        if source.id and not (pin := record.with_name("commit")).is_file():
            write_whole(pin, unit["commit"], writers_differ=True)
    tokenizer_path = out_dir / "tokenizer.json"
    _, kind = make_encoder(tokenizer_path)
    workers = cfg.num_proc or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    print(f"encoding with {kind} in {workers} processes", flush=True)
    worker_arguments = (str(tokenizer_path), kind, eot, f"<u{width}", cfg.val_fraction)
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, worker_arguments)
    try:
        for name, group in groupby(todo, key=lambda job: job[0].name):
            encode_source(name, list(group), pool, 2 * workers, out_dir)
    except BrokenProcessPool:
        raise DataError("an encoding process was killed: short of memory? a lower num_proc needs less") from None
    finally:
        pool.shutdown(cancel_futures=True)


# ---------------------------------------------------------------------------------------------------------------------
# The tokenizer


def find_tokenizer(name):
    """The path of a tokenizer.json, from a folder, a file or the hub; beside it the files that say what ends a text."""
    path = Path(name) / "tokenizer.json" if os.path.isdir(name) else Path(name)
    if not path.is_file():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        hub_id, _, revision = str(name).partition("@")
        try:
            path = Path(hf_hub_download(hub_id, "tokenizer.json", revision=revision or None))
            for other in (*TOKENIZER_FILES[1:], "config.json", "generation_config.json"):
                with suppress(EntryNotFoundError):  # each may be missing
                    hf_hub_download(hub_id, other, revision=revision or None)
        except Exception as e:  # noqa: BLE001, whatever the hub, the network or the name did
            missing = f"tokenizer {str(name)!r}: no tokenizer.json in such a folder or on the hub"
            raise DataError(f"{missing}: {first_line(e)}") from None
    return path


def place_tokenizer(cfg, work, out_dir):
    """Put a tokenizer into out_dir, unless it is there: the one asked for, or one trained on a sample of the text.

    Returns (number of ids, id that ends a document: the first of the tokenizer's ends, see `start_and_ends`).
    """
    from tokenizers import Tokenizer

    path, origin_path = out_dir / "tokenizer.json", out_dir / "sealed" / "tokenizer.json"
    asked = cfg.tokenizer or f"a BPE of vocab_size={cfg.vocab_size}"
    exists = path.is_file() and origin_path.is_file()
    if exists and (origin := json.loads(origin_path.read_bytes())) != asked:
        raise DataError(f"{out_dir} was prepared with {origin}, not with {asked}: set another out_dir, or delete it")
    if exists:
        found = path
    elif cfg.tokenizer:
        found = find_tokenizer(cfg.tokenizer)
    else:
        print(f"training a byte-level BPE of {cfg.vocab_size:,} tokens", flush=True)
        spec = train_tokenizer(training_sample(work, cfg.val_fraction), cfg.vocab_size)
        names = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": EOT, "pad_token": EOT}
        write_json(out_dir / "tokenizer_config.json", names)
        write_whole(path, spec, writers_differ=True)
        found = path
    try:
        vocab = Tokenizer.from_file(str(found)).get_vocab()
    except Exception as e:  # noqa: BLE001, tokenizers raises bare Exception
        raise DataError(f"tokenizer {cfg.tokenizer!r}: no readable tokenizer.json: {e}") from None
    _, ends = start_and_ends(found)
    if wrong := [end for end in ends if not 0 <= end <= max(vocab.values())]:
        raise DataError(
            f"tokenizer {found}: its files end a text with {wrong[0]!r}, which is none of its {len(vocab):,} ids"
        )
    if found != path:
        for name in reversed(TOKENIZER_FILES):  # tokenizer.json last
            if (file := found if name == path.name else found.with_name(name)).is_file():
                write_whole(out_dir / name, file.read_bytes(), writers_differ=True)
    if not exists:
        write_json(out_dir / "generation_config.json", {"eos_token_id": ends})
        write_json(origin_path, asked)
    return max(vocab.values()) + 1, ends[0]


def training_sample(work, val_fraction):
    """Training documents from the beginning of every unit, about SAMPLE characters in all."""
    work = [(source, unit) for source, unit in work if unit["split"] != "val"]
    for source, unit in work:
        yield from with_retries(first_documents, source, unit, SAMPLE // len(work), val_fraction)


def first_documents(source, unit, characters, val_fraction):
    texts = []
    for text, _ in read_unit(source, unit):
        if unit["split"] or not held_out(text, val_fraction):
            texts.append(text)
            characters -= len(text)
        if characters <= 0:
            break
    return texts


# ---------------------------------------------------------------------------------------------------------------------
# Records of what is sealed, and the manifest


def write_json(path, content):
    write_whole(path, json.dumps(content, indent=2) + "\n", writers_differ=True)  # another share writes it too


def list_jobs(work, val_fraction, out_dir):
    """(source, unit, path of the record that its token files get); its name is a hash of all that they depend on.

    Raises DataError where out_dir holds a record of one of these sources that was made otherwise.
    """
    tokenizer_digest, jobs = sha256(out_dir / "tokenizer.json"), []
    for source, unit in work:
        made_from = [VERSION, tokenizer_digest, unit, source.text, source.join, unit["split"] or val_fraction]
        key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
        jobs.append((source, unit, out_dir / "sealed" / source.name / f"{unit['number']:05d}-{key}.json"))
    known = {record for _, _, record in jobs}
    for name in dict.fromkeys(source.name for source, _ in work):
        if not known.issuperset((out_dir / "sealed" / name).glob("*.json")):
            raise DataError(f"{out_dir} holds {name} from other text or settings: set another out_dir, or delete it")
    return jobs


def read_record(record, out_dir, width):
    """The parts {split: part} of a unit that was finished and whose files are there, else None."""
    try:
        parts = json.loads(record.read_bytes())
        files = [file for split in SPLITS for file in parts[split]["files"]]
        whole = all((out_dir / file["name"]).stat().st_size == file["tokens"] * width for file in files)
        return parts if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def merge_records(jobs, out_dir, width):
    """The `sources` of the manifest, from the records of all units; None where some are not finished."""
    sources = {}
    for source, unit, record in jobs:
        parts = read_record(record, out_dir, width)
        if parts is None:
            return None
        origin = {"input": "local"}
        if source.id:
            origin = {"id": source.id, "subset": source.subset, "commit": unit["commit"]}
        entry = sources.setdefault(source.name, {"weight": source.weight, "share": source.share, "from": origin})
        for split in SPLITS:
            total = entry.setdefault(split, empty_part())
            for key in total:
                total[key] += parts[split][key]
    for name, entry in sources.items():
        if not entry["train"]["tokens"]:
            number = entry["val"]["documents"]
            lost = f"all {number} documents fell into validation: more text, or a lower val_fraction"
            forget((record for source, _, record in jobs if source.name == name), out_dir)
            raise DataError(f"source {name}: {lost if number else 'an empty corpus'}")
        if entry["weight"] is None:
            entry["weight"] = entry["train"]["tokens"] / 1e6
    return sources


def forget(records, out_dir):
    """Other text or another fraction may take the place of these records, and of a tokenizer that nothing else is left of."""
    for record in records:
        record.unlink()
    if not any((out_dir / "sealed").glob("*/*.json")):
        (out_dir / "sealed" / "tokenizer.json").unlink(missing_ok=True)


def main(argv):
    (settings,) = configure(__doc__, argv, PrepareConfig)
    cfg = PrepareConfig(**settings)
    if cfg.tokenizer and "vocab_size" in settings:
        raise ConfigError("tokenizer and vocab_size are both set: a given tokenizer has its own size")
    sources = read_sources(cfg)
    out_dir = Path(cfg.out_dir or f"data/{sources[0].name}")
    for source in sources:  # what was begun goes on with the same commit, whatever happened on the hub since
        pin = out_dir / "sealed" / source.name / "commit"
        if source.id and not source.revision and pin.is_file():
            source.revision = pin.read_text()

    work = [(source, unit) for source in sources for unit in with_retries(plan, source)]
    vocab_size, eot = place_tokenizer(cfg, work, out_dir)
    dtype = "uint16" if vocab_size < 65_536 else "uint32"
    width = np.dtype(dtype).itemsize
    jobs = list_jobs(work, cfg.val_fraction, out_dir)
    encode_share(cfg, jobs, out_dir, eot, width)

    merged = merge_records(jobs, out_dir, width)
    if merged is None:
        print(f"{out_dir}: share {cfg.shard} is done; the last share, or a run without --shard, writes the manifest")
        return
    manifest = {
        "version": VERSION,
        "tokenizer": json.loads((out_dir / "sealed" / "tokenizer.json").read_bytes()),
        "dtype": dtype,
        "vocab_size": vocab_size,
        "eot_token": eot,
        "sources": merged,
    }
    write_json(out_dir / "manifest.json", manifest)
    train, val = (sum(entry[split]["tokens"] for entry in merged.values()) for split in SPLITS)
    print(f"{out_dir}: {train:,} tokens to train on, {val:,} for validation, of {vocab_size:,} kinds")
    if not val and cfg.val_fraction:
        forget((record for _, _, record in jobs), out_dir)
        cure = "more text, or a higher val_fraction"
        raise DataError(f"{out_dir}: no document fell into validation, which train.py needs: {cure}")


if __name__ == "__main__":
    cli(main)
