"""The dashboard, a request's way from top to bottom, written with Grafana's own types so that a
field it does not know cannot be set.

python docker/grafana/dashboard.py > docker/grafana/dashboards/paellera.json
"""

from __future__ import annotations

from grafana_foundation_sdk.builders.common import (
    GraphThresholdsStyleConfig,
    VizLegendOptions,
    VizTooltipOptions,
)
from grafana_foundation_sdk.builders.dashboard import (
    Dashboard,
    DatasourceVariable,
    Row,
    ThresholdsConfig,
)
from grafana_foundation_sdk.builders.prometheus import Dataquery
from grafana_foundation_sdk.builders.timeseries import Panel
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import (
    GraphTresholdsStyleMode,
    LegendDisplayMode,
    LegendPlacement,
    SortOrder,
    TooltipDisplayMode,
    VisibilityMode,
)
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DataSourceRef,
    Threshold,
    ThresholdsMode,
)

SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
GOAL_S = 0.5
WIDTH, HEIGHT = 8, 8
QUANTILES = ("p50", "p95", "p99")
RATE = "[$__rate_interval]"

# (title, unit, (legend, query), …) of every panel, by row. Where a row ends a request has come a
# room further.
Query = tuple[str, str]
Spec = tuple[str, str, tuple[Query, ...]]


def stage(name: str) -> Spec:
    queries = tuple(
        (quantile, f'paella:stage_duration_seconds:{quantile}{{stage="{name}"}}')
        for quantile in QUANTILES
    )
    return f"{name.capitalize()}, per request", "s", queries


def per_second(name: str, *labels: str) -> str:
    by = f" by ({', '.join(labels)})" if labels else ""
    return f"sum{by} (rate({name}{RATE}))"


def mean(name: str) -> str:
    return f"{per_second(name + '_sum')} / {per_second(name + '_count')}"


def share_remembered() -> str:
    hits, misses = (
        per_second(f"paella_prompt_cache_{result}_total", "what") for result in ("hits", "misses")
    )
    return f"{hits} / ({hits} + {misses})"


ROWS: dict[str, tuple[Spec, ...]] = {
    "Arrivals": (
        (
            "Requests",
            "reqps",
            (
                (
                    "{{endpoint}} {{status}}",
                    per_second("paella_request_duration_seconds_count", "endpoint", "status"),
                ),
            ),
        ),
        (
            "Answers, p50 to p99",
            "s",
            tuple(
                (f"{quantile} {{{{endpoint}}}}", f"paella:request_duration_seconds:{quantile}")
                for quantile in QUANTILES
            ),
        ),
        (
            "Answers under 500 ms",
            "percentunit",
            (("{{endpoint}}", "paella:requests_under_500ms:ratio"),),
        ),
    ),
    "Refused and cancelled": (
        ("Refused", "reqps", (("{{reason}}", per_second("paella_rejected_total", "reason")),)),
        (
            "Refused for lack of room, time or a worker",
            "percentunit",
            (("share", "paella:requests_refused:ratio"),),
        ),
        (
            "Cancelled",
            "reqps",
            (("in the {{stage}}", per_second("paella_cancelled_total", "stage")),),
        ),
    ),
    "Queue": (
        (
            "Rows",
            "short",
            (("waiting", "sum(paella_queue_depth)"), ("stepping", "sum(paella_rows_running)")),
        ),
        stage("queue"),
    ),
    "Encode and prior": (
        stage("encode"),
        stage("prior"),
        ("Prompt cache hit rate, by kind", "percentunit", (("{{what}}", share_remembered()),)),
        ("Cache", "bytes", (("held", "sum(paella_prompt_cache_bytes)"),)),
    ),
    "Steps": (
        stage("denoise"),
        (
            "One step",
            "s",
            tuple(
                (
                    quantile,
                    f"histogram_quantile({value}, sum by (le) "
                    f"(rate(paella_step_duration_seconds_bucket{RATE})))",
                )
                for quantile, value in zip(QUANTILES, (0.5, 0.95, 0.99), strict=True)
            ),
        ),
        ("Steps", "ops", (("steps", per_second("paella_step_duration_seconds_count")),)),
        ("Rows per step", "short", (("mean", mean("paella_step_rows")),)),
        ("Batch fill", "percentunit", (("mean", mean("paella_batch_fill_ratio")),)),
        (
            "CUDA graphs",
            "ops",
            (
                ("replayed", per_second("paella_graph_replays_total")),
                ("eager", per_second("paella_graph_eager_steps_total")),
                (
                    "recorded, after ready: {{after_ready}}",
                    per_second("paella_graph_captures_total", "after_ready"),
                ),
            ),
        ),
    ),
    "Decode, image, answers": (
        stage("decode"),
        stage("image"),
        ("Images", "ops", (("{{endpoint}}", per_second("paella_images_total", "endpoint")),)),
        (
            "Images by preset",
            "ops",
            (("{{preset}}", per_second("paella_preset_images_total", "preset")),),
        ),
        (
            "Repeats under an Idempotency-Key",
            "reqps",
            (("{{outcome}}", per_second("paella_idempotent_repeats_total", "outcome")),),
        ),
        (
            "Answers kept",
            "bytes",
            (
                ("for repeats", "sum(paella_idempotency_bytes)"),
                ("for URLs", "sum(paella_url_store_bytes)"),
            ),
        ),
    ),
    "Workers": (
        ("Ready", "short", (("{{instance}} worker {{worker}}", "paella_worker_ready"),)),
        (
            "Replaced, and their requests repeated",
            "short",
            (
                ("restarts", f"sum(increase(paella_worker_restarts_total{RATE}))"),
                ("repeated", f"sum(increase(paella_requests_replayed_total{RATE}))"),
            ),
        ),
        ("Silent", "s", (("{{instance}} worker {{worker}}", "paella_worker_silent_seconds"),)),
        (
            "Log lines dropped",
            "short",
            (("dropped", f"sum(increase(paella_log_lines_dropped_total{RATE}))"),),
        ),
        (
            "Processor",
            "short",
            (
                (
                    "{{instance}} worker {{worker}}",
                    per_second("paella_worker_cpu_seconds_total", "instance", "worker"),
                ),
                (
                    "{{instance}} API",
                    f'sum by (instance) (rate(process_cpu_seconds_total{{job="paellera"}}{RATE}))',
                ),
            ),
        ),
        ("Threads", "short", (("{{instance}} worker {{worker}}", "paella_worker_threads"),)),
        (
            "Memory",
            "bytes",
            (
                ("{{instance}} worker {{worker}}", "paella_worker_resident_memory_bytes"),
                ("{{instance}} API", 'process_resident_memory_bytes{job="paellera"}'),
            ),
        ),
        (
            "GPU memory",
            "bytes",
            (("{{instance}} worker {{worker}} {{kind}}", "paella_gpu_memory_bytes"),),
        ),
    ),
}


def panel(number: int, title: str, unit: str, queries: tuple[Query, ...]) -> Panel:
    made = (
        Panel()
        .id(number)
        .title(title)
        .datasource(SOURCE)
        .unit(unit)
        .min(0)
        .span(WIDTH)
        .height(HEIGHT)
        .fill_opacity(8)
        .show_points(VisibilityMode.NEVER)
        .legend(
            VizLegendOptions()
            .display_mode(LegendDisplayMode.LIST)
            .placement(LegendPlacement.BOTTOM)
            .show_legend(True)
        )
        .tooltip(VizTooltipOptions().mode(TooltipDisplayMode.MULTI).sort(SortOrder.DESCENDING))
    )
    if unit == "percentunit":
        made.max(1)
    if title.startswith("Answers, "):
        made.thresholds(goal()).thresholds_style(
            GraphThresholdsStyleConfig().mode(GraphTresholdsStyleMode.DASHED)
        )
    for letter, (legend, query) in zip("ABC", queries, strict=False):
        target = (
            Dataquery().ref_id(letter).expr(query).legend_format(legend).datasource(SOURCE).range()
        )
        made.with_target(target.exemplar(title.startswith("Answers, ")))
    return made


def goal() -> ThresholdsConfig:
    """Draw a line at 500 ms."""
    return (
        ThresholdsConfig()
        .mode(ThresholdsMode.ABSOLUTE)
        .steps([Threshold(value=None, color="green"), Threshold(value=GOAL_S, color="red")])
    )


def dashboard() -> Dashboard:
    made = (
        Dashboard("Paellera")
        .uid("paellera")
        .tags(["paellera"])
        .time("now-1h", "now")
        .refresh("15s")
        .readonly()
    )
    made.tooltip(DashboardCursorSync.CROSSHAIR)
    made.with_variable(DatasourceVariable("source").type("prometheus").label("Data source"))
    for row, (title, panels) in enumerate(ROWS.items(), start=1):
        made.with_row(Row(title).id(100 * row))
        for number, spec in enumerate(panels, start=100 * row + 1):
            made.with_panel(panel(number, *spec))
    return made


def document() -> str:
    return JSONEncoder(sort_keys=True, indent=2).encode(dashboard().build()) + "\n"


if __name__ == "__main__":
    print(document(), end="")
