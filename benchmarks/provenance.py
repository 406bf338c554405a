"""What a published figure carries besides itself: the command that makes it again, date, commit, versions, device."""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import jax

import jq4

ROOT = Path(__file__).resolve().parents[1]


def publish(file: str | Path, script: str, found: Mapping[str, Any]) -> None:
    """Writes what `benchmarks.<script>` found, with its provenance, as JSON."""
    Path(file).write_text(json.dumps(provenance(script) | found, indent=2) + "\n")


def provenance(script: str) -> dict[str, Any]:
    """Of the process that runs `benchmarks.<script>`."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT)
    return {
        "command": " ".join(["python -m", f"benchmarks.{script}", *told(sys.argv[1:])]),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip() or None,
        "jq4": jq4.__version__,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
    }


def told(words: Sequence[str]) -> Iterator[str]:
    """The arguments without where the figures go; a path is a machine's own, so its last name is told alone."""
    rest = iter(words)
    for word in rest:
        if word == "--json":
            next(rest, None)
        elif not word.startswith("--json="):
            name, equals, value = word.rpartition("=")
            yield name + equals + (Path(value).name if _is_path(value) else value)


def _is_path(word: str) -> bool:
    """Whether a word with a slash names a place here, rather than a product ("llama-3-8b/qkv_proj")."""
    return "/" in word and (Path(word).is_absolute() or word.startswith((".", "~")) or Path(word).exists())
