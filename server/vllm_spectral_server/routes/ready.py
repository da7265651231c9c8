"""``GET /ready``: whether answers are to be trusted. ``/health``, which says that the process lives, is vLLM's."""

from __future__ import annotations

from fastapi import APIRouter, Response

from vllm_spectral_server.routes.kv_cache import Watching, canary_state
from vllm_spectral_server.schemas import Readiness

router = APIRouter(tags=["health"])


@router.get("/ready", responses={503: {"model": Readiness, "description": "not ready, and why"}})
async def ready(monitor: Watching, response: Response) -> Readiness:
    """200 if the engine runs and the canary sings, else 503."""
    is_ready, reason = monitor.ready
    if not is_ready:
        response.status_code = 503
    return Readiness(ready=is_ready, reason=reason, canary=canary_state(monitor))
