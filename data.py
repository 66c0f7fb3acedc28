"""The token-file format: what prepare.py writes and train.py reads.

    data/<name>/manifest.json               what is there: see read_manifest
    data/<name>/tokenizer.json
    data/<name>/train/<source>-00000.bin    little-endian uint16, or uint32 from 65,536 ids on
    data/<name>/val/<source>-00000.bin      a document is its tokens, then eot_token

The files of a source are one long row of tokens, cut into blocks of `seq_len` (and one more token: the last target).
Sequence n of the endless training stream is a pure function of (seed, n), so it is the same whatever the number of
ranks, the micro-batch or the restarts. Memory does not grow with the training text.

    python data.py verify DIR               compare every file with its SHA-256 in the manifest
    python data.py show DIR --sequence=4096-4099 --seq_len=256 --seed=42     the text of these sequences of training: what
                                            train.py names when the loss jumps
"""

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configurator import cli, configure
from errors import DataError
from files import sha256

VERSION = 1
SPLITS = ("train", "val")
PERIOD = 65_536  # slots after which the interleaving of the sources repeats; the resolution of their weights


def read_manifest(data_dir):
    """The checked manifest of a data folder, a dict:

        version, tokenizer (where it comes from), dtype ("uint16" or "uint32"), vocab_size, eot_token (id),
        sources: {name: {weight, share, from, train: part, val: part}},  share of `from` that was taken
        part: {tokens, documents, files: [{name, tokens, sha256}]}

    Raises DataError where it is missing, malformed, of another version, or at odds with the sizes of the files.
    """
    data_dir = Path(data_dir)
    path = data_dir / "manifest.json"
    if not path.is_file():
        raise DataError(f"{data_dir} is no data folder (it has no manifest.json): python prepare.py makes one")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["version"] != VERSION:
            raise DataError(f"{path}: version is {manifest['version']!r}, not {VERSION}: prepare the data again")
        width = {"uint16": 2, "uint32": 4}[manifest["dtype"]]
        eot, vocab_size = manifest["eot_token"], manifest["vocab_size"]
        if {type(eot), type(vocab_size)} != {int} or not 0 <= eot < vocab_size <= 256**width:
            raise ValueError("eot_token, vocab_size and dtype do not fit together")
        for source in manifest["sources"].values():
            if type(source["weight"]) not in (int, float) or not 0 <= source["weight"] < float("inf"):
                raise ValueError(f"a weight of {source['weight']}")
            for split in SPLITS:
                check_part(data_dir, split, source[split], width)
    except FileNotFoundError as e:
        raise DataError(f"{e.filename} is in the manifest but not on disk: prepare the data again") from None
    except DataError:
        raise
    except KeyError as e:
        raise DataError(f"{path} is malformed: {e} is missing or unknown") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise DataError(f"{path} is malformed: {e}") from None
    return manifest


def check_part(data_dir, split, part, width):
    """Raises ValueError or KeyError for a malformed part of a manifest, DataError for a file that is not as it says."""
    for file in part["files"]:
        name, tokens = file["name"], file["tokens"]
        if not re.fullmatch(rf"{split}/[\w.-]+\.bin", name):  # nothing outside the folder
            raise ValueError(f"a file named {name!r}")
        if type(tokens) is not int or type(file["sha256"]) is not str:
            raise ValueError(f"{name} of {tokens!r} tokens, sha256 {file['sha256']!r}")
        if (size := (data_dir / name).stat().st_size) != tokens * width:
            raise DataError(
                f"{data_dir / name} has {size:,} bytes where the manifest says {tokens * width:,}: "
                "it was truncated or altered; prepare the data again"
            )
    if part["tokens"] != sum(file["tokens"] for file in part["files"]):
        raise ValueError(f"the {split} files do not add up to {part['tokens']} tokens")


def verify(data_dir):
    """Compare every file with its SHA-256 in the manifest; raises DataError naming the ones that differ."""
    sources = read_manifest(data_dir)["sources"].values()
    files = [file for source in sources for split in SPLITS for file in source[split]["files"]]
    altered = [file["name"] for file in files if sha256(Path(data_dir) / file["name"]) != file["sha256"]]
    if altered:
        raise DataError(f"{data_dir}: altered since they were prepared: {', '.join(altered)}; prepare the data again")


def mix(x):
    """A hash of 64 bits to 64 bits (the finaliser of splitmix64), on uint64 arrays."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def shuffle(index, n, key):
    """Where a pseudo-random permutation of range(n), chosen by `key`, sends `index`; uint64 arrays of one shape.

    A Feistel network permutes the next power of four; what lands outside range(n) is sent through it again until it is
    inside. So a shuffle of any size needs no memory, and any element of it can be asked for.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    low = (np.uint64(1) << half) - np.uint64(1)
    x = index.copy()
    outside = np.ones(x.shape, bool)
    while outside.any():
        left, right = x[outside] >> half, x[outside] & low
        for turn in range(4):
            left, right = right, left ^ (mix(right ^ mix(key[outside] + np.uint64(turn))) & low)
        x[outside] = left << half | right
        outside = x >= np.uint64(n)
    return x


def interleave(counts):
    """Slots 0 … sum(counts)-1 dealt out so that every prefix is close to the proportions of `counts`.

    Returns (which, rank): slot i belongs to `which[i]` and is its `rank[i]`-th. Number k of a source with c slots stands
    at the time (k + 1/2) / c, and the slots are in the order of time.
    """
    which = np.repeat(np.arange(len(counts)), counts)
    rank = np.concatenate([np.arange(c) for c in counts])
    order = np.argsort((rank + 0.5) / np.repeat(counts, counts), kind="stable")
    return which[order], rank[order]


class TokenData:
    """The blocks of one split as numbered sequences.

    split="train": an endless stream. Every epoch of a source is a new permutation of its blocks, in which none repeats;
    the sources are interleaved by the manifest's `weight`: for another mixture it is edited there, 0 leaves a source out.
    split="val": the len() blocks of all sources once, in an order that no seed changes, every prefix a fair sample: close
    to the proportions of the sources, and from all over each of them.
    A source without a whole block in this split is left out.

    vocab_size, manifest;  tokens: how many this split holds;  len(): its blocks, the sequences of one epoch.
    Raises DataError where the folder is damaged, or fewer than seq_len + 1 tokens are there.
    """

    def __init__(self, data_dir, split, seq_len, seed=42):
        if split not in SPLITS:
            raise DataError(f"split {split!r}: one of {', '.join(SPLITS)}")
        self.data_dir, self.split, self.seq_len = Path(data_dir), split, seq_len
        self.manifest = read_manifest(data_dir)
        self.vocab_size = self.manifest["vocab_size"]
        sources = {name: source for name, source in self.manifest["sources"].items() if source["weight"] > 0}
        tokens = {name: source[split]["tokens"] for name, source in sources.items()}
        self.tokens = sum(tokens.values())
        self.names = [name for name in sources if tokens[name] > seq_len]
        if not self.names:
            most = max(tokens.values(), default=0)
            if split == "val" and not most:
                raise DataError(f"{data_dir} has no validation tokens: prepare it again with a higher val_fraction")
            raise DataError(
                f"{data_dir}: the {split} split has {most:,} tokens, too few for seq_len={seq_len}, which needs "
                f"{seq_len + 1:,}: lower seq_len or prepare more text"
            )
        self.dtype = np.dtype(self.manifest["dtype"]).newbyteorder("<")
        self.files = [
            sources[name][split]["files"] for name in self.names
        ]  # opened for a moment: there may be thousands
        self.ends = [np.cumsum([file["tokens"] for file in files]) for files in self.files]
        self.blocks = np.array([(ends[-1] - 1) // seq_len for ends in self.ends])

        if split == "val":
            self.counts, seed = self.blocks, "val"
        elif len(self.names) == 1:
            self.counts = np.array([1])
        else:  # every source gets a slot, however small its weight
            weights = np.array([sources[name]["weight"] for name in self.names], float)
            self.counts = np.maximum(1, np.round(PERIOD * weights / weights.sum())).astype(int)
        self.which, self.rank = interleave(self.counts)
        digests = [hashlib.sha256(f"{seed}/{name}".encode()).digest() for name in self.names]
        self.keys = np.array([int.from_bytes(digest[:8], "little") for digest in digests], np.uint64)

    def __len__(self):
        return int(self.blocks.sum())

    def locate(self, first, count):
        """Sequences first … first+count-1 as (source, block): two int64 arrays (count,) indexing `names` and blocks."""
        number = np.arange(first, first + count)
        source = self.which[number % len(self.which)]
        index = number // len(self.which) * self.counts[source] + self.rank[number % len(self.which)]
        if self.split == "val" and (first < 0 or first + count > len(self)):
            raise DataError(f"{self.data_dir}: the val split has {len(self):,} sequences of {self.seq_len}, no more")
        for s in np.unique(source):
            chosen, blocks = source == s, int(self.blocks[s])
            epoch, within = np.divmod(index[chosen].astype(np.uint64), np.uint64(blocks))
            index[chosen] = shuffle(within, blocks, mix(self.keys[s] + epoch))
        return source, index

    def batch(self, first, count):
        """Sequences first … first+count-1 as (input_ids, targets), int64 (count, seq_len); targets are one token on.

        Raises DataError when a file holds an id beyond vocab_size, or a val sequence beyond len() is asked for.
        """
        import torch  # here: prepare.py needs the format, not torch

        rows = np.empty((count, self.seq_len + 1), np.int64)
        for row, source, block in zip(rows, *self.locate(first, count), strict=True):
            filled, begin = 0, int(block) * self.seq_len
            file = int(np.searchsorted(self.ends[source], begin, side="right"))
            begin -= int(self.ends[source][file - 1]) if file else 0  # within the file
            while filled < len(row):  # a block may run over the end of a file
                path, offset = self.data_dir / self.files[source][file]["name"], begin * self.dtype.itemsize
                piece = np.fromfile(path, self.dtype, len(row) - filled, offset=offset)
                row[filled : filled + len(piece)] = piece
                filled += len(piece)
                file, begin = file + 1, 0
        if count and rows.max() >= self.vocab_size:
            raise DataError(
                f"{self.data_dir}: token id {rows.max():,} in sequences {first}-{first + count - 1} of {self.split}, "
                f"beyond vocab_size={self.vocab_size:,}: a file was altered; prepare the data again"
            )
        rows = torch.from_numpy(rows)
        return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()  # (count, seq_len) each


@dataclass
class ShowConfig:
    sequence: str = "0"  # number of a sequence of the training stream, or first-last
    seq_len: int = 256  # tokens of a sequence, as in training
    seed: int = 42  # of the order of the data, as in training


def show(data_dir, cfg):
    """Print the text of sequences of the training stream, each under its number and source. Raises DataError."""
    from tokenizers import Tokenizer

    numbers = re.fullmatch(r"(\d{1,15})(?:-(\d{1,15}))?", cfg.sequence)
    if not numbers or cfg.seq_len < 1 or int(numbers[2] or numbers[1]) < int(numbers[1]):
        raise DataError(f"sequence={cfg.sequence!r}, seq_len={cfg.seq_len}: N or N-M, and at least 1 token")
    data = TokenData(data_dir, "train", cfg.seq_len, cfg.seed)
    path = data.data_dir / "tokenizer.json"
    if not path.exists():
        raise DataError(f"{data_dir} has no tokenizer.json: its tokens cannot be read")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as e:  # noqa: BLE001, tokenizers raises nothing narrower
        raise DataError(f"{path} is no tokenizer: {e}") from None
    for number in range(int(numbers[1]), int(numbers[2] or numbers[1]) + 1):
        (source,), (block,) = data.locate(number, 1)
        ids, _ = data.batch(number, 1)
        print(f"--- sequence {number}: {data.names[source]}, tokens {block * cfg.seq_len:,} and on")
        print(tokenizer.decode(ids[0].tolist(), skip_special_tokens=False))


def main(argv):
    if not argv or "--help" in argv or "-h" in argv:
        print(__doc__.strip())
    elif argv[0] == "show" and len(argv) > 1:
        (settings,) = configure(__doc__, argv[2:], ShowConfig)
        show(argv[1], ShowConfig(**settings))
    elif argv[0] == "verify" and len(argv) == 2:
        verify(argv[1])
        print(f"{argv[1]}: every file is as it was prepared")
    else:
        raise DataError(f"data.py takes `verify DIR` or `show DIR --sequence=N`, not {' '.join(argv)!r}")


if __name__ == "__main__":
    cli(main)
