"""A bucket of S3 as boto3 sees it: what obstore has no requests for, Object Lock and archives."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar
from urllib.parse import urlsplit

from outlast.errors import Exists, NotFound, OutlastError, Refused, Unavailable

_REFUSALS = {"AccessDenied", "InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidRetentionPeriod"}


class Bucket:
    """A client, the names of its objects, and their errors translated. Who inherits makes the requests.

    Raises `Refused` where boto3 is not installed.
    """

    purpose: ClassVar[str]
    """why boto3 is needed: the objects ..."""
    permissions: ClassVar[str]

    def __init__(self, url: str) -> None:
        try:
            import boto3
            import botocore.config
            import botocore.exceptions
        except ImportError as exc:
            raise Refused(
                f"the objects of {url} {self.purpose}, which needs the package boto3. Nothing was written.",
                hint="Install it: pip install 'outlast[s3]'.",
            ) from exc
        from outlast.store.cloud import s3_endpoint  # here, for repositories in folders never need it

        parts = urlsplit(url)
        self.url = url
        self.name = parts.netloc
        self._prefix = parts.path.strip("/")
        self._errors = botocore.exceptions
        endpoint = s3_endpoint()
        settings: dict[str, Any] = {"s3": {"addressing_style": "path"}} if endpoint else {}
        config = botocore.config.Config(
            connect_timeout=10,
            read_timeout=300,
            retries={"mode": "standard", "total_max_attempts": 5},
            max_pool_connections=32,
            **settings,
        )
        with self.translated("open", ""):
            self.client: Any = boto3.session.Session().client(
                "s3",
                endpoint_url=endpoint or None,
                region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or None,
                config=config,
            )

    def key(self, name: str) -> str:
        return f"{self._prefix}/{name}" if self._prefix else name

    @contextmanager
    def translated(self, action: str, name: str) -> Iterator[None]:
        try:
            yield
        except self._errors.ClientError as exc:
            code = str(exc.response.get("Error", {}).get("Code", ""))
            status = int(exc.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0))
            raise self.translate(code, status, action, name) from None
        except self._errors.NoCredentialsError:
            raise Refused(
                f"no AWS credentials were found, so {self.url} does not let us {action} {name or 'it'}; nothing was "
                "changed.",
                hint="Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, then run the same command again.",
            ) from None
        except (self._errors.BotoCoreError, OSError, ValueError) as exc:
            raise Unavailable(
                f"{self.url} did not {action} {name or 'it'} ({type(exc).__name__}).",
                hint="Check the network and the endpoint; the same command can be run again.",
            ) from None

    def translate(self, code: str, status: int, action: str, name: str) -> OutlastError:
        """What a refusal by S3 means: its own code for it, and the HTTP status."""
        reason = f"HTTP {status} {code}"
        if code in {"PreconditionFailed", "ConditionalRequestConflict"} or status == 412:
            return Exists(f"the object `{name}` may already exist ({reason}).")
        if code == "NoSuchBucket":
            return NotFound(f"the bucket {self.name} does not exist.", hint="Create it, or correct the URL.")
        if code == "NoSuchKey" or (status == 404 and name):
            return NotFound(f"there is no object `{name}` in {self.url}.")
        if code in _REFUSALS or status in {401, 403} or (status == 400 and code != "RequestTimeout"):
            return Refused(
                f"{self.url} does not let us {action} {name or 'it'} ({reason}); nothing was changed.",
                hint=f"The account needs {self.permissions} there.",
            )
        return Unavailable(
            f"{self.url} did not {action} {name or 'it'} ({reason}).", hint="The same command can be run again."
        )
