"""Where the weights of a tree lie on devices, as `restore`, `quantized` and the models are told it.

`shardings` is None, one Sharding for all, a callable (path, shape) -> Sharding or None, or a tree of these (a prefix of
the weights' own tree: an inner node speaks for all below it). What is said of a packed weight is said of the dense one;
`jq4.partition` and `jq4.checkpoint.placement` turn it into shardings of its parts.
"""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec, Sharding

from jq4.errors import JQ4Error
from jq4.paths import find_path, flatten_with_paths, leaf_path
from jq4.qarray import NEUTRAL, QArray, is_qarray
from pallas_kernels.int4_matmul.spec import TPU

Shardings = Sharding | Callable[[str, tuple[int, ...]], Sharding | None] | Any


def chooser(shardings: Shardings, error: type[JQ4Error] = JQ4Error) -> Callable[[str, tuple[int, ...]], Any]:
    """A function (path, shape) -> Sharding, QArray of shardings, or None.

    Raises:
      error: something in the tree, or what a callable returns, is no Sharding.
    """
    if shardings is None or isinstance(shardings, Sharding):
        return lambda path, shape: shardings
    if is_chooser(shardings):
        return lambda path, shape: _checked(path, shardings(path, shape), error)
    known = {path: _checked(path, value, error) for path, value in _entries(shardings)}

    def choose(path: str, shape: tuple[int, ...]) -> Any:
        return next((known[name] for name in _above(path) if name in known), None)

    return choose


def is_chooser(shardings: Shardings) -> bool:
    """Whether it is a callable (path, shape) -> Sharding: a module whose leaves are shardings can be called as well."""
    plain = isinstance(shardings, functools.partial) or jax.tree_util.all_leaves([shardings])
    return callable(shardings) and plain


def check_used(shardings: Shardings, paths: Iterable[str], of_what: str, error: type[JQ4Error] = JQ4Error) -> None:
    """Raises `error` for an entry of a tree of shardings that stands above none of these leaves of `of_what`."""
    if shardings is None or isinstance(shardings, Sharding) or is_chooser(shardings):
        return
    paths = list(filter(None, paths))
    above = {name for path in paths for name in _above(path)}
    idle = [path for path, _ in _entries(shardings) if path not in above]
    if idle:
        raise error(
            f"shardings: {idle[0]!r} is no path of {of_what}, whose leaves are {', '.join(paths[:5])}"
            + (", ..." if len(paths) > 5 else "")
        )


def shardings_of(tree: Any) -> Callable[[str, tuple[int, ...]], NamedSharding | None]:
    """Where a tree's packed weights lie, as `quantized(f, shardings=...)` takes it; shapes with shardings will do."""
    known = {path: _of_dense(leaf) for path, leaf in flatten_with_paths(tree) if is_qarray(leaf)}
    return lambda path, shape: find_path(known, path)


def ways(mesh: Any, entry: Any) -> int:
    """Over how many devices an entry of a spec (None, a name, a tuple of names, or unconstrained) cuts its axis."""
    return 1 if entry is PartitionSpec.UNCONSTRAINED else math.prod(mesh.shape[name] for name in jax.tree.leaves(entry))


def _entries(tree: Any) -> list[tuple[str, Any]]:
    def is_entry(value: Any) -> bool:
        return isinstance(value, (Sharding, PartitionSpec)) or is_qarray(value)

    return [(leaf_path(keys), value) for keys, value in jax.tree_util.tree_leaves_with_path(tree, is_leaf=is_entry)]


def _above(path: str) -> list[str]:
    """The path and those of the nodes it lies under, the nearest first, down to the root ""."""
    names = path.split("/")
    return ["/".join(names[:length]) for length in range(len(names), -1, -1)]


def _checked(path: str, value: Any, error: type[JQ4Error]) -> Any:
    if value is None or isinstance(value, Sharding) or is_qarray(value):
        return value
    found = "a PartitionSpec" if isinstance(value, PartitionSpec) else type(value).__name__
    raise error(f"shardings: at {path!r} found {found}, wanted a Sharding (NamedSharding(mesh, spec)) or None")


def _of_dense(q: QArray) -> NamedSharding | None:
    """The sharding of the dense weight, from that of its codes."""
    sharding = getattr(q.codes, "sharding", None)
    if not isinstance(sharding, NamedSharding):
        return None
    spec = [*sharding.spec, *[None] * (q.ndim - len(sharding.spec))]
    if q.layout != NEUTRAL and q.axis != (-2 if q.layout == TPU else -1):
        spec[-2:] = spec[:-3:-1]
    return NamedSharding(sharding.mesh, PartitionSpec(*spec))
