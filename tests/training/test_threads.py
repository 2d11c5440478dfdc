"""Threads that compute make way for other processes, and nothing that they compute depends on it."""

import os
import sys
import threading

import pytest
import torch

from udonlib.training import threads


class Line:
    """Seconds in which threads have stood in line for a core, as a test says."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture
def line():
    return Line()


@pytest.fixture
def watcher(line, monkeypatch):
    monkeypatch.setattr(threads, "_n_teams", lambda n_threads: 1)
    watcher = threads.Watcher(2, line)
    watcher._at = 0.0
    yield watcher
    for team in watcher.teams:
        team.end()


def looks(watcher: threads.Watcher, line: Line, shares: list[float]) -> list[bool]:
    """Whether way is made after each of some looks, half a second apart, in which two threads waited a share of it."""
    found, now = [], watcher._at
    for share in shares:
        now += 0.5
        line.seconds += share * 0.5 * 2
        watcher.look(now)
        found.append(bool(watcher.teams))
    return found


def test_threads_make_way_when_they_stand_in_line_and_spin_again_after_a_calm_while(watcher, line):
    assert looks(watcher, line, [0.02, 0.02]) == [False, False]
    assert looks(watcher, line, [0.3, 0.3, 0.02, 0.02, 0.02]) == [True] * 5
    assert looks(watcher, line, [0.3, 0.02, 0.02, 0.02, 0.02]) == [True, True, True, True, False]


def test_threads_that_ended_take_their_waiting_with_them(watcher, line):
    line.seconds = 5.0
    watcher.look(100.0)  # 5 s of 200: calm
    line.seconds = 0.0
    watcher.look(100.5)
    assert not watcher.teams


def test_a_team_is_kept_by_a_thread_and_leaves_with_it():
    before = set(threading.enumerate())
    team = threads.Team()
    assert [thread.name for thread in set(threading.enumerate()) - before] == ["udonlib-team"]
    team.end()
    assert set(threading.enumerate()) == before


@pytest.mark.parametrize(
    ("cores", "n_threads", "expected"), [(2, 2, 1), (4, 2, 3), (16, 16, 1), (16, 8, 2), (64, 2, 0), (1, 2, 0)]
)
def test_so_many_teams_are_kept_that_there_are_more_threads_than_cores(monkeypatch, cores, n_threads, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(cores)), raising=False)
    assert threads._n_teams(n_threads) == expected
    assert not expected or n_threads + expected * (n_threads - 1) > cores


def test_the_time_in_line_is_the_sum_of_all_threads(tmp_path):
    for task, text in {"1": "99 1500000000 7", "2": "99 500000000 7", "3": "", "4": "nothing here"}.items():
        (tmp_path / task).mkdir()
        (tmp_path / task / "schedstat").write_text(text + "\n")
    (tmp_path / "5").mkdir()
    assert threads._seconds_in_line(tmp_path) == 2.0
    assert threads._seconds_in_line(tmp_path / "none") == 0.0


def test_one_watcher_serves_the_process_and_one_thread_needs_none(monkeypatch):
    started: list[threads.Watcher] = []
    monkeypatch.setattr(threads.Watcher, "start", lambda self: started.append(self))
    monkeypatch.setattr(threads.Watcher, "is_alive", lambda self: self in started)
    monkeypatch.setattr(threads, "_watchers", [])
    before = torch.get_num_threads()
    try:
        threads.use_threads(1)
        assert started == []
        threads.use_threads(2)
        threads.use_threads(3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
    assert [watcher.n_threads for watcher in started] == [3] * (sys.platform == "linux")


def test_all_our_cores_compute_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(threads, "n_cores", lambda: 1)
    threads.use_threads(0)
    assert torch.get_num_threads() == 1
