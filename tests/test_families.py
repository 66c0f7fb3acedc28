"""Qwen2, Llama and Qwen3: one block with three differences, against transformers' own classes, and what is refused."""

import json

import pytest
import torch
from helpers import random_ids, relative_error, small_model
from safetensors.torch import load_file

from errors import ModelError
from model import ModelConfig, Transformer

LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64}
SMALL = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "rms_norm_eps": 1e-6}
CASES = [
    {"model_type": "llama", "tie_word_embeddings": True},
    {"model_type": "llama", "tie_word_embeddings": False, "num_key_value_heads": 4},
    {"model_type": "llama", "head_dim": 16, "rope_theta": 5e5, "rope_scaling": LLAMA3},
    {"model_type": "qwen3", "tie_word_embeddings": True, "head_dim": 12},
    {"model_type": "qwen3", "tie_word_embeddings": False, "head_dim": 16, "num_key_value_heads": 1},
    {"model_type": "qwen2", "tie_word_embeddings": False},
]


def theirs(case, seed=0):
    """transformers' own model, its weights large enough to tell mistakes from noise, norms and biases included."""
    import transformers

    family = case["model_type"].capitalize()
    config = {name: value for name, value in (SMALL | case).items() if name != "model_type"}
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**config)
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values()))[:40])
def test_logits_equal_transformers_in_and_out(case, tmp_path):
    """Read from what transformers writes, and read by transformers from what we write; caches too."""
    from transformers import AutoModelForCausalLM

    original, ids = theirs(case), random_ids(2, 200)
    original.save_pretrained(tmp_path / "theirs")
    ours = Transformer.from_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = original(ids).logits
        assert relative_error(ours(ids).logits, expected) <= 1e-5
        cache = ours.new_cache(2, 200)
        ours(ids[:, :190], routing="causal", cache=cache)
        steps = [ours(ids[:, t : t + 1], routing="causal", cache=cache).logits for t in range(190, 200)]
        assert relative_error(torch.cat(steps, 1), expected[:, 190:]) <= 1e-5
        ours.save_pretrained(tmp_path / "ours")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
        assert type(again) is type(original)
        assert relative_error(again(ids).logits, expected) <= 1e-5
    names = load_file(tmp_path / "theirs" / "model.safetensors").keys()
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == names


@pytest.mark.parametrize("case", CASES[2:5], ids=lambda case: case["model_type"])
@pytest.mark.parametrize("architecture", ["mod", "dtf", "stt"])
def test_routed_models_of_every_family(architecture, case, tmp_path):
    """Converted at capacity 1 with straight-through gates they are the parent; cached equals uncached; FLOPs are counted."""
    original, ids = theirs(case | {"num_hidden_layers": 4}), random_ids(2, 60)
    original.save_pretrained(tmp_path)
    model = Transformer.from_pretrained(tmp_path, architecture=architecture, capacity=1.0, gate="straight_through")
    with torch.no_grad():
        assert relative_error(model(ids).logits, original(ids).logits) <= 1e-5
    routed = small_model(
        architecture, max_position_embeddings=512, **{k: v for k, v in case.items() if k != "num_key_value_heads"}
    )
    out = routed.generate(ids[:, :20], 30)
    with torch.no_grad():
        again = routed(out, routing="causal").logits[:, 19:-1].argmax(-1)
    assert torch.equal(out[:, 20:], again)
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        for layer in routed.routed:
            layer.offset = -1e4
        routed(ids, routing="causal")
    assert counter.get_total_flops() / ids.numel() == pytest.approx(routed.flops_per_token(60, capacity=1.0), rel=0.01)


# hidden, layers, heads, KV heads, head size, intermediate, vocabulary, tied; parameters as the models' cards count them
PUBLISHED = {
    "Qwen3-0.6B": ("qwen3", 1024, 28, 16, 8, 128, 3072, 151936, True, 596_049_920),
    "Qwen3-1.7B": ("qwen3", 2048, 28, 16, 8, 128, 6144, 151936, True, 1_720_574_976),
    "Qwen3-4B": ("qwen3", 2560, 36, 32, 8, 128, 9728, 151936, True, 4_022_468_096),
    "Qwen3-8B": ("qwen3", 4096, 36, 32, 8, 128, 12288, 151936, False, 8_190_735_360),
    "Qwen3-14B": ("qwen3", 5120, 40, 40, 8, 128, 17408, 151936, False, 14_768_307_200),
    "Qwen3-32B": ("qwen3", 5120, 64, 64, 8, 128, 25600, 151936, False, 32_762_123_264),
    "SmolLM2-135M": ("llama", 576, 30, 9, 3, 64, 1536, 49152, True, 134_515_008),
    "SmolLM2-360M": ("llama", 960, 32, 15, 5, 64, 2560, 49152, True, 361_821_120),
    "SmolLM2-1.7B": ("llama", 2048, 24, 32, 32, 64, 8192, 49152, True, 1_711_376_384),
    "Llama-3.2-1B": ("llama", 2048, 16, 32, 8, 64, 8192, 128256, True, 1_235_814_400),
    "Llama-3.2-3B": ("llama", 3072, 28, 24, 8, 128, 8192, 128256, True, 3_212_749_824),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    names += ("intermediate_size", "vocab_size", "tie_word_embeddings")
    *shape, parameters = PUBLISHED[name]
    with torch.device("meta"):
        model = Transformer(ModelConfig(**dict(zip(names, shape, strict=True))))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "qwen3_moe"}, "model_type='qwen3_moe' is not supported, only 'qwen2', 'llama', 'qwen3' are"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config (gptq) is not supported"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "RoPE scaling"),
        ({"use_sliding_window": True}, "use_sliding_window=true is not supported"),
        ({"layer_types": ["sliding_attention"] * 3}, "use_sliding_window=true is not supported"),
        ({"attention_bias": True}, "attention_bias=true is not supported"),
    ],
)
def test_what_would_be_computed_wrongly_is_refused(changes, message, tmp_path):
    theirs(CASES[3]).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(ModelError) as error:
        Transformer.from_pretrained(tmp_path)
    assert message in str(error.value)


def test_a_family_from_scratch():
    model = small_model("dtf", model_type="qwen3", head_dim=10)
    assert model.model.layers[0].self_attn.q_norm.weight.shape == (10,)
    assert model.model.layers[0].self_attn.q_proj.bias is None
    assert (model.model.layers[0].self_attn.k_norm.weight == 1).all()
