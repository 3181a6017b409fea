"""An S3 API over HTTP on the loopback interface, for tests: moto's server in a thread of this process."""

from __future__ import annotations

import logging
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from werkzeug.serving import make_server

BUCKET = "clozeline"


class _OneConditionalWrite:
    """Let conditional writes through one by one: S3 decides between them, moto looks first and writes then."""

    def __init__(self, app: Callable[..., Iterable[bytes]]) -> None:
        self.app, self.lock = app, threading.Lock()

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        if "HTTP_IF_NONE_MATCH" not in environ:
            return self.app(environ, start_response)
        with self.lock:
            return self.app(environ, start_response)


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """Run the server with one empty bucket, `BUCKET`; gives the environment by which clients find it."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    app = _OneConditionalWrite(DomainDispatcherApplication(create_backend_app))
    server = make_server("127.0.0.1", 0, app, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    environment = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}",
    }
    try:
        _create_bucket(environment)
        yield environment
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def use_s3(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], cache: Path) -> str:
    """Point this process, and those that it starts, to the server; gives an URL with nothing below it."""
    from s3fs import S3FileSystem

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CLOZELINE_CACHE", str(cache))
    S3FileSystem.clear_instance_cache()  # it may know another server
    return f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}"


def _create_bucket(environment: dict[str, str]) -> None:
    import boto3

    boto3.client(
        "s3",
        endpoint_url=environment["AWS_ENDPOINT_URL"],
        aws_access_key_id=environment["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=environment["AWS_SECRET_ACCESS_KEY"],
        region_name=environment["AWS_DEFAULT_REGION"],
    ).create_bucket(Bucket=BUCKET)
