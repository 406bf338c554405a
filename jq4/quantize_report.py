"""What became of each leaf when a tree was quantized: by which rule, to what, at how many bytes and what error."""

import dataclasses
from collections import Counter
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import Tracer

from jq4.qarray import QArray, is_qarray, leaf_nbytes
from jq4.recipe import Recipe
from jq4.rule import Rule

_PLANNED = "to be packed"
_PACKED = "packed"


@dataclasses.dataclass(frozen=True)
class LeafReport:
    """One leaf.

    Attributes:
      path, shape, dtype: of the dense leaf; shape and dtype are None for a leaf that is no array.
      status: "packed", or why it was not: "no rule", "ignored", "dense by rule", "packed already", ...
      rule_index, rule: the rule that matched, if one did.
      format, group_size, axis: of the packed leaf.
      dense_nbytes, nbytes: bytes held before and after (equal where nothing was packed).
      noise: f32[] on the device, see `sqnr_db`; None where it was not measured.
      findings: what the method found of each slice (jq4.methods.gptq_findings), on the device; None where it has none.
    """

    path: str
    shape: tuple[int, ...] | None = None
    dtype: str | None = None
    status: str = _PLANNED
    rule_index: int | None = None
    rule: Rule | None = None
    format: str | None = None
    group_size: int | None = None
    axis: int | None = None
    dense_nbytes: int = 0
    nbytes: int = 0
    noise: Any = dataclasses.field(default=None, repr=False, compare=False)
    findings: Any = dataclasses.field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, path: str, leaf: Any) -> "LeafReport":
        nbytes = leaf.nbytes if is_qarray(leaf) else leaf_nbytes(leaf) if _has_bytes(leaf.dtype) else 0
        return cls(path, tuple(leaf.shape), str(leaf.dtype), dense_nbytes=nbytes, nbytes=nbytes)

    @property
    def is_planned(self) -> bool:
        return self.status == _PLANNED

    @property
    def is_packed(self) -> bool:
        return self.status == _PACKED

    @property
    def sqnr_db(self) -> float | None:
        """10 log10(sum w**2 / sum (w - dequantized)**2) in decibels, fetched from the device when first asked for."""
        return None if self.noise is None else float(self.noise)

    @property
    def slices(self) -> int | None:
        """Matrices in the leaf that were quantized on their own (layers, experts), where the method tells them."""
        return None if self.findings is None else self.findings.starved.size

    @property
    def starved(self) -> int:
        """How many of the slices saw too few rows for the method and went to its fallback."""
        return int(self._found.starved.sum()) if self._found else 0

    @property
    def note(self) -> str:
        """What the method has to say of the leaf's calibration; empty where all was as it should be."""
        return self._found.note(self.rule.method_options) if self._found and self.rule else ""

    @property
    def is_short_of_calibration(self) -> bool:
        """Whether the statistics did not suffice somewhere: starved slices, or damping that had to be raised."""
        return bool(self._found and self.rule and self._found.is_short(self.rule.method_options))

    @property
    def _found(self) -> Any:
        """The findings, where they have values (those of a trace have none)."""
        return None if isinstance(jax.tree.leaves(self.findings or [0])[0], Tracer) else self.findings

    def with_status(self, status: str) -> "LeafReport":
        return dataclasses.replace(self, status=status)

    def with_rule(self, index: int, rule: Rule) -> "LeafReport":
        return dataclasses.replace(self, rule_index=index, rule=rule)

    def planned(self, axis: int) -> "LeafReport":
        assert self.rule is not None and self.shape is not None
        group_size = min(self.rule.group_size or self.shape[axis], self.shape[axis])
        return dataclasses.replace(self, axis=axis, format=self.rule.format, group_size=group_size)

    def packed_as(self, q: QArray, noise: Any, findings: Any = None) -> "LeafReport":
        return dataclasses.replace(self, status=_PACKED, nbytes=q.nbytes, noise=noise, findings=findings)


@dataclasses.dataclass
class QuantizeReport:
    """What became of a tree; `jq4.quantize(..., report=QuantizeReport())` fills it.

    Attributes:
      recipe: the recipe that was followed.
      leaves: one LeafReport a leaf, in tree order.
      measure: whether `quantize` shall compute each packed leaf's SQNR.
    """

    recipe: Recipe | None = None
    leaves: list[LeafReport] = dataclasses.field(default_factory=list)
    measure: bool = True

    @property
    def packed(self) -> list[LeafReport]:
        return [leaf for leaf in self.leaves if leaf.is_packed or leaf.is_planned]

    @property
    def unmatched(self) -> list[LeafReport]:
        """The arrays that no rule quantized, each with its reason."""
        return [leaf for leaf in self.leaves if leaf.shape is not None and not (leaf.is_packed or leaf.is_planned)]

    @property
    def nbytes(self) -> int:
        return sum(leaf.nbytes for leaf in self.leaves)

    @property
    def dense_nbytes(self) -> int:
        return sum(leaf.dense_nbytes for leaf in self.leaves)

    @property
    def notes(self) -> dict[str, str]:
        """Path -> what its method has to say of its calibration, for leaves where it says something."""
        return {leaf.path: leaf.note for leaf in self.leaves if leaf.note}

    def idle_rules(self) -> list[tuple[int, Rule, str]]:
        """The rules that quantized no leaf: index, rule, and why."""
        if self.recipe is None:
            return []
        idle = []
        for index, rule in enumerate(self.recipe.rules):
            mine = [leaf for leaf in self.leaves if leaf.rule_index == index]
            if rule.is_dense and mine:
                continue
            if not any(leaf.is_packed or leaf.is_planned or leaf.status == "packed already" for leaf in mine):
                reasons = Counter(leaf.status for leaf in mine)
                told = "; ".join(f"{count} of {len(mine)}: {reason}" for reason, count in reasons.most_common())
                idle.append((index, rule, told or "it matched none"))
        return idle


def _has_bytes(dtype: Any) -> bool:
    return not jnp.issubdtype(dtype, jax.dtypes.extended)  # a PRNG key's bytes are its own affair
