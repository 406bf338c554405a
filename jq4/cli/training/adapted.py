"""What `jq4 train qlora` trains: adapters of a model's packed weights, and nothing else."""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jq4.cli.training.task import Task

PEFT = "peft"  # the folder beside the weights


def open_task(arguments: argparse.Namespace) -> Task:
    """Opens model and text, and makes the task of them."""
    from jq4.cli import _models
    from jq4.cli.quantize import check_destination, read_recipe
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
    check_destination(Path(arguments.model), Path(arguments.out))
    model = _models.open_model(arguments.model)
    if model.adapters is not None:
        raise JQ4Error(f"{arguments.model}: has adapters already: merge them first, with jq4.merge_lora")
    dense = not holds_qarrays(model.params)
    if not dense and (arguments.recipe is not None or arguments.init != "zero"):
        raise JQ4Error(f"{arguments.model}: is packed already: --recipe and --init residual want the dense model")
    recipe = read_recipe(arguments.recipe or RECIPE) if dense else kept_recipe(arguments.model)
    arguments.start = None
    loss = losses.next_token(adapted_forward(model, arguments))
    if arguments.dropout:
        loss = dropping(loss, arguments.dropout)
    return Task(
        model=model,
        reference=None,
        text=text.read(model, arguments),
        recipe=recipe,
        given={"model": _models.origin(Path(arguments.model))},
        loss=lambda adapters, packed, part: loss((packed, adapters), None, part),
        start=lambda folder, rows: started(arguments, recipe, model, folder, rows) if dense else model.params,
        fixed=lambda packed: packed,
        begin=lambda packed: begun(packed, model.params if dense else None, arguments),
        served=lambda adapters, packed: dataclasses.replace(model, params=packed, adapters=adapters),
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

    dtype = jnp.dtype(arguments.dtype or model.dtype)
    decoder = Decoder(model.config, dtype=dtype, remat=arguments.remat, runs=runs_of(model.params))
    return with_lora(lambda params, tokens: decoder.apply({"params": params}, tokens), strict=True)


def dropping(loss: Any, rate: float) -> Any:
    """The loss with a share of the adapters' inputs dropped, by the keys of the part's first row."""
    import jax

    def dropped(pair: Any, fixed: Any, part: Any) -> Any:
        params, adapters = pair
        return loss((params, adapters.with_dropout(rate, jax.random.wrap_key_data(part["key"][0]))), fixed, part)

    return dropped


def begun(packed: Any, dense: Any, arguments: argparse.Namespace) -> Any:
    """The adapters before the first step."""
    import jax

    from jq4.train import lora

    return lora(
        packed,
        arguments.rank,
        arguments.targets,
        alpha=arguments.alpha,
        key=jax.random.key(arguments.seed),
        init=arguments.init,
        reference=dense if arguments.init == "residual" else None,
    )
