"""The multiple-choice knapsack: of each item one option, so that all together cost at most a budget and lose the least.

    minimise   sum_i loss[i, c_i]     such that     sum_i cost[i, c_i] <= budget

Solved exactly by dynamic programming over the Pareto frontier (Nemhauser & Ullmann 1969): after each item what is kept
is every reachable (cost, loss) that no other beats in both. Costs are bytes, and layers have few shapes, so that sums
coincide and the frontier stays short. Should it outgrow LIMIT states, the best of each of LIMIT equal intervals of
cost is kept, and the answer may not be the best; `gap` then says by how much at most, from the Lagrangian lower bound

    max_lambda >= 0   sum_i min_c (loss[i, c] + lambda cost[i, c]) - lambda budget

(a concave function of lambda, whose maximum is at a slope between two options of one item).
"""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jq4.errors import JQ4Error

LIMIT = 200_000


@dataclasses.dataclass(frozen=True)
class Solution:
    """The option of each item; `gap` is 0 where the solution is proven to be the best."""

    options: tuple[int, ...]
    cost: int
    loss: float
    gap: float = 0.0


@dataclasses.dataclass(frozen=True)
class _Stage:
    """The frontier after an item: costs ascend, losses descend; which state and option each came from."""

    costs: np.ndarray  # i64[S]
    losses: np.ndarray  # f64[S]
    parents: np.ndarray  # i64[S]
    options: np.ndarray  # i64[S]


class Frontier:
    """All the best compromises of some items; `at(budget)` picks one."""

    def __init__(self, costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], limit: int = LIMIT) -> None:
        if not costs or any(len(a) != len(b) or not len(a) for a, b in zip(costs, losses, strict=True)):
            raise JQ4Error("knapsack: wanted one item or more, each with one option or more, of a cost and a loss each")
        self._items = [(np.asarray(a, np.int64), np.asarray(b, np.float64)) for a, b in zip(costs, losses, strict=True)]
        if not all(np.isfinite(of_item).all() for _, of_item in self._items):
            raise JQ4Error("knapsack: a loss is not finite, wanted finite ones")
        self._exact = True
        self._stages = [_Stage(*(np.zeros(1, kind) for kind in (np.int64, np.float64, np.int64, np.int64)))]
        for of_cost, of_loss in self._items:
            self._stages.append(self._extended(self._stages[-1], of_cost, of_loss, limit))

    def _extended(self, before: _Stage, costs: np.ndarray, losses: np.ndarray, limit: int) -> _Stage:
        all_costs = (before.costs[:, None] + costs).ravel()
        all_losses = (before.losses[:, None] + losses).ravel()
        order = np.lexsort((all_losses, all_costs))
        best_before = np.minimum.accumulate(np.concatenate([[np.inf], all_losses[order][:-1]]))
        kept = order[all_losses[order] < best_before]
        if len(kept) > limit:
            self._exact = False
            cuts = np.linspace(all_costs[kept[0]], all_costs[kept[-1]], limit)
            kept = kept[np.unique(np.searchsorted(all_costs[kept], cuts, side="right") - 1)]
        return _Stage(all_costs[kept], all_losses[kept], kept // len(costs), kept % len(costs))

    @property
    def points(self) -> list[tuple[int, float]]:
        """(cost, loss) of every best compromise, the cheapest first."""
        last = self._stages[-1]
        return [(int(cost), float(loss)) for cost, loss in zip(last.costs, last.losses, strict=True)]

    def at(self, budget: int) -> Solution:
        """The least loss that the budget buys.

        Raises:
          JQ4Error: for a budget that not even the cheapest options keep to.
        """
        last = self._stages[-1]
        state = int(np.searchsorted(last.costs, budget, side="right")) - 1
        if state < 0:
            raise JQ4Error(f"a budget of {budget} is less than the cheapest options together cost, {last.costs[0]}")
        cost, loss = int(last.costs[state]), float(last.losses[state])
        chosen = []
        for stage in reversed(self._stages[1:]):
            chosen.append(int(stage.options[state]))
            state = int(stage.parents[state])
        gap = 0.0 if self._exact else max(0.0, loss - lower_bound(self._items, budget))
        return Solution(tuple(reversed(chosen)), cost, loss, gap)


def lower_bound(items: Sequence[tuple[np.ndarray, np.ndarray]], budget: int) -> float:
    """What no choice within the budget can beat: the maximum of the Lagrangian dual, found by ternary search."""

    def dual(price: float) -> float:
        return float(sum(np.min(losses + price * costs) for costs, losses in items) - price * budget)

    low, high = 0.0, float(max(losses.max() - losses.min() for _, losses in items))  # for at least one unit of cost
    for _ in range(200):
        one, two = low + (high - low) / 3, high - (high - low) / 3
        low, high = (one, high) if dual(one) < dual(two) else (low, two)
    return max(dual(0.0), dual((low + high) / 2))
