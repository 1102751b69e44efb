"""data/paper: schemas, literals of every table, text and tables that agree, claims that a program can judge."""

import math
import re

import pandas as pd
import pytest

from nbs_lib import paths

FOLDER = paths.data_dir() / "paper"
TABLES = {  # name: (rows, columns that hold words)
    "map_tab01": (3, ["algorithm", "accuracy", "rates_set"]),
    "map_tab02": (7, ["network", "dataset", "pruning_scheme", "only_3x3_pruned"]),
    "map_tab03": (4, ["network", "dataset", "depthwise_scheme"]),
    "map_tab04": (18, ["dataset", "network", "method", "pruning_scheme", "pruned_layers"]),
    "map_tab05": (12, ["model", "ours"]),
    "map_tab06": (3, ["device", "chipset", "gpu"]),
    "map_tab07": (6, ["network", "dataset", "device"]),
    "nps_tab01": (15, ["framework", "network", "pruned"]),
    "nps_tab02": (11, ["model", "ours", "device"]),
}
UNITS = ["percent", "points", "million", "x", "ms", "fps", "gb"]
COLUMNS = ["id", "source", "claim", "notebook", "metric", "paper_value"]
COLUMNS += ["criterion", "threshold", "unit", "scope", "threshold_from"]
CRITERIA = {">=": 1, "<=": 1, "within_abs": 2, "within_rel": 2, "true": 0, "untestable": 0}  # numbers in the threshold
OUT_OF_REACH = {"phone", "servers", "coco"}
SOURCE = re.compile(r"(mapping|nps) (Table \d|abstract|A\.\d|\d(\.\d){0,2})(, (mapping )?([A\d](\.\d){0,2}))?")


def read(name):
    return pd.read_csv(FOLDER / f"{name}.csv")


def cell(name, column, **where):
    rows = read(name)
    for key, value in where.items():
        rows = rows[rows[key] == value]
    assert len(rows) == 1, where
    return rows[column].item()


@pytest.fixture(scope="module")
def claims():
    return pd.read_csv(FOLDER / "claims.csv", dtype=str, keep_default_na=False).set_index("id")


@pytest.mark.parametrize("name", TABLES)
def test_tables_are_tidy(name):
    rows, words = TABLES[name]
    table = read(name)
    assert len(table) == rows and list(table.columns[-2:]) == ["source", "note"]
    kind, number = name.split("_tab0")
    assert set(table["source"]) == {f"{'mapping' if kind == 'map' else kind} Table {number}"}
    assert not table.drop(columns="note").duplicated().any()
    for column in table.columns.drop([*words, "source", "note"]):
        assert column.rsplit("_", 1)[-1] in UNITS or column == "fps", column
        assert pd.api.types.is_numeric_dtype(table[column]), column


def test_no_other_files_than_described():
    names = {path.stem for path in FOLDER.glob("*.csv")}
    assert names == {*TABLES, "statements", "claims"}
    readme = (FOLDER / "README.md").read_text()
    assert all(f"`{word}`" in readme for word in [*CRITERIA, *OUT_OF_REACH, "any", "host", "cifar", "imagenet"])


LITERALS = [
    ("map_tab01", "rates_set", "Manually", {"algorithm": "ADMM"}),
    ("map_tab01", "accuracy", "Low", {"algorithm": "GroupLasso"}),
    ("map_tab02", "weights_million", 64.36, {"pruning_scheme": "Not Prune"}),
    ("map_tab02", "fps", 12.3, {"pruning_scheme": "Hybrid"}),
    ("map_tab02", "map_percent", 52.8, {"pruning_scheme": "Pattern"}),
    ("map_tab02", "compression_rate_x", 6.2, {"pruning_scheme": "Block", "only_3x3_pruned": True}),
    ("map_tab03", "accuracy_change_points", -1.51, {"dataset": "CIFAR-100", "depthwise_scheme": "Block-based"}),
    ("map_tab03", "rate_after_x", 8.12, {"dataset": "CIFAR-10", "depthwise_scheme": "Pattern-based"}),
    ("map_tab04", "latency_ms", 10.44, {"dataset": "CIFAR-10", "network": "ResNet-50", "method": "PatDNN"}),
    ("map_tab04", "top1_drop_points", -0.3, {"dataset": "CIFAR-10", "network": "VGG-16", "method": "Rule-based"}),
    ("map_tab04", "macs_million", 1600, {"dataset": "ImageNet", "network": "ResNet-50", "method": "Search-based"}),
    ("map_tab04", "latency_ms", 3.98, {"dataset": "ImageNet", "network": "MobileNetV2", "method": "Rule-based"}),
    ("map_tab04", "top5_drop_points", 0.3, {"dataset": "ImageNet", "network": "MobileNetV2", "method": "Search-based"}),
    ("map_tab05", "macs_million", 284.3, {"model": "NetAdapt-MobileNetV1"}),
    ("map_tab05", "top1_percent", 70.5, {"macs_million": 177}),
    ("map_tab06", "ram_gb", 12, {"device": "Samsung Galaxy S20"}),
    ("map_tab06", "gpu", "Adreno 666", {"device": "Samsung Galaxy S21"}),
    ("map_tab07", "latency_ms", 16.23, {"dataset": "ImageNet", "device": "Samsung Galaxy S20"}),
    ("map_tab07", "compression_rate_x", 12.12, {"dataset": "CIFAR-10", "device": "Samsung Galaxy S21"}),
    ("nps_tab01", "cpu_ms", 37.3, {"framework": "Ours (sparse)", "network": "VGG-16"}),
    ("nps_tab01", "gpu_ms", 23.7, {"framework": "MNN", "network": "ResNet-18"}),
    ("nps_tab01", "pruning_rate_x", 1.8, {"framework": "Ours (sparse)", "network": "MobileNet-V2"}),
    ("nps_tab02", "gpu_ms", 3.9, {"macs_million": 147}),
    ("nps_tab02", "top1_percent", 75.2, {"model": "MnasNet-A1"}),
    ("nps_tab02", "cpu_ms", 190, {"model": "AmoebaNet-A"}),
]


@pytest.mark.parametrize(("name", "column", "value", "where"), LITERALS)
def test_literals_of_every_table(name, column, value, where):
    assert cell(name, column, **where) == value


def test_what_the_paper_does_not_print_is_empty():
    assert pd.isna(cell("map_tab04", "top1_drop_points", dataset="ImageNet", network="VGG-16", method="PatDNN"))
    assert pd.isna(cell("nps_tab02", "macs_million", model="ProxylessNas-R"))
    assert read("map_tab04").query("dataset == 'CIFAR-10'")["top5_drop_points"].isna().all()


def test_statements():
    table = read("statements")
    assert list(table.columns) == ["id", "paper", "section", "quantity", "value", "unit", "source", "note"]
    assert table["id"].is_unique and table["unit"].notna().all() and pd.api.types.is_numeric_dtype(table["value"])
    assert set(table["paper"]) == {"mapping", "nps"} and table["source"].map(SOURCE.fullmatch).notna().all()
    values = table.set_index("id")["value"]
    assert values["map_abstract_speed_up_over_patdnn_cifar_10_at_most"] == 2.48
    assert values["map_5_2_1_settings_in_the_latency_model"] == 512
    assert values["map_5_2_1_time_to_build_the_latency_model"] == 30
    assert values["map_2_2_tvm_vgg_16_latency"] == 200
    assert values["map_6_3_4_resnet_50_3x3_share_of_parameters"] == 44.3
    assert values["map_5_2_4_mobilenet_v2_depthwise_3x3_share_of_parameters"] == 1.7
    assert values["nps_4_2_dense_speed_up_over_mnn_on_mobilenet_v3_gpu"] == 141


def test_text_and_tables_agree_where_they_speak_of_the_same():
    values = read("statements").set_index("id")["value"]
    imagenet = {"dataset": "ImageNet", "method": "Search-based"}
    assert values["map_1_resnet_50_imagenet_latency"] == cell(
        "map_tab04", "latency_ms", network="ResNet-50", **imagenet
    )
    assert values["map_1_vgg_16_imagenet_latency"] == cell("map_tab04", "latency_ms", network="VGG-16", **imagenet)
    phone = cell("map_tab07", "latency_ms", dataset="ImageNet", device="Samsung Galaxy S10")
    assert phone == cell("map_tab04", "latency_ms", dataset="ImageNet", network="VGG-16", method="Rule-based")
    assert values["nps_3_resnet_18_pruning_rate"] == 5.3
    yolo = read("map_tab02").set_index("pruning_scheme")["fps"]
    assert values["map_6_3_1_yolov4_hybrid_speed_over_unstructured"] == round(yolo["Hybrid"] / yolo["Unstructured"], 2)


def test_claims_have_a_schema(claims):
    assert list(claims.reset_index().columns) == COLUMNS and claims.index.is_unique
    assert claims["source"].map(SOURCE.fullmatch).notna().all()
    assert (
        claims["notebook"]
        .str.fullmatch(r"00_tour|break_even|(map|nps)_(fig|tab)\d+(_tab\d+)?_[a-z0-9_]+|nps_autotune")
        .all()
    )
    assert (claims[["claim", "metric"]] != "").all().all()
    assert claims["scope"].isin(["any", "host", "cifar", "imagenet", *OUT_OF_REACH]).all()
    assert claims["threshold_from"].isin(["text", "printed", "ours"]).all()
    assert ((claims["unit"] == "") == (claims["criterion"] == "true")).all()


def test_every_criterion_is_known_and_every_threshold_parses(claims):
    for id, row in claims.iterrows():
        numbers = [float(word) for word in row["threshold"].split()]
        assert len(numbers) == CRITERIA[row["criterion"]], id
        assert row["criterion"] not in ("within_abs", "within_rel") or numbers[1] >= 0, id
        assert row["paper_value"] == "" or float(row["paper_value"]) is not None, id
        assert (row["criterion"] == "untestable") == (row["scope"] in OUT_OF_REACH), id


def test_the_papers_own_values_meet_their_claims(claims):
    for id, row in claims[(claims["paper_value"] != "") & (claims["threshold"] != "")].iterrows():
        value, first = float(row["paper_value"]), float(row["threshold"].split()[0])
        met = {">=": value >= first, "<=": value <= first}.get(row["criterion"], value == first)
        assert met, id


def cut(ratio):
    """To two decimals, never up: the paper's own cells must meet the threshold they give."""
    return math.floor(ratio * 100 + 1e-9) / 100


def test_thresholds_that_are_ratios_of_table_cells(claims):
    cpu = read("nps_tab01").pivot(index="framework", columns="network", values="cpu_ms")
    for network in cpu.columns:
        key = f"nps_tab1_{network.lower().replace('-', '')}"
        ours = cpu.loc["Ours (sparse)", network]
        assert float(claims.loc[f"{key}_sparse", "threshold"]) == cut(cpu.loc["Ours (dense)", network] / ours)
        assert float(claims.loc[f"{key}_sparse_over_mnn", "threshold"]) == cut(cpu.loc["MNN", network] / ours)
    for (dataset, network), rows in read("map_tab04").groupby(["dataset", "network"]):
        rows = rows.set_index("method")
        key = f"tab04_{dataset.lower().replace('-', '')}_{network.lower().replace('-', '')}"
        for method in ("Rule-based", "Search-based"):
            ratio = rows.loc["PatDNN", "latency_ms"] / rows.loc[method, "latency_ms"]
            short = f"{key}_{method.split('-')[0].lower()}"
            assert float(claims.loc[f"{short}_speedup", "threshold"]) == cut(ratio)
            assert float(claims.loc[f"{short}_accuracy", "threshold"]) == rows.loc[method, "top1_drop_points"]
        assert float(claims.loc[f"{key}_macs", "paper_value"]) == rows.loc["Rule-based", "macs_million"]


def test_shares_are_tested_to_the_last_printed_digit(claims):
    expected = {
        "fig03_resnet50_3x3_parameters": "44.3 0.1",
        "fig03_mobilenetv2_depthwise_layers": "33 1",
        "fig03_mobilenetv2_depthwise_macs": "6.9 0.1",
        "fig03_mobilenetv2_depthwise_parameters": "1.7 0.1",
        "fig03_mobilenetv2_depthwise_activations": "33 1",
    }
    assert claims.loc[list(expected), "threshold"].to_dict() == expected
