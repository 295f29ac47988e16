"""The report of an evaluation, one HTML file that needs no network: tables, curves, slices, surfaces.

`render` fills `report_template.html` with the output of `tables` and `pictures`.
"""

from __future__ import annotations

import html
import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from importlib.resources import files
from statistics import median_high
from string import Template
from typing import Any

from plotly.offline import get_plotlyjs

from fastlora.medical.console import command_line
from fastlora.medical.evaluation import pictures, tables
from fastlora.medical.evaluation.evaluate import LABELS, Evaluation, Run
from fastlora.medical.evaluation.results import EVERYTHING
from fastlora.medical.evaluation.tables import Content, number, place, words
from fastlora.medical.training.config import TrainConfig

TITLE = "From coarse segmentation to surface: held-out evaluation"
VALIDATION_NOTES = {
    True: "The checkpoint was selected on these same regions, so the results above favour every "
    "trained model slightly: this data has no separate test set.",
    False: "The checkpoint was selected on the validation regions, which are not among the held-out regions above.",
}
"""Keyed by whether the held-out regions are the validation regions."""

SECTIONS = (
    *(tables.headline, tables.undefined_note, tables.cost, tables.intervals, tables.paired),
    *(tables.worse, tables.definitions, tables.settings, tables.environment),
)
"""The functions that fill the placeholders of the same names in the template."""

Shown = Sequence[tuple[int, str]]


def render(content: Content, evaluation: Evaluation, runs: Mapping[str, Run]) -> str:
    """The HTML page.

    content: from `results.document`. runs: 'lora' and optionally 'full', for their curves.
    """
    shown = examples(evaluation)
    split = content["split"]
    commands = [*(train_command(run.config) for run in runs.values()), content["command"]]
    spacings = sorted({row["spacing_mm"] for row in content["records"]})
    template = files("fastlora.medical.evaluation") / "report_template.html"
    return Template(template.read_text("utf-8")).substitute(
        title=html.escape(TITLE),
        subtitle=html.escape(
            f"{content['date'][:10]} · {split['held_out_regions']} held-out regions, "
            f"split “{split['kind']}” · seed {content['seed']}"
        ),
        tab_rules=_tab_rules(),
        **{section.__name__: section(content) for section in (lead, *SECTIONS)},
        merged_difference=f"{content['merged_difference_vox']:.1e}",
        gallery="".join(_slices(evaluation, index, why) for index, why in worst(evaluation)),
        structures=tables.detail(content["structures"], content, "structures"),
        regions=tables.detail(content["records"], content, "regions"),
        spacing=" or ".join(f"{spacing:g}" for spacing in spacings),
        legend=pictures.outline_legend(),
        slices="".join(_slices(evaluation, index, why) for index, why in shown),
        validation_note=VALIDATION_NOTES[split["held_out_side"] == "val"],
        split=html.escape(
            f"{split['train_regions']} regions for training, {split['held_out_regions']} held out "
            f"(the subset “{split['held_out_side']}” of the split “{split['kind']}”). {split['notes']}"
        ),
        tolerance=f"{content['tolerance_mm']:g}",
        threshold=f"{content['baseline_threshold']:g}",
        commands=html.escape("\n".join(commands)),
        eval_json=_script_json(content),
        view_json=_script_json(_view(content, evaluation, runs, shown)),
        plotly_js=get_plotlyjs(),
    )


def _view(
    content: Content, evaluation: Evaluation, runs: Mapping[str, Run], shown: Shown
) -> dict[str, Any]:
    """The data that the page's script draws."""
    regions = []
    for index, why in shown:
        fields = {LABELS[key]: evaluation.predictions[key][index] for key in ("base", "lora")}
        region = pictures.browser_region(evaluation.samples[index], fields)
        regions.append({"title": f"{title(evaluation, index)} ({why})", **region})
    charts = {"dice-chart": pictures.dice_chart(content), **pictures.training_charts(runs)}
    return {"charts": charts, "regions": regions, "coloraxis": pictures.error_axis()}


def _tab_rules() -> str:
    """CSS that shows the panel of the selected tab."""
    numbers = range(1, len(tables.DETAIL) + 1)
    rules = (f".tabs > input:nth-of-type({n}):checked ~ .panel:nth-of-type({n})" for n in numbers)
    return ",\n".join(rules) + " { display: block; }"


def lead(content: Content) -> str:
    """The result in a few sentences."""
    summary = content["summary"]
    parts = []
    for group in (g for g in summary["lora"] if g != EVERYTHING):
        dice = {m: number("dice", groups[group]["dice"]["mean"]) for m, groups in summary.items()}
        hd95 = {m: number("hd95_mm", g[group]["hd95_mm"]["mean"]) for m, g in summary.items()}
        full = f", full fine-tuning {dice['full']}" if "full" in dice else ""
        parts.append(
            f"<p><strong>{html.escape(words(group).capitalize())}:</strong> LoRA reached a mean Dice "
            f"of <strong>{dice['lora']}</strong>, the frozen base model {dice['base']}, the upsampled "
            f"coarse segmentation {dice['baseline']}{full}. 95 % of the surface was within "
            f"{hd95['lora']} mm on average (base model: {hd95['base']} mm).</p>"
        )
    lost = sum("dice" in region["worse"] for region in content["worse"]["base"]["regions"])
    share = 100 * content["runs"]["lora"]["trainable_share"]
    parts.append(
        f"<p>LoRA trained {share:.1f} % as many parameters as the base model has. Its Dice is below "
        f"the base model's in {lost} of {content['split']['held_out_regions']} regions, listed below.</p>"
    )
    for key, run in content["runs"].items():
        if run["used_epoch"] == 0:
            parts.append(
                f"<p><strong>Note:</strong> no epoch of {LABELS[key]} improved on the initial model "
                "on the validation regions, so the initial model is evaluated.</p>"
            )
    return "".join(parts)


def examples(evaluation: Evaluation, most: int = 6) -> list[tuple[int, str]]:
    """(index, reason): the regions of median, largest and smallest gain of each group.

    The gain is LoRA's Dice minus the base model's. At most `most` regions, the groups' medians first.
    """
    dice = {(r["index"], r["method"]): r["dice"] for r in evaluation.rows}
    groups: dict[str, list[tuple[float, int]]] = {}
    for index, sample in enumerate(evaluation.samples):
        lora, base = dice[index, "lora"], dice[index, "base"]
        if lora is not None and base is not None:
            groups.setdefault(sample["meta"]["group"], []).append((lora - base, index))
    choices: dict[str, Callable[..., tuple[float, int]]] = {
        "median gain": median_high,
        "largest gain": max,
        "smallest gain or largest loss": min,
    }
    picks: dict[int, tuple[str, str]] = {}
    for why, choose in choices.items():
        for group, gains in sorted(groups.items()):
            gain, index = choose(gains)
            if len(picks) < most and index not in picks:
                change = f"{gain:+.3f}".replace("-", "−")
                picks[index] = (group, f"{why} in {words(group)}: Dice {change}")
    return [(i, why) for i, (_, why) in sorted(picks.items(), key=lambda pick: pick[1][0])]


def worst(evaluation: Evaluation, most: int = 5) -> list[tuple[int, str]]:
    """(index, rank): the regions where LoRA's Dice is lowest, the lowest first."""
    dice = [
        (r["dice"], r["index"])
        for r in evaluation.rows
        if r["method"] == "lora" and r["dice"] is not None
    ]
    return [(index, f"number {n}") for n, (_, index) in enumerate(sorted(dice)[:most], 1)]


def title(evaluation: Evaluation, index: int) -> str:
    """A region's readable name."""
    meta = evaluation.samples[index]["meta"]
    where = place(meta["region"])
    return f"{words(meta['structure'])}, {meta['subject']}" + (f", region {where}" if where else "")


def slices_png(evaluation: Evaluation, index: int) -> bytes:
    """Slices of a region with the outlines of ground truth, base model and LoRA."""
    sample = evaluation.samples[index]
    fields = {key: predicted[index] for key, predicted in evaluation.predictions.items()}
    fields["truth"] = sample["sdf_vox"]
    return pictures.slice_picture(sample["image"], fields, sample["affine"])


def _slices(evaluation: Evaluation, index: int, why: str) -> str:
    name = html.escape(title(evaluation, index))
    dice = {r["method"]: r["dice"] for r in evaluation.rows if r["index"] == index}
    scores = f"base {number('dice', dice['base'])}, LoRA {number('dice', dice['lora'])}"
    picture = pictures.png_tag(slices_png(evaluation, index), f"Slices of {name} with outlines")
    return (
        f"<figure><figcaption><strong>{name}</strong> ({html.escape(why)}; {scores})</figcaption>"
        f"{picture}</figure>"
    )


def train_command(config: TrainConfig) -> str:
    """The command that repeats this run, with every setting that is not a default."""
    defaults = TrainConfig().to_dict()
    parts = command_line("train_medical.py", "train")
    for name, value in config.to_dict().items():
        if value == defaults[name]:
            continue
        if isinstance(value, bool):
            parts.append(f"--{name}" if value else f"--no-{name}")
        else:
            values = value if isinstance(value, list) else [value]
            parts += [f"--{name}", *map(str, values)]
    return shlex.join(parts)


def _script_json(value: Any) -> str:
    """JSON that is safe inside a <script>."""
    return json.dumps(value, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
