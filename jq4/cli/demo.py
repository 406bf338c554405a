"""jq4 demo: the bundled model, dense against 4 bits, in about a minute and without a network."""

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HELP = "take the bundled model to 4 bits, and show what that costs and saves"
DESCRIPTION = (
    "Quantizes the bundled language model twice (round to nearest, and HQQ), compares both with the dense model on "
    "text it has not seen, saves and restores one, and writes a picture and an HTML report."
)
RECIPES = ("rtn-w4g32", "hqq-w4g32-asym")
KEPT = RECIPES[-1]  # the one that is saved
ROWS = 32  # of the held-out text
CONTEXT = 256
NEW_TOKENS = 64
TIMED_RUNS = 3
_WRITTEN = ("model.jq4", "picture.png", "report.html")
_PROMPT = 'The "with" statement'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", default="jq4-demo", metavar="DIR", help="where to write (default ./jq4-demo)")
    parser.add_argument("--model", metavar="DIR", help="another Hugging Face folder than the bundled one")
    parser.add_argument("--text", metavar="FILE", help="another text to predict than the model's own heldout.txt")
    parser.add_argument("--prompt", default=_PROMPT, metavar="TEXT", help="what the samples continue")


def run(arguments: argparse.Namespace) -> None:
    from jq4 import drawing
    from jq4.cli import _demo_page, _demo_picture, _folders, _terminal
    from jq4.report import demo_table

    out = Path(arguments.out)
    _folders.check_only_ours(out, _WRITTEN, "no demo wrote")
    with _terminal.progress("") as step:
        data, kld = compare(arguments, out, step)
        page = out / _WRITTEN[2]
        picture = out / _WRITTEN[1] if drawing.has_matplotlib() else None
        if picture is not None:
            _demo_picture.draw(data, kld, picture)
        data["files"] = {"report": str(page), "picture": None if picture is None else str(picture)}
        _demo_page.write_page(data, picture, page)
    if arguments.json:
        _terminal.print_json(data)
        return
    console = _terminal.console()
    console.print(demo_table(data, _demo_page.table_rows(data["variants"])))
    for each in data["variants"]:
        console.print(f"\n{each['name']}", style="bold")
        print(data["prompt"] + each["sample"])
    restored = data["restored"]
    same = "bit for bit the same, logits too" if restored["identical"] and restored["same_logits"] else "NOT the same"
    console.print(f"\nsaved to {restored['folder']} and restored: {restored['leaves']} leaves, {same}")
    console.print(f"report: {page}")
    console.print(f"picture: {picture or f'skipped, {drawing.WANTS_MATPLOTLIB}'}")
    console.print(f"{data['seconds']:.0f} s")


def compare(arguments: argparse.Namespace, out: Path, step: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Everything measured: what `jq4 demo --json` prints, and the KLD of every token by variant."""
    from jq4.cli import _models, _terminal
    from jq4.quantize import quantize

    watch = _terminal.Stopwatch()
    steps = _Steps(step, 2 + 2 * (1 + len(RECIPES)))
    steps.next("opening the model")
    folder = bundled_model() if arguments.model is None else Path(arguments.model)
    model = _models.open_model(str(folder))
    rows = held_out_rows(model, Path(arguments.text) if arguments.text else folder / "heldout.txt")
    models = {"dense": model}
    variants, kld = [], {}
    for name in ("dense", *RECIPES):
        steps.next(f"{name}: quantizing and predicting")
        if name != "dense":
            models[name] = dataclasses.replace(model, params=quantize(model.params, name))
        figures, divergence = measure(models[name], model, rows)
        if divergence is not None:
            kld[name] = divergence
        steps.next(f"{name}: writing text")
        variants.append({"name": name, **figures, **write_text(models[name], arguments.prompt)})
    steps.next("saving and restoring")
    restored = save_and_restore(models[KEPT], folder, out / _WRITTEN[0], rows)
    data = {
        "model": folder.resolve().name,
        "parameters": variants[0]["parameters"],
        "tokens": variants[0]["tokens"],
        "context": variants[0]["context"],
        "prompt": arguments.prompt,
        "variants": variants,
        "restored": restored,
        "seconds": watch.seconds,
        "versions": _terminal.versions(),
    }
    return data, kld


class _Steps:
    """Counts the demo's steps for the progress bar."""

    def __init__(self, step: Any, total: int):
        self._step, self._total, self._done = step, total, 0

    def next(self, description: str) -> None:
        self._step(self._done, self._total, description)
        self._done += 1


def bundled_model() -> Path:
    """The folder of the model that comes with jq4."""
    import models
    from jq4.errors import JQ4Error

    folder = Path(models.__path__[0]) / "tiny"
    if not (folder / "config.json").is_file():
        raise JQ4Error(f"{folder}: the bundled model is not there; reinstall jq4, or give --model and --text")
    return folder


def held_out_rows(model: Any, file: Path) -> Any:
    """The first rows of the text, i32[ROWS, CONTEXT]."""
    from jq4.cli.eval import read_text, tokenize
    from jq4.evaluate import rows_of

    ids = tokenize(model, read_text(file), str(file.parent))
    context = min(CONTEXT, model.config.max_position_embeddings, len(ids))
    return rows_of(ids, context, vocab_size=model.config.vocab_size, name=str(file))[0][:ROWS]


def measure(model: Any, dense: Any, rows: Any) -> tuple[dict[str, Any], Any]:
    """Quality and bytes of one variant, and its KLD by token (None for the dense one itself)."""
    from jq4.cli import _models
    from jq4.evaluate import evaluate
    from jq4.inventory import inventory, totals, with_errors

    leaves = inventory(model.params)
    found = evaluate(model.logits, rows, reference=None if model is dense else dense.logits)
    if model is not dense:
        leaves = with_errors(leaves, model.params, dense.params)
    linear = {leaf.path for leaf in leaves if leaf.path.endswith("kernel") and "lm_head" not in leaf.path}
    in_linear = [leaf for leaf in leaves if leaf.path in linear]
    figures = {
        **found.as_dict(),
        **totals(leaves),
        "bytes_linear": sum(leaf.bytes for leaf in in_linear),
        "bits_per_weight_linear": 8 * sum(leaf.bytes for leaf in in_linear) / sum(leaf.size for leaf in in_linear),
        "went_dense": _models.went_dense(model),
        "leaves": [leaf.as_dict() for leaf in leaves],
    }
    return figures, found.kld


def write_text(model: Any, prompt: str) -> dict[str, Any]:
    """A sample, and the speed of the fastest of a few runs (the first compiles)."""
    from jq4.cli._terminal import Stopwatch

    options: Mapping[str, Any] = {"max_new_tokens": NEW_TOKENS, "temperature": 0.7, "top_p": 0.95, "seed": 1}
    (sample,) = model.generate([prompt], **options)
    seconds = []
    for _ in range(TIMED_RUNS):
        watch = Stopwatch()
        model.generate([prompt], **options)
        seconds.append(watch.seconds)
    made = max(1, len(model.tokenizer.encode(sample, add_special_tokens=False).ids))
    return {"sample": sample, "tokens_per_second": made / min(seconds)}


def save_and_restore(model: Any, source: Path, folder: Path, rows: Any) -> dict[str, Any]:
    """Saves, restores, and compares every array's bytes and the logits of the first rows."""
    import jax
    import numpy as np

    from jq4.cli import _models
    from jq4.inventory import bytes_on_disk
    from jq4.recipe import Recipe

    model.save(folder, recipe=Recipe.preset(KEPT), source=_models.origin(source))
    restored = _models.open_model(str(folder))
    before, after = (np.asarray(each.logits(rows[:4])) for each in (model, restored))
    return {
        "recipe": KEPT,
        "folder": str(folder),
        "bytes_on_disk": bytes_on_disk(folder),
        "leaves": len(jax.tree.leaves(model.params, is_leaf=lambda leaf: hasattr(leaf, "codes"))),
        "identical": same_arrays(model.params, restored.params),
        "same_logits": bool(np.array_equal(before, after)),
    }


def same_arrays(ours: Any, theirs: Any) -> bool:
    """Whether two trees have one structure, and arrays of the same dtypes, shapes and bytes."""
    import jax
    import numpy as np

    if jax.tree.structure(ours) != jax.tree.structure(theirs):
        return False
    return all(
        (a.dtype, a.shape) == (b.dtype, b.shape) and np.asarray(a).tobytes() == np.asarray(b).tobytes()
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True)
    )
