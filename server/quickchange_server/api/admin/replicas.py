"""Replicas of a cluster: GET /v1/cluster."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from quickchange_server.api.app_state import Injected
from quickchange_server.api.auth import ADMIN
from quickchange_server.api.openapi.response_models_admin import ClusterDocument
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, errors
from quickchange_server.engine_client.remote.cluster_view import ReplicaReport
from quickchange_server.errors import NotFoundError
from quickchange_server.frontend.request_base import Json
from quickchange_server.observability.cluster_metrics import Cluster
from quickchange_server.protocol import Tier

router = APIRouter(tags=["cluster"], dependencies=[Depends(ADMIN)], responses=COMMON_ERRORS)


@router.get("/v1/cluster", response_model=ClusterDocument, responses=errors(404))
async def cluster(services: Injected) -> Json:
    """The replicas of the cluster that the server is part of, as they last reported."""
    if services.cluster is None:
        raise NotFoundError(
            "this server is a single machine, which has no replicas; `quickchange cluster` starts "
            "some, and GET /health tells the state of this one"
        )
    return _document(services.cluster)


def _document(cluster: Cluster) -> Json:
    view = cluster.view()
    return {
        "object": "cluster",
        "answered_by": cluster.replica,
        "engines": cluster.counts(),
        "pins": list(view.pins),
        "data": [_replica(report) for report in sorted(view.replicas, key=_order)],
    }


def _order(report: ReplicaReport) -> tuple[str, str]:
    return report.kind, report.replica


def _replica(report: ReplicaReport) -> Json:
    return {
        "id": report.replica,
        "object": "replica",
        "kind": report.kind,
        "node": report.node,
        "state": report.state,
        "reported": report.at,
        "engine": _engine(report) if report.kind == "engine" else None,
    }


def _engine(report: ReplicaReport) -> Json:
    return {
        "running": report.running,
        "waiting": report.waiting,
        "kv_share": report.kv_share,
        "step_seconds": report.step_seconds,
        "device": _use(report, "device", report.info.adapter_device_bytes if report.info else 0),
        "host": _use(report, "host", report.info.adapter_host_bytes if report.info else 0),
    }


def _use(report: ReplicaReport, tier: Tier, capacity: int) -> Json:
    sizes = [there.bytes for there in report.residency.values() if there.tier == tier]
    return {"adapters": len(sizes), "used_bytes": sum(sizes), "capacity_bytes": capacity}
