"""A server's load in a header of each answer, for balancers that ask for it.

The format is ORCA's (Envoy's open request cost aggregation), the header and its metrics' names are
vLLM's: `endpoint-load-metrics: JSON {"named_metrics": {"kv_cache_usage_perc": 0.4, ...}}`.
"""

from __future__ import annotations

import json

from quickchange_server.observability.gateways.vllm_metrics import EngineLoad

FORMAT = "endpoint-load-metrics-format"  # header of a request: TEXT or JSON
REPORT = "endpoint-load-metrics"


def load_report(form: str, load: EngineLoad) -> str | None:
    """The header's value; None for a format that is not known."""
    named = {
        "kv_cache_usage_perc": load.kv_share,
        "num_requests_running": float(load.running),
        "num_requests_waiting": float(load.waiting),
    }
    match form.strip().upper():
        case "JSON":
            return f"JSON {json.dumps({'named_metrics': named})}"
        case "TEXT":
            return "TEXT " + ", ".join(f"named_metrics.{name}={named[name]}" for name in named)
    return None
