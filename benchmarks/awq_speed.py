"""How long AWQ's search takes for one 4096x4096 weight on 2048 tokens: ours against llm-compressor's, in one run.

    python -m benchmarks.awq_speed [--peer PYTHON] [--rounds 3] [--json FILE]

Ours is `awq_scale` by its defaults (40 candidates, the Hessian of 2048 tokens), and what makes the Hessian; the first
call compiles. The peer's (20 candidates, benchmarks/peer_awq.py) runs under PYTHON, of an environment that holds
llm-compressor. The two take turns, and the least time of each counts. Both run on as many threads as there are cores.
"""

import argparse
import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.provenance import publish
from jq4.equalize.awq import awq_scale
from jq4.equalize.folds import Fold
from jq4.rounding import Encoding
from jq4.statistics import statistics_of

_COLLECTED = frozenset({"mean_square", "hessian"})


class Ours:
    """The weight and its inputs."""

    def __init__(self, size: int, tokens: int) -> None:
        random = np.random.default_rng(0)
        spread = np.exp(random.normal(0, 1, size))
        self.x = jnp.asarray(random.normal(0, 1, (tokens, size)) * spread, jnp.float32)
        self.weight = jnp.asarray(random.normal(0, 0.02, (size, size)), jnp.float32)
        self.observe = jax.jit(lambda x: statistics_of(x, _COLLECTED))

    def seconds(self) -> tuple[float, float]:
        """(of the statistics, of the search)."""
        start = time.perf_counter()
        statistics = jax.block_until_ready(self.observe(self.x))
        middle = time.perf_counter()
        jax.block_until_ready(awq_scale(Fold((), ""), [self.weight], [Encoding(group_size=128)], statistics))
        return middle - start, time.perf_counter() - middle


def peer_seconds(python: str, size: int, tokens: int) -> float:
    command = [python, "-m", "benchmarks.peer_awq", "--size", str(size), "--tokens", str(tokens)]
    command += ["--threads", str(os.cpu_count())]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])["seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", help="the Python of an environment with llm-compressor")
    parser.add_argument("--size", type=int, default=4096)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    ours = Ours(arguments.size, arguments.tokens)
    first = sum(ours.seconds())
    rounds, peer = [], []
    for _ in range(arguments.rounds):
        rounds.append(ours.seconds())
        if arguments.peer:
            peer.append(peer_seconds(arguments.peer, arguments.size, arguments.tokens))
    found: dict[str, Any] = {
        "size": arguments.size, "tokens": arguments.tokens, "cores": os.cpu_count(),
        "first_call_with_compiling": first,
        "statistics": min(each[0] for each in rounds), "search": min(each[1] for each in rounds),
        "statistics_and_search": min(map(sum, rounds)),
        "peer_search": min(peer) if peer else None,
    }  # fmt: skip
    print(json.dumps(found, indent=2))
    if arguments.json:
        publish(arguments.json, "awq_speed", found)


if __name__ == "__main__":
    main()
