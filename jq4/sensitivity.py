"""What it costs to hold a leaf in a format: measured leaf by leaf, all others dense.

    loss(leaf, format) = KLD of the model in which this leaf alone is in this format, on rows of calibration

A KLD is quadratic in small errors, and errors of different leaves meet mostly at random, so that losses nearly add up;
how nearly is measured by whoever uses them (jq4.choose_formats). A trial runs the model once over the rows. With
`trials="one"` there is one for each leaf, in the format of its median error, and the others follow in proportion to
the error that they make in the leaf's outputs (jq4.leaf_errors): a measured factor times a Hessian-weighted error.
With `trials="none"` that error itself is the loss, which compares formats of a leaf well and leaves with each other
badly.

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
from jq4.evaluate import evaluate
from jq4.leaf_errors import error_of
from jq4.paths import find_path, flatten_with_paths, leaf_path
from jq4.qarray import is_qarray
from jq4.quantize import quantize, quantize_report
from jq4.recipe import Recipe
from jq4.rule import Rule

DENSE = "dense"
TRIALS = ("all", "one", "none")
_REFERENCE_BYTES = 2**30  # of reference logits, above which they are computed again for each trial


@dataclasses.dataclass(frozen=True)
class Option:
    """A leaf in one format.

    Attributes:
      format: the name it was given by.
      rule: the rule that makes it, meant for this leaf alone.
      bytes: held, scales included.
      output_error: E|x(W - W')|**2 / E|xW|**2; None where nothing is known of the inputs.
      kld: of the trial; None where there was none.
      loss: what choosing it is expected to cost.
    """

    format: str
    rule: Rule
    bytes: int
    output_error: float | None
    kld: float | None
    loss: float

    def as_dict(self) -> dict[str, Any]:
        names = ("format", "bytes", "output_error", "kld", "loss")
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
      rows: how many rows of calibration the trials ran over.
      paths: of all leaves of the tree, candidates or not.
    """

    leaves: tuple[LeafSensitivity, ...]
    trials: str
    rows: int
    paths: tuple[str, ...]

    @property
    def size(self) -> int:
        return sum(leaf.size for leaf in self.leaves)

    def as_dict(self) -> dict[str, Any]:
        return {"trials": self.trials, "rows": self.rows, "leaves": [leaf.as_dict() for leaf in self.leaves]}


def sensitivity(
    logits: Callable[[Any, jax.Array], jax.Array],
    params: Any,
    formats: Sequence[str] | Mapping[str, Recipe | None],
    rows: Any,
    stats: Any = None,
    *,
    trials: str = "all",
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
      progress: called with (trials done, trials in all, what is next).

    Raises:
      JQ4Error: no formats, no leaf that they mean, a recipe with steps.
    """
    if trials not in TRIALS:
        raise JQ4Error(f"trials is {trials!r}, wanted one of {', '.join(TRIALS)}")
    if trials != "all" and stats is None:
        raise JQ4Error(f"trials {trials!r} goes by errors of outputs, which need stats=jq4.observe(...)")
    rules = _candidates(params, _recipes(formats), stats)
    weights = dict(flatten_with_paths(params))
    measure = _Trials(logits, params, rows, batch_size)
    jobs = sum(len(options) for options in rules.values())
    done, leaves = 0, []
    for path, options in rules.items():
        made = []
        for name, rule in options.items():
            if progress is not None:
                progress(done, jobs, f"{path} in {name}")
            made.append(_option(path, name, rule, weights[path], params, stats, measure if trials == "all" else None))
            done += 1
        if trials != "all":
            _check_errors(path, made, trials)
        if trials == "one":
            made = _scaled(path, made, params, stats, measure)
        leaves.append(LeafSensitivity(path, int(np.prod(weights[path].shape)), tuple(made)))
    return Sensitivity(tuple(leaves), trials, len(rows), tuple(weights))


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


def _option(path: str, name: str, rule: Rule, weight: Any, params: Any, stats: Any, measure: Any) -> Option:
    if rule.is_dense:
        return Option(name, rule, int(weight.nbytes), 0.0, 0.0, 0.0)
    packed = packed_leaf(path, rule, params, stats)
    error = error_of(path, weight, packed, find_path(stats or {}, path), axis=packed.axis).output_error
    kld = None if measure is None else measure(path, packed)
    loss = kld if kld is not None else (error or 0.0)
    return Option(name, rule, packed.nbytes, error, kld, loss)


def packed_leaf(path: str, rule: Rule, params: Any, stats: Any) -> Any:
    """The QArray that the rule makes of the leaf at `path`."""
    return dict(flatten_with_paths(quantize(params, Recipe((rule,)), stats)))[path]


def _check_errors(path: str, options: list[Option], trials: str) -> None:
    if any(option.output_error is None for option in options):
        raise JQ4Error(
            f"{path}: the statistics do not tell its outputs' errors, which trials={trials!r} goes by: use 'all'"
        )


def _scaled(path: str, options: list[Option], params: Any, stats: Any, measure: Any) -> list[Option]:
    """Losses in proportion to output errors, by the factor that one trial measures."""
    lossy = sorted((option for option in options if option.output_error), key=lambda option: option.output_error or 0)
    if not lossy:
        return options
    probe = lossy[len(lossy) // 2]
    kld = measure(path, packed_leaf(path, probe.rule, params, stats))
    factor = kld / (probe.output_error or 1.0)
    return [
        dataclasses.replace(option, loss=factor * (option.output_error or 0.0), kld=kld if option is probe else None)
        for option in options
    ]


class _Trials:
    """Runs the model with one leaf replaced, and compares it with the dense one."""

    def __init__(self, logits: Any, params: Any, rows: Any, batch_size: int) -> None:
        self._logits, self._params = jax.jit(logits), params
        self._rows, self._batch_size = np.asarray(rows), batch_size
        self._kept: dict[bytes, jax.Array] = {}

    def __call__(self, path: str, packed: Any) -> float:
        return self.kld(_with_leaf(self._params, path, packed))

    def kld(self, params: Any) -> float:
        """The mean KLD of a tree against the dense one."""
        tree = jax.tree.map(lambda leaf: _dequantized(leaf) if is_qarray(leaf) else leaf, params, is_leaf=is_qarray)
        run = self._logits
        found = evaluate(
            lambda tokens: run(tree, tokens), self._rows, reference=self._reference, batch_size=self._batch_size
        )
        assert found.kld_mean is not None
        return max(found.kld_mean, 0.0)

    def _reference(self, tokens: jax.Array) -> jax.Array:
        key = np.asarray(tokens).tobytes()
        if key in self._kept:
            return self._kept[key]
        found = self._logits(self._params, tokens)
        if found.nbytes * (len(self._rows) / len(tokens)) <= _REFERENCE_BYTES:
            self._kept[key] = found
        return found


@jax.jit
def _dequantized(leaf: Any) -> jax.Array:
    return leaf.dequantize()


def _with_leaf(params: Any, path: str, packed: Any) -> Any:
    def pick(keys: Any, leaf: Any) -> Any:
        return packed if leaf_path(keys) == path else leaf

    return jax.tree_util.tree_map_with_path(pick, params, is_leaf=is_qarray)


def kld_of_params(
    logits: Callable[[Any, jax.Array], jax.Array], params: Any, rows: Any, batch_size: int = 8
) -> Callable[[Any], float]:
    """A function from a tree, packed or not, to its mean KLD against `params`, as trials measure it."""
    return _Trials(logits, params, rows, batch_size).kld
