"""What `jq4 train qlora` trains: adapters of a model's packed weights, and nothing else.

It starts from a pair: the packed params, and the adapters before the first step. Those that are fitted to what packing
lost are kept with the packed leaves, and fitted once, however often the run is stopped.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jq4.cli.training.task import Phase, Task

PEFT = "peft"  # the folder beside the weights


def open_task(arguments: argparse.Namespace) -> Task:
    """Opens model and text, and makes the task of them."""
    from jq4.cli import _folders, _models
    from jq4.cli.quantize import read_recipe
    from jq4.cli.training import losses, options, text
    from jq4.cli.training.qlora import RECIPE
    from jq4.cli.training.rounded import started
    from jq4.errors import JQ4Error
    from jq4.qarray import holds_qarrays
    from jq4.train.adapters.lora import check_size

    options.check(arguments)
    check_size(arguments.rank, arguments.alpha)
    if not 0 <= arguments.dropout < 1:
        raise JQ4Error(f"--dropout is {arguments.dropout}, wanted a share of at least 0 and below 1")
    _folders.check_destination(Path(arguments.model), Path(arguments.out))
    model = _models.open_model(arguments.model)
    if model.adapters is not None:
        raise JQ4Error(f"{arguments.model}: has adapters already: merge them first, with jq4 merge")
    dense = not holds_qarrays(model.params)
    if not dense and (arguments.recipe is not None or arguments.init != "zero"):
        raise JQ4Error(
            f"{arguments.model}: is packed already: --recipe and --init residual or loftq want the dense model"
        )
    recipe = read_recipe(arguments.recipe or RECIPE) if dense else kept_recipe(arguments.model)
    check_loftq(arguments, recipe)
    check_targets(arguments, model.params)
    say_how_cut(arguments)
    arguments.start, arguments.dtype = None, options.dtype_of(arguments, model)
    forward = adapted_forward(model, arguments)
    loss = losses.next_token(forward)
    if arguments.dropout:
        loss = dropping(loss, arguments.dropout)

    def start(folder: Path, rows: Any) -> tuple[Any, Any]:
        if not dense:
            return model.params, drawn(model.params, arguments)
        if arguments.init == "loftq":
            return fitted_together(arguments, recipe, model, folder, rows)
        packed = started(arguments, recipe, model, folder, rows)
        residual = arguments.init == "residual"
        return packed, fitted(packed, model.params, arguments, folder) if residual else drawn(packed, arguments)

    def served(adapters: Any, begun: tuple[Any, Any]) -> Any:
        return dataclasses.replace(model, params=begun[0], adapters=adapters)

    return Task(
        model=model,
        reference=None,
        text=text.read(model, arguments),
        recipe=recipe,
        given={"model": _models.origin(Path(arguments.model))},
        phases=(
            Phase(
                arguments.steps,
                lambda adapters, packed, part: loss((packed, adapters), None, part),
                lambda adapters, packed, tokens: forward((packed, adapters), tokens),
            ),
        ),
        start=start,
        fixed=lambda begun: begun[0],
        begin=lambda begun: begun[1],
        served=served,
        before=lambda begun: served(begun[1], begun),
        judged_by="nll",
        batch_size=arguments.batch_size,
        beside=write_peft,
    )


def write_peft(out: Path, model: Any) -> dict[str, str]:
    """OUT/peft: the adapters as PEFT opens them."""
    from models.adapted import ADAPTERS
    from models.peft import save_peft

    save_peft(out / PEFT, model.config, model.adapters)
    return {"adapters": str(out / ADAPTERS), "peft": str(out / PEFT)}


def kept_recipe(path: str) -> Any:
    """The recipe that a packed folder of jq4's own tells; None for others'."""
    from jq4.cli import drift

    return drift.recipe_of(path)


def adapted_forward(model: Any, arguments: argparse.Namespace) -> Callable[[Any, Any], Any]:
    """(params, adapters), tokens -> logits."""
    import jax.numpy as jnp

    from jq4.train import with_lora
    from models.decoder import Decoder
    from models.layer_runs import runs_of

    decoder = Decoder(model.config, dtype=jnp.dtype(arguments.dtype), remat=arguments.remat, runs=runs_of(model.params))
    return with_lora(lambda params, tokens: decoder.apply({"params": params}, tokens), strict=True)


def dropping(loss: Any, rate: float) -> Any:
    """The loss with a share of the adapters' inputs dropped, of each row by its own key (experts': by the first)."""
    import jax

    def dropped(pair: Any, fixed: Any, part: Any) -> Any:
        params, adapters = pair
        return loss((params, adapters.with_dropout(rate, jax.random.wrap_key_data(part["key"]))), fixed, part)

    return dropped


def drawn(packed: Any, arguments: argparse.Namespace, **start: Any) -> Any:
    """Adapters that begin at nothing, or as `start` tells jq4.lora."""
    import jax

    from jq4.train import lora

    key = jax.random.key(arguments.seed)
    return lora(packed, arguments.rank, arguments.targets, alpha=arguments.alpha, key=key, **start)


def fitted(packed: Any, dense: Any, arguments: argparse.Namespace, folder: Path) -> Any:
    """Adapters that begin at what packing lost; made beside the packed leaves in `folder` unless they are there."""
    from models.adapted import adapters_of, save_adapters

    if (kept := adapters_of(folder)) is not None:
        return kept
    made = drawn(packed, arguments, init="residual", reference=dense)
    save_adapters(folder, made)
    return made


def check_targets(arguments: argparse.Namespace, params: Any) -> None:
    """Raises JQ4Error, before anything is packed, for leaves that are not there or too small for the rank."""
    import jax

    from jq4.train import lora

    jax.eval_shape(lambda params: lora(params, arguments.rank, arguments.targets), params)


def check_loftq(arguments: argparse.Namespace, recipe: Any) -> None:
    """Raises JQ4Error for what LoftQ cannot begin with; fills in how many turns it takes."""
    from jq4.errors import JQ4Error
    from jq4.train.adapters.loftq import TURNS

    if arguments.init != "loftq":
        if arguments.loftq_iter is not None:
            raise JQ4Error("--loftq-iter is of --init loftq; give that too, or leave it out")
        return
    arguments.loftq_iter = TURNS if arguments.loftq_iter is None else arguments.loftq_iter
    if arguments.loftq_iter < 1:
        raise JQ4Error(f"--loftq-iter is {arguments.loftq_iter}, wanted 1 or more")
    if recipe.has_steps:
        names = ", ".join(step.step for step in (*recipe.before, *recipe.after))
        raise JQ4Error(f"--init loftq packs by rules alone, and the recipe has steps ({names}): take one without")


def fitted_together(arguments: argparse.Namespace, recipe: Any, model: Any, folder: Path, rows: Any) -> tuple[Any, Any]:
    """The packed leaves and the adapters that LoftQ fits to each other; made in `folder` unless they are there.

    Its adapters are what its codes left, so that those of a run that was killed between the two are fitted to that.
    """
    import jax

    import jq4
    from jq4.cli import _models
    from jq4.cli.training.text import spread
    from jq4.driver.calibration_rows import may_need_rows
    from jq4.statistics import COLLECTABLE
    from jq4.train import loftq
    from models.adapted import save_adapters

    if not _models.is_checkpoint(folder):
        stats = None
        if may_need_rows(recipe):
            chosen = spread(rows, arguments.calibration_rows)
            stats = _models.observe_inputs(model, chosen, arguments.batch_size, COLLECTABLE, "calibrating the start")
        packed, adapters = loftq(
            model.params,
            recipe,
            arguments.rank,
            arguments.targets,
            alpha=arguments.alpha,
            key=jax.random.key(arguments.seed),
            turns=arguments.loftq_iter,
            stats=stats,
        )
        jq4.save(folder, packed, recipe=recipe)
        save_adapters(folder, adapters)
    packed = jq4.restore(folder)
    return packed, fitted(packed, model.params, arguments, folder)


def say_how_cut(arguments: argparse.Namespace) -> None:
    """Says that no kernel multiplies where XLA cuts the packed weights' products over devices."""
    from jq4.cli import _terminal
    from jq4.cli.training.descent import devices_of

    devices = len(devices_of(arguments))
    if devices > 1:
        _terminal.say(
            f"over {devices} devices the packed weights are multiplied by XLA's own forms, not by kernels; "
            "--devices 1 has these, where there are some for the device"
        )
