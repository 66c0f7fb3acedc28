"""A routed model in Hugging Face transformers: its Auto classes, `generate`, `pipeline`, Trainer, and lm-eval's `hf`.

    from transformers import AutoModelForCausalLM
    model = AutoModelForCausalLM.from_pretrained(DIRECTORY_OR_HUB_ID, trust_remote_code=True)

publish.py copies this file, and those of ours that it needs, beside the weights; transformers runs the copies. They add no
second model: the modules are a Transformer's, so that its tensors keep their names, and each call is one of its forward.
In evaluation tokens are routed causally; in training, with labels, by top-k, and the loss has every auxiliary term.

B sequences, T tokens, V vocabulary.
"""

import copy

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.generation import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast

from cache import Cache
from errors import ModelError
from model import ModelConfig, Transformer

# Not cuDNN's, which plans every new length anew, and decoding has one a token.
UNPLANNED = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class NanoDTFConfig(PretrainedConfig):
    """What config.json holds, as attributes; ModelConfig makes sense of them."""

    model_type = "nanodtf"


class GenerationCache(Cache):
    """The compact cache, with what the loop of `generate` asks of one."""

    is_compileable = is_croppable = False

    def get_seq_length(self, layer: int = 0) -> int:
        return max(self.lengths)


class NanoDTFForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = NanoDTFConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    accepts_loss_kwargs = False  # the loss is the mean over this batch's tokens, however many the whole step has

    def __init__(self, config: NanoDTFConfig):
        super().__init__(config)
        core = Transformer(ModelConfig.from_dict(config.to_dict()))
        self._modules = core._modules  # model and, unless it is the embedding, lm_head
        self.__dict__["core"] = core  # beside the modules: no name of theirs changes
        self._keep_in_fp32_modules_strict = [name for name in core.state_dict() if core.is_router(name)]
        for module in self.modules():
            module._is_hf_initialized = True  # by Transformer, in its own way
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args, output_loading_info=False, **kwargs):
        """As transformers' own. Raises ModelError where tensors are missing or unknown, instead of a warning."""
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        for what in ("missing", "unexpected"):
            if info[f"{what}_keys"]:
                raise ModelError(f"{model.name_or_path}: {what} tensors {', '.join(sorted(info[f'{what}_keys'])[:5])}")
        return (model, info) if output_loading_info else model

    def new_cache(self, rows: int, limit: int) -> GenerationCache:
        """An empty cache of `rows` sequences of at most `limit` tokens: past_key_values of the first call."""
        return GenerationCache(self.core.config, rows, limit)

    def forward(
        self,
        input_ids,
        attention_mask=None,
        labels=None,
        past_key_values=None,
        use_cache=None,
        return_dict=None,
        **others,  # peft names more, None or False
    ):
        """input_ids (B, T); attention_mask (B, T): 0 for padding, on either side; labels (B, T): input_ids, −100 where
        nothing is to be predicted. Returns logits (B, T, V), with a cache those of each row's newest token, and the loss.
        """
        others = [name for name, value in others.items() if value is not None and value is not False]
        if others:
            raise ModelError(f"{', '.join(others)}: not supported by a routed model")
        if use_cache and past_key_values is None:
            raise ModelError("use_cache=True needs a cache: past_key_values=model.new_cache(rows, tokens), or generate")
        training = self.training and labels is not None
        core = copy.copy(self.core)
        core._modules, core.training = self._modules, training  # which DataParallel, FSDP or resizing may have replaced
        starts, lengths = None, None
        begun = past_key_values is not None and past_key_values.get_seq_length() > 0
        if attention_mask is not None and not begun and not attention_mask.all():
            starts, lengths = runs(attention_mask, input_ids.shape)
            input_ids = shifted(input_ids, starts)  # padding on the right, as our cache wants it
        routing = "topk" if training else "causal"
        with sdpa_kernel(UNPLANNED):
            out = core(input_ids, None, routing, lengths, past_key_values)
        logits, loss = out.logits, None
        if starts is not None and past_key_values is None:
            logits = shifted(logits, -starts)
        if labels is not None:
            targets = F.pad(labels[:, 1:], (0, 1), value=-100)
            if starts is not None:
                targets = targets.masked_fill(attention_mask == 0, -100)
            lm = F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
            loss = core.total({"lm": lm} | out.losses)
        result = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)
        return result.to_tuple() if return_dict is False else result

    def generate(self, *args, **kwargs):
        """As transformers' own, its weights packed meanwhile: see kernels.py."""
        with self.core.packed():
            return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, generation_mode, batch_size, limit):
        """What `generate` calls before its loop; limit: tokens that will be filed of a row."""
        simple = generation_mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)
        if not simple or getattr(generation_config, "is_assistant", False):
            what = "assisted decoding" if simple else generation_mode.value.replace("_", " ")
            raise ModelError(f"{what} is not supported: the compact cache cannot be reordered or cut; decode or sample")
        if limit >= (longest := self.core.config.max_position_embeddings):
            raise ModelError(f"a prompt and new tokens of {limit + 1} in all pass max_position_embeddings={longest}")
        if generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            rows = batch_size * generation_config.num_return_sequences
            model_kwargs["past_key_values"] = self.new_cache(rows, limit)


def runs(mask: torch.Tensor, shape) -> tuple[torch.Tensor, list[int]]:
    """Where the tokens of each row begin (B), and how many they are. Raises ModelError for a mask with holes."""
    if mask.shape == shape:
        starts, lengths = mask.int().argmax(1), mask.bool().sum(1)
        places = torch.arange(shape[1], device=mask.device) - starts[:, None]
        if torch.equal((places >= 0) & (places < lengths[:, None]), mask.bool()):
            return starts, lengths.tolist()
    raise ModelError(f"attention_mask {tuple(mask.shape)} must be of input_ids' shape {tuple(shape)}, without holes")


def shifted(values: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """Row r of (B, T, …) moved by[r] places to the left; what falls off comes back on the right."""
    T = values.size(1)
    places = (torch.arange(T, device=values.device) + by[:, None]) % T  # (B, T)
    return torch.take_along_dim(values, places.view(*places.shape, *[1] * (values.ndim - 2)), 1)
