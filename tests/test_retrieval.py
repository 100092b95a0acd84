"""What results of a search can be asked."""

import pytest
import torch

from memlayer import SearchResult, ShapeError


def found(*ids: list[int]) -> SearchResult:
    tensor = torch.tensor([ids])
    return SearchResult(scores=torch.where(tensor < 0, -torch.inf, 0.0), ids=tensor)


def test_recall_is_the_part_of_the_exact_ids_that_was_found_in_any_order():
    exact = found([4, 3, 2, 1], [10, 11, 12, 13])
    assert exact.recall(exact) == 1
    assert found([1, 2, 3, 4], [13, 12, 11, 10]).recall(exact) == 1
    assert found([4, 3, 9, 8], [10, 11, 12, 0]).recall(exact) == 5 / 8
    assert found([5, 6, 7, 8], [4, 3, 2, 1]).recall(exact) == 0


def test_recall_asks_only_for_what_there_was_to_find():
    exact = found([4, -1, -1], [5, 6, -1])
    assert found([4, -1, -1], [6, -1, -1]).recall(exact) == 2 / 3
    assert found([-1, -1, -1], [-1, -1, -1]).recall(exact) == 0
    nothing = found([-1, -1, -1], [-1, -1, -1])
    assert nothing.recall(nothing) == 1


def test_recall_of_no_queries_is_one():
    none = SearchResult(scores=torch.empty(2, 0, 3), ids=torch.empty(2, 0, 3, dtype=torch.int64))
    assert none.recall(none) == 1


def test_recall_of_results_of_other_shapes_is_refused():
    with pytest.raises(ShapeError, match=r"got ids of shapes \(1, 1, 2\) and \(1, 1, 3\)"):
        found([1, 2]).recall(found([1, 2, 3]))
