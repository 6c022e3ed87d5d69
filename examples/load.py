"""Print how busy the server is: by its own figures since its start, or Prometheus' of five minutes.

python load.py [URL] [PROMETHEUS_URL]
"""

import os
import sys
from collections import Counter

import httpx
from prometheus_client.parser import text_string_to_metric_families

default = os.environ.get("PAELLERA_CLIENT_URL", "http://127.0.0.1:8000")
url = sys.argv[1] if len(sys.argv) > 1 else default
key = os.environ.get("PAELLERA_CLIENT_KEY")
headers = {"Authorization": f"Bearer {key}"} if key else {}
prometheus = sys.argv[2] if len(sys.argv) > 2 else None

REQUESTS = (
    'paella_request_duration_seconds_{}{{endpoint!~"/metrics|/healthz|/readyz|unmatched"}}[5m]'
)
QUERIES = {
    "images a second": "sum(rate(paella_images_total[5m]))",
    "latency p50, s": f"histogram_quantile(0.5, sum by (le) (rate({REQUESTS.format('bucket')})))",
    "latency p99, s": f"histogram_quantile(0.99, sum by (le) (rate({REQUESTS.format('bucket')})))",
    "rows a step": "sum(rate(paella_step_rows_sum[5m])) / sum(rate(paella_step_rows_count[5m]))",
    "rows running": "sum(paella_rows_running)",
    "rows waiting": "sum(paella_queue_depth)",
    "refused a second": "sum(rate(paella_rejected_total[5m]))",
}


def asked(query: str) -> float:
    answer = (
        httpx.get(f"{prometheus}/api/v1/query", params={"query": query}).raise_for_status().json()
    )
    return sum(float(result["value"][1]) for result in answer["data"]["result"])


def scraped() -> dict[str, float]:
    total = Counter[str]()
    for family in text_string_to_metric_families(
        httpx.get(f"{url}/metrics", headers=headers).raise_for_status().text
    ):
        for sample in family.samples:
            if sample.labels.get("endpoint") not in (
                "/metrics",
                "/healthz",
                "/readyz",
                "unmatched",
            ):
                total[sample.name + sample.labels.get("le", "")] += sample.value
    requests = total["paella_request_duration_seconds_count"] or 1
    return {
        "images": total["paella_images_total"],
        "latency mean, s": total["paella_request_duration_seconds_sum"] / requests,
        "under 0.5 s, %": 100 * total["paella_request_duration_seconds_bucket0.5"] / requests,
        "rows a step": total["paella_step_rows_sum"] / (total["paella_step_rows_count"] or 1),
        "rows running": total["paella_rows_running"],
        "rows waiting": total["paella_queue_depth"],
        "refused": total["paella_rejected_total"],
    }


for name, figure in (
    {name: asked(query) for name, query in QUERIES.items()} if prometheus else scraped()
).items():
    print(f"{name:20}{figure:10.3g}")
