"""Storage classes of S3: which one an object is in, moving it to another, and thawing what is archived.

An object in the classes of `ARCHIVES` is whole, and can't be read until a temporary copy of it was asked for,
which takes minutes to days (AWS S3 User Guide, "Working with archived objects"). Its size can be asked for, and
it can be deleted. Readers meet such an object as the error `Archived`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Literal

import msgspec

from outlast.errors import NotFound, OutlastError, Refused, Unavailable
from outlast.store.base import ObjectInfo, ObjectStore
from outlast.store.bucket import Bucket
from outlast.store.classes import ARCHIVES

Hold = Literal["readable", "archived", "thawing"]

_ONGOING = re.compile(r'ongoing-request="(true|false)"')
_EXPIRY = re.compile(r'expiry-date="([^"]+)"')


class Held(msgspec.Struct, frozen=True):
    """How an object lies there. `until_seconds`: Unix time until which a thawed copy stays; 0 where there is none."""

    storage_class: str
    hold: Hold
    until_seconds: float = 0.0


class Archive(Bucket):
    """The objects of a store on S3, by their storage classes. May be used from many threads at once."""

    purpose = "lie in storage classes"
    permissions = "s3:ListBucket, s3:GetObject, s3:PutObject and s3:RestoreObject"

    def classes(self, prefix: str) -> Iterator[tuple[ObjectInfo, str]]:
        """Objects with their storage classes, a thousand to a request."""
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=self.name, Prefix=self.key(prefix))
        with self.translated("list", ""):
            for page in pages:
                for each in page.get("Contents", ()):
                    name = each["Key"][len(self.key("")) :]
                    info = ObjectInfo(name, each["Size"], each["LastModified"].timestamp())
                    yield info, each.get("StorageClass", "STANDARD")

    def held(self, name: str) -> Held:
        """Raises `NotFound`."""
        with self.translated("ask about", name):
            head = self.client.head_object(Bucket=self.name, Key=self.key(name))
        storage_class = head.get("StorageClass", "STANDARD")
        thaw = str(head.get("Restore", ""))
        ongoing, expiry = _ONGOING.search(thaw), _EXPIRY.search(thaw)
        if storage_class not in ARCHIVES:
            return Held(storage_class, "readable")
        if ongoing is None:
            return Held(storage_class, "archived")
        if ongoing[1] == "true":
            return Held(storage_class, "thawing")
        until = parsedate_to_datetime(expiry[1]) if expiry else datetime.fromtimestamp(0, UTC)
        return Held(storage_class, "readable", until.timestamp())

    def move(self, name: str, storage_class: str) -> None:
        """Put an object that can be read into another class: S3 copies it onto itself, no byte travels."""
        key = self.key(name)
        with self.translated(f"move to {storage_class}", name):
            source = {"Bucket": self.name, "Key": key}
            self.client.copy_object(Bucket=self.name, Key=key, CopySource=source, StorageClass=storage_class)

    def thaw(self, name: str, tier: str, days: int) -> None:
        """Ask for a copy that can be read for so many days, by `expedited`, `standard` or `bulk`.

        Where that is under way already, nothing happens.
        """
        try:
            with self.translated("thaw", name):
                request = {"Days": days, "GlacierJobParameters": {"Tier": tier.capitalize()}}
                self.client.restore_object(Bucket=self.name, Key=self.key(name), RestoreRequest=request)
        except _UnderWay:
            return

    def translate(self, code: str, status: int, action: str, name: str) -> OutlastError:
        if code == "RestoreAlreadyInProgress":
            return _UnderWay(name)
        if code == "GlacierExpeditedRetrievalNotAvailable":
            return Unavailable(f"{self.url} has no room to thaw {name} in minutes now.", hint="Ask for standard.")
        if code in {"InvalidObjectState", "ObjectNotInActiveTierError"}:
            return Refused(f"{name} of {self.url} is in a storage class in which we can't {action} it ({code}).")
        return super().translate(code, status, action, name)


class _UnderWay(OutlastError):
    """A thaw was asked for before."""


def archive_of(store: ObjectStore) -> Archive:
    """Raises `Refused` for stores that are not S3."""
    if not store.url.startswith("s3://"):
        raise Refused(
            f"{store.url} has no storage classes that are known here; nothing was changed.",
            hint="Only repositories on s3:// can be archived.",
        )
    return Archive(store.url)


def held_or_none(archive: Archive, name: str) -> Held | None:
    """None where the object is not there: whoever reads it will say so."""
    try:
        return archive.held(name)
    except NotFound:
        return None
