"""The stages of `jq4 train`: more bits first, or weights before inputs, and the recipe's own at the end."""

import argparse
from collections.abc import Callable
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    stages = parser.add_argument_group("stages, of equal length")
    stages.add_argument(
        "--stages",
        type=int,
        nargs="+",
        default=[],
        metavar="BITS",
        help="come down from more bits, such as 8 6, to the recipe's own, from the dense weights within the start's "
        "ranges (default: the recipe's own bits from the start's codes)",
    )
    stages.add_argument(
        "--weights-first", action="store_true", help="leave inputs as they are in the stages before the last"
    )


def planned(arguments: argparse.Namespace, recipe: Any) -> Any:
    """The stages of a recipe of rules alone (jq4.train.stages). Raises JQ4Error for what would make none."""
    from jq4.errors import JQ4Error
    from jq4.train import stages

    bits = tuple(arguments.stages)
    inputs = [rule for rule in recipe.rules if rule.input_activations is not None]
    if arguments.weights_first and not inputs:
        raise JQ4Error("--weights-first: the recipe rounds no inputs, so that there is nothing to put off")
    if arguments.weights_first and any(rule.has_fixed_step for rule in inputs):
        raise JQ4Error(
            "--weights-first: the recipe's inputs have steps of their own (dynamic: false), which a stage without them "
            "would lose; round inputs by the token (dynamic: true), or leave it out"
        )
    found = stages(recipe, arguments.steps, bits, weights_first=arguments.weights_first)
    if bits and stages(recipe, arguments.steps) == stages(recipe, arguments.steps, bits):
        raise JQ4Error(f"--stages {' '.join(map(str, bits))}: the recipe has no integers of fewer bits")
    return found


def entering(stage: Any, before: Any) -> Callable[[Any], Any]:
    """(params, quantizers) by the recipe `before` -> those of a stage: the same weights and ranges, its levels."""

    def enter(pair: Any) -> Any:
        from jq4.train import quantizers

        params, learned = pair
        return pair if stage.recipe == before else (params, quantizers(params, stage.recipe, start=learned))

    return enter
