"""What notebooks are given is matched by name and checked before a kernel starts."""

import ast
import json
import math
import shutil

import nbformat
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from medrobust_lib import parameters
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.runner import find_notebooks, run_notebooks
from medrobust_lib.studies.steps import shown_id
from medrobust_lib.studies.study_file import read_study


@pytest.fixture
def notebooks(tmp_path, write_notebook):
    write_notebook(tmp_path, "01_first")
    write_notebook(tmp_path, "02_second", parameters="model: str = 'demo-clip'  # id\nn_votes: int = 3  # votes\n")
    return find_notebooks(folder=tmp_path)


def test_values_stay_as_written_and_the_command_line_wins_over_the_file(tmp_path):
    file = tmp_path / "params.yaml"
    file.write_text("model: plip\nsigmas: [0, 0.5]\n")
    parsed = parameters.parse_parameters(["model=demo-clip", "n_images=20", "fast=true", "template=a {} b"], file)
    assert parsed == {
        "model": "demo-clip", "sigmas": ["0", "0.5"], "n_images": "20", "fast": "true", "template": "a {} b",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("assignments", "content", "message"),
    [
        (["model"], None, "-p model: write -p NAME=VALUE"),
        (["a=1", "a=2"], None, r"-p a is given twice, 1 and 2; a list is \[ONE, TWO\]"),
        ([], "- a\n", "must hold a mapping"),
        ([], "a: [1", r"params\.yaml is no valid YAML"),
        ([], "a: x: {}", r"params\.yaml is no valid YAML: .*Put text that holds ': '"),
        ([], "a: 1\na: 2\n", "the key 'a' is given twice"),
        ([], "[" * 1200, r"params\.yaml is no valid YAML"),
    ],
)
def test_unreadable_parameters_are_named(tmp_path, assignments, content, message):
    file = None
    if content is not None:
        file = tmp_path / "params.yaml"
        file.write_text(content)
    with pytest.raises(ValueError, match=message):
        parameters.parse_parameters(assignments, file)


# Values as people write them


DECLARED = """text: str = ""  # any
texts: list[str] = []  # any
whole: int = 1  # any
number: float = 1.0  # any
numbers: list[float] = []  # any
switch: bool = False  # any
names: dict[str, str] = {}  # any
maybe: Optional[int] = None  # any
free = 1  # any
"""


@pytest.fixture(scope="module")
def any_values(tmp_path_factory):
    """Folder of a notebook with a parameter of every type."""
    folder = tmp_path_factory.mktemp("any")
    cell = nbformat.v4.new_code_cell(DECLARED, metadata={"tags": ["parameters"]})
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=kernel), folder / "01_any.ipynb")
    return folder


STUDY = {"name": "any", "datasets": ["phantom/blood"], "steps": [{"notebook": "01"}]}


def read_by(way, any_values, name, value, *, written=None):
    """What a notebook gets for a parameter: `value` as JSON in a file, or on the command line as it is `written`."""
    found = find_notebooks(folder=any_values)
    path = any_values / f"{way}.yaml"
    if way == "study":
        step = {"notebook": "01", "parameters": {name: value}}
        path.write_text(yaml.safe_dump(STUDY | {"steps": [step]}), encoding="utf-8")
        ((given,),) = (step.parameters.values() for step in read_study(path, notebooks=any_values).steps)
        return given
    path.write_text(yaml.safe_dump({name: value}), encoding="utf-8")
    typed = f"{name}={value if written is None else written}"
    given = parameters.parse_parameters([], path) if way == "-f" else parameters.parse_parameters([typed])
    return parameters.assign_parameters(found, given)["01"][name]


WAYS = ("-p", "-f", "study")
UNICODE = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
AS_YAML_READS_THEM = st.sampled_from(
    ["yes", "No", "on", "null", "~", "", "01", "010", "1_000", "1:30", "2024-01-01", "1e2", ".inf", "a chest X-ray: {}",
     "{}", "[a, b]", "'a'", '"a"', "a #b", "- a", "!!int 3", "&a *b", "  a  ", "a\nb", "%", "@x", "=", "<<", "?"]
)  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_text_arrives_as_it_is_written(any_values, way):
    from papermill.translators import PythonTranslator

    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(AS_YAML_READS_THEM | UNICODE)
    def check(text):
        assert read_by(way, any_values, "text", text) == text
        assert ast.literal_eval(PythonTranslator.translate(text)) == text  # in the kernel, too

    check()


@pytest.mark.parametrize("way", WAYS)
def test_texts_in_lists_and_mappings_arrive_as_they_are_written(any_values, way):
    one_line = UNICODE.filter(lambda key: key and key.isprintable())  # others safe_dump writes after "? "

    @settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.lists(AS_YAML_READS_THEM | UNICODE, min_size=1, max_size=5), st.lists(one_line, max_size=5, unique=True))
    def check(texts, keys):
        names = {key: texts[place % len(texts)] for place, key in enumerate(keys)}
        written = {name: parameters.as_written(value) for name, value in (("texts", texts), ("names", names))}
        assert read_by(way, any_values, "texts", texts, written=written["texts"]) == texts
        assert read_by(way, any_values, "names", names, written=written["names"]) == names

    check()


def test_a_plain_question_mark_is_text_wherever_a_plain_text_may_stand():
    @settings(max_examples=100, deadline=None)
    @given(st.lists(st.text("a? ", min_size=1).map(str.strip).filter(bool), min_size=1))
    def check(texts):
        assert parameters.read_yaml(f"[{', '.join(texts)}]") == texts
        assert parameters.read_yaml("".join(f"- {text}\n" for text in texts)) == texts

    check()


@pytest.mark.parametrize("end", ["\n", "\r", "\x85", "\u2028", "\u2029"])
def test_the_end_of_a_line_in_a_text_is_written_as_it_is_read(end):
    written = parameters.as_written([f"a{end}b", end])
    assert end not in written and parameters.read_yaml(written) == [f"a{end}b", end]


def test_a_long_key_is_written_as_it_is_read():
    names = {"k" * 200: "v?", "a\nb" * 60: "", "": "e", "? c": "d"}
    assert parameters.read_yaml(parameters.as_written(names)) == names


@pytest.mark.parametrize("way", WAYS)
def test_every_finite_number_arrives_exactly(any_values, way):
    @settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.floats(allow_nan=False, allow_infinity=False), st.integers())
    def check(number, whole):
        got = read_by(way, any_values, "number", number)
        assert (type(got), repr(got)) == (float, repr(number))  # with the sign of zero
        got = read_by(way, any_values, "numbers", [number, whole % 10**6], written=f"[{number!r}, {whole % 10**6}]")
        assert got == [number, float(whole % 10**6)]
        assert read_by(way, any_values, "whole", whole) == whole

    check()


@pytest.mark.parametrize("way", ["-p", "-f", "study"])
@pytest.mark.parametrize(
    ("name", "written", "value"),
    [
        ("numbers", "[1e-1]", [0.1]),
        ("numbers", "[1e-1, 1E2, .5, +2, 01]", [0.1, 100.0, 0.5, 2.0, 1.0]),
        ("numbers", "0.25", [0.25]),
        ("numbers", "", []),
        ("whole", "1e2", 100),
        ("whole", "010", 10),
        ("whole", "2.0", 2),
        ("whole", "9007199254740993", 2**53 + 1),
        ("number", "1", 1.0),
        ("names", "{yes: a polyp, no: none, 01: 02, 1.0: 1, on: off, null: ~, 1:30: x}",
         {"yes": "a polyp", "no": "none", "01": "02", "1.0": "1", "on": "off", "null": "~", "1:30": "x"}),
        ("names", "", {}),
        ("texts", "plip", ["plip"]),
        ("texts", "[yes, 01, folder:a/b, '[x]', 2024-01-01]", ["yes", "01", "folder:a/b", "[x]", "2024-01-01"]),
        ("texts", "[folder:/tmp/x?fit=pad, phantom/blood]", ["folder:/tmp/x?fit=pad", "phantom/blood"]),
        ("texts", "[un polype ?, ?, ? a, 'b?']", ["un polype ?", "?", "? a", "b?"]),
        ("names", "{A: is it a?, B?: b}", {"A": "is it a?", "B?": "b"}),
        ("texts", "", []),
        ("switch", "on", True), ("switch", "YES", True), ("switch", "1", True), ("switch", "true", True),
        ("switch", "off", False), ("switch", "No", False), ("switch", "0", False), ("switch", "False", False),
        ("maybe", "null", None), ("maybe", "None", None), ("maybe", "", None), ("maybe", "1e1", 10),
        ("free", "5", 5), ("free", "0.5", 0.5), ("free", "[1, yes, x]", [1, True, "x"]), ("free", "a: b", "a: b"),
        ("free", "{a: 1}", {"a": 1}),
    ],
)  # fmt: skip
def test_what_people_write_is_read_alike_everywhere(any_values, tmp_path, way, name, written, value):
    if way == "-p":
        given = parameters.parse_parameters([f"{name}={written}"])
    else:
        quoted = f"'{written}'" if written == "a: b" else written
        head = "" if way == "-f" else "datasets: [phantom/blood]\nsteps:\n- notebook: 01\n  parameters:\n    "
        (tmp_path / "any.yaml").write_text(f"{head}{name}: {quoted}\n")
        if way == "study":
            (step,) = read_study(tmp_path / "any.yaml", notebooks=any_values).steps
            assert step.parameters == {name: value}
            assert type(step.parameters[name]) is type(value)
            return
        given = parameters.parse_parameters([], tmp_path / "any.yaml")
    got = parameters.assign_parameters(find_notebooks(folder=any_values), given)["01"][name]
    assert (got, type(got)) == (value, type(value))


@pytest.mark.parametrize(
    ("name", "written", "message"),
    [
        ("numbers", "[0.1, abc]", r"numbers\[1\]='abc': give a number$"),
        ("numbers", "0.1,0.25", r"numbers='0.1,0.25': give a list of numbers, such as \[0.1, 0.25\]"),
        ("numbers", "[0.1, .inf]", r"numbers\[1\]='.inf': give a number"),
        ("number", "nan", "number='nan': give a number"),
        ("number", "1:30", "number='1:30': give a number"),
        ("number", "1e400", "number='1e400': give a number"),
        ("number", "0,25", "number='0,25': give a number"),
        ("whole", "1.5", "whole='1.5': give a whole number"),
        ("whole", "0x10", "whole='0x10': give a whole number"),
        ("whole", "true", "whole='true': give a whole number"),
        ("switch", "2", "switch='2': give true or false"),
        ("names", "{yes: [a]}", r"names\['yes'\]=\['a'\]: give text"),
        ("names", "[a]", "names='\\[a\\]': give a mapping of names to texts, such as {NAME: VALUE}"),
        ("names", "{a: 1, a: 2}", r"names={a: 1, a: 2} is no valid YAML: the key 'a' is given twice"),
        ("texts", "[a, b: c]", r"texts\[1\]={'b': 'c'}: give text, in quotes if it holds ': ' or brackets"),
        ("texts", "[a", r"parameter texts=\[a is no valid YAML"),
        ("texts", "[a?", r"parameter texts=\[a\? is no valid YAML: [ -~]*$"),
        ("maybe", "x", "maybe='x': give a whole number"),
    ],
)
def test_errors_name_the_element(any_values, name, written, message):
    given = parameters.parse_parameters([f"{name}={written}"])
    with pytest.raises(ValueError, match=message):
        parameters.assign_parameters(find_notebooks(folder=any_values), given)


def test_each_notebook_gets_the_parameters_it_knows(notebooks):
    assigned = parameters.assign_parameters(notebooks, {"model": "demo-clip", "n_votes": 9})
    assert assigned == {"01": {"model": "demo-clip"}, "02": {"model": "demo-clip", "n_votes": 9}}


def test_unknown_parameter_lists_the_closest_first_and_the_rest_in_the_notebooks_order(notebooks):
    with pytest.raises(parameters.ParameterError) as caught:
        parameters.assign_parameters(notebooks, {"sigmaz": 5})
    message = "unknown parameter 'sigmaz' for notebook 01, 02; valid: sigma, sigmas, model, n_images, fast, n_votes"
    assert str(caught.value) == message


@pytest.fixture
def studies(tmp_path, write_notebook):
    cell = """model: str = "demo-clip"  # id
compare_with: list[str] = []  # ids
dataset: str = "phantom/blood"  # id
compare: list[str] = ["phantom/oct"]  # ids
n_images: int = 5  # how many
n_draws: list[int] = [10]  # how many
sigmas: list[float] = [0.0]  # levels
template: str = ""  # prompt
words: str = ""  # words
"""
    write_notebook(tmp_path, "01_first", parameters=cell)
    return find_notebooks(folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("n_images", -5, ValueError, "parameter n_images=-5: give 1 or more"),
        ("n_draws", [10, 0], ValueError, r"parameter n_draws\[1\]=0: give 1 or more"),
        ("sigmas", [0.0, -0.1], ValueError, r"parameter sigmas\[1\]=-0.1: give 0 or more"),
        ("sigmas", [math.nan], ValueError, r"parameter sigmas\[0\]=nan: give a number"),
        ("sigmas", [0.1, 64], ValueError, r"parameter sigmas\[1\]=64.0: give 10 or less.*divide a level in 0 to 255"),
        ("sigmas", [10.001], ValueError, "give 10 or less"),
        ("template", "no place", ValueError, "parameter template='no place': write {} once, in the place of"),
        (
            "template",
            "a {} {}",
            ValueError,
            "parameter template='a {} {}': write {} once, in the place of the class name",
        ),
        ("model", "demo-clop", ValueError, "unknown model 'demo-clop': did you mean 'demo-clip'"),
        ("compare_with", ["demo-clip", "plop"], ValueError, "unknown model 'plop': did you mean 'plip'"),
        ("model", "local-dir:/no/such", FileNotFoundError, "no folder /no/such for the model 'local-dir:/no/such'"),
        ("model", "PLIP", ValueError, r"unknown model 'PLIP': did you mean 'plip'\? Known"),
        (
            "model",
            "/no/such",
            ValueError,
            "unknown model '/no/such':.* A folder on this computer is local-dir:/no/such",
        ),
        (
            "model",
            "vinid/plip",
            ValueError,
            r"did you mean 'plip'\? A repository on the hub is hf:vinid/plip, a folder",
        ),
        ("model", "python:os:getcwd", ValueError, r"must take the call getcwd\(entry, weights_dir=..., offline=...\)"),
        ("model", "medclip-vit", FileNotFoundError, "'medclip-vit' are not .*\n.*fetch_weights.py medclip-vit"),
        ("dataset", "phantom/blod", ValueError, "unknown data set 'phantom/blod'. Did you mean 'phantom/blood'"),
        ("compare", ["phantom/octt"], ValueError, "unknown data set 'phantom/octt'. Did you mean 'phantom/oct'"),
        ("dataset", "folder:/no/such", FileNotFoundError, "no folder at /no/such"),
        ("dataset", "csv:/no/such.csv", FileNotFoundError, "no CSV file at /no/such.csv"),
        ("words", "phantom/oct", ValueError, "like='phantom/oct' is for folder: and csv: data; phantom/blood has"),
        ("dataset", "medmnist/oct", FileNotFoundError, "download_medmnist.py oct"),
        ("n_images", 721, ValueError, "parameter n_images=721: the test split of phantom/blood has 720 images"),
    ],
)
def test_values_that_cannot_work_are_refused_before_a_kernel_starts(
    studies, tmp_path, monkeypatch, name, value, error, message
):
    monkeypatch.setenv("MEDROBUST_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("MEDROBUST_WEIGHTS", str(tmp_path / "weights"))
    monkeypatch.setattr("papermill.execute_notebook", lambda *_, **__: pytest.fail("a kernel was started"))
    with pytest.raises(error, match=message):
        run_notebooks(studies, {name: value}, tmp_path / "out", announce=lambda _: None)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("vlm", "error", "message"),
    [
        ("llava-1.6", ValueError, "unknown vision-language model 'llava-1.6'.*'llava-1.6-vicuna-7b'"),
        ("qwen2-vl-2b", FileNotFoundError, "'qwen2-vl-2b' are not .*\n.*fetch_weights.py qwen2-vl-2b"),
        ("hf:no-one/nothing", FileNotFoundError, "'hf:no-one/nothing' are not .*\n *hf download no-one/nothing$"),
        (
            "local-dir:/no/such",
            FileNotFoundError,
            "cannot load 'local-dir:/no/such': /no/such lacks config.json and model weights",
        ),
        ("Demo-VLM", ValueError, "unknown vision-language model 'Demo-VLM': did you mean 'demo-vlm'"),
        ("me/mine", ValueError, "A repository on the hub is hf:me/mine"),
        ("plip", ValueError, r"'plip' is a dual encoder .*load_model\('plip'\)"),
    ],
)
def test_generative_models_that_cannot_be_loaded_are_refused(
    tmp_path, write_notebook, monkeypatch, vlm, error, message
):
    monkeypatch.setenv("MEDROBUST_WEIGHTS", str(tmp_path / "weights"))
    path = write_notebook(tmp_path, "01_a", parameters='vlm: str = "demo-vlm"  # model id\n')
    with pytest.raises(error, match=message):
        parameters.assign_parameters({"01": path}, {"vlm": vlm})
    assert parameters.assign_parameters({"01": path}, {"vlm": "demo-vlm"}) == {"01": {"vlm": "demo-vlm"}}


@pytest.fixture
def generative(tmp_path, write_notebook):
    cell = 'vlm: str = "demo-vlm"  # id\nn: int = 100  # draws\nsigma: float = 0.25  # noise\njudge: str = ""  # URL\n'
    return {"01": write_notebook(tmp_path, "01_a", parameters=cell)}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("n", 9, "parameter n=9: so few draws certify nothing at alpha 0.001; give 10 or more"),
        ("sigma", 64.0, "parameter sigma=64.0: give 10 or less"),
        ("judge", "http://localhost:8000/v1/chat/completions", r"parameter judge: model=''.*http\(s\)://ADDRESS#MODEL"),
        ("judge", "http://localhost:8000/v1/chat/completions# ", "parameter judge: model=' '"),
        ("judge", "gpt", r"parameter judge: url='gpt'.*http\(s\)://ADDRESS#MODEL"),
        ("judge", "ftp://localhost/#m", "parameter judge: url='ftp://localhost/'"),
        ("judge", "http:///v1#m", "parameter judge: url='http:///v1'"),
    ],
)
def test_values_that_certify_no_generative_model_are_refused(generative, name, value, message):
    with pytest.raises(parameters.ParameterError, match=message):
        parameters.assign_parameters(generative, {name: value})


def test_values_that_can_certify_a_generative_model_pass(generative, tmp_path, write_notebook):
    given = {"n": 10, "sigma": 10, "judge": "https://localhost/v1/chat/completions#me/model"}
    assert parameters.assign_parameters(generative, given) == {"01": given}
    assert parameters.assign_parameters(generative, {"judge": ""}) == {"01": {"judge": ""}}
    other = {"02": write_notebook(tmp_path, "02_b", parameters="n: int = 5  # of anything\n")}
    assert parameters.assign_parameters(other, {"n": 2}) == {"02": {"n": 2}}


def test_scenarios_of_questions_are_data_sets_too(tmp_path, write_notebook, monkeypatch):
    monkeypatch.setenv("MEDROBUST_DATA", str(tmp_path))
    cell = 'dataset: str = "phantom/blood"  # data set\nn_images: int = 5  # how many\n'
    path = write_notebook(tmp_path, "01_a", parameters=cell)
    with pytest.raises(FileNotFoundError, match=r"mm-safetybench/01 is not on .*\n.*download_mm_safetybench"):
        parameters.assign_parameters({"01": path}, {"dataset": "mm-safetybench/01"})
    folder = tmp_path / "mm-safetybench"
    name = "01-Illegal_Activitiy"
    (folder / "processed_questions").mkdir(parents=True)
    entries = {str(number): {"Rephrased Question(SD)": f"made-up question {number}"} for number in range(3)}
    (folder / "processed_questions" / f"{name}.json").write_text(json.dumps(entries))
    (folder / "imgs" / name / "SD").mkdir(parents=True)
    for number in range(3):
        Image.new("RGB", (16, 16)).save(folder / "imgs" / name / "SD" / f"{number}.jpg")
    given = {"dataset": "mm-safetybench/01"}
    assert parameters.assign_parameters({"01": path}, given)["01"] == given | {"n_images": 3}
    with pytest.raises(parameters.ParameterError, match="n_images=4: the test split of mm-safetybench/01 has 3"):
        parameters.assign_parameters({"01": path}, given | {"n_images": 4})


def test_values_that_can_work_pass_unchanged(studies):
    given = {
        "model": "demo-clip", "compare_with": ["available"], "dataset": "phantom/chest", "compare": [],
        "n_images": 720, "n_draws": [1], "sigmas": [0.0, 1.0], "template": "a {}.",
    }  # fmt: skip
    assert parameters.assign_parameters(studies, given) == {"01": given}


def test_relative_paths_are_those_of_the_caller_not_of_the_notebooks_folder(studies, tmp_path, monkeypatch):
    for name in ("ape", "bee"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "mine" / name / "1.png")
    monkeypatch.chdir(tmp_path)
    given = {"dataset": "folder:mine", "n_images": 2, "compare": ["folder:./mine"]}
    here = f"folder:{tmp_path / 'mine'}"
    assert parameters.assign_parameters(studies, given)["01"] == {"dataset": here, "n_images": 2, "compare": [here]}


def test_a_data_set_smaller_than_the_default_is_taken_whole(studies, tmp_path):
    for name in ("ape", "bee"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16)).save(tmp_path / name / "1.png")
    given = {"dataset": f"folder:{tmp_path}"}
    assert parameters.assign_parameters(studies, given)["01"] == given | {"n_images": 2}
    assert parameters.assign_parameters(studies, {"dataset": "phantom/oct"})["01"] == {"dataset": "phantom/oct"}


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("n_images", "many", "a whole number"),
        ("n_images", 2.5, "a whole number"),
        ("n_images", True, "a whole number"),
        ("fast", 1, "true or false"),
        ("sigma", "loud", "a number"),
        ("sigmas", None, r"a list of numbers, such as \[0.1, 0.25\]"),
        ("sigmas", ["a"], "a number"),
        ("model", None, "text"),
    ],
)
def test_wrong_type_is_refused_before_anything_runs(notebooks, name, value, wanted):
    with pytest.raises(parameters.ParameterError, match=rf"parameter {name}(\[0\])?=.*: give {wanted}"):
        parameters.assign_parameters(notebooks, {name: value})


def test_int_is_welcome_where_float_is_wanted(notebooks):
    assert parameters.assign_parameters(notebooks, {"sigma": 1, "sigmas": [0, 1]})["01"] == {
        "sigma": 1,
        "sigmas": [0, 1],
    }


# own images and models


@pytest.fixture
def own(tmp_path, write_notebook):
    """A notebook for own images, and a folder of two classes with two images each."""
    for name in ("lesion", "healthy"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (16, 16)).save(tmp_path / "mine" / name / f"{number}.png")
    cell = """model: str = "demo-clip"  # id
dataset: str = ""  # folder or csv
words: str = ""  # of the classes
n_images: int = 60  # how many
fraction: float = 1.0  # share
"""
    return {"07": write_notebook(tmp_path, "07_own", parameters=cell)}


def test_own_images_are_found_and_their_words_checked_before_a_kernel_starts(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    here = f"folder:{tmp_path / 'mine'}"
    assert parameters.assign_parameters(own, {"dataset": "folder:mine"})["07"] == {"dataset": here, "n_images": 4}
    given = {"dataset": here, "n_images": 3, "words": "{class_names: {lesion: a lesion, healthy: no lesion}}"}
    assert parameters.assign_parameters(own, given)["07"] == given
    # The notebook's own example is not a data set of the registry.
    assert parameters.assign_parameters(own, {"dataset": "", "fraction": 0.5})["07"] == {"dataset": "", "fraction": 0.5}


def test_words_reach_the_kernel_as_text_from_a_file_of_parameters_and_as_an_absolute_path(own, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = {"class_names": {"lesion": "a lesion: raised", "healthy": "skin"}, "templates": ["a picture of {}."]}
    (tmp_path / "words.yaml").write_text(yaml.safe_dump(words))
    (tmp_path / "p.yaml").write_text(yaml.safe_dump({"dataset": "folder:mine", "words": words}))
    given = parameters.assign_parameters(own, parameters.parse_parameters([], tmp_path / "p.yaml"))["07"]
    assert yaml.safe_load(given["words"]) == words
    given = parameters.assign_parameters(own, {"dataset": "folder:mine", "words": "words.yaml"})["07"]
    assert given["words"] == str(tmp_path / "words.yaml")


def test_class_folders_may_be_called_yes_and_01(own, tmp_path):
    for name in ("yes", "01"):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "set" / name / "0.png")
    typed = [f"dataset=folder:{tmp_path / 'set'}", "words={class_names: {yes: a polyp: raised, 01: none}}"]
    with pytest.raises(ValueError, match="no valid YAML.*in quotes"):
        parameters.assign_parameters(own, parameters.parse_parameters(typed))
    typed[1] = "words={class_names: {yes: 'a polyp: raised', 01: none}}"
    given = parameters.assign_parameters(own, parameters.parse_parameters(typed))["07"]
    assert given["words"] == typed[1].removeprefix("words=")


def test_an_id_alone_can_say_what_the_classes_are_called_and_who_the_patients_are(tmp_path):
    for name in ("lesion", "healthy"):
        (tmp_path / "mine" / name / "anna").mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "mine" / name / "anna" / "0.png")
    words = {"class_names": {"lesion": "a lesion? " + 300 * "x", "healthy": "skin & hair"}, "templates": ["{}!"]}
    id = parameters.stated_id(f"folder:{tmp_path / 'mine'}?fit=pad", words=words, group="none")
    data = load_dataset(parameters.absolute_ids("dataset", id))
    assert (data.classes, data.templates) == (("skin & hair", "a lesion? " + 300 * "x"), ("{}!",))
    assert data.groups == () and data.id == "folder:mine?fit=pad"
    assert parameters.stated_id("phantom/blood", words="", group=None) == "phantom/blood"
    with pytest.raises(parameters.ParameterError, match="words: phantom/blood is not yours"):
        parameters.stated_id("phantom/blood", words=words)


def test_what_is_stated_behind_a_path_is_told_from_a_name_with_a_question_mark(tmp_path, own_images, monkeypatch):
    shutil.copytree(own_images / "test", tmp_path / "why?")
    monkeypatch.chdir(tmp_path)
    id = parameters.stated_id(f"folder:{tmp_path}/why?", group="none")
    assert id == f"folder:{tmp_path}/why??group=none"
    assert parameters.absolute_ids("dataset", "folder:why??group=none") == id
    assert (load_dataset(id).id, shown_id(id)) == ("folder:why?", "folder:why?")
    assert shown_id("folder:/tmp/x?group=none&bit_depth=12") == "folder:x?bit_depth=12"
    assert shown_id("folder:/tmp/x?fit=pad&words=/tmp/w.yaml") == "folder:x?fit=pad"
    assert shown_id("folder:/tmp/x?words=/tmp/w.yaml") == "folder:x"
    assert (
        parameters.absolute_ids("dataset", "csv:a/../b.csv?words=../w.yaml") == f"csv:{tmp_path}/b.csv?words=../w.yaml"
    )
    with pytest.raises(ValueError, match="stated twice"):
        load_dataset(f"folder:{tmp_path}/why??fit=pad&fit=crop")


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"dataset": "folder:nowhere"}, FileNotFoundError, "no folder at"),
        ({"dataset": "folder:mine", "n_images": 5}, ValueError, "n_images=5: the test split of folder:.* has 4 images"),
        ({"dataset": "folder:mine", "words": "{class_names: {lesion: x}}"}, ValueError, "has no noun for 'healthy'"),
        ({"dataset": "folder:mine", "words": "{classes: {lesion: x}}"}, ValueError, "key of words 'classes'"),
        ({"words": "phantom/blood"}, ValueError, "words: name the images they are for, dataset="),
        ({"dataset": "folder:mine", "words": "nowhere.yaml"}, ValueError, "words='nowhere.yaml' is neither"),
        ({"dataset": ["folder:mine"]}, ValueError, r"dataset=\['folder:mine'\]: give text"),
        ({"fraction": 0}, ValueError, "parameter fraction=0.0: give a share above 0 and up to 1"),
        ({"fraction": 1.5}, ValueError, "parameter fraction=1.5: give a share above 0"),
        ({"model": "hf:clip"}, ValueError, "'hf:clip' names no repository on the hub"),
        ({"model": "hf:no-one/nothing"}, FileNotFoundError, "'hf:no-one/nothing' are not .*\n *hf download no-one"),
        ({"model": "local-dir:mine"}, FileNotFoundError, "mine holds no open_clip_config.json"),
    ],
)
def test_own_images_and_models_that_cannot_work_are_refused(own, tmp_path, monkeypatch, given, error, message):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MEDROBUST_WEIGHTS", str(tmp_path / "weights"))
    with pytest.raises(error, match=message):
        parameters.assign_parameters(own, given)


def write_model(folder, **configuration):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(configuration))
    for name in ("model.safetensors", "tokenizer.json"):
        (folder / name).touch()
    return folder


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Snapshot folder of hf:me/mine in a hub cache of its own."""
    cache, revision = tmp_path / "hub", 40 * "a"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    (cache / "models--me--mine" / "refs").mkdir(parents=True)
    (cache / "models--me--mine" / "refs" / "main").write_text(revision)
    return cache / "models--me--mine" / "snapshots" / revision


@pytest.mark.parametrize("place", ["hub", "folder"])
def test_a_model_of_the_other_kind_is_pointed_out_before_a_kernel_starts(own, hub, generative, place):
    def kind(model_type):
        for old in hub.glob("*"):
            old.unlink()
        if hub.is_dir():
            hub.rmdir()
        write_model(hub, model_type=model_type)
        return "hf:me/mine" if place == "hub" else f"local-dir:{hub}"

    with pytest.raises(
        FileNotFoundError, match=r"cannot load .* lacks preprocessor_config\.json; it holds config\.json"
    ):
        parameters.assign_parameters(own, {"model": kind("clip")})
    with pytest.raises(ValueError, match=r"is a CLIP and writes no text: load it with load_model\("):
        parameters.assign_parameters(generative, {"vlm": kind("clip")})
    with pytest.raises(ValueError, match=r"has model_type 'llava'. It writes text: load it with load_vlm\("):
        parameters.assign_parameters(own, {"model": kind("llava")})
    assert parameters.assign_parameters(generative, {"vlm": kind("llava")}) == {"01": {"vlm": kind("llava")}}
    with pytest.raises(FileNotFoundError, match=r"cannot load .* lacks preprocessor_config\.json"):
        parameters.assign_parameters(own, {"model": kind("siglip")})
    with pytest.raises(ValueError, match="has model_type 'xclip'. It reads videos"):
        parameters.assign_parameters(own, {"model": kind("xclip")})
