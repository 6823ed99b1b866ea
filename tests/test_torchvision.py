import importlib.machinery
import subprocess
import sys
import textwrap

import pytest

from medrobust_lib import _torchvision


def run_python(code: str, path: str) -> str:
    """Run code in a fresh interpreter that finds a made-up torchvision first."""
    source = f"import sys; sys.path.insert(0, {path!r})\n" + textwrap.dedent(code)
    finished = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


def make_torchvision(folder, body: str) -> str:
    package = folder / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(textwrap.dedent(body))
    (package / "part.py").write_text("value = 1\n")
    return str(folder)


def test_real_torchvision_and_what_needs_it_import():
    for name in ("torchvision", "timm", "open_clip", "peft", "transformers.models.clip.modeling_clip"):
        importlib.import_module(name)  # after medrobust_lib, which conftest.py imports
    assert sys.modules["torchvision"].transforms.Resize(3).size == 3


def test_guard_does_nothing_where_torchvision_imports(tmp_path):
    path = make_torchvision(tmp_path, "from torchvision import part\ncount = 1\n")
    code = """
    import medrobust_lib
    from medrobust_lib._torchvision import was_repaired
    import torchvision
    print(torchvision.count, was_repaired(), "torch" in sys.modules)
    """
    assert run_python(code, path).split() == ["1", "False", "False"]


def test_guard_repairs_the_known_failure_once(tmp_path):
    # Fails as the real one does until the operator is declared, after importing a submodule.
    body = """
    import torch
    from torchvision import part
    try:
        torch._C._dispatch_find_schema_or_throw("torchvision::nms", "")
    except RuntimeError:
        raise RuntimeError("operator torchvision::nms does not exist") from None
    ready = True
    """
    path = make_torchvision(tmp_path, body)
    code = """
    import medrobust_lib
    from medrobust_lib._torchvision import was_repaired
    import torchvision
    print(torchvision.ready, was_repaired(), torchvision.part.value)
    """
    assert run_python(code, path).split() == ["True", "True", "1"]


def test_an_import_that_failed_before_is_explained_and_works_the_second_time(tmp_path):
    body = """
    import torch
    from torchvision import part
    try:
        torch._C._dispatch_find_schema_or_throw("torchvision::nms", "")
    except RuntimeError:
        raise RuntimeError("operator torchvision::nms does not exist") from None
    """
    code = """
    import warnings
    try:
        import torchvision
    except RuntimeError as error:
        print(error)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        import medrobust_lib
    print(*[one.message for one in told], sep="; ")
    import torchvision
    print(torchvision.part.value)
    """
    failed, told, works = run_python(code, make_torchvision(tmp_path, body)).splitlines()
    assert failed == "operator torchvision::nms does not exist"
    assert "Import medrobust_lib first, or what failed once more" in told
    assert works == "1"


@pytest.mark.parametrize("first", ["", "import torchvision"])
def test_nothing_is_said_where_no_import_failed(tmp_path, first):
    path = make_torchvision(tmp_path, "from torchvision import part\n")
    assert run_python(f"import warnings; warnings.simplefilter('error'); {first}\nimport medrobust_lib", path) == ""


def test_guard_passes_on_any_other_failure(tmp_path):
    path = make_torchvision(tmp_path, 'raise RuntimeError("something else is broken")\n')
    code = """
    import medrobust_lib
    try:
        import torchvision
    except RuntimeError as error:
        print(error)
    """
    assert run_python(code, path).strip() == "something else is broken"


def test_guard_leaves_other_modules_alone_and_is_installed_once():
    guard = _torchvision.TorchvisionGuard()
    assert guard.find_spec("json") is None
    before = len(sys.meta_path)
    _torchvision.install_guard()
    _torchvision.install_guard()
    assert len(sys.meta_path) <= before + 1
    assert sum(isinstance(finder, _torchvision.TorchvisionGuard) for finder in sys.meta_path) <= 1


def test_wrapped_loader_still_serves_source():
    spec = _torchvision.TorchvisionGuard().find_spec("torchvision")
    assert isinstance(spec, importlib.machinery.ModuleSpec)
    assert "torchvision" in spec.loader.get_source("torchvision")


def test_unknown_public_name_lists_the_known_ones():
    import medrobust_lib

    with pytest.raises(AttributeError, match="no attribute 'lod_model'; it offers .*load_model"):
        _ = medrobust_lib.lod_model
