"""Where things live: an unusable cache is one clear error; writes are atomic and have the user's permissions."""

import os

import pytest

from nbs_lib import paths


def test_a_cache_that_cannot_be_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    for wrong in (tmp_path / "file", tmp_path / "file" / "below"):
        monkeypatch.setenv("NBS_CACHE", str(wrong))
        with pytest.raises(OSError, match=f"Expected NBS_CACHE .*folder.*Got {wrong}: "):
            paths.cache_dir()
    monkeypatch.setenv("NBS_CACHE", str(tmp_path / "new" / "folder"))
    assert paths.cache_dir().is_dir()


@pytest.mark.skipif(os.name != "posix", reason="no umask here")
def test_written_files_are_whole_and_follow_the_umask(tmp_path):
    mask = os.umask(0o027)
    try:
        path = paths.write_atomic(tmp_path / "deep" / "file.txt", "text")
        assert path.read_text() == "text" and path.stat().st_mode & 0o777 == 0o640
        paths.write_atomic(path, b"bytes")
        (tmp_path / "deep" / "folder").mkdir()
        with pytest.raises(OSError):
            paths.write_atomic(tmp_path / "deep" / "folder", "a folder cannot be replaced")
    finally:
        os.umask(mask)
    assert path.read_bytes() == b"bytes" and sorted(os.listdir(tmp_path / "deep")) == ["file.txt", "folder"]
