import hashlib
import json
import os
import runpy
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from helpers import toy_data
from hypothesis import given, settings
from hypothesis import strategies as st

from data import PERIOD, TokenData, interleave, read_manifest, shuffle
from errors import DataError


def make(folder, sources, dtype="uint16", vocab_size=4096):
    """A data folder of {name: (weight, [sizes of train files], [sizes of val files])} with random ids; its tokens."""
    rng, tokens, manifest = np.random.default_rng(0), {}, {}
    for name, (weight, *sizes) in sources.items():
        manifest[name] = {"weight": weight}
        for split, lengths in zip(("train", "val"), sizes, strict=True):
            (folder / split).mkdir(parents=True, exist_ok=True)
            part = manifest[name][split] = {"tokens": sum(lengths), "documents": 1, "files": []}
            arrays = [rng.integers(0, vocab_size, length).astype(dtype) for length in lengths]
            for i, array in enumerate(arrays):
                file = f"{split}/{name}-{i:05d}.bin"
                array.astype(array.dtype.newbyteorder("<")).tofile(folder / file)
                sha = hashlib.sha256((folder / file).read_bytes()).hexdigest()
                part["files"].append({"name": file, "tokens": len(array), "sha256": sha})
            tokens[name, split] = np.concatenate(arrays).astype(np.int64)
    manifest = {"version": 1, "tokenizer": "t", "dtype": dtype, "vocab_size": vocab_size, "eot_token": 0} | {
        "sources": manifest
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return tokens


@pytest.fixture
def two(tmp_path):
    tokens = make(tmp_path, {"big": (3.0, [100, 7, 1, 393], [90]), "small": (1.0, [210], [31, 30])})
    return tmp_path, tokens


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="this system does not list what is open")
def test_many_files_are_not_held_open(tmp_path):
    make(tmp_path, {"many": (1.0, [7] * 300, [5] * 300)})
    before = len(os.listdir("/proc/self/fd"))
    splits = [TokenData(tmp_path, split, seq_len=10) for split in ("train", "val")]
    assert all(len(split.batch(0, 20)[0]) == 20 for split in splits)
    assert len(os.listdir("/proc/self/fd")) <= before + 2


def test_an_epoch_of_a_source_has_each_block_once_and_the_next_another_order(two):
    folder, tokens = two
    data = TokenData(folder, "train", seq_len=10)
    assert data.tokens == 501 + 210 and len(data) == 50 + 20 and data.vocab_size == 4096
    x, y = data.batch(0, 160)
    assert x.shape == y.shape == (160, 10) and x.dtype == y.dtype == torch.int64 and x.is_contiguous()
    assert torch.equal(x[:, 1:], y[:, :-1])
    seen = [(name, i) for row in torch.cat([x, y[:, -1:]], 1).numpy() for (name, i) in find(tokens, row)]
    big, small = ([i for name, i in seen if name == n] for n in ("big", "small"))
    assert len(big) == 120 and len(small) == 40  # 3 : 1
    assert sorted(big[:50]) == sorted(big[50:100]) == list(range(50)) and big[:50] != big[50:100]
    assert sorted(small[:20]) == sorted(small[20:40]) == list(range(20)) and small[:20] != small[20:40]


def find(tokens, row):
    """Which blocks of 10 tokens and one more, of which source, `row` is."""
    for name in ("big", "small"):
        all_blocks = np.lib.stride_tricks.sliding_window_view(tokens[name, "train"], 11)[::10]
        yield from ((name, int(i)) for i in np.flatnonzero((all_blocks == row).all(1)))


def test_the_stream_is_a_pure_function_of_seed_and_number(two):
    folder, _ = two
    data = TokenData(folder, "train", seq_len=10)
    x, _ = data.batch(37, 50)
    for i in (0, 1, 49):
        assert torch.equal(TokenData(folder, "train", 10).batch(37 + i, 1)[0][0], x[i])
    assert not torch.equal(TokenData(folder, "train", 10, seed=43).batch(37, 50)[0], x)
    assert data.batch(10**15, 2)[0].shape == (2, 10)  # any number, at once


def test_the_order_never_changes_between_versions(two):
    """A run that is resumed with a newer version of this file goes on in the same order: these are its first blocks."""
    source, block = TokenData(two[0], "train", seq_len=10).locate(0, 12)
    assert source.tolist() == [0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert block.tolist() == [48, 4, 9, 14, 16, 21, 3, 17, 6, 1, 10, 19]


def test_validation_is_every_block_once_in_an_order_that_no_seed_changes(two):
    folder, tokens = two
    data = TokenData(folder, "val", seq_len=10)
    assert len(data) == 8 + 6
    x, y = data.batch(0, len(data))
    rows = torch.cat([x, y[:, -1:]], 1).tolist()
    for name, blocks in (("big", 8), ("small", 6)):
        want = [tokens[name, "val"][i * 10 : i * 10 + 11].tolist() for i in range(blocks)]
        found = [row for row in rows if row in want]
        assert sorted(found) == sorted(want) and found != want
    assert torch.equal(TokenData(folder, "val", 10, seed=1).batch(3, 4)[0], x[3:7])
    with pytest.raises(DataError, match="14 sequences of 10, no more"):
        data.batch(10, 5)


@given(n=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
@settings(max_examples=60, deadline=None)
def test_shuffle_is_a_permutation(n, key):
    out = shuffle(np.arange(n, dtype=np.uint64), n, np.full(n, key, np.uint64))
    assert np.array_equal(np.sort(out), np.arange(n, dtype=np.uint64))


def test_shuffle_sends_every_element_everywhere_equally_often():
    """Chi-squared of where each of 20 elements lands under 4,000 keys; 361 degrees of freedom, 6 sigma."""
    n, trials = 20, 4000
    keys = np.random.default_rng(0).integers(0, 2**64, trials, dtype=np.uint64)
    index = np.tile(np.arange(n, dtype=np.uint64), trials)
    out = shuffle(index, n, np.repeat(keys, n))
    table = np.zeros((n, n))
    np.add.at(table, (index.astype(int), out.astype(int)), 1)
    chi = ((table - trials / n) ** 2 / (trials / n)).sum()
    assert abs(chi - 361) < 6 * np.sqrt(2 * 361)


@given(st.lists(st.integers(1, 400), min_size=1, max_size=7))
@settings(max_examples=60, deadline=None)
def test_every_prefix_of_an_interleaving_is_close_to_the_mix(counts):
    which, rank = interleave(counts)
    for s, count in enumerate(counts):
        mine = which == s
        assert np.array_equal(rank[mine], np.arange(count))
        ideal = np.arange(1, len(which) + 1) * count / len(which)
        assert np.abs(np.cumsum(mine) - ideal).max() <= len(counts) / 2 + 0.5


def test_weights_are_edited_in_the_manifest(two):
    def weighed(big, small):
        manifest = json.loads((two[0] / "manifest.json").read_text())
        manifest["sources"]["big"]["weight"], manifest["sources"]["small"]["weight"] = big, small
        (two[0] / "manifest.json").write_text(json.dumps(manifest))
        return TokenData(two[0], "train", 10)

    source, _ = weighed(1, 2).locate(0, 3000)
    assert np.bincount(source).tolist() == pytest.approx([1000, 2000], abs=2)
    alone = weighed(0, 2)
    assert alone.names == ["small"] and alone.tokens == 210 and len(alone) == 20
    rare, _ = weighed(1, 1e-9).locate(0, 3 * PERIOD)
    assert (rare == 1).sum() == 3  # never none at all
    with pytest.raises(DataError, match="0 tokens, too few"):
        weighed(0, 0)


def test_uint32_files(tmp_path):
    tokens = make(tmp_path, {"s": (1.0, [100], [100])}, "uint32", 150_000)
    assert TokenData(tmp_path, "val", 99).batch(0, 1)[0][0].tolist() == tokens["s", "val"][:99].tolist()


def test_too_few_tokens_name_seq_len(two):
    for split, seq_len, tokens in (("train", 501, 501), ("val", 5000, 90)):
        with pytest.raises(DataError, match=f"{split} split has {tokens} tokens, too few for seq_len={seq_len}"):
            TokenData(two[0], split, seq_len)
    assert len(TokenData(two[0], "train", 500)) == 1  # 501 tokens: one block and its last target


def test_ids_beyond_the_vocabulary_are_refused(two):
    folder, _ = two
    with open(folder / "val/big-00000.bin", "r+b") as f:
        f.seek(2 * 25)
        f.write((5000).to_bytes(2, "little"))
    data = TokenData(folder, "val", 10)
    with pytest.raises(DataError, match="token id 5,000 .* beyond vocab_size=4,096"):
        data.batch(0, len(data))


def damage(**changes):
    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text()) | changes
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


def damage_part(key, value):
    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest["sources"]["big"]["train"]["files"][0][key] = value
        (folder / "manifest.json").write_text(json.dumps(manifest))

    return change


@pytest.mark.parametrize(
    "break_it, message",
    [
        (lambda d: (d / "manifest.json").unlink(), "has no manifest.json.*prepare.py makes one"),
        (lambda d: (d / "manifest.json").write_text("{"), "manifest.json is malformed"),
        (lambda d: (d / "manifest.json").write_text("[]"), "manifest.json is malformed"),
        (lambda d: (d / "manifest.json").write_bytes(b"\xff"), "manifest.json is malformed"),
        (damage(version=2), "version is 2, not 1"),
        (damage(dtype="int8"), "malformed: 'int8'"),
        (damage(vocab_size=70_000), "do not fit"),
        (damage(eot_token=4096), "do not fit"),
        (damage(vocab_size="4096"), "do not fit"),
        (damage(eot_token=True), "do not fit"),
        (damage(sources={"big": {"weight": "1.0"}}), "a weight of 1.0"),
        (damage(sources={"big": {}}), "malformed: 'weight' is missing"),
        (damage_part("name", "../secret.bin"), "a file named '../secret.bin'"),
        (damage_part("name", "/etc/passwd"), "a file named '/etc/passwd'"),
        (damage_part("tokens", 99), "big-00000.bin has 200 bytes where the manifest says 198"),
        (damage_part("tokens", "100"), "malformed: train/big-00000.bin of '100' tokens"),
        (damage_part("tokens", 100.0), "malformed: train/big-00000.bin of 100.0 tokens"),
        (damage_part("sha256", None), "malformed: .* sha256 None"),
        (lambda d: (d / "train/small-00000.bin").unlink(), "small-00000.bin is in the manifest but not on disk"),
        (lambda d: (d / "val/big-00000.bin").write_bytes(b"12"), "has 2 bytes where the manifest says 180"),
    ],
)
def test_a_damaged_folder_is_refused_by_name(two, break_it, message):
    break_it(two[0])
    with pytest.raises(DataError, match=message):
        read_manifest(two[0])


def test_nothing_in_memory_grows_with_the_corpus(tmp_path):
    """4 GiB of tokens (a sparse file): opening them and taking a batch needs under 8 MB."""
    make(tmp_path, {"s": (1.0, [100], [100])})
    (tmp_path / "train/s-00000.bin").unlink()
    with open(tmp_path / "train/s-00000.bin", "wb") as f:
        f.truncate(2**32)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["sources"]["s"]["train"]["tokens"] = manifest["sources"]["s"]["train"]["files"][0]["tokens"] = 2**31
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    tracemalloc.start()
    data = TokenData(tmp_path, "train", 1024)
    data.batch(12345, 8)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(data) == 2**21 - 1 and peak < 8e6


def test_verify_names_the_altered_file(two):
    folder, _ = two
    command = [sys.executable, "data.py", "verify", str(folder)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "every file is as it was prepared" in done.stdout
    raw = bytearray((folder / "train/big-00003.bin").read_bytes())
    raw[17] ^= 1
    (folder / "train/big-00003.bin").write_bytes(raw)
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "altered since they were prepared: train/big-00003.bin;" in done.stderr


def test_show_prints_the_sequences_of_training(tmp_path, monkeypatch, capsys):
    """Their text, from the raw file: block b of the one source begins at token b · seq_len."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    folder = toy_data(tmp_path)
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(64)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    monkeypatch.setattr(sys, "argv", ["data.py", "show", str(folder), "--sequence=5-6", "--seq_len=16", "--seed=7"])
    runpy.run_path("data.py", run_name="__main__")
    out = capsys.readouterr().out.splitlines()
    tokens = np.fromfile(folder / "train" / "toy-00000.bin", "<u2")
    (_, blocks), data = TokenData(folder, "train", 16, seed=7).locate(5, 2), TokenData(folder, "train", 16, seed=7)
    for number, block, head, text in zip((5, 6), blocks, out[::2], out[1::2], strict=True):
        assert head == f"--- sequence {number}: toy, tokens {block * 16:,} and on"
        assert text.split() == [f"w{t}" for t in tokens[block * 16 : block * 16 + 16]]
        assert text.split() == [f"w{t}" for t in data.batch(number, 1)[0][0].tolist()]
    for argument, message in (("--sequence=6-5", "sequence='6-5'"), ("--sequense=1", "did you mean sequence")):
        monkeypatch.setattr(sys, "argv", ["data.py", "show", str(folder), argument])
        with pytest.raises(SystemExit) as e:
            runpy.run_path("data.py", run_name="__main__")
        err = capsys.readouterr().err
        assert e.value.code == 2 and message in err and err.count("\n") == 1
