"""The report's tables, as HTML. Content is the value of `results.document`."""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastlora.medical.evaluation.evaluate import LABELS
from fastlora.medical.evaluation.metrics import METRIC_OF
from fastlora.medical.evaluation.results import EVERYTHING, is_worse
from fastlora.medical.evaluation.statistics import COMPARED

HEADLINE = ("dice", "nsd", "hd95_mm", "asd_mm", "chamfer_mm", "volume_error", "volume_error_abs")
DETAIL = ("dice", "hd95_mm", "nsd", "asd_mm", "chamfer_mm", "iou", "volume_error")

Content = Mapping[str, Any]


def words(name: str) -> str:
    """A readable name: vertebra_22_corpus → vertebra 22 corpus."""
    return name.replace("_", " ")


def place(region: str) -> str:
    """The grid index of a region's first voxel in its subject: vertebra_22@1.2.3 → 1.2.3."""
    return region.partition("@")[2]


def number(key: str, value: float | None) -> str:
    """A metric's value as text; a dash where it is undefined."""
    if value is None:
        return "–"
    if key == "volume_error":
        text = f"{100 * value:+.1f} %"
    elif key == "volume_error_abs":
        text = f"{100 * value:.1f} %"
    else:
        text = f"{value:.{METRIC_OF[key].digits}f}"
    return text.replace("-", "−")


def heading(key: str, tolerance_mm: float) -> str:
    """A metric's name with its unit."""
    unit = {"mm": "mm", "fraction of the true volume": "%"}.get(METRIC_OF[key].unit, "")
    if key == "nsd":
        unit = f"at {tolerance_mm:g} mm"
    return f"{METRIC_OF[key].label}{f' <small>{unit}</small>' if unit else ''}"


def headings(keys: Iterable[str], content: Content) -> list[str]:
    """The headings of several metrics."""
    return [heading(key, content["tolerance_mm"]) for key in keys]


def table(head: Iterable[str], rows: Iterable[Sequence[str]], text_columns: int = 1) -> str:
    """A table.

    head: the headings' HTML. rows: each cell a complete <td>, or the HTML inside one. text_columns:
    the number of columns, from the left, that are text and not numbers.
    """

    def kind(column: int) -> str:
        return " class=text" if column < text_columns else ""

    head = list(head)
    titles = "".join(f"<th scope=col{kind(n)}>{title}</th>" for n, title in enumerate(head))
    plain = [re.sub(r"<[^>]*>", "", title) or "name" for title in head]
    body = ""
    for row in rows:
        cells = (c if c.startswith("<td") else f"<td{kind(n)}>{c}</td>" for n, c in enumerate(row))
        body += f"<tr>{''.join(cells)}</tr>"
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="Table: {", ".join(plain)}"><table><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def cell(text: str, css: str = "") -> str:
    """A cell of a CSS class: `best`, `worse`, or `wrap` for running text."""
    return f"<td class={css}>{text}</td>" if css else f"<td>{text}</td>"


def headline(content: Content) -> str:
    """A table for each group: methods in rows, metrics in columns, the best value of each bold."""
    summary = content["summary"]
    groups = list(summary["lora"])
    if len(groups) == 2:  # one group, which equals 'all'
        groups = groups[:1]
    parts = []
    for group in groups:
        title = "All regions" if group == EVERYTHING else words(group).capitalize()
        count = summary["lora"][group]["regions"]
        parts.append(f"<h3>{html.escape(title)} <small class=soft>({count} regions)</small></h3>")
        rows = [[html.escape(LABELS[method])] for method in summary]
        for key in HEADLINE:
            means = [figures[group][key]["mean"] for figures in summary.values()]
            merits = [None if m is None else METRIC_OF[key].merit(m) for m in means]
            best = max((m for m in merits if m is not None), default=None)
            for row, mean, merit in zip(rows, means, merits, strict=True):
                is_best = mean is not None and merit == best
                row.append(cell(number(key, mean), "best" if is_best else ""))
        parts.append(table(["Method", *headings(HEADLINE, content)], rows))
    return "".join(parts)


def interval(key: str, value: Content) -> str:
    """A mean with its 95 % interval as text."""
    if value["low"] is None:
        return number(key, value["mean"])
    low, high = number(key, value["low"]), number(key, value["high"])
    return f"{number(key, value['mean'])} <small>({low} to {high})</small>"


def intervals(content: Content) -> str:
    """Means over structures with their intervals: over all, then for each subject."""
    stats = content["statistics"]
    parts = []
    subjects = stats["subjects"] if len(stats["subjects"]) > 1 else {}
    for title, methods in {"All subjects": stats["methods"], **subjects}.items():
        count = max(value["dice"]["n"] for value in methods.values())
        rows = [
            [html.escape(LABELS[m]), *(interval(key, values[key]) for key in COMPARED)]
            for m, values in methods.items()
        ]
        caption = f"<h3>{html.escape(title)} <small class=soft>({count} structures)</small></h3>"
        parts.append(caption + table(["Method", *headings(COMPARED, content)], rows))
    return "".join(parts)


def paired(content: Content) -> str:
    """The differences between methods on the same structures, with p-values: over all, then in each group."""
    stats = content["statistics"]
    parts = [_differences(stats["pairs"], content)]
    for name, group in stats["groups"].items() if len(stats["groups"]) > 1 else ():
        count = group["structures"]
        unit = f"{count} structures"
        if group["unit"] == "region":
            regions = max(pair["dice"]["n"] for pair in group["pairs"])
            unit = f"{regions} regions of {unit}: regions of one structure depend on each other, so the interval is too narrow"
        title = html.escape(words(name).capitalize())
        parts.append(f"<h3>{title} <small class=soft>({unit})</small></h3>")
        parts.append(_differences(group["pairs"], content))
    return "".join(parts)


def _differences(pairs: Sequence[Content], content: Content) -> str:
    rows = []
    for pair in pairs:
        row = [html.escape(f"{LABELS[pair['one']]} minus {LABELS[pair['other']].lower()}")]
        for key in COMPARED:
            p = pair[key]["p"]
            row.append(interval(key, pair[key]) + ("" if p is None else f", p = {p:.2g}"))
        rows.append(row)
    return table(["Difference", *headings(COMPARED, content)], rows)


def undefined_note(content: Content) -> str:
    """A count of the regions whose metrics are undefined or set by convention."""
    texts = []
    for method, groups in content["summary"].items():
        unusual = {s: n for s, n in groups[EVERYTHING]["status"].items() if s != "ok"}
        if unusual:
            counts = ", ".join(f"{n} × {words(status)}" for status, n in unusual.items())
            texts.append(f"{LABELS[method]}: {counts}.")
    if not texts:
        return "No prediction and no ground truth was empty."
    return "Regions without a surface to compare: " + " ".join(texts)


def cost(content: Content) -> str:
    """Parameters, storage and time of each kind of fine-tuning."""

    def unknown(value: int | None) -> str:
        return "–" if value is None else str(value)

    def text(value: float | None, scale: float, unit: str) -> str:
        return "–" if value is None else f"{value / scale:.{2 if scale > 1 else 0}f} {unit}"

    rows = [
        [
            LABELS[key],
            f"{run['trainable']:,} <small>({100 * run['trainable_share']:.1f} %)</small>",
            text(run["weights_bytes"], 1e6, "MB"),
            text(run["checkpoint_bytes"], 1e6, "MB"),
            text(run["seconds"], 1, "s"),
            f"{unknown(run['epochs'])} <small>(used: {unknown(run['used_epoch'])})</small>",
        ]
        for key, run in content["runs"].items()
    ]
    titles = [
        "Method",
        "Trained parameters <small>relative to the base model</small>",
        "Trained weights",
        "Checkpoint <small>with the state for resuming</small>",
        "Training time",
        "Epochs",
    ]
    return table(titles, rows)


def worse(content: Content) -> str:
    """The structures and regions where LoRA is worse than the base, or than the baseline."""
    total = content["split"]["held_out_regions"]
    parts = []
    for reference, lists in content["worse"].items():
        parts.append(f"<h3>LoRA against: {LABELS[reference].lower()}</h3>")
        structures, regions = lists["structures"], lists["regions"]
        if not regions:
            parts.append(f"<p>None of {total} regions is worse in Dice, HD95 or NSD.</p>")
            continue
        in_dice = sum("dice" in region["worse"] for region in regions)
        parts.append(
            f"<p>Dice is lower in {in_dice} of {total} regions; Dice, HD95 or NSD is worse in "
            f"{len(regions)}. {'Structures with worse means:' if structures else 'No structure has a worse mean.'}</p>"
        )
        if structures:
            parts.append(_losses(structures, content, reference))
        parts.append(f"<details><summary>The {len(regions)} regions</summary>")
        parts.append(_losses(regions, content, reference) + "</details>")
    return "".join(parts)


def _losses(losses: Sequence[Content], content: Content, reference: str) -> str:
    rows = []
    for loss in losses:
        where = place(loss.get("region", ""))
        row = [html.escape(words(loss["structure"]) + (f" at {where}" if where else ""))]
        row.append(html.escape(loss["subject"]))
        for key in COMPARED:
            mine, theirs = (number(key, value) for value in loss["values"][key])
            lost = "worse" if key in loss["worse"] else ""
            row.append(cell(f"{mine} <small>({theirs})</small>", lost))
        rows.append(row)
    against = f"<br><small>LoRA ({reference})</small>"
    titles = [title + against for title in headings(COMPARED, content)]
    return table(["Structure", "Case", *titles], rows, 2)


def detail(rows: Sequence[Content], content: Content, name: str) -> str:
    """One tab per metric: places in rows, methods in columns; LoRA's cell is marked where the base model is better.

    rows: of regions, or means of structures. name: of the tabs, unique on the page.
    """
    places: dict[tuple[str, str, str, str], dict[str, Content]] = {}
    for row in rows:
        where = (row["group"], row["subject"], row["structure"], row.get("region", ""))
        places.setdefault(where, {})[row["method"]] = row
    of_regions = "region" in rows[0]
    methods = list(content["methods"])
    titles = ["Structure", "Case", "Region" if of_regions else "Regions"]
    titles += [html.escape(LABELS[method]) for method in methods]
    tabs, panels = [], []
    for n, (key, title) in enumerate(zip(DETAIL, headings(DETAIL, content), strict=True)):
        tabs.append(
            f'<input type="radio" name="{name}" id="{name}-{n}"{"" if n else " checked"}>'
            f'<label for="{name}-{n}" class="screen">{title}</label>'
        )
        body = []
        for (_, subject, structure, region), mine in sorted(places.items()):
            where_text = place(region) if of_regions else str(mine["lora"]["regions"])
            cells = [html.escape(text) for text in (words(structure), subject, where_text)]
            for method in methods:
                lost = method == "lora" and is_worse(key, mine["lora"][key], mine["base"][key])
                cells.append(cell(number(key, mine[method][key]), "worse" if lost else ""))
            body.append(cells)
        note = f"<p class=note>{title}: {html.escape(METRIC_OF[key].definition)}</p>"
        panels.append(f'<div class="panel">{note}{table(titles, body, 3)}</div>')
    return f'<div class="tabs" role="group" aria-label="Metric">{"".join(tabs + panels)}</div>'


def definitions(content: Content) -> str:
    """The definition of each metric and the package that computes it."""
    rows = [
        [metric["label"], *(cell(html.escape(metric[n]), "wrap") for n in ("definition", "source"))]
        for metric in content["metrics"].values()
    ]
    return table(["Metric", "Definition", "Computed by"], rows, 3)


def settings(content: Content) -> str:
    """The runs' configurations, side by side."""
    configs = {key: run["config"] for key, run in content["runs"].items()}
    rows = [
        [html.escape(name), *(html.escape(str(c[name])) for c in configs.values())]
        for name in configs["lora"]
    ]
    return table(["Setting", *(LABELS[key] for key in configs)], rows, 1 + len(configs))


def environment(content: Content) -> str:
    """Versions and machine."""
    facts = content["environment"].items()
    rows = [[html.escape(name), cell(html.escape(str(value)), "wrap")] for name, value in facts]
    return table(["", "Version or value"], rows, 2)
