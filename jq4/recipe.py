"""Recipe: an ordered list of rules that says how each leaf of a tree is quantized; the first rule that matches wins.

`before` and `after` the rules there may be steps that know the model, such as [{step: NAME, OPTION: VALUE}]: see
jq4.steps. The keys are compressed-tensors' where it has them, so that exporting a
`quantization_config` renames nothing:

    ignore: [lm_head]                   # leaves that stay dense, before any rule is asked
    rules:
      - targets: ["re:mlp.*down_proj"]  # patterns on the leaf's path, see jq4.targets
        num_bits: 8
        strategy: channel
      - targets: [Linear]
        num_bits: 4                     # 2 to 8; 16 leaves the leaf dense
        type: int                       # int, float (fp4, e2m1) or nf (nf4)
        symmetric: false
        strategy: group                 # group, channel (one scale per output channel) or tensor
        group_size: 64
        zero_point: float               # integer, or float for an offset; where symmetric is false
        method: hqq                     # see jq4.methods
        scale_dtype: bfloat16
"""

import dataclasses
import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jq4 import targets as patterns
from jq4.errors import JQ4Error
from jq4.rule import Rule
from jq4.steps import AFTER, BEFORE, Step

_DEEPEST, _MOST_VALUES = 64, 100_000  # levels of brackets; values in all


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How each leaf of a tree is quantized. Immutable and hashable; equal recipes give equal bytes.

    Attributes:
      rules: asked in order, the first that matches wins.
      ignore: patterns of leaves that stay dense whatever the rules say.
      name: the preset's, if it was made from one; of no consequence for equality.
      before, after: the steps around the rules, in order.
    """

    rules: tuple[Rule, ...]
    ignore: tuple[str, ...] = ()
    name: str | None = dataclasses.field(default=None, compare=False)
    before: tuple[Step, ...] = ()
    after: tuple[Step, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "ignore", patterns.as_patterns(self.ignore, "recipe", "ignore"))
        for rule in self.rules:
            if not isinstance(rule, Rule):
                raise JQ4Error(f"recipe: rules holds {rule!r}, wanted a jq4.Rule")
        if not self.rules:
            raise JQ4Error("recipe: rules is empty, wanted one rule or more")
        for when in (BEFORE, AFTER):
            object.__setattr__(self, when, tuple(getattr(self, when)))
            for step in getattr(self, when):
                if not isinstance(step, Step) or step.when != when:
                    raise JQ4Error(f"recipe: {when} holds {step!r}, wanted steps that run {when} the rules")

    @property
    def has_steps(self) -> bool:
        return bool(self.before or self.after)

    @classmethod
    def preset(cls, name: str, *, embeddings: bool = False, head: bool = False) -> "Recipe":
        """A recipe by name: METHOD-wBITSgGROUP[-asym], with `gc` per output channel, `gt` per tensor; nf4; fp4.

        Args:
          name: such as "rtn-w4g32", "hqq-w4g64-asym", "rtn-w8gc", "nf4", "nf4-g128".
          embeddings: quantize embedding tables as well.
          head: quantize the output head as well.

        Raises:
          JQ4Error: for a name that is no preset, or one whose method is not there (yet); it lists what is.
        """
        from jq4.presets import preset

        return preset(name, embeddings=embeddings, head=head)

    @classmethod
    def of(cls, value: "Recipe | Rule | str") -> "Recipe":
        """A recipe from a recipe, a single rule, or a preset's name."""
        if isinstance(value, str):
            return cls.preset(value)
        if not isinstance(value, Recipe | Rule):
            raise JQ4Error(f"recipe: found {_shortened(value)}, wanted a jq4.Recipe, a jq4.Rule or a preset's name")
        return cls((value,)) if isinstance(value, Rule) else value

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Reads a YAML or JSON file; a JQ4Error names the file, the key, what it holds and what is wanted."""
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
            if _depth(text) > _DEEPEST:
                raise yaml.YAMLError(f"nested in more than {_DEEPEST} levels")
            value = yaml.load(text, _Loader)  # JSON is YAML
            _check_size(value)
        except FileNotFoundError:
            raise JQ4Error(f"{path}: no such recipe file") from None
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            raise JQ4Error(f"{path}: not a readable YAML or JSON file: {error}") from error
        return cls.from_dict(value, str(path))

    @classmethod
    def from_dict(cls, value: Any, source: str = "recipe") -> "Recipe":
        """The recipe of `to_dict`'s dict; `source` is what errors call it."""
        if isinstance(value, list):
            value = {"rules": value}
        if not isinstance(value, Mapping) or not isinstance(value.get("rules"), list):
            raise JQ4Error(f"{source}: wanted a mapping with a list called 'rules', found {_shortened(value)}")
        unknown = set(value) - {"rules", "ignore", "name", BEFORE, AFTER}
        if unknown:
            first = sorted(unknown, key=str)[0]
            raise JQ4Error(f"{source}: unknown key {first!r}, wanted rules, ignore, before, after or name")
        rules = tuple(Rule.from_dict(rule, f"{source}: rules[{i}]") for i, rule in enumerate(value["rules"]))
        ignore = patterns.as_patterns(value.get("ignore", ()), source, "ignore")
        steps = {when: _steps_of(value.get(when, []), f"{source}: {when}") for when in (BEFORE, AFTER)}
        try:
            return cls(rules, ignore, value.get("name"), **steps)
        except JQ4Error as error:
            raise JQ4Error(f"{source}: {error}") from None

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, strings and numbers, ready for YAML and JSON; `from_dict` gives the same recipe back."""
        named = {} if self.name is None else {"name": self.name}
        ignored = {"ignore": list(self.ignore)} if self.ignore else {}
        steps = {when: [step.to_dict() for step in getattr(self, when)] for when in (BEFORE, AFTER)}
        given = {when: listed for when, listed in steps.items() if listed}
        return named | ignored | {"rules": [rule.to_dict() for rule in self.rules]} | given

    def save(self, path: str | Path) -> None:
        """Writes the recipe as JSON if the file is called *.json, as YAML otherwise."""
        path = Path(path)
        value = self.to_dict()
        as_json = path.suffix == ".json"
        path.write_text(
            json.dumps(value, indent=2) + "\n" if as_json else yaml.safe_dump(value, sort_keys=False), encoding="utf-8"
        )

    def ignores(self, path: str, role: str | None = None) -> bool:
        return any(patterns.matches(pattern, path, role) for pattern in self.ignore)

    def index_of_rule(self, path: str, role: str | None = None) -> int | None:
        """The index of the first rule that means the leaf at `path`, or None if none does or it is ignored."""
        if self.ignores(path, role):
            return None
        return next((i for i, rule in enumerate(self.rules) if rule.matches(path, role)), None)


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, which refuses a key that is given twice instead of taking the last one."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.YAMLError(f"the key {twice!r} is given twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def _steps_of(value: Any, source: str) -> tuple[Step, ...]:
    if not isinstance(value, list):
        raise JQ4Error(f"{source}: found {_shortened(value)}, wanted a list of steps")
    return tuple(Step.from_dict(step, f"{source}[{i}]") for i, step in enumerate(value))


def _depth(text: str) -> int:
    """How deep brackets stand in each other, those in strings counted too; PyYAML takes its time over depth."""
    steps = (1 if letter in "[{" else -1 for letter in text if letter in "[]{}")
    return max(itertools.accumulate(steps), default=0)


def _check_size(value: Any) -> None:
    """Refuses aliases that hold aliases: a few lines can stand for more than memory holds, or for themselves."""
    left, count = [value], 0
    while left:
        one, count = left.pop(), count + 1
        if count > _MOST_VALUES:
            raise yaml.YAMLError(f"its aliases stand for more than {_MOST_VALUES} values")
        left += [*one.keys(), *one.values()] if isinstance(one, dict) else one if isinstance(one, list | tuple) else ()


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
