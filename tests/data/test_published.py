import pandas as pd
import pytest

from medrobust_lib.data.published import list_published, load_published
from medrobust_lib.data.registry import DATASETS
from medrobust_lib.data.wording import class_wording

BLOCK = ["collection", "dataset"]
ROWS = {
    "medmnist_c_alexnet": 50,
    "promptsmooth_table2": 49,
    "promptsmooth_table3": 40,
    "promptsmooth_table4": 8,
    "promptsmooth_table5": 9,
    "robustmedclip_readme": 5,
    "robustmedclip_table2_mce": 450,
    "robustmedclip_table3_accuracy": 400,
    "robustmedclip_table3_average": 50,
    "robustmedclip_table6": 8,
    "smoothing_vlms_draws": 4,
    "tss_imagenet": 1,
    "test_class_counts": 32,
}
NUMBERED = [name for name in ROWS if "_table" in name]


def only(table, column, **where):
    """The one value of `column` in the row that matches `where`."""
    for name, value in where.items():
        table = table[table[name] == value]
    assert len(table) == 1
    return table[column].iloc[0]


def test_every_table_is_listed_and_complete():
    assert set(list_published()) == set(ROWS)
    assert {name: len(load_published(name)) for name in ROWS} == ROWS


@pytest.mark.parametrize("name", ROWS)
def test_rows_say_where_they_come_from(name):
    table = load_published(name)
    assert set(table["status"]) == {"reported"}
    assert table["paper"].notna().all()
    assert table["table"].notna().all()
    measured = {"as_printed", *table.select_dtypes("float").columns} - {"radius", "few_shot_fraction"}
    keys = [column for column in table if column not in measured]
    assert not table.duplicated(keys).any()


@pytest.mark.parametrize("name", NUMBERED)
def test_rows_of_papers_name_the_paper_and_the_table(name):
    table = load_published(name)
    assert table["paper"].str.startswith(("PromptSmooth (", "RobustMedCLIP (")).all()
    assert set(table["table"]) == {name.split("_table")[1][0]}


@pytest.mark.parametrize("name", ROWS)
def test_accuracies_and_shares_are_fractions(name):
    table = load_published(name)
    for column in table.columns[table.columns.str.contains("accuracy|fraction|balanced_error")]:
        assert table[column].between(0, 1).all(), column
        assert table[column].max() > 0.01, column


def test_known_cells():
    two, three = load_published("promptsmooth_table2"), load_published("promptsmooth_table3")
    assert only(two, "certified_accuracy", method="PromptSmooth", radius=1.5) == 0.456
    assert only(two, "clean_accuracy", method="PromptSmooth", radius=1.5) == 0.54
    assert only(two, "certified_accuracy", method="naive prompt learning (CoOp)", radius=0.1) == 0.667
    assert only(two, "certified_accuracy", method="diffusion smoothing", radius=1.5) == 0.16
    rsna = three[three["dataset"] == "RSNA Pneumonia"]
    assert only(rsna, "certified_accuracy", method="denoised smoothing", radius=0.75) == 0.0179
    assert only(rsna, "clean_accuracy", method="zero-shot PromptSmooth", radius=0.5) == 0.334
    four = load_published("promptsmooth_table4")
    assert only(four, "certified_accuracy", initial_context="An H&E noisy image patch of", radius=0.5) == 0.35
    five = load_published("promptsmooth_table5")
    assert only(five, "seconds", method="denoised smoothing", phase="training") == 8 * 3600 + 47 * 60
    assert pd.isna(only(five, "seconds", method="diffusion smoothing", phase="training"))
    accuracy = load_published("robustmedclip_table3_accuracy")
    assert only(accuracy, "accuracy", dataset="PBC", model="RobustMedCLIP", corruption="clean") == 0.8005
    assert only(accuracy, "accuracy", dataset="OCTMNIST", model="MedCLIP", corruption="motion_blur") == 0.0568
    six = load_published("robustmedclip_table6")
    assert only(six, "clean_accuracy", variant="RobustMedCLIP-ViT", few_shot_fraction=0.03) == 0.6645


def test_certified_accuracy_never_exceeds_clean_and_never_rises_with_the_radius():
    for name in ("promptsmooth_table2", "promptsmooth_table3"):
        table = load_published(name)
        assert (table["certified_accuracy"] <= table["clean_accuracy"]).all()
        for _, rows in table.sort_values("radius").groupby(["dataset", "method"]):
            assert rows["certified_accuracy"].is_monotonic_decreasing


def test_corruption_errors_of_table_2_follow_from_the_accuracies_of_table_3():
    accuracy = load_published("robustmedclip_table3_accuracy")
    error = accuracy.assign(error=1 - accuracy["accuracy"]).pivot(
        index=[*BLOCK, "model"], columns="corruption", values="error"
    )
    reference = error.xs("CLIP", level="model")
    recomputed = 100 * error / reference.reindex(error.index.droplevel("model")).to_numpy()
    published = load_published("robustmedclip_table2_mce")
    mean = published[published["measure"] == "mean corruption error"].set_index([*BLOCK, "model"])
    cells = published[published["measure"] != "mean corruption error"].pivot(
        index=[*BLOCK, "model"], columns="corruption", values="percent_of_clip"
    )
    assert len(recomputed) == len(cells) == len(mean) == 50
    assert (recomputed - cells).abs().to_numpy().max() <= 0.1
    recomputed_mean = recomputed.drop(columns="clean").mean(axis="columns")
    assert (recomputed_mean - mean["percent_of_clip"]).abs().max() <= 0.1


def test_average_accuracy_is_the_mean_over_the_corruptions():
    accuracy = load_published("robustmedclip_table3_accuracy")
    corrupted = accuracy[accuracy["corruption"] != "clean"].groupby([*BLOCK, "model"])["accuracy"].mean()
    average = load_published("robustmedclip_table3_average").set_index([*BLOCK, "model"])["average_accuracy"]
    assert (corrupted - average).abs().max() <= 1e-4


def test_clean_errors_of_table_6_follow_from_its_accuracies_but_for_one():
    six = load_published("robustmedclip_table6")
    clip = only(
        load_published("robustmedclip_table3_accuracy"),
        "accuracy",
        dataset="PBC",
        model="CLIP",
        corruption="clean",
    )
    deviation = (100 * (1 - six["clean_accuracy"]) / (1 - clip) - six["clean_error_percent_of_clip"]).abs()
    other = (six["variant"] == "RobustMedCLIP-ResNet") & (six["few_shot_fraction"] == 0.03)
    assert deviation[~other].max() <= 0.1
    assert deviation[other].item() == pytest.approx(2.98, abs=0.01)


def test_every_model_has_every_cell():
    """Ten data sets, five models; clean, seven corruptions and the means."""
    models, corruptions = {"CLIP", "MedCLIP", "BioMedCLIP", "UniMedCLIP", "RobustMedCLIP"}, 7
    two, three = load_published("robustmedclip_table2_mce"), load_published("robustmedclip_table3_accuracy")
    for table, cells in ((two, corruptions + 2), (three, corruptions + 1)):
        sizes = table.groupby([*BLOCK, "model"]).size()
        assert set(table["model"]) == models
        assert len(sizes) == 50
        assert set(sizes) == {cells}
    assert (two[two["model"] == "CLIP"]["percent_of_clip"] == 100).all()
    assert two["corruption"].nunique() == three["corruption"].nunique() == corruptions + 1


def test_the_repository_s_summary_names_its_source():
    readme = load_published("robustmedclip_readme")
    assert readme["source"].str.startswith("https://github.com/BioMedIA-MBZUAI/RobustMedCLIP/").all()
    assert only(readme, "clean_error_percent_of_clip", model="BioMedCLIP") == 116.3
    assert only(readme, "mce_percent_of_clip", model="UniMedCLIP") == 98.87


def test_alexnet_s_balanced_errors():
    table = load_published("medmnist_c_alexnet")
    sizes = table.groupby("dataset").size().to_dict()
    assert sizes == {  # the official corruptions and the clean images
        "medmnist/blood": 12,
        "medmnist/breast": 8,
        "medmnist/pneumonia": 14,
        "medmnist/retina": 9,
        "medmnist/oct": 7,
    }
    assert only(table, "balanced_error", dataset="medmnist/blood", corruption="clean") == 0.018369
    assert only(table, "balanced_error", dataset="medmnist/retina", corruption="motion_blur") == 0.707576
    pneumonia = table[table["dataset"] == "medmnist/pneumonia"].set_index("corruption")["balanced_error"]
    assert set(pneumonia.index[pneumonia < pneumonia["clean"]]) == {"contrast_up", "gamma_corr_up"}


def test_class_counts_add_up_to_the_papers_test_splits():
    counts = load_published("test_class_counts").groupby(BLOCK)["images"].agg(["sum", "size"])
    assert dict(zip(counts.index, counts.itertuples(index=False, name=None), strict=True)) == {
        ("MediMeta-C", "Mammo"): (326, 2),
        ("MediMeta-C", "Pneumonia"): (624, 3),
        ("MediMeta-C", "Fundus"): (640, 2),
        ("MediMeta-C", "OCT"): (1000, 4),
        ("MedMNIST-C", "BloodMNIST"): (3421, 8),
        ("MedMNIST-C", "BreastMNIST"): (156, 2),
        ("MedMNIST-C", "PneumoniaMNIST"): (624, 2),
        ("MedMNIST-C", "RetinaMNIST"): (400, 5),
        ("MedMNIST-C", "OCTMNIST"): (1000, 4),
    }


def test_class_counts_speak_of_registered_data_sets_and_their_classes():
    for dataset, rows in load_published("test_class_counts").groupby("dataset_id"):
        assert dataset in DATASETS
        assert len(rows) == len(class_wording(dataset).names)
        assert rows["images"].sum() == DATASETS[dataset].sizes["test"]


def test_certified_corruptions_of_imagenet():
    table = load_published("tss_imagenet").set_index("corruption").certified_accuracy
    assert table.to_dict() == {"brightness": 0.7}


def test_unknown_table_names_the_closest():
    with pytest.raises(
        ValueError,
        match=r"'promptsmoth_table2'; choose one of medmnist_c_alexnet, prompt.*did you mean 'promptsmooth_table2'",
    ):
        load_published("promptsmoth_table2")
