import hashlib
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from random import Random

import numpy as np
import pyarrow.parquet
import pytest
from hub import publish_mixture, serve
from tokenizers import Tokenizer

import prepare
import sources
from data import TokenData, read_manifest, verify
from errors import ConfigError, DataError
from tokenizer import train_tokenizer


def script(*argv, **kwargs):
    return subprocess.run([sys.executable, "prepare.py", *argv], check=False, capture_output=True, text=True, **kwargs)


def one_line(done):
    """The message of a run that failed as it should."""
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    return done.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Local text


@pytest.fixture(scope="module")
def own():
    """The dict of a small tokenizer.json."""
    return json.loads(train_tokenizer([path.read_text() for path in Path().glob("*.py")], 700))


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
    paths = [path for path in sources.standard_library() if not prepare.held_out(path.read_bytes().decode(), 0.05)]
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
    pieces = [text for text, _ in sources.read_plain(tmp_path / "long.txt")]
    assert "".join(pieces) == "".join(lines) and len(pieces) > 30
    assert all(piece.endswith("\n") and len(piece.encode()) < sources.CUT + 100 for piece in pieces)
    (tmp_path / "one_line.txt").write_text("日本語" * 200_000)
    assert "".join(text for text, _ in sources.read_plain(tmp_path / "one_line.txt")) == "日本語" * 200_000


def test_65536_ids_need_uint32(corpus, own, tmp_path):
    folder, _, _ = corpus
    token = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    far = own["added_tokens"] + [token | {"id": 65_535, "content": "<|last|>"}]
    spec = own | {"added_tokens": far}
    spec["model"] = own["model"] | {"vocab": own["model"]["vocab"] | {"<|last|>": 65_535}}
    (tmp_path / "big.json").write_text(json.dumps(spec))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
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
        if p.is_file() and p.suffix != ".partial"
    }


@pytest.fixture
def file_by_file(monkeypatch):
    monkeypatch.setattr(sources, "UNIT", 1)  # every file a unit of its own


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
    assert f"was prepared with {tok}, not with a BPE of vocab_size=300" in one_line(script(*argv, "--vocab_size=300"))
    assert "from other text or settings" in one_line(script(*argv, f"--tokenizer={tok}", "--val_fraction=0.1"))
    (folder / "00.txt").write_text("changed")
    assert "from other text or settings" in one_line(script(*argv, f"--tokenizer={tok}"))
    assert checksums(tmp_path / "d") == before


def test_text_that_is_named_twice_or_marked_by_windows(tmp_path, own):
    """A file counts once, by whatever name; the mark that Windows puts before UTF-8 is no text, in text as in rows."""
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(own))
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_bytes(b"\xef\xbb\xbfplain")
    (tmp_path / "in" / "b.jsonl").write_bytes(b"\xef\xbb\xbf" + b'{"text": "in a row"}\n')
    names = f"{tmp_path}/in,{tmp_path}/in/../in/a.txt"
    done = script(f"--input={names}", f"--tokenizer={tmp_path}/t", f"--out_dir={tmp_path}/d", "--val_fraction=0")
    assert done.returncode == 0, done.stderr
    ids = np.fromfile(tmp_path / "d/train/in-00000.bin", "<u2").tolist()
    text = Tokenizer.from_file(str(tmp_path / "t/tokenizer.json")).decode(ids, skip_special_tokens=False)
    assert text == "plain<|endoftext|>in a row<|endoftext|>"


def test_what_was_empty_can_be_filled(tmp_path):
    (tmp_path / "e.txt").write_text("")
    (tmp_path / "more.txt").write_text("some words, enough to train a small tokenizer on\n" * 50)
    argv = [f"--input={tmp_path}/e.txt,{tmp_path}/more.txt", f"--out_dir={tmp_path}/d", "--vocab_size=270"]
    assert "documents fell into validation" in one_line(script(*argv, "--val_fraction=0.999999"))
    assert "no document fell into validation, which train.py needs: more text" in one_line(script(*argv))
    assert script(*argv, "--val_fraction=0").returncode == 0
    with pytest.raises(DataError, match="no validation tokens: prepare it again with a higher val_fraction"):
        TokenData(tmp_path / "d", "val", 8)
    # A tokenizer that was trained on no text does not stay for what comes into its place.
    argv = [f"--input={tmp_path}/e.txt", f"--out_dir={tmp_path}/e", "--vocab_size=270", "--val_fraction=0"]
    assert "an empty corpus" in one_line(script(*argv))
    shutil.copy(tmp_path / "more.txt", tmp_path / "e.txt")
    assert script(*argv).returncode == 0 and read_manifest(tmp_path / "e")["vocab_size"] == 270


@pytest.mark.parametrize("end", [99999, -1, "abc", True])
def test_an_end_of_text_that_is_no_id_is_refused_before_anything_is_encoded(end, tmp_path, own):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "tokenizer.json").write_text(json.dumps(own))
    (tmp_path / "t" / "generation_config.json").write_text(json.dumps({"eos_token_id": end}))
    (tmp_path / "a.txt").write_text("text")
    message = one_line(script(f"--input={tmp_path}/a.txt", f"--tokenizer={tmp_path}/t", f"--out_dir={tmp_path}/d"))
    whole = type(end) is int
    said = (
        "end a text with {!r}, which is none of its 700 ids"
        if whole
        else "eos_token_id={!r} is no id, nor a list of them"
    )
    assert said.format(end) in message and not (tmp_path / "d" / "train").exists()


def test_a_full_disk_leaves_nothing_half_written(corpus, tmp_path):
    folder, _, tok = corpus
    (folder / "much.txt").write_text("word " * 500_000)
    argv = [f"--input={folder}", f"--out_dir={tmp_path}/d", f"--tokenizer={tok}", "--num_proc=1"]
    limit = (resource.RLIMIT_FSIZE, (400_000, 400_000))
    assert "corpus-00000.bin" in one_line(script(*argv, preexec_fn=lambda: resource.setrlimit(*limit)))
    assert not list((tmp_path / "d").rglob("*.bin*")) and not (tmp_path / "d/manifest.json").exists()
    assert script(*argv).returncode == 0
    verify(tmp_path / "d")


KILLS = int(os.environ.get("KILLS", "0"))  # KILLS=20 pytest tests/test_prepare.py -k kill


@pytest.mark.parametrize("where", ["local", pytest.param("hub", marks=pytest.mark.skipif(not KILLS, reason="KILLS"))])
def test_kill_at_random_moments(where, corpus, tmp_path):
    """After SIGKILL no process stays, and the run that follows ends with the bytes of an undisturbed one."""
    folder, _, tok = corpus
    for i in range(12):
        (folder / f"more{i}.txt").write_text(f"{i} more text, naïve or not. " * 8000)
    launcher = "import prepare, sources; sources.UNIT = 1; prepare.cli(prepare.main)"
    argv = [sys.executable, "-c", launcher, f"--tokenizer={tok}", "--num_proc=2"]
    argv += [f"--input={folder}"] if where == "local" else ["--sources=[{'id': 'roneneldan/TinyStories'}]"]
    if where == "hub":
        publish_mixture(tmp_path / "hub", stories=20_000)
    with serve(tmp_path / "hub") as env:
        options = {"env": os.environ | env, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        began = time.monotonic()
        subprocess.run([*argv, f"--out_dir={tmp_path}/undisturbed"], check=True, **options)
        seconds, random = time.monotonic() - began, Random(0)
        for kill in range(KILLS or 4):
            out = tmp_path / f"killed{kill}"
            run = subprocess.Popen([*argv, f"--out_dir={out}"], start_new_session=True, **options)
            time.sleep(random.uniform(0.2, 1) * seconds)
            run.kill()
            run.wait()
            deadline = time.monotonic() + 20
            with suppress(ProcessLookupError):
                while time.monotonic() < deadline:
                    os.killpg(run.pid, 0)  # somebody is left in its session
                    time.sleep(0.05)
                pytest.fail("a process outlived its parent")
            subprocess.run([*argv, f"--out_dir={out}"], check=True, **options)
            assert checksums(out) == checksums(tmp_path / "undisturbed")


# ---------------------------------------------------------------------------------------------------------------------
# Data sets of the hub


@pytest.fixture(scope="module")
def mixture(own, tmp_path_factory):
    """(environment of a hub with the seven sources, finished data folder, what prepare.py printed)."""
    root = tmp_path_factory.mktemp("hub")
    publish_mixture(root)
    (root / "models/Qwen/Qwen2.5-0.5B").mkdir(parents=True)
    (root / "models/Qwen/Qwen2.5-0.5B/tokenizer.json").write_text(json.dumps(own))
    with serve(root) as hub:
        done = script("config/mixture.py", f"--out_dir={root}/d", "--num_proc=2", env=os.environ | hub)
        assert done.returncode == 0, done.stderr
        yield hub, root / "d", done.stdout


def rows_of(hub, id, pattern):
    import pyarrow.parquet

    paths = sorted((hub.server.root / "datasets" / id).rglob(pattern))
    return [pyarrow.parquet.read_table(path).to_pylist() for path in paths]


def test_the_mixture(mixture):
    hub, out, _ = mixture
    sources = read_manifest(out)["sources"]
    cosmopedia = [name for name in sources if name.startswith("cosmopedia-")]
    documents = {  # the shares of config/mixture.py of what tests/hub.py publishes; an article of wikitext is one
        "wikitext-wikitext-103-raw-v1": (35, 4),
        "cnn_dailymail-3.0.0": (60, 9),
        "US-PD-Books": (20, 0),
        **dict.fromkeys(cosmopedia, (30, 0)),
        "sciq": (50, 6),
        "codeparrot-clean-valid": (60, 0),
        "TinyStories": (800, 20),
    }
    assert list(sources) == list(documents) and len(cosmopedia) == 8
    for name, (train, val) in documents.items():
        source = sources[name]
        if val:
            assert (source["train"]["documents"], source["val"]["documents"]) == (train, val), name
        else:  # split by the hash
            assert source["train"]["documents"] + source["val"]["documents"] == train, name
        assert source["weight"] == source["train"]["tokens"] / 1e6
    verify(out)

    tokenizer = Tokenizer.from_file(str(out / "tokenizer.json"))
    articles = [row["article"] for rows in rows_of(hub, "abisee/cnn_dailymail", "train-*") for row in rows[:20]]
    want = [i for text in articles for i in [*tokenizer.encode(text).ids, 0]]
    files = [out / file["name"] for file in sources["cnn_dailymail-3.0.0"]["train"]["files"]]
    assert np.concatenate([np.fromfile(file, "<u2") for file in files]).tolist() == want

    def first(name, split="train"):
        ids = np.fromfile(out / sources[name][split]["files"][0]["name"], "<u2").tolist()
        return tokenizer.decode(ids[: ids.index(0)])

    row = rows_of(hub, "allenai/sciq", "validation-*")[0][0]
    assert first("sciq", "val") == "Question: {question}\n{support}\nAnswer: {correct_answer}".format(**row)
    article = "".join(row["text"] for row in rows_of(hub, "Salesforce/wikitext", "train-*")[0][:5])
    assert first("wikitext-wikitext-103-raw-v1") == article and article.count(" = ") == 4


def test_a_mixture_changes_without_reading_again(mixture, tmp_path):
    hub, out, _ = mixture
    config = tmp_path / "c.py"
    config.write_text(
        Path("config/mixture.py").read_text() + "sources = [sources[0] | {'weight': 0.25}, sources[-1]]\n"
    )
    shutil.copytree(out, tmp_path / "d")
    hub.server.log.clear()
    done = script(str(config), f"--out_dir={tmp_path}/d", env=os.environ | hub)
    assert done.returncode == 0, done.stderr
    weights = {name: source["weight"] for name, source in read_manifest(tmp_path / "d")["sources"].items()}
    assert list(weights) == ["wikitext-wikitext-103-raw-v1", "TinyStories"] and weights.popitem()[1] != 0.25
    assert not any(".parquet" in path for method, path in hub.server.log if method == "GET")


def test_a_source_that_fails_is_named_and_leaves_the_others(mixture, tmp_path):
    hub, out, _ = mixture
    config = tmp_path / "c.py"
    config.write_text(Path("config/mixture.py").read_text() + "sources = [sources[1], sources[-1] | {'files': 3}]\n")
    launcher = "import prepare, sources; sources.RETRIES = 2; prepare.cli(prepare.main)"
    argv = [sys.executable, "-c", launcher, str(config), f"--out_dir={tmp_path}/d", "--num_proc=1"]
    options = {"env": os.environ | hub, "capture_output": True, "text": True}
    hub.server.fail = lambda method, path: 403 if "TinyStories" in path and "train-00002" in path else None
    done = subprocess.run(argv, check=False, **options)
    message = one_line(done)
    assert "source TinyStories: roneneldan/TinyStories, train file 3 of 4: " in message and "403" in message
    assert "attempt 2 of 2 follows" in done.stdout
    sealed = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d/train").iterdir()}
    assert {name[:-10] for name in sealed} == {"cnn_dailymail-3.0.0", "TinyStories"} and len(sealed) == 5
    assert not (tmp_path / "d/manifest.json").exists()

    card = hub.server.root / "datasets/roneneldan/TinyStories/README.md"
    card.write_text(card.read_text() + "edited meanwhile: another commit\n")
    broken = iter([403])  # the first time only: the second attempt succeeds
    hub.server.fail = lambda method, path: next(broken, None) if "train-00002" in path else None
    done = subprocess.run(argv, check=False, **options)
    hub.server.fail = lambda method, path: None
    assert done.returncode == 0 and "attempt 2 of 2 follows" in done.stdout
    assert sealed.items() <= {path.name: path.stat().st_mtime_ns for path in (tmp_path / "d/train").iterdir()}.items()
    assert read_manifest(tmp_path / "d")["sources"]["TinyStories"]["train"]["documents"] == 600  # 3 of its 4 files
    for file in (tmp_path / "d").rglob("*.bin"):
        assert file.read_bytes() == (out / file.relative_to(tmp_path / "d")).read_bytes()


def test_one_failure_while_planning_or_sampling_does_not_end_a_run(mixture, tmp_path):
    hub, _, _ = mixture
    launcher = "import prepare, sources; sources.RETRIES = 2; prepare.cli(prepare.main)"
    argv = [sys.executable, "-c", launcher, "--sources=[{'id': 'roneneldan/TinyStories'}]", "--num_proc=1"]
    for name, place in (("plan", "/api/datasets/roneneldan/TinyStories"), ("sample", "train-00002")):
        broken = iter([403])
        hub.server.fail = lambda method, path, place=place, broken=broken: next(broken, None) if place in path else None
        whole = [*argv, f"--out_dir={tmp_path}/{name}", "--vocab_size=300"]
        done = subprocess.run(whole, check=False, capture_output=True, text=True, env=os.environ | hub)
        hub.server.fail = lambda method, path: None
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("attempt 2 of 2 follows") == 1
        assert done.stdout.index("attempt 2") < done.stdout.index("encoding with")
    assert checksums(tmp_path / "plan") == checksums(tmp_path / "sample")


def test_a_data_set_that_cannot_be_is_refused(mixture, tmp_path):
    cases = [
        ({"id": "no/such"}, "source such: no/such: "),
        ({"id": "abisee/cnn_dailymail", "subset": "4"}, "cnn_dailymail-4: abisee/cnn_dailymail: BuilderConfig '4' not"),
        ({"id": "roneneldan/TinyStories", "split": "trian"}, "TinyStories: Bad split: trian"),
        ({"id": "roneneldan/TinyStories", "text": "story"}, "no column 'story', only text"),
        ({"id": "codeparrot/codeparrot-clean-valid", "text": "content", "share": 0.5}, "no share=0.5 of it"),
    ]
    one_process = """
import json, sys, prepare
for source in json.loads(sys.argv[1]):
    try:
        prepare.main([f"--sources=[{source}]", f"--out_dir={sys.argv[2]}"])
    except prepare.DataError as e:
        print(e)
"""
    argv = [sys.executable, "-c", one_process, json.dumps([source for source, _ in cases]), str(tmp_path / "d")]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, env=os.environ | mixture[0])
    for (_, message), line in zip(cases, done.stdout.splitlines(), strict=True):
        assert message in line
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    "source, message",
    [
        ({"id": "a/b", "shrae": 1}, "sources[0]: unknown key 'shrae'; did you mean share?"),
        ({"id": "a/b", "share": "half"}, "sources[0]: share: 'half' is not float"),
        ({"id": "a/b", "share": 0}, "share=0.0 must lie in (0, 1]"),
        ({"input": ["README.md"], "files": 2}, "files=2 is for data sets of the hub: name fewer local files"),
        ({"id": "a/b", "weight": -1}, "weight=-1.0 must not be negative"),
        ({"name": "x"}, "sources[0]: set either id, a data set of the hub, or input, local files"),
        ({"id": "a/b", "join": "("}, "sources[0]: join='(' is no regular expression: "),
        ({"id": "a/b", "nmae": 1, "share": 2}, "did you mean name?; share=2.0 must lie in (0, 1]"),
        ({"input": "Makefile"}, "input 'Makefile': the extension is not one of"),
    ],
)
def test_a_source_that_cannot_be_is_refused(tmp_path, source, message):
    with pytest.raises((DataError, ConfigError)) as e:
        prepare.main([f"--sources=[{source}]", f"--out_dir={tmp_path}/d"])
    assert message in str(e.value) and not (tmp_path / "d").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Bad input: the script's one line


@pytest.mark.parametrize(
    "content, argv, message",
    [
        (None, [], "input 'FILE' is no file or folder"),
        (b"x", ["--inptu=x"], "--inptu: unknown key; did you mean input?"),
        (b"x", ["--vocab_size=many"], "--vocab_size: 'many' is not int"),
        (b"x", ["--vocab_size=256"], "vocab_size=256 must be at least 257"),
        (b"x", ["--tokenizer=a", "--vocab_size=300"], "tokenizer and vocab_size are both set"),
        (b"x", ["--val_fraction=1"], "val_fraction=1.0 must lie in [0, 1)"),
        (b"x", ["--num_proc=0"], "num_proc=0 must be at least 1"),
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


def test_patterns_and_the_encodings_that_python_files_name(tmp_path):
    """What lies in a folder of Python packages: latin-1 sources, data in other formats, hidden files."""
    below = tmp_path / "src" / "deep"
    below.mkdir(parents=True)
    latin = "# coding: latin-1\nname = 'é'\n"
    (below / "latin.py").write_bytes(latin.encode("latin-1"))
    (tmp_path / "src" / "plain.py").write_text("x = 'é'\n", encoding="utf-8")
    (below / "rows.jsonl").write_text('{"body": 1}\n')
    (below / ".hidden.py").write_text("secret = 1\n")
    argv = [f"--input={tmp_path}/src/**/*.py", "--vocab_size=300", "--val_fraction=0", "--num_proc=1"]
    prepare.main([*argv, f"--out_dir={tmp_path}/d"])
    manifest = json.loads((tmp_path / "d/manifest.json").read_text())
    assert list(manifest["sources"]) == ["src"]
    ids = np.fromfile(tmp_path / "d/train/src-00000.bin", "<u2").tolist()
    text = Tokenizer.from_file(str(tmp_path / "d/tokenizer.json")).decode(ids, skip_special_tokens=False)
    assert text == latin + "<|endoftext|>x = 'é'\n<|endoftext|>"
    (below / "LOUD.TXT").write_text("loud")
    found = sources.local_files([f"{tmp_path}/sr*"])  # a folder that a pattern names is searched
    assert sorted(file.name for file in found) == ["LOUD.TXT", "latin.py", "plain.py", "rows.jsonl"]
    for coding in ("none-such", "hex", "undefined"):
        head = f"# coding: {coding}\n"
        (below / "broken.py").write_bytes(head.encode() + b"\xff")
        with pytest.raises(DataError, match=rf"broken.py: byte {len(head)} is not UTF-8"):
            prepare.main([*argv, f"--out_dir={tmp_path}/e"])
    with pytest.raises(DataError, match=r"no .txt .* file in input '.*/\*.rst'"):  # though another is there
        prepare.main([f"--input={tmp_path}/src/plain.py,{tmp_path}/*.rst", f"--out_dir={tmp_path}/f"])
    assert sources.Source(input=["*.toml"]).name == Path.cwd().name
    (tmp_path / "a[1].md").write_text("x")
    assert sources.Source(input=[str(tmp_path / "a[1].md")]).name == "a_1_"


@pytest.mark.parametrize(
    "name, content, text_key, message",
    [
        ("a.bin", b"x", "text", "a.bin': the extension is not one of .txt .md .py .jsonl .parquet"),
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}\n', "text", "a.jsonl, line 2: no column 'text', only body"),
        ("a.jsonl", b'{"text": "x"}\n', "{title} {text}", "a.jsonl, line 1: no column 'title', only text"),
        ("a.jsonl", b'{"text": 5}\n', "text", "a.jsonl, line 1: 'text' is int, not text"),
        ("a.jsonl", b'{"n": [5]}\n', "{n:>5}", "a.jsonl, line 1: '{n:>5}' does not fit this row: unsupported format"),
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
    target = path.parent if "/" in name else path
    with pytest.raises(DataError) as e:
        prepare.main([f"--input={target}", f"--text_key={text_key}", f"--out_dir={tmp_path}/d", "--vocab_size=300"])
    assert message in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "d").exists()


def test_a_part_of_a_column_and_a_file_that_holds_a_mark_alone(tmp_path):
    rows = [{"text": {"a": "in a column"}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert [text for text, _ in sources.read_parquet(tmp_path / "a.parquet", "{text[a]}")] == ["in a column"]
    (tmp_path / "mark.jsonl").write_bytes(b"\xef\xbb\xbf\n")
    assert list(sources.read_jsonl(tmp_path / "mark.jsonl", "text")) == []
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "a.parquet").write_bytes(whole[:4] + b"\xff" * 40 + whole[44:])
    with pytest.raises(DataError, match="a.parquet: not a readable parquet file: .*\\w"):
        list(sources.read_parquet(tmp_path / "a.parquet", "{text[a]}"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_a_malformed_template_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"{}")
    done = script(f"--input={tmp_path / name}", "--text_key={text", f"--out_dir={tmp_path}/d")
    assert "text_key='{text' is no template" in one_line(done) and not (tmp_path / "d").exists()


def test_without_a_terminal_there_is_a_line_a_minute(tmp_path, monkeypatch, capsys):
    """A clock on which every look takes half a minute."""
    (tmp_path / "a.jsonl").write_text('{"text": "some words of it"}\n' * 20_000)
    ticks = itertools.count(0, 30)
    monkeypatch.setattr(prepare.time, "monotonic", lambda: float(next(ticks)))
    monkeypatch.setattr(prepare, "BATCH", 1 << 16)
    argv = [f"--input={tmp_path / 'a.jsonl'}", f"--out_dir={tmp_path}/d", "--vocab_size=300", "--num_proc=1"]
    prepare.main([*argv, "--val_fraction=0"])  # nothing is held out of so little
    lines = re.findall(
        r"^a: (\d+)%, ([\d,]+) tokens, [\d,]+ tokens/s, [\d:]+ left$", capsys.readouterr().out, re.MULTILINE
    )
    shares = [int(share) for share, _ in lines]
    assert len(lines) >= 2 and shares == sorted(shares) and 0 < shares[0] < shares[-1] <= 100


def test_help_lists_every_key():
    done = script("--help")
    keys = "input text_key tokenizer vocab_size out_dir val_fraction num_proc shard sources"
    assert done.returncode == 0 and all(f"--{key}=" in done.stdout for key in keys.split())
    for line in re.findall(r"^  --\w+=.*", done.stdout, re.MULTILINE):
        assert re.search(r"\S  +\S", line), f"no meaning: {line}"
    child = subprocess.Popen([sys.executable, "prepare.py", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()  # `| head -1`
    assert child.communicate()[1] == b"" and child.returncode == 1


def test_a_tokenizer_of_one_revision(tmp_path, monkeypatch):
    """As train.py names the model that the text is to be prepared for: user/name@revision."""
    import huggingface_hub

    asked = []

    def download(repo_id, filename, revision=None):
        asked.append((repo_id, revision))
        (tmp_path / filename).write_text("{}")
        return str(tmp_path / filename)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert prepare.find_tokenizer("user/name@v2") == tmp_path / "tokenizer.json" and {*asked} == {("user/name", "v2")}
    asked.clear()
    assert prepare.find_tokenizer("user/name") == tmp_path / "tokenizer.json" and {*asked} == {("user/name", None)}
