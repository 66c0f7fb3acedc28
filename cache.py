"""The KV cache of generation: one that grows with what routed layers select, and one of fixed size for compiled steps.

B rows, n_kv key and value heads, hd head size. A routed layer holds keys and values of the tokens that ran in it
only, unless kv="all" or routed_part="mlp".
"""

import torch


class LayerCache:
    """Keys and values of the tokens that ran in one block, compacted: row r holds `lengths[r]` of them, left-aligned.

    A routed layer's cache grows with what it selects, so its memory is the capacity's share of a dense layer's.
    """

    def __init__(self, batch: int, limit: int, routed: bool):
        self.lengths = [0] * batch
        self.limit = limit  # tokens that a row is expected to hold at most
        self.routed = routed
        self.k = self.v = None  # (B, n_kv, allocated, hd)
        self.state = {}  # what routing remembers of the tokens before, and what it computes once for all that follow

    def remember(self, name: str, value: torch.Tensor):
        """Keeps a tensor of the newest token for the next step; use what was kept before first: compiled steps write over it."""
        self.state[name] = value

    def reserve(self, n: int, like: torch.Tensor):
        held = 0 if self.k is None else self.k.size(2)
        if n <= held:
            return
        size = max(n, 2 * held, 32)
        if n <= self.limit:  # who goes on from a cache may pass it
            size = min(self.limit, size) if self.routed else self.limit
        old = self.k, self.v
        self.k, self.v = (like.new_zeros(len(self.lengths), like.size(1), size, like.size(3)) for _ in range(2))
        if held:
            self.k[:, :, :held], self.v[:, :, :held] = old

    def fill(self, k, v, counts: list[int]):
        """Prefill: k, v (B, n_kv, T, hd), of which row r's first counts[r] are tokens. Attention sees k and v as given."""
        T = k.size(2)
        self.reserve(T, k)
        self.k[:, :, :T], self.v[:, :, :T] = k, v
        self.lengths = list(counts)
        return k, v, None

    def append(self, k, v, rows: list[int], row_index: torch.Tensor | None = None, places: torch.Tensor | None = None):
        """One decoding step of `rows`: k, v (len(rows), n_kv, 1, hd) → what they attend to, see `of_rows`.

        row_index, places: the rows and how many tokens each had (len(rows)), where they are on the device already.
        """
        for r in rows:
            self.lengths[r] += 1
        lengths = [self.lengths[r] for r in rows]
        S = max(lengths)
        self.reserve(S, k)
        if len(rows) == len(self.lengths) and min(lengths) == S:
            self.k[:, :, S - 1 : S], self.v[:, :, S - 1 : S] = k, v
            return self.k[:, :, :S], self.v[:, :, :S], None
        if row_index is None:  # all rows
            row_index = torch.arange(len(rows), device=k.device)
        if places is None:
            places = torch.tensor([n - 1 for n in lengths], device=k.device)
        self.k[row_index, :, places], self.v[row_index, :, places] = k[:, :, 0], v[:, :, 0]
        return self.of_rows(rows, row_index, places)

    def of_rows(self, rows: list[int], row_index: torch.Tensor, places: torch.Tensor):
        """Keys and values of these rows (len(rows), n_kv, S, hd), and the mask over them, None where all are as long.

        row_index, places: on the device, which rows and where their newest token lies. Of some rows on a CPU, lists of each
        one's own as they lie there, (1, n_kv, length, hd): to bring them together takes longer than attention.
        """
        lengths, some = [self.lengths[r] for r in rows], len(rows) < len(self.lengths)
        if some and self.k.device.type == "cpu":
            keys, values = ([t[r : r + 1, :, :n] for r, n in zip(rows, lengths, strict=True)] for t in (self.k, self.v))
            return keys, values, None
        S = max(lengths)
        keys, values = (t[row_index, :, :S] if some else t[:, :, :S] for t in (self.k, self.v))
        ragged = min(lengths) < S
        mask = torch.arange(S, device=places.device) <= places[:, None] if ragged else None  # (rows, S)
        return keys, values, mask if mask is None else mask[:, None, None]


class Cache:
    """What a batch of sequences has left behind in every layer, and how many tokens each row has seen."""

    static = False

    def __init__(self, config, batch: int, limit: int):
        compact = config.routed_layers if config.compact_cache else []
        self.layers = [LayerCache(batch, limit, i in compact) for i in range(config.num_hidden_layers)]
        self.lengths = [0] * batch
        self.finished: torch.Tensor | None = None  # (B) bool: rows that no longer generate, never selected again

    @property
    def keys(self) -> torch.Tensor | None:
        """Those of some layer; None while no layer holds any, for all are routed and none has selected a token."""
        return next((layer.k for layer in self.layers if layer.k is not None), None)

    def advance(self, lengths: list[int] | None, T: int):
        """Each row has seen its next lengths[r] tokens, T without padding."""
        self.lengths = [past + new for past, new in zip(self.lengths, lengths or [T] * len(self.lengths), strict=True)]

    def bytes_used(self) -> int:
        """Bytes of the keys and values held (not of what is allocated ahead)."""
        total = 0
        for layer in self.layers:
            if layer.k is not None:
                total += 2 * sum(layer.lengths) * layer.k.size(1) * layer.k.size(3) * layer.k.element_size()
        return total


class StaticLayerCache:
    """A LayerCache whose tensors keep size and place, its lengths (B) on the device."""

    def __init__(self, filled: LayerCache, like: torch.Tensor, width: int, lengths: torch.Tensor):
        self.routed = filled.routed
        self.lengths = torch.zeros_like(lengths) if self.routed else lengths  # of dense layers: the cache's
        size = (*like.shape[:2], width, like.size(3))
        self.k, self.v = like.new_zeros(size), like.new_zeros(size)  # (B, n_kv, width, hd)
        self.state = {name: torch.empty_like(tensor) for name, tensor in filled.state.items()}
        for tensor in (self.lengths, self.k, self.v, *self.state.values()):
            torch._dynamo.mark_static_address(tensor, guard=False)  # else CUDA graphs refuse to write into it

    def remember(self, name: str, value: torch.Tensor):
        self.state[name].copy_(value)

    def append(self, k, v, rows, places=None):
        """One decoding step of all rows: k, v (B, n_kv, 1, hd) → all keys, values, and the mask over them.

        rows: (B) bool, those whose token a routed layer keeps; of the others, the next one takes the place. places: see
        LayerCache; here they are known.
        """
        at = torch.arange(k.size(0), device=k.device), slice(None), self.lengths
        self.k[at], self.v[at] = k[:, :, 0], v[:, :, 0]
        mask = torch.arange(self.k.size(2), device=k.device) <= self.lengths[:, None]  # (B, width)
        if self.routed:
            self.lengths.add_(rows)
        return self.k, self.v, mask[:, None, None]


class StaticCache:
    """A Cache whose tensors keep size and place: what a compiled decoding step works on."""

    static = True

    @torch.inference_mode(False)  # it is written again, in that mode and outside
    def __init__(self, filled: Cache):
        self.key = rows, width, routed_width, _, device = self.key_for(filled)
        self.lengths = torch.zeros(rows, dtype=torch.int64, device=device)  # (B)
        torch._dynamo.mark_static_address(self.lengths, guard=False)  # which no layer has where all are routed
        self.finished = torch.zeros(rows, dtype=torch.bool, device=device)  # (B)
        self.layers = []
        for layer in filled.layers:
            room = routed_width if layer.routed else width
            self.layers.append(StaticLayerCache(layer, filled.keys, room, self.lengths))

    @staticmethod
    def key_for(filled: Cache) -> tuple:
        """What a static cache must agree in with a filled one to take it in: rows, room in dense and in routed layers,
        types, device.

        A routed layer needs room for what it holds and all that may come. Rounded, for few values are compiled and recorded.
        """
        routed = max([max(layer.lengths) for layer in filled.layers if layer.routed], default=0)
        keys, limit = filled.keys, filled.layers[0].limit
        needed = limit, routed + limit - max(filled.lengths)
        dtypes = (keys.dtype, *(tensor.dtype for layer in filled.layers for tensor in layer.state.values()))
        return len(filled.lengths), *(-(-tokens // 256) * 256 for tokens in needed), dtypes, keys.device

    def load(self, filled: Cache):
        """Takes over what a prefill has left behind."""
        self.finished.zero_() if filled.finished is None else self.finished.copy_(filled.finished)
        self.lengths.copy_(torch.tensor(filled.lengths))
        for layer, other in zip(self.layers, filled.layers, strict=True):
            layer.lengths.copy_(torch.tensor(other.lengths))
            held = max(other.lengths)
            for kept, new in ((layer.k, other.k), (layer.v, other.v)):
                kept[:, :, held:] = 0  # the mask hides what was there, but not that it was NaN
                if held:
                    kept[:, :, :held] = new[:, :, :held]
            for name, tensor in other.state.items():
                layer.state[name].copy_(tensor)
