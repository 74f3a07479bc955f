"""Shipped files are found beside the package or under $WSSS_DATA, and a missing one says how to get it."""
import pytest

from wsss_lib.paths import REPOSITORY, cache_folder, data_folders, runs_folder, shipped


@pytest.fixture
def no_variable(monkeypatch):
    monkeypatch.delenv("WSSS_DATA", raising=False)


def test_shipped_data_is_found_beside_the_package(no_variable):
    assert (REPOSITORY / "pyproject.toml").is_file()
    tree = shipped("toyvoc")
    assert tree == REPOSITORY / "data" / "toyvoc"
    assert (tree / "ImageSets" / "Segmentation" / "val.txt").is_file()


def test_the_working_folder_does_not_matter(no_variable, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert shipped("toyvoc") == REPOSITORY / "data" / "toyvoc"


def test_the_variable_comes_first_and_the_repository_second(monkeypatch, tmp_path):
    monkeypatch.setenv("WSSS_DATA", str(tmp_path))
    assert data_folders() == [tmp_path, REPOSITORY / "data"]
    assert shipped("toyvoc") == REPOSITORY / "data" / "toyvoc"      # not under the variable: falls through
    (tmp_path / "toyvoc").mkdir()
    assert shipped("toyvoc") == tmp_path / "toyvoc"


def test_an_empty_variable_is_none(monkeypatch):
    monkeypatch.setenv("WSSS_DATA", "")
    assert data_folders() == [REPOSITORY / "data"]
    assert cache_folder() == REPOSITORY / "data" / "cache"


def test_a_missing_file_says_what_was_tried_and_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("WSSS_DATA", str(tmp_path))
    with pytest.raises(FileNotFoundError) as caught:
        shipped("checkpoints/no_such.safetensors")
    said = str(caught.value)
    for part in ("checkpoints/no_such.safetensors", str(tmp_path / "checkpoints/no_such.safetensors"),
                 str(REPOSITORY / "data" / "checkpoints/no_such.safetensors"), "pip install -e .",
                 "WSSS_DATA"):
        assert part in said
    assert "\n" not in said


def test_the_cache_is_ignored_by_git_or_where_the_variable_says(no_variable, monkeypatch, tmp_path):
    assert cache_folder() == REPOSITORY / "data" / "cache"
    assert "/data/cache/" in (REPOSITORY / ".gitignore").read_text().splitlines()
    monkeypatch.setenv("WSSS_DATA", str(tmp_path))
    assert cache_folder() == tmp_path


def test_runs_are_left_in_the_repository_or_where_the_variable_says(monkeypatch, tmp_path):
    monkeypatch.setenv("WSSS_RUNS", str(tmp_path / "mine"))
    assert runs_folder("a") == tmp_path / "mine" / "a" and (tmp_path / "mine" / "a").is_dir()
    for value in ("", None):
        monkeypatch.setenv("WSSS_RUNS", value) if value == "" else monkeypatch.delenv("WSSS_RUNS")
        assert runs_folder("01_cam_basics") == REPOSITORY / "runs" / "01_cam_basics"
