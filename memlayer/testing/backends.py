"""What every retrieval backend must do, as tests that a plug-in author subclasses.

Results are compared with float64 products of plainly kept vectors. Where several vectors have
nearly the same score, any of them is right.
"""
# ruff: noqa: D102 - a test's name says what it tests

from __future__ import annotations

import math
import random
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from memlayer.errors import ConfigError, MemoryFormatError, ShapeError
from memlayer.plugins import default_plugins
from memlayer.retrieval import RetrievalBackend, SearchResult


class _PlainModel:
    """What a backend should hold: for each lane its vectors by id, in float64."""

    def __init__(self, lanes: int) -> None:
        self.vectors: list[dict[int, Tensor]] = [{} for _ in range(lanes)]
        self.next_ids = [0] * lanes

    def add(self, keys: Tensor, lanes: Sequence[int]) -> None:
        for row, lane in enumerate(lanes):
            for key in keys[row].detach().cpu().double():
                self.vectors[lane][self.next_ids[lane]] = key
                self.next_ids[lane] += 1

    def remove_oldest(self, n: int, lanes: Sequence[int]) -> None:
        for lane in lanes:
            for oldest in list(self.vectors[lane])[:n]:
                del self.vectors[lane][oldest]

    def clear(self, lanes: Sequence[int]) -> None:
        for lane in lanes:
            self.vectors[lane] = {}
            self.next_ids[lane] = 0

    def counts(self) -> list[int]:
        return [len(lane) for lane in self.vectors]


class BackendConformance:
    """Subclass it, set `backend`, and pytest runs everything below over that backend.

    class TestMine(BackendConformance):
        backend = "mine"
    """

    backend: ClassVar[str]
    """The registered name."""

    backend_options: ClassVar[Mapping[str, Any]] = {}
    """Options to construct it with."""

    device: ClassVar[str] = "cpu"
    """The device of keys, queries and results."""

    minimum_recall: ClassVar[float] = 1.0
    """The part of the true top k that a search must find. 1.0: the backend is exact."""

    score_tolerance: ClassVar[float] = 1e-5
    """How far a score may be from the float64 product: this times one plus its magnitude."""

    def make_backend(self, lanes: int, dim: int, **options: Any) -> RetrievalBackend:
        """Construct the backend, or skip the test where it is unavailable."""
        registry = default_plugins().backends
        reason = registry.unavailable_reason(self.backend)
        if reason is not None:
            pytest.skip(reason)
        kind: Any = registry.get(self.backend)
        backend = kind(
            lanes=lanes, dim=dim, device=self.device, **{**self.backend_options, **options}
        )
        assert isinstance(backend, RetrievalBackend)
        return backend

    @pytest.mark.parametrize(("n", "k"), [(1, 1), (7, 3), (64, 64), (100, 1), (300, 17)])
    def test_search_finds_what_exact_search_finds(self, n: int, k: int) -> None:
        backend, model = self._filled(lanes=3, dim=16, n=n)
        self._assert_agrees(backend, model, _random((3, 9, 16), seed=1), k)

    def test_long_lanes_are_searched_as_well_as_short_ones(self) -> None:
        backend, model = self.make_backend(lanes=2, dim=16), _PlainModel(2)
        keys = _clustered(lanes=2, n=3000, dim=16, seed=0).to(self.device)
        queries = _clustered(lanes=2, n=40, dim=16, seed=0, noise_seed=1)
        self._add(backend, model, keys[:, :2000])
        self._assert_agrees(backend, model, queries, 3)
        self._remove_oldest(backend, model, 1300)
        self._assert_agrees(backend, model, queries, 20)
        self._add(backend, model, keys[:, 2000:])
        self._assert_agrees(backend, model, queries, 20)

    def test_one_query_finds_what_it_finds_among_many(self) -> None:
        backend, model = self._filled(lanes=2, dim=8, n=50)
        queries = _random((2, 33, 8), seed=1)
        self._assert_agrees(backend, model, queries, 5)
        self._assert_agrees(backend, model, queries[:, 7:8], 5)

    def test_lanes_with_fewer_than_k_vectors_are_padded(self) -> None:
        backend, model = self._filled(lanes=2, dim=4, n=3)
        result = self._assert_agrees(backend, model, _random((2, 5, 4), seed=1), 10)
        assert (result.ids[..., 3:] == -1).all()
        assert (result.scores[..., 3:] == -math.inf).all()

    def test_an_empty_backend_gives_padding_only(self) -> None:
        backend = self.make_backend(lanes=2, dim=4)
        self._assert_agrees(backend, _PlainModel(2), _random((2, 5, 4), seed=1), 3)

    def test_lanes_of_unequal_length_do_not_mix(self) -> None:
        backend, model = self.make_backend(lanes=4, dim=8), _PlainModel(4)
        for lane, n in ((0, 30), (1, 2), (3, 70)):
            self._add(backend, model, _random((1, n, 8), seed=lane), [lane])
        self._assert_agrees(backend, model, _random((4, 6, 8), seed=9), 5)

    def test_lanes_are_taken_in_the_order_given(self) -> None:
        backend, model = self.make_backend(lanes=3, dim=8), _PlainModel(3)
        self._add(backend, model, _random((2, 5, 8), seed=0), [2, 0])
        self._assert_agrees(backend, model, _random((3, 4, 8), seed=1), 5)

    def test_equal_vectors_have_ids_of_their_own(self) -> None:
        backend, model = self.make_backend(lanes=2, dim=4), _PlainModel(2)
        self._add(backend, model, torch.ones(2, 6, 4))
        result = self._assert_agrees(backend, model, torch.ones(2, 2, 4), 6)
        assert result.ids.sort(-1).values.tolist() == [[list(range(6))] * 2] * 2

    def test_negative_scores_are_found_too(self) -> None:
        backend, model = self.make_backend(lanes=1, dim=4), _PlainModel(1)
        self._add(backend, model, -_random((1, 20, 4), seed=0).abs())
        self._remove_oldest(backend, model, 5)
        self._assert_agrees(backend, model, torch.ones(1, 3, 4), 4)

    def test_a_query_that_is_not_finite_finds_nothing(self) -> None:
        backend, model = self._filled(lanes=2, dim=4, n=10)
        queries = _random((2, 3, 4), seed=1)
        spoiled = queries.clone()
        spoiled[0, 1, 2], spoiled[1, 0, 0] = math.nan, math.inf
        result = backend.search(spoiled.to(self.device), 3)
        for lane, query in ((0, 1), (1, 0)):
            assert result.ids[lane, query].tolist() == [-1] * 3
            assert result.scores[lane, query].tolist() == [-math.inf] * 3
        expected = self._assert_agrees(backend, model, queries, 3)
        assert result.ids[0, 0].tolist() == expected.ids[0, 0].tolist()

    def test_ids_stay_what_they_were_after_eviction(self) -> None:
        backend, model = self._filled(lanes=2, dim=8, n=40)
        self._remove_oldest(backend, model, 13)
        self._assert_agrees(backend, model, _random((2, 6, 8), seed=1), 27)
        self._add(backend, model, _random((2, 13, 8), seed=2))
        self._assert_agrees(backend, model, _random((2, 6, 8), seed=1), 40)

    def test_every_vector_of_a_full_backend_finds_itself(self) -> None:
        backend, model = self.make_backend(lanes=2, dim=16), _PlainModel(2)
        for step in range(12):
            self._add(backend, model, _unit((2, 7, 16), seed=step))
            if step >= 4:
                self._remove_oldest(backend, model, 7)
                self._assert_each_finds_itself(backend, model)

    def test_clear_starts_the_numbers_of_that_lane_again(self) -> None:
        backend, model = self._filled(lanes=3, dim=8, n=10)
        backend.clear([1])
        model.clear([1])
        self._add(backend, model, _random((3, 4, 8), seed=1))
        result = self._assert_agrees(backend, model, _random((3, 2, 8), seed=2), 14)
        assert result.ids[1].max() == 3

    @pytest.mark.parametrize("seed", range(3))
    def test_random_steps_agree_with_a_plain_model(self, seed: int) -> None:
        lanes, dim = 3, 8
        backend, model = self.make_backend(lanes=lanes, dim=dim), _PlainModel(lanes)
        choose = random.Random(seed)
        for step in range(120):
            some = choose.sample(range(lanes), choose.randint(1, lanes))
            action = choose.choices(("add", "remove", "cycle", "clear"), (40, 25, 30, 5))[0]
            held = min(len(model.vectors[lane]) for lane in some)
            n = choose.choice((0, 1, 2, 5, 19))
            if action == "clear":
                backend.clear(some)
                model.clear(some)
            if action in ("remove", "cycle"):
                self._remove_oldest(backend, model, min(n, held), some)
            if action in ("add", "cycle"):
                self._add(backend, model, _unit((len(some), n, dim), seed=1000 * seed + step), some)
            queries = _random((lanes, 2, dim), seed=step)
            self._assert_agrees(backend, model, queries, choose.choice((1, 4, 30)))
            if step % 10 == 0:
                self._assert_each_finds_itself(backend, model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
    def test_every_float_dtype_is_searched_as_exactly_as_it_is(self, dtype: torch.dtype) -> None:
        backend, model = self.make_backend(lanes=2, dim=8), _PlainModel(2)
        self._add(backend, model, _random((2, 40, 8), seed=0).to(dtype))
        self._assert_agrees(backend, model, _random((2, 5, 8), seed=1).to(dtype), 6)

    def test_autocast_changes_nothing(self) -> None:
        backend, model = self._filled(lanes=2, dim=8, n=40)
        with torch.autocast(torch.device(self.device).type, dtype=torch.bfloat16):
            self._assert_agrees(backend, model, _random((2, 5, 8), seed=1), 6)

    def test_tensors_that_are_not_contiguous_are_read_right(self) -> None:
        backend, model = self.make_backend(lanes=2, dim=6), _PlainModel(2)
        self._add(backend, model, _random((6, 30, 2), seed=0).transpose(0, 2))
        self._add(backend, model, _random((2, 30, 12), seed=1)[:, ::3, ::2])
        self._add(backend, model, _random((1, 4, 6), seed=2).expand(2, -1, -1))
        self._assert_agrees(backend, model, _random((6, 5, 2), seed=3).transpose(0, 2), 4)

    def test_empty_tensors_are_fine(self) -> None:
        backend, model = self._filled(lanes=2, dim=4, n=5)
        self._add(backend, model, torch.empty(2, 0, 4))
        self._add(backend, model, torch.empty(0, 3, 4), [])
        self._remove_oldest(backend, model, 0)
        self._remove_oldest(backend, model, 4, [])
        self._assert_agrees(backend, model, torch.empty(2, 0, 4), 3)
        self._assert_agrees(backend, model, _random((2, 2, 4), seed=1), 3)

    def test_what_is_stored_is_a_copy(self) -> None:
        backend, model = self.make_backend(lanes=1, dim=4), _PlainModel(1)
        keys = _random((1, 8, 4), seed=0).to(self.device)
        self._add(backend, model, keys)
        keys.zero_()
        self._assert_agrees(backend, model, _random((1, 3, 4), seed=1), 3)

    def test_a_search_changes_neither_queries_nor_contents(self) -> None:
        backend, model = self._filled(lanes=2, dim=4, n=20)
        queries = _random((2, 3, 4), seed=1).to(self.device)
        before = queries.clone()
        first, second = backend.search(queries, 5), backend.search(queries, 5)
        assert torch.equal(queries, before)
        assert torch.equal(first.ids, second.ids)
        assert torch.equal(first.scores, second.scores)
        assert backend.counts().tolist() == model.counts()

    def test_no_gradient_flows_through_add_and_search(self) -> None:
        backend = self.make_backend(lanes=1, dim=4)
        backend.add(_random((1, 6, 4), seed=0).to(self.device).requires_grad_())
        result = backend.search(_random((1, 2, 4), seed=1).to(self.device).requires_grad_(), 2)
        assert not result.scores.requires_grad

    def test_what_was_added_in_inference_mode_can_be_changed_outside_of_it(self) -> None:
        backend, model = self.make_backend(lanes=1, dim=4), _PlainModel(1)
        with torch.inference_mode():
            self._add(backend, model, _random((1, 6, 4), seed=0))
        self._remove_oldest(backend, model, 3)
        self._add(backend, model, _random((1, 3, 4), seed=1))
        self._assert_agrees(backend, model, _random((1, 2, 4), seed=2), 6)

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_keys_that_are_not_finite_are_refused_and_nothing_is_stored(self, value: float) -> None:
        backend, model = self._filled(lanes=3, dim=4, n=5)
        keys = _random((2, 6, 4), seed=1).to(self.device)
        keys[1, 4, 2] = value
        with pytest.raises(ShapeError):
            backend.add(keys, [0, 2])
        self._assert_agrees(backend, model, _random((3, 2, 4), seed=2), 8)

    @pytest.mark.parametrize("shape", [(2, 4), (3, 1, 4), (2, 1, 5), (2, 1, 4, 1)])
    def test_keys_and_queries_of_another_shape_are_refused(self, shape: tuple[int, ...]) -> None:
        backend, model = self._filled(lanes=2, dim=4, n=5)
        with pytest.raises(ShapeError):
            backend.add(torch.zeros(shape, device=self.device))
        with pytest.raises(ShapeError):
            backend.search(torch.zeros(shape, device=self.device), 1)
        assert backend.counts().tolist() == model.counts()

    def test_keys_and_queries_on_another_device_are_refused(self) -> None:
        backend = self.make_backend(lanes=1, dim=4)
        elsewhere = torch.zeros(1, 2, 4, device="meta")
        with pytest.raises(ShapeError):
            backend.add(elsewhere)
        with pytest.raises(ShapeError):
            backend.search(elsewhere, 1)

    def test_keys_and_queries_of_whole_numbers_are_refused(self) -> None:
        backend = self.make_backend(lanes=1, dim=4)
        with pytest.raises(ShapeError):
            backend.add(torch.ones(1, 2, 4, dtype=torch.int64, device=self.device))
        with pytest.raises(ShapeError):
            backend.search(torch.ones(1, 2, 4, dtype=torch.int64, device=self.device), 1)

    @pytest.mark.parametrize("lanes", [[0, 0], [2], [-1]])
    def test_lanes_that_do_not_exist_or_repeat_are_refused(self, lanes: list[int]) -> None:
        backend, model = self._filled(lanes=2, dim=4, n=5)
        keys = torch.zeros(len(lanes), 1, 4, device=self.device)
        with pytest.raises(ShapeError):
            backend.add(keys, lanes)
        with pytest.raises(ShapeError):
            backend.remove_oldest(1, lanes)
        with pytest.raises(ShapeError):
            backend.clear(lanes)
        assert backend.counts().tolist() == model.counts()

    def test_removing_more_than_a_lane_holds_is_refused_and_nothing_is_dropped(self) -> None:
        backend, model = self._filled(lanes=2, dim=4, n=5)
        self._add(backend, model, _random((1, 3, 4), seed=1), [0])
        with pytest.raises(ShapeError):
            backend.remove_oldest(6)
        self._assert_agrees(backend, model, _random((2, 2, 4), seed=2), 9)

    def test_an_unknown_option_is_named(self) -> None:
        self.make_backend(lanes=1, dim=4)
        with pytest.raises(ConfigError, match="no_such_option"):
            self.make_backend(lanes=1, dim=4, no_such_option=1)

    def test_a_k_below_one_is_refused(self) -> None:
        backend, _ = self._filled(lanes=1, dim=4, n=5)
        with pytest.raises(ConfigError):
            backend.search(_random((1, 2, 4), seed=1).to(self.device), 0)

    def test_what_is_loaded_answers_and_counts_on_as_what_was_saved(self, tmp_path: Path) -> None:
        backend, model = self._filled(lanes=3, dim=8, n=20)
        self._remove_oldest(backend, model, 7)
        backend.clear([1])
        model.clear([1])
        self._add(backend, model, _random((2, 4, 8), seed=1), [1, 2])
        backend.save(tmp_path)
        loaded = self.make_backend(lanes=3, dim=8)
        loaded.add(_random((3, 50, 8), seed=2).to(self.device))
        loaded.load(tmp_path)
        queries = _random((3, 5, 8), seed=3)
        self._assert_agrees(loaded, model, queries, 30)
        self._remove_oldest(loaded, model, 3)
        self._add(loaded, model, _random((3, 6, 8), seed=4))
        self._assert_agrees(loaded, model, queries, 30)

    def test_an_empty_backend_is_saved_and_loaded(self, tmp_path: Path) -> None:
        self.make_backend(lanes=2, dim=4).save(tmp_path)
        loaded, _ = self._filled(lanes=2, dim=4, n=5)
        loaded.load(tmp_path)
        self._assert_agrees(loaded, _PlainModel(2), _random((2, 1, 4), seed=1), 2)

    def test_saving_again_replaces_what_was_saved(self, tmp_path: Path) -> None:
        backend, model = self._filled(lanes=2, dim=4, n=5)
        backend.save(tmp_path)
        before = sorted(path.name for path in tmp_path.iterdir())
        self._add(backend, model, _random((2, 5, 4), seed=1))
        backend.save(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        loaded = self.make_backend(lanes=2, dim=4)
        loaded.load(tmp_path)
        self._assert_agrees(loaded, model, _random((2, 1, 4), seed=2), 10)

    def test_files_that_are_missing_or_of_another_size_are_refused(self, tmp_path: Path) -> None:
        saved, _ = self._filled(lanes=2, dim=4, n=5)
        (tmp_path / "saved").mkdir()
        saved.save(tmp_path / "saved")
        (tmp_path / "empty").mkdir()
        for lanes, dim, place in ((2, 4, "empty"), (3, 4, "saved"), (2, 5, "saved")):
            backend, model = self._filled(lanes=lanes, dim=dim, n=5)
            with pytest.raises(MemoryFormatError):
                backend.load(tmp_path / place)
            self._assert_agrees(backend, model, _random((lanes, 1, dim), seed=1), 5)

    def test_damaged_files_are_refused_and_the_contents_stay(self, tmp_path: Path) -> None:
        saved, _ = self._filled(lanes=2, dim=4, n=50)
        (tmp_path / "whole").mkdir()
        saved.save(tmp_path / "whole")
        backend, model = self._filled(lanes=2, dim=4, n=7)
        for path in filter(Path.is_file, (tmp_path / "whole").rglob("*")):
            name = path.relative_to(tmp_path / "whole")
            for damage in (_truncate, _empty, _flip_last_byte):
                shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
                damage(tmp_path / "damaged" / name)
                with pytest.raises(MemoryFormatError):
                    backend.load(tmp_path / "damaged")
                shutil.rmtree(tmp_path / "damaged")
        self._assert_agrees(backend, model, _random((2, 2, 4), seed=1), 7)

    def _filled(self, *, lanes: int, dim: int, n: int) -> tuple[RetrievalBackend, _PlainModel]:
        backend, model = self.make_backend(lanes=lanes, dim=dim), _PlainModel(lanes)
        self._add(backend, model, _random((lanes, n, dim), seed=0))
        return backend, model

    def _add(
        self,
        backend: RetrievalBackend,
        model: _PlainModel,
        keys: Tensor,
        lanes: Sequence[int] | None = None,
    ) -> None:
        backend.add(keys.to(self.device), lanes)
        model.add(keys, range(backend.lanes) if lanes is None else lanes)

    def _remove_oldest(
        self,
        backend: RetrievalBackend,
        model: _PlainModel,
        n: int,
        lanes: Sequence[int] | None = None,
    ) -> None:
        backend.remove_oldest(n, lanes)
        model.remove_oldest(n, range(backend.lanes) if lanes is None else lanes)

    def _assert_agrees(
        self, backend: RetrievalBackend, model: _PlainModel, queries: Tensor, k: int
    ) -> SearchResult:
        """Search, and hold every part of the answer against float64 products."""
        assert backend.counts().tolist() == model.counts()
        on_device = queries.to(self.device)
        result = backend.search(on_device, k)
        shape = (backend.lanes, queries.shape[1], k)
        assert tuple(result.scores.shape) == tuple(result.ids.shape) == shape
        assert (result.scores.dtype, result.ids.dtype) == (torch.float32, torch.int64)
        assert result.scores.device == result.ids.device == on_device.device
        found = wanted = 0
        for lane, vectors in enumerate(model.vectors):
            expected = min(k, len(vectors))
            scores, ids = result.scores[lane].cpu().double(), result.ids[lane].cpu()
            assert (ids[:, expected:] == -1).all()
            assert (scores[:, expected:] == -math.inf).all()
            if not expected:
                continue
            first = min(vectors)
            products = queries[lane].cpu().double() @ torch.stack(list(vectors.values())).T
            found += self._count_found(scores[:, :expected], ids[:, :expected] - first, products)
            wanted += expected * len(products)
        assert found >= self.minimum_recall * wanted
        return result

    def _count_found(self, scores: Tensor, positions: Tensor, products: Tensor) -> int:
        """Check one lane's scores ``(q, k)`` and count those that are among the true top ``k``."""
        assert (positions >= 0).all()
        assert (positions < products.shape[1]).all()
        for row in positions.tolist():
            assert len(set(row)) == len(row)
        true = products.gather(1, positions)
        slack = self.score_tolerance * (1 + true.abs())
        assert ((scores - true).abs() <= slack).all()
        assert (scores[:, 1:] <= scores[:, :-1]).all()
        kth = products.topk(scores.shape[1]).values[:, -1:]
        return int((true >= kth - slack).sum())

    def _assert_each_finds_itself(self, backend: RetrievalBackend, model: _PlainModel) -> None:
        """Search for every stored vector, all of unit length."""
        dim = backend.dim
        longest = max(model.counts())
        queries = torch.zeros(backend.lanes, longest, dim)
        for lane, vectors in enumerate(model.vectors):
            for position, vector in enumerate(vectors.values()):
                queries[lane, position] = vector
        best = backend.search(queries.to(self.device), 1).ids[..., 0].cpu()
        for lane, vectors in enumerate(model.vectors):
            right = sum(
                found == wanted for found, wanted in zip(best[lane].tolist(), vectors, strict=False)
            )
            assert right >= self.minimum_recall * len(vectors)


def _random(shape: tuple[int, ...], *, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _unit(shape: tuple[int, ...], *, seed: int) -> Tensor:
    return torch.nn.functional.normalize(_random(shape, seed=seed), dim=-1)


def _clustered(*, lanes: int, n: int, dim: int, seed: int, noise_seed: int = 0) -> Tensor:
    """Draw vectors around 20 centres a lane, which keys of a real model are more like."""
    centres = _random((lanes, 20, dim), seed=seed)
    which = torch.arange(n) % 20
    return centres[:, which] + 0.5 * _random((lanes, n, dim), seed=noise_seed + 1)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip_last_byte(path: Path) -> None:
    contents = path.read_bytes()
    path.write_bytes(contents[:-1] + bytes([contents[-1] ^ 0xFF]))
