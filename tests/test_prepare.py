import hashlib
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

import prepare
from data import DataError, TokenData, read_manifest, verify

TEXTS = [path.read_text() for path in sorted(Path().glob("*.py"))]  # something to train small tokenizers on


def script(*argv, **kwargs):
    return subprocess.run([sys.executable, "prepare.py", *argv], check=False, capture_output=True, text=True, **kwargs)


def one_line(done):
    """The message of a run that failed as it should."""
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers


@pytest.fixture(scope="module")
def own():
    """The dict of a tokenizer.json that prepare.py trains."""
    return json.loads(prepare.train_tokenizer(TEXTS, 700))


def with_added_tokens(spec):
    """As Qwen2.5 has them: some special, some not, which `tokenizers` finds in text."""
    fields = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    new = [("<|im_end|>", True), ("<tool_call>", False), ("e\u0301é", False)]
    new = [fields | {"id": 700 + i, "content": content, "special": special} for i, (content, special) in enumerate(new)]
    return spec | {"added_tokens": spec["added_tokens"] + new}


def as_gpt2(spec):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return spec | {"normalizer": None, "pre_tokenizer": byte_level}


def with_digits(spec):
    """A pre-tokenizer in three steps, which is not one pattern."""
    steps = [{"type": "Digits", "individual_digits": True}, *spec["pre_tokenizer"]["pretokenizers"]]
    return spec | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}


def reordered(spec):
    """Two merges change places: ids are no longer the order of joining."""
    merges = list(spec["model"]["merges"])
    merges[5], merges[300] = merges[300], merges[5]
    return spec | {"model": spec["model"] | {"merges": merges}}


def unreachable(spec):
    """A merge is missing: its product stands in the vocabulary, but `tokenizers` never makes it."""
    return spec | {"model": spec["model"] | {"merges": spec["model"]["merges"][:-1]}}


def lowercase(spec):
    return spec | {"normalizer": {"type": "Lowercase"}}


KINDS = {
    "own": (lambda spec: spec, "tiktoken"),
    "added": (with_added_tokens, "tiktoken"),
    "gpt2": (as_gpt2, "tiktoken"),
    "digits": (with_digits, "tokenizers"),
    "reordered": (reordered, "tokenizers"),
    "unreachable": (unreachable, "tokenizers"),
    "lowercase": (lowercase, "tokenizers"),
}


@pytest.fixture(scope="module")
def encoders(own, tmp_path_factory):
    """{kind: (our encoder, the same tokenizer in `tokenizers`)}"""
    made = {}
    for name, (change, kind) in KINDS.items():
        path = tmp_path_factory.mktemp(name) / "tokenizer.json"
        path.write_text(json.dumps(change(own)))
        encode, got = prepare.make_encoder(path)
        assert got == kind, name
        reference = Tokenizer.from_file(str(path))
        reference.encode_special_tokens = True  # special tokens in text are text
        made[name] = (encode, lambda text, t=reference: t.encode(text, add_special_tokens=False).ids)
    return made


PIECES = st.sampled_from(
    ["<|endoftext|>", "<|im_end|>", "<tool_call>", "e\u0301é", "\r\n", "\r", "\0", " " * 30, "\t\t", "\n\n", "don't"]
    + ["'LL", "ſ", "\u212b", "\u1100\u1161", "\ufeff", "\u2028", "def f(self):\n        return", "12345", "…", "—", "İ"]
)


@given(st.lists(st.one_of(PIECES, st.text(max_size=12)), max_size=12).map("".join))
@example("a\u0323\u0307 \u0307\u0323")  # marks that NFC reorders
@example("x\u2019y\u0301")
@settings(max_examples=300, deadline=None)
def test_ids_equal_those_of_tokenizers_on_any_text(encoders, text):
    for name, (encode, reference) in encoders.items():
        assert encode(text).tolist() == reference(text), name


def test_ids_equal_those_of_tokenizers_on_long_runs(encoders):
    for text in (" " * 200_000 + "x", "\n" * 100_000, "ab" * 100_000, "=" * 100_000 + " a" * 1000):
        for name in ("own", "gpt2"):
            encode, reference = encoders[name]
            assert encode(text).tolist() == reference(text)


def test_characters_taken_for_inert_are_inert():
    """The shortcut around NFC: alone and between letters, none of these characters changes or is changed."""
    normalize = normalizers.NFC().normalize_str
    inert = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000 and prepare.INERT(chr(i))]
    assert len(inert) > 700
    text = "".join(f"{c}a{c}E{c}" for c in inert)
    assert normalize(text) == text


def test_a_trained_tokenizer_opens_alike_in_transformers(own, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.json").write_text(json.dumps(own))
    config = '{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    theirs, encode = AutoTokenizer.from_pretrained(tmp_path), prepare.make_encoder(tmp_path / "tokenizer.json")[0]
    for text in [*(text.replace(prepare.EOT, "") for text in TEXTS), "don't e\u0301 12345 \r\n  x\u212b"]:
        assert theirs(text)["input_ids"] == encode(text).tolist()
    assert theirs.eos_token_id == 0


# ---------------------------------------------------------------------------------------------------------------------
# Local text


def test_the_default_corpus(tmp_path):
    done = script(f"--out_dir={tmp_path}/d", "--vocab_size=1000")
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout
    manifest = read_manifest(tmp_path / "d")
    assert list(manifest["sources"]) == ["stdlib"] and manifest["vocab_size"] == 1000
    assert (
        manifest["sources"]["stdlib"]["train"]["tokens"] > 3e6 and manifest["sources"]["stdlib"]["val"]["tokens"] > 5e4
    )
    ids = np.fromfile(tmp_path / "d/train/stdlib-00000.bin", "<u2")
    tokenizer = Tokenizer.from_file(str(tmp_path / "d/tokenizer.json"))
    head = tokenizer.decode(ids[: 1 + int(np.argmax(ids == manifest["eot_token"]))].tolist(), skip_special_tokens=False)
    paths = [path for path in prepare.standard_library() if not prepare.held_out(path.read_bytes().decode(), 0.05)]
    assert head == paths[0].read_bytes().decode() + "<|endoftext|>"
    assert any(path.name == "topics.py" for path in paths) and not any("site-packages" in str(p) for p in paths)
    verify(tmp_path / "d")
    again = script(f"--out_dir={tmp_path}/d", "--vocab_size=1000")
    assert again.returncode == 0 and "encoding" not in again.stdout  # nothing left to do


@pytest.fixture
def corpus(tmp_path, own):
    """A folder of every kind of file, its documents in order, and a tokenizer for it."""
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / ".hidden").mkdir()
    (folder / ".hidden/x.txt").write_text("not this one")
    (folder / "image.png").write_bytes(b"\xff\xfe")
    documents = []
    for i in range(60):
        documents.append(f"Document {i}, naïve.\r\n" * (i + 1) + ("<|endoftext|>" if i % 7 == 0 else "") + "e\u0301\n")
        if i < 8:
            (folder / f"{i:02d}.{['txt', 'md', 'py'][i % 3]}").write_bytes(documents[-1].encode())
    rows = [json.dumps({"id": i, "text": text}) for i, text in enumerate(documents[8:40])]
    (folder / "sub/a.jsonl").write_text("\n".join([*rows, "", json.dumps({"id": 20, "text": ""})]) + "\n")
    table = pyarrow.table({"text": documents[40:], "other": list(range(20))})
    pyarrow.parquet.write_table(table, folder / "sub/b.parquet", row_group_size=7)
    (tmp_path / "tok").mkdir()
    (tmp_path / "tok/tokenizer.json").write_text(json.dumps(own))
    return folder, documents, tmp_path / "tok"


def test_every_kind_of_file_and_any_number_of_processes(corpus, tmp_path):
    folder, documents, tok = corpus
    outs = []
    for num_proc in (1, 3):
        out = tmp_path / f"out{num_proc}"
        prepare.main([f"--input={folder}", f"--tokenizer={tok}", f"--out_dir={out}", f"--num_proc={num_proc}"])
        outs.append({p.relative_to(out): p.read_bytes() for p in out.rglob("*") if p.is_file()})
    assert outs[0] == outs[1]

    tokenizer = Tokenizer.from_file(str(tok / "tokenizer.json"))
    tokenizer.encode_special_tokens = True
    want = {"train": [], "val": []}
    for text in documents:  # the definition of section 5: a hash below the fraction is validation
        hashed = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")
        want["val" if hashed < 0.05 * 2**64 else "train"].append(tokenizer.encode(text).ids + [0])
    for split, rows in want.items():
        assert rows and np.fromfile(out / f"{split}/corpus-00000.bin", "<u2").tolist() == [
            i for row in rows for i in row
        ]
        part = read_manifest(out)["sources"]["corpus"][split]
        assert part["documents"] == len(rows) and part["tokens"] == sum(map(len, rows))
    verify(out)


def test_a_long_file_is_cut_at_line_ends(tmp_path):
    lines = [f"line {i} é\r\n" for i in range(40_000)]
    (tmp_path / "long.txt").write_bytes("".join(lines).encode())
    pieces = [text for text, _ in prepare.read_text(tmp_path / "long.txt")]
    assert "".join(pieces) == "".join(lines) and len(pieces) > 30
    assert all(piece.endswith("\n") and len(piece.encode()) < prepare.CUT + 100 for piece in pieces)
    (tmp_path / "one_line.txt").write_text("日本語" * 200_000)
    assert "".join(text for text, _ in prepare.read_text(tmp_path / "one_line.txt")) == "日本語" * 200_000


def test_65536_ids_need_uint32(corpus, own, tmp_path):
    folder, _, _ = corpus
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    far = own["added_tokens"] + [token | {"id": 65_535, "content": "<|last|>"}]
    spec = own | {"added_tokens": far}
    spec["model"] = own["model"] | {"vocab": own["model"]["vocab"] | {"<|last|>": 65_535}}
    (tmp_path / "big.json").write_text(json.dumps(spec))
    prepare.main([f"--input={folder}", f"--tokenizer={tmp_path}/big.json", f"--out_dir={tmp_path}/d"])
    manifest = read_manifest(tmp_path / "d")
    assert (manifest["dtype"], manifest["vocab_size"]) == ("uint32", 65_536)
    assert TokenData(tmp_path / "d", "train", 16).batch(0, 4)[0].max() < 700


def test_templates_weights_and_sources(corpus, tmp_path, capsys):
    folder, _, tok = corpus
    config = tmp_path / "c.py"
    text = f"tokenizer = {str(tok)!r}\nout_dir = {str(tmp_path / 'd')!r}\nval_fraction = 0.2\nsources = [\n"
    one = f"    dict(name='rows', input={str(folder / 'sub/a.jsonl')!r}, text='Row {{id}}: {{text}}', weight=3),\n"
    two = f"    dict(input=[{str(folder / '00.txt')!r}, {str(folder / 'sub')!r}], name='rest'),\n"
    config.write_text(text + one + two + "]\n")
    prepare.main([str(config)])
    sources = read_manifest(tmp_path / "d")["sources"]
    assert sources["rows"]["weight"] == 3 and sources["rest"]["weight"] == sources["rest"]["train"]["tokens"] / 1e6
    rows = Tokenizer.from_file(str(tok / "tokenizer.json"))
    ids = np.fromfile(tmp_path / "d/train/rows-00000.bin", "<u2").tolist()
    assert rows.decode(ids).startswith("Row ") and ids.count(0) == sources["rows"]["train"]["documents"]

    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "d").rglob("*.bin")}
    config.write_text(text + one.replace("weight=3", "weight=0.5") + "]\n")
    capsys.readouterr()
    prepare.main([str(config)])  # another weight, one source left out: only a manifest is written
    assert "encoding" not in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "d").rglob("*.bin")} == before
    assert {n: s["weight"] for n, s in read_manifest(tmp_path / "d")["sources"].items()} == {"rows": 0.5}


def checksums(folder):
    """Of all that matters: token files, tokenizer and manifest."""
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.fixture
def file_by_file(monkeypatch):
    monkeypatch.setattr(prepare, "UNIT", 1)  # every file a unit of its own


def test_a_failed_run_goes_on_where_it_stopped(corpus, tmp_path, file_by_file):
    folder, _, tok = corpus
    argv = [f"--input={folder}", f"--tokenizer={tok}", "--num_proc=1"]
    good = (folder / "04.md").read_bytes()
    prepare.main([*argv, f"--out_dir={tmp_path}/undisturbed"])
    stamp = (folder / "04.md").stat()
    (folder / "04.md").write_bytes(good[:-9] + b"\xff" + good[-8:])
    os.utime(folder / "04.md", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    with pytest.raises(DataError, match=rf"04.md: byte {len(good) - 9} is not UTF-8"):
        prepare.main([*argv, f"--out_dir={tmp_path}/d"])
    assert not (tmp_path / "d/manifest.json").exists() and not list((tmp_path / "d").rglob("*.partial"))
    first = tmp_path / "d/train/corpus-00000.bin"
    before = first.stat().st_mtime_ns
    (tmp_path / "d/train/corpus-00004.bin.partial").write_bytes(b"what SIGKILL leaves")
    (folder / "04.md").write_bytes(good)
    os.utime(folder / "04.md", ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    prepare.main([*argv, f"--out_dir={tmp_path}/d"])
    assert first.stat().st_mtime_ns == before  # not done again
    assert checksums(tmp_path / "d") == checksums(tmp_path / "undisturbed")


def test_shares_of_the_work_merge(corpus, tmp_path, file_by_file, capsys):
    folder, _, tok = corpus
    argv = [f"--input={folder}", f"--tokenizer={tok}", "--num_proc=1"]
    prepare.main([*argv, f"--out_dir={tmp_path}/whole"])
    for share in ("2/3", "0/3"):
        prepare.main([*argv, f"--out_dir={tmp_path}/d", f"--shard={share}"])
        assert f"share {share} is done" in capsys.readouterr().out and not (tmp_path / "d/manifest.json").exists()
    prepare.main([*argv, f"--out_dir={tmp_path}/d", "--shard=1/3"])
    assert checksums(tmp_path / "d") == checksums(tmp_path / "whole")


def test_what_is_prepared_is_not_overwritten(corpus, tmp_path):
    folder, _, tok = corpus
    argv = [f"--input={folder}", f"--out_dir={tmp_path}/d", "--num_proc=1"]
    prepare.main([*argv, f"--tokenizer={tok}"])
    before = checksums(tmp_path / "d")
    assert "was prepared with tokenizer=" in one_line(script(*argv, "--vocab_size=300"))
    assert "from other text or settings" in one_line(script(*argv, f"--tokenizer={tok}", "--val_fraction=0.1"))
    (folder / "00.txt").write_text("changed")
    assert "from other text or settings" in one_line(script(*argv, f"--tokenizer={tok}"))
    assert checksums(tmp_path / "d") == before


def test_a_full_disk_leaves_nothing_half_written(corpus, tmp_path):
    folder, _, tok = corpus
    (folder / "much.txt").write_text("word " * 500_000)
    argv = [f"--input={folder}", f"--out_dir={tmp_path}/d", f"--tokenizer={tok}", "--num_proc=1"]
    limit = (resource.RLIMIT_FSIZE, (400_000, 400_000))
    assert "corpus-00000.bin" in one_line(script(*argv, preexec_fn=lambda: resource.setrlimit(*limit)))
    assert not list((tmp_path / "d").rglob("*.bin*")) and not (tmp_path / "d/manifest.json").exists()
    assert script(*argv).returncode == 0
    verify(tmp_path / "d")


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: the script's one line


@pytest.mark.parametrize(
    "content, argv, message",
    [
        (None, [], "input 'FILE' is no file or folder"),
        (b"x", ["--inptu=x"], "--inptu: unknown key; did you mean input?"),
        (b"x", ["--vocab_size=many"], "--vocab_size: 'many' is not int"),
        (b"x", ["--vocab_size=256"], "vocab_size=256: 257 at least"),
        (b"x", ["--tokenizer=a", "--vocab_size=300"], "tokenizer and vocab_size are both set"),
        (b"x", ["--val_fraction=1"], "val_fraction=1.0: from 0 to below 1"),
        (b"x", ["--num_proc=0"], "num_proc=0: 1 at least"),
        (b"x", ["--shard=4/4"], "shard='4/4': i/n with i from 0 to n-1"),
        (b"x", ["--tokenizer=./no/such"], "tokenizer './no/such'"),
        (b"x", ["--tokenizer=tests/golden"], "tokenizer 'tests/golden'"),
        (b"x", ["--tokenizer=pyproject.toml"], "tokenizer 'pyproject.toml': no readable tokenizer.json"),
        (b"", ["--vocab_size=300"], "an empty corpus"),
        (b"good \xe2\x82", [], "FILE: byte 5 is not UTF-8"),
    ],
)
def test_bad_input_gets_one_line(tmp_path, content, argv, message):
    file = tmp_path / "in.txt"
    if content is not None:
        file.write_bytes(content)
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = script(f"--input={file}", f"--out_dir={tmp_path}/d", *argv, env=offline)
    assert message.replace("FILE", str(file)) in one_line(done)
    assert not (tmp_path / "d/manifest.json").exists() and not list(tmp_path.rglob("*.bin*"))


@pytest.mark.parametrize(
    "name, content, text_key, message",
    [
        ("a.bin", b"x", "text", "a.bin': the extension is not one of .txt .md .py .jsonl .parquet"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "text", "a.jsonl, line 2: no column 'text', only body"),
        ("a.jsonl", b'{"text": "x"}\n', "{title} {text}", "a.jsonl, line 1: no column 'title', only text"),
        ("a.jsonl", b'{"text": 5}\n', "text", "a.jsonl, line 1: 'text' is int, not text"),
        ("a.jsonl", b'{"text": "x"}\nx\n', "text", "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'["text"]\n', "text", "a.jsonl, line 1: a list, not an object"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xff"}\n', "text", "a.jsonl: byte 24 is not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "text", "a.jsonl, line 1: character 0 is a lone surrogate"),
        ("a.parquet", b"PAR1 not really", "text", "a.parquet: not a readable parquet file"),
        ("folder/a.csv", b"x", "text", "no .txt .md .py .jsonl .parquet file in input"),
    ],
)
def test_files_that_cannot_be_read_are_named(tmp_path, name, content, text_key, message):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    given = path.parent if "/" in name else path
    with pytest.raises(DataError) as e:
        prepare.main([f"--input={given}", f"--text_key={text_key}", f"--out_dir={tmp_path}/d", "--vocab_size=300"])
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "d").exists()


def test_help_lists_every_key():
    done = script("--help")
    keys = "input text_key tokenizer vocab_size out_dir val_fraction num_proc shard sources"
    assert done.returncode == 0 and all(f"--{key}=" in done.stdout for key in keys.split())
