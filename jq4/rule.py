"""Rule: one line of a recipe, the leaves it means and what becomes of them. Keys as compressed-tensors spells them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jq4 import targets as patterns
from jq4.activations import Activations
from jq4.errors import JQ4Error
from jq4.formats import get_format
from jq4.input_rotation import HADAMARD
from jq4.methods import get_method
from jq4.rounding import OBSERVERS, SCALE_DTYPES, Encoding, check_encoding

DENSE_BITS = 16
_OBSERVER_OPTIONS = ("percentile", "norm", "steps", "max_shrink")
_WHOLE_OPTIONS = (
    *("steps", "iters", "starts", "refinements", "min_rows"),
    *("multiplier", "ratios", "by_weights", "finalists", "columns"),
)
_FORMATS = {("int", bits): f"int{bits}" for bits in range(2, 9)} | {("float", 4): "fp4", ("nf", 4): "nf4"}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Which leaves, and how they are quantized.

    Attributes:
      targets: patterns on the leaf's path (jq4.targets); any of them.
      ignore: patterns of leaves that this rule leaves to those after it.
      num_bits: 2 to 8; 16 leaves the leaf dense.
      type: "int", "float" (4 bits: fp4, e2m1) or "nf" (4 bits: nf4).
      symmetric: no zero points.
      strategy: "group", "channel" or "tensor"; by default "group" where there is a group_size and else "channel".
      group_size: weights along the contraction axis that share a scale; for strategy "group" alone.
      zero_point: "integer" or "float" where symmetric is false; by default what the method is best at.
      method: a key of jq4.methods.METHODS.
      observer: how the range is found, one of jq4.rounding.OBSERVERS; by default what the method is best at, or
        "absmax" and, asymmetric, "minmax".
      scale_dtype: dtype of scales and offsets.
      double_quant: pack the scales themselves to 8 bits (jq4.double_quant), from float32 whatever scale_dtype says.
      input_activations: what products round their inputs to, as a mapping (jq4.activations); by default nothing.
      input_rotation: "hadamard" where products rotate their inputs as they come (jq4.input_rotation); by default no.
      axis: the contraction axis, negative; by default what the function (`axes`, `stats`) or the leaf's name says.
      options: the method's and the observer's own, as a mapping; kept as sorted pairs, so that rules can be hashed.
    """

    targets: tuple[str, ...]
    ignore: tuple[str, ...] = ()
    num_bits: int = 4
    type: str = "int"
    symmetric: bool = True
    strategy: str | None = None
    group_size: int | None = None
    zero_point: str | None = None
    method: str = "rtn"
    observer: str | None = None
    scale_dtype: str = "bfloat16"
    double_quant: bool = False
    axis: int | None = None
    input_activations: Activations | None = None
    input_rotation: str | None = None
    options: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        self._set("targets", patterns.as_patterns(self.targets, "rule", "targets"))
        self._set("ignore", patterns.as_patterns(self.ignore, "rule", "ignore"))
        self._set("input_activations", Activations.of(self.input_activations))
        if not self.targets:
            raise JQ4Error("rule: targets is empty, wanted one pattern or more")
        self._check_types()
        self._check_numbers()
        self._fill_in()
        if not self.is_dense:
            check_encoding(self.encoding(-2), ndim=2)

    @property
    def is_dense(self) -> bool:
        """Whether the rule says that its leaves stay as they are."""
        return self.num_bits == DENSE_BITS

    @property
    def has_fixed_step(self) -> bool:
        """Whether products round their inputs to steps that calibration finds."""
        return self.input_activations is not None and not self.input_activations.dynamic

    @property
    def format(self) -> str:
        """The number format, a key of jq4.formats.FORMATS."""
        return _FORMATS[self.type, self.num_bits]

    @property
    def method_options(self) -> dict[str, Any]:
        return {key: value for key, value in self.options if key in get_method(self.method).options}

    def matches(self, path: str, role: str | None = None) -> bool:
        return any(patterns.matches(p, path, role) for p in self.targets) and not any(
            patterns.matches(p, path, role) for p in self.ignore
        )

    def encoding(self, axis: int) -> Encoding:
        """How the codes of a weight with this contraction axis are made."""
        return Encoding(
            format=self.format,
            axis=axis,
            group_size=self.group_size,
            per_tensor=self.strategy == "tensor",
            symmetric=self.symmetric,
            zero_point=self.zero_point or "integer",
            observer=str(self.observer),
            scale_dtype="float32" if self.double_quant else self.scale_dtype,
            **{key: value for key, value in self.options if key not in self.method_options},
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers; what is None or empty is left out."""
        value = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.input_activations is not None:
            value["input_activations"] = dataclasses.asdict(self.input_activations)
        value |= {"targets": list(self.targets), "ignore": list(self.ignore), "options": dict(self.options)}
        if not self.double_quant:
            del value["double_quant"]
        return {key: item for key, item in value.items() if item is not None and item not in ([], {})}

    @classmethod
    def from_dict(cls, value: Any, source: str = "rule") -> "Rule":
        """The rule of `to_dict`'s dict; a JQ4Error names the key, what it holds and what is wanted."""
        if not isinstance(value, Mapping):
            raise JQ4Error(f"{source}: found {value!r}, wanted a mapping with at least 'targets'")
        known = [field.name for field in dataclasses.fields(cls)]
        for key in value:
            if key not in known:
                raise JQ4Error(f"{source}: unknown key {key!r}, wanted one of {', '.join(known)}")
        if "targets" not in value:
            raise JQ4Error(f"{source}: no 'targets', wanted a list of patterns such as [Linear]")
        try:
            return cls(**value)
        except JQ4Error as error:
            raise JQ4Error(f"{source}: {str(error).removeprefix('rule: ')}") from None

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)

    def _check_types(self) -> None:
        optional = (int, type(None))
        wanted = {"num_bits": int, "symmetric": bool, "double_quant": bool, "group_size": optional, "axis": optional}
        for name, kinds in wanted.items():
            value = getattr(self, name)
            if not isinstance(value, kinds) or (kinds is not bool and isinstance(value, bool)):
                raise JQ4Error(
                    f"rule: {name} is {value!r}, wanted {'true or false' if kinds is bool else 'an integer'}"
                )
        for name, choices in (
            ("type", ("int", "float", "nf")),
            ("strategy", ("group", "channel", "tensor", None)),
            ("zero_point", ("integer", "float", None)),
            ("observer", (*OBSERVERS, None)),
            ("scale_dtype", SCALE_DTYPES),
            ("input_rotation", (HADAMARD, None)),
        ):
            if getattr(self, name) not in choices:
                listed = ", ".join(choice for choice in choices if choice)
                raise JQ4Error(f"rule: {name} is {getattr(self, name)!r}, wanted one of {listed}")

    def _check_numbers(self) -> None:
        if not self.is_dense and (self.type, self.num_bits) not in _FORMATS:
            listed = ", ".join(f"{kind} {bits}" for kind, bits in _FORMATS)
            raise JQ4Error(f"rule: type {self.type} with num_bits {self.num_bits}, wanted one of {listed} (16: dense)")
        if self.is_dense and self.input_activations is not None:
            raise JQ4Error(
                f"rule: input_activations with num_bits {DENSE_BITS}, which leaves the leaf to its own product: wanted "
                "num_bits 8 or less, or no input_activations"
            )
        if self.input_rotation and (self.is_dense or self.has_fixed_step):
            reason = f"num_bits {DENSE_BITS}" if self.is_dense else "fixed steps of inputs, which were not seen rotated"
            raise JQ4Error(f"rule: input_rotation with {reason}: wanted none")
        if self.axis is not None and self.axis >= 0:
            raise JQ4Error(
                f"rule: axis is {self.axis}, wanted a negative one, so that stacked leaves keep their meaning"
            )
        if self.strategy in ("channel", "tensor") and self.group_size is not None:
            raise JQ4Error(f"rule: group_size is {self.group_size} with strategy {self.strategy}, wanted none")
        if self.strategy == "tensor" and self.double_quant:
            raise JQ4Error(
                "rule: double_quant with strategy tensor, whose one scale is not worth packing: leave it out"
            )
        if self.strategy == "group" and self.group_size is None:
            raise JQ4Error("rule: strategy is group without a group_size, wanted one such as 32, 64 or 128")
        if self.group_size is not None and self.group_size < 1:
            raise JQ4Error(f"rule: group_size is {self.group_size}, wanted 1 or more (channel: leave it out)")

    def _fill_in(self) -> None:
        method = get_method(self.method)
        self._set("strategy", self.strategy or ("channel" if self.group_size is None else "group"))
        self._set("observer", self.observer or method.observer or ("absmax" if self.symmetric else "minmax"))
        if self.symmetric and self.zero_point is not None:
            raise JQ4Error(f"rule: zero_point is {self.zero_point} with symmetric true, wanted none")
        if not self.symmetric:
            self._set("zero_point", self.zero_point or method.asymmetric_zero_point)
        try:
            options = dict(self.options)
        except (TypeError, ValueError):
            raise JQ4Error(f"rule: options is {self.options!r}, wanted a mapping") from None
        known = (*_OBSERVER_OPTIONS, *method.options)
        for key, value in options.items():
            if key not in known:
                raise JQ4Error(
                    f"rule: unknown option {key!r} of method {self.method}, wanted one of {', '.join(known)}"
                )
            if words := dict(method.words).get(key):
                if value not in words:
                    raise JQ4Error(f"rule: option {key} is {value!r}, wanted one of {', '.join(words)}")
                continue
            kinds = int if key in _WHOLE_OPTIONS else int | float
            if isinstance(value, bool) or not isinstance(value, kinds) or value != value:  # the last is true of NaN
                wanted = "a whole number" if key in _WHOLE_OPTIONS else "a number"
                raise JQ4Error(f"rule: option {key} is {value!r}, wanted {wanted}")
        self._set("options", tuple(sorted(options.items())))


def describe_format(rule: Rule) -> str:
    """A few words for reports: "int4 g32 rtn", "nf4 channel rtn"."""
    groups = f"g{rule.group_size}" if rule.strategy == "group" else str(rule.strategy)
    inputs = f" a:{rule.input_activations.name}" if rule.input_activations else ""
    inputs += f" x:{rule.input_rotation}" if rule.input_rotation else ""
    double = " dq" if rule.double_quant else ""
    return "dense" if rule.is_dense else f"{get_format(rule.format).name} {groups}{double} {rule.method}{inputs}"
