"""What `jq4 train qat` and `distill` train: a dense model's params and their quantizers, from a calibrated start.

Masters are float32. What stays dense in the result (norms, embeddings) is used as it will be stored, in the dtype of
the model's file, with gradients straight through; what is rounded is used as its codes say. So the packed model that is
written is the one that was trained.
"""

import argparse
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jq4.cli.training.task import Task

Losses = Callable[[Any, Any], Any]  # (the rounded forward, the teacher's) -> loss
Sees = Callable[[Any], Any]  # what a loss sees of a function (params, tokens) -> logits: another function of the same


def open_task(
    arguments: argparse.Namespace, losses: Losses, sees: Sees = lambda function: function, asks: Any = None
) -> Task:
    """Opens model, teacher and text, and makes the task of them; `asks` is told of the teacher before the first step.

    Args:
      sees: of the rounded model and of the teacher.
      asks: (the teacher, its function, rows) -> what goes along with the rows, instead of a teacher in every step.
    """
    from jq4.cli import _folders, _models
    from jq4.cli.training import options, stages, text
    from jq4.cli.training.task import Phase
    from jq4.train.running.optimizer import rate_for

    options.check(arguments)
    teacher_path = getattr(arguments, "teacher", None)
    places = {"model": arguments.model, "teacher": teacher_path, "start": arguments.start}
    places = {name: Path(path) for name, path in places.items() if path is not None}
    for read in places.values():
        _folders.check_destination(read, Path(arguments.out))
    _folders.check_without_adapters(Path(arguments.out))
    recipe = recipe_of(arguments)
    plain = without_steps(recipe)
    if arguments.rate is None:
        arguments.rate = rate_for(plain, learned=starts_learned(arguments, recipe))
    planned = stages.planned(arguments, plain)
    model = dense_model(arguments.model)
    teacher = model if teacher_path is None else _teacher(teacher_path, model)
    rows = text.read(model, arguments)
    arguments.dtype = options.dtype_of(arguments, model)
    taught = teaching(teacher, arguments.dtype, sees)
    given = {name: _models.origin(path) for name, path in places.items()}
    needs_teacher = arguments.training == "distill" and asks is None

    def phase_of(stage: Any, before: Any) -> Phase:
        loss = losses(rounded_forward(model, stage.recipe, arguments.dtype, arguments.remat, sees), taught)
        plainly = rounded_forward(model, stage.recipe, arguments.dtype, arguments.remat)
        entering = stages.entering(stage, before)
        return Phase(stage.stop, loss, lambda pair, fixed, tokens: plainly(pair, tokens), entering)

    return Task(
        model=model,
        reference=teacher,
        text=rows,
        recipe=recipe,
        given=given,
        phases=tuple(
            phase_of(stage, before)
            for before, stage in zip((plain, *(each.recipe for each in planned)), planned, strict=False)
        ),
        start=lambda folder, rows: started(arguments, recipe, model, folder, rows),
        fixed=lambda packed: teacher.weights if needs_teacher else {},
        begin=lambda packed: begun(packed, model.params, recipe, at_codes=not arguments.stages),
        served=lambda trained, packed: served(model, trained, recipe),
        before=lambda packed: dataclasses.replace(model, params=packed),
        judged_by="kld_mean" if arguments.training == "distill" else "nll",
        batch_size=arguments.batch_size,
        along=dict if asks is None else lambda: asks(teacher, taught, rows.rows),
    )


def teaching(teacher: Any, dtype: str, sees: Sees) -> Callable[[Any, Any], Any]:
    """(the teacher's weights, tokens) -> what is seen of it; dense or packed, with adapters or without."""
    import jax.numpy as jnp

    from jq4.train import with_lora
    from models.decoder import Decoder
    from models.layer_runs import runs_of

    decoder = Decoder(teacher.config, dtype=jnp.dtype(dtype), runs=runs_of(teacher.params))
    return with_lora(sees(lambda params, tokens: decoder.apply({"params": params}, tokens)))


def recipe_of(arguments: argparse.Namespace) -> Any:
    """The rules that are trained for: of --recipe, of the start's manifest, or the default's."""
    from jq4.cli import drift, quantize
    from jq4.cli.training.options import DEFAULT_RECIPE

    if arguments.recipe is not None:
        recipe = quantize.read_recipe(arguments.recipe)
    else:
        recipe = None if arguments.start is None else drift.recipe_of(arguments.start)
        recipe = recipe or quantize.read_recipe(DEFAULT_RECIPE)
    made_by = None if arguments.start is None else drift.recipe_of(arguments.start)
    for each in filter(None, (recipe, made_by)):
        _check_begins_plainly(each)
    return recipe


def starts_learned(arguments: argparse.Namespace, recipe: Any) -> bool:
    """Whether training starts at codes that steps after the rules (of `best-*`, say) have learned."""
    from jq4.cli import drift

    made_by = recipe if arguments.start is None else drift.recipe_of(arguments.start)
    return made_by is not None and bool(made_by.after) and not arguments.stages


def _check_begins_plainly(recipe: Any) -> None:
    from jq4.errors import JQ4Error

    if recipe.before:
        names = ", ".join(step.step for step in recipe.before)
        raise JQ4Error(f"the recipe begins with {names}, which changes what training starts from: take one without")


def dense_model(path: str) -> Any:
    """The model of a folder whose weights are dense."""
    from jq4.cli import _models
    from jq4.errors import JQ4Error
    from jq4.paths import flatten_with_paths
    from jq4.qarray import is_qarray

    model = _models.open_model(path)
    packed = next((name for name, leaf in flatten_with_paths(model.params) if is_qarray(leaf)), None)
    if packed is not None:
        raise JQ4Error(f"{path}: {packed} is packed, wanted the dense model; the packed one may be the --start")
    check_bare(path, model)
    return model


def check_bare(path: str, model: Any) -> None:
    """Raises JQ4Error for a model whose adapters would be left out."""
    from jq4.errors import JQ4Error

    if model.adapters is not None:
        raise JQ4Error(f"{path}: has adapters, which would be left out: merge them first, with jq4 merge")


def _teacher(path: str, model: Any) -> Any:
    from jq4.cli import _models
    from jq4.errors import JQ4Error

    teacher = _models.open_model(path)
    if teacher.config.vocab_size != model.config.vocab_size:
        raise JQ4Error(
            f"{path}: a vocabulary of {teacher.config.vocab_size}, wanted {model.config.vocab_size}, the model's own"
        )
    return teacher


def rounded_forward(
    model: Any, recipe: Any, dtype: Any, remat: bool, sees: Sees = lambda function: function
) -> Callable[[Any, Any], Any]:
    """(params, quantizers), tokens -> logits, as the packed model will give them, or what else is seen of it."""
    import jax
    import jax.numpy as jnp

    from jq4.paths import leaf_path
    from jq4.straight_through import straight_through
    from jq4.train import fake_quantized
    from models.decoder import Decoder
    from models.layer_runs import runs_of

    decoder = Decoder(model.config, dtype=jnp.dtype(dtype), remat=remat, runs=runs_of(model.params))
    forward = fake_quantized(
        sees(lambda params, tokens: decoder.apply({"params": params}, tokens)), without_steps(recipe), strict=True
    )
    dtypes = {leaf_path(keys): leaf.dtype for keys, leaf in jax.tree_util.tree_leaves_with_path(model.params)}

    def as_stored(quantizers: Any, keys: Any, leaf: Any) -> Any:
        path = leaf_path(keys)
        if path in quantizers.by_path or dtypes[path] == leaf.dtype:
            return leaf
        return straight_through(leaf, leaf.astype(dtypes[path]).astype(leaf.dtype))

    def run(pair: Any, tokens: Any) -> Any:
        params, quantizers = pair
        params = jax.tree_util.tree_map_with_path(lambda keys, leaf: as_stored(quantizers, keys, leaf), params)
        return forward((params, quantizers), tokens)

    return run


def without_steps(recipe: Any) -> Any:
    """The recipe's rules alone."""
    return dataclasses.replace(recipe, before=(), after=())


def started(arguments: argparse.Namespace, recipe: Any, model: Any, folder: Path, rows: Any) -> Any:
    """The packed leaves that training starts from; made in `folder`, block by block, unless they are there or given."""
    import jq4
    from jq4.cli import _models, _terminal
    from jq4.cli.quantize import folder_of
    from jq4.cli.training.text import spread
    from jq4.driver import quantize_blocks
    from jq4.driver.calibration_rows import may_need_rows
    from jq4.errors import JQ4Error
    from models.chain import decoder_chain
    from models.folder_source import FolderSource

    if arguments.start is not None:
        return _start_of(arguments.start, model)
    if not _models.is_checkpoint(folder):
        folder_of(arguments.model)
        if _models.is_checkpoint(arguments.model):
            raise JQ4Error(f"{arguments.model}: wanted a Hugging Face folder to make a start of, or give a --start")
        chosen = spread(rows, arguments.calibration_rows)
        with _terminal.progress("calibrating the start") as step:
            quantize_blocks(
                decoder_chain(model.config),
                FolderSource(Path(arguments.model), model.config),
                recipe,
                chosen if may_need_rows(recipe) else None,
                destination=folder,
                seed=arguments.seed,
                batch_size=arguments.batch_size,
                progress=step,
            )
    return jq4.restore(folder)


def _start_of(path: str, model: Any) -> Any:
    """The params of a folder that jq4 quantize made of this model."""
    import jax

    from jq4.cli import _models
    from jq4.errors import JQ4Error
    from jq4.qarray import is_qarray

    opened = _models.open_model(path)
    check_bare(path, opened)
    start = opened.params
    shapes = [jax.tree.map(lambda leaf: leaf.shape, tree, is_leaf=is_qarray) for tree in (start, model.params)]
    if shapes[0] != shapes[1]:
        raise JQ4Error(f"{path}: has other leaves than the model: wanted what jq4 quantize made of this very model")
    return start


def begun(packed: Any, dense: Any, recipe: Any, at_codes: bool = True) -> Any:
    """(params, quantizers) of a start, float32, where every weight rounds to its code there.

    A training that comes down from more bits begins at the dense weights themselves, and has of the start the ranges
    alone.
    """
    import jax

    from jq4.train import begin_at, quantizers
    from jq4.train.begin import as_master

    if at_codes:
        return begin_at(dense, without_steps(recipe), packed)
    weights = jax.tree.map(as_master, dense)
    return weights, quantizers(weights, without_steps(recipe), start=packed)


def served(model: Any, trained: Any, recipe: Any) -> Any:
    """The packed model: codes of what was trained, the dense leaves in the dtypes that they came in."""
    import jax

    from jq4.paths import leaf_path
    from jq4.qarray import is_qarray
    from jq4.train import harden

    params, quantizers = trained
    dtypes = {leaf_path(keys): leaf.dtype for keys, leaf in jax.tree_util.tree_leaves_with_path(model.params)}

    def as_stored(keys: Any, leaf: Any) -> Any:
        return leaf if is_qarray(leaf) else leaf.astype(dtypes[leaf_path(keys)])

    packed = harden(params, quantizers, without_steps(recipe))
    return dataclasses.replace(model, params=jax.tree_util.tree_map_with_path(as_stored, packed, is_leaf=is_qarray))
