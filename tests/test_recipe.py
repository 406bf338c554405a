"""Recipes: which leaves patterns mean, what presets' names mean, round trips, and errors that name key and value."""

import dataclasses
import json

import pytest
import yaml

from jq4 import JQ4Error
from jq4.recipe import Recipe
from jq4.rule import Rule, describe_format
from jq4.targets import axis_by_name, matches

PATH = "params/layers/3/mlp/up_proj/kernel"


@pytest.mark.parametrize(
    ("pattern", "path", "meant"),
    [
        ("Linear", PATH, True),
        ("Linear", "layers/0/weight", True),
        ("Linear", "params/embed/embedding", False),
        ("Linear", "params/norm/scale", False),
        ("Embedding", "params/embed/embedding", True),
        ("Embedding", "embed_tokens/weight", True),
        ("Embedding", PATH, False),
        ("up_proj", PATH, True),
        ("mlp/up_proj", PATH, True),
        ("mlp/kernel", PATH, False),
        ("proj", PATH, False),
        (PATH, PATH, True),
        ("params/layers/*/mlp/*/kernel", PATH, True),
        ("params/*/kernel", PATH, False),
        ("params/**/kernel", PATH, True),
        ("**/up_proj/*", PATH, True),
        ("*/kernel", PATH, False),
        ("layers/?/mlp", PATH, False),
        ("params/layers/?/**", PATH, True),
        ("re:mlp.*(up|down)_proj", PATH, True),
        ("re:^layers", PATH, False),
        ("re:kernel$", PATH, True),
    ],
)
def test_patterns(pattern, path, meant):
    assert matches(pattern, path) is meant


@pytest.mark.parametrize(
    ("path", "axis"),
    [
        (PATH, -2),
        ("conv/kernel", -2),
        ("linear/w", -2),
        ("layers/0/weight", -1),
        ("embed/embedding", -1),
        ("wte_embed/weight", -1),
        ("mlp/up", None),
    ],
)
def test_axis_by_name(path, axis):
    assert axis_by_name(path) == axis


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("rtn-w4g32", {"method": "rtn", "format": "int4", "group_size": 32, "symmetric": True, "zero_point": None}),
        ("rtn-w4g32-asym", {"symmetric": False, "zero_point": "integer", "observer": "minmax"}),
        ("hqq-w4g64-asym", {"method": "hqq", "group_size": 64, "symmetric": False, "zero_point": "float"}),
        ("hqq-w3g128", {"format": "int3", "group_size": 128, "symmetric": True}),
        ("rtn-w8gc", {"format": "int8", "strategy": "channel", "group_size": None}),
        ("rtn-w2gt", {"format": "int2", "strategy": "tensor", "group_size": None}),
        ("nf4", {"format": "nf4", "method": "rtn", "group_size": 64}),
        ("hqq-nf4-g32", {"format": "nf4", "method": "hqq", "group_size": 32}),
        ("fp4", {"format": "fp4", "group_size": 32}),
    ],
)
def test_presets_mean_what_they_are_called(name, expected):
    recipe = Recipe.preset(name)
    (rule,) = recipe.rules
    assert {key: getattr(rule, key) for key in expected} == expected
    assert recipe.name == name and rule.targets == ("Linear",)


@pytest.mark.parametrize(
    "path",
    [
        "params/embed/embedding",
        "params/tok_embeddings/kernel",
        "params/final_norm/scale",
        "norm/weight",
        "layers/attention/layer_norm/kernel",
        "ln_f/weight",
        "params/lm_head/kernel",
        "lm_head/weight",
        "head/kernel",
        "params/output/kernel",
        "params/logits_dense/kernel",
    ],
)
def test_presets_leave_norms_embeddings_and_head_dense(path):
    assert Recipe.preset("rtn-w4g32").index_of_rule(path) is None


@pytest.mark.parametrize(
    "path", [PATH, "encoder/layer/0/attention/output/dense/kernel", "heads/0/kernel", "aln/weight", "plain/w"]
)
def test_presets_take_the_other_matrices(path):
    assert Recipe.preset("rtn-w4g32").index_of_rule(path) == 0


def test_presets_take_embeddings_and_head_when_asked():
    recipe = Recipe.preset("rtn-w4g32", embeddings=True, head=True)
    for path in ("params/embed/embedding", "params/lm_head/kernel", PATH):
        assert recipe.index_of_rule(path) == 0
    assert recipe.index_of_rule("params/norm/scale") is None


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "magic-w4g32",
            "preset 'magic-w4g32' wants the method 'magic', which jq4 does not have: wanted METHOD-.*rtn, hqq",
        ),
        ("rtn-w9g32", "preset 'rtn-w9g32': type int with num_bits 9, wanted one of int 2, int 3, int 4, int 5"),
        ("rtn-w4", "unknown preset 'rtn-w4': wanted METHOD-wBITSgGROUP"),
        ("rtn-w4g0", "preset 'rtn-w4g0': group_size is 0, wanted 1 or more"),
        ("rtn-w4g32-a5", "unknown preset 'rtn-w4g32-a5'"),
    ],
)
def test_a_preset_that_is_none_says_what_is(name, text):
    with pytest.raises(JQ4Error, match=text):
        Recipe.preset(name)


def test_the_first_rule_that_matches_wins():
    recipe = Recipe((Rule("down_proj", num_bits=8), Rule("Linear", ignore=("re:router",)), Rule("re:.")))
    assert recipe.index_of_rule("mlp/down_proj/kernel") == 0
    assert recipe.index_of_rule("mlp/up_proj/kernel") == 1
    assert recipe.index_of_rule("router/kernel") == 2
    assert dataclasses.replace(recipe, ignore="router").index_of_rule("router/kernel") is None


RECIPES = [
    Recipe.preset("rtn-w4g32"),
    Recipe.preset("hqq-w4g64-asym"),
    Recipe.preset("nf4", embeddings=True),
    Recipe(
        (
            Rule(("down_proj", "re:v_proj"), num_bits=8, strategy="channel", scale_dtype="float32"),
            Rule("Linear", group_size=64, method="hqq", options={"iters": 3, "starts": 2}, ignore="router"),
            Rule("Embedding", num_bits=3, group_size=32, observer="mse", options={"norm": 2.4}, axis=-1),
            Rule("re:.", num_bits=16),
        ),
        ignore=("lm_head",),
    ),
]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("suffix", ["yaml", "json"])
def test_round_trip_by_file(recipe, suffix, tmp_path):
    file = tmp_path / f"recipe.{suffix}"
    recipe.save(file)
    again = Recipe.load(file)
    assert again == recipe and hash(again) == hash(recipe) and again.name == recipe.name
    plain = json.loads(file.read_text()) if suffix == "json" else yaml.safe_load(file.read_text())
    assert plain == recipe.to_dict()


def test_the_documented_yaml_loads():
    from jq4 import recipe as module

    text = module.__doc__.split("renames nothing:\n\n")[1]
    recipe = Recipe.from_dict(yaml.safe_load(text))
    assert [describe_format(rule) for rule in recipe.rules] == ["int8 channel rtn", "int4 g64 hqq"]
    assert recipe.ignore == ("lm_head",) and recipe.rules[1].zero_point == "float"


def test_rules_differ_by_every_field():
    changes = {
        "targets": ("x",),
        "ignore": ("y",),
        "num_bits": 8,
        "symmetric": False,
        "group_size": 64,
        "method": "hqq",
        "observer": "mse",
        "scale_dtype": "float16",
        "axis": -1,
        "options": {"norm": 3.0},
    }
    rules = {Rule("Linear"), *(Rule(**({"targets": "Linear"} | {key: value})) for key, value in changes.items())}
    assert len(rules) == len(changes) + 1


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        ({"targets": ["Linear"], "bits": 4}, "unknown key 'bits', wanted one of targets, ignore, num_bits, type"),
        ({"num_bits": 4}, "no 'targets', wanted a list of patterns"),
        ({"targets": []}, "targets is empty"),
        ({"targets": 3}, "targets is 3, wanted a list of patterns"),
        ({"targets": ["re:("]}, r"targets has 're:\(', not a regular expression"),
        ({"targets": ["a"], "num_bits": "4"}, "num_bits is '4', wanted an integer"),
        ({"targets": ["a"], "num_bits": 9}, "type int with num_bits 9, wanted one of int 2"),
        ({"targets": ["a"], "type": "nf", "num_bits": 3}, "type nf with num_bits 3"),
        ({"targets": ["a"], "type": "e4m3"}, "type is 'e4m3', wanted one of int, float, nf"),
        ({"targets": ["a"], "symmetric": "no"}, "symmetric is 'no', wanted true or false"),
        ({"targets": ["a"], "strategy": "block"}, "strategy is 'block', wanted one of group, channel, tensor"),
        ({"targets": ["a"], "strategy": "group"}, "strategy is group without a group_size"),
        ({"targets": ["a"], "strategy": "tensor", "group_size": 32}, "group_size is 32 with strategy tensor"),
        ({"targets": ["a"], "group_size": -1}, "group_size is -1, wanted 1 or more"),
        ({"targets": ["a"], "zero_point": "float"}, "zero_point is float with symmetric true, wanted none"),
        ({"targets": ["a"], "method": "magic"}, "unknown method 'magic': wanted one of rtn, hqq"),
        ({"targets": ["a"], "observer": "kl"}, "observer is 'kl', wanted one of absmax, minmax, percentile, mse"),
        ({"targets": ["a"], "scale_dtype": "int8"}, "scale_dtype is 'int8', wanted one of bfloat16, float16, float32"),
        ({"targets": ["a"], "axis": 0}, "axis is 0, wanted a negative one"),
        ({"targets": ["a"], "options": {"iters": 3}}, "unknown option 'iters' of method rtn"),
        ({"targets": ["a"], "options": {"norm": "2"}}, "option norm is '2', wanted a number"),
        ({"targets": ["a"], "options": 3}, "options is 3, wanted a mapping"),
        ({"targets": ["a"], "options": [1, 2]}, r"options is \[1, 2\], wanted a mapping"),
        ({"targets": ["a"], "options": {"norm": float("nan")}}, "option norm is nan, wanted a number"),
        (
            {"targets": ["a"], "observer": "mse", "options": {"steps": 2.5}},
            "option steps is 2.5, wanted a whole number",
        ),
        ({"targets": ["a"], "method": "hqq", "options": {"iters": 1.5}}, "option iters is 1.5, wanted a whole number"),
        ({"targets": ["a"], "method": ["rtn"]}, r"unknown method \['rtn'\]: wanted one of rtn, hqq"),
        ({"targets": ["a"], "symmetric": False, "observer": "absmax"}, "observer 'absmax' is for symmetric"),
        ({"targets": ["a"], "type": "nf", "symmetric": False}, "format nf4 is a codebook"),
        ("Linear", "found 'Linear', wanted a mapping"),
    ],
)
def test_bad_rules_name_the_rule_the_key_and_what_is_wanted(rule, text):
    with pytest.raises(JQ4Error, match=text) as caught:
        Recipe.from_dict({"rules": [{"targets": ["Linear"]}, rule]}, "recipe.yaml")
    assert str(caught.value).startswith("recipe.yaml: rules[1]: ")


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("rules: [", "not a readable YAML or JSON file"),
        ("just words", "wanted a mapping with a list called 'rules', found 'just words'"),
        ("rules: []", "rules is empty"),
        ("[" * 5000, "not a readable YAML or JSON file"),
        ("rules: [{targets: [a], group_size: " + "9" * 5000 + "}]", "not a readable YAML or JSON file"),
        ("rules: [{targets: [a], num_bits: 4, num_bits: 8}]", "the key 'num_bits' is given twice"),
        ("rules: [{targets: [a]}]\nrule: 1", "unknown key 'rule', wanted rules, ignore, before, after or name"),
        ("ignore: [3]\nrules: [{targets: [a]}]", r"ignore is \[3\], wanted a list of patterns"),
    ],
)
def test_bad_files(content, text, tmp_path):
    file = tmp_path / "recipe.yaml"
    file.write_text(content)
    with pytest.raises(JQ4Error, match=text) as caught:
        Recipe.load(file)
    assert str(caught.value).startswith(str(file))


def test_a_missing_file(tmp_path):
    with pytest.raises(JQ4Error, match="no such recipe file"):
        Recipe.load(tmp_path / "none.yaml")
