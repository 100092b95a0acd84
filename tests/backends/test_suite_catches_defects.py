"""The conformance suite against backends that are wrong in one way each."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

import pytest

DEFECTS = Path(__file__).parent / "defective_backends.py"

CAUGHT_BY = [
    ("OneOffAfterEviction", "test_ids_stay_what_they_were_after_eviction"),
    ("OneOffAfterEviction", "test_every_vector_of_a_full_backend_finds_itself"),
    ("SwappedLanes", "test_lanes_of_unequal_length_do_not_mix"),
    ("SwappedLanes", "test_many_lanes_of_few_vectors_do_not_mix"),
    ("AddsInTheOrderOfLanes", "test_lanes_are_taken_in_the_order_given"),
    ("MinusOneAsAnIndex", "test_lanes_with_fewer_than_k_vectors_are_padded"),
    ("MinusOneAsAnIndex", "test_a_query_that_is_not_finite_finds_nothing"),
    ("StaleIdsAfterLoad", "test_what_is_loaded_answers_and_counts_on_as_what_was_saved"),
    ("StaleIdsAfterLoad", "test_one_object_can_be_loaded_again_and_again"),
    ("ForgetsALaneWhenClearing", "test_clear_starts_the_numbers_of_that_lane_again"),
    ("ForgetsALaneWhenClearing", "test_clear_without_lanes_drops_everything"),
    ("KeepsCountingAfterClear", "test_clear_starts_the_numbers_of_that_lane_again"),
    ("StartsAgainWhenEmptied", "test_lanes_emptied_by_removal_count_on"),
    ("WrongAfterTheRingWraps", "test_a_full_backend_stays_right_for_many_turns"),
    ("WrongAfterTheRingWraps", "test_every_vector_of_a_full_backend_finds_itself"),
    ("MissesTheNewestVector", "test_search_finds_what_exact_search_finds"),
    ("UnsortedResults", "test_results_come_best_first"),
    ("LessThanK", "test_a_k_of_all_vectors_finds_all"),
    ("LessThanK", "test_search_finds_what_exact_search_finds"),
    ("EqualScoresHideBetterOnes", "test_equal_scores_do_not_hide_a_better_vector"),
    ("StoresWhateverComes", "test_keys_that_are_not_finite_are_refused_and_nothing_is_stored"),
    ("HalfPrecision", "test_float32_is_not_rounded_to_less"),
    ("KeepsTheCallersTensor", "test_what_is_stored_is_a_copy"),
    ("OneScratchForAllThreads", "test_searches_at_the_same_time_find_what_each_finds_alone"),
    ("LosesItsContentsToADamagedFile", "test_damaged_files_are_refused_and_the_contents_stay"),
]

CAUGHT_BY_RANDOM_STEPS = [
    "OneOffAfterEviction",
    "SwappedLanes",
    "AddsInTheOrderOfLanes",
    "MinusOneAsAnIndex",
    "StaleIdsAfterLoad",
    "ForgetsALaneWhenClearing",
    "KeepsCountingAfterClear",
    "StartsAgainWhenEmptied",
    "WrongAfterTheRingWraps",
    "MissesTheNewestVector",
    "UnsortedResults",
    "LessThanK",
    "HalfPrecision",
]


@pytest.fixture(scope="module")
def run_of_the_suite(tmp_path_factory):
    """Give the folder in which the suite ran over every defect, with its report."""
    folder = tmp_path_factory.mktemp("defects")
    arguments = ["-q", "-p", "no:cacheprovider", "--tb=no", "--junitxml=report.xml"]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *arguments, str(DEFECTS)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert result.returncode == pytest.ExitCode.TESTS_FAILED, result.stdout
    return folder


@pytest.fixture(scope="module")
def failures(run_of_the_suite):
    """Give the names of failed tests by defect; a defect that was run and not found has none."""
    found = defaultdict(set)
    for case in ElementTree.parse(run_of_the_suite / "report.xml").iter("testcase"):
        failed = found[case.get("classname").rpartition(".Test")[2]]
        if case.find("failure") is not None:
            failed.add(case.get("name").partition("[")[0])
        assert case.find("error") is None
        assert case.find("skipped") is None
    return dict(found)


@pytest.mark.parametrize(("defect", "test"), CAUGHT_BY)
def test_a_planted_defect_fails_the_test_for_it(failures, defect, test):
    assert test in failures[defect]


@pytest.mark.parametrize("defect", CAUGHT_BY_RANDOM_STEPS)
def test_random_steps_find_the_defect_too(failures, defect):
    assert "test_any_sequence_of_steps_agrees_with_a_plain_model" in failures[defect]


def test_nothing_fails_without_a_defect(failures):
    assert failures["Sound"] == set()
    assert set(failures) - {"Sound"} == {defect for defect, _ in CAUGHT_BY}


def test_recall_and_the_number_of_steps_are_reported(run_of_the_suite):
    report = ElementTree.parse(run_of_the_suite / "report.xml")
    sound = [
        case for case in report.iter("testcase") if case.get("classname").endswith(".TestSound")
    ]
    reported = {
        item.get("name"): item.get("value") for case in sound for item in case.iter("property")
    }
    assert float(reported["recall"]) == 1
    assert int(reported["steps"]) > 100


def test_the_suite_leaves_no_files_where_it_is_run(run_of_the_suite):
    assert [path.name for path in run_of_the_suite.iterdir()] == ["report.xml"]
