"""jq4 drift: does the text that a model meets differ from what it was calibrated on, and what does that cost?"""

import argparse
import math
from typing import Any

from jq4.cli import _calibration, _models

HELP = "compare new text with the calibration text: which layers' inputs moved, and whether to recalibrate"
DESCRIPTION = (
    "Compares the inputs of every weight on a new text with those on the calibration text. A layer "
    "moved where its inputs diverge by more than twice the most that halves of the calibration text itself diverge. "
    "With --reference also KLD on both texts. Recalibrating is advised where inputs moved and KLD, where it is "
    "measured, grows more on the new text than that of the same recipe by round-to-nearest, which knows no text."
)
DRIFTED = 3  # the exit code of --exit-code
_FEW = 8  # rows, below which a text is too short to stand for its kind


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=_models.MODEL)
    parser.add_argument("--text", required=True, metavar="FILE", help="the new text: text, .jsonl or .npy ids")
    parser.add_argument("--calibration", required=True, metavar="FILE", help="what calibration was made on, likewise")
    _calibration.add_arguments(parser)
    parser.add_argument("--reference", metavar="MODEL", help="the dense model, for KLD and for exact inputs")
    parser.add_argument(
        "--parts", type=int, default=8, metavar="N", help="parts of calibration, halves of which tell the null (8)"
    )
    parser.add_argument(
        "--covariance",
        choices=("diagonal", "full"),
        default="diagonal",
        help="compare channel by channel, or whole Hessians (slower; K*K numbers for K inputs)",
    )
    parser.add_argument("--exit-code", action="store_true", help=f"exit with {DRIFTED} where recalibrating is advised")


def run(arguments: argparse.Namespace) -> int:
    from jq4.cli import _terminal
    from jq4.report import drift_table

    data = measure(arguments)
    if arguments.json:
        _terminal.print_json(data)
    else:
        out = _terminal.console()
        out.print(drift_table(data))
        out.print(data["verdict"], style="bold")
    return DRIFTED if arguments.exit_code and data["recalibrate"] else 0


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """What `jq4 drift --json` prints."""
    from jq4.cli import _terminal
    from jq4.drift import drift
    from jq4.driver.calibration_rows import may_need_rows

    watch = _terminal.Stopwatch()
    model = _models.open_model(arguments.model)
    reference = None if arguments.reference is None else _models.open_model(arguments.reference)
    texts = read_texts(model, arguments)
    say_other_calibration(arguments, texts["calibration"])
    rows = {name: text.rows for name, text in texts.items()}
    notes = notes_on_rows(arguments, rows)
    for note in notes:
        _terminal.say(note)
    parts = parts_of(rows["calibration"], arguments.parts, arguments.calibration)
    observed = dense_of(model) if reference is None else reference
    *before, after = observe(observed, [*parts, rows["new"]], arguments)
    found = drift(before, after)
    recipe = recipe_of(arguments.model)
    kld = kld_of(model, reference, rows, arguments)
    control = {} if recipe is None else kld_of(rounded(reference, recipe), reference, rows, arguments)
    recalibrate, verdict = judge(found, kld, control, recipe is None or may_need_rows(recipe))
    return {
        "model": arguments.model,
        "reference": arguments.reference,
        "texts": {name: text.as_dict() for name, text in texts.items()},
        **found.as_dict(),
        "kld": kld,
        "kld_round_to_nearest": control,
        "recalibrate": recalibrate,
        "verdict": verdict,
        "notes": notes,
        "seconds": watch.seconds,
        "versions": _terminal.versions(),
    }


def read_texts(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both texts in rows of one length: the inputs of a layer depend on how much context there is."""
    from jq4.cli import _calibration

    files = {"calibration": arguments.calibration, "new": arguments.text}
    texts = {
        name: _calibration.read_rows(model.tokenizer, model.config, file, arguments) for name, file in files.items()
    }
    contexts = {text.rows.shape[1] for text in texts.values()}
    if len(contexts) == 1:
        return texts
    return {
        name: _calibration.read_rows(model.tokenizer, model.config, file, arguments, min(contexts))
        for name, file in files.items()
    }


def say_other_calibration(arguments: argparse.Namespace, text: Any) -> None:
    """Says so where the model was calibrated on another file, by its own account."""
    from jq4.checkpoint.orbax import read_manifest
    from jq4.cli import _terminal

    about = read_manifest(arguments.model).source if _models.is_checkpoint(arguments.model) else None
    told = (about or {}).get("calibration", {})
    if told and told.get("sha256") != text.as_dict()["sha256"]:
        _terminal.say(f"{arguments.calibration}: {arguments.model} was calibrated on another file, {told.get('file')}")


def notes_on_rows(arguments: argparse.Namespace, rows: dict[str, Any]) -> list[str]:
    """That a text has few rows: what one passage is about then counts as much as what the text is like."""
    files = {"calibration": arguments.calibration, "new": arguments.text}
    return [
        f"{files[name]}: gives {len(some)} rows, fewer than {_FEW}: the verdict is of these passages more than of text "
        "like them; use a shorter --context or more text"
        for name, some in rows.items()
        if len(some) < _FEW
    ]


def parts_of(rows: Any, parts: int, file: str) -> list[Any]:
    """The rows of calibration in consecutive parts of one size; the rows that are left over are not used."""
    import numpy as np

    from jq4.errors import JQ4Error

    if parts < 4 or parts % 2:
        raise JQ4Error(f"--parts is {parts}, wanted an even number, 4 or more")
    if len(rows) < parts:
        raise JQ4Error(
            f"{file}: gives {len(rows)} rows, too few for {parts} parts; use a shorter --context or more text"
        )
    return np.split(rows[: len(rows) // parts * parts], parts)


def dense_of(model: Any) -> Any:
    """The model with dense weights, whose inputs can be observed."""
    import dataclasses

    from jq4.quantize import dequantize

    return dataclasses.replace(model, params=dequantize(model.params))


def observe(model: Any, texts: list[Any], arguments: argparse.Namespace) -> list[Any]:
    """Statistics of each of the texts' rows."""
    from jq4.observe import Programs
    from jq4.statistics import CHEAP

    collect = CHEAP if arguments.covariance == "diagonal" else (*CHEAP, "hessian")
    batch_size, programs = min(arguments.batch_size, *map(len, texts)), Programs()
    return [_models.observe_inputs(model, rows, batch_size, collect, programs=programs) for rows in texts]


def recipe_of(folder: str) -> Any:
    """The recipe that a packed folder was made by; None where it does not say."""
    from jq4.checkpoint.orbax import read_manifest
    from jq4.recipe import Recipe

    told = read_manifest(folder).recipe if _models.is_checkpoint(folder) else None
    return None if told is None else Recipe.from_dict(told, f"{folder}: recipe")


def rounded(reference: Any, recipe: Any) -> Any:
    """The reference in the recipe's formats by round-to-nearest; None without a reference."""
    import dataclasses

    from jq4.quantize import quantize

    if reference is None:
        return None
    rules = tuple(rule if rule.is_dense else dataclasses.replace(rule, **_plain(rule)) for rule in recipe.rules)
    control = dataclasses.replace(recipe, rules=rules, before=(), after=())
    return dataclasses.replace(reference, params=quantize(reference.params, control))


def _plain(rule: Any) -> dict[str, Any]:
    """What of a rule is changed so that it looks at no calibration."""
    is_fixed = rule.input_activations is not None and not rule.input_activations.dynamic
    return {"method": "rtn", "options": ()} | ({"input_activations": None} if is_fixed else {})


def kld_of(model: Any, reference: Any, rows: dict[str, Any], arguments: argparse.Namespace) -> dict[str, Any]:
    """KLD, agreement and perplexity on the rows of each text; nothing without a reference."""
    from jq4.cli import _terminal
    from jq4.evaluate import evaluate

    if model is None or reference is None:
        return {}
    ours, theirs, found = _models.laid_out(model).logits, reference.logits, {}
    for name, some in rows.items():
        with _terminal.progress(f"evaluating on {name} text") as step:
            each = evaluate(ours, some, reference=theirs, batch_size=arguments.batch_size, progress=step)
        found[name] = each.as_dict()
    return found


def judge(found: Any, kld: dict[str, Any], control: dict[str, Any], calibrated: bool) -> tuple[bool, str]:
    """(whether to recalibrate, why)."""
    moved, told = found.moved, sum(each.moved is not None for each in found.slices)
    if not moved:
        return False, f"no drift: of {told} weights' inputs none moved; the new text is like the calibration text."
    farthest = f"{moved[0].path} {list(moved[0].index)}" if moved[0].index else moved[0].path
    said = f"drift: of {told} weights' inputs {len(moved)} moved, farthest those of {farthest}."
    if not calibrated:
        return False, f"{said} The recipe looks at no calibration, so that there is nothing to recalibrate."
    if not kld:
        return True, f"{said} Recalibrate on text like the new; --reference would tell what it costs not to."
    growth, error = log_growth(kld)
    before, now = (kld[name]["kld_mean"] for name in ("calibration", "new"))
    said += f" KLD is {before:.4f} on the calibration text, {now:.4f} on the new"
    if control:
        of_rounding, its_error = log_growth(control)
        said += f" ({math.exp(growth):.2f} times; {math.exp(of_rounding):.2f} times by round-to-nearest)"
        growth, error = growth - of_rounding, math.hypot(error, its_error)
    if growth > 2 * error:
        return True, f"{said}. Recalibrate on text like the new."
    return False, f"{said}: no more than the text itself explains. Recalibrating is not needed."


def log_growth(kld: dict[str, Any]) -> tuple[float, float]:
    """(log of the mean KLD on new text over that on calibration's, its standard error)."""
    means = [max(kld[name]["kld_mean"], 1e-12) for name in ("new", "calibration")]
    errors = [kld[name].get("kld_mean_standard_error") or 0.0 for name in ("new", "calibration")]
    return math.log(means[0] / means[1]), math.hypot(*(e / m for e, m in zip(errors, means, strict=True)))
