"""The report: one file that loads nothing from elsewhere and contains every value and image."""

from __future__ import annotations

import base64
import json
import shlex
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import trimesh

from fastlora.medical.evaluation.evaluate import LABELS, Evaluation
from fastlora.medical.evaluation.metrics import METRIC_KEYS, METRICS
from fastlora.medical.evaluation.pictures import (
    ERROR_UNIT_MM,
    MARKS,
    OUTLINES,
    POSITION_UNIT_MM,
    browser_mesh,
    browser_region,
    dice_chart,
    error_axis,
    outline_legend,
    png_tag,
    slice_picture,
    training_charts,
)
from fastlora.medical.evaluation.report import (
    examples,
    lead,
    render,
    slices_png,
    title,
    train_command,
    worst,
)
from fastlora.medical.evaluation.results import (
    distance_to_truth,
    document,
    structure_means,
    summarise,
    worse_than,
)
from fastlora.medical.evaluation.statistics import (
    bootstrap_interval,
    mean_with_interval,
    paired_difference,
    statistics,
)
from fastlora.medical.evaluation.tables import (
    cost,
    definitions,
    detail,
    heading,
    headline,
    interval,
    intervals,
    number,
    paired,
    place,
    table,
    undefined_note,
    words,
    worse,
)
from fastlora.medical.scans.geometry import mesh_from_sdf, zero_level
from fastlora.medical.training.config import TrainConfig
from tests.support.eval_run import evaluate_home, read_runs, shared_home
from tests.support.tolerance import assert_same_gap, assert_same_units

SECTIONS = [
    "result",
    "uncertainty",
    "worse",
    "structures",
    "slices",
    "surfaces",
    "training",
    "facts",
]
LOADING = {"src", "srcset", "data", "poster", "action", "background", "xlink:href"}


class Page(HTMLParser):
    """Collects the elements that the tests check."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.ids: list[str] = []
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.texts: dict[str, str] = {}
        self.cells: list[str] = []
        self.styles = ""
        self.open: list[str] = []
        self._inside: str | None = None
        self._last_id: str | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if "id" in values:
            self.ids.append(values["id"])
        self.loaded += [v for k, v in attrs if k in LOADING]
        if tag == "link":
            self.loaded.append(values["href"])
        if tag == "a":
            self.links.append(values["href"])
        if tag in ("td", "th"):
            self.cells.append("")
        self._inside, self._last_id = tag, values.get("id")
        if tag not in ("meta", "input", "br", "img", "line"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag == "line":
            return
        assert self.open.pop() == tag, f"</{tag}> closes something else"
        self._inside = self.open[-1] if self.open else None

    def handle_data(self, data):
        if self._inside == "script" and self._last_id:
            self.texts[self._last_id] = self.texts.get(self._last_id, "") + data
        elif self._inside == "style":
            self.styles += data
        elif any(tag in self.open for tag in ("td", "th")):
            self.cells[-1] += data


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return shared_home(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def content(home: Path) -> dict:
    evaluation, facts = evaluate_home(home)
    return document(evaluation, facts, read_runs(home), "python eval_medical.py --odd '</script>'")


@pytest.fixture(scope="module")
def page_text(home: Path, content: dict) -> str:
    return render(content, evaluate_home(home)[0], read_runs(home))


@pytest.fixture(scope="module")
def page(page_text: str) -> Page:
    return Page(page_text)


def test_nothing_is_loaded_from_elsewhere(page, page_text):
    assert page.loaded and all(url.startswith("data:image/png;base64,") for url in page.loaded)
    assert all(link.startswith("#") and link[1:] in page.ids for link in page.links)
    assert "url(" not in page.styles and "@import" not in page.styles
    assert len(page_text) < 12e6


def test_the_markup_is_well_formed(page):
    assert page.open == []
    assert len(page.ids) == len(set(page.ids))
    assert [name for name in page.ids if name in SECTIONS] == SECTIONS


def test_every_structure_method_and_metric_has_a_place(page, content):
    cells = set(page.cells)
    for record in content["records"]:
        assert words(record["structure"]) in cells
        assert place(record["region"]) in cells
        assert number("dice", record["dice"]) in {c.strip() for c in cells}
    for method in content["methods"]:
        assert LABELS[method] in cells
    for metric in METRICS:
        assert metric.source in cells and metric.definition in cells


def test_the_figures_are_in_it_as_json(page, content):
    assert json.loads(page.texts["eval-data"]) == content


def test_the_view_has_charts_and_surfaces(page, content, home):
    view = json.loads(page.texts["view-data"])
    assert set(view["charts"]) <= set(page.ids)
    assert "viewer" in page.ids and "region" in page.ids
    assert len(view["regions"]) == len(examples(evaluate_home(home)[0]))
    for region in view["regions"]:
        assert [mesh["title"] for mesh in region["meshes"]][0] == "Ground truth"
        assert len(region["meshes"]) == 3
    names = [trace["name"] for trace in view["charts"]["dice-chart"]["data"]]
    assert names == [LABELS[method] for method in MARKS]


@pytest.mark.slow
def test_names_of_structures_cannot_break_the_page(content, home):
    text = json.dumps(content).replace("blob", "<b>blob</b></script>")
    evil = Page(render(json.loads(text), evaluate_home(home)[0], read_runs(home)))
    assert evil.open == []
    assert "<b>blob</b></script>" in {cell for cell in evil.cells}


# ------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("key", "value", "text"),
    [
        ("dice", 0.98765, "0.988"),
        ("hd95_mm", 1.005, "1.00"),
        ("volume_error", -0.0312, "−3.1 %"),
        ("volume_error", 0.1, "+10.0 %"),
        ("volume_error_abs", 0.1, "10.0 %"),
        ("nsd", None, "–"),
    ],
)
def test_numbers_as_text(key, value, text):
    assert number(key, value) == text


def test_headings_carry_units():
    assert heading("hd95_mm", 2.0) == "HD95 <small>mm</small>"
    assert heading("nsd", 2.5) == "NSD <small>at 2.5 mm</small>"
    assert heading("dice", 2.0) == "Dice"
    assert "<small>%</small>" in heading("volume_error", 2.0)


def test_table_marks_text_columns():
    text = table(["A", "B"], [["x", "<td class=best>1</td>"]])
    assert "<th scope=col class=text>A</th><th scope=col>B</th>" in text
    assert "<td class=text>x</td><td class=best>1</td>" in text


def small_content() -> dict:
    """One group, two structures; LoRA is better in one and worse in the other."""
    dice = {"baseline": (0.6, 0.6), "base": (0.7, 0.8), "lora": (0.9, 0.5), "merged": (0.9, 0.5)}
    records = []
    for method, pair in dice.items():
        for index, value in enumerate(pair):
            values = dict.fromkeys(METRIC_KEYS, value) | {"hd95_mm": 3 - value}
            place_ = {"group": "brain", "subject": "s", "modality": "mr", "index": index}
            name = {"structure": f"part_{index}", "region": f"part_{index}@1.2.3"}
            rest = {"method": method, "status": "ok", "spacing_mm": 1.5}
            records.append({**place_, **name, **rest, **values})
    structures = structure_means(records)
    return {
        "methods": {key: LABELS[key] for key in dice},
        "tolerance_mm": 2.0,
        "split": {"held_out_regions": 2},
        "summary": summarise(records),
        "structures": structures,
        "statistics": statistics(structures, records),
        "records": records,
        "worse": {
            reference: {
                "structures": worse_than(structures, "lora", reference),
                "regions": worse_than(records, "lora", reference),
            }
            for reference in ("base", "baseline")
        },
        "runs": {"lora": {"trainable_share": 0.04, "used_epoch": 5}},
    }


def test_headline_marks_the_best_of_each_column():
    text = headline(small_content())
    assert text.count("<h3>") == 1  # 'all' equals the only group
    rows = text.split("<tr>")[2:]
    best = ["class=best" in row.split("</td>")[1] for row in rows]
    assert best == [False, True, False, False]  # means 0.6, 0.75, 0.7, 0.7


def test_detail_marks_where_lora_is_worse():
    content = small_content()
    text = detail(content["structures"], content, "t")
    first = text.split('<div class="panel">')[1]
    rows = first.split("<tr>")[2:]
    assert ["class=worse" in row for row in rows] == [False, True]
    assert "part 1" in rows[1] and "0.500" in rows[1]


def test_regressions_are_listed_or_their_absence_is_stated():
    content = small_content()
    text = worse(content)
    assert "part 1" in text and "0.500 <small>(0.800)</small>" in text
    assert "part 0" not in text
    assert "Dice is lower in 1 of 2 regions" in text
    content["worse"]["base"] = content["worse"]["baseline"] = {"structures": [], "regions": []}
    assert worse(content).count("None of 2 regions is worse") == 2


def test_lead_counts_regressions_and_gives_the_means():
    text = lead(small_content())
    assert "<strong>0.700</strong>" in text and "0.750" in text and "0.600" in text
    assert "in 1 of 2 regions" in text
    assert "4.0 %" in text
    assert "before training" not in text


def test_lead_states_when_training_did_not_help():
    content = small_content()
    content["runs"]["lora"]["used_epoch"] = 0
    assert "no epoch of LoRA improved on the initial model" in lead(content)


def test_intervals_cover_the_mean_and_shrink_with_the_number():
    values = np.random.default_rng(3).normal(0.8, 0.1, 400).tolist()
    low, high = bootstrap_interval(values)
    # Of a normal mean: 1.96 standard errors on each side.
    error = np.std(values) / np.sqrt(len(values))
    assert low == pytest.approx(np.mean(values) - 1.96 * error, abs=0.1 * error)
    assert high == pytest.approx(np.mean(values) + 1.96 * error, abs=0.1 * error)
    assert bootstrap_interval(values) == (low, high)
    assert bootstrap_interval([0.1, 0.2]) is None
    assert mean_with_interval([0.2, None, 0.4]) == {
        "mean": pytest.approx(0.3),
        "low": None,
        "high": None,
        "n": 2,
    }


def test_paired_differences_leave_out_what_is_undefined():
    one = [0.9, 0.8, 0.7, 0.95, 0.85, None]
    result = paired_difference(one, [0.8, 0.75, 0.68, 0.9, 0.79, 0.1])
    assert result["n"] == 5 and result["mean"] == pytest.approx(0.056)
    assert result["p"] == pytest.approx(2 / 2**5)  # all of one sign: exact
    assert 0.02 < result["low"] < 0.056 < result["high"] < 0.1
    assert paired_difference(one[:3], one[:3])["p"] == 1.0
    assert paired_difference([1.0], [0.5])["p"] is None


def rows_of(group: str, gains: list[list[float]]) -> list[dict]:
    """Base and LoRA in the regions of each structure; gains: LoRA minus base."""
    return [
        {"group": group, "subject": "s", "modality": "ct", "structure": f"{group}_{n}"}
        | {"region": f"{group}_{n}@{m}", "method": method}
        | dict.fromkeys(METRIC_KEYS, 0.5 + gain * (method == "lora"))
        for n, regions in enumerate(gains)
        for m, gain in enumerate(regions)
        for method in ("base", "lora")
    ]


def test_differences_of_a_group_are_over_its_structures_or_over_the_regions_of_few():
    many = rows_of("spine", [[0.1, 0.3], [0.2], [0.6]])
    few = rows_of("brain", [[0.1, 0.2, 0.3], [0.4]])
    rows = many + few
    groups = statistics(structure_means(rows), rows)["groups"]
    assert list(groups) == ["brain", "spine"]
    (spine,), (brain,) = groups["spine"]["pairs"], groups["brain"]["pairs"]
    assert (groups["spine"]["unit"], groups["spine"]["structures"]) == ("structure", 3)
    assert (spine["one"], spine["other"], spine["dice"]["n"]) == ("lora", "base", 3)
    assert spine["dice"]["mean"] == pytest.approx((0.2 + 0.2 + 0.6) / 3)
    assert 0.2 - 1e-9 <= spine["dice"]["low"] < spine["dice"]["mean"]
    assert spine["dice"]["mean"] < spine["dice"]["high"] <= 0.6 + 1e-9
    assert (groups["brain"]["unit"], groups["brain"]["structures"]) == ("region", 2)
    assert brain["dice"]["n"] == 4 and brain["dice"]["mean"] == pytest.approx(0.25)
    page = paired({"statistics": statistics(structure_means(rows), rows), "tolerance_mm": 2.0})
    assert "(3 structures)" in page and "(4 regions of 2 structures: regions of one" in page
    assert page.count("<table>") == 3


def test_statistics_are_over_structures_and_by_subject():
    content = small_content()
    stats = content["statistics"]
    assert stats["methods"]["lora"]["dice"]["mean"] == pytest.approx(0.7)
    assert stats["methods"]["lora"]["dice"]["n"] == 2  # structures, not regions
    assert [(p["one"], p["other"]) for p in stats["pairs"]] == [("lora", "base")]
    assert stats["pairs"][0]["dice"]["mean"] == pytest.approx(-0.05)
    assert list(stats["subjects"]) == ["s"]
    assert "LoRA minus base model, frozen" in paired(content) and "−0.050" in paired(content)
    assert "All subjects" in intervals(content) and "(2 structures)" in intervals(content)
    value = {"mean": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    assert interval("dice", value) == "0.500 <small>(0.400 to 0.600)</small>"


def test_the_gallery_has_the_five_lowest(home, page_text):
    evaluation, _ = evaluate_home(home)
    dice = {r["index"]: r["dice"] for r in evaluation.rows if r["method"] == "lora"}
    picked = [dice[index] for index, _ in worst(evaluation)]
    assert picked == sorted(dice.values())[:5]
    assert page_text.count("; base ") == len(picked) + len(examples(evaluation))


def test_undefined_regions_are_reported():
    content = small_content()
    assert undefined_note(content) == "No prediction and no ground truth was empty."
    content["summary"]["base"]["all"]["status"] = {"ok": 1, "empty_prediction": 1}
    assert undefined_note(content).endswith("Base model, frozen: 1 × empty prediction.")


def test_cost_and_definitions(content):
    runs = content["runs"]
    text = cost(content)
    assert f"{runs['lora']['trainable']:,}" in text and "(100.0 %)" in text
    assert "MONAI" in definitions(content)


# --------------------------------------------------------------------------------------- region views


def ball(radius: float = 8.0, centre: float = 16.0) -> np.ndarray:
    index = np.moveaxis(np.indices((32, 32, 32)), 0, -1)
    return (np.linalg.norm(index - centre, axis=-1) - radius).astype(np.float32)


OBLIQUE = np.array(
    [[1.2, -0.9, 0, 10], [0.9, 1.2, 0, -20], [0, 0, 1.5, 5], [0, 0, 0, 1]], dtype=np.float64
)


def decode(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=kind)


def test_browser_mesh_keeps_positions_faces_and_errors():
    pred = ball(10.0)
    mesh = browser_mesh(pred, {"sdf_vox": ball(8.0), "affine": OBLIQUE, "spacing": 1.5})
    assert mesh is not None
    vertices = decode(mesh["vertices"], "<i2").reshape(-1, 3) * POSITION_UNIT_MM + mesh["origin"]
    faces = decode(mesh["faces"], "<u4").reshape(-1, 3)
    whole = zero_level(pred).vertices @ OBLIQUE[:3, :3].T + OBLIQUE[:3, 3]
    assert_same_units(vertices, whole, POSITION_UNIT_MM)
    solid = trimesh.Trimesh(vertices, faces)
    assert solid.volume == pytest.approx(4 / 3 * np.pi * 15.0**3, rel=0.02)
    errors = decode(mesh["error"], "<i1") * ERROR_UNIT_MM
    assert len(errors) == len(vertices)
    assert_same_gap(errors, 3.0)  # 2 voxels of 1.5 mm too far out


def test_meshes_have_their_distance_to_the_ground_truth():
    mesh = mesh_from_sdf(ball(10.0), OBLIQUE)
    distance = distance_to_truth(mesh, {"sdf_vox": ball(8.0), "affine": OBLIQUE, "spacing": 1.5})
    assert distance.shape == (len(mesh.vertices),)
    assert_same_gap(distance, 3.0)  # 2 voxels of 1.5 mm too far out


def test_a_field_without_surface_has_no_mesh():
    sample = {"sdf_vox": ball(), "affine": np.eye(4), "spacing": 1.0}
    assert browser_mesh(np.ones((4, 4, 4), np.float32), sample) is None
    region = browser_region(sample, {"LoRA": np.ones((32, 32, 32), np.float32)})
    assert region["meshes"][1] == {"title": "LoRA (no surface)"}
    assert region["box"] == [[-0.5, 31.5]] * 3


def test_error_colours_are_symmetric():
    axis = error_axis()
    assert axis["cmin"] == -axis["cmax"]


@pytest.mark.parametrize("affine", [np.diag([1.5, 1.5, 1.5, 1]), np.diag([-1.5, 1.5, 1.5, 1])])
def test_slices_are_pictures_even_where_a_method_is_empty(affine):
    image = np.random.default_rng(0).random((32, 32, 32), dtype=np.float32)
    fields = {"truth": ball(), "baseline": ball(7), "base": ball(6), "lora": np.ones_like(image)}
    png = slice_picture(image, fields, affine)
    assert png.startswith(b"\x89PNG")
    assert png != slice_picture(image, {**fields, "base": ball(5)}, affine)
    assert png_tag(png, "a").startswith('<img alt="a" src="data:image/png;base64,iVBOR')


def test_outlines_differ_in_more_than_colour():
    lines = [OUTLINES[key] for key in ("truth", "base", "lora")]
    assert len({line.dashes for line in lines}) == len({line.color for line in lines}) == 3
    legend = outline_legend()
    assert all(line.label in legend and line.color in legend for line in OUTLINES.values())
    assert legend.count("stroke-dasharray") == 2


def test_charts_show_every_run(content, home):
    charts = training_charts(read_runs(home))
    assert len(charts["loss-chart"]["data"]) == 4
    curve = charts["validation-chart"]["data"][0]
    assert list(curve["x"]) == [0, 1, 2] and len(curve["y"]) == 3
    chart = dice_chart(content)
    assert len(chart["data"][0]["y"]) == len({r["structure"] for r in content["records"]})


def test_examples_are_the_median_the_best_and_the_worst_of_each_group():
    gains = {"brain": [0.1, -0.3, 0.2, 0.0, 0.4], "spine": [0.05]}
    samples, records = [], []
    for group, values in gains.items():
        for gain in values:
            index = len(samples)
            samples.append({"meta": {"group": group}})
            records += [{"index": index, "method": "base", "dice": 0.5}]
            records += [{"index": index, "method": "lora", "dice": 0.5 + gain}]
    samples.append({"meta": {"group": "spine"}})
    records += [{"index": 6, "method": m, "dice": None} for m in ("base", "lora")]
    evaluation = Evaluation(samples, {}, records, 2.0)
    picks = examples(evaluation)
    assert [index for index, _ in picks] == [0, 4, 1, 5]
    assert picks[2][1] == "smallest gain or largest loss in brain: Dice −0.300"
    assert len(examples(evaluation, most=2)) == 2


def test_titles_and_slices_of_a_region(home):
    evaluation, _ = evaluate_home(home)
    assert title(evaluation, 0).startswith("blob, phantom_001, region ")
    assert slices_png(evaluation, 0).startswith(b"\x89PNG")


def test_train_command_repeats_what_is_not_default():
    config = TrainConfig(lora_rank=16, augment=False, classes=("disc", "my vertebra"), seed=3)
    words_ = shlex.split(train_command(config))
    assert words_[:2] == ["python", "scripts/train_medical.py"]
    assert words_[words_.index("--lora_rank") + 1] == "16"
    assert "--no-augment" in words_
    assert words_[words_.index("--classes") + 1 :][:2] == ["disc", "my vertebra"]
    assert "--lr" not in words_
