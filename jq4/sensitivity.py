"""What it costs to hold a leaf in a format: measured leaf by leaf, all others dense.

    loss(leaf, format) = KLD of the model in which this leaf alone is in this format, on rows of calibration

A KLD is quadratic in small errors, and errors of different leaves meet mostly at random, so that losses nearly add up;
how nearly is measured by whoever uses them (jq4.choose_formats). A trial (jq4.trials) runs the model once over the
rows. Where not all are run, losses follow an estimate, its `weighting`:

    fisher    the KLD that the model's gradients predict (jq4.fisher), in nats; one backward pass a row for all
    hessian   the share of the leaf's outputs that is lost (jq4.leaf_errors); nothing is run, and how much the model
              minds is not known

With `trials="one"` there is one trial for each leaf, in the format of its median estimate, and the others follow in
proportion; with `trials="none"` the estimate itself is the loss. On TinyStories-656K, 7 leaves in 5 formats, ranks of
the leaves within a format agree with those of their trials by .99 (fisher) against .56 (hessian) for HQQ, .93 against
.41 for GPTQ, and the first is the loss itself to 13 and 52 per cent at worst (benchmarks/mixed.py).

Trials put the dequantized leaf into the dense tree, so that one program runs them all. They see what formats do to
weights; formats that quantize activations are not told apart from those that do not. The granularity is the leaf: all
layers of a stack that is scanned have one format.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jq4.errors import JQ4Error
from jq4.fisher import fisher_diagonal, fisher_loss
from jq4.leaf_errors import error_of
from jq4.paths import find_path, flatten_with_paths
from jq4.qarray import QArray
from jq4.quantize import quantize, quantize_report
from jq4.recipe import Recipe
from jq4.rule import Rule
from jq4.trials import Trials

DENSE = "dense"
TRIALS = ("all", "one", "none")
FISHER, HESSIAN = WEIGHTINGS = ("fisher", "hessian")


@dataclasses.dataclass(frozen=True)
class Option:
    """A leaf in one format.

    Attributes:
      format: the name it was given by.
      rule: the rule that makes it, meant for this leaf alone.
      bytes: held, scales included.
      output_error: E|x(W - W')|**2 / E|xW|**2; None where nothing is known of the inputs.
      fisher_loss: the KLD that gradients predict; None where they were not asked for.
      kld: of the trial; None where there was none.
      loss: what choosing it is expected to cost.
    """

    format: str
    rule: Rule
    bytes: int
    output_error: float | None
    fisher_loss: float | None
    kld: float | None
    loss: float

    def as_dict(self) -> dict[str, Any]:
        names = ("format", "bytes", "output_error", "fisher_loss", "kld", "loss")
        return {name: getattr(self, name) for name in names}


@dataclasses.dataclass(frozen=True)
class LeafSensitivity:
    """The options of one leaf of `size` weights."""

    path: str
    size: int
    options: tuple[Option, ...]

    def as_dict(self) -> dict[str, Any]:
        return {"path": self.path, "size": self.size, "options": [option.as_dict() for option in self.options]}


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` measured.

    Attributes:
      trials: how losses were found, one of TRIALS.
      weighting: of the estimates, one of WEIGHTINGS.
      rows: how many rows of calibration the trials ran over.
      paths: of all leaves of the tree, candidates or not.
    """

    leaves: tuple[LeafSensitivity, ...]
    trials: str
    weighting: str
    rows: int
    paths: tuple[str, ...]

    @property
    def size(self) -> int:
        return sum(leaf.size for leaf in self.leaves)

    def as_dict(self) -> dict[str, Any]:
        told = {"trials": self.trials, "weighting": self.weighting, "rows": self.rows}
        return {**told, "leaves": [leaf.as_dict() for leaf in self.leaves]}


def sensitivity(
    logits: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    formats: Sequence[str] | Mapping[str, Recipe | None],
    rows: Any,
    stats: Any = None,
    *,
    trials: str = "all",
    weighting: str | None = None,
    batch_size: int = 8,
    progress: Callable[[int, int, str], None] | None = None,
) -> Sensitivity:
    """The loss of every leaf in every format, each leaf by itself.

    Args:
      logits: logits(params, tokens i32[B, T]) -> float[B, T, V] of a dense tree.
      params: the dense tree.
      formats: presets' names, or recipes by name; "dense" (None) leaves a leaf as it is. A leaf is a candidate where
        one of the recipes means it.
      rows: tokens i32[R, T] of calibration, best not those of `stats`.
      stats: of jq4.observe, for methods that need them, for contraction axes and for output errors.
      trials: one of TRIALS, see the module's text.
      weighting: one of WEIGHTINGS; None for "fisher" where losses need an estimate, and no gradients where all are
        measured.
      progress: called with (trials done, trials in all, what is next).

    Raises:
      JQ4Error: no formats, no leaf that they mean, a recipe with steps.
    """
    weighting = _checked(trials, weighting, stats)
    rules = _candidates(params, _recipes(formats), stats)
    weights = dict(flatten_with_paths(params))
    measure = Trials(logits, params, rows, batch_size)
    jobs = sum(len(options) for options in rules.values())
    done, leaves = 0, []
    fisher = _fisher(logits, params, rows, rules, progress) if weighting == FISHER else {}
    for path, options in rules.items():
        made = []
        for name, rule in options.items():
            if progress is not None:
                progress(done, jobs, f"{path} in {name}")
            option, packed = _option(path, name, rule, params, weights[path], stats, fisher.get(path))
            made.append(_measured(option, measure(path, packed)) if trials == "all" and packed is not None else option)
            done += 1
        if trials != "all":
            made = [_estimated(path, option, weighting) for option in made]
        if trials == "one":
            made = _scaled(path, made, params, stats, measure)
        leaves.append(LeafSensitivity(path, int(np.prod(weights[path].shape)), tuple(made)))
    return Sensitivity(tuple(leaves), trials, weighting, len(rows), tuple(weights))


def _checked(trials: str, weighting: str | None, stats: Any) -> str:
    """The weighting."""
    if trials not in TRIALS:
        raise JQ4Error(f"trials is {trials!r}, wanted one of {', '.join(TRIALS)}")
    weighting = weighting or (HESSIAN if trials == "all" else FISHER)
    if weighting not in WEIGHTINGS:
        raise JQ4Error(f"weighting is {weighting!r}, wanted one of {', '.join(WEIGHTINGS)}")
    if trials != "all" and weighting == HESSIAN and stats is None:
        raise JQ4Error(
            f"trials {trials!r} weighted by the Hessian goes by errors of outputs, which need stats=jq4.observe(...)"
        )
    return weighting


def _fisher(logits: Any, params: Any, rows: Any, paths: Any, progress: Any) -> dict[str, jax.Array]:
    if progress is not None:
        progress(0, sum(map(len, paths.values())), "gradients")
    return fisher_diagonal(logits, params, rows, paths)


def _recipes(formats: Sequence[str] | Mapping[str, Recipe | None]) -> dict[str, Recipe | None]:
    if isinstance(formats, Mapping):
        named = dict(formats)
    else:
        named = {name: None if name == DENSE else Recipe.preset(name) for name in formats}
    if len(named) < 2:
        raise JQ4Error(f"formats are {list(named)}: wanted two or more to choose from")
    return named


def _candidates(params: Any, recipes: Mapping[str, Recipe | None], stats: Any) -> dict[str, dict[str, Rule]]:
    """Path -> format -> the rule for that leaf alone."""
    paths = [path for path, _ in flatten_with_paths(params)]
    found: dict[str, dict[str, Rule]] = {}
    for name, recipe in recipes.items():
        for entry in [] if recipe is None else quantize_report(params, recipe, stats).leaves:
            if entry.is_planned and entry.rule is not None:
                targets = (target_of(entry.path, paths),)
                found.setdefault(entry.path, {})[name] = dataclasses.replace(entry.rule, targets=targets, ignore=())
    if not found:
        raise JQ4Error(f"the formats {', '.join(recipes)} mean no leaf of the tree: wanted recipes that pack something")
    for path, options in found.items():
        if DENSE in recipes:
            options[DENSE] = Rule((target_of(path, paths),), num_bits=16)
    return found


def target_of(path: str, paths: Sequence[str]) -> str:
    """A pattern that means the leaf at `path`, and no other of `paths`."""
    meant = [other for other in paths if f"/{path}/" in f"/{other}/"]
    return path if meant == [path] else f"re:^(params/)?{re.escape(path)}$"


def _option(
    path: str, name: str, rule: Rule, params: Any, weight: Any, stats: Any, fisher: Any
) -> tuple[Option, QArray | None]:
    """An option that has no loss yet, and the packed leaf; None for one that stays dense, which loses nothing."""
    if rule.is_dense:
        return Option(name, rule, int(weight.nbytes), 0.0, 0.0, 0.0, 0.0), None
    packed = packed_leaf(path, rule, params, stats)
    known = find_path(stats or {}, path)
    error = error_of(path, weight, packed, known, axis=packed.axis).output_error
    predicted = None if fisher is None else fisher_loss(weight, packed, fisher, known, axis=packed.axis)
    return Option(name, rule, packed.nbytes, error, predicted, None, 0.0), packed


def _measured(option: Option, kld: float) -> Option:
    return dataclasses.replace(option, kld=kld, loss=kld)


def packed_leaf(path: str, rule: Rule, params: Any, stats: Any) -> Any:
    """The QArray that the rule makes of the leaf at `path`."""
    return dict(flatten_with_paths(quantize(params, Recipe((rule,)), stats)))[path]


def _estimated(path: str, option: Option, weighting: str) -> Option:
    estimate = option.fisher_loss if weighting == FISHER else option.output_error
    if estimate is None:
        raise JQ4Error(f"{path}: the statistics do not tell its outputs' errors: use the weighting 'fisher'")
    return dataclasses.replace(option, loss=estimate)


def _scaled(path: str, options: list[Option], params: Any, stats: Any, measure: Trials) -> list[Option]:
    """Losses in proportion to their estimates, by the factor that one trial measures."""
    lossy = sorted((option for option in options if option.loss), key=lambda option: option.loss)
    if not lossy:
        return options
    probe = lossy[len(lossy) // 2]
    kld = measure(path, packed_leaf(path, probe.rule, params, stats))
    factor = kld / probe.loss
    return [
        dataclasses.replace(option, loss=factor * option.loss, kld=kld if option is probe else option.kld)
        for option in options
    ]
