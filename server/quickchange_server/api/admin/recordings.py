"""Recordings of served requests: /v1/recordings. Each caller's are its own tenant's alone."""

from __future__ import annotations

from dataclasses import asdict

from fastapi import APIRouter, Depends

from quickchange_server.api.admin.adapters import adapters_on, check_seen
from quickchange_server.api.app_state import Injected, Services
from quickchange_server.api.auth import ADMIN, Administering
from quickchange_server.api.json_bodies import JsonRoute
from quickchange_server.api.openapi.response_models_admin import (
    EndedRecording,
    RecordingContent,
    RecordingDocument,
    RecordingList,
)
from quickchange_server.api.openapi.route_responses import COMMON_ERRORS, errors
from quickchange_server.errors import ForbiddenError, NotFoundError
from quickchange_server.frontend.caller import Caller
from quickchange_server.frontend.request_base import Json
from quickchange_server.storage.recordings.tables_recordings import Recording, RecordingState

router = APIRouter(
    route_class=JsonRoute,
    tags=["adapters"],
    dependencies=[Depends(ADMIN), Depends(adapters_on)],
    responses=COMMON_ERRORS,
)


@router.get("/v1/recordings", response_model=RecordingList)
async def list_recordings(services: Injected, caller: Administering) -> Json:
    """List the recordings of the caller's tenant."""
    states = await services.recorder.states(caller.tenant)
    return {"object": "list", "data": [_state(state) for state in states]}


@router.put(
    "/v1/recordings/{reference:path}", response_model=RecordingDocument, responses=errors(404)
)
async def begin_recording(reference: str, services: Injected, caller: Administering) -> Json:
    """Record requests of the caller's tenant to an adapter; a recording that is there goes on."""
    if not services.settings.recorded_requests:
        raise ForbiddenError(
            "nothing is recorded, by the setting recorded_requests "
            "(QUICKCHANGE_RECORDED_REQUESTS), which is 0"
        )
    recording = _recording(services, caller, reference)
    await services.recorder.switch_on(recording)
    return _state(await _found(services, recording))


@router.get(
    "/v1/recordings/{reference:path}", response_model=RecordingContent, responses=errors(404)
)
async def recorded_requests(reference: str, services: Injected, caller: Administering) -> Json:
    """The requests that a recording holds, the oldest first, as token ids."""
    recording = _recording(services, caller, reference)
    await _found(services, recording)
    requests = await services.recorder.requests(recording)
    return {
        "id": recording.adapter,
        "object": "recording.requests",
        "tenant": recording.tenant,
        "data": [asdict(request) for request in requests],
    }


@router.delete(
    "/v1/recordings/{reference:path}", response_model=EndedRecording, responses=errors(404)
)
async def end_recording(reference: str, services: Injected, caller: Administering) -> Json:
    """End a recording, and delete what it holds."""
    recording = _recording(services, caller, reference)
    await _found(services, recording)
    await services.recorder.switch_off(recording)
    return {"id": recording.adapter, "object": "recording.deleted", "deleted": True}


def _recording(services: Services, caller: Caller, reference: str) -> Recording:
    """The caller's recording of the adapter that a name, version or alias stands for."""
    check_seen(services, caller, reference)
    return Recording(caller.tenant, services.store.resolve(reference).name)


async def _found(services: Services, recording: Recording) -> RecordingState:
    states = await services.recorder.states(recording.tenant)
    for state in states:
        if state.recording == recording:
            return state
    raise NotFoundError(
        f"{recording.adapter!r} is not recorded for your tenant; PUT /v1/recordings/"
        f"{recording.adapter} begins it"
    )


def _state(state: RecordingState) -> Json:
    return {
        "id": state.recording.adapter,
        "object": "recording",
        "tenant": state.recording.tenant,
        "since": int(state.since),
        "requests": state.requests,
        "bytes": state.bytes,
    }
