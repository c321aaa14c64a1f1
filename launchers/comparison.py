"""Compare finished runs: differences over paired seeds, tokens and FLOPs to a level, a table and a figure."""

import numpy as np
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from scipy import stats

from launchers.results import Cell, Curve, Results


def tokens_to_reach(curve: Curve, nelbo: float) -> float:
    """Number of tokens at which a run's NELBO first falls to a value before the decay, interpolated. inf if never."""
    values = curve.nelbo[: curve.constant]
    below = np.flatnonzero(values <= nelbo)
    if not len(below):
        return float("inf")
    i = below[0]
    if i == 0:
        return float(curve.tokens[0])
    share = (values[i - 1] - nelbo) / (values[i - 1] - values[i])
    return float(curve.tokens[i - 1] + share * (curve.tokens[i] - curve.tokens[i - 1]))


def interval(values: np.ndarray) -> list[float] | None:
    """The 95% Student interval of a mean: [low, high]. None for fewer than two values, or if one is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return [float(values.mean() - half), float(values.mean() + half)]


def reference_of(cell: Cell, reference: str) -> Cell:
    """The cell that a cell is compared with.

    reference: an arm, which means its cell with the same variation; or an arm and `key=value`s, which name one cell.
    """
    arm, *variation = reference.split()
    return Cell(arm, tuple(variation) or cell.variation)


def compare(results: Results, reference: str, flops: dict[Cell, float]) -> list[dict]:
    """A row for each cell: its final NELBO, and its difference to the reference with the same seeds.

    reference: see `reference_of`. flops: per token, of the cells for which they are known.

    `tokens_ratio`: the tokens to reach the NELBO that the reference has at the end of its constant learning rate,
    divided by the reference's tokens. None if a seed does not reach it before its own decay. `flops_ratio`: the same
    for the FLOPs of training, which objectives and optimizers change. None if they are not known.
    """
    curves: dict[Cell, dict[int, Curve]] = {}
    for (cell, seed), result in results.items():
        curves.setdefault(cell, {})[seed] = result.curve
    rows = []
    for cell, of_seed in curves.items():
        final = np.array([curve.nelbo[-1] for curve in of_seed.values()])
        row = {
            "arm": cell.arm, "variation": list(cell.variation), "seeds": sorted(of_seed), "nelbo": float(final.mean()),
            "nelbo_sd": float(final.std(ddof=1)) if len(final) > 1 else None,
            "tokens": float(min(curve.tokens[-1] for curve in of_seed.values())),
        }  # fmt: skip
        reference_cell = reference_of(cell, reference)
        base = curves.get(reference_cell, {})
        shared = [seed for seed in of_seed if seed in base]
        if shared:
            difference = np.array([of_seed[seed].nelbo[-1] - base[seed].nelbo[-1] for seed in shared])
            row |= {"difference": float(difference.mean()), "difference_ci": interval(difference)}
        if shared and all(base[seed].constant for seed in shared):
            goals = {seed: base[seed].constant - 1 for seed in shared}
            ratios = np.array(
                [
                    tokens_to_reach(of_seed[seed], base[seed].nelbo[goal]) / base[seed].tokens[goal]
                    for seed, goal in goals.items()
                ]
            )
            reached = bool(np.isfinite(ratios).all())
            mean = float(ratios.mean()) if reached else None
            known = cell in flops and reference_cell in flops
            row |= {
                "tokens_ratio": mean,
                "tokens_ratio_ci": interval(ratios) if reached else None,
                "flops_ratio": mean * flops[cell] / flops[reference_cell] if mean is not None and known else None,
            }
        rows.append(row)
    return rows


def number(value: float | None, digits: int, sign: str = "") -> str:
    """A number of a table; sign: "+" shows it always. Empty where there is none."""
    return "" if value is None else f"{value:{sign}.{digits}f}"


def around(value: float | None, ends: list[float] | None, digits: int, sign: str = "") -> str:
    """A number with the ends of its interval, where these are known."""
    shown = number(value, digits, sign)
    return shown if ends is None else f"{shown} ({number(ends[0], digits, sign)}..{number(ends[1], digits, sign)})"


def tokens_to_level(row: dict) -> str:
    """The share of tokens to the reference's level. Empty if there is nothing to compare with."""
    if "tokens_ratio" not in row:
        return ""
    return around(row["tokens_ratio"], row["tokens_ratio_ci"], 2) or "not reached"


def show(rows: list[dict], reference: str, console: Console) -> None:
    """Print a table with a row for each cell. A line separates the variations."""
    variations = dict.fromkeys(tuple(row["variation"]) for row in rows)
    table = Table(
        "arm", "settings", "seeds", "final NELBO", "sd", f"minus {reference} (95%)", "tokens to its level", "FLOPs",
        caption=(
            "NELBO: nats/token. The level is the NELBO of the reference at the end of its constant learning rate. "
            "Tokens and FLOPs to reach it are ratios to those of the reference."
        ),
    )  # fmt: skip
    table.columns[1].min_width = max((len(setting) for one in variations for setting in one), default=0)
    for variation in variations:
        table.add_section()
        for row in (row for row in rows if tuple(row["variation"]) == variation):
            table.add_row(
                row["arm"], " ".join(variation), str(len(row["seeds"])),
                number(row["nelbo"], 4), number(row["nelbo_sd"], 4),
                around(row.get("difference"), row.get("difference_ci"), 4, "+"),
                tokens_to_level(row),
                number(row.get("flops_ratio"), 2),
            )  # fmt: skip
    console.print(table)


def draw(rows: list[dict], reference: str) -> Figure:
    """Each arm's difference of the final NELBO to the reference as a bar, with a panel for each variation."""
    variations = list(dict.fromkeys(tuple(row["variation"]) for row in rows))
    arms = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != reference]
    figure = Figure(figsize=(3 + 4 * len(variations), 0.35 * len(arms) + 1.3), layout="constrained")
    panels = figure.subplots(1, len(variations), sharex=True, sharey=True, squeeze=False)[0]
    for panel, variation in zip(panels, variations, strict=True):
        missing = set(arms)  # a missing bar would look like a difference of 0
        for row in rows:
            if tuple(row["variation"]) == variation and row["arm"] != reference and "difference" in row:
                missing.discard(row["arm"])
                low, high = row["difference_ci"] or [row["difference"]] * 2
                error = [[row["difference"] - low], [high - row["difference"]]]
                panel.barh(arms.index(row["arm"]), row["difference"], xerr=error, color="#4477aa", capsize=3)
        for arm in missing:
            panel.text(0.0, arms.index(arm), "no comparison ", ha="right", va="center", fontsize="small")
        panel.axvline(0.0, color="black", linewidth=0.8)
        panel.set_title(" ".join(variation))
    panels[0].set_yticks(range(len(arms)), arms)
    panels[0].invert_yaxis()
    figure.supxlabel(f"final validation NELBO minus {reference}'s, nats/token (95% over seeds)")
    return figure
