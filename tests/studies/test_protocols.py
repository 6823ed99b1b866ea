"""The papers' tables as commands."""

import shutil
import warnings

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import beta, norm
from typer.testing import CliRunner

from medrobust_lib import cli
from medrobust_lib.data.published import load_published
from medrobust_lib.data.registry import load_dataset
from medrobust_lib.models.loading import load_model
from medrobust_lib.places import project_root
from medrobust_lib.smoothing.noise import NoiseStream, noisy_copies
from medrobust_lib.studies.cells import estimate_cells
from medrobust_lib.studies.execute import run_study
from medrobust_lib.studies.protocols import EXPECTED, list_protocols, read_protocol
from medrobust_lib.studies.reproduction import (
    AGREES,
    DIFFERS,
    LAYOUTS,
    NO_NUMBER,
    _judged,
    compare_with_published,
    in_the_papers_layout,
    write_reproduction,
)
from medrobust_lib.studies.steps import StudyError

NAMES = sorted(path.stem for path in (project_root() / "protocols").glob("*.yaml"))
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*before anything is measured")


def quiet(line):
    pass


@pytest.mark.parametrize("name", NAMES)
def test_every_protocol_is_read_says_what_differs_and_has_a_demo_that_can_run(name):
    protocol = read_protocol(name)
    published = protocol.published
    assert protocol.cells() and published.deviations and published.layout in LAYOUTS
    assert {one.expect for one in published.deviations} <= set(EXPECTED)
    ids = {*protocol.study.models, *protocol.study.datasets}
    methods = {method.method for step in protocol.study.steps for method in getattr(step, "methods", ())}
    assert set(published.names) <= ids | methods, "a name in the protocol stands for nothing"
    demo = read_protocol(name, demo=True)
    demo.check()
    assert demo.missing() == [] and {cell.what for cell in demo.cells()} == {cell.what for cell in protocol.cells()}


@pytest.mark.parametrize("name", NAMES)
def test_every_protocol_is_priced(name, monkeypatch):
    monkeypatch.setattr("medrobust_lib.studies.cells.encodings_per_second", lambda model, dataset, *, dtype: 100.0)
    monkeypatch.setattr("medrobust_lib.studies.cells.answers_per_second", lambda cell: 10.0)
    monkeypatch.setattr("medrobust_lib.studies.cells._seconds_to_corrupt", lambda dataset, suite: 0.01)
    protocol = read_protocol(name, demo=True)
    for estimate in estimate_cells(protocol.study, protocol.cells()):
        assert estimate.draws > 0 and estimate.seconds > 0 and estimate.size > 0


def test_the_price_of_the_papers_table_is_its_draws(monkeypatch):
    """500 images at four noise levels: 10,100 draws each, twice with two denoisers, and what is learned and adapted."""
    monkeypatch.setattr("medrobust_lib.studies.cells.encodings_per_second", lambda model, dataset, *, dtype: 100.0)
    protocol = read_protocol("promptsmooth-table2", only=["model=plip", "dataset=pathology/kather"])
    denoised, prompts = (
        sum(
            one.draws for one in estimate_cells(protocol.study, [cell for cell in protocol.cells() if cell.number == n])
        )
        for n in (1, 2)
    )
    assert denoised == 4 * 500 * 2 * 10_100
    assert prompts == 4 * (500 * (10_100 + 100) + 2 * 9 * 16 * 16)


def test_a_protocol_without_its_weights_and_data_is_priced_in_draws(monkeypatch, tmp_path):
    for variable in ("MEDROBUST_WEIGHTS", "MEDROBUST_DATA", "HF_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    monkeypatch.setattr("medrobust_lib.studies.cells._seconds_to_corrupt", lambda dataset, suite: 0.01)
    for name, draws in (("robustmedclip-tables-2-3", 5 * 36 * 11_340), ("oracle-smoothing-draws", 3 * 1_680 * 1_010)):
        protocol = read_protocol(name)
        estimates = estimate_cells(protocol.study, protocol.cells())
        assert sum(one.draws for one in estimates) == draws
        assert {one.seconds for one in estimates} == {None}


PARTS = {  # of each paper one, so small that all of them take seconds
    "promptsmooth-table4": {"n_images": 4, "n": 30},
    "robustmedclip-table6": {"n_images": 6},
    "oracle-smoothing-draws": {"n_images": 2, "n": [10, 20]},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder of protocols with fewer images and draws in their demo, and fewer adapted models."""
    folder = tmp_path_factory.mktemp("protocols")
    for name, less in PARTS.items():
        given = yaml.safe_load((project_root() / "protocols" / f"{name}.yaml").read_text(encoding="utf-8"))
        given["reproduces"]["demo"]["settings"] |= less
        if name == "robustmedclip-table6":
            first, *_, last = [step for step in given["steps"] if "adapt" in step]
            given["steps"][-1]["benchmark"]["models"] = ["clip-vit-b16", first["adapt"]["name"], last["adapt"]["name"]]
            given["steps"] = [first, last, given["steps"][-1]]
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run_once(small, tmp_path_factory):
    """Each of them run in this process, with its folder."""
    out = tmp_path_factory.mktemp("once")
    found = {}
    for name in PARTS:
        protocol = read_protocol(name, demo=True, folder=small)
        with warnings.catch_warnings(action="ignore"):  # one epoch on few images helps nobody
            finished = run_study(protocol.study, out / name, cells=protocol.cells(), announce=quiet)
        assert finished.failures == {}
        write_reproduction(protocol, out / name, finished.failures)
        found[name] = protocol, out / name
    return found


@pytest.mark.parametrize("name", PARTS)
def test_a_demo_writes_the_table_every_number_and_a_page_that_says_demo(run_once, name):
    protocol, folder = run_once[name]
    table, page = pd.read_csv(folder / "comparison.csv"), (folder / "reproduction.html").read_text(encoding="utf-8")
    assert "<strong>DEMO.</strong>" in page and "Phantoms are drawings" in page
    for one in protocol.published.deviations:
        assert one.expect in page
    assert set(table["verdict"]) <= {"not published", "not measured"}  # no phantom is in a paper
    assert (folder / "table.csv").is_file() and (folder / "index.html").is_file()


def test_adapted_models_stand_beside_the_reference_with_hours_and_parameters(run_once):
    _, folder = run_once["robustmedclip-table6"]
    table = pd.read_csv(folder / "comparison.csv").set_index(["dataset", "model", "column", "measure"])["ours"]
    reference = table.xs(("demo-clip", "mean", ERROR), level=("model", "column", "measure")).dropna()
    assert len(reference) and (reference == 100).all()
    trained = table.xs(("trained parameters", "millions"), level=("column", "measure"))
    assert (trained > 0).all() and trained.index.get_level_values("model").nunique() == 2


ERROR = "percent of the reference's error"


def test_fewer_draws_are_told_relative_to_the_most(run_once):
    _, folder = run_once["oracle-smoothing-draws"]
    table = pd.read_csv(folder / "comparison.csv", dtype={"column": str}).query("dataset == 'all'")
    shares = table.set_index(["column", "measure"])["ours"]
    assert shares["20", "radius relative to the most draws"] == 1
    # All answers of an image agree or not: never more radius from fewer draws.
    assert shares["10", "mean radius"] <= shares["20", "mean radius"]
    assert shares["10", "seconds a question"] / shares["20", "seconds a question"] == pytest.approx(15 / 25)


def kept_bytes(folder):
    """Every table of a folder, those of the study and of its cells."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*.csv"))}


def test_killed_at_random_moments_and_resumed_the_tables_are_the_same_bytes(run_once, tmp_path):
    """A cell is killed between two images, and one before it has a card."""
    protocol, folder = run_once["promptsmooth-table4"]
    draw, out = np.random.default_rng(0), tmp_path / "out"
    shutil.copytree(folder, out)
    expected = kept_bytes(folder)
    for journal in sorted(out.glob("cells/*/store/journal.jsonl")):
        content = journal.read_bytes()
        journal.write_bytes(content[: int(draw.integers(1, len(content)))])  # in the middle of a line
        for name in ("cards", "figures"):
            shutil.rmtree(journal.parents[1] / name, ignore_errors=True)
    (out / "journal.jsonl").write_bytes(b'{"key": "01-cert')
    for path in (*out.glob("*.csv"), *out.glob("cells/*/store/table.csv")):
        path.unlink()
    finished = run_study(protocol.study, out, cells=protocol.cells(), announce=quiet)
    write_reproduction(protocol, out, finished.failures)
    assert finished.failures == {} and kept_bytes(out) == expected


def test_a_part_that_was_run_is_extended_in_the_same_folder(small, tmp_path):
    name, out = "promptsmooth-table2", tmp_path / "out"
    settings = {"n_images": 2, "n": 20, "n0": 2, "alpha": 0.05, "sigmas": [0.1], "methods": ["zero-shot"]}
    given = yaml.safe_load((project_root() / "protocols" / f"{name}.yaml").read_text(encoding="utf-8"))
    given["reproduces"]["demo"]["settings"] = settings | {"draw": "stratified"}
    (small / f"{name}.yaml").write_text(yaml.safe_dump(given, sort_keys=False), encoding="utf-8")
    part = read_protocol(name, demo=True, only=["model=demo-clip-vit", "dataset=phantom/oct"], folder=small)
    assert part.part == "model demo-clip-vit, dataset phantom/oct" and len(part.cells()) == 1
    run_study(part.study, out, cells=part.cells(), announce=quiet)
    table = write_reproduction(part, out, {})
    assert set(table["dataset"]) == {"phantom/oct"}
    assert (
        "Only a part was asked for: model demo-clip-vit, dataset phantom/oct" in (out / "reproduction.html").read_text()
    )
    more = read_protocol(name, demo=True, only=["dataset=phantom/oct"], folder=small)
    finished = run_study(more.study, out, cells=more.cells(), announce=quiet)
    assert (finished.cells, finished.done) == (2, 2)


def cohen(counts, n, alpha, sigma):
    """CERTIFY of Cohen et al. 2019, page 5, from votes of selection and of estimation."""
    selected, estimated = counts
    top = int(selected.argmax())
    p = beta.ppf(alpha, estimated[top], n - estimated[top] + 1) if estimated[top] else 0.0
    return (top, sigma * norm.ppf(p)) if p > 0.5 else (-1, 0.0)


def test_fixed_certificates_are_those_of_the_published_pseudo_code_on_the_same_noise(run_once, small, tmp_path):
    name = "promptsmooth-table4"
    given = yaml.safe_load((small / f"{name}.yaml").read_text(encoding="utf-8"))
    given["steps"][0]["certify"] |= {"methods": ["zero-shot"], "n": 50, "n0": 10, "sigmas": [0.25, 0.5]}
    given["reproduces"]["demo"]["settings"] = {"n_images": 6}
    (tmp_path / "cohen.yaml").write_text(yaml.safe_dump(given), encoding="utf-8")
    protocol = read_protocol("cohen", demo=True, folder=tmp_path)
    run_study(protocol.study, tmp_path / "out", cells=protocol.cells(), announce=quiet)
    model = load_model("demo-clip")
    data = load_dataset("phantom/histology", n=6, seed=3, draw="balanced")
    features = model.class_features(data.classes, data.templates[:1])
    tables = [pd.read_csv(path) for path in (tmp_path / "out").glob("cells/*/cards/*_certificates.csv")]
    rows = pd.concat(tables).set_index(["sigma", "image"])
    for sigma in (0.25, 0.5):
        for place, index in enumerate(data.indices):
            pixels, counts = model.prepare(data.images[place : place + 1])[0], []
            for role, number in (("select", 10), ("estimate", 50)):
                copies = noisy_copies(pixels, NoiseStream(3, data.id, int(index), sigma, role), count=number)
                answers = (model.encode_image(copies) @ features.T).argmax(1).numpy()
                counts.append(np.bincount(answers, minlength=len(data.classes)))
            predicted, radius = cohen(counts, 50, 0.001, sigma)
            row = rows.loc[(sigma, index)]
            assert (row["predicted"], row["radius"]) == (predicted, pytest.approx(radius, abs=1e-9))


def rows_of(images):
    """Certificates as a study would leave them, of so many images, for the published data set."""
    place = {"dataset": "pathology/kather", "model": "plip", "method": "zero-shot", "guarantee": "standard"}
    settings = {"sigma": 0.1, "n_classes": 9, "sampling": "fixed", "mode": "predict", "alpha": 0.001, "seed": 3}
    certified = np.arange(500) < images
    return pd.DataFrame(
        place | settings
        | {"image": np.arange(500), "label": 0, "predicted": 0, "radius": np.where(certified, 0.2, 0.05)}
        | {"radius_reach": 0.32, "draws": 10_100}
    )  # fmt: skip


def compared(folder, *tables):
    """The comparison of a folder with such certificates of the prompts of PLIP on KatherColon."""
    protocol = read_protocol("promptsmooth-table2", only=["model=plip", "dataset=pathology/kather"])
    cell = next(cell for cell in protocol.cells() if cell.number == 2)
    about = {"model": {"id": "plip"}, "dataset": {"id": cell.dataset, "n": 500}, "prompts": {}, "metrics": []}
    cell.begin(folder, "Certificates").save_card(tables={f"{cell.card_name}_certificates": pd.concat(tables)}, **about)
    return compare_with_published(protocol, folder).set_index(["column", "measure"])


@pytest.mark.parametrize(
    ("images", "verdict"), [(247, AGREES), (270, AGREES), (278, AGREES), (279, DIFFERS), (400, DIFFERS)]
)
def test_a_verdict_takes_in_the_intervals_of_both_shares(tmp_path, images, verdict):
    row = compared(tmp_path, rows_of(images)).loc[("0.1", "certified accuracy")]
    assert (row["reported"], row["ours"], row["verdict"]) == (0.494, images / 500, verdict)
    assert row["difference_low"] < row["difference"] < row["difference_high"]


def test_the_envelope_takes_the_better_noise_level_and_impossible_numbers_are_marked(tmp_path):
    found = compared(tmp_path, rows_of(100), rows_of(500).assign(sigma=0.25, radius=0.6, radius_reach=0.8))
    assert found.loc[("0.1", "certified accuracy"), "ours"] == 1.0
    assert found.loc[("0.1", "certified accuracy"), "detail"] == "sigma 0.25"
    assert found.loc[("0.5", "clean accuracy"), "remark"] == "no number of 500 images gives 28.9 %"
    assert found.loc[("0.75", "certified accuracy"), "ours"] == 0.0
    assert found.loc[("1.5", "certified accuracy"), "detail"] == "beyond the reach of the draws"


def test_shares_of_unstated_numbers_of_images_get_no_verdict():
    published = load_published("promptsmooth_table2").query("method == 'diffusion smoothing'")
    percents = 100 * published["certified_accuracy"]
    assert np.allclose(percents, percents.round())  # so they are not of 500 images
    assert "diffusion smoothing" in read_protocol("promptsmooth-table2").published.unstated
    assert NO_NUMBER == "no image number reported"


def test_the_papers_layout_prints_clean_accuracy_in_parentheses():
    keys = {"dataset": "d", "model": "m", "method": "PromptSmooth", "column": "0.1", "guarantee": "frozen-prompt"}
    table = pd.DataFrame([
        keys | {"measure": "certified accuracy", "ours": 0.5, "reported": 0.818},
        keys | {"measure": "clean accuracy", "ours": 0.75, "reported": 0.82},
    ])  # fmt: skip
    printed = in_the_papers_layout(table)
    assert printed["0.1"].tolist() == [".500 (.750)", ".818 (.820)"]
    assert printed.index.get_level_values("method").unique().tolist() == ["PromptSmooth, frozen-prompt"]


def test_sequential_sampling_is_told_among_the_deviations():
    plain, sequential = (read_protocol("promptsmooth-table2", sequential=chosen) for chosen in (False, True))
    assert {step.sampling for step in plain.study.steps} == {"fixed"}
    assert {step.sampling for step in sequential.study.steps} == {"sequential"}
    assert "Sequential" in sequential.published.deviations[0].what
    assert sequential.published.deviations[1:] == plain.published.deviations


def test_without_any_result_there_is_a_page_and_an_empty_table(tmp_path):
    for name in NAMES:
        protocol = read_protocol(name, demo=True)
        assert write_reproduction(protocol, tmp_path, {"1 certify": "OSError: <full>"}).empty
        page = (tmp_path / "reproduction.html").read_text(encoding="utf-8")
        assert "0 of" in page and "OSError: &lt;full&gt;" in page


def test_steps_are_parts_and_a_part_without_cells_is_refused():
    only = ["step=2", "dataset=pathology/pannuke"]
    assert {cell.number for cell in read_protocol("promptsmooth-table2", only=only).cells()} == {2}
    with pytest.raises(StudyError, match="has no cell of model quilt-b32, step 1"):
        read_protocol("promptsmooth-table2", only=["model=quilt-b32", "step=1"]).cells()


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("promptsmooth-table", {}, "unknown protocol 'promptsmooth-table'. Did you mean"),
        ("promptsmooth-table2", {"only": ["plip"]}, "--only 'plip': write model=ID, dataset=ID or step=NUMBER"),
        ("promptsmooth-table2", {"only": ["model=clip"]}, "--only model 'clip'; choose one of plip, quilt-b32"),
        ("promptsmooth-table2", {"only": ["dataset=kather"]}, "--only dataset 'kather'"),
    ],
)
def test_what_nobody_can_run_is_refused(name, words, message):
    with pytest.raises(ValueError, match=message):
        read_protocol(name, **words)


def test_missing_weights_and_data_are_named_with_sizes_and_commands(monkeypatch, tmp_path):
    for variable in ("MEDROBUST_WEIGHTS", "MEDROBUST_DATA", "HF_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    protocol = read_protocol("promptsmooth-table2", only=["model=plip", "dataset=pathology/kather"])
    with pytest.raises(FileNotFoundError) as error:
        protocol.check()
    told = str(error.value)
    assert "the weights of plip, about 605 MB: python data_scripts/fetch_weights.py plip" in told
    assert "pathology/kather, 107,180 images of 224 px: python data_scripts/prepare_pathology.py kather" in told


def test_a_key_that_is_none_and_a_plain_study_are_refused(tmp_path):
    (tmp_path / "mine.yaml").write_text("models: [demo-clip]\ndatasets: [phantom/oct]\nsteps: [benchmark]\n")
    with pytest.raises(StudyError, match="run it with `medrobust study`"):
        read_protocol("mine", folder=tmp_path)


SAYS = {"paper": "p", "table": "t", "title": "x", "layout": "certified accuracy", "deviations": []}
CERTIFY = {"certify": {"sigmas": [0.1], "n": 20, "alpha": 0.05}}
CONTRAST = {"certify": CERTIFY["certify"] | {"perturbation": "contrast"}}


@pytest.mark.parametrize(
    ("says", "study", "message"),
    [
        ({"papr": "x"}, {}, "unknown key 'papr'; valid: paper, "),
        ({"layout": "certified acc"}, {}, "unknown layout 'certified acc'.*did you mean 'certified accuracy'"),
        ({"title": ["x"]}, {}, "title"),
        ({"images": "many"}, {}, "images='many': give a whole number"),
        ({"images": -5}, {}, "images=-5"),
        ({"names": ["a"]}, {}, "names=.*a mapping of names"),
        ({"names": {"a": "x", "b": "x"}}, {}, "two of ours are called 'x'"),
        ({"deviations": "none"}, {}, "write a list of {what: ..., expect: ...}"),
        ({"deviations": [{"what": "x"}]}, {}, "deviations: expect is missing"),
        ({"deviations": [{"what": "x", "expect": "less"}]}, {}, "unknown expect 'less'"),
        ({"demo": {"word": {}}}, {}, "demo: .*it has words and settings"),
        ({"demo": {"words": {"plip": "demo-clip"}}}, {}, "words: 'plip' stands nowhere"),
        ({"demo": {"settings": {"n_imagez": "3"}}}, {}, "n_imagez.*did you mean 'n_images'"),
        ({"layout": "numbers of draws"}, {}, "is made of questions steps, and there is none"),
        ({}, {"seeds": [0, 1]}, r"seeds: \[0, 1\]; a table is of one seed"),
        ({"layout": "times"}, {}, "of times, each certify step has one method and one noise level"),
        ({}, {"steps": [CERTIFY, CONTRAST]}, "certificates are for pixel noise, and a step's are for contrast"),
        (
            {"layout": "certified accuracy, not published"},
            {"steps": [CERTIFY, CONTRAST]},
            "several perturbations are in units of their own",
        ),
    ],
)
def test_what_a_protocol_says_is_checked_before_anything_runs(tmp_path, says, study, message):
    given = {"reproduces": SAYS | says, "models": ["demo-clip"], "datasets": ["phantom/oct"], "steps": [CERTIFY]}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(given | study, sort_keys=False))
    with pytest.raises(ValueError, match=f"(?s){message}"):
        read_protocol("mine", folder=tmp_path, demo=True)


def test_a_radius_that_nobody_asked_for_is_not_called_beyond_reach(tmp_path):
    asked = {"n": 60, "n0": 5, "sampling": "sequential", "sigmas": [0.1], "methods": ["zero-shot"]}
    steps = [
        {"certify": asked | {"radii": [0.05]}},
        {"certify": asked | {"radii": [0.1], "methods": ["zero-shot ensemble"]}},
    ]
    given = {"reproduces": SAYS, "models": ["demo-clip"], "datasets": ["phantom/oct"], "n_images": 3, "steps": steps}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(given, sort_keys=False))
    protocol = read_protocol("mine", folder=tmp_path)
    run_study(protocol.study, tmp_path / "out", announce=quiet)
    found = compare_with_published(protocol, tmp_path / "out").set_index(["method", "column", "measure"])
    assert found.loc[("zero-shot", "0.1", "certified accuracy"), "detail"] == "not asked for"
    assert found.loc[("zero-shot ensemble", "0.1", "certified accuracy"), "detail"] == "sigma 0.1"


@pytest.mark.parametrize("rows", [0, 2], ids=["in a line", "some rows"])
def test_a_cut_table_is_no_smaller_study(run_once, tmp_path, rows):
    protocol, folder = run_once["promptsmooth-table4"]
    shutil.copytree(folder, tmp_path / "out")
    (path,) = (tmp_path / "out").glob("cells/*/cards/*_certificates.csv")
    content = path.read_bytes()
    path.write_bytes(b"".join(content.splitlines(keepends=True)[:-rows]) if rows else content[:-9])
    with pytest.raises(ValueError, match=r"_certificates.csv is damaged; delete .*, and the same command makes"):
        write_reproduction(protocol, tmp_path / "out", {})
    path.unlink()
    finished = run_study(protocol.study, tmp_path / "out", cells=protocol.cells(), announce=quiet)
    assert finished.failures == {} and path.read_bytes() == content


def test_lost_times_leave_a_dash(run_once, tmp_path):
    protocol, folder = run_once["oracle-smoothing-draws"]
    shutil.copytree(folder, tmp_path / "out")
    for number, path in enumerate((tmp_path / "out").glob("cells/*/times.json")):
        path.write_text('{"training": "x"}' if number else "{")
    table = write_reproduction(protocol, tmp_path / "out", {}).set_index("measure")["ours"]
    assert table["seconds a question"].isna().all() and table["mean radius"].notna().all()


def test_a_ratio_of_errors_is_as_uncertain_as_ours():
    protocol = read_protocol("robustmedclip-tables-2-3")
    row = {"measure": ERROR, "column": "mean", "n": 156, "ours": 105.0, "low": 92.0, "high": 119.0, "remark": ""}
    for reported, verdict in ((121.0, AGREES), (130.0, DIFFERS)):
        (one,) = pd.DataFrame([row | {"reported": reported, "method": ""}]).itertuples()
        assert _judged(one, protocol)["verdict"] == verdict


def test_the_base_model_stands_for_what_was_adapted_from_it():
    cells = read_protocol("robustmedclip-table6", only=["model=biomedclip", "dataset=medimeta/pbc"]).cells()
    assert {cell.base for cell in cells} == {"biomedclip", "clip-vit-b16"}
    with pytest.raises(StudyError, match="certifies nothing by votes"):
        read_protocol("robustmedclip-table6", sequential=True)


def test_the_command_lists_protocols_and_what_is_missing(monkeypatch, tmp_path):
    for variable in ("MEDROBUST_WEIGHTS", "MEDROBUST_DATA", "HF_HOME"):
        monkeypatch.setenv(variable, str(tmp_path))
    shown = CliRunner().invoke(cli.app, ["reproduce"])
    assert shown.exit_code == 0
    for protocol in list_protocols():
        assert protocol.name in shown.output
    assert "python data_scripts/fetch_weights.py plip" in shown.output


def test_the_command_runs_a_demo_prices_it_and_prints_the_table(monkeypatch, tmp_path, small):
    monkeypatch.setattr("medrobust_lib.studies.protocols.protocols_folder", lambda: small)
    asked = ["reproduce", "promptsmooth-table4", "--demo", "--out", str(tmp_path / "out")]
    priced = CliRunner().invoke(cli.app, [*asked, "--dry-run"])
    assert priced.exit_code == 0 and "Nothing was run or written" in priced.output and not (tmp_path / "out").exists()
    shown = CliRunner().invoke(cli.app, asked)
    assert shown.exit_code == 0, shown.output
    assert "DEMO: synthetic phantoms" in shown.output and "1 of 1 cells are done" in shown.output
    assert str(tmp_path / "out" / "reproduction.html") in shown.output.replace("\n", "")
