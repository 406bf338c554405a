"""How a model was made, in words, from what its manifest says: by which rules, from what, trained and merged how."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jq4.report import format_figure
from jq4.rule import DENSE_BITS

_SHOWN = 3  # leaves of a rule that are named
_APART = ("training", "text", "held_out", "rows", "sources")  # of a training, told in rows of their own or in digests


def made_rows(recipe: Any, source: Any, calibration: Any = None) -> list[tuple[str, str]]:
    """(what, words) of a manifest's recipe and source; calibration where it is told apart from the source.

    Both are whatever a user gave `jq4.save`: what is not as jq4 writes it is told as it stands.
    """
    rows = _told("recipe", _recipe_rows, recipe)
    for each in _history(source):
        rows.append(("made from", str(each.get("folder", each))))
        rows += _told("merged", _merging_rows, each.get("merged"))
        rows += _told("trained", _training_rows, each.get("training"))
        calibration = calibration or each.get("calibration")
    if source and not isinstance(source, Mapping):
        rows.append(("made from", str(source)))
    return rows + _told("calibrated on", lambda text: [("calibrated on", text_words(text))], calibration)


def text_words(text: Mapping[str, Any]) -> str:
    """A file and what is known of it: "x.npy (97 rows of 256 tokens, sha256 0f3a...)"."""
    known = []
    if text.get("rows") and text.get("context"):
        known.append(f"{text['rows']:,} rows of {text['context']} tokens")
    elif text.get("tokens"):
        known.append(f"{text['tokens']:,} tokens")
    if text.get("sha256"):
        known.append(f"sha256 {text['sha256'].removeprefix('sha256:')[:12]}…")
    if text.get("seed") is not None:
        known.append(f"seed {text['seed']}")
    return f"{text.get('file', 'tokens')}" + (f" ({', '.join(known)})" if known else "")


def _told(what: str, rows_of: Callable[[Any], list[tuple[str, str]]], value: Any) -> list[tuple[str, str]]:
    """The rows of a value; of one that is not as jq4 writes it, itself."""
    try:
        return rows_of(value) if value else []
    except (AttributeError, KeyError, TypeError, ValueError):
        return [(what, str(value))]


def _history(source: Any) -> Iterator[Mapping[str, Any]]:
    """A source, and what was merged there before it."""
    while isinstance(source, Mapping):
        yield source
        merged = source.get("merged")
        source = merged.get("into") if isinstance(merged, Mapping) else None


def _recipe_rows(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    if recipe.get("name"):
        return [("recipe", str(recipe["name"]))]
    rules = [("recipe", _rule_words(rule)) for rule in recipe["rules"]]
    return [*_step_rows(recipe, "before"), *rules, *_step_rows(recipe, "after")]


def _step_rows(recipe: Mapping[str, Any], when: str) -> list[tuple[str, str]]:
    return [(f"{when} the rules", _step_words(step)) for step in recipe.get(when, ())]


def _step_words(step: Mapping[str, Any]) -> str:
    options = [f"{name} {_value_words(value)}" for name, value in step.items() if name != "step" and _is_given(value)]
    return ", ".join([str(step["step"]), *options])


def _rule_words(rule: Mapping[str, Any]) -> str:
    group = f" g{rule['group_size']}" if rule.get("group_size") else ""
    bits = rule.get("num_bits", 4)
    form = "dense" if bits == DENSE_BITS else f"{rule.get('method', 'rtn')} {rule.get('type', 'int')}{bits}{group}"
    if inputs := rule.get("input_activations"):
        form += f", inputs {inputs.get('type', 'int')}{inputs['num_bits']} by the {inputs.get('strategy', 'token')}"
        form += "" if inputs.get("symmetric", True) else " with zero points"
    targets = rule["targets"]
    if isinstance(targets, str):
        targets = [targets]
    more = f" and {len(targets) - _SHOWN} more" if len(targets) > _SHOWN else ""
    return f"{form}: {', '.join(targets[:_SHOWN])}{more}"


def _merging_rows(merged: Mapping[str, Any]) -> list[tuple[str, str]]:
    count = len(merged.get("leaves", ()))
    return [("merged", f"adapters of {count} leaves ({merged.get('adapters')}), which became {merged.get('to')}")]


def _training_rows(training: Mapping[str, Any]) -> list[tuple[str, str]]:
    rows = [("trained by", str(training.get("training")))]
    rows += [("trained on", text_words(text)) for text in training.get("text", ())]
    if isinstance(held_out := training.get("held_out"), Mapping):
        share = f"{held_out.get('rows')} of their rows"
        rows.append(("held out", share if "share" in held_out else text_words(held_out)))
    for name, each in training.get("sources", {}).items():
        rows.append((str(name), str(each.get("folder"))))
    options = [(name, value) for name, value in training.items() if name not in _APART and _is_given(value)]
    return [*rows, ("options", ", ".join(f"{name} {_value_words(value)}" for name, value in options))]


def _is_given(value: Any) -> bool:
    return value is not None and value is not False and value != []


def _value_words(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(_value_words, value))
    return "yes" if value is True else format_figure(value)
