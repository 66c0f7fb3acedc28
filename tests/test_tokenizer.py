import json
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, normalizers

import tokenizer
from errors import DataError

TEXTS = [path.read_text() for path in sorted(Path().glob("*.py"))]  # something to train small tokenizers on


@pytest.fixture(scope="module")
def own():
    """The dict of a tokenizer.json that tokenizer.py trains."""
    return json.loads(tokenizer.train_tokenizer(TEXTS, 700))


def with_added_tokens(spec):
    """As Qwen2.5 has them: some special, some not, which `tokenizers` finds in text."""
    fields = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    new = [("<|im_end|>", True), ("<tool_call>", False), ("e\u0301é", False)]
    new = [fields | {"id": 700 + i, "content": content, "special": special} for i, (content, special) in enumerate(new)]
    return spec | {"added_tokens": spec["added_tokens"] + new}


def as_gpt2(spec):
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return spec | {"normalizer": None, "pre_tokenizer": byte_level}


def as_smollm2(spec):
    """GPT-2's pattern behind one for digits; bytes that its training text never showed are not in the vocabulary."""
    steps = [{"type": "Digits", "individual_digits": True}, as_gpt2(spec)["pre_tokenizer"]]
    pre_tokenizer = {"type": "Sequence", "pretokenizers": steps}
    lacking = {char for char, byte in tokenizer.byte_alphabet().items() if byte in (4, 0x13, 0xC0, 0xC5, 0xF3)}
    model = spec["model"] | {"vocab": {t: i for t, i in spec["model"]["vocab"].items() if not lacking & {*t}}}
    model["merges"] = [pair for pair in model["merges"] if not lacking & {*"".join(pair)}]
    return spec | {"normalizer": None, "pre_tokenizer": pre_tokenizer, "model": model}


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
    "smollm2": (as_smollm2, "tiktoken"),
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
        encode, got = tokenizer.make_encoder(path)
        assert got == kind, name
        reference = Tokenizer.from_file(str(path))
        reference.encode_special_tokens = True  # special tokens in text are text
        made[name] = (encode, lambda text, t=reference: t.encode(text, add_special_tokens=False).ids)
    return made


PIECES = st.sampled_from(
    ["<|endoftext|>", "<|im_end|>", "<tool_call>", "e\u0301é", "\r\n", "\r", "\0", " " * 30, "\t\t", "\n\n", "don't"]
    + [
        "'LL",
        "ſ",
        "a  1",
        " 12 3",
        "\x04",
        "½ ٣",
        "\U000c0000",
        "\u212b",
        "\u1100\u1161",
        "\ufeff",
        "\u2028",
        "def f(self):\n        return",
        "12345",
        "…",
        "—",
        "İ",
    ]
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
    inert = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000 and tokenizer.INERT(chr(i))]
    assert len(inert) > 700
    text = "".join(f"{c}a{c}E{c}" for c in inert)
    assert normalize(text) == text


def test_a_trained_tokenizer_opens_alike_in_transformers(own, tmp_path):
    from transformers import AutoTokenizer

    (tmp_path / "tokenizer.json").write_text(json.dumps(own))
    config = '{"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}'
    (tmp_path / "tokenizer_config.json").write_text(config)
    (tmp_path / "config.json").write_text('{"model_type": "qwen2"}')
    theirs, encode = AutoTokenizer.from_pretrained(tmp_path), tokenizer.make_encoder(tmp_path / "tokenizer.json")[0]
    for text in [*(text.replace(tokenizer.EOT, "") for text in TEXTS), "don't e\u0301 12345 \r\n  x\u212b"]:
        assert theirs(text)["input_ids"] == encode(text).tolist()
    assert theirs.eos_token_id == 0


def test_the_vocabulary_is_that_of_tokenizers(own, tmp_path):
    path = tmp_path / "tokenizer.json"
    for spec in (own, with_added_tokens(own)):
        path.write_text(json.dumps(spec))
        assert tokenizer.vocabulary(path) == Tokenizer.from_file(str(path)).get_vocab()
    unigram = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("ab", -2.5)], 0, False))
    unigram.save(str(path))
    assert tokenizer.vocabulary(path) == unigram.get_vocab() == {"<unk>": 0, "a": 1, "ab": 2}
    for damaged in ("", "[]", '{"model": 3}', '{"model": {"vocab": null}}'):
        path.write_text(damaged)
        with pytest.raises(DataError, match="tokenizer.json is damaged"):
            tokenizer.vocabulary(path)


SPECIAL = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
CHAT = {"bos_token": "<|im_start|>", "eos_token": {"content": "<|im_end|>"}}


@pytest.mark.parametrize(
    "generation, model, names, start, ends",
    [
        ({"eos_token_id": [2, 0]}, {"eos_token_id": 7}, CHAT, 1, [2, 0]),
        ({"eos_token_id": 0}, {}, {"eos_token": "<|im_end|>"}, 2, [0]),
        ({"temperature": 0.7}, {"eos_token_id": [5]}, {}, 5, [5]),
        (None, {"eos_token_id": 3}, CHAT, 1, [3]),
        (None, None, CHAT, 1, [2]),
        (None, None, {"bos_token": None, "eos_token": "<|endoftext|>"}, 0, [0]),
        (None, None, {"eos_token": "</s>"}, None, "no token of it ends a text"),  # named, but not there
        (None, None, None, None, "no token of it ends a text"),  # three special tokens, and none is named
        ("[", None, CHAT, None, "generation_config.json is damaged"),
        (None, {"eos_token_id": "2"}, CHAT, None, "config.json: eos_token_id='2' is no id, nor a list of them"),
    ],
)
def test_what_starts_and_ends_a_text_is_in_the_files(tmp_path, generation, model, names, start, ends):
    added = [{"content": name, "id": i, "special": True} for name, i in SPECIAL.items()]
    spec = {"added_tokens": added, "model": {"type": "BPE", "vocab": {"a": 3}, "merges": []}}
    files = {"generation_config": generation, "config": model, "tokenizer_config": names, "tokenizer": spec}
    for name, content in files.items():
        if content is not None:
            (tmp_path / f"{name}.json").write_text(content if content == "[" else json.dumps(content))
    if start is None:
        with pytest.raises(DataError, match=ends):
            tokenizer.start_and_ends(tmp_path / "tokenizer.json")
    else:
        assert tokenizer.start_and_ends(tmp_path / "tokenizer.json") == (start, ends)


def test_the_only_special_token_of_a_file_that_stands_alone_starts_and_ends_a_text(tmp_path, own):
    (tmp_path / "tokenizer.json").write_text(json.dumps(own))
    assert tokenizer.start_and_ends(tmp_path / "tokenizer.json") == (0, [0])
