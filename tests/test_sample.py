"""Sampling and the views of what the router did, against direct calls of the model and the files as parsed by others."""

import base64
import hashlib
import html.parser
import json
import math
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from helpers import ROUTED, small_model
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

import figures
import sample
import trained
from configurator import cli
from model import Transformer
from sample import page
from tokenizer import EOT, token_bytes

TEXT = "def main(argv):\n    return 0\n\nclass Café:\n    print('naïve', 12.5) # 東京\n" * 3
VOCABULARY = 300


def small_tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    options = {"special_tokens": [EOT], "initial_alphabet": alphabet, "show_progress": False}
    tokenizer.train_from_iterator([TEXT], trainers.BpeTrainer(vocab_size=VOCABULARY, **options))
    return tokenizer


TOKENIZER = small_tokenizer()


def save_model(directory, architecture: str, seed: int = 0, **overrides) -> Transformer:
    """A model directory with random weights and the tokenizer of these tests."""
    model = small_model(architecture, seed, vocab_size=VOCABULARY, **overrides)
    model.save_pretrained(str(directory))
    TOKENIZER.save(str(directory / "tokenizer.json"))
    return model


def run(monkeypatch, capsys, *arguments):
    """The script in this process: (exit status, stdout, stderr)."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, arguments)])
    try:
        cli(sample.main)
        status = 0
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


# -- text -------------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.text())
def test_token_texts_are_the_text(text):
    ids = TOKENIZER.encode(text).ids
    assert "".join(trained.token_texts(TOKENIZER, ids)) == text


@settings(deadline=None)
@given(st.lists(st.integers(0, VOCABULARY - 1)))
def test_token_texts_of_any_ids_are_what_tokenizers_decodes(ids):
    pieces = trained.token_texts(TOKENIZER, ids)
    assert len(pieces) == len(ids)
    if 0 not in ids:  # a special token among broken characters: tokenizers joins what lies around it
        assert "".join(pieces) == TOKENIZER.decode(ids, skip_special_tokens=False)


def test_a_character_appears_with_its_last_byte():
    kyoto = "京".encode()
    names = [TOKENIZER.id_to_token(i) for i in range(VOCABULARY)]
    byte_ids = [names.index(TOKENIZER.pre_tokenizer.pre_tokenize_str("京")[0][0][n]) for n in range(len(kyoto))]
    assert trained.token_texts(TOKENIZER, byte_ids) == ["", "", "京"]
    assert trained.token_texts(TOKENIZER, byte_ids[:2] + [0]) == ["", "", "\ufffd" + EOT]
    assert trained.token_texts(TOKENIZER, [VOCABULARY + 5]) == ["\ufffd"]  # an id that only pads the vocabulary


@settings(deadline=None, max_examples=50)
@given(st.text(st.sampled_from("abc é京 \n"), min_size=1))
def test_token_texts_of_sentencepiece(text):
    """A vocabulary with "▁" for spaces and "<0xC3>" for bytes that it has no character for, as Llama 2's."""
    vocabulary = [("<unk>", 0.0), *((f"<0x{byte:02X}>", -9.0) for byte in range(256))]
    vocabulary += [(piece, -1.0 - n) for n, piece in enumerate(["▁a", "bc", "▁", "a", "b", "c", "é"])]
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    ids = tokenizer.encode(text).ids
    assert "".join(trained.token_texts(tokenizer, ids)) == text == tokenizer.decode(ids)
    assert sum(len(token_bytes(tokenizer)(i)) for i in ids) == len(text.encode()) + 1  # with the space before it


def test_special_tokens_in_a_text_stay_text(tmp_path):
    save_model(tmp_path, "dense")
    model, tokenizer = trained.open_model(str(tmp_path))
    assert 0 not in trained.encode(model, tokenizer, f"a{EOT}b")
    assert trained.encode(model, tokenizer, "").tolist() == [0]  # an empty prompt starts a document


def test_a_run_gives_its_final_model_else_its_newest_step(tmp_path):
    for n, step in enumerate(("step_0000010", "step_0000200", "step_0000300.partial")):
        save_model(tmp_path / step, "dense", seed=n)

    def weight():
        return trained.open_model(str(tmp_path))[0].head_weight

    def saved(name):
        return Transformer.from_pretrained(str(tmp_path / name)).head_weight

    assert torch.equal(weight(), saved("step_0000200"))
    save_model(tmp_path / "final_model", "dense", seed=9)
    assert torch.equal(weight(), saved("final_model"))


def test_generation_stops_where_the_files_say_that_a_text_ends(tmp_path):
    """Chat models end a turn with another token than a document: both stop them."""
    save_model(tmp_path, "stt")
    ends = [5, 9, 11, *range(20, 60)]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    model, tokenizer = trained.open_model(str(tmp_path))
    assert (tokenizer.ends, model.config.ends, Transformer.from_pretrained(str(tmp_path)).config.ends) == (ends,) * 3
    model.save_pretrained(str(tmp_path / "again"))
    assert Transformer.from_pretrained(str(tmp_path / "again")).config.ends == ends

    prompt = torch.arange(100, 108).expand(30, -1)
    torch.manual_seed(2)
    rows = model.generate(prompt, 40, temperature=1.0, stop_ids=model.config.ends, pad_id=1)[:, 8:].tolist()
    stopped = 0
    for row in rows:
        at = next((t for t, token in enumerate(row) if token in ends), len(row))
        assert set(row[at + 1 :]) <= {1}
        stopped += at < len(row)
    assert stopped > 10
    torch.manual_seed(2)
    free = model.generate(prompt, 40, temperature=1.0)[:, 8:].tolist()
    assert any(token in ends for row in free for token in row[:-1])  # unasked nothing stops a row
    torch.manual_seed(2)
    for row in trained.continuations(model, prompt[0], 40, count=30, temperature=1.0):
        assert not {*row[8:-1].tolist()} & {*ends}


def test_a_chat_is_the_template_around_the_prompt_and_only_the_reply_is_printed(tmp_path, monkeypatch, capsys):
    model = save_model(tmp_path, "mod")
    turn = "{% for m in messages %}<|endoftext|>{{ m['role'] }}: {{ m['content'] }}{% endfor %}"
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": EOT}))
    arguments = [f"--model_path={tmp_path}", "--chat", "--prompt=def main(", "--max_new_tokens=30", "--temperature=0"]
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 2 and "has no chat template (chat_template.jinja): leave --chat out" in err
    (tmp_path / "chat_template.jinja").write_text(turn + "{% if add_generation_prompt %} →{% endif %}")
    rendered = [0, *TOKENIZER.encode("user: def main( →").ids]
    new = model.generate(torch.tensor([rendered]), 30)[0, len(rendered) :].tolist()
    end = next(n for n in range(2, 30) if new[n] not in new[:n])
    for ends, reply in (([1], new), ([1, new[end]], new[: end + 1])):
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        status, out, _ = run(monkeypatch, capsys, *arguments)
        said = trained.token_texts(TOKENIZER, reply)
        said = "".join(said[:-1] if reply[-1] in ends else said)  # what ends it is not printed
        assert status == 0 and out.startswith(f"{said}\n\n{len(reply)} tokens in") and 1 not in new
    (tmp_path / "chat_template.jinja").write_text("{{ messages + 1 }}")
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 2 and "the chat template of" in err and "is faulty" in err
    status, _, err = run(monkeypatch, capsys, *arguments, "--prompt=\udcff")
    assert status == 2 and "is not valid UTF-8" in err
    (tmp_path / "chat_template.jinja").write_text(turn)
    for dtype in ("bfloat16", "float16"):
        status, out, _ = run(monkeypatch, capsys, *arguments, f"--dtype={dtype}")
        assert status == 0 and out.count("tokens/s") == 1


def test_continuations_end_with_the_end_of_text():
    model = small_model("mod", vocab_size=VOCABULARY, eos_token_id=0)
    prompt = torch.tensor(TOKENIZER.encode("def main(").ids)
    torch.manual_seed(1)
    rows = model.generate(prompt.expand(40, -1), 60, stop_ids=(0,), temperature=1.5, pad_id=1)
    torch.manual_seed(1)
    sequences = trained.continuations(model, prompt, 60, 40, temperature=1.5)
    stopped = 0
    for row, ids in zip(rows.tolist(), sequences, strict=True):
        new = row[len(prompt) :]
        expected = new[: new.index(0) + 1] if 0 in new else new
        assert ids.tolist() == prompt.tolist() + expected
        stopped += 0 in new
    assert 0 < stopped < 40  # both cases were seen


# -- what the router did ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ROUTED)
def test_trace_is_the_causal_forward(architecture):
    model = small_model(architecture, vocab_size=VOCABULARY)
    ids = torch.randint(1, VOCABULARY, (30,))
    seen = trained.trace(model, ids)
    with torch.no_grad():
        out = model(ids[None], routing="causal", return_masks=True)
        surprise = model(ids[None], routing="topk", return_masks=True).tokens
    assert {i: m.tolist() for i, m in seen.masks.items()} == {i: m[0].tolist() for i, m in out.masks.items()}
    assert seen.entered == [sum(int(m[0, t]) for m in out.masks.values()) for t in range(30)]
    for i in out.masks:
        assert torch.equal(seen.tokens[i]["causal_probability"], out.tokens[i]["causal_probability"][0])
        assert torch.equal(seen.tokens[i]["margin"], out.tokens[i]["margin"][0])
        assert torch.equal(seen.tokens[i]["margin"] > 0, seen.masks[i]) and seen.rules[i] == "causal router"
        if architecture != "mod":
            source = surprise if architecture == "stt" else out.tokens
            for name in ("S_CE", "S_CU", "G"):
                assert torch.equal(seen.tokens[i][name], source[i][name][0])
    expected = F.cross_entropy(out.logits[0, :-1], ids[1:], reduction="none")
    assert torch.allclose(seen.loss[:-1], expected) and seen.loss[-1].isnan()


def test_a_long_text_is_read_in_windows_that_overlap_by_half(monkeypatch):
    monkeypatch.setattr(trained, "WINDOW", 16)
    model = small_model("dtf", vocab_size=VOCABULARY)
    ids = torch.randint(1, VOCABULARY, (37,))
    seen = trained.trace(model, ids)
    for t in range(37):
        start = 0 if t < 16 else (t - 8) // 8 * 8  # windows start at 0, 8, 16, 24
        with torch.no_grad():
            out = model(ids[None, start : t + 1], routing="causal", return_masks=True)
        assert [bool(m[t]) for m in seen.masks.values()] == [bool(m[0, -1]) for m in out.masks.values()]
        for i in seen.tokens:
            assert seen.tokens[i]["G"][t].item() == pytest.approx(out.tokens[i]["G"][0, -1].item(), rel=1e-4)
        if t < 36:
            expected = F.cross_entropy(out.logits[0, -1], ids[t + 1]).item()
            assert seen.loss[t].item() == pytest.approx(expected, rel=1e-4)


def test_painting_without_colour_writes_counts_under_the_tokens():
    painted = sample.paint(["def", " f", "():", "\n", "\tx", "", "\x1b[2J"], [0, 1, 2, 3, 12, 1, 0], 12, colour=False)
    assert painted.split("\n")[:4] == ["def f():⏎", "0··1·2··3", "⇥   x…␛[2J", "c····10···"]
    assert painted.endswith("of 12; 23% of all entries taken")  # 19 of 84


def test_painting_with_colour_is_the_text_in_ordered_shades():
    painted = sample.paint(["a\n", "b", "\x1b[31m"], [0, 1, 3], 3, colour=True)
    body, legend = painted.split("\n\n")
    assert re.sub(r"\033\[[\d;]*m", "", body) == "a⏎\nb␛[31m"  # no escape of the text's own survives
    backgrounds = [int(n) for n in re.findall(r"48;5;(\d+)", legend)]
    assert [sample.SHADES.index(n) for n in backgrounds] == [0, 3, 5, 8]
    assert [int(n) for n in re.findall(r"48;5;(\d+)", body.split("⏎")[0])] == backgrounds[:1]


def test_routing_map_fills_what_entered():
    texts = ["a very long token indeed", "$x_1$", "\n", "京", ""] * 60
    masks = {"dtf": {1: torch.rand(300) < 0.3, 3: torch.rand(300) < 0.6}, "mod": {1: torch.rand(300) < 0.5}}
    fig = figures.routing_map("$ title", texts, masks)
    faces = [tuple(face) for bars in fig.axes[0].collections for face in bars.get_facecolors().tolist()]
    assert len(faces) == 3 * 300
    grey = (0.9019607843137255, 0.9019607843137255, 0.9019607843137255, 1.0)
    assert fig.axes[0].texts[0].get_text() == "$ title"
    assert faces.count(grey) == sum(int((~mask).sum()) for group in masks.values() for mask in group.values())


def test_routing_map_of_a_long_text_is_cut_and_says_so():
    mask = {i: torch.ones(20_000, dtype=torch.bool) for i in range(1, 81, 2)}
    fig = figures.routing_map("title", [" word"] * 20_000, {"dtf": mask})
    drawn = len(fig.axes[0].collections[0].get_facecolors()) * len(fig.axes[0].collections) // 40
    assert fig.axes[0].texts[0].get_text() == f"title, the first {drawn:,} of 20,000 tokens"
    assert fig.get_figheight() * figures.STYLE["savefig.dpi"] < 1 << 16  # what matplotlib can draw


# -- the page ---------------------------------------------------------------------------------------------------------

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&lt;\u2028@DATA@"


class Scripts(html.parser.HTMLParser):
    """The tags of a page, its title and the contents of its script elements."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.scripts, self.metas, self.title, self.inside = [], [], [], "", None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside = tag
        self.tags.append(tag)
        self.metas += [dict(attrs)] * (tag == "meta")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts.append(data)
        if self.inside == "title":
            self.title += data


def hostile_page():
    model = small_model("dtf", vocab_size=VOCABULARY)
    ids = torch.tensor(TOKENIZER.encode(HOSTILE + "\n" + TEXT).ids)
    texts = trained.token_texts(TOKENIZER, ids.tolist())
    seen = trained.trace(model, ids)
    return page(HOSTILE, model.config, texts, ids.tolist(), seen), texts, ids, seen


def test_page_holds_the_trace_and_runs_its_own_script_only():
    page, texts, ids, seen = hostile_page()
    parsed = Scripts(page)
    data, script = parsed.scripts
    assert parsed.tags.count("script") == 2 and "img" not in parsed.tags and parsed.title == HOSTILE
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert {"http-equiv", "content"} == set(parsed.metas[2])
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" == parsed.metas[2]["content"]
    assert "//" not in re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)  # nothing is fetched
    data = json.loads(data)
    assert re.sub("[⏎…]", "", "".join(data["texts"])) == "".join(texts)
    assert data["ids"] == ids.tolist() and data["loss"][-1] is None
    assert data["loss"][:-1] == pytest.approx(seen.loss[:-1].tolist(), abs=1e-4)
    for layer in data["layers"]:
        assert layer["mask"] == "".join("01"[int(m)] for m in seen.masks[layer["index"]])
        assert layer["rule"] == "causal router"
        for name in ("margin", "S_CE", "S_CU", "G", "causal_probability"):
            assert layer[name] == pytest.approx(seen.tokens[layer["index"]][name].tolist(), abs=1e-4)


@pytest.mark.skipif(not shutil.which("chromium"), reason="no Chromium here")
def test_page_in_a_browser(tmp_path):
    page, texts, _, seen = hostile_page()
    (tmp_path / "page.html").write_text(page, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    browser = ["chromium", *options, (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(browser, check=False, capture_output=True, text=True, timeout=60).stdout
    assert dom.count("data-i=") == len(texts)
    assert Scripts(dom).title == HOSTILE  # the text's script did not run
    darkest = round(100 * seen.entered.count(2) / len(texts))
    assert f">2 ({darkest} %)</span>" in dom


def test_page_of_a_dense_model():
    model = small_model("dense", vocab_size=VOCABULARY)
    ids = torch.randint(1, VOCABULARY, (1,))
    content = page("one token", model.config, ["x"], ids.tolist(), trained.trace(model, ids))
    assert json.loads(Scripts(content).scripts[-2])["layers"] == []


# -- the script -------------------------------------------------------------------------------------------------------


def test_script_samples_shows_and_draws(tmp_path, monkeypatch, capsys):
    save_model(tmp_path / "run" / "final_model", "dtf")
    views = ["--show_routing", f"--png={tmp_path}/new/map.png", f"--html={tmp_path}/new/page.html"]
    keys = [f"--model_path={tmp_path}/run", "--max_new_tokens=20", "--num_samples=2", *views]
    status, out, err = run(monkeypatch, capsys, *keys)
    assert (status, err) == (0, "") and "\033" not in out
    assert out.startswith("def main(") and out.count("-" * 80) == 1
    new, seconds, rate = re.search(r"(\d+) tokens in ([\d.]+) s, ([\d,]+) tokens/s", out).groups()
    most, least = (int(new) / (float(seconds) + error) for error in (-0.0005, 0.0005))  # as far as rounding hides it
    assert int(new) <= 40 and least - 0.5 <= float(rate.replace(",", "")) <= most + 0.5
    from PIL import Image

    colours = Image.open(tmp_path / "new" / "map.png").convert("RGB").getcolors(1 << 24)
    assert {(0x00, 0x72, 0xB2), (0xE6, 0xE6, 0xE6)} <= {colour for _, colour in colours}
    assert (tmp_path / "new" / "page.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["map.png", "page.html"]  # nothing half-written

    def text(*more):
        return run(monkeypatch, capsys, *keys[:3], *more)[1].split("\n\n")[0]

    assert text("--seed=3") == text("--seed=3") != text("--seed=4")


def test_script_looks_at_a_file(tmp_path, monkeypatch, capsys):
    model = save_model(tmp_path, "mod")
    (tmp_path / "text.txt").write_bytes(TEXT.encode())
    keys = [f"--model_path={tmp_path}", f"--text={tmp_path}/text.txt", f"--html={tmp_path}/page.html"]
    monkeypatch.setattr(sample, "VIEW_TOKENS", 50)
    status, out, err = run(monkeypatch, capsys, *keys)
    assert (status, out) == (0, f"page: {tmp_path}/page.html\n")
    ids = TOKENIZER.encode(TEXT).ids
    assert err == f"looking at the first 50 of {len(ids)} tokens\n"
    data = json.loads(Scripts((tmp_path / "page.html").read_text(encoding="utf-8")).scripts[-2])
    assert data["ids"] == ids[:50] and len(data["layers"]) == len(model.config.routed_layers)
    (first, *_) = data["loss"]
    with torch.no_grad():
        logits = model(torch.tensor([ids[:50]]), routing="causal").logits[0, 0]
    assert first == pytest.approx(-logits.log_softmax(-1)[ids[1]].item(), abs=1e-3) and not math.isnan(first)


def test_script_names_the_rule_and_how_narrow_it_was(tmp_path, monkeypatch, capsys):
    model = small_model("mod", vocab_size=VOCABULARY, causal_decision="threshold")
    for layer in model.config.routed_layers:
        model.model.layers[layer].threshold.fill_(0.1)
    model.save_pretrained(str(tmp_path))
    TOKENIZER.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    keys = [f"--model_path={tmp_path}", f"--text={tmp_path}/text.txt", "--show_routing", f"--png={tmp_path}/map.png"]
    status, out, _ = run(monkeypatch, capsys, *keys)
    with torch.no_grad():
        tokens = model(torch.tensor([TOKENIZER.encode(TEXT).ids]), routing="causal", return_masks=True).tokens
    expected = ["decided by the average threshold"]
    for layer, values in tokens.items():
        margin = values["score"][0] - 0.1
        share, median = (margin > 0).float().mean(), margin.abs().median()
        expected.append(f"layer {layer}: {share:.0%} entered, median |margin| {median:.3f}")
    *_, legend, first, second, third, picture, end = out.split("\n")
    assert status == 0 and "routed blocks entered, of 2" in legend and [first, second, third] == expected
    assert picture.startswith("token × layer map") and end == ""


def test_script_on_a_dense_model_says_that_it_routes_nothing(tmp_path, monkeypatch, capsys):
    save_model(tmp_path, "dense")
    keys = [f"--model_path={tmp_path}", "--max_new_tokens=3", "--show_routing", f"--png={tmp_path}/map.png"]
    status, _, err = run(monkeypatch, capsys, *keys)
    assert status == 0 and "routes nothing" in err and not (tmp_path / "map.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model_path={}/none/at/all"], "neither a directory nor a hub id"),
        (["--model_path=out/never_trained"], "no model in out/never_trained: train one with"),
        (["--model_path={}/empty"], "no model in"),
        (["--model_path={}/bare"], "tokenizer.json is missing"),
        (["--text=README.md", "--html=a.html", "--chat"], "chat=True generates, and text=README.md is only looked at"),
        (["--dtype=float8"], "dtype='float8' is not one of auto, float32"),
        (["--model_path={}/broken"], "broken/tokenizer.json is no tokenizer"),
        (["--model_path={}/narrow"], "the model's vocabulary ends at 50"),
        (["--temperature=-1"], "temperature=-1.0 must not be negative"),
        (["--top_p=0"], "top_p=0.0 must lie in (0, 1]"),
        (["--top_k=-1"], "top_k=-1 must not be negative"),
        (["--num_samples=0"], "num_samples=0 must be at least 1"),
        (["--max_new_tokens=many"], "--max_new_tokens: 'many' is not int"),
        (["--promt=x"], "did you mean prompt?"),
        (["--max_new_tokens=300"], "max_position_embeddings=256"),
        (["--prompt=\udcff"], "is not valid UTF-8"),
        (["--text={}/latin.txt"], "add --html=out.html or --show_routing"),
        (["--text={}/latin.txt", "--html={}/out.html"], "latin.txt is not UTF-8: byte 3 is 0xe9"),
        (["--text={}/no.txt", "--html={}/out.html"], "no.txt"),
        (["--device=abacus"], "device='abacus' is not available here: cpu"),
    ],
)
def test_bad_input_gets_one_line_and_status_2(tmp_path, monkeypatch, capsys, arguments, message):
    save_model(tmp_path, "dense")
    save_model(tmp_path / "narrow", "dense")
    small_model("dense", vocab_size=50).save_pretrained(str(tmp_path / "narrow"))
    small_model("dense").save_pretrained(str(tmp_path / "bare"))
    small_model("dense").save_pretrained(str(tmp_path / "broken"))
    (tmp_path / "broken" / "tokenizer.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    arguments = [f"--model_path={tmp_path}", *(argument.format(tmp_path) for argument in arguments)]
    status, out, err = run(monkeypatch, capsys, *arguments)
    assert (status, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out.html").exists()


def test_the_script_itself(tmp_path):
    command = [sys.executable, "sample.py", f"--model_path={tmp_path}/nothing"]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "nothing" in done.stderr
