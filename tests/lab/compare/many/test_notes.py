"""Notes, tags and the archive are kept in a run's folder, and change only what was said."""

import pytest

from tests.helpers.runfolders import write_run
from udonlib.errors import ParameterError
from udonlib.lab.compare.many import notes
from udonlib.lab.compare.many.notes import Note


def test_a_note_keeps_what_is_not_said_anew(tmp_path):
    folder = write_run(tmp_path, "one")
    assert notes.read(folder) == Note()
    assert notes.change("one", "a try", "good, quick, good", outputs=str(tmp_path)) == ["one"]
    assert notes.read(folder) == Note("a try", ("good", "quick"))
    notes.change("one", archived=True, outputs=str(tmp_path))
    assert notes.read(folder) == Note("a try", ("good", "quick"), True)
    notes.change("one", "", [], archived=False, outputs=str(tmp_path))
    assert notes.read(folder) == Note()


def test_a_pattern_names_many_and_a_name_that_nobody_has_is_reported(tmp_path):
    for name in ("smoke-1", "smoke-2", "udon"):
        write_run(tmp_path, name)
    assert notes.change("smoke-*", tags="tries", outputs=str(tmp_path)) == ["smoke-1", "smoke-2"]
    assert notes.read(tmp_path / "runs" / "udon") == Note()
    with pytest.raises(ParameterError, match="parameter 'pattern': no run in .* is called 'udom'; did you mean 'udon'"):
        notes.change("udom", "x", outputs=str(tmp_path))
    with pytest.raises(ParameterError, match="parameter 'text': found 2,001 signs, expected at most 2,000"):
        notes.change("udon", "x" * 2001, outputs=str(tmp_path))


@pytest.mark.parametrize(
    "content", ["[1]", '{"text": 3}', '{"tags": "one"}', '{"archived": "yes"}', "[" * 100_000, "{"]
)
def test_a_damaged_note_is_an_error_to_read_and_gives_way_to_a_new_one(tmp_path, content):
    folder = write_run(tmp_path, "one")
    (folder / notes.NOTES).write_text(content)
    with pytest.raises(ValueError, match=r"."):
        notes.read(folder)
    notes.change("one", "new", outputs=str(tmp_path))
    assert notes.read(folder) == Note("new")
