"""One line tells how far an activity is: seldom where it is printed, often where somebody looks."""

from udonlib import progressline
from udonlib.progressline import ProgressLine

UNITS = {"embedding": "images", "exporting": "images"}


def test_progress_is_told_in_few_lines_with_the_time_that_is_left(capsys):
    now = [0.0]
    line = ProgressLine(UNITS, False, lambda: now[0])
    for done in range(0, 1001, 10):
        line.progress("embedding", done, 1000)
        now[0] += 0.5
    line.progress("exporting", 5, 10)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "embedding 0/1,000 images (0%)"
    assert lines[1] == "embedding 100/1,000 images (10%)  20 images/s  0:45 left"
    assert lines[-2:] == ["embedding 1,000/1,000 images (100%)", "exporting 5/10 images (50%)"]
    assert len(lines) == 12


def test_a_cell_is_redrawn_where_somebody_looks(monkeypatch):
    shown = []

    class Handle:
        def update(self, content):
            shown.append(content.data)

    monkeypatch.setattr(progressline, "display", lambda content, display_id: Handle())
    now = [0.0]
    line = ProgressLine(UNITS, True, lambda: now[0])
    for done in range(11):
        line.progress("embedding", done, 10)
        now[0] += 0.2
    line.say("<done>")
    assert len(shown) == 6  # at 0, 0.6, 1.2 and 1.8 seconds, the last image, the end
    assert "embedding 10/10 images (100%)" in shown[-2]
    assert "&lt;done&gt;" in shown[-1]


def test_what_ends_at_a_limit_does_not_promise_more(capsys):
    now = [0.0]
    line = ProgressLine(UNITS, False, lambda: now[0], limit=30)
    line.progress("embedding", 0, 1000)
    now[0] = 10.0
    line.progress("embedding", 10, 1000)
    assert capsys.readouterr().out.splitlines()[1] == "embedding 10/1,000 images (1%)  1 images/s  0:20 left"
