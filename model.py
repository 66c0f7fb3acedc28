"""Four architectures on the Qwen2 block: dense, Mixture-of-Depths, DTF and STT; the whole model around their layers.

    model = Transformer(ModelConfig(architecture="dtf", capacity=0.5))
    out = model(input_ids, targets)                 # training: top-k routing, out.loss with every auxiliary term
    out = model(input_ids, routing="causal")        # inference: token t decides from what is known at t
    ids = model.generate(input_ids, max_new_tokens=50)

B sequences, T tokens, d hidden size, V vocabulary. The layers are in blocks.py and architectures.py, generation in
generation.py, files in weights.py.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Annotated, Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import kernels
import lora
import weights
from architectures import ALIASES, ARCHITECTURES, layer_class
from blocks import Block, Context, Notes, RMSNorm, RoutedBlock, rope_tables
from configurator import Count, NonNegative, Positive, Range, problems
from errors import ModelError
from files import write_whole
from generation import Generation, need_compiler
from tokenizer import ends_of_text

# The sizes of `--size`: hidden, layers, heads, KV heads, intermediate; the published Qwen2.5 shapes from "0.5B" on.
_SHAPES = {
    "demo": (128, 6, 4, 2, 352),
    "10M": (256, 10, 4, 2, 1024),
    "50M": (512, 14, 8, 2, 1792),
    "0.5B": (896, 24, 14, 2, 4864),
    "1.5B": (1536, 28, 12, 2, 8960),
    "3B": (2048, 36, 16, 2, 11008),
    "7B": (3584, 28, 28, 4, 18944),
    "14B": (5120, 48, 40, 8, 13824),
    "32B": (5120, 64, 40, 8, 27648),
    "72B": (8192, 80, 64, 8, 29568),
}
_SHAPE_FIELDS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")
SIZES: dict[str, dict] = {name: dict(zip(_SHAPE_FIELDS, shape, strict=True)) for name, shape in _SHAPES.items()}
for _name, _size in SIZES.items():
    if _name.endswith("B"):
        _small = _name in ("0.5B", "1.5B", "3B")
        _size |= {"vocab_size": 151936 if _small else 152064, "tie_word_embeddings": _small}
        _size |= {"max_position_embeddings": 32768, "rope_theta": 1e6}


FAMILIES = ("qwen2", "llama", "qwen3")
ROUTED = "nanodtf"  # the model_type of every routed model in config.json: see hf.py
Capacity = Annotated[float, Range(0, 1, open_low=True)]


LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}  # of its RoPE scaling


@dataclass
class Shape:
    """What every architecture has."""

    architecture: str = "dense"  # dense, mod, dtf or stt (also: standard, sdt, tdtf)
    vocab_size: Count = 4096  # rows of the embedding
    hidden_size: Count = 128  # d, the width of the residual stream
    intermediate_size: Count = 352  # width of the MLP
    num_hidden_layers: Count = 6  # blocks
    num_attention_heads: Count = 4  # query heads
    num_key_value_heads: Count = 2  # key and value heads, shared by groups of query heads
    max_position_embeddings: Count = 2048  # longest sequence, in tokens
    model_type: Literal["qwen2", "llama", "qwen3"] = "qwen2"  # biases on q, k, v; none; none, and q and k normed
    head_dim: Count | None = None  # size of a head (unset: hidden_size / num_attention_heads)
    rope_theta: Positive = 10000.0  # base of the rotary frequencies
    rope_scaling: dict | None = None  # Llama 3's, as its config.json has it
    rms_norm_eps: NonNegative = 1e-6  # epsilon of every RMSNorm
    tie_word_embeddings: bool = True  # the head is the embedding
    eos_token_id: int | list[int] | None = None  # ids that end a text: generation stops at them
    capacity: Capacity | list[Capacity] = 0.5  # share of the tokens that a routed block takes; a list: one per layer
    allotment: list[NonNegative] | None = None  # p of each routed layer, which takes γ^p of the tokens (unset: 1)
    calibrated: dict | None = None  # {capacity: offset of each routed layer's causal decision}: see capacity_choices
    routed_layers: list[int] | Literal["auto"] | None = None  # blocks that skip tokens (unset: every second, from 1)
    routed_part: Literal["block", "mlp"] = "block"  # mlp: attention runs for every token, only the MLP is routed
    kv: Literal["selected", "all"] = "selected"  # all: skipped tokens give keys and values too, so that others see them
    skip: Literal["identity", "predict"] = "identity"  # predict: a skipped token gets a small network's guess
    skip_weight: float = 0.05  # predict: weight of the guess's squared error
    router: Literal["learned", "fitted", "random", "positional"] = "learned"  # fitted to a parent; the rest: controls
    router_input: Literal["raw", "normed"] = "raw"  # normed: routers read RMS-normalised hidden states
    selection: Literal["topk", "threshold"] = "topk"  # in training; threshold: above the average k-th score
    gate: Literal["soft", "straight_through"] | None = None  # unset: soft, for stt straight_through (no G at inference)
    causal_decision: Literal["router", "threshold"] = "router"  # at inference: trained student, or average k-th score
    causal_threshold: Annotated[float, Range(0, 1, True, True)] = 0.5  # probability above which the router selects
    causal_weight: float = 0.01  # weight of the causal routers' BCE
    distill_weight: float = 1.0  # weight of KL(teacher ‖ model), where train.py's distill_from names a teacher


@dataclass
class ModelConfig(*dict.fromkeys(kind.Settings for kind in ARCHITECTURES.values()), Shape):
    """What a model is: Shape, and the Settings of every architecture."""

    def __post_init__(self):
        self.architecture = ALIASES.get(self.architecture, self.architecture)
        if type(self.capacity) is int:
            self.capacity = float(self.capacity)  # 1 is what 1.0 was calibrated as
        for field in fields(self):
            if isinstance(field.default, tuple):  # JSON has lists only
                setattr(self, field.name, tuple(getattr(self, field.name)))
        found = problems(self)
        if self.architecture in ARCHITECTURES and not issubclass(self.kind, RoutedBlock):
            self.routed_layers = []
        elif not self.routed_layers:
            self.routed_layers = list(range(1, self.num_hidden_layers, 2))
        if self.architecture not in ARCHITECTURES:
            found.insert(0, f"architecture={self.architecture!r} is not one of {', '.join(ARCHITECTURES)}")
        if not found:
            found = self.conflicts()
        if found:
            raise ModelError("; ".join(found))

    def conflicts(self) -> list[str]:
        """What is wrong with values that are right by themselves."""
        found = []
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.head_dim is None and self.hidden_size % heads:
            found.append(f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={heads}")
        self.head_dim = self.head_dim or self.hidden_size // heads
        if not found and self.head_dim % 2:
            found.append(f"hidden_size / num_attention_heads = {self.head_dim} must be even for RoPE")
        if self.rope_scaling is not None and (missing := LLAMA3 - self.rope_scaling.keys()):
            found.append(
                f"rope_scaling={self.rope_scaling} lacks {', '.join(sorted(missing))}: Llama 3's is known here"
            )
        if heads % kv_heads:
            found.append(f"num_attention_heads={heads} is not divisible by num_key_value_heads={kv_heads}")
        if self.causal_decision == "threshold" and self.router == "learned" and not self.kind.scores_causally:
            what = f"not available for {self.architecture}: its score looks at the update"
            found.append(f"causal_decision='threshold' is {what}")
        if self.causal_decision == "threshold" and self.by_position:
            found.append(f"causal_decision='threshold' needs a score, and router={self.router!r} has none")
        if self.selection == "threshold" and self.causal_decision != "threshold":
            found.append("selection='threshold' needs causal_decision='threshold': it is the same decision")
        if (
            self.kind.scores_causally is False
            and self.stt_output == "dense"
            and self.skip != "identity"
            and self.router == "learned"
        ):
            found.append(f"stt_output='dense' never skips in training: skip={self.skip!r} would learn nothing")
        found += self.layer_conflicts()
        if isinstance(self.capacity, list | tuple) and len(self.capacity) != len(self.routed_layers):
            found.append(f"capacity has {len(self.capacity)} values for the routed layers {self.routed_layers}")
        if self.allotment is not None and len(self.allotment) != len(self.routed_layers):
            found.append(f"allotment has {len(self.allotment)} values for the routed layers {self.routed_layers}")
        if self.calibrated is not None:
            if str(self.capacity) not in self.calibrated:
                known = ", ".join(self.calibrated)
                found.append(f"capacity={self.capacity} is not calibrated, {known} are: name one of them")
            elif not all(self.are_offsets(each) for each in self.calibrated.values()):
                found.append(f"calibrated needs an offset for each of {len(self.routed_layers)} routed layers")
        return found

    def are_offsets(self, given) -> bool:
        """Whether it is a list of a number for each routed layer."""
        whole = isinstance(given, list) and len(given) == len(self.routed_layers)
        return whole and all(isinstance(offset, float) and math.isfinite(offset) for offset in given)

    def layer_conflicts(self) -> list[str]:
        layers = self.routed_layers
        if layers == "auto":
            return ["routed_layers='auto' is chosen when train.py converts a model: set init_from"]
        if sorted(set(layers)) != layers or (layers and not 0 <= layers[0] <= layers[-1] < self.num_hidden_layers):
            return [f"routed_layers={layers} must ascend, from 0 to {self.num_hidden_layers - 1}"]
        alone = [i for i in layers if i == 0 or i - 1 in layers]
        if self.kind.below and alone and self.router == "learned":
            return [f"routed_layers={layers}: below layer {alone[0]} {self.architecture} needs one that is not routed"]
        return []

    @property
    def ends(self) -> list[int]:
        """The ids that end a text."""
        ends = self.eos_token_id
        return ends if isinstance(ends, list) else [] if ends is None else [ends]

    @property
    def compact_cache(self) -> bool:
        """Whether a routed layer's keys and values are those of its selected tokens only."""
        return self.routed_part == "block" and self.kv == "selected"

    @property
    def by_position(self) -> bool:
        """Whether tokens are chosen by position alone: the controls, which have no score and no causal router."""
        return self.router in ("random", "positional")

    @property
    def kind(self) -> type[Block]:
        """The class that says what the architecture is."""
        return ARCHITECTURES[self.architecture]

    @property
    def capacities(self) -> list[float]:
        """One per routed layer."""
        return self.capacities_at(self.capacity)

    def capacities_at(self, capacity: float | list[float]) -> list[float]:
        """One per routed layer, where `capacity` is one for all of them, to be allotted, or a list."""
        if isinstance(capacity, list | tuple):
            return list(capacity)
        return [capacity**power for power in self.allotment or [1.0] * len(self.routed_layers)]

    @property
    def offsets(self) -> list[float]:
        """What each routed layer's causal decision is moved by."""
        return (self.calibrated or {}).get(str(self.capacity)) or [0.0] * len(self.routed_layers)

    @classmethod
    def preset(cls, size: str, **overrides) -> "ModelConfig":
        """The shape of `--size` ("demo", "10M", "50M", "0.5B" … "72B"), any field overridden. Raises ModelError."""
        if size not in SIZES:
            raise ModelError(f"size={size!r} is not one of {', '.join(SIZES)}")
        return cls(**(SIZES[size] | overrides))

    def to_dict(self) -> dict:
        """The content of config.json: the family's own config plus our fields.

        A routed model is none of its family: `model_type` and `architectures`, by which transformers, vLLM and others
        choose their code, say so, and `family` is what our `model_type` is.
        """
        theirs = {"hidden_act": "silu", "use_sliding_window": False, "attention_bias": False} | asdict(self)
        if self.routed_layers:  # rope_parameters: where transformers now looks for the two, whatever the model_type
            scaling = theirs.pop("rope_scaling") or {"rope_type": "default"}
            theirs["rope_parameters"] = scaling | {"rope_theta": theirs.pop("rope_theta")}
            return theirs | {"architectures": ["NanoDTFForCausalLM"], "model_type": ROUTED, "family": self.model_type}
        return theirs | {"architectures": [f"{self.model_type.capitalize()}ForCausalLM"]}

    @classmethod
    def from_dict(cls, config: dict, **overrides) -> "ModelConfig":
        """Reads config.json, ours or a family's own. Raises ModelError for what this code would compute wrongly."""
        if config.get("model_type") == ROUTED:
            config = config | {"model_type": config.get("family")}
        if config.get("model_type") not in FAMILIES:
            supported = ", ".join(map(repr, FAMILIES))
            raise ModelError(f"model_type={config.get('model_type')!r} is not supported, only {supported} are")
        if config.get("use_sliding_window") or set(config.get("layer_types") or ()) - {"full_attention"}:
            raise ModelError("use_sliding_window=true is not supported: attention here always sees the whole sequence")
        if config.get("hidden_act", "silu") != "silu":
            raise ModelError(f"hidden_act={config['hidden_act']!r} is not supported, only 'silu' is")
        if config.get("quantization_config"):
            method = config["quantization_config"].get("quant_method")
            raise ModelError(f"quantization_config ({method}) is not supported: name the model's unquantised weights")
        for bias in ("attention_bias", "mlp_bias"):
            if config.get(bias):
                raise ModelError(f"{bias}=true is not supported: no such model of these families is published")
        rope = config.get("rope_parameters") or {}
        scaling = (config.get("rope_scaling") or rope) or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ("default", "llama3"):
            raise ModelError(f"RoPE scaling {scaling} is not supported, only the default RoPE and Llama 3's are")
        known = {f.name: config[f.name] for f in fields(cls) if f.name in config}
        known["rope_scaling"] = None
        if kind == "llama3":
            known["rope_scaling"] = {name: value for name, value in scaling.items() if name != "rope_theta"}
        known.setdefault("rope_theta", rope.get("rope_theta", 10000.0))
        known.setdefault("num_key_value_heads", known.get("num_attention_heads", cls.num_attention_heads))
        known.setdefault("tie_word_embeddings", False)  # Qwen2Config's own default
        return cls(**(known | overrides))


# ---------------------------------------------------------------------------------------------------------------------
# The model


class Trunk(nn.Module):
    """Everything between token ids and logits; what --compile compiles."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.config = cfg
        # Not nn.Embedding(…), which draws numbers that nothing reads, and on the meta device imports the compiler.
        self.embed_tokens = nn.Embedding.from_pretrained(torch.empty(cfg.vocab_size, cfg.hidden_size), freeze=False)
        self.layers = nn.ModuleList(layer_class(cfg, i)(cfg, i) for i in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        # Keep only each layer's input, and run the layer again in the backward pass.
        self.gradient_checkpointing = False

    def forward(self, input_ids, routing="topk", lengths=None, cache=None):
        """(B, T) ids → hidden states behind the last norm, (B, T, d), with a cache (B, 1, d) of each row's newest token, and
        the notes of every layer.
        """
        mode, positions = "packed", torch.arange(input_ids.size(1), device=input_ids.device)  # (T)
        if cache is not None and cache.static:
            mode, positions = "static", cache.lengths[:, None]  # (B, 1)
        elif cache is not None and max(cache.lengths) > 0:
            mode, positions = "step", torch.tensor(cache.lengths, device=input_ids.device)[:, None]  # (B, 1)
        rope = rope_tables(positions, self.config.head_dim, self.config.rope_theta, self.config.rope_scaling)
        by_threshold = self.layers if self.config.selection == "threshold" else []
        thresholds = {layer.index: layer.threshold for layer in by_threshold if isinstance(layer, RoutedBlock)}
        ctx = Context(mode, routing, positions, rope, lengths, cache, thresholds)
        x, notes = self.embed_tokens(input_ids), [Notes()]  # (B, T, d)
        for layer in self.layers:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                x, layer_notes = checkpoint(layer, x, ctx, notes[-1], use_reentrant=False)
            else:
                x, layer_notes = layer(x, ctx, notes[-1])
            notes.append(layer_notes)
        return self.norm(x if cache is None else ctx.last(x)[:, None]), notes[1:]


@dataclass
class Output:
    logits: torch.Tensor | None  # (B, T, V); (B, 1, V) of each row's newest token with a cache; None with targets
    loss: torch.Tensor | None  # lm + Σ weight · mean over layers
    losses: dict[str, torch.Tensor]  # every term unweighted: lm, causal, those of the architecture, distill
    stats: dict[str, torch.Tensor]  # means over routed layers, and layer_{i}/… of each
    masks: dict[int, torch.Tensor] | None = None  # {layer: (B, T) bool}, the tokens that ran
    # {layer: {score, G, S_CE, S_CU, causal_probability, margin}}, each (B, T); margin: see blocks.Decision
    tokens: dict[int, dict[str, torch.Tensor]] | None = None
    rules: dict[int, str] | None = None  # {layer: what decided}: see blocks.Decision


class Transformer(Generation, nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.compiled = None
        self.decodes_compiled, self.static = False, None
        self.init_weights(self.state_dict())

    @torch.no_grad()
    def init_weights(self, names):
        """New values for the named tensors, drawn on the CPU one after another: the same however they are sharded."""
        for name, tensor in self.state_dict().items():
            if name in names and not tensor.is_meta:
                local, rows = weights.local_rows(tensor)
                in_place = local is tensor and tensor.device.type == "cpu"
                whole = tensor if in_place else torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                self.init_tensor(name, whole)
                if not in_place:
                    local.copy_(whole[rows] if rows else whole)

    def init_tensor(self, name: str, tensor: torch.Tensor):
        """N(0, 0.02²) for matrices, ones for norms and numbers, zeros for biases, and the constants a module names itself.

        What a block adds to the residual stream starts smaller by √(2 · layers), as in GPT-2 (Radford et al. 2019,
        section 2.3): without it, the first blocks drown the embedding (docs/LOG.md).
        """
        owner, _, last = name.rpartition(".")
        constants = getattr(self.get_submodule(owner), "initial", {})
        if last in constants:
            tensor.fill_(constants[last])
        elif last == "bias":
            tensor.zero_()
        elif tensor.ndim <= 1:
            tensor.fill_(1.0)
        else:
            residual = name.endswith(("self_attn.o_proj.weight", "mlp.down_proj.weight"))
            tensor.normal_(0.0, 0.02 / math.sqrt(2 * self.config.num_hidden_layers) if residual else 0.02)

    def compile_trunk(self):
        """torch.compile for top-k routing. The module itself stays as it is: no prefix in names, causal routing eager."""
        need_compiler()
        # One variant for each stair of an annealed capacity, with and without gradients; of every block where FSDP's hooks
        # cut the graph between them. Beyond the limits all runs eager.
        variants, dynamo = max(64, 16 * len(self.model.layers)), torch._dynamo.config
        dynamo.recompile_limit = max(variants, dynamo.recompile_limit)
        dynamo.accumulated_recompile_limit = max(variants, dynamo.accumulated_recompile_limit)
        self.__dict__["compiled"] = torch.compile(self.model, dynamic=False)

    @property
    def routed(self) -> list[RoutedBlock]:
        return [layer for layer in self.model.layers if isinstance(layer, RoutedBlock)]

    @property
    def head_weight(self) -> torch.Tensor:
        """(V, d): the head's own matrix, or the embedding where the two are tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def rate_group(self, name: str) -> str:
        """Which learning rate a tensor has: base, lora, or what the layer that adds it says (`Block.parts`)."""
        if ".lora_" in name:
            return "lora"
        place = name.split(".")  # model.layers.{i}.{part}.…
        if place[:2] != ["model", "layers"]:
            return "base"
        return self.model.layers[int(place[2])].parts.get(place[3], "base")

    def is_routed_part(self, name: str) -> bool:
        """Whether a conversion from a dense checkpoint starts this tensor anew."""
        return self.rate_group(name) not in ("base", "lora")

    def is_router(self, name: str) -> bool:
        """Whether a tensor decides which tokens run: a comparison, so it stays in float32 and whole on every rank."""
        return self.rate_group(name) in ("router", "causal_router")

    @torch.inference_mode(False)  # whose tensors are never packed, for nobody counts their changes: kernels.py
    def to_dtype(self, dtype: torch.dtype) -> "Transformer":
        """The weights in dtype, but what routes in float32: bfloat16 makes ties."""
        for name, tensor in [*self.named_parameters(), *self.named_buffers()]:
            if not self.is_router(name):
                tensor.data = tensor.data.to(dtype)
        return self

    def set_capacity(self, capacity: float | list[float]):
        """Share of the tokens that every routed layer takes from now on, also what is saved; a list: one per layer.

        Raises ModelError for one that a model of many capacities is not calibrated for.
        """
        self.config = replace(self.config, capacity=capacity)
        for layer, value, offset in zip(self.routed, self.config.capacities, self.config.offsets, strict=True):
            layer.capacity, layer.offset = value, offset

    def schedule(self, progress: float):
        """What an architecture changes with the progress of training, 0 at its start and 1 at its end."""
        for layer in self.routed:
            layer.schedule(progress)

    # -- forward ------------------------------------------------------------------------------------------------------

    def forward(
        self, input_ids, targets=None, routing="topk", lengths=None, cache=None, return_masks=False, teacher=None
    ) -> Output:
        """input_ids: (B, T) int64; targets: (B, T), targets[t] the token after input_ids[t], −100 where there is none.

        routing: "topk" (training: the k best of each sequence, looks ahead) or "causal" (inference).
        lengths: tokens of each row, where rows are padded on the right. cache: see `new_cache`; with one, the first call
        takes the prompts and every further call one token a row, and logits are those of each row's newest token.
        teacher: (hidden states (B, T, d') behind the last norm, head (V, d')) of a model to distil from, beside targets.
        Raises ModelError for a sequence beyond max_position_embeddings, an empty one, or an unknown routing.
        """
        lengths = self.checked(input_ids, routing, lengths, cache)
        if targets is not None and cache is not None:
            raise ModelError("a KV cache keeps the newest token's logits alone: targets go without one")
        plain = routing == "causal" or lengths is not None
        trunk = self.model if self.compiled is None or plain else self.compiled
        hidden, notes = trunk(input_ids, routing, lengths, cache)
        if cache is not None:
            cache.advance(lengths, input_ids.size(1))
        if self.training and torch.is_grad_enabled() and self.config.causal_decision == "threshold":
            for layer in self.routed:
                layer.update_threshold(notes[layer.index].stats["kth_score"])

        losses, stats = self.collect(notes)
        if targets is None:
            out = Output(kernels.linear(hidden, self.head_weight), None, losses, stats)  # logits (B, T, V)
        else:
            loss, of_head = head_loss(hidden, self.head_weight, targets, teacher, self.config.distill_weight)
            out = Output(None, self.total({"lm": loss} | losses), of_head | losses, stats)
        if return_masks:
            decisions = {i: layer_notes.decision for i, layer_notes in enumerate(notes) if layer_notes.decision}
            out.masks = {i: decision.mask for i, decision in decisions.items()}
            out.rules = {i: decision.rule for i, decision in decisions.items()}
            out.tokens = {i: notes[i].tokens | {"margin": decision.margin} for i, decision in decisions.items()}
        return out

    def checked(self, input_ids, routing, lengths, cache) -> list[int] | None:
        """Raises ModelError for what `forward` does not take; returns lengths as ints, None where no row is padded."""
        if routing not in ("topk", "causal"):
            raise ModelError(f"routing={routing!r} is not one of topk, causal")
        B, T = input_ids.shape
        if T == 0 or B == 0:
            raise ModelError("an empty sequence has nothing to predict from: give at least one token")
        past, longest = max(cache.lengths) if cache is not None else 0, self.config.max_position_embeddings
        if past + T > longest:
            raise ModelError(f"a sequence of {past + T} tokens is longer than max_position_embeddings={longest}")
        if cache is not None and (routing != "causal" or (past and T != 1)):
            raise ModelError("a KV cache takes routing='causal': the prompts first, then one token a row")
        if lengths is None:
            return None
        lengths = [int(n) for n in lengths]
        if len(lengths) != B or not all(1 <= n <= T for n in lengths):
            raise ModelError(f"lengths={lengths} must give 1 to {T} tokens for each of {B} rows")
        return None if min(lengths) == T else lengths

    def collect(self, notes: list[Notes]) -> tuple[dict, dict]:
        """Losses as means over layers; statistics likewise, and of each layer under layer_{i}/…"""
        losses, stats, of_layer = {}, {}, {}
        for i, layer_notes in enumerate(notes):
            for name, value in layer_notes.losses.items():
                losses.setdefault(name, []).append(value)
            for name, value in layer_notes.stats.items():
                stats.setdefault(name, []).append(value.detach())
                of_layer[f"layer_{i}/{name}"] = value.detach()
        losses = {name: torch.stack(values).mean() for name, values in losses.items()}
        return losses, {name: torch.stack(values).mean() for name, values in stats.items()} | of_layer

    def total(self, losses: dict[str, torch.Tensor]) -> torch.Tensor:
        """lm + Σ weight · loss. Raises ModelError for a loss whose weight the architecture has not declared."""
        total = losses["lm"]
        for name, loss in losses.items():
            weight = getattr(self.config, f"{name}_weight", None)
            if weight is not None:
                total = total + weight * loss
            elif name != "lm":
                where = f"the Settings of {self.config.kind.__name__}, and enter it before model.py is imported"
                raise ModelError(f"the loss {name!r} has no weight: declare {name}_weight in {where}")
        return total

    # -- what it costs ------------------------------------------------------------------------------------------------

    def flops_per_token(
        self, seq_len: int, training: bool = False, capacity: float | list[float] | None = None
    ) -> float:
        """Floating point operations of a sequence of seq_len tokens, divided by seq_len.

        A multiplication and an addition count as two. Counted are all matrix products: projections, attention (queries
        by keys and weights by values over the full square of the packed length, as FlopCounterMode counts it), routers,
        priors and the head. training adds the backward pass, without gradients of what is frozen, and what only training
        computes. capacity: other than the configured one, a float or one float per routed layer.
        """
        routed = self.config.routed_layers
        capacities = self.config.capacities_at(self.config.capacity if capacity is None else capacity)
        capacities = dict(zip(routed, capacities, strict=True))
        head = 2.0 * seq_len * self.config.hidden_size * self.config.vocab_size
        forward, backward = head, head * (1 + self.head_weight.requires_grad)
        for i, layer in enumerate(self.model.layers):
            input_grad = i > 0 or self.model.embed_tokens.weight.requires_grad
            of_layer = layer.flops(seq_len, capacities.get(i, 1.0), training, input_grad)
            forward, backward = forward + of_layer[0], backward + of_layer[1]
        return (forward + backward * training) / seq_len

    def decode_bytes(self, batch: int, context: float, selected: dict[int, float], ran: dict[int, float]) -> float:
        """Bytes of weights, keys and values that one decoding step of `batch` rows behind `context` tokens must read.

        selected: {routed layer: share of the tokens that it selects}; ran: {… share of steps in which any row ran}.
        """
        cfg = self.config
        kv = 2 * cfg.num_key_value_heads * cfg.head_dim * self.head_weight.element_size()  # of one token in one layer
        total = self.head_weight.nbytes + self.model.norm.weight.nbytes
        for i, layer in enumerate(self.model.layers):
            share = selected.get(i, 1.0)
            attending = share if cfg.routed_part == "block" else 1.0
            seen = context * (share if cfg.compact_cache else 1.0)
            total += layer.decode_bytes(ran) + batch * attending * seen * kv
        return total

    # -- weights in and out -------------------------------------------------------------------------------------------

    @property
    def lora_rank(self) -> int:
        """r of the LoRA adapters that lora.py has put in, 0 without."""
        return self.peft_config["default"].r if hasattr(self, "peft_config") else 0

    def own_state(self) -> dict[str, torch.Tensor]:
        """The tensors that `save_pretrained` writes: all, or with LoRA those that are not of the frozen base."""
        return lora.own_state(self) if self.lora_rank else self.state_dict()

    def save_pretrained(self, directory: str, state_dict: dict | None = None, shard_size: int = 5 * 10**9):
        """Writes config.json and model.safetensors, or several files and their index where it would pass shard_size bytes.

        Each is written to a temporary name first; weights that an earlier call left there go. state_dict: instead of its
        own. Of a model with LoRA only what was trained is written: see lora.py.
        """
        state_dict = state_dict or self.own_state()
        tensors = {name: tensor.detach().contiguous() for name, tensor in state_dict.items()}
        if self.lora_rank:
            lora.save(self, directory, tensors)
        else:
            weights.write_weights(directory, tensors, shard_size)
            lora.remove(directory)
        self.save_config(directory)

    def save_config(self, directory: str):
        """Writes config.json."""
        dtype = str(self.head_weight.dtype).removeprefix("torch.")
        write_whole(os.path.join(directory, "config.json"), self.config.to_dict() | {"dtype": dtype})

    @classmethod
    @torch.inference_mode(False)  # as in to_dtype
    def from_pretrained(
        cls, directory_or_hub_id: str, dtype=torch.float32, shard=None, keep_layers=None, **config_overrides
    ) -> "Transformer":
        """Opens a Qwen2 checkpoint or one of ours; `architecture=` converts a dense one, whose routed parts start new.

        keep_layers: the blocks that stay, by their number there; the others are dropped for good. shard: a function that
        shards the model, still without memory, and gives it memory: only this rank's rows are read.
        `loaded` and `initialized` on the result name the tensors of either kind. Beside the model itself, 16 MB of the
        files are in memory at a time. Raises ModelError for a model of another type or shape, unknown or missing tensors,
        and pickled weights.
        """
        directory = weights.find_model(str(directory_or_hub_id))
        stored = read_config(directory)
        saved = ModelConfig.from_dict(stored)
        if keep_layers:
            if (
                sorted(set(keep_layers)) != keep_layers
                or not 0 <= keep_layers[0] <= keep_layers[-1] < saved.num_hidden_layers
            ):
                raise ModelError(f"keep_layers={keep_layers} must ascend, from 0 to {saved.num_hidden_layers - 1}")
            config_overrides["num_hidden_layers"] = len(keep_layers)
        config = ModelConfig.from_dict(stored, **config_overrides)
        if lora.is_adapter(directory):
            if shard is not None:
                raise ModelError(f"{directory} is a LoRA adapter, which cannot be sharded: leave parallel=fsdp out")
            return lora.load(
                directory, lambda base, keep: cls.from_pretrained(base, dtype, keep_layers=keep, **asdict(config))
            )
        with torch.device("meta"):
            model = cls(config).to_dtype(dtype)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}

        def rename(name):
            if name == "lm_head.weight" and config.tie_word_embeddings:  # some files hold the tied head twice
                return None
            return renumbered(name, keep_layers) if keep_layers else name

        readers = weights.open_tensors(directory, weights.weight_paths(directory), expected, rename)
        converting = saved.architecture == "dense" != config.architecture
        new = {name for name in expected if converting and model.is_routed_part(name)}
        weights.refuse_missing(directory, expected.keys() - readers.keys() - new)
        model.loaded, model.initialized = sorted(readers), sorted(expected.keys() - readers.keys())
        if shard is None:  # all is as it should be: only now memory is taken
            model.to_empty(device="cpu")
        else:
            shard(model)
        weights.fill(model.state_dict(), readers)
        model.init_weights(model.initialized)
        return model.eval()


def renumbered(name: str, keep_layers: list[int]) -> str | None:
    """The name of a tensor where only these blocks stay, None where its block goes."""
    place = name.split(".")
    if place[:2] == ["model", "layers"]:
        if int(place[2]) not in keep_layers:
            return None
        place[2] = str(keep_layers.index(int(place[2])))
    return ".".join(place)


def read_config(directory: str) -> dict:
    """The content of config.json, of a model that this code computes rightly, and the ids that end its texts.

    Raises ModelError.
    """
    path = os.path.join(directory, "config.json")
    try:
        with open(path, encoding="utf-8") as f:
            stored = json.load(f)
        ModelConfig.from_dict(stored)
    except ModelError as error:
        raise ModelError(f"{path}: {error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ModelError(f"{path} is not a model configuration: {error}") from None
    return stored | {"eos_token_id": ends_of_text(directory) or None}


def head_loss(hidden, weight, targets, teacher, distill_weight: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Cross-entropy, with a teacher + distill_weight · KL(teacher ‖ model), and {lm: …, distill: …}: see kernels.py.

    hidden (B, T, d), weight (V, d), targets (B, T), teacher (hidden states (B, T, d'), weight (V, d')) or None.
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    given = hidden.flatten(0, 1).to(dtype), weight, targets.flatten()
    if teacher is None:
        loss = kernels.head_loss(*given)
        return loss, {"lm": loss}
    states, head = (t.to(dtype) for t in teacher)
    loss, lm, divergence = kernels.taught_loss(*given, (states.flatten(0, 1), head), distill_weight)
    return loss, {"lm": lm, "distill": divergence}
