"""The Prefect server that commands and flows talk to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pipeline.errors import ClozelineError, InputError
from pipeline.locations import masked

_REQUEST_SECONDS = 10.0
_RETRIES = 2


def server_address() -> str:
    """The address of the API in force, from the environment or Prefect's own configuration.

    Raises:
        InputError: none is configured.
    """
    from prefect.settings import PREFECT_API_URL

    address = PREFECT_API_URL.value()
    if not address:
        raise InputError(
            "no Prefect server is configured",
            where="PREFECT_API_URL",
            fix="export PREFECT_API_URL=http://127.0.0.1:4200/api, with your server's address",
        )
    return str(address)


def ask_server() -> None:
    """Make sure that a server answers at the address in force.

    Raises:
        InputError: none is configured, there is none of Prefect's, or it refuses the credentials.
        ClozelineError: it does not answer.
    """
    try:
        _request("GET", "/admin/version")
    except InputError:
        raise
    except ClozelineError as error:
        raise ClozelineError(
            f"{error}\n  fix: start it, or unset PREFECT_API_URL for a server of the run's own"
        ) from error


def emit_event(name: str, resource: Mapping[str, str], payload: Mapping[str, Any]) -> None:
    """Hand an event to the server; returns when the server has taken it.

    `prefect.events.emit_event` puts it into a queue and says nothing of what becomes of it; this answer is the
    server's own. Prefect's client adds credentials and the CSRF token, and tries again what may go better.

    Args:
        name: the event's name.
        resource: what it is about: labels, ``prefect.resource.id`` among them.
        payload: what it says, as JSON.

    Raises:
        InputError: no server is configured, or it refuses the event.
        ClozelineError: the server does not answer.
    """
    from prefect.events import Event

    event = Event(event=name, resource=dict(resource), payload=dict(payload))
    _request("POST", "/events", [event.model_dump(mode="json")])


def _request(method: Literal["GET", "POST"], path: str, content: Any = None) -> None:
    """A request to the server, for its errors."""
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.exceptions import PrefectHTTPStatusError
    from prefect.settings import PREFECT_CLIENT_MAX_RETRIES, temporary_settings

    address = server_address()
    try:
        with (
            temporary_settings({PREFECT_CLIENT_MAX_RETRIES: _RETRIES}),
            get_client(httpx_settings={"timeout": _REQUEST_SECONDS}, sync_client=True) as client,
        ):
            client.request(method, path, json=content)  # type: ignore[arg-type]
    except PrefectHTTPStatusError as error:
        status = error.response.status_code
        if status in (403, 404, 405) and not address.rstrip("/").endswith("/api"):
            raise InputError(
                f"there is no Prefect API at this address (HTTP {status})",
                where=f"PREFECT_API_URL={masked(address)}",
                fix="the address ends in /api",
            ) from error
        if status in (401, 403):
            raise InputError(
                f"the Prefect server refuses the credentials (HTTP {status})",
                where="PREFECT_API_AUTH_STRING",
                fix="export the user and password that the server was started with",
            ) from error
        raise ClozelineError(f"the Prefect server refused {method} {path}: HTTP {status}") from error
    except (httpx.UnsupportedProtocol, httpx.InvalidURL) as error:
        raise InputError(f"this is no address: {error}", where="PREFECT_API_URL") from error
    except httpx.HTTPError as error:
        raise ClozelineError(
            f"the Prefect server at {masked(address)} does not answer: {error or type(error).__name__}"
        ) from error
