"""The page says what the faults' data says."""

from __future__ import annotations

from tests.check import planted
from tests.faults import planting
from vpci.check.runner import CASES  # which declares them all


def test_the_table_of_planted_faults_is_current():
    """Else: python -m tests.check.planted table"""
    assert planted.on_page() == planted.table()


def test_the_cases_that_see_a_fault_exist():
    assert {id for fault in planting.load() for id in fault.seen_by} <= CASES.keys()


def test_more_than_a_third_of_the_faults_are_seen():
    faults = planting.load()
    assert sum(bool(fault.seen_by) for fault in faults) > len(faults) / 3
