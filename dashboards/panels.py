"""The house form of a panel: every one has a title, a description that says what to do, and a unit.

Panels read the data source named by the `datasource` variable and nothing else. Anything that all
panels of one kind share is here; what a panel shows is in the topic modules.
"""

from __future__ import annotations

from typing import Final, TypeAlias, TypeVar

from grafana_foundation_sdk.builders import (
    bargauge,
    common,
    dashboard,
    prometheus,
    stat,
    statetimeline,
    table,
    timeseries,
)
from grafana_foundation_sdk.models import common as display
from grafana_foundation_sdk.models import dashboard as model
from grafana_foundation_sdk.models import prometheus as promql

AnyPanel: TypeAlias = (
    bargauge.Panel | stat.Panel | statetimeline.Panel | table.Panel | timeseries.Panel
)
_Panel = TypeVar("_Panel", bound=AnyPanel)

DATASOURCE: Final = model.DataSourceRef(type_val="prometheus", uid="${datasource}")

# Grafana unit ids. Legal thresholds are written as powers of ten, so FLOP are shown as 1.2e+25.
UNIT_FLOP: Final = "sci"
UNIT_FLOP_RATE: Final = "flops"
UNIT_RATIO: Final = "percentunit"
UNIT_ENERGY: Final = "watth"
UNIT_GPU_HOURS: Final = "suffix: GPU-h"
UNIT_GPUS: Final = "suffix: GPUs"
UNIT_SECONDS: Final = "s"
UNIT_COUNT: Final = "short"
UNIT_PER_SECOND: Final = "cps"

WARNING_RATIO: Final = 0.8  # the share at which FlopLedgerThresholdApproaching fires (rules.yml)
SILENCE_SECONDS: Final = 300  # the age at which FlopLedgerAgentSilent fires (rules.yml)

GREEN: Final = "green"
ORANGE: Final = "orange"
RED: Final = "red"
GREY: Final = "#8e8e8e"
PURPLE: Final = "purple"

WALL_WIDTH: Final = 24  # Grafana's grid columns


def query(expr: str, legend: str = "", ref: str = "A") -> prometheus.Dataquery:
    """A query over the shown time range, one point a step."""
    return (
        prometheus.Dataquery()
        .datasource(DATASOURCE)
        .editor_mode(promql.QueryEditorMode.CODE)
        .expr(expr)
        .legend_format(legend)
        .ref_id(ref)
        .range()
    )


def latest(expr: str, legend: str = "", ref: str = "A") -> prometheus.Dataquery:
    """A query for the newest value only, as series."""
    return query(expr, legend, ref).instant()


def rows(expr: str, ref: str = "A") -> prometheus.Dataquery:
    """A query for the newest value only, one table row a series."""
    return latest(expr, ref=ref).format(promql.PromQueryFormat.TABLE)


def steps(*above: tuple[float, str], start: str = GREEN) -> dashboard.ThresholdsConfig:
    """Colours by value: `start` from minus infinity, then each colour from its value on."""
    ladder = [model.Threshold(value=None, color=start)]
    ladder += [model.Threshold(value=value, color=color) for value, color in above]
    return dashboard.ThresholdsConfig().mode(model.ThresholdsMode.ABSOLUTE).steps(ladder)


def ratio_steps() -> dashboard.ThresholdsConfig:
    """Green below the warning share, orange up to the threshold, red at it and above."""
    return steps((WARNING_RATIO, ORANGE), (1.0, RED))


def value_names(names: dict[float, tuple[str, str]]) -> list[model.ValueMapping]:
    """Words and colours in place of numbers."""
    options = {
        format(value, "g"): model.ValueMappingResult(text=text, color=color, index=index)
        for index, (value, (text, color)) in enumerate(names.items())
    }
    return [model.ValueMap(options=options)]


def time_panel(title: str, meaning: str, unit: str) -> timeseries.Panel:
    """Lines over time with the newest value in the legend."""
    legend = (
        common.VizLegendOptions()
        .show_legend(show_legend=True)
        .display_mode(display.LegendDisplayMode.TABLE)
        .placement(display.LegendPlacement.BOTTOM)
        .calcs(["lastNotNull"])
    )
    tooltip = (
        common.VizTooltipOptions()
        .mode(display.TooltipDisplayMode.MULTI)
        .sort(display.SortOrder.DESCENDING)
    )
    panel = timeseries.Panel().legend(legend).tooltip(tooltip)
    panel = panel.line_width(1).fill_opacity(0).show_points(display.VisibilityMode.NEVER)
    return _described(panel, title, meaning, unit)


def stacked(panel: timeseries.Panel) -> timeseries.Panel:
    """The same panel with its series added up as areas."""
    stacking = common.StackingConfig().mode(display.StackingMode.NORMAL).group("A")
    return panel.fill_opacity(40).stacking(stacking)


def stat_panel(title: str, meaning: str, unit: str) -> stat.Panel:
    """One number, coloured by its thresholds."""
    panel = (
        stat.Panel()
        .reduce_options(_newest())
        .color_mode(display.BigValueColorMode.BACKGROUND)
        .graph_mode(display.BigValueGraphMode.NONE)
        .text_mode(display.BigValueTextMode.VALUE)
    )
    return _described(panel, title, meaning, unit)


def bar_panel(title: str, meaning: str, unit: str) -> bargauge.Panel:
    """One horizontal bar a series, with its value."""
    panel = (
        bargauge.Panel()
        .reduce_options(_newest())
        .display_mode(display.BarGaugeDisplayMode.BASIC)
        .value_mode(display.BarGaugeValueMode.TEXT)
        .orientation(display.VizOrientation.HORIZONTAL)
        .show_unfilled(show_unfilled=True)
        .min_viz_height(16)
    )
    return _described(panel, title, meaning, unit)


def state_panel(title: str, meaning: str, unit: str) -> statetimeline.Panel:
    """One row a series, coloured by state over time."""
    legend = (
        common.VizLegendOptions()
        .show_legend(show_legend=True)
        .display_mode(display.LegendDisplayMode.LIST)
        .placement(display.LegendPlacement.BOTTOM)
    )
    panel = (
        statetimeline.Panel()
        .merge_values(merge_values=True)
        .show_value(display.VisibilityMode.AUTO)
        .row_height(0.8)
        .legend(legend)
    )
    return _described(panel, title, meaning, unit)


def table_panel(title: str, meaning: str, unit: str, columns: dict[str, str]) -> table.Panel:
    """A table of merged instant queries; `columns` names the shown columns in order.

    Keys are what Prometheus answers: label names, `Value` for a single query, `Value #A` and so on
    for several.
    """
    organize = {
        "excludeByName": {"Time": True},
        "indexByName": {name: index for index, name in enumerate(columns)},
        "renameByName": columns,
    }
    panel = (
        table.Panel()
        .show_header(show_header=True)
        .with_transformation(model.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(model.DataTransformerConfig(id_val="organize", options=organize))
    )
    return _described(panel, title, meaning, unit)


def column(panel: table.Panel, name: str, *, unit: str, colored: bool = False) -> table.Panel:
    """Give one column of a table its own unit, and its cells the colour of their threshold."""
    properties = [model.DynamicConfigValue(id_val="unit", value=unit)]
    if colored:
        cell = {"type": "color-background", "mode": "basic"}
        properties.append(model.DynamicConfigValue(id_val="custom.cellOptions", value=cell))
    return panel.override_by_name(name, properties)


def line_style(panel: timeseries.Panel, pattern: str, **custom: object) -> timeseries.Panel:
    """Draw the series whose name matches `pattern` with these field options (`lineWidth=2`)."""
    properties = [
        model.DynamicConfigValue(id_val=f"custom.{name}", value=value)
        for name, value in custom.items()
    ]
    return panel.override_by_regexp(pattern, properties)


def line_color(panel: timeseries.Panel, pattern: str, color: str) -> timeseries.Panel:
    """Draw the series whose name matches `pattern` in one colour."""
    fixed = {"mode": "fixed", "fixedColor": color}
    return panel.override_by_regexp(
        pattern, [model.DynamicConfigValue(id_val="color", value=fixed)]
    )


def logarithmic() -> common.ScaleDistributionConfig:
    """A scale of powers of ten; zero is not drawn on it."""
    scale = common.ScaleDistributionConfig().type(display.ScaleDistribution.LOG)
    return scale.log(10)


def _described(panel: _Panel, title: str, meaning: str, unit: str) -> _Panel:
    panel.title(title).description(meaning).unit(unit).datasource(DATASOURCE)
    return panel


def _newest() -> common.ReduceDataOptions:
    return common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(values=False)
