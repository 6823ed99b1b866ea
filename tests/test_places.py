import pytest

from medrobust_lib import places


@pytest.mark.parametrize(
    ("variable", "name", "where"),
    [
        ("MEDROBUST_WEIGHTS", "weights", places.default_weights_dir),
        ("MEDROBUST_DATA", "data", places.default_data_root),
    ],
)
def test_a_folder_comes_from_the_environment_else_lies_in_the_project(monkeypatch, tmp_path, variable, name, where):
    monkeypatch.setenv(variable, str(tmp_path / "here"))
    assert where() == tmp_path / "here"
    assert places.default_data_root(tmp_path / "mine") == tmp_path / "mine"
    monkeypatch.delenv(variable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(places, "__file__", str(tmp_path / "project" / "medrobust_lib" / "places.py"))
    assert where() == tmp_path / name
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "pyproject.toml").touch()
    assert where() == tmp_path / "project" / name


def test_runs_lie_in_the_project():
    assert places.default_runs_dir() == places.project_root() / "runs"
    assert (places.project_root() / "notebooks").is_dir()
