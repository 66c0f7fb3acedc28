"""Generation: prompts in, continuations out, under causal routing and with a KV cache; eager or in compiled steps."""

import functools
import os
import shutil
import sys
from contextlib import contextmanager, nullcontext

import torch
from torch import nn

import kernels
import routers
from cache import Cache, StaticCache
from errors import ModelError

PACKED = 32  # new tokens, or more, for which weights are packed: that takes some decoding steps
ASKED = 16  # steps of a GPU's decoding between two waits to hear whether all rows have ended


class Generation:
    """What Transformer can do at inference. It has a config, the trunk `model`, a `head_weight`."""

    def new_cache(self, batch: int, limit: int) -> Cache:
        """An empty KV cache for `batch` rows of at most `limit` tokens."""
        return Cache(self.config, batch, limit)

    def pack(self) -> list[torch.Tensor]:
        """Lays the weights out as decoding on a CPU multiplies by them fastest, while the result is held: kernels.pack."""
        weights = [module.weight for module in self.modules() if isinstance(module, nn.Linear)]
        return kernels.pack([*dict.fromkeys([*weights, self.head_weight])])

    @contextmanager
    def packed(self):
        """Inside, the weights are packed; not longer, even where a traceback keeps the frame: they may change."""
        held = self.pack()
        try:
            yield
        finally:
            held.clear()

    def compile_decoding(self):
        """torch.compile, on CUDA with its graphs, for the steps of `generate`: for every batch size anew."""
        need_compiler()
        limit = torch._dynamo.config.recompile_limit  # of variants of one code: every model, batch size and width
        torch._dynamo.config.recompile_limit = max(64, limit)  # beyond it, steps run uncompiled
        self.decodes_compiled = True

    def static_cache(self, filled: Cache) -> StaticCache:
        """What a prefill has left behind, as a compiled step takes it: in the tensors of the last time, if they fit."""
        if self.static is None or self.static.key != StaticCache.key_for(filled):
            self.static = None  # its memory first
            self.static = StaticCache(filled)
        self.static.load(filled)
        return self.static

    def step(self, input_ids, cache: StaticCache) -> torch.Tensor:
        """One decoding step in static shapes, to be compiled: (B, 1) ids → (B, V) logits."""
        hidden, _ = self.model(input_ids, "causal", None, cache)
        cache.lengths.add_(1)
        return kernels.linear(hidden, self.head_weight)[:, -1]

    @torch.no_grad()
    def generate(
        self, input_ids, max_new_tokens, temperature=0.0, top_k=None, top_p=None, stop_ids=(), lengths=None, pad_id=0
    ) -> torch.Tensor:
        """Continues each row under causal routing: (B, T) → (B, T + max_new_tokens).

        Row r of the result is its prompt (lengths[r] ids of the right-padded input), its new ids right behind, then
        pad_id; a row that meets a stop id ends there, the id included. config.ends are those that end a text by the model's
        own files. temperature 0 is greedy; top_k and top_p cut the distribution before sampling.
        Raises ModelError where T + max_new_tokens passes max_position_embeddings.
        """
        B, T = input_ids.shape
        if max_new_tokens < 0:
            raise ModelError(f"max_new_tokens={max_new_tokens} must not be negative")
        if T + max_new_tokens > self.config.max_position_embeddings:
            raise ModelError(
                f"a prompt of {T} and {max_new_tokens} new tokens pass max_position_embeddings="
                f"{self.config.max_position_embeddings}"
            )
        if not temperature >= 0:
            raise ModelError(f"temperature={temperature} must be 0 or more")
        if top_k is not None and top_k < 0:
            raise ModelError(f"top_k={top_k} must be 0, for all, or more")
        ends = [T] * B if lengths is None else [int(n) for n in lengths]
        if len(ends) != B:
            raise ModelError(f"lengths={ends} must give the tokens of each of {B} rows")
        result = input_ids.new_full((B, T + max_new_tokens), pad_id)
        kept = routers.valid_mask(ends, T, input_ids.device)
        result[:, :T] = torch.where(kept, input_ids, pad_id)
        stops = torch.tensor(list(stop_ids), device=input_ids.device, dtype=input_ids.dtype)
        cache = self.new_cache(B, T + max_new_tokens)
        finished = torch.zeros(B, dtype=torch.bool, device=input_ids.device)
        cache.finished = finished if len(stops) else None
        rows, place = torch.arange(B, device=input_ids.device), torch.tensor(ends, device=input_ids.device)
        new, at_prompt = input_ids, ends
        with self.packed() if max_new_tokens >= PACKED else nullcontext():
            for step in range(max_new_tokens):
                if cache.static:
                    logits = compiled_step(self.head_weight.is_cuda)(self, new, cache)  # (B, V)
                else:
                    logits = self(new, routing="causal", lengths=at_prompt, cache=cache).logits[:, -1]  # (B, V)
                new = sample(logits, temperature, top_k, top_p)  # (B)
                new, at_prompt = torch.where(finished, pad_id, new), None
                result[rows, place + step] = new
                if len(stops):
                    finished |= torch.isin(new, stops)
                    if (new.device.type == "cpu" or step % ASKED == ASKED - 1) and finished.all():
                        break
                new = new[:, None]
                if self.decodes_compiled and not cache.static and cache.keys is not None and step + 1 < max_new_tokens:
                    cache = self.static_cache(cache)
                    finished = cache.finished
        return result


def missing_compiler() -> str | None:
    """The C++ compiler that torch.compile would not find, None if it does: it looks for one on GPUs too."""
    name = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    return None if sys.platform == "win32" or shutil.which(name.split()[0]) else name


def need_compiler():
    """Raises ModelError where torch.compile would find no C++ compiler."""
    if name := missing_compiler():
        raise ModelError(f"torch.compile needs a C++ compiler, and {name} is not there: install it, or name one in CXX")


@functools.cache
def compiled_step(cuda: bool):
    """`Generation.step` compiled, for any model: a copy of one decodes with its own weights."""
    return torch.compile(Generation.step, mode="reduce-overhead" if cuda else None)


def sample(logits: torch.Tensor, temperature: float, top_k: int | None, top_p: float | None) -> torch.Tensor:
    """(B, V) → (B) ids. Draws by comparing probabilities with exponential noise, which needs no synchronisation."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = (logits.float() - logits.amax(-1, keepdim=True)) / temperature  # from the highest: none overflows
    if top_k:
        kth = logits.topk(min(top_k, logits.size(-1)), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= top_p  # the most probable one always stays
        beyond[:, 0] = False
        logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
    noise = torch.empty_like(logits).exponential_()
    return (logits.softmax(-1) / noise).argmax(-1)
