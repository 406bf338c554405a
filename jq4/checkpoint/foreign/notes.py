"""What a reader has to tell its user, said once for all the weights that it holds for."""

from collections.abc import Iterable


class Notes:
    """Collects remarks by text; as many modules as share one make one line."""

    def __init__(self) -> None:
        self._modules: dict[str, list[str]] = {}

    def add(self, module: str, *remarks: str) -> None:
        for remark in remarks:
            self._modules.setdefault(remark, []).append(module)

    def lines(self) -> list[str]:
        return [f"{_named(modules)}: {remark}" for remark, modules in self._modules.items()]


def _named(modules: Iterable[str]) -> str:
    first, *others = modules
    return f"{first} and {len(others)} more" if others else first
