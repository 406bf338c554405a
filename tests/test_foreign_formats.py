"""Oracle: the protocols Reader and Writer, held against every module that the package has."""

import importlib
import inspect
import pkgutil
import re
from types import ModuleType

import pytest

from jq4.checkpoint import foreign
from jq4.checkpoint.foreign.opening import READERS, Reader
from jq4.checkpoint.foreign.writing import WRITERS, Writer

PROTOCOLS = {Reader: READERS, Writer: WRITERS}
MODULES = [each.name for each in pkgutil.iter_modules(foreign.__path__) if not each.ispkg]


def module(name: str) -> ModuleType:
    return importlib.import_module(f"{foreign.__name__}.{name}")


def functions(protocol: type) -> dict[str, list[str]]:
    """Names of the protocol's functions and of their parameters."""
    held = {name: one for name, one in vars(protocol).items() if inspect.isfunction(one) and name[0] != "_"}
    return {name: list(inspect.signature(one).parameters)[1:] for name, one in held.items()}


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_is_listed_has_what_the_protocol_wants(protocol):
    listed = [module(name) for name in PROTOCOLS[protocol]]
    assert functions(protocol) and len({each.NAME for each in listed}) == len(listed)
    for each in listed:
        found = {name: list(inspect.signature(getattr(each, name)).parameters) for name in functions(protocol)}
        assert found == functions(protocol), each.__name__


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_what_has_it_is_listed(protocol):
    wanted = {"NAME", *functions(protocol)}
    assert sorted(name for name in MODULES if wanted <= vars(module(name)).keys()) == sorted(PROTOCOLS[protocol])


def test_the_list_of_files_is_the_folder():
    assert set(re.findall(r"(\w+)\.py", foreign.__doc__ or "")) == set(MODULES)
