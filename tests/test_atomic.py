"""Files are written whole or not at all."""

import pytest

from diverse_cfg.atomic import replacing, write_text


def test_a_file_takes_its_place_only_when_it_is_whole(tmp_path):
    """Catches a writer that truncates what was there, and a temporary file left behind."""
    path = tmp_path / "numbers.csv"
    assert write_text(path, "α\n") == path and path.read_text(encoding="utf-8") == "α\n"
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text(encoding="utf-8") == "α\n" and temporary.parent == tmp_path
        raise KeyboardInterrupt
    assert path.read_text(encoding="utf-8") == "α\n" and list(tmp_path.iterdir()) == [path]
