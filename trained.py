"""A trained model with its tokenizer: where it lies, text in and out of it, what its router did to a text. T tokens."""

import codecs
import os
from dataclasses import dataclass

import torch
import torch.nn.functional as F

import checkpoint
from errors import ConfigError, ModelError, first_line
from model import Transformer
from tokenizer import start_and_ends, token_bytes
from weights import find_model

WINDOW = 1024  # tokens that a text is traced in at a time


def model_directory(path: str) -> str:
    """The directory that holds the model of `path`: a model directory, a hub id, or a run's out_dir, of which final_model
    is taken, else the newest step. Raises ModelError where there is none.
    """
    for directory in (path, os.path.join(path, "final_model"), *reversed(checkpoint.steps(path))):
        if os.path.exists(os.path.join(directory, "config.json")):
            return directory
    if os.path.isdir(path) or path.startswith("out/"):  # where runs live: no hub id
        raise ModelError(f"no model in {path}: train one with `python train.py --out_dir={path}`")
    return find_model(path)


def open_model(path: str, device="cpu", dtype: torch.dtype = torch.float32, capacity: float | None = None):
    """The (Transformer, tokenizers.Tokenizer) saved at `path`, see `model_directory`, the model on `device` in `dtype`.

    The tokenizer also has a `start`, the id before a text, and `ends`, the ids behind one. capacity: of those that the model
    is calibrated for, instead of the one that it was saved with. Raises ModelError.
    """
    from tokenizers import Tokenizer

    directory = model_directory(path)
    model = Transformer.from_pretrained(directory, dtype, **({} if capacity is None else {"capacity": capacity}))
    if capacity is not None and not model.config.calibrated:  # nothing would tell its border where to lie
        known = "is calibrated for none, train it with capacity_choices" if model.routed else "is dense, which has none"
        raise ModelError(f"capacity={capacity}: {path} {known}")
    tokenizer_path = os.path.join(directory, "tokenizer.json")
    if not os.path.exists(tokenizer_path):
        raise ModelError(f"{tokenizer_path} is missing: copy it from the data folder that the model was trained on")
    try:
        tokenizer = Tokenizer.from_file(tokenizer_path)
    except Exception as error:  # noqa: BLE001 (tokenizers raises nothing narrower)
        raise ModelError(f"{tokenizer_path} is no tokenizer: {error}") from None
    tokenizer.encode_special_tokens = True  # the name of a special token in a text is text, as in training
    tokenizer.no_truncation(), tokenizer.no_padding()  # which some hold for the batches of their own training
    tokenizer.start, tokenizer.ends = start_and_ends(tokenizer_path)
    model.config.eos_token_id = tokenizer.ends
    return model.to(device), tokenizer


def read_text(path: str) -> str:
    """A UTF-8 text file as it is, its line ends included."""
    with open(path, "rb") as f:
        raw = f.read()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f"text={path} is not UTF-8: byte {error.start} is {raw[error.start]:#04x}") from None


def encode(model, tokenizer, text: str, begins=False) -> torch.Tensor:
    """Text → its ids (T), on the CPU; an empty text is the token that starts one.

    begins: behind what the tokenizer puts before a text (Llama 3's does), as transformers has it in a prompt.
    """
    try:
        ids = tokenizer.encode(text, add_special_tokens=begins).ids
    except TypeError:
        raise ConfigError(f"the text {text[:40]!r} is not valid UTF-8") from None
    ids = ids or [tokenizer.start]
    if max(ids) >= model.config.vocab_size:
        raise ModelError(f"the tokenizer gives id {max(ids)}, the model's vocabulary ends at {model.config.vocab_size}")
    return torch.tensor(ids)


def chat_prompt(path: str, message: str) -> torch.Tensor:
    """Ids (T) of a user's message in the chat template of the model at `path`, up to where the reply begins.

    Raises ConfigError where it has no template.
    """
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerFast

    directory = model_directory(path)
    theirs = PreTrainedTokenizerFast.from_pretrained(directory)
    if not theirs.chat_template:
        raise ConfigError(f"{directory} has no chat template (chat_template.jinja): leave --chat out")
    try:
        message.encode()
        messages = [{"role": "user", "content": message}]
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    except UnicodeEncodeError:
        raise ConfigError(f"the text {message[:40]!r} is not valid UTF-8") from None
    except (TemplateError, TypeError, ValueError) as error:
        raise ConfigError(f"the chat template of {directory} is faulty: {first_line(error)}") from None
    return torch.tensor(ids)


def token_texts(tokenizer, ids: list[int]) -> list[str]:
    """What each token adds to the text; joined, they are the text.

    A character whose bytes are spread over several tokens appears with the last of them, the others add "".
    """
    bytes_of, added = token_bytes(tokenizer), tokenizer.get_added_tokens_decoder()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    texts = []
    for i in ids:
        raw = bytes_of(i)
        if raw is None or i in added:  # an id that pads the vocabulary, or a special token
            texts.append(decoder.decode(b"", final=True) + ("\ufffd" if raw is None else raw.decode()))
            decoder.reset()
        else:
            texts.append(decoder.decode(raw))
    if texts:
        texts[-1] += decoder.decode(b"", final=True)
        if texts[0] == " " + tokenizer.decode(ids[:1], skip_special_tokens=False):  # SentencePiece's, before every text
            texts[0] = texts[0][1:]
    return texts


# Control characters as pictures: a model's text, printed, must not steer the terminal.
PICTURES = {c: chr(0x2400 + c) for c in range(32)} | {127: "\u2421"} | {c: "\ufffd" for c in range(128, 160)}
PICTURES |= {9: "\t", 10: "\n"}


def visible(text: str) -> str:
    """A token's text with what cannot be seen made visible; "…" for the first bytes of a character."""
    return text.translate(PICTURES | {9: "⇥   ", 10: "⏎\n"}) or "…"


def continuations(model, prompt: torch.Tensor, n: int, count: int = 1, **sampling) -> list[torch.Tensor]:
    """`count` sequences that begin with `prompt` (T): at most n new ids each, one that ends a text, if met, the last.

    sampling: temperature, top_k, top_p of `Transformer.generate`.
    """
    prompts = prompt.to(model.head_weight.device).expand(count, -1)
    ids = model.generate(prompts, n, stop_ids=model.config.ends, **sampling)  # (count, T + n)
    sequences = []
    for row in ids.cpu():
        new = row[len(prompt) :].tolist()
        length = next((t + 1 for t, token in enumerate(new) if token in model.config.ends), n)
        sequences.append(row[: len(prompt) + length])
    return sequences


@dataclass
class Trace:
    """What causal routing, which is what inference does, did to each token of a text. On the CPU."""

    masks: dict[int, torch.Tensor]  # {routed layer: (T) bool}, whether the token entered its block
    tokens: dict[int, dict[str, torch.Tensor]]  # {layer: {margin, causal_probability, score, G, S_CE, S_CU: (T)}}
    rules: dict[int, str]  # {routed layer: what decided, "causal router" for instance}
    loss: torch.Tensor  # (T) cross-entropy of the token after each one, in nats; NaN after the last

    @property
    def entered(self) -> list[int]:
        """Number of routed blocks that each token entered."""
        return sum(mask.int() for mask in self.masks.values()).tolist() if self.masks else [0] * len(self.loss)


def trace(model, ids: torch.Tensor) -> Trace:
    """What causal routing does to ids (T).

    A text beyond the window is read in windows that overlap by half, and every token is shown as the window saw it that
    gave it the longer past.
    """
    size = min(WINDOW, model.config.max_position_embeddings)
    windows, done = [], 0
    while done < len(ids):
        start = 0 if done < size else done - size // 2
        windows.append(trace_window(model, ids[start : start + size + 1], size, new=done - start))
        done = min(start + size, len(ids))
    masks, tokens = {}, {}
    for layer, names in windows[0].tokens.items():
        masks[layer] = torch.cat([window.masks[layer] for window in windows])
        tokens[layer] = {name: torch.cat([window.tokens[layer][name] for window in windows]) for name in names}
    return Trace(masks, tokens, windows[0].rules, torch.cat([window.loss for window in windows]))


@torch.inference_mode()
def trace_window(model, ids: torch.Tensor, size: int, new: int) -> Trace:
    """The trace of the first `size` ids (at most one more, the last one's target), without the first `new` of them.

    An architecture that does not score causally computes no surprise at inference: its S_CE, S_CU and G are those of the
    training pass over the same text.
    """
    ids = ids.to(model.head_weight.device)
    window, targets = ids[None, :size], ids[1:]
    out = model(window, routing="causal", return_masks=True)
    if not model.config.kind.scores_causally:
        training = model(window, routing="topk", return_masks=True)
        for layer, values in training.tokens.items():
            out.tokens[layer] = values | out.tokens[layer]
    loss = F.cross_entropy(out.logits[0, : len(targets)].float(), targets, reduction="none")
    loss = F.pad(loss, (0, window.size(1) - len(targets)), value=torch.nan)
    masks, tokens = {}, {}
    for layer, values in out.tokens.items():
        masks[layer] = out.masks[layer][0, new:].cpu()
        tokens[layer] = {name: value[0, new:].cpu() for name, value in values.items()}
    return Trace(masks, tokens, out.rules, loss[new:].cpu())
