"""Where prepare.py's text comes from: local files and data sets of the Hugging Face hub.

A source is cut into units of work, some local files or one file of a data set: `plan` lists them, `read_unit` yields the
documents of one. A unit is a dict for JSON that says all that its text depends on, down to the commit of a data set.
"""

import difflib
import glob
import itertools
import json
import math
import os
import re
import string
import sysconfig
import time
import tokenize
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, get_type_hints

from configurator import Count, NonNegative, Range, convert, problems
from errors import ConfigError, DataError, first_line

TEXT, ROWS = (".txt", ".md", ".py"), (".jsonl", ".parquet")
LONG, CUT = 1 << 15, 1 << 14  # bytes: a file over LONG is cut into documents of about CUT, lest a few files make up val
UNIT = 1 << 28  # bytes of local files in a unit
RETRIES = 4  # attempts to read from a data set, seconds apart: 1, 4, 16


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
    share: Annotated[float, Range(0, 1, open_low=True)] = 1.0  # part of `split` taken: the first rows of each file
    files: Count | None = None  # files of `split` taken, the first ones (none: all): of a vast data set, enough
    weight: NonNegative | None = None  # part of the training stream, relative to the others (none: its million tokens)
    revision: str | None = None  # commit, tag or branch (none: the newest)

    def __post_init__(self):
        found = problems(self)
        if self.weight == math.inf:
            found.append("weight=inf is no part of a stream")
        if self.input and self.share < 1:
            found.append(f"share={self.share} is for data sets of the hub: local files are read whole")
        if self.input and self.files:
            found.append(f"files={self.files} is for data sets of the hub: name fewer local files")
        if bool(self.id) == bool(self.input):
            found.append("set either id, a data set of the hub, or input, local files")
        try:
            columns(self.text)
            re.compile(self.join or "")
        except re.error as e:
            found.append(f"join={self.join!r} is no regular expression: {e}")
        except ConfigError as e:  # a malformed template
            found.append(str(e))
        if found:
            raise ConfigError("; ".join(found))
        subset = f"-{self.subset}" if self.subset else ""
        given = self.id.split("/")[-1] + subset if self.id else before_wildcard(self.input[0]).resolve().stem
        name = self.name or given
        self.name = re.sub(r"[^\w.-]", "_", name)


class Unreachable(DataError):
    """A data set that stopped answering: worth another attempt."""


def read_sources(cfg):
    """The list of Source of a PrepareConfig; raises ConfigError naming every one that cannot be."""
    if not cfg.sources:
        if not cfg.input:
            return [Source(input=list(map(str, standard_library())), name="stdlib", text=cfg.text_key)]
        return [Source(input=cfg.input, text=cfg.text_key)]
    if cfg.input:
        raise ConfigError("input and sources are both set: choose one")
    sources, found = {}, []
    for number, given in enumerate(cfg.sources):
        try:
            source = read_source(given)
            if source.name in sources:
                raise ConfigError(f"a second source named {source.name!r}")
            sources[source.name] = source
        except ConfigError as e:
            found.append(f"sources[{number}]: {e}")
    if found:
        raise ConfigError("; ".join(found))
    return list(sources.values())


def read_source(given):
    """The Source of a dict from a config file; raises ConfigError."""
    types_of, values, found = get_type_hints(Source), {}, []
    for key, value in given.items():
        try:
            values[key] = convert(value, types_of[key])
        except KeyError:
            found.append(f"unknown key {key!r}; did you mean {difflib.get_close_matches(key, types_of, 1, 0)[0]}?")
        except ValueError as e:
            found.append(f"{key}: {e}")
    try:
        source = Source(**values)
    except ConfigError as e:
        found.append(str(e))
    if found:
        raise ConfigError("; ".join(found))
    return source


# ---------------------------------------------------------------------------------------------------------------------
# Units of work


def standard_library():
    """The Python files of the running interpreter's own library, without its tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    return [path for path in sorted(root.rglob("*.py")) if not skip & set(path.relative_to(root).parts[:-1])]


def before_wildcard(path) -> Path:
    """The folder in which a pattern like src/**/*.py begins; a path that is there as it is."""
    if os.path.exists(path):
        return Path(path)
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), Path(path).parts))


def readable(paths) -> list[Path]:
    """Those that are files of a kind that is read."""
    return [path for path in paths if path.suffix.lower() in TEXT + ROWS and path.is_file()]


def readable_below(folder: Path) -> list[Path]:
    """The same of a folder and those below it; no hidden ones."""
    return [file for file in readable(sorted(folder.rglob("*"))) if "/." not in f"/{file.relative_to(folder)}"]


def local_files(paths):
    """The files of `paths`, folders searched, patterns followed, in a fixed order; DataError for what cannot be read."""
    files = []
    for path in map(Path, paths):
        if glob.has_magic(str(path)) and not path.exists():
            matched = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]
            # Folders that a pattern names are searched; one with ** has been in them.
            folders = [] if "**" in path.parts else [each for each in matched if each.is_dir()]
            found = [*readable(matched), *(file for folder in folders for file in readable_below(folder))]
            if not found:
                raise DataError(f"no {' '.join(TEXT + ROWS)} file in input {str(path)!r}")
            files += found
        elif path.is_dir():
            files += readable_below(path)
        elif not path.is_file():
            raise DataError(f"input {str(path)!r} is no file or folder")
        elif path.suffix.lower() not in TEXT + ROWS:
            raise DataError(f"input {str(path)!r}: the extension is not one of {' '.join(TEXT + ROWS)}")
        else:
            files.append(path)
    if not files:
        raise DataError(f"no {' '.join(TEXT + ROWS)} file in input {', '.join(map(repr, paths))}")
    return list({path.resolve(): path for path in files}.values())  # each once, however often it was named


def plan(source):
    """The units of work of a source: dicts for JSON, with their split (None: by the hash) and their number in it.

    Of local files, units of about UNIT bytes, a file in one of them; a file that changes makes another unit.
    """
    if source.id:
        return hub_units(source)
    units, room = [], 0
    for path in local_files(source.input):
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

    permanent = (ValueError, FileNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError, RevisionNotFoundError)
    try:
        commit = source.revision
        if not re.fullmatch("[0-9a-f]{40}", commit or ""):
            commit = HfApi().dataset_info(source.id, revision=commit).sha
        units = split_units(source, source.split, "train" if source.val_split else None, source.share, commit)
        units = units[: source.files]
        if source.val_split:
            units += split_units(source, source.val_split, "val", 1.0, commit)
        return units
    except Exception as e:  # noqa: BLE001, whatever the hub, the network or the name did
        error = DataError if isinstance(e, permanent) else Unreachable
        raise error(f"source {source.name}: {source.id}: {first_line(e)}") from None


def split_units(source, name, split, share, commit):
    """Units of the data set's split `name`, which is to become our `split` (None: by the hash)."""
    data = open_split(source.id, source.subset, name, commit, source.text)
    info = (data.info.splits or {}).get(name)
    rows = info.num_examples if info else None
    if share < 1 and not rows:
        raise DataError(f"its {name} split does not tell its number of rows, so no share={share} of it")
    files, taken, units = data.num_shards, round((rows or 0) * share), []
    for number in range(files):
        rows = taken * (number + 1) // files - taken * number // files  # dealt out evenly, as those of the split are
        unit = {"split": split, "number": number, "id": source.id, "subset": source.subset, "name": name}
        units.append(unit | {"commit": commit, "of": files, "rows": rows, "all": share == 1})
    return units


def with_retries(read, *args):
    """read(*args), tried again where a data set stops answering."""
    for attempt in range(1, RETRIES + 1):
        try:
            return read(*args)
        except Unreachable as e:
            if attempt == RETRIES:
                raise
            print(f"{e}; attempt {attempt + 1} of {RETRIES} follows", flush=True)
            time.sleep(4 ** (attempt - 1))


# ---------------------------------------------------------------------------------------------------------------------
# The documents of a unit


def read_unit(source, unit):
    """The documents of a unit as (text, done); done is the fraction of the unit read so far, for the progress bar."""
    rows = read_hub(source, unit) if source.id else read_files(source, unit)
    return joined(rows, source.join) if source.join else rows


@cache
def open_split(id, subset, name, commit, text):
    """A split of a data set, streaming, with only the columns that `text` needs."""
    from datasets import load_dataset

    data, needed = load_dataset(id, subset, split=name, revision=commit, streaming=True), columns(text)
    if data.column_names and (missing := set(needed) - set(data.column_names)):
        raise DataError(f"no column {min(missing)!r}, only {', '.join(data.column_names)}")
    if data.info.builder_name == "parquet":  # then the other columns are not even downloaded
        data = load_dataset(id, subset, split=name, revision=commit, streaming=True, columns=needed)
    return data


def read_hub(source, unit):
    """The rows of one file of a data set, as (text, done)."""
    place = f"source {source.name}: {unit['id']}, {unit['name']} file {unit['number'] + 1} of {unit['of']}"
    try:
        data = open_split(unit["id"], unit["subset"], unit["name"], unit["commit"], source.text)
        data = data.shard(unit["of"], unit["number"])
        if not unit["all"]:
            data = data.take(unit["rows"])
        count = 0
        for batch in data.iter(256):
            for values in zip(*batch.values(), strict=True):
                count += 1
                text = render(dict(zip(batch, values, strict=True)), source.text, f"{place}, row {count}")
                yield text, min(1.0, count / (unit["rows"] or math.inf))
    except (DataError, GeneratorExit):
        raise
    except Exception as e:  # noqa: BLE001, the network can fail in many ways
        raise Unreachable(f"{place}: {first_line(e)}; what is finished stays, run the command again") from None


def joined(rows, pattern):
    """Rows put together to documents: one that matches `pattern` begins the next."""
    document, done, begins = [], 0.0, re.compile(pattern).match
    for text, done in rows:
        if begins(text) and document:
            yield "".join(document), done
            document = []
        document.append(text)
    yield "".join(document), done


def read_files(source, unit):
    """The documents of a unit of local files, as (text, done)."""
    unit_bytes, earlier_bytes = sum(size for _, size, _ in unit["files"]) or 1, 0
    for path, size, _ in unit["files"]:
        read_rows = {".jsonl": read_jsonl, ".parquet": read_parquet}.get(Path(path).suffix.lower())
        for text, position in read_rows(path, source.text) if read_rows else read_plain(path):
            yield text, (earlier_bytes + position) / unit_bytes
        earlier_bytes += size


def read_plain(path):
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
    """(document, bytes read so far) of a file with a JSON object in every line."""
    offset = 0
    with open(path, "rb") as f:
        for number, raw in enumerate(f, 1):
            line, place = decode(raw, path, offset), f"{path}, line {number}"
            offset += len(raw)
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as e:
                raise DataError(f"{place}: not JSON: {e}") from None
            if not isinstance(row, dict):
                raise DataError(f"{place}: a {type(row).__name__}, not an object with a key {text!r}")
            document = render(row, text, place)
            try:
                document.encode()
            except UnicodeEncodeError as e:
                raise DataError(f"{place}: character {e.start} is a lone surrogate, which is no text") from None
            yield document, offset


def read_parquet(path, text):
    """(document, bytes read so far) of a parquet file, as its rows pass."""
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
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as e:
        if getattr(e, "errno", None):  # the disk's, not the content's
            raise
        raise DataError(f"{path}: not a readable parquet file: {e}") from None


def decode(raw, path, offset):
    """Bytes at `offset` of a file as text: UTF-8, or what a Python file names in its first two lines (PEP 263).

    Raises DataError with the offset of the byte that is neither.
    """
    try:
        return raw.decode("utf-8" if offset else "utf-8-sig")  # Windows puts a mark before UTF-8
    except UnicodeDecodeError as e:
        position = offset + e.start
    if Path(path).suffix.lower() == ".py":
        with suppress(UnicodeError, LookupError, SyntaxError), open(path, "rb") as f:
            text = raw.decode(tokenize.detect_encoding(f.readline)[0])
            text.encode()  # some encodings give lone surrogates, which are no text
            return text
    raise DataError(f"{path}: byte {position} is not UTF-8: convert the file, for instance with iconv")


def columns(text):
    """The columns that `text` needs, itself one or a template over several. Raises ConfigError for a malformed one."""
    if "{" not in text:
        return [text]
    try:
        names = {name for _, name, _, _ in string.Formatter().parse(text) if name}
        return sorted({re.split(r"[.\[]", name)[0] for name in names})  # {text[a]} is a part of the column text
    except ValueError as e:
        raise ConfigError(f"text_key={text!r} is no template like '{{title}} {{body}}': {e}") from None


def render(row, text, place):
    """The text of a row: its column `text`, or the template `text` over its columns. Raises DataError naming `place`."""
    row = {name: "" if value is None else value for name, value in row.items()}
    try:
        value = text.format_map(row) if "{" in text else row[text]
    except (TypeError, ValueError, IndexError, AttributeError) as e:
        raise DataError(f"{place}: {text!r} does not fit this row: {e}") from None
    except KeyError as e:
        raise DataError(f"{place}: no column {e}, only {', '.join(map(str, row))}: set text_key") from None
    if not isinstance(value, str):
        kind, others = type(value).__name__, ", ".join(map(str, row))
        raise DataError(f"{place}: {text!r} is {kind}, not text: set text_key to one of {others}")
    return value
