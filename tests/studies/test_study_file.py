import pytest

from medrobust_lib.parameters import ParameterError
from medrobust_lib.studies.benchmark_step import BenchmarkStep
from medrobust_lib.studies.cells import study_cells
from medrobust_lib.studies.certify_step import CertifyStep
from medrobust_lib.studies.notebook_step import NotebookStep
from medrobust_lib.studies.steps import StudyError
from medrobust_lib.studies.study_file import read_study

CERTIFY = "steps: [{certify: {sigmas: [0.1], "
HEAD = "models: [demo-clip]\ndatasets: [phantom/chest]\nn_images: 4\n"


def test_a_study_has_the_defaults_of_the_functions_it_calls(study_file):
    study = read_study(study_file(HEAD + "steps:\n  - certify: {sigmas: 0.25}\n  - benchmark\n"))
    assert study.name == "tiny"
    assert study.seeds == (0,)
    certify, benchmark = study.steps
    assert certify == CertifyStep(sigmas=(0.25,), n0=100, n=10_000, alpha=0.001, sampling="sequential", mode="predict")
    assert benchmark == BenchmarkStep(suite="medimeta-c", severities=(1, 2, 3, 4, 5))


def test_numbers_are_written_as_people_write_them(study_file):
    steps = "steps: [{certify: {sigmas: [1e-1], n: 1e4, alpha: 1e-3}}]\n"
    text = HEAD.replace("4", "1e1") + "name: 01\nseeds: 010\n" + steps
    study = read_study(study_file(text))
    assert (study.name, study.n_images, study.seeds) == ("01", 10, (10,))
    assert study.steps == (CertifyStep(sigmas=(0.1,), n=10_000, alpha=0.001),)


def test_a_notebook_may_be_written_as_a_number_and_repeats_only_over_what_it_has(study_file, notebooks):
    text = "models: [demo-clip]\ndatasets: [phantom/chest, phantom/blood]\nseeds: [0, 1]\nsteps:\n  - notebook: 01\n"
    study = read_study(study_file(text + "    parameters: {sigma: 0.5}\n"), notebooks=notebooks)
    assert study.steps == (NotebookStep(notebook="01", parameters={"sigma": 0.5}),)
    (cell,) = study_cells(study, notebooks=notebooks)  # it has a model, and neither data set nor seed
    assert cell.parameters == {"model": "demo-clip", "sigma": 0.5}
    assert (cell.model, cell.dataset, cell.seed) == ("demo-clip", "", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEAD + "step: []\n", r"unknown key 'step'; valid: steps, "),
        (HEAD, r"steps is missing"),
        (HEAD + "steps: []\n", r"steps is a list of one or more of: certify, benchmark, adapt, questions, notebook"),
        (HEAD + "steps: [{certfy: {}}]\n", r"step 1: unknown step 'certfy'; there are certify, "),
        (HEAD + "steps: [{certify: {sigma: [0.1]}}]\n", r"step 1, certify: unknown key 'sigma'; valid: sigmas, "),
        (HEAD + "steps: [{certify: {n: 100}}]\n", r"certify: sigmas is missing; it takes a list of numbers"),
        (HEAD + "steps: [{certify: {sigmas: [0.1], n: 1.5}}]\n", r"n='1.5': give a whole number"),
        (HEAD + "steps: [{certify: {sigmas: [0.1], n: true}}]\n", r"n='true': give a whole number"),
        (HEAD + "steps: [{certify: {sigmas: [64]}}]\n", r"step 1, certify: sigma=64.*divide .* by 255"),
        (HEAD + "steps: [{certify: {sigmas: [0.1], n: 5}}]\n", r"n=5 draws can never certify at alpha=0.001"),
        (HEAD + "steps: [{certify: {sigmas: [0.1], sampling: seq}}]\n", r"sampling='seq': give one of fixed, "),
        (HEAD + "steps: [{certify: {sigmas: [0.1], bounds: three}}]\n", r"bounds='three': give one of one, two"),
        (HEAD + CERTIFY + "mode: evaluate, bounds: two, n0: 0}}]\n", r"n0=0 .*one draw chooses between one bound"),
        (HEAD + "steps: [{certify: {sigmas: [0.1], radii: [-1]}}]\n", r"radii are 0 or more"),
        (HEAD + CERTIFY + "methods: [coop]}}]\n", r"method 'coop'.*CoOp"),
        (HEAD + CERTIFY + "methods: [{CoOp: {shots: 0}}]}}]\n", r"step 1, certify: methods: shots=0"),
        (HEAD + CERTIFY + "methods: [{CoOp: {shot: 4}}]}}]\n", r"methods, CoOp: unknown key 'shot'"),
        (HEAD + CERTIFY + "methods: [{CoOp: {tunable: 2}}]}}]\n", r"tunable=2 means nothing to"),
        (HEAD + CERTIFY + "methods: [CoOp, CoOp]}}]\n", r"two methods are called 'CoOp'"),
        (HEAD + CERTIFY + "methods: [{CoOp: {}, zero-shot: {}}]}}]\n", r"write a name, or {NAME: "),
        (HEAD + CERTIFY + "n_by_sigma: {0.2: 50}}}]\n", r"n_by_sigma: 0.2 is none of sigmas"),
        (HEAD + CERTIFY + "n_by_sigma: {0.1: 5}}}]\n", r"n=5 draws can never certify"),
        (HEAD + CERTIFY + "perturbation: contrst}}]\n", r"unknown perturbation 'contrst'.*did you mean 'contrast'"),
        (HEAD + CERTIFY + "perturbation: contrast-brightness}}]\n", r"takes pairs of sigmas.* call certify_dataset"),
        (HEAD + "steps: [{certify: {sigmas: [25], perturbation: contrast}}]\n", r"sigma=25.* log of the contrast"),
        (HEAD + "steps: [{certify: {sigmas: [200], perturbation: blur}}]\n", r"64 x 64; take sigma up to 113"),
        (HEAD + CERTIFY + "perturbation: gamma, methods: [denoised]}}]\n", r"denoised removes noise from pixels"),
        (
            HEAD + CERTIFY + "perturbation: contrast, methods: [{few-shot PromptSmooth: {sigmas: [0, 0.9]}}]}}]\n",
            r"sigma=0.9 is no number above 0 and up to 0.57",
        ),
        (HEAD + "steps: [{benchmark: {models: [plip]}}]\n", r"models of a step 'plip'"),
        (HEAD + "steps: [{benchmark: {datasets: [phantom/oct]}}]\n", r"datasets of a step 'phantom/oct'"),
        (HEAD + "steps: [{benchmark: {reference: plip}}]\n", r"reference='plip' is none of the step's models"),
        (HEAD + "steps: [{questions: {sigma: 0.1, n: 20}}]\n", r"demo-clip"),
        (HEAD + "steps: [{adapt: {name: demo-clip}}]\n", r"name: 'demo-clip' is taken"),
        (HEAD + "steps: [{adapt: {name: mine, fraction: 2}}]\n", r"fraction=2"),
        (HEAD + "dtype: int4\nsteps: [benchmark]\n", r"dtype='int4': give one of auto, .*, int8"),
        (HEAD + "dtype: int8\nsteps: [{adapt: {name: mine}}]\n", r"int8 cannot learn by 'LoRA', take float32"),
        (HEAD + "dtype: int8\n" + CERTIFY + "methods: [re-trained]}}]\n", r"int8 cannot learn \(re-trained\), take"),
        (HEAD + "steps: [{adapt: {name: mine, template: 9}}]\n", r"template: 9; phantom/chest has "),
        (HEAD + "steps: [{benchmark: {models: [mine]}}, {adapt: {name: mine}}]\n", r"models of a step 'mine'"),
        (HEAD + "steps: [{benchmark: {suite: medmeta-c}}]\n", r"unknown suite 'medmeta-c'.*did you mean 'medimeta-c'"),
        (HEAD + "steps: [{benchmark: {severities: [0]}}]\n", r"severities=\[0\]: choose from 1, 2, 3, 4, 5"),
        (HEAD + "steps: [{certify: {sigmas: [0.1]}, benchmark: {}}]\n", r"begin each step with a dash of its own"),
        (HEAD + "dtype: fp16\nsteps: [benchmark]\n", r"dtype='fp16': give one of auto, float32, "),
        (HEAD + "draw: even\nsteps: [benchmark]\n", r"draw='even': give one of stratified, balanced"),
        (HEAD.replace("n_images: 4\n", "") + "draw: balanced\nsteps: [benchmark]\n", r"draw='balanced' needs n_images"),
        (HEAD + "n_images: 5\nsteps: [benchmark]\n", r"the key 'n_images' is given twice"),
        ("datasets: [phantom/chest]\nsteps: [benchmark]\n", r"models is missing or empty; name at least one"),
        ("models: [demo-clop]\ndatasets: [phantom/chest]\nsteps: [benchmark]\n", r"did you mean 'demo-clip'"),
        ("models: [demo-clip]\ndatasets: [phantom/chst]\nsteps: [benchmark]\n", r"unknown data set 'phantom/chst'"),
        (HEAD.replace("4", "100000") + "steps: [benchmark]\n", r"n_images: 100000; the test split of phantom"),
        (HEAD + "seeds: [0, x]\nsteps: [benchmark]\n", r"seeds\[1\]='x': give a whole number"),
        (HEAD + "steps: [{notebook: '7'}]\n", r"step 1, notebook: unknown notebook '07'; there are 01"),
        (HEAD + "steps: [{notebook: '01', parameters: {sigm: 1}}]\n", r"unknown parameter 'sigm' .*valid: sigma, "),
        (HEAD + "steps: [{notebook: '01', parameters: {sigma: loud}}]\n", r"sigma='loud': give a number"),
        (HEAD + "steps: [{notebook: '01', parameters: {model: plip}}]\n", r"from the study; set `models` at the top"),
        ("- a\n", r"must hold a mapping with the keys datasets, "),
        ("a: [\n", r"is no valid YAML"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_with_the_valid_choices(study_file, notebooks, text, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_study(study_file(text), notebooks=notebooks)


def test_all_mistakes_in_writing_are_told_at_once_a_line_each(study_file, notebooks):
    text = """
    models: [demo-clip]
    datasets: [phantom/chest]
    seeds: [x]
    dtype: int4
    n_imags: 4
    steps:
      - certify: {sigmas: [a], n: 1.5, sampling: seq, methods: [coop]}
      - certfy: {}
      - benchmark: {suit: medimeta-c, severity: 1}
      - notebook: "9"
    """
    with pytest.raises(StudyError) as caught:
        read_study(study_file(text), notebooks=notebooks)
    lines = str(caught.value).splitlines()
    told = [
        "unknown key 'n_imags'", "seeds[0]='x'", "dtype='int4'", "step 1, certify: sigmas[0]='a'",
        "step 1, certify: n='1.5'", "step 1, certify: sampling='seq'", "step 1, certify: methods",
        "step 2: unknown step",
        "step 3, benchmark: unknown key 'suit'", "step 3, benchmark: unknown key 'severity'", "step 4, notebook",
    ]  # fmt: skip
    assert len(lines) == len(told)
    assert all(found in line for found, line in zip(told, lines, strict=True))


def test_all_values_that_cannot_work_are_told_at_once_and_each_once(study_file):
    text = """
    models: [demo-clip, demo-clop]
    datasets: [phantom/chst, phantom/blod, phantom/chest]
    seeds: [-1]
    n_images: 100000
    steps:
      - certify: {sigmas: [64]}
      - benchmark: {suite: medmeta-c, models: [demo-clip], datasets: [phantom/chest]}
      - benchmark: {datasets: [phantom/chest]}
    """
    with pytest.raises(StudyError) as caught:
        read_study(study_file(text))
    lines = str(caught.value).splitlines()
    for told in ("seeds: [-1]", "'phantom/chst'", "'phantom/blod'", "n_images: 100000", "'demo-clop'", "'medmeta-c'"):
        assert sum(told in line for line in lines) == 1, told
    assert len(lines) == 6  # what a step says beside its unknown model comes next


def test_one_mistake_keeps_its_kind_of_error(study_file):
    with pytest.raises(ParameterError, match=r"^[^\n]*seeds\[0\]='x'[^\n]*$"):
        read_study(study_file(HEAD + "seeds: [x]\nsteps: [benchmark]\n"))


def test_paths_in_ids_become_absolute_so_that_workers_find_them(study_file, monkeypatch, tmp_path):
    from PIL import Image

    for name in ("a", "b"):
        (tmp_path / "mine" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (64, 64), (40 * number, 0, 0)).save(tmp_path / "mine" / name / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    study = read_study(study_file("models: [demo-clip]\ndatasets: ['folder:mine']\nsteps: [benchmark]\n"))
    assert study.datasets == (f"folder:{tmp_path / 'mine'}",)


def test_parameter_errors_are_value_errors_of_the_study():
    assert issubclass(ParameterError, ValueError)
    assert issubclass(StudyError, ValueError)


def test_a_data_set_may_bring_the_words_of_its_classes_and_its_patients(study_file, own_images, tmp_path, monkeypatch):
    monkeypatch.chdir(own_images.parent)
    words = "{class_names: {a: 'a lump: harmless', b: a cancer}, templates: ['a scan of {}.']}"
    steps = "steps: [{certify: {sigmas: [0.1], n0: 5, n: 20, alpha: 0.05, radii: [0.02]}}]\n"
    text = f"models: [demo-clip]\nn_images: 4\ndatasets:\n  - {{id: 'folder:mine', words: {words}, group: none}}\n"
    study = read_study(study_file(text + "  - phantom/chest\n" + steps))
    own, chest = study_cells(study)
    assert chest.dataset == "phantom/chest"
    data = own.images()
    assert (data.classes, data.templates, data.groups) == (("a lump: harmless", "a cancer"), ("a scan of {}.",), ())
    assert own.shown == "folder:mine"
    own.run(tmp_path / "study")
    card = (own.folder(tmp_path / "study") / "cards" / "01-certify.json").read_text()
    assert '"a lump: harmless"' in card and str(own_images) not in card


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{id: 'folder:mine', words: phantom/blod}", "words='phantom/blod' is neither"),
        ("{id: phantom/chest, words: phantom/blood}", "words: phantom/chest is not yours; they are for folder:PATH"),
        ("{id: 'folder:mine', wrods: x}", "unknown key of a data set in .*'wrods'.*did you mean 'words'"),
        ("{words: phantom/blood}", "give the id, {id: folder:PATH"),
    ],
)
def test_words_of_a_data_set_that_cannot_work_are_refused(study_file, own_images, monkeypatch, given, message):
    monkeypatch.chdir(own_images.parent)
    steps = "steps: [{certify: {sigmas: [0.1]}}]\n"
    with pytest.raises(ValueError, match=message):
        read_study(study_file(f"models: [demo-clip]\ndatasets: [{given}]\n{steps}"))
