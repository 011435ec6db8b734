"""Large problems are reduced to the items whose width is in doubt, with a bound on what that can lose."""

import numpy as np

CORE_ITEMS = 100


def reduce_to_core(costs: np.ndarray, sizes: np.ndarray, allowed: np.ndarray, budget: int) -> tuple[np.ndarray, float]:
    """Which widths remain to be decided in a large problem, and a lower bound on any plan's cost.

    At the Lagrangian price of size every item has a cheapest width. Only CORE_ITEMS items, those whose second choice
    is closest, are left open to spend the budget exactly; the bound proves how little that can lose.
    """
    costs = np.where(allowed, costs, np.inf)
    price = _price_of_size(costs, sizes, budget)
    priced = costs + price * sizes
    best_two = np.partition(priced, 1, axis=1)[:, :2]
    open_items = np.argsort(best_two[:, 1] - best_two[:, 0], kind="stable")[:CORE_ITEMS]
    core = priced == best_two[:, :1]
    core[open_items] = allowed[open_items]
    return core, float(best_two[:, 0].sum() - price * budget)


def _price_of_size(costs: np.ndarray, sizes: np.ndarray, budget: int) -> float:
    """The lowest multiplier of size at which every item's cheapest width together fit the budget."""
    rows = np.arange(len(costs))

    def used(price: float) -> float:
        return sizes[rows, (costs + price * sizes).argmin(axis=1)].sum()

    if used(0.0) <= budget:
        return 0.0
    low, high = 0.0, 1e-30
    while used(high) > budget:
        low, high = high, high * 4
    for _ in range(100):  # bisection down to the last bit of a float64
        middle = (low + high) / 2
        low, high = (middle, high) if used(middle) > budget else (low, middle)
    return high
