"""Matching of objects to predictions at the least cost."""

from __future__ import annotations

import numpy as np


def assign(cost: np.ndarray) -> np.ndarray:
    """The column of each row in the one-to-one assignment of least total cost.

    Shortest augmenting paths with dual variables (Jonker and Volgenant 1987), n² · m steps.

    Args:
        cost: [n, m] finite, n ≤ m.

    Returns:
        [n] int64, distinct columns.

    Raises:
        ValueError: more rows than columns, or a cost that is not finite.
    """
    rows, columns = cost.shape
    if rows > columns:
        raise ValueError(f"cost: expected no more rows than columns, got {list(cost.shape)}")
    if not np.isfinite(cost).all():
        raise ValueError("cost: expected finite values")
    cost = cost.astype(np.float64)
    row_dual, column_dual = np.zeros(rows), np.zeros(columns)
    owner = np.full(columns, -1, np.int64)
    for start in range(rows):
        shortest = np.full(columns, np.inf)
        before = np.full(columns, -1, np.int64)
        done = np.zeros(columns, bool)
        reached, row, column = 0.0, start, -1
        visited = []
        while row >= 0:
            visited.append((row, column))
            length = reached + cost[row] - row_dual[row] - column_dual
            better = ~done & (length < shortest)
            shortest[better], before[better] = length[better], column
            column = int(np.where(done, np.inf, shortest).argmin())
            reached, done[column] = shortest[column], True
            row = owner[column]
        for row, entered in visited:
            gain = reached if entered < 0 else reached - shortest[entered]
            row_dual[row] += gain
            if entered >= 0:
                column_dual[entered] -= gain
        while column >= 0:
            entered = int(before[column])
            owner[column] = start if entered < 0 else owner[entered]
            column = entered
    found = np.empty(rows, np.int64)
    found[owner[owner >= 0]] = np.flatnonzero(owner >= 0)
    return found
