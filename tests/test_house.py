"""The house itself, from its sources: who imports whom, and how long a function is."""

import ast
import re
from pathlib import Path

from architectures import ARCHITECTURES
from blocks import Block, RoutedBlock

ROOT = Path(__file__).parents[1]
FILES = {path.stem: ast.parse(path.read_text()) for path in sorted(ROOT.glob("*.py"))}
SCRIPTS = {"bench", "plot", "prepare", "sample", "study", "train"}
LEAVES = {
    "configurator",
    "data",
    "errors",
    "files",
    "gpu_kernels",
    "kernels",
    "routers",
}  # which know nobody but each other


def imported(tree) -> set[str]:
    """The project's own files that one of them imports, wherever in it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names & FILES.keys()


IMPORTS = {name: imported(tree) for name, tree in FILES.items()}


def test_no_file_reaches_itself_through_its_imports():
    def reached(name, seen):
        for other in IMPORTS[name] - seen:
            seen |= reached(other, seen | {other})
        return seen

    assert [name for name in FILES if name in reached(name, set())] == []
    assert "kernels" in reached("train", set()) and len(FILES) > 20  # it does follow them


def test_scripts_take_no_helper_from_scripts():
    """train.py alone knows another: it asks bench.py whether it knows the tasks, and calls it at its very end."""
    found = {name: IMPORTS[name] & SCRIPTS for name in FILES}
    assert found.pop("train") == {"bench"}
    assert not any(found.values()), found
    for tree in FILES.values():
        names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        assert not names & SCRIPTS
        assert not any(
            isinstance(node, ast.Name | ast.Attribute) and "import_module" in ast.dump(node) for node in ast.walk(tree)
        )
    of_bench = {
        node.attr
        for node in ast.walk(FILES["train"])
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bench"
    }
    assert of_bench == {"check", "main"}


def test_heavy_libraries_are_imported_where_they_are_needed():
    heavy = {"transformers", "datasets", "wandb", "peft", "lm_eval", "matplotlib", "huggingface_hub"}
    for name, tree in FILES.items():
        if name == "hf":  # which transformers alone imports
            continue
        top = [node for node in tree.body if isinstance(node, ast.Import | ast.ImportFrom)]
        modules = {alias.name for node in top for alias in node.names} | {getattr(node, "module", None) for node in top}
        assert not {str(module).partition(".")[0] for module in modules} & heavy, name


def test_the_leaves_know_nobody():
    assert {name: IMPORTS[name] - LEAVES for name in LEAVES if IMPORTS[name] - LEAVES} == {}


def test_an_architectures_names_stand_in_its_own_file():
    """No other file compares with, or looks up, the name of an architecture or of a module that one adds."""
    kinds = {kind for top in ARCHITECTURES.values() for kind in (top, top.below) if kind}
    theirs = set(ARCHITECTURES) | {part for kind in kinds for part in kind.parts.keys() - RoutedBlock.parts.keys()}
    theirs |= {kind.__name__ for kind in kinds} - {Block.__name__}
    theirs -= {"dense", "router"}  # the parent of every conversion; a rate group, and a setting of every architecture
    assert theirs == {
        "mod",
        "dtf",
        "stt",
        "prior",
        "transition",
        "MoDBlock",
        "DynamicBlock",
        "STTBlock",
        "DecisionBlock",
    }
    for name, tree in FILES.items():
        if name == "architectures":
            continue
        words = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        words |= {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
        words |= {node.arg for node in ast.walk(tree) if isinstance(node, ast.keyword)}
        words |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names}
        for text in strings(tree):
            words |= set(re.findall(r"\w+", text))
        allowed = {"prior"} if name in ("blocks", "optimizer", "speed") else set()  # there the name of a rate group
        assert words & theirs <= allowed, name


def strings(tree):
    """The string constants of a file, parts of f-strings too, but docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docs = {
        id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and ast.get_docstring(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def test_a_function_fits_on_a_screen():
    for name, tree in FILES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                length = node.end_lineno - node.lineno + 1
                assert length <= 80, f"{name}.{node.name} has {length} lines"
