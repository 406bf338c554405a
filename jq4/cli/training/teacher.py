"""The teacher of `jq4 train distill`: what is seen of it, and its predictions on disk."""

import argparse
from collections.abc import Callable, Sequence
from typing import Any


def seen(hidden: Sequence[str]) -> Callable[[Any], Any]:
    """What makes a function give (logits, inputs of the leaves that are called so, by path)."""

    def see(function: Any) -> Any:
        from jq4.train import inputs_of

        if not hidden:
            return lambda params, tokens: (function(params, tokens), {})
        return inputs_of(function, list(hidden))

    return see


def check_hidden(hidden: Sequence[str], task: Any) -> None:
    """Raises JQ4Error, before anything is trained, for leaves that model and teacher do not meet with alike inputs."""
    from jq4.errors import JQ4Error

    if not hidden:
        return
    ours, theirs = (_shapes_of(each, hidden, task.text.rows.shape[1]) for each in (task.model, task.reference))
    for path in {**ours, **theirs}:
        mine, its = ours.get(path), theirs.get(path)
        if mine != its:
            raise JQ4Error(
                f"--hidden: {path} has inputs {mine} in the model and {its} in the teacher, wanted the same: name "
                "other leaves, or take a teacher of the model's own architecture"
            )


def _shapes_of(model: Any, hidden: Sequence[str], length: int) -> dict[str, Any]:
    """Path -> the shapes of the inputs that are seen."""
    import jax

    from jq4.cli.training.rounded import teaching

    tokens = jax.ShapeDtypeStruct((1, length), "int32")
    _, inputs = jax.eval_shape(teaching(model, "float32", seen(hidden)), model.weights, tokens)
    return {path: [leaf.shape for leaf in jax.tree.leaves(found)] for path, found in inputs.items()}


def from_disk(arguments: argparse.Namespace) -> Callable[[Any, Any, Any], dict[str, Any]]:
    """(the teacher, its function, rows) -> its predictions, asked for where --teacher-cache does not hold them yet."""

    def ask(teacher: Any, function: Any, rows: Any) -> dict[str, Any]:
        from jq4.cli import _terminal
        from jq4.cli.training.losses import TAUGHT
        from jq4.train import TeacherCache

        with _terminal.progress("asking the teacher") as step:
            kept = TeacherCache.write(
                arguments.teacher_cache,
                lambda weights, tokens: function(weights, tokens)[0],
                teacher.weights,
                rows,
                k=arguments.top_k,
                batch_size=arguments.batch_size,
                progress=step,
            )
        return {TAUGHT: kept}

    return ask
