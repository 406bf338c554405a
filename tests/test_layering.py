"""Oracle: DESIGN's floors. Each package imports only from the floors below it, as read from the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "pallas_kernels": {"jq4", "models", "flax", "orbax", "optax", "chex"},
    "jq4": {"models", "flax", "torch", "transformers"},
    "models": {"torch", "transformers"},
}


def imported_packages(source: str) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module)
    return {name.split(".")[0] for name in names}


def files_of(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_a_floor_imports_only_what_lies_below(package):
    files = [path for path in files_of(package) if "cli" not in path.relative_to(ROOT).parts]
    assert files
    broken = {
        str(path.relative_to(ROOT)): sorted(found)
        for path in files
        if (found := imported_packages(path.read_text()) & FORBIDDEN[package])
    }
    assert broken == {}


def test_only_the_command_line_imports_models():
    importers = [p for p in files_of("jq4") if "models" in imported_packages(p.read_text())]
    assert all("cli" in path.relative_to(ROOT).parts for path in importers)


@pytest.mark.parametrize("name", ["config", "decoder", "families", "generate", "kv_cache", "rope"])
def test_the_architectures_never_mention_quantization(name):
    tree = ast.parse((ROOT / "models" / f"{name}.py").read_text())
    names = {getattr(node, field, "") for node in ast.walk(tree) for field in ("id", "attr", "name", "arg", "module")}
    assert [word for word in names if word and re.search("quantiz|qarray|packed", word, re.IGNORECASE)] == []


def test_no_file_is_a_drawer():
    names = {path.stem for package in FORBIDDEN for path in files_of(package)}
    assert names.isdisjoint({"utils", "util", "misc", "helpers", "manager", "common"})
