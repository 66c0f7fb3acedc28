"""What a model takes along when it leaves: a card, the ids that generation stops at, its code where it is routed, and the
way to the Hugging Face hub.

The token comes from the environment: HF_TOKEN, or what `hf auth login` has stored. A failed upload leaves the files as
they are, and `hf upload` tries again.
"""

import ast
import inspect
import json
import re
import shlex
import subprocess
import textwrap
from dataclasses import asdict
from pathlib import Path
from string import Template

import torch

import lora
from errors import HubError, first_line
from files import write_whole
from metrics import perplexity
from model import ModelConfig, Transformer

PART = re.compile(r"<!-- (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)  # of card.md: for dense or for routed models only


def reserve(repo_id):
    """Create `repo_id`, private, unless it exists: before a run, so that it fails now, not after days. Raises HubError."""
    from huggingface_hub import create_repo, get_token

    if not is_hub_id(repo_id):
        raise HubError(f"push_to_hub={repo_id!r} is no repository name like user/name")
    if not get_token():
        raise HubError(f"push_to_hub={repo_id} needs a token that may write: set HF_TOKEN, or hf auth login")
    try:
        create_repo(repo_id, private=True, exist_ok=True)
    except Exception as e:  # noqa: BLE001, whatever the hub or the network did
        raise HubError(f"push_to_hub={repo_id}: the hub does not take it: {first_line(e)}") from None


def push(directory, repo_id):
    """Upload a model directory in one commit, in place of the weights that are there. Returns the page. Raises HubError."""
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = api.create_repo(repo_id, private=True, exist_ok=True)
        old = ["*.safetensors", "*.safetensors.index.json", lora.CONFIG]
        api.upload_folder(repo_id=repo_id, folder_path=directory, delete_patterns=old, commit_message="nanoDTF")
    except Exception as e:  # noqa: BLE001, whatever the hub or the network did
        retry = shlex.join(["hf", "upload", repo_id, str(directory), ".", "--private"])
        raise HubError(
            f"{directory} is not on the hub as {repo_id}: {first_line(e)}; its files are intact, try again with: {retry}"
        ) from None
    return str(url)


def git_revision():
    """The commit of this code, "-dirty" behind it where files differ from it; None outside of git."""
    command = ["git", "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    folder = Path(__file__).parent
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def facts(init_from, manifest, argv, earlier=None):
    """What the card will say of a model's origin, a dict for state.json. earlier: that of the run which goes on here."""
    parent = None if Path(init_from).is_dir() else init_from.partition("@")[0]
    sources = {
        name: {"from": source["from"], "weight": source["weight"], "tokens": source["train"]["tokens"]}
        for name, source in manifest["sources"].items()
    }
    return {
        "base_model": parent if parent and is_hub_id(parent) else None,
        "tokenizer": manifest["tokenizer"],
        "eot_token": manifest["eot_token"],
        "sources": sources,
        "commands": (earlier["commands"] if earlier else []) + [shlex.join(["python", "train.py", *argv])],
        "git": git_revision(),
    }


def describe(directory, state):
    """Write README.md, the card, and generation_config.json of a model directory; `state` is its step's state.json."""
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text())
    ends = ModelConfig.from_dict(config).ends or [state["about"]["eot_token"]]
    ids = {"eos_token_id": ends, "pad_token_id": ends[0]}
    (directory / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    (directory / "README.md").write_text(card(config, state), encoding="utf-8")


def card(config, state):
    """The model card: card.md, filled. Names that came from outside reach its YAML head as hub ids only."""
    about, run, losses = state["about"], state["config"]["train"], state["about"]["validation"]
    cfg = ModelConfig.from_dict(config)
    kind = "routed" if cfg.routed_layers else "dense"
    template = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    # parts of the other kind go before anything is filled in: a name from outside cannot end a part
    template = PART.sub(lambda part: part[2] if part[1] == kind else "", template)
    with torch.device("meta"):
        model = Transformer(cfg)
    values = asdict(cfg) | {
        "head": head(cfg.architecture, about),
        "description": cfg.kind.description,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "vocab_size": f"{cfg.vocab_size:,}",
        "max_position_embeddings": f"{cfg.max_position_embeddings:,}",
        "routed_blocks": len(cfg.routed_layers),
        "capacities": capacities(cfg),
        "skipped": f"store {'no' if cfg.compact_cache else 'their'} keys and values",
        "decision": f"{cfg.router} positions" if cfg.by_position else cfg.causal_decision,
        "flops_per_token": f"{model.flops_per_token(run['seq_len']):.3g}",
        "seq_len": run["seq_len"],
        "validation_step": losses["step"],
        "data": "\n".join(data_row(name, source) for name, source in about["sources"].items()),
        "steps": f"{state['step']:,}",
        "tokens": f"{state['tokens']:,}",
        "flops": f"{state['flops']:.3g}",
        "world_size": state["world_size"],
        "torch": plain(state["torch"]),
        "code": plain(about["git"] or "of unknown revision"),
        "init_from": plain(run["init_from"]),
        "tokenizer": plain(about["tokenizer"]),
        "commands": textwrap.indent("\n".join(about["commands"]), " " * 4, lambda line: True),
    }
    for routing in ("", "_causal") if kind == "routed" else ("",):
        loss = losses[f"loss{routing}"]
        values |= {f"loss{routing}": f"{loss:.4f}", f"perplexity{routing}": f"{perplexity(loss):.2f}"}
    return Template(template).substitute(values)


def capacities(cfg: ModelConfig) -> str:
    """What a model of many capacities can also run at."""
    others = [known for known in cfg.calibrated or {} if known != str(cfg.capacity)]
    return f" (calibrated for {', '.join(others)} too: from_pretrained(…, capacity={others[0]}))" if others else ""


# ---------------------------------------------------------------------------------------------------------------------
# The code of a routed model


def write_code(directory):
    """Lay hf.py and all that it imports beside a routed model's weights, where transformers looks for them.

    Not beside adapters: without their base there is no model to open.
    """
    directory = Path(directory)
    config = json.loads((directory / "config.json").read_text())
    cfg = ModelConfig.from_dict(config)
    if not cfg.routed_layers or lora.is_adapter(directory):
        return
    try:
        sources = code_of(Path(inspect.getfile(cfg.kind)))
    except (TypeError, OSError):  # an architecture that is in no file, but in a notebook
        return
    revision = git_revision() or "unknown"
    for name, source in sources.items():
        origin = f"# {name}.py of nanoDTF, revision {revision}, MIT licence: a copy, change it there"
        write_whole(directory / f"{name}.py", f"{origin}\n{source}")
    classes = {"AutoConfig": "hf.NanoDTFConfig", "AutoModelForCausalLM": "hf.NanoDTFForCausalLM"}
    write_whole(directory / "config.json", config | {"auto_map": classes})


def code_of(architecture):
    """{name: source} of hf.py, of the file that an architecture's class is in, and of all that they import of ours."""
    folders = architecture.parent, Path(__file__).parent
    files = {path.stem: path for folder in folders for path in folder.glob("*.py")}
    names, sources = ["hf", architecture.stem], {}
    for name in names:
        sources[name], imported = as_package(files[name].read_text(encoding="utf-8"), files)
        names += [other for other in imported if other not in names]
    if "architectures" != architecture.stem:  # a file that enters its own class in the table
        sources["architectures"] += f"\nfrom .{architecture.stem} import __name__ as _  # noqa: E402, F401\n"
    return sources


def as_package(source, ours):
    """(`source` with its imports of the files in `ours` made relative, the names of these). Lines stay where they are.

    transformers copies the files that lines like `from .x import y` name, and overlooks `from . import x`.
    """
    lines, found = source.splitlines(keepends=True), []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module in ours:
            name = node.module
            old, new = f"from {name} import", f"from .{name} import"
        elif isinstance(node, ast.Import) and node.names[0].name in ours:
            name = node.names[0].name
            old, new = f"import {name}", f"from .{name} import __name__ as _; from . import {name}"
        else:
            continue
        found.append(name)
        lines[node.lineno - 1] = lines[node.lineno - 1].replace(old, new, 1)
    return "".join(lines), found


def head(architecture, about):
    """The card's YAML."""
    from huggingface_hub import ModelCardData

    origins = {source["from"].get("id") for source in about["sources"].values()}
    return ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=about["base_model"],
        datasets=sorted(id for id in origins if id and is_hub_id(id)) or None,
        tags=["nanodtf", architecture],
    ).to_yaml()


def data_row(name, source):
    origin = " ".join(str(part) for part in source["from"].values() if part)
    return f"| {plain(name)} | {plain(origin)} | {source['tokens']:,} | {source['weight']:g} |"


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
