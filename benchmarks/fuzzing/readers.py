"""The readers that are fed: for each, how a hostile file is made of a drawn number, and how it is opened."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.fuzzing import folders, gguf_files, using, values
from benchmarks.fuzzing.folders import Files
from benchmarks.fuzzing.ours import Checkpoints, Journals, Recipes, WholeCheckpoints
from benchmarks.fuzzing.seeds import CONFIG, GGUF, SEEDS, Folder

Work = Callable[[], Any]


class Foreign:
    """Folders and files of others, by the name of their format in SEEDS."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.seeds = name, [make() for make in SEEDS[name]]
        self.folder = folder / name
        self.folder.mkdir(exist_ok=True)

    def warm_up(self) -> None:
        """Opens every seed as it is, which must be possible; modules are loaded then."""
        for seed in self.seeds:
            self.work(sound(seed))()

    def prepared(self, draw: random.Random) -> Work:
        return self.work(hostile(draw, draw.choice(self.seeds)))

    def work(self, files: Files) -> Work:
        using.laid(self.folder, files)
        single = next((name for name in files if name.endswith(".gguf")), "")
        return lambda: using.use_checkpoint(self.folder / single)


def sound(seed: Folder | GGUF) -> Files:
    return {"m.gguf": gguf_files.sound(seed)} if isinstance(seed, GGUF) else folders.sound(seed)


def hostile(draw: random.Random, seed: Folder | GGUF) -> Files:
    if isinstance(seed, Folder):
        return folders.hostile(draw, seed)
    content = gguf_files.hostile(draw, seed)
    return {"m-00001-of-00001.gguf" if draw.random() < 0.1 else "m.gguf": content}


class Config:
    """config.json of a model."""

    _FAMILIES: tuple[dict[str, Any], ...] = (
        {},
        {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {
            "model_type": "gemma2",
            "sliding_window": 8,
            "query_pre_attn_scalar": 16,
            "layer_types": ["full_attention"] * 2,
        },
        {"model_type": "gemma3", "text_config": {**CONFIG, "num_hidden_layers": 2, "model_type": "gemma3_text"}},
        {
            "model_type": "phi3",
            "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 8},
        },
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
    )

    def __init__(self, folder: Path) -> None:
        self.seeds = [{**CONFIG, "num_hidden_layers": 2, **more} for more in self._FAMILIES]

    def warm_up(self) -> None:
        for seed in self.seeds:
            using.use_config(json.dumps(seed).encode(), "config.json")

    def prepared(self, draw: random.Random) -> Work:
        raw = draw.choice(self.seeds)
        for _ in range(draw.choice((1, 1, 2, 3))):
            raw = values.changed(draw, raw)
        return self.work(values.as_text(draw, raw))

    def work(self, content: bytes) -> Work:
        return lambda: using.use_config(content, "config.json")


def _foreign(name: str) -> Callable[[Path], Any]:
    return lambda folder: Foreign(name, folder)


READERS: dict[str, Callable[[Path], Any]] = {
    **{name: _foreign(name) for name in SEEDS},
    "config": Config,
    "manifest": Checkpoints,
    "checkpoint": WholeCheckpoints,
    "journal": Journals,
    "recipe": Recipes,
}
