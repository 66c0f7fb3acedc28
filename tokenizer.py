"""Text -> ids: a byte-level BPE trained here, and an encoder that gives the ids of `tokenizers` at tiktoken's speed."""

import json
import re
from pathlib import Path

import numpy as np

from errors import DataError

EOT = "<|endoftext|>"  # ends a text where the tokenizer is trained here
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
# GPT-2's pattern, which `ByteLevel(use_regex=True)` stands for, and Qwen2's, which our own tokenizers get
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# The same behind a split of every digit, as in SmolLM2: a digit ends the white space before it, as the end of a text does
GPT2_DIGITS = r"\p{N}|'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?![^\s\p{N}])|\s+"
QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Most text, which NFC leaves as it is: no combining marks, nothing composed of two characters
INERT = re.compile("[\0-\u02ff\u2010-\u2027\u20ac]*").fullmatch


def train_tokenizer(texts, vocab_size):
    """A byte-level BPE with Qwen2's normaliser and pattern (so that transformers opens it alike); its JSON as bytes."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN2), "isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str(pretty=True).encode()


def byte_alphabet():
    """{character: byte}: GPT-2's printable stand-ins for the 256 bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in plain]
    return {chr(b): b for b in plain} | {chr(256 + i): b for i, b in enumerate(others)}


def token_bytes(tokenizer):
    """A function from an id to the bytes that it adds to a text, None for an id that only pads the vocabulary.

    Byte-level tokens are written in `byte_alphabet`, SentencePiece's with "▁" for a space and "<0xC3>" for a byte.
    """
    byte_of, added = byte_alphabet(), tokenizer.get_added_tokens_decoder()
    byte_level = "ByteLevel" in repr(tokenizer.decoder) + repr(tokenizer.pre_tokenizer)

    def bytes_of(i: int) -> bytes | None:
        token = added[i].content if i in added else tokenizer.id_to_token(i)
        if i in added or token is None:
            return token and token.encode()
        if byte_level:
            return bytes(byte_of[c] for c in token) if all(c in byte_of for c in token) else token.encode()
        byte = re.fullmatch("<0x([0-9A-F]{2})>", token)
        return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode()

    return bytes_of


def ends_of_text(directory):
    """The ids that end a text: `eos_token_id` of generation_config.json, else of config.json; empty where neither has one."""
    for name in ("generation_config.json", "config.json"):
        given = json_of(Path(directory) / name).get("eos_token_id")
        if given is not None:
            ends = given if isinstance(given, list) else [given]
            if not all(type(end) is int for end in ends):
                raise DataError(f"{Path(directory) / name}: eos_token_id={given!r} is no id, nor a list of them")
            return ends
    return []


def start_and_ends(path):
    """(id that starts a text, ids that end one), by a tokenizer.json and the files beside it, as lm-eval's HFLM has them.

    The start is the tokenizer's bos_token, else its eos_token; the ends are those of `ends_of_text`, else its eos_token. A
    tokenizer.json that stands alone names neither: its only special token is then both. Raises DataError without any.
    """
    path, named = Path(path), {}
    vocab, settings = vocabulary(path), json_of(Path(path).with_name("tokenizer_config.json"))
    for name in ("bos_token", "eos_token"):
        token = settings.get(name)
        named[name] = vocab.get(token["content"] if isinstance(token, dict) else token)
    if not settings:
        special = [token["id"] for token in json_of(path).get("added_tokens") or [] if token["special"]]
        named["eos_token"] = special[0] if len(special) == 1 else None
    ends = ends_of_text(path.parent) or [named["eos_token"]]
    if ends == [None]:
        cure = 'name one as "eos_token" in tokenizer_config.json, or as "eos_token_id" in generation_config.json'
        raise DataError(f"{path}: no token of it ends a text: {cure}")
    starts = (named["bos_token"], named["eos_token"], ends[0])
    return next(i for i in starts if i is not None), ends


def json_of(path):
    """The dict of a JSON file, empty where there is none. Raises DataError for anything else."""
    try:
        content = json.loads(path.read_bytes()) if path.exists() else {}
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise DataError(f"{path} is damaged: no JSON object")
    return content


def vocabulary(path):
    """{token: id} of a tokenizer.json, its added tokens included. Raises DataError where it is damaged."""
    try:
        spec = json.loads(Path(path).read_bytes())
        added = {token["content"]: token["id"] for token in spec.get("added_tokens") or []}
        vocab = spec["model"]["vocab"]
        if isinstance(vocab, list):  # Unigram: pieces and their scores, in the order of the ids
            vocab = {piece: i for i, (piece, _) in enumerate(vocab)}
        return {**vocab, **added}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path} is damaged: put back the tokenizer.json that the ids were made with") from None


def tiktoken_parts(spec):
    """(pattern, {bytes: id}) for tiktoken, from the dict of a tokenizer.json; None where it is another kind."""
    model, normalizer, pre = spec["model"], spec.get("normalizer"), spec.get("pre_tokenizer") or {}
    match pre.get("pretokenizers", [pre]):
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            pattern = GPT2
        case [
            {"type": "Digits", "individual_digits": True},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True},
        ]:
            pattern = GPT2_DIGITS
        case [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
        ]:
            pass
        case _:
            return None
    others = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    if model.get("type") != "BPE" or any(model.get(key) for key in others) or normalizer not in (None, {"type": "NFC"}):
        return None
    alphabet, added = byte_alphabet(), {token["content"] for token in spec.get("added_tokens", [])}
    tokens = {token: i for token, i in model["vocab"].items() if token not in added}
    if any(set(token) - alphabet.keys() for token in tokens):
        return None
    return pattern, {bytes(alphabet[c] for c in token): i for token, i in tokens.items()}


def merges_agree(model, ranks):
    """Whether tiktoken with `ranks`, {bytes: id}, joins as the BPE `model` of a tokenizer.json does.

    tiktoken joins any two neighbours whose product is in the vocabulary, the lowest id first; `tokenizers` goes by its
    list of merges. They agree when the merges stand in the order of their ids, all different, and every entry of the
    vocabulary is what the merges make of its own bytes: a pair that tiktoken would join otherwise had, by then, gone
    through the same joins inside that entry, and so must be a merge.
    """
    from tokenizers import models

    merges = [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]
    products = [model["vocab"][a + b] for a, b in merges]
    bpe, words = models.BPE(model["vocab"], merges), {i: token for token, i in model["vocab"].items()}
    return products == sorted(i for token, i in ranks.items() if len(token) > 1) and all(
        [part.id for part in bpe.tokenize(words[i])] == [i] for i in products
    )


def make_encoder(path, kind=None):
    """encode(text) -> uint32 ids, exactly those of `tokenizers` with special tokens taken as the text they are.

    Through tiktoken where the tokenizer can be expressed in it (several times as fast), else by `tokenizers` itself.
    Returns (encode, kind), kind "tiktoken" or "tokenizers"; given an earlier answer, it is not checked again.
    """
    import tiktoken
    from tokenizers import Tokenizer

    tokenizer, spec = Tokenizer.from_file(str(path)), json.loads(Path(path).read_bytes())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True

    def slow(text):
        return np.array(tokenizer.encode(text, add_special_tokens=False).ids, np.uint32)

    parts = tiktoken_parts(spec)
    if kind == "tokenizers" or parts is None or not (kind or merges_agree(spec["model"], parts[1])):
        return slow, "tokenizers"
    # One special token, never looked for: without any, tiktoken searches for the empty string, at every character
    encoding = tiktoken.Encoding("", pat_str=parts[0], mergeable_ranks=parts[1], special_tokens={EOT: 2**31})
    normalize = tokenizer.normalizer.normalize_str if tokenizer.normalizer else None
    names = [re.escape(token["content"]) for token in spec.get("added_tokens", []) if not token["special"]]
    added = re.compile("|".join(names)).search if names else lambda text: None
    unknown = bytes({*range(256)} - {token[0] for token in parts[1] if len(token) == 1})  # SmolLM2 lacks 21 bytes

    def fast(text):
        plain = normalize(text) if normalize and not INERT(text) else text
        if added(text) or added(plain):  # added, not special: `tokenizers` finds them in text
            return slow(text)
        if unknown and len(raw := plain.encode()) > len(raw.translate(None, unknown)):
            return slow(text)
        try:
            return encoding.encode_to_numpy(plain, disallowed_special=())
        except ValueError:  # its regular expressions give up on a million spaces in a row
            return slow(text)

    # The two have regular expressions of their own: compare them on characters of every kind
    probe = "".join(f"{chr(i)}a {chr(i)}1\n{chr(i)}  1" for i in [*range(0x3100), *range(0xE000, 0x110000, 61)])
    same = kind or np.array_equal(fast(probe), slow(probe))
    return (fast, "tiktoken") if same else (slow, "tokenizers")
