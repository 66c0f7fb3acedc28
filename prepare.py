"""Text sources -> token files.

    python prepare.py                                                   the text of Python's own standard library
    python prepare.py --input=book.txt                                  a file, or several: --input=a.jsonl,folder
    python prepare.py --input=rows.jsonl --text_key=content --tokenizer=Qwen/Qwen2.5-0.5B
    python prepare.py config/mixture.py                                 data sets of the Hugging Face hub
    python prepare.py config/mixture.py --shard=0/4                     a quarter of it; the last machine merges

A source is cut into units of work (some local files, or one file of a data set). Each is read, encoded by all cores and
sealed by itself: its token files get their names when they are whole and on disk, and a record of them is written to
sealed/. The manifest comes last. So a killed run starts again at the unit where it stopped and ends with the same
bytes, several machines can share the units, and another mixture of the same sources only writes a manifest.
"""

import difflib
import fcntl
import hashlib
import json
import os
import re
import signal
import string
import sysconfig
import threading
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, field
from functools import cache, partial
from itertools import groupby
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import get_type_hints

import numpy as np
from tqdm import tqdm

from configurator import ConfigError, cli, configure, convert
from data import SPLITS, VERSION, DataError
from tokenizer import EOT, make_encoder, train_tokenizer

TEXT, ROWS = (".txt", ".md", ".py"), (".jsonl", ".parquet")
LONG, CUT = 1 << 15, 1 << 14  # bytes: a file over LONG is cut into documents of about CUT, lest a few files make up val
BATCH = 1 << 20  # characters that a process encodes at a time
UNIT = 1 << 28  # bytes of local files in a unit
SAMPLE = 1 << 24  # characters that a new tokenizer is trained on
RETRIES = 4  # attempts to read from a data set, seconds apart: 1, 4, 16
ALIASES = {  # data sets that have moved: id -> (id, text, why)
    "storytracer/US-PD-Books": ("sedthh/gutenberg_english", "TEXT", "its texts are gone from the hub"),
}


@dataclass
class PrepareConfig:
    input: list[str] = field(default_factory=list)  # .txt .md .py .jsonl .parquet or folders (none: standard library)
    text_key: str = "text"  # column of .jsonl and .parquet, or a template over columns: "{title}: {body}"
    tokenizer: str | None = None  # folder, tokenizer.json or hub id (none: a byte-level BPE is trained on the text)
    vocab_size: int = 4096  # of the BPE that is trained
    out_dir: str | None = None  # where the token files go (none: data/<name of the first source>)
    val_fraction: float = 0.05  # share of the documents held out, where a source has no validation split
    num_proc: int | None = None  # processes that encode (none: one per core)
    shard: str = "0/1"  # i/n, i from 0: do only the i-th of n shares of the work
    sources: list[dict] = field(default_factory=list)  # instead of input: see class Source


@dataclass
class Source:
    id: str = ""  # data set on the hub
    input: list[str] = field(default_factory=list)  # or local files and folders
    name: str = ""  # of its token files (none: from id or input)
    subset: str | None = None  # configuration of the data set
    split: str = "train"  # split that is trained on
    val_split: str | None = None  # split for validation (none: val_fraction of the documents)
    text: str = "text"  # column, or a template over columns
    join: str | None = None  # regular expression: a row that matches begins a document (none: every row is one)
    share: float = 1.0  # part of `split` that is taken: the first rows of each of its files
    weight: float | None = None  # part of the training stream, relative to the others (none: its million tokens)
    revision: str | None = None  # commit, tag or branch (none: the newest)


class Unreachable(DataError):
    """A data set that stopped answering: worth another attempt."""


# ---------------------------------------------------------------------------------------------------------------------
# Sources: which units of work there are, and the documents of one


def standard_library():
    """The Python files of the running interpreter's own library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return [path for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts[:-1])]


def local_units(source):
    """Units of local files in a fixed order; raises DataError for what cannot be read."""
    files, paths = [], source.input or standard_library()
    for path in map(Path, paths):
        if path.is_dir():
            below = [p for p in sorted(path.rglob("*")) if p.suffix in TEXT + ROWS and p.is_file()]
            files += [p for p in below if not any(part.startswith(".") for part in p.relative_to(path).parts)]
        elif not path.is_file():
            raise DataError(f"input {str(path)!r} is no file or folder")
        elif path.suffix not in TEXT + ROWS:
            raise DataError(f"input {str(path)!r}: the extension is not one of {' '.join(TEXT + ROWS)}")
        else:
            files.append(path)
    if not files:
        raise DataError(f"no {' '.join(TEXT + ROWS)} file in input {', '.join(map(repr, map(str, paths)))}")
    units, room = [], 0
    for path in files:
        stat = path.stat()
        if room < stat.st_size or not units:
            units.append({"split": None, "number": len(units), "files": []})
            room = UNIT
        units[-1]["files"].append([str(path.resolve()), stat.st_size, stat.st_mtime_ns])
        room -= stat.st_size
    return units


def hub_units(source):
    """Units of a data set, one for each of its files, with the commit that they are read from and the rows to take."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError

    lasting = (ValueError, FileNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError)
    units = []
    try:
        commit = source.revision
        if not re.fullmatch("[0-9a-f]{40}", commit or ""):
            commit = HfApi().dataset_info(source.id, revision=commit).sha
        for split, name in (("train" if source.val_split else None, source.split), ("val", source.val_split)):
            if name is None:
                continue
            data = open_split(source.id, source.subset, name, commit, source.text)
            known = (data.info.splits or {}).get(name)
            rows, files = known.num_examples if known else None, data.num_shards
            share = 1 if split == "val" else source.share
            if share < 1 and not rows:
                raise DataError(f"its {name} split does not tell its number of rows, so no share={share} of it")
            for number in range(files):  # the rows of a share are dealt out evenly, and so are those of the split
                first, last = (round((rows or 0) * share) * i // files for i in (number, number + 1))
                unit = {"split": split, "number": number, "id": source.id, "subset": source.subset, "name": name}
                units.append(unit | {"commit": commit, "of": files, "rows": last - first, "all": share == 1})
    except Exception as e:  # noqa: BLE001, whatever the hub, the network or the name did
        error = DataError if isinstance(e, lasting) else Unreachable
        raise error(f"source {source.name}: {source.id}: {first_line(e)}") from None
    return units


def plan(source):
    """The units of work of a source: dicts for JSON, with their split (None: by the hash) and their number in it."""
    return hub_units(source) if source.id else local_units(source)


def insist(read, *args):
    """read(*args), tried again where a data set stops answering."""
    for attempt in range(1, RETRIES + 1):
        try:
            return read(*args)
        except Unreachable as e:
            if attempt == RETRIES:
                raise
            print(f"{e}; attempt {attempt + 1} of {RETRIES} follows", flush=True)
            time.sleep(4 ** (attempt - 1))


def first_line(e):
    return str(e).strip().split("\n")[0] or type(e).__name__


@cache
def open_split(id, subset, name, commit, text):
    """A split of a data set, streaming, with only the columns that `text` needs."""
    from datasets import load_dataset

    data = load_dataset(id, subset, split=name, revision=commit, streaming=True)
    if missing := set(columns(text)) - set(data.column_names or columns(text)):
        raise DataError(f"no column {min(missing)!r}, only {', '.join(data.column_names)}")
    if data.info.builder_name == "parquet":  # then the other columns are not even downloaded
        data = load_dataset(id, subset, split=name, revision=commit, streaming=True, columns=columns(text))
    return data


def read_hub(source, unit):
    """The rows of one file of a data set, as (text, done)."""
    where = f"source {source.name}: {unit['id']}, {unit['name']} file {unit['number'] + 1} of {unit['of']}"
    try:
        data = open_split(unit["id"], unit["subset"], unit["name"], unit["commit"], source.text)
        data = data.shard(unit["of"], unit["number"])
        data, count = data if unit["all"] else data.take(unit["rows"]), 0
        for batch in data.iter(256):
            for values in zip(*batch.values(), strict=True):
                count += 1
                text = render(dict(zip(batch, values, strict=True)), source.text, f"{where}, row {count}")
                yield text, min(1.0, count / (unit["rows"] or float("inf")))
    except (DataError, GeneratorExit):
        raise
    except Exception as e:  # noqa: BLE001, the network can fail in many ways
        raise Unreachable(f"{where}: {first_line(e)}; what is finished stays, run the command again") from None


def joined(rows, pattern):
    """Rows put together to documents: one that matches `pattern` begins the next."""
    document, done, begins = [], 0.0, re.compile(pattern).match
    for text, done in rows:
        if begins(text) and document:
            yield "".join(document), done
            document = []
        document.append(text)
    yield "".join(document), done


def render(row, text, where):
    """The text of a row: its column `text`, or the template `text` over its columns. Raises DataError naming `where`."""
    row = {name: "" if value is None else value for name, value in row.items()}
    try:
        value = text.format_map(row) if "{" in text else row[text]
    except (TypeError, ValueError, IndexError, AttributeError) as e:
        raise DataError(f"{where}: {text!r} does not fit this row: {e}") from None
    except KeyError as e:
        raise DataError(f"{where}: no column {e}, only {', '.join(map(str, row))}: set text_key") from None
    if not isinstance(value, str):
        kind, others = type(value).__name__, ", ".join(map(str, row))
        raise DataError(f"{where}: {text!r} is {kind}, not text: set text_key to one of {others}")
    return value


def columns(text):
    """The columns that `text` needs, itself one or a template over several. Raises ConfigError for a malformed one."""
    try:
        return sorted({name for _, name, _, _ in string.Formatter().parse(text) if name}) if "{" in text else [text]
    except ValueError as e:
        raise ConfigError(f"text_key={text!r} is no template like '{{title}} {{body}}': {e}") from None


def decode(raw, path, offset):
    """Bytes at `offset` of a file as text; DataError with the offset of the byte that is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise DataError(
            f"{path}: byte {offset + e.start} is not UTF-8: convert the file, for instance with iconv"
        ) from None


def read_text(path):
    """(document, bytes read so far) of a text file: all of it, or pieces of about CUT bytes cut at line ends."""
    with open(path, "rb") as f:
        whole, offset = os.fstat(f.fileno()).st_size <= LONG, 0
        while raw := f.read(LONG + 1 if whole else CUT):
            if not whole:
                raw += f.readline(CUT)
                for _ in range(3):  # a line without end: at least leave no character in two
                    if f.peek(1)[:1] and f.peek(1)[0] & 0xC0 == 0x80:
                        raw += f.read(1)
            yield decode(raw, path, offset), offset + len(raw)
            offset += len(raw)


def read_jsonl(path, text):
    offset = 0
    with open(path, "rb") as f:
        for number, raw in enumerate(f, 1):
            line = decode(raw, path, offset)
            offset += len(raw)
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise DataError(f"{where}: not JSON: {e}") from None
            if not isinstance(row, dict):
                raise DataError(f"{where}: a {type(row).__name__}, not an object with a key {text!r}")
            document = render(row, text, where)
            try:
                document.encode()
            except UnicodeEncodeError as e:
                raise DataError(f"{where}: character {e.start} is a lone surrogate, which is no text") from None
            yield document, offset


def read_parquet(path, text):
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names, rows, done = file.schema_arrow.names, file.metadata.num_rows, 0
        if missing := [name for name in columns(text) if name not in names]:
            raise DataError(f"{path}: no column {missing[0]!r}, only {', '.join(names)}: set text_key")
        for batch in file.iter_batches(256, columns=columns(text)):
            for row in batch.to_pylist():
                done += 1
                yield render(row, text, f"{path}, row {done}"), os.path.getsize(path) * done // rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as e:
        raise DataError(f"{path}: not a readable parquet file: {e}") from None


def read_files(source, unit):
    """The documents of a unit of local files as (text, done)."""
    size, before = sum(size for _, size, _ in unit["files"]) or 1, 0
    for path, bytes_here, _ in unit["files"]:
        reader = {".jsonl": read_jsonl, ".parquet": read_parquet}.get(Path(path).suffix)
        for text, position in reader(path, source.text) if reader else read_text(path):
            yield text, (before + position) / size
        before += bytes_here


def read_unit(source, unit):
    """The documents of a unit as (text, done); done is the fraction of the unit read so far, for the progress bar."""
    rows = read_hub(source, unit) if source.id else read_files(source, unit)
    return joined(rows, source.join) if source.join else rows


# ---------------------------------------------------------------------------------------------------------------------
# Encoding


def held_out(text, fraction):
    """Whether a document belongs to validation: by a hash of its text, so the answer never changes."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") < fraction * 2**64


def start_worker(tokenizer_path, kind, eot, dtype, val_fraction):
    """Make this process an encoder. It ignores Ctrl-C (its parent decides) and ends when its parent is killed."""
    global encode_batch
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=lambda: (parent_process().join(), os._exit(1)), daemon=True).start()
    encode, end = make_encoder(tokenizer_path, kind)[0], np.array([eot])

    def encode_batch(split, texts):
        ids = {name: [] for name in SPLITS}
        for text in texts:
            ids[split or ("val" if held_out(text, val_fraction) else "train")] += [encode(text), end]
        return {name: (np.concatenate(a).astype(dtype).tobytes(), len(a) // 2) for name, a in ids.items() if a}


def run_batch(split, texts):
    """In a worker: {split: (its token files' bytes, its documents)} of `texts`; split None: by the hash of each."""
    return encode_batch(split, texts)


def batches(documents):
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


def in_order(submit, items, ahead):
    """(result of submit(texts), done) for (texts, done) in items, in their order, at most `ahead` of them in memory."""
    waiting = deque()
    for texts, done in items:
        waiting.append((submit(texts), done))
        if len(waiting) == ahead:
            future, at = waiting.popleft()
            yield future.result(), at
    for future, at in waiting:
        yield future.result(), at


# ---------------------------------------------------------------------------------------------------------------------
# Files: every one appears under its name when it is whole and on disk


def sync(path):
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def publish(partial_path, path):
    """Give a file its name once its content is on disk, then put the name there too."""
    sync(partial_path)
    os.replace(partial_path, path)
    sync(path.parent)


def write_whole(path, content):
    """Write bytes, or what JSON can hold, to `path`, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content if isinstance(content, bytes) else json.dumps(content, indent=2).encode() + b"\n"
    # other shares write it too
    partial_path = path.with_name(f"{path.name}.{os.uname().nodename}-{os.getpid()}.partial")
    try:
        partial_path.write_bytes(content)
        publish(partial_path, path)
    finally:
        partial_path.unlink(missing_ok=True)


class TokenFile:
    """A token file in the making: it gets its name when it is whole and on disk, and is gone when it fails."""

    def __init__(self, path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.partial = path, path.with_name(path.name + ".partial")
        self.file, self.digest, self.bytes, self.documents = open(self.partial, "ab"), hashlib.sha256(), 0, 0  # noqa: SIM115
        try:
            fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # falls with this process, however that ends
        except BlockingIOError:
            raise DataError(f"{path}: another prepare.py is writing it; wait for it to end") from None
        self.file.truncate(0)

    def write(self, raw, documents):
        self.file.write(raw)
        self.digest.update(raw)
        self.bytes += len(raw)
        self.documents += documents

    def seal(self, width):
        """Publish the file, if there is anything in it; its part of the manifest."""
        tokens = self.bytes // width
        part = {"tokens": tokens, "documents": self.documents, "files": []}
        if tokens:
            self.file.flush()
            publish(self.partial, self.path)
            name = f"{self.path.parent.name}/{self.path.name}"
            part["files"].append({"name": name, "tokens": tokens, "sha256": self.digest.hexdigest()})
        return part

    def close(self):
        self.partial.unlink(missing_ok=True)
        with suppress(OSError):  # a full disk, which write() told of
            self.file.close()


def encode_unit(source, unit, paths, submit, ahead, width, report):
    """Encode a unit into the token files `paths` ({split: path}); their parts {split: part} of the manifest."""
    with ExitStack() as stack:
        files = {split: stack.enter_context(closing(TokenFile(path))) for split, path in paths.items()}
        try:
            for encoded, done in in_order(submit, batches(read_unit(source, unit)), ahead):
                for split, (raw, number) in encoded.items():
                    files[split].write(raw, number)
                report(done, sum(file.bytes for file in files.values()) // width)
            empty = {"tokens": 0, "documents": 0, "files": []}
            return {split: files[split].seal(width) if split in files else empty for split in SPLITS}
        except OSError as e:
            e.filename = e.filename or str(next(iter(paths.values())))  # a full disk does not say where
            raise


def sealed(record, out_dir, width):
    """The parts {split: part} of a unit that was finished and whose files are there, else None."""
    try:
        parts = json.loads(record.read_bytes())
        files = [file for split in SPLITS for file in parts[split]["files"]]
        whole = all((out_dir / file["name"]).stat().st_size == file["tokens"] * width for file in files)
        return parts if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# The run


def read_sources(cfg):
    """The list of Source of a run; raises ConfigError for one that cannot be."""
    if not cfg.sources:
        name = Path(cfg.input[0]).resolve().stem if cfg.input else "stdlib"
        return [Source(input=cfg.input, name=re.sub(r"[^\w.-]", "_", name), text=cfg.text_key)]
    if cfg.input:
        raise ConfigError("input and sources are both set: choose one")
    wanted, sources, problems = get_type_hints(Source), [], []
    for number, given in enumerate(cfg.sources):
        source = Source()
        for key, value in given.items():
            try:
                setattr(source, key, convert(value, wanted[key]))
            except KeyError:
                near = difflib.get_close_matches(key, wanted, 1, 0)[0]
                problems.append(f"sources[{number}]: unknown key {key!r}; did you mean {near}?")
            except ValueError as e:
                problems.append(f"sources[{number}]: {key}: {e}")
        if bool(source.id) == bool(source.input):
            problems.append(f"sources[{number}]: set either id, a data set of the hub, or input, local files")
            continue
        name = "-".join([source.id.split("/")[-1], source.subset or ""]).strip("-") or Path(source.input[0]).stem
        source.name = re.sub(r"[^\w.-]", "_", source.name or name)
        if source.id in ALIASES:
            old, (source.id, source.text, why) = source.id, ALIASES[source.id]
            print(f"{old}: {why}; taking the same share of {source.id}")
        if not 0 < source.share <= 1 or (source.input and source.share < 1):
            problems.append(f"sources[{number}]: share={source.share}: above 0, at most 1, of a data set of the hub")
        if source.name in [other.name for other in sources]:
            problems.append(f"sources[{number}]: a second source named {source.name!r}")
        if source.weight is not None and not 0 <= source.weight < float("inf"):
            problems.append(f"sources[{number}]: weight={source.weight} is not a number from 0 on")
        sources.append(source)
    if problems:
        raise ConfigError("; ".join(problems))
    return sources


def find_tokenizer(name):
    """(tokenizer.json, tokenizer_config.json or None) as bytes, from a folder, a file or the hub."""
    path = Path(name) / "tokenizer.json" if os.path.isdir(name) else Path(name)
    beside = path.with_name("tokenizer_config.json")
    if not path.is_file():
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            path = Path(hf_hub_download(str(name), "tokenizer.json"))
            with suppress(EntryNotFoundError):  # a tokenizer needs no config
                beside = Path(hf_hub_download(str(name), "tokenizer_config.json"))
        except Exception as e:  # noqa: BLE001, whatever the hub, the network or the name did
            where = f"tokenizer {str(name)!r}: no tokenizer.json in such a folder or on the hub"
            raise DataError(f"{where}: {first_line(e)}") from None
    return path.read_bytes(), beside.read_bytes() if beside.is_file() else None


def place_tokenizer(cfg, work, out_dir):
    """Put a tokenizer into out_dir, unless it is there: the one asked for, or one trained on a sample of the text.

    Returns (number of ids, id that ends a document: of <|endoftext|>, else the tokenizer's own eos_token).
    """
    from tokenizers import Tokenizer

    path, note = out_dir / "tokenizer.json", out_dir / "sealed" / "tokenizer.json"
    asked = cfg.tokenizer or f"a BPE of vocab_size={cfg.vocab_size}"
    done = path.is_file() and note.is_file()
    if done and (before := json.loads(note.read_bytes())) != asked:
        raise DataError(f"{out_dir} was prepared with {before}, not with {asked}: set another out_dir, or delete it")
    if done or cfg.tokenizer:
        spec, config = find_tokenizer(out_dir if done else cfg.tokenizer)
    else:
        print(f"training a byte-level BPE of {cfg.vocab_size:,} tokens", flush=True)
        spec = train_tokenizer(sample(work, cfg.val_fraction), cfg.vocab_size)
        config = b'{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}\n'
    try:
        vocab = Tokenizer.from_buffer(spec).get_vocab()
        eos = json.loads(config or b"{}").get("eos_token")
    except Exception as e:  # noqa: BLE001, tokenizers raises bare Exception
        raise DataError(f"tokenizer {cfg.tokenizer!r}: no readable tokenizer.json: {e}") from None
    eot = vocab.get(EOT, vocab.get(eos["content"] if isinstance(eos, dict) else eos))
    if eot is None:
        raise DataError(f"tokenizer {cfg.tokenizer!r} has no {EOT} and no eos_token in its config to end a document")
    if not done:
        if config:
            write_whole(out_dir / "tokenizer_config.json", config)
        write_whole(path, spec)
        write_whole(note, asked)
    return max(vocab.values()) + 1, eot


def sample(work, val_fraction):
    """Training documents from the beginning of every unit, about SAMPLE characters in all."""
    work = [(source, unit) for source, unit in work if unit["split"] != "val"]
    for source, unit in work:
        yield from insist(beginning, source, unit, SAMPLE // len(work), val_fraction)


def beginning(source, unit, left, val_fraction):
    texts = []
    for text, _ in read_unit(source, unit):
        if unit["split"] or not held_out(text, val_fraction):
            texts.append(text)
            left -= len(text)
        if left <= 0:
            break
    return texts


def encode_all(todo, workers, out_dir, start, width):
    """Encode and seal the units `todo`, [(source, unit, path of its record)], with a progress bar for each source."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), start_worker, start)
    spoken = time.monotonic()
    try:
        for name, group in groupby(todo, key=lambda job: job[0].name):
            jobs, tokens, began = list(group), 0, time.monotonic()
            look = "{desc} {percentage:3.0f}%|{bar:30}| {elapsed}, {remaining} left{postfix}"
            with tqdm(total=len(jobs), desc=name, bar_format=look, disable=None) as bar:
                for i, (source, unit, record) in enumerate(jobs):

                    def report(done, count, i=i, before=tokens, bar=bar, began=began, name=name):
                        nonlocal spoken
                        seconds, share = time.monotonic() - began, (i + done) / bar.total
                        rate = f"{before + count:,} tokens, {(before + count) / seconds:,.0f} tokens/s"
                        if bar.disable and share and time.monotonic() > spoken + 60:  # no terminal: a line a minute
                            left = tqdm.format_interval(seconds / share - seconds)
                            print(f"{name}: {share:.0%}, {rate}, {left} left", flush=True)
                            spoken = time.monotonic()
                        bar.set_postfix_str(rate, refresh=False)
                        bar.update(i + done - bar.n)

                    splits = [unit["split"]] if unit["split"] else SPLITS
                    paths = {split: out_dir / split / f"{name}-{unit['number']:05d}.bin" for split in splits}
                    submit = partial(pool.submit, run_batch, unit["split"])
                    parts = insist(encode_unit, source, unit, paths, submit, 2 * workers, width, report)
                    write_whole(record, parts)
                    tokens += sum(part["tokens"] for part in parts.values())
            seconds = time.monotonic() - began
            print(f"{name}: {tokens:,} tokens in {seconds:.1f} s, {tokens / seconds:,.0f} tokens/s", flush=True)
    except BrokenProcessPool:
        raise DataError("an encoding process was killed: short of memory? a lower num_proc needs less") from None
    finally:
        pool.shutdown(cancel_futures=True)


def merge(jobs, out_dir, width):
    """The `sources` of the manifest, from the records of all units; None where some are not finished."""
    sources = {}
    for source, unit, record in jobs:
        if (parts := sealed(record, out_dir, width)) is None:
            return None
        origin = (
            {"id": source.id, "subset": source.subset, "commit": unit["commit"]} if source.id else {"input": "local"}
        )
        entry = sources.setdefault(source.name, {"weight": source.weight, "share": source.share, "from": origin})
        for split in SPLITS:
            total = entry.setdefault(split, {"tokens": 0, "documents": 0, "files": []})
            total["tokens"] += parts[split]["tokens"]
            total["documents"] += parts[split]["documents"]
            total["files"] += parts[split]["files"]
    for name, entry in sources.items():
        if not entry["train"]["tokens"]:
            number = entry["val"]["documents"]
            raise DataError(
                f"source {name}: an empty corpus"
                if not number
                else f"source {name}: all {number} documents fell into validation: more text, or a lower val_fraction"
            )
        if entry["weight"] is None:
            entry["weight"] = entry["train"]["tokens"] / 1e6
    return sources


def main(argv):
    (settings,) = configure(__doc__, argv, PrepareConfig)
    cfg, problems = PrepareConfig(**settings), []
    if cfg.tokenizer and "vocab_size" in settings:
        problems.append("tokenizer and vocab_size are both set: a given tokenizer has its own size")
    if cfg.vocab_size <= 256:
        problems.append(f"vocab_size={cfg.vocab_size}: 257 at least, the 256 bytes and {EOT}")
    if not 0 <= cfg.val_fraction < 1:
        problems.append(f"val_fraction={cfg.val_fraction}: from 0 to below 1")
    if cfg.num_proc is not None and cfg.num_proc < 1:
        problems.append(f"num_proc={cfg.num_proc}: 1 at least")
    share = re.fullmatch(r"(\d+)/(\d+)", cfg.shard)
    if not share or int(share[1]) >= int(share[2]):
        problems.append(f"shard={cfg.shard!r}: i/n with i from 0 to n-1, as in 0/4")
    if problems:
        raise ConfigError("; ".join(problems))

    sources = read_sources(cfg)
    for source in sources:
        columns(source.text)  # a malformed template is found now
    out_dir = Path(cfg.out_dir or f"data/{sources[0].name}")
    pins = {source.name: out_dir / "sealed" / source.name / "commit" for source in sources if source.id}
    for source in sources:  # what was begun goes on with the same commit, whatever happened on the hub since
        if source.id and not source.revision and pins[source.name].is_file():
            source.revision = pins[source.name].read_text()
    work = [(source, unit) for source in sources for unit in insist(plan, source)]
    vocab_size, eot = place_tokenizer(cfg, work, out_dir)
    dtype = "uint16" if vocab_size < 65_536 else "uint32"
    width = np.dtype(dtype).itemsize

    jobs, digest = [], hashlib.sha256((out_dir / "tokenizer.json").read_bytes()).hexdigest()
    for source, unit in work:
        made_from = [VERSION, digest, unit, source.text, source.join, unit["split"] or cfg.val_fraction]
        key = hashlib.sha256(json.dumps(made_from).encode()).hexdigest()[:16]
        jobs.append((source, unit, out_dir / "sealed" / source.name / f"{unit['number']:05d}-{key}.json"))
    known = {record for *_, record in jobs}
    for record in (record for source in sources for record in (out_dir / "sealed" / source.name).glob("*.json")):
        if record not in known:
            raise DataError(
                f"{out_dir} holds {record.parent.name} from other text or settings: set another out_dir, or delete it"
            )
    todo = [job for job in jobs[int(share[1]) :: int(share[2])] if sealed(job[2], out_dir, width) is None]
    for source, unit, _ in todo:
        if source.id and not pins[source.name].is_file():
            write_whole(pins[source.name], unit["commit"].encode())
    if todo:
        kind = make_encoder(out_dir / "tokenizer.json")[1]
        workers = cfg.num_proc or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
        print(f"encoding with {kind} in {workers} processes", flush=True)
        start = (str(out_dir / "tokenizer.json"), kind, eot, f"<u{width}", cfg.val_fraction)
        encode_all(todo, workers, out_dir, start, width)

    manifest_sources = merge(jobs, out_dir, width)
    if manifest_sources is None:
        print(f"{out_dir}: share {cfg.shard} is done; the last share, or a run without --shard, writes the manifest")
        return
    manifest = {
        "version": VERSION,
        "tokenizer": json.loads((out_dir / "sealed" / "tokenizer.json").read_bytes()),
        "dtype": dtype,
        "vocab_size": vocab_size,
        "eot_token": eot,
        "sources": manifest_sources,
    }
    write_whole(out_dir / "manifest.json", manifest)
    train, val = (sum(entry[split]["tokens"] for entry in manifest_sources.values()) for split in SPLITS)
    print(f"{out_dir}: {train:,} tokens to train on, {val:,} for validation, of {vocab_size:,} kinds")
    if not val and cfg.val_fraction:
        print("no document fell into validation: prepare more text, or set a higher val_fraction")


if __name__ == "__main__":
    cli(main)
