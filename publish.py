"""What a model takes along when it leaves: a card, the ids that generation stops at, and the way to the Hugging Face hub.

The token comes from the environment: HF_TOKEN, or what `hf auth login` has stored. A failed upload leaves the files as
they are, and `hf upload` tries again.
"""

import json
import math
import shlex
import subprocess
import textwrap
from pathlib import Path

import torch

from errors import HubError
from model import ModelConfig, Transformer

ABOUT = {
    "dense": "Qwen2: every token runs through every block.",
    "mod": "Mixture-of-Depths (arXiv 2404.02258): a learned score picks the tokens that enter every other block; the rest "
    "skip it.",
    "dtf": "DTF, a Dynamic Transformer (arXiv 2511.21408): a decision block and a cheap prior measure each token's "
    "surprise; the next block runs on the most surprising tokens, the rest skip it.",
    "stt": "STT, a Subjective Timescale Transformer (arXiv 2511.21408): a transition network predicts each token's update "
    'from the token before; blocks run where it and "no change" disagree, other tokens skip them.',
}


def reason(error):
    """The first line of what huggingface_hub or the network said."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def reserve(repo_id):
    """Make sure that `repo_id` can be pushed to: create it, private, unless it exists. Raises HubError.

    To be called before a run: a name, a token or a network that fails is found now, not after days.
    """
    from huggingface_hub import create_repo, get_token

    if not is_hub_id(repo_id):
        raise HubError(f"push_to_hub={repo_id!r} is no repository name like user/name")
    if not get_token():
        raise HubError(f"push_to_hub={repo_id} needs a token that may write: set HF_TOKEN, or hf auth login")
    try:
        create_repo(repo_id, private=True, exist_ok=True)
    except Exception as e:  # noqa: BLE001, whatever the hub or the network did
        raise HubError(f"push_to_hub={repo_id}: the hub does not take it: {reason(e)}") from None


def push(directory, repo_id):
    """Upload a model directory in one commit, in place of the weights that are there. Returns the page. Raises HubError."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(repo_id, private=True, exist_ok=True)
        old = ["*.safetensors", "*.safetensors.index.json"]
        api.upload_folder(repo_id=repo_id, folder_path=directory, delete_patterns=old, commit_message="nanoDTF")
    except Exception as e:  # noqa: BLE001, whatever the hub or the network did
        retry = shlex.join(["hf", "upload", repo_id, str(directory), ".", "--private"])
        raise HubError(
            f"{directory} is not on the hub as {repo_id}: {reason(e)}; its files are intact, try again with: {retry}"
        ) from None
    return str(url)


def git_revision():
    """The commit of this code, "-dirty" behind it where files differ from it; None outside of git."""
    describe, here = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"], Path(__file__).parent
    try:
        return subprocess.run(describe, cwd=here, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def facts(init_from, manifest, argv, before=None):
    """What the card will say of a model's origin, a dict for state.json. before: that of the run which goes on here."""
    parent = init_from.partition("@")[0]
    sources = {
        name: {"from": source["from"], "weight": source["weight"], "tokens": source["train"]["tokens"]}
        for name, source in manifest["sources"].items()
    }
    return {
        "base_model": parent if is_hub_id(parent) and not Path(parent).is_dir() else None,
        "tokenizer": manifest["tokenizer"],
        "eot_token": manifest["eot_token"],
        "sources": sources,
        "commands": (before["commands"] if before else []) + [shlex.join(["python", "train.py", *argv])],
        "git": git_revision(),
    }


def describe(directory, state):
    """Write README.md, the card, and generation_config.json of a model directory; `state` is its step's state.json."""
    directory, end = Path(directory), state["about"]["eot_token"]
    ids = {"bos_token_id": end, "eos_token_id": end, "pad_token_id": end}  # documents are tokens, then this one
    (directory / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    config = json.loads((directory / "config.json").read_text())
    (directory / "README.md").write_text(card(config, state), encoding="utf-8")


def card(config, state):
    """The model card, Markdown behind a YAML head. Names that came from outside reach the head as hub ids only."""
    from huggingface_hub import ModelCardData

    about, run = state["about"], state["config"]["train"]
    cfg = ModelConfig.from_dict(config)
    with torch.device("meta"):
        model = Transformer(cfg)
    dense = cfg.architecture == "dense"
    origins = {name: source["from"].get("id") for name, source in about["sources"].items()}
    head = ModelCardData(
        library_name="transformers" if dense else "nanodtf",
        pipeline_tag="text-generation",
        base_model=about["base_model"],
        datasets=sorted({id for id in origins.values() if id and is_hub_id(id)}) or None,
        tags=["nanodtf", cfg.architecture],
    )
    theirs = """
        from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

        model = AutoModelForCausalLM.from_pretrained(DIRECTORY_OR_HUB_ID)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(DIRECTORY_OR_HUB_ID)

    `AutoTokenizer` would use Qwen2's own way to cut text into words, whatever `tokenizer.json` says.
    """
    ours = """
        from model import Transformer  # nanoDTF's model.py

        model = Transformer.from_pretrained(DIRECTORY_OR_HUB_ID)
        ids = model.generate(input_ids, max_new_tokens=50)

    **Not with `transformers`:** its `AutoModelForCausalLM` would take this for a plain Qwen2, warn of unexpected tensors
    (the routers), and run every block on every token, which is another model.
    """
    shape = f"""
    {ABOUT[cfg.architecture]}

    - {sum(p.numel() for p in model.parameters()):,} parameters: {cfg.num_hidden_layers} blocks of width {cfg.hidden_size},
      {cfg.num_attention_heads} heads, {cfg.num_key_value_heads} key-value heads, MLP {cfg.intermediate_size}
    - {cfg.vocab_size:,} tokens in the vocabulary, up to {cfg.max_position_embeddings:,} positions
    """
    routed = f"""
    - {len(cfg.routed_layers)} routed blocks, capacity {cfg.capacity}, causal decision: {cfg.causal_decision}
    """
    cost = f"""
    - {model.flops_per_token(run["seq_len"]):.3g} FLOPs per token of a forward pass of {run["seq_len"]} tokens
    """
    losses = about["validation"]
    measured = [
        f"Validation loss in nats per token, at step {losses['step']}:",
        "",
        "| routing | loss | perplexity |",
        "|---|---:|---:|",
        *(
            f"| {routing} | {losses[key]:.4f} | {math.exp(min(losses[key], 700)):.2f} |"
            for key, routing in {"loss": "every token" if dense else "top-k", "loss_causal": "causal"}.items()
            if not (dense and key == "loss_causal")
        ),
    ]
    data = ["| source | from | tokens | weight |", "|---|---|---:|---:|"]
    for name, source in about["sources"].items():
        origin = " ".join(str(part) for part in source["from"].values() if part)
        data.append(f"| {plain(name)} | {plain(origin)} | {source['tokens']:,} | {source['weight']:g} |")
    training = f"""
    {state["step"]:,} steps of AdamW, {state["tokens"]:,} tokens, {state["flops"]:.3g} FLOPs, on {state["world_size"]}
    rank(s); torch {plain(state["torch"])}, code {plain(about["git"] or "of unknown revision")}. Started from
    {plain(run["init_from"])}, tokenizer {plain(about["tokenizer"])}. The commands, one after another:
    """
    text = textwrap.dedent
    return (
        "\n\n".join(
            part.strip("\n")
            for part in (
                f"---\n{head.to_yaml()}\n---",
                f"# A {cfg.architecture} language model, trained with nanoDTF",
                text(theirs if dense else ours),
                "## Architecture",
                text(shape).rstrip() + text("" if dense else routed).rstrip() + text(cost),
                "## Metrics",
                "\n".join(measured),
                "## Data",
                "\n".join(data),
                "## Training",
                text(training),
                textwrap.indent("\n".join(about["commands"]), " " * 4, lambda line: True),
            )
        )
        + "\n"
    )


def is_hub_id(name):
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(name)
    except ValueError:
        return False
    return "/" in name


def plain(text):
    """`text` as inline code, in one line, whatever it holds."""
    return "`" + " ".join(str(text).replace("`", "'").replace("|", "¦").split()) + "`"
