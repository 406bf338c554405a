"""`inputs_of(f, names)`: f, and beside its output what the leaves of these names are multiplied by in it.

    watched = jq4.train.inputs_of(model.apply, ["down_proj"])
    logits, inputs = watched(params, tokens)        # inputs: {"params/layers/mlp/down_proj/kernel": [L, B, T, K]}

A layer is known by the leaves that it multiplies by, so hidden states need no module rewritten and no `sow`: the inputs
of `q_proj` are the normalized stream, those of `down_proj` the gated hidden state, those of the head the last state.

It is the interpreter of `jq4.observe` again, which follows a leaf to its product, and hands out what it finds there in
place of statistics of it. What it returns is an ordinary function of dense trees, with the equations of f: it may be
differentiated (remat and rules of the user's own for derivatives stay), and transformed further:

    jq4.fake_quantized(watched, recipe)((params, quantizers), tokens)      the same inputs of the model in training
    jq4.quantized(watched)(qparams, tokens)                                and of the packed one

Inside a scan each pass has its inputs, and they come stacked along the loop: [L, ...], whether the leaf is sliced by
the loop or the same in every pass. Inputs are as they enter the product: before it rounds them, if the recipe has
`input_activations`; the rows of experts (ragged_dot) as the router sorted them. What cannot come out (of a `while`, a
branch, a shard_map, a function with a derivative of the user's own) is refused, by name.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from jq4 import jax_compat, watch_rules
from jq4.apply import Quantized
from jq4.arguments import Arguments
from jq4.axes import is_weight
from jq4.errors import JQ4Error
from jq4.interpret import Interpreter, Values
from jq4.qarray import holds_qarrays
from jq4.targets import as_patterns, matches
from jq4.train.fake import FakeQuantized
from jq4.train.quantizer import split_pair
from jq4.watched import Watched

_OPAQUE = {
    "eval_while": "a while loop",
    "eval_cond": "a branch",
    "eval_shard_map": "a shard_map, which inputs_of may stand within",
    "eval_custom_jvp": "a function with a derivative of the user's own",
    "eval_custom_vjp": "a function with a derivative of the user's own",
}
_PART = "a loop over a part of its axis"
_REMEDY = "Name another leaf of the same layer"

Frame = dict[str, list[jax.Array]]  # path -> the inputs of its products, in the program's order


class InputsInterpreter(Interpreter):
    """Evaluates a jaxpr with Watched leaves, and gathers the inputs of their products.

    Attributes:
      frame: what was gathered at this level of the program.
      lost: path -> where the leaf, or a slice of it, went as a plain array.
    """

    def __init__(self) -> None:
        self.frame: Frame = {}
        self.lost: dict[str, str] = {}
        self.looked_up: dict[str, int] = {}

    def is_special(self, value: Any) -> bool:
        return isinstance(value, Watched)

    def densify(self, value: Watched, eqn: Any, reason: str = "") -> Any:
        self.lost.setdefault(value.path, reason or eqn.primitive.name)
        return value.array

    def equation(self, eqn: Any, values: Values) -> Values:
        opaque = _OPAQUE.get(jax_compat.method_of(eqn) or "")
        return super().equation(eqn, values if opaque is None else self.dense(values, eqn, opaque))

    def rule(self, eqn: Any, values: Values) -> Values | None:
        if eqn.primitive.name in watch_rules.PRODUCTS:
            self._gather(values)
            return self.compute(eqn, values)
        apply = watch_rules.RULES.get(eqn.primitive.name)
        if apply is None:
            return None
        outputs = apply(self, eqn, values)
        if not any(map(self.is_special, outputs)):
            self.dense(values, eqn)
        return outputs

    def compute(self, eqn: Any, values: Values) -> Values:
        return jax_compat.bind(eqn, [value.array if self.is_special(value) else value for value in values])

    def _gather(self, values: Values) -> None:
        x, weight = values[:2]
        for leaf, other in ((weight, x), (x, weight)):
            if self.is_special(leaf):
                self.frame.setdefault(leaf.path, []).append(other.array if self.is_special(other) else other)

    # Programs within the program ----------------------------------------------------------------------------------

    def within(self, jaxpr: Any, values: Sequence[Any]) -> tuple[Values, Frame]:
        outer, self.frame = self.frame, {}
        try:
            return self.evaluate(jaxpr, values), self.frame
        finally:
            self.frame = outer

    def absorb(self, found: Frame, /) -> None:
        for path, inputs in found.items():
            self.frame.setdefault(path, []).extend(inputs)

    def inside_loop(self, value: Watched) -> Watched:
        return value.slice_of(0)

    def leaving_loop(self, value: Watched, eqn: Any) -> Any:
        return self.densify(value, eqn, "what a loop gives back")

    def before_slicing(self, value: Watched, eqn: Any) -> Any:
        return value if value.can_be_scanned() else self.densify(value, eqn, _PART)


class InputsOf:
    """What `inputs_of(f, names)` returns."""

    def __init__(self, function: Callable[..., Any], names: tuple[str, ...]) -> None:
        functools.update_wrapper(self, function, updated=())
        self.function = function
        self.names = names

    def __call__(self, tree: Any, *args: Any, **kwargs: Any) -> tuple[Any, dict[str, Any]]:
        _check_dense(tree)
        arguments = Arguments((tree, *args), kwargs)
        weights = {place: path for place, path in arguments.paths.items() if is_weight(arguments.leaves[place])}
        chosen = _chosen(weights, self.names)
        values = [
            Watched.whole(leaf, chosen[place]) if place in chosen else leaf
            for place, leaf in zip(arguments.traced, arguments.arrays, strict=True)
        ]
        jaxpr, outputs = arguments.trace(self.function, arguments.arrays)
        interpreter = InputsInterpreter()
        results = interpreter.evaluate(jaxpr, values)
        inputs = _inputs(interpreter, list(chosen.values()), self.names)
        return outputs.rebuild([each.array if isinstance(each, Watched) else each for each in results]), inputs

    def __repr__(self) -> str:
        return f"jq4.train.inputs_of({self.function!r}, {list(self.names)})"


def inputs_of(function: Callable[..., Any], names: str | Sequence[str]) -> InputsOf:
    """A function like `function` that returns (its output, {path of a leaf: the inputs of its product}).

    Args:
      function: any traceable function whose first argument is a tree of dense params. To see into a packed or a
        fake-quantized model, transform what this returns, as above.
      names: which leaves, as a recipe's `targets` name them: "down_proj", "layers/*/mlp/**", "re:(q|k)_proj".

    Returns:
      The function. The inputs of a leaf are an array, [L, ...] if the product is in a loop of L passes; of a leaf that
      several products in the program multiply by, a tuple of them.

    Raises:
      JQ4Error: when called: a name that no weight has, or only such as f multiplies by nothing.
    """
    if isinstance(function, Quantized | FakeQuantized):
        raise JQ4Error(
            f"inputs_of was given {function!r}, whose leaves are not what f multiplies by: transform f last, as "
            "jq4.quantized(jq4.train.inputs_of(f, names)) or jq4.fake_quantized(jq4.train.inputs_of(f, names), recipe)"
        )
    return InputsOf(function, as_patterns(names, "inputs_of", "names"))


def _check_dense(tree: Any) -> None:
    if split_pair(tree)[1] is not None or holds_qarrays(tree):
        raise JQ4Error(
            "inputs_of(f, names) takes dense params. Call jq4.quantized(jq4.train.inputs_of(f, names)) on packed ones, "
            "for a pair with quantizers jq4.fake_quantized(jq4.train.inputs_of(f, names), recipe)"
        )


def _chosen(weights: dict[int, str], names: tuple[str, ...]) -> dict[int, str]:
    """Place -> path of the weights that the names mean."""
    for name in names:
        if not any(matches(name, path) for path in weights.values()):
            known = ", ".join(sorted(weights.values())[:8])
            raise JQ4Error(f"inputs_of: no weight is called {name!r}. The tree has {known}, ...")
    return {place: path for place, path in weights.items() if any(matches(name, path) for name in names)}


def _inputs(interpreter: InputsInterpreter, paths: list[str], names: tuple[str, ...]) -> dict[str, Any]:
    """What was gathered by path; biases and norms that a name means too, and nothing multiplies by, are left out."""
    frame, lost = interpreter.frame, interpreter.lost
    for path in paths:
        if lost.get(path) in (*_OPAQUE.values(), _PART):
            raise JQ4Error(f"inputs_of: {path} goes into {lost[path]}, out of which its inputs cannot come. {_REMEDY}")
    for name in names:
        meant = [path for path in paths if matches(name, path)]
        if not any(path in frame for path in meant):
            seen = f"it is seen in {lost[meant[0]]} alone" if meant[0] in lost else "f does not look at it"
            raise JQ4Error(f"inputs_of: {meant[0]} is multiplied by nothing in f: {seen}. {_REMEDY}")
    return {path: found[0] if len(found) == 1 else tuple(found) for path in paths if (found := frame.get(path))}
