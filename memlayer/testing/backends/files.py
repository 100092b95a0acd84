"""That what is loaded answers as what was saved, and that what is damaged is refused."""
# ruff: noqa: D102 - a test's name says what it tests

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from memlayer.errors import MemoryFormatError
from memlayer.testing.backends.case import BackendCase
from memlayer.testing.backends.vectors import random_vectors


class FileTests(BackendCase):
    """Save and load."""

    def test_what_is_loaded_answers_and_counts_on_as_what_was_saved(self, tmp_path: Path) -> None:
        backend, model = self.filled(lanes=3, dim=8, n=20)
        self.remove_oldest(backend, model, 7)
        self.clear(backend, model, [1])
        self.add(backend, model, random_vectors((2, 4, 8), seed=1), [1, 2])
        backend.save(tmp_path)
        loaded = self.make_backend(lanes=3, dim=8)
        loaded.add(random_vectors((3, 50, 8), seed=2).to(self.device))
        loaded.load(tmp_path)
        queries = random_vectors((3, 5, 8), seed=3)
        self.assert_agrees(loaded, model, queries, 30)
        self.remove_oldest(loaded, model, 3)
        self.add(loaded, model, random_vectors((3, 6, 8), seed=4))
        self.assert_agrees(loaded, model, queries, 30)

    def test_saving_changes_nothing(self, tmp_path: Path) -> None:
        backend, model = self.filled(lanes=2, dim=8, n=30)
        self.remove_oldest(backend, model, 20)
        self.add(backend, model, random_vectors((2, 15, 8), seed=1))
        backend.save(tmp_path)
        self.assert_agrees(backend, model, random_vectors((2, 5, 8), seed=2), 25)

    def test_one_object_can_be_loaded_again_and_again(self, tmp_path: Path) -> None:
        states = []
        for seed, n in enumerate((30, 3, 70)):
            backend, model = self.empty(lanes=2, dim=8)
            self.add(backend, model, random_vectors((2, n, 8), seed=seed))
            self.remove_oldest(backend, model, seed)
            (tmp_path / str(seed)).mkdir()
            backend.save(tmp_path / str(seed))
            states.append(model)
        loaded = self.make_backend(lanes=2, dim=8)
        for seed in (0, 1, 2, 2, 0):
            loaded.load(tmp_path / str(seed))
            self.assert_agrees(loaded, states[seed], random_vectors((2, 5, 8), seed=9), 40)

    def test_what_was_saved_with_other_options_is_read(self, tmp_path: Path) -> None:
        backend, model = self.filled(lanes=2, dim=8, n=20)
        self.remove_oldest(backend, model, 5)
        queries = random_vectors((2, 5, 8), seed=1)
        backend.save(tmp_path)
        other = self.make_with_defaults(lanes=2, dim=8)
        other.load(tmp_path)
        self.assert_agrees(other, model, queries, 4)
        self.add(other, model, random_vectors((2, 6, 8), seed=2))
        other.save(tmp_path)
        backend.load(tmp_path)
        self.assert_agrees(backend, model, queries, 4)

    def test_an_empty_backend_is_saved_and_loaded(self, tmp_path: Path) -> None:
        backend, model = self.empty(lanes=2, dim=4)
        backend.save(tmp_path)
        loaded, _ = self.filled(lanes=2, dim=4, n=5)
        loaded.load(tmp_path)
        self.assert_agrees(loaded, model, random_vectors((2, 1, 4), seed=1), 2)

    def test_saving_again_replaces_what_was_saved(self, tmp_path: Path) -> None:
        backend, model = self.filled(lanes=2, dim=4, n=5)
        backend.save(tmp_path)
        before = sorted(path.name for path in tmp_path.iterdir())
        self.add(backend, model, random_vectors((2, 5, 4), seed=1))
        backend.save(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == before
        loaded = self.make_backend(lanes=2, dim=4)
        loaded.load(tmp_path)
        self.assert_agrees(loaded, model, random_vectors((2, 1, 4), seed=2), 10)

    def test_files_that_are_missing_or_of_another_size_are_refused(self, tmp_path: Path) -> None:
        saved, _ = self.filled(lanes=2, dim=4, n=5)
        (tmp_path / "saved").mkdir()
        saved.save(tmp_path / "saved")
        (tmp_path / "empty").mkdir()
        for lanes, dim, place in ((2, 4, "empty"), (3, 4, "saved"), (2, 5, "saved")):
            backend, model = self.filled(lanes=lanes, dim=dim, n=5)
            with pytest.raises(MemoryFormatError):
                backend.load(tmp_path / place)
            self.assert_agrees(backend, model, random_vectors((lanes, 1, dim), seed=1), 5)

    def test_damaged_files_are_refused_and_the_contents_stay(self, tmp_path: Path) -> None:
        saved, _ = self.filled(lanes=2, dim=4, n=50)
        (tmp_path / "whole").mkdir()
        saved.save(tmp_path / "whole")
        backend, model = self.filled(lanes=2, dim=4, n=7)
        for path in filter(Path.is_file, (tmp_path / "whole").rglob("*")):
            name = path.relative_to(tmp_path / "whole")
            for damage in (_truncate, _empty, _flip_last_byte):
                shutil.copytree(tmp_path / "whole", tmp_path / "damaged")
                damage(tmp_path / "damaged" / name)
                with pytest.raises(MemoryFormatError):
                    backend.load(tmp_path / "damaged")
                shutil.rmtree(tmp_path / "damaged")
        self.assert_agrees(backend, model, random_vectors((2, 2, 4), seed=1), 7)


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _flip_last_byte(path: Path) -> None:
    contents = path.read_bytes()
    path.write_bytes(contents[:-1] + bytes([contents[-1] ^ 0xFF]))
