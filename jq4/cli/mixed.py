"""jq4 mixed: which leaf in which format, for the least loss within a budget of bits; out comes a recipe."""

import argparse
from pathlib import Path
from typing import Any

from jq4.cli import _calibration

HELP = "choose a format for each leaf by measured loss, within an average of bits or a number of bytes"
DESCRIPTION = (
    "Measures what each leaf costs in each format, one leaf at a time, as KLD on calibration rows; chooses the mix "
    "that costs the least within --bits or --bytes, exactly; and writes it as a recipe for jq4 quantize. Layers that "
    "are stacked in one leaf have one format. Methods are calibrated on every other row, and losses measured on the "
    "rows between. Beside the mix's predicted loss its measured one is printed, and that of each format by itself."
)
DEFAULT_FORMATS = "hqq-w3g32,hqq-w4g64,hqq-w4g32,hqq-w4g32-asym,rtn-w8gc"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="the dense model: a Hugging Face folder")
    budget = parser.add_mutually_exclusive_group(required=True)
    budget.add_argument("--bits", type=float, metavar="N", help="bits a weight on average, scales included")
    budget.add_argument("--bytes", metavar="2GB", help="bytes that the candidate leaves may take together")
    parser.add_argument("--calibration", required=True, metavar="FILE", help="text, .jsonl or .npy ids")
    parser.add_argument(
        "--formats", default=DEFAULT_FORMATS, metavar="NAME,...", help="presets to choose from (default %(default)s)"
    )
    parser.add_argument("--embeddings", action="store_true", help="embedding tables are candidates too")
    parser.add_argument("--head", action="store_true", help="the output head is a candidate too")
    parser.add_argument(
        "--trials",
        choices=("all", "one", "none"),
        default="all",
        help="run the model for every format of a leaf, for one of them, or not at all (default all)",
    )
    parser.add_argument(
        "--weighting",
        choices=("fisher", "hessian"),
        help="what estimates losses without a trial: gradients of the model's predictions, or errors of a leaf's own "
        "outputs (default fisher; with --trials all it is listed beside the trials, if named)",
    )
    parser.add_argument("--out", metavar="RECIPE.yaml", help="where to write the recipe")
    parser.add_argument("--plot", metavar="FILE.png", help="where to draw bits against KLD")
    _calibration.add_arguments(parser)


def run(arguments: argparse.Namespace) -> None:
    from jq4.cli import _terminal
    from jq4.report import mixed_table

    data, recipe = choose(arguments)
    if arguments.out:
        recipe.save(arguments.out)
    if arguments.plot:
        draw(data, Path(arguments.plot))
    if arguments.json:
        _terminal.print_json(data)
        return
    out = _terminal.console()
    for table in mixed_table(data):
        out.print(table)
    mix = data["mix"]
    out.print(
        f"{mix['bits']:.3f} bits a weight: KLD {mix['measured']:.4g} measured, {mix['predicted']:.4g} predicted as the "
        f"sum of the leaves' own; gap to the best choice {mix['gap']:.2g}"
    )
    for path in filter(None, (arguments.out, arguments.plot)):
        out.print(f"wrote {path}")


def choose(arguments: argparse.Namespace) -> tuple[dict[str, Any], Any]:
    """What `jq4 mixed --json` prints, and the recipe."""
    from jq4.choose_formats import choose_formats, frontier_of, uniform_choices
    from jq4.cli import _models, _terminal
    from jq4.plan import parse_memory
    from jq4.quantize import quantize
    from jq4.sensitivity import sensitivity
    from jq4.trials import kld_of_params

    watch = _terminal.Stopwatch()
    check_files(arguments)
    model = _models.open_model(arguments.model)
    formats = recipes_of(arguments)
    text = _calibration.read_rows(model.tokenizer, model.config, arguments.calibration, arguments)
    fitted, held_out = split(text.rows, arguments.calibration)
    stats = observe(model, fitted, formats, arguments)
    logits = _models.function_of(model)
    with _terminal.progress("trying formats") as step:
        found = sensitivity(
            logits,
            model.params,
            formats,
            held_out,
            stats,
            trials=arguments.trials,
            weighting=arguments.weighting,
            batch_size=arguments.batch_size,
            progress=step,
        )
    budget = {"bits": arguments.bits} if arguments.bytes is None else {"bytes": parse_memory(arguments.bytes)}
    choice = choose_formats(found, **budget)
    measure = kld_of_params(logits, model.params, held_out, arguments.batch_size)
    mixes = {"mix": choice, **uniform_choices(found)}
    measured = {}
    with _terminal.progress("measuring") as step:
        for done, (name, mix) in enumerate(mixes.items()):
            step(done, len(mixes), name)
            measured[name] = measure(quantize(model.params, mix.recipe, stats))
    uniform = [
        {"name": name, "bits": mix.bits, "bytes": mix.bytes, "predicted": mix.predicted, "measured": measured[name]}
        for name, mix in mixes.items()
        if name != "mix"
    ]
    data = {
        "model": arguments.model,
        "calibration": text.as_dict() | {"fitted_rows": len(fitted), "trial_rows": len(held_out)},
        "sensitivity": found.as_dict(),
        "mix": choice.as_dict() | {"measured": measured["mix"]},
        "uniform": uniform,
        "frontier": frontier_of(found),
        "files": {"recipe": arguments.out, "plot": arguments.plot},
        "seconds": watch.seconds,
        "versions": _terminal.versions(),
    }
    return data, choice.recipe


def check_files(arguments: argparse.Namespace) -> None:
    """What would fail only after the work, told before it."""
    from jq4 import drawing
    from jq4.errors import JQ4Error

    for given in filter(None, (arguments.out, arguments.plot)):
        if not Path(given).resolve().parent.is_dir():
            raise JQ4Error(f"{given}: there is no folder {Path(given).resolve().parent} to write to")
    if arguments.out and Path(arguments.out).suffix not in (".yaml", ".yml", ".json"):
        raise JQ4Error(f"{arguments.out}: wanted a name that ends in .yaml, .yml or .json")
    if arguments.plot and not drawing.has_matplotlib():
        raise JQ4Error("--plot wants matplotlib: pip install jq4[plot]")


def recipes_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The formats by name; None leaves a leaf dense."""
    from jq4.recipe import Recipe
    from jq4.sensitivity import DENSE

    names = [name.strip() for name in arguments.formats.split(",") if name.strip()]
    options = {"embeddings": arguments.embeddings, "head": arguments.head}
    return {name: None if name == DENSE else Recipe.preset(name, **options) for name in names}


def split(rows: Any, file: str) -> tuple[Any, Any]:
    """(rows that methods are calibrated on, rows that losses are measured on)."""
    from jq4.errors import JQ4Error

    if len(rows) < 2:
        raise JQ4Error(f"{file}: gives {len(rows)} row, wanted two or more: one to calibrate, one to measure on")
    return rows[::2], rows[1::2]


def observe(model: Any, rows: Any, formats: dict[str, Any], arguments: argparse.Namespace) -> Any:
    """Statistics of the dense model, with Hessians wherever a method needs them or they are small."""
    from jq4.axes import contraction_axes
    from jq4.cli import _models
    from jq4.leaf_errors import collect_hessians
    from jq4.methods import get_method
    from jq4.statistics import COLLECTABLE

    used = {rule.method for recipe in formats.values() if recipe is not None for rule in recipe.rules}
    axes = contraction_axes(_models.function_of(model), model.params, rows[:1])
    needed = any(get_method(method).needs_statistics for method in used)
    collect = COLLECTABLE if needed else collect_hessians(model.params, axes)
    return _models.observe_inputs(model, rows, arguments.batch_size, collect)


def draw(data: dict[str, Any], file: Path) -> None:
    """The frontier as predicted, and what was measured: the mix and each format by itself."""
    from jq4.drawing import GREY, png_of, subplots
    from jq4.quality_report.pictures import draw_bits_against_kld

    mix = data["mix"]
    points = [(each["name"], each["bits"], each["measured"]) for each in data["uniform"]]
    with subplots(1, 1, (8.0, 5.0)) as (figure, panels):
        axes, frontier = panels[0, 0], [each for each in data["frontier"] if each["predicted"] > 0]
        predicted = [each["predicted"] for each in frontier]
        bits = [each["bits"] for each in frontier]
        axes.plot(bits, predicted, color=GREY, linewidth=1, label="best mixes, predicted")
        draw_bits_against_kld(axes, [*points, (f"mix at {mix['bits']:.2f}", mix["bits"], mix["measured"])])
        axes.legend(frameon=False, fontsize=9)
        file.write_bytes(png_of(figure))
