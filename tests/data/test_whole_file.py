"""Half a file must never stand where a whole one is expected."""

import pytest

from onereward.data.whole_file import whole_file


def test_the_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "new" / "votes.txt"
    with whole_file(path) as partial:
        partial.write_text("first ")
        assert not path.exists()
    assert path.read_text() == "first "
    assert list(path.parent.iterdir()) == [path]


def test_what_was_there_stays_when_writing_fails(tmp_path):
    path = tmp_path / "votes.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
