"""What is written is there whole or not at all."""

import pytest

from mdmtrain.files import put_in_place, replacing, writing


def test_a_file_is_replaced_as_a_whole(tmp_path):
    file = tmp_path / "state.json"
    file.write_text("old")
    with replacing(file) as new:
        new.write("new")
        assert file.read_text() == "old"
    assert file.read_text() == "new" and list(tmp_path.iterdir()) == [file]


def test_an_error_leaves_the_old_file(tmp_path):
    file = tmp_path / "state.json"
    file.write_text("old")
    with pytest.raises(ValueError), replacing(file) as new:
        new.write("half")
        raise ValueError
    assert file.read_text() == "old"


def test_content_is_on_the_disk_before_its_name(tmp_path, monkeypatch):
    made = tmp_path / "made"
    made.mkdir()
    (made / "shard.bin").write_text("tokens")
    order = []
    monkeypatch.setattr("mdmtrain.files.sync", lambda path: order.append(path))
    monkeypatch.setattr("mdmtrain.files.os.replace", lambda *paths: order.append(paths))
    put_in_place(made, tmp_path / "out")
    assert order == [made / "shard.bin", made, (made, tmp_path / "out"), tmp_path]


def test_a_failed_write_names_the_place(tmp_path):
    with pytest.raises(OSError, match="cannot write: No space left on device: make room") as failure, writing(tmp_path):
        raise OSError(28, "No space left on device")
    assert failure.value.filename == str(tmp_path)
