"""What jq4 itself writes, changed by someone who knows the format: manifests, whole checkpoints, journals, recipes."""

import contextlib
import copy
import hashlib
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from benchmarks.fuzzing import values
from jq4 import QArray
from jq4.checkpoint import manifest, restore, save
from jq4.checkpoint.conversion.progress import JOURNAL, folder_of, journal_for
from jq4.recipe import Recipe

Work = Callable[[], Any]
_TREE = {
    "w": QArray(
        np.arange(128, dtype=np.uint8).reshape(16, 8),
        QArray(
            np.arange(32, dtype=np.uint8).reshape(4, 8),
            np.ones((1, 8), np.float32),
            format="int8",
            group_size=4,
        ),
        zero_point=np.ones((4, 8), np.uint8),
        group_size=8,
    ),
    "b": [np.ones(7, np.float16), 3, None, {"empty": np.zeros((0, 4), np.float32)}],
}
_EXTRA = {"config.json": b'{"hidden_size": 8}'}


class Checkpoints:
    """A packed checkpoint. Its manifest is signed again after every change, so that the change is what is looked at."""

    whole = False

    def __init__(self, folder: Path) -> None:
        self.sound, self.folder = folder / "sound", folder / "hostile"
        if not self.sound.exists():
            save(self.sound, _TREE, recipe={"bits": 4}, extra_files=_EXTRA)
        self.members = json.loads((self.sound / manifest.MANIFEST).read_bytes())
        del self.members["checksum"]
        self.folder.mkdir(exist_ok=True)

    def warm_up(self) -> None:
        restore(self.sound)

    def prepared(self, draw: random.Random) -> Work:
        members = copy.deepcopy(self.members)
        for _ in range(draw.choice((1, 1, 2, 3))):
            members = values.changed(draw, members)
        raw = _signed(members)
        return self.work(values.flipped(draw, raw) if draw.random() < 0.1 else raw)

    def work(self, raw: bytes) -> Work:
        return lambda: _read(raw)


class WholeCheckpoints(Checkpoints):
    """The same on disk: zarr's headers and chunks change too, and what the manifest says of them with them."""

    def prepared(self, draw: random.Random) -> Work:
        shutil.rmtree(self.folder)
        shutil.copytree(self.sound, self.folder)
        members = copy.deepcopy(self.members)
        data = self.folder / members["data"]
        for _ in range(draw.choice((1, 1, 2))):
            name = draw.choice(list(members["files"]))
            way = draw.randrange(8)
            if way == 0:
                members = values.changed(draw, members)
                break
            if way == 1:
                (data / name).unlink(missing_ok=True)
            elif way == 2:
                (data / name).unlink(missing_ok=True)
                (data / name).symlink_to(draw.choice(("/dev/zero", "/etc/passwd", "..", name)))
            elif (data / name).is_file():
                self._rewrite(draw, data / name, name, members, told=way < 7)
        (self.folder / manifest.MANIFEST).write_bytes(_signed(members))
        return lambda: restore(self.folder)

    def _rewrite(self, draw: random.Random, file: Path, name: str, members: Any, told: bool) -> None:
        content = file.read_bytes()
        try:
            content = values.as_text(draw, values.changed(draw, json.loads(content)))
        except (ValueError, RecursionError):  # a chunk, or what was changed before
            content = values.flipped(draw, content)
        file.write_bytes(content)
        if told:
            members["files"][name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _signed(members: Any) -> bytes:
    """With its own checksum right. What is not an object gets one that holds it."""
    try:
        text = json.dumps(members if isinstance(members, dict) and members else {"a": members}).encode()
    except RecursionError:  # deeper than can be written
        text = b'{"a": 1}'
    return signed_text(text)


def signed_text(text: bytes) -> bytes:
    """The text of an object with a checksum that is right."""
    body = text[:-1]
    return body + (manifest._TAIL % hashlib.sha256(body).hexdigest()).encode()


def _read(raw: bytes) -> None:
    found = manifest.from_bytes(raw, "jq4.json")
    assert found.nbytes >= 0 and isinstance(found.extra_files, tuple)
    for leaf in found.leaves:
        for one in manifest.arrays_of(leaf):
            assert one.array is None or ".." not in one.array.split("/")


class Journals:
    """The journal of an unfinished conversion."""

    _IDENTITY = {"to": "gptq", "source": "x"}  # noqa: RUF012

    def __init__(self, folder: Path) -> None:
        self.destination = folder / "out"

    def warm_up(self) -> None:
        """Nothing is loaded late."""

    def prepared(self, draw: random.Random) -> Work:
        entries = self.entries(finished=draw.random() < 0.3)
        for _ in range(draw.choice((1, 1, 2))):
            at = draw.randrange(len(entries))
            entries[at] = values.changed(draw, entries[at]) if isinstance(entries[at], dict) else values.value(draw)
        raw = b"\n".join(values.as_text(draw, one) for one in entries) + b"\n"
        return self.work(values.flipped(draw, raw) if draw.random() < 0.2 else raw)

    def entries(self, finished: bool) -> list[Any]:
        """The lines of a sound one."""
        digest = "0" * 64
        done = [{"done": f"w{i}", "wrote": {f"w{i}.qweight": digest, "a/0": [4, digest]}} for i in range(3)]
        return [{"identity": self._IDENTITY}, *done, *([{"finished": True}] if finished else [])]

    def work(self, raw: bytes) -> Work:
        folder = folder_of(self.destination)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / JOURNAL).write_bytes(raw)
        return self._use

    def _use(self) -> None:
        with journal_for(self.destination, self._IDENTITY, False) as journal:
            for name, record in journal.records.items():
                name.encode("utf-8", "surrogatepass")
                for file, told in record["wrote"].items():
                    assert isinstance(told, str) or (".." not in file.split("/") and not file.startswith("/"))


class Recipes:
    """A recipe's YAML."""

    RULES: dict[str, Any] = {  # noqa: RUF012
        "ignore": ["lm_head"],
        "rules": [
            {"targets": ["re:mlp.*down_proj"], "num_bits": 8, "strategy": "channel"},
            {"targets": ["Linear"], "num_bits": 4, "group_size": 64, "symmetric": False, "method": "hqq"},
        ],
        "before": [{"step": "awq", "ratios": 8}],
    }
    TEXTS = (
        "a: &a [x, x]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b, *b]\n"
        "d: &d [*c, *c, *c, *c, *c, *c, *c, *c, *c]\ne: &e [*d, *d, *d, *d, *d, *d, *d, *d, *d]\n"
        "f: &f [*e, *e, *e, *e, *e, *e, *e, *e, *e]\nrules: *f\n",
        "rules: &a [*a]",
        "rules: [" * 3000,
        "? [a, b]\n: 1",
        "!!python/object/apply:os.system ['true']",
        "rules: !!binary x",
        "<<: [1]",
        "rules: [{<<: 3}]",
        "- " * 5000,
        "%YAML 9.9\n---\n",
        "rules: 2001-13-45",
        "rules: 1_:6",
        "\t",
        "rules: .nan",
    )

    def __init__(self, folder: Path) -> None:
        self.file = folder / "recipe.yaml"

    def warm_up(self) -> None:
        Recipe.from_dict(self.RULES)

    def prepared(self, draw: random.Random) -> Work:
        text = draw.choice(self.TEXTS).encode()
        if draw.random() < 0.9:
            rules = values.changed(draw, self.RULES)
            with contextlib.suppress(RecursionError, yaml.YAMLError, UnicodeEncodeError):
                text = yaml.safe_dump(rules).encode() if draw.random() < 0.3 else values.as_text(draw, rules)
        return self.work(values.flipped(draw, text) if draw.random() < 0.2 else text)

    def work(self, raw: bytes) -> Work:
        self.file.write_bytes(raw)
        return lambda: Recipe.load(self.file).to_dict()
