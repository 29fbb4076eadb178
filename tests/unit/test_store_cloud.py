"""S3 against a real server: lost replies, and messages that tell what is wrong and no secrets."""

from __future__ import annotations

import traceback

import pytest

from outlast.clock import ManualClock
from outlast.errors import Corrupt, Exists, InvalidInput, NotFound, OutlastError, Refused, StoreFull, Unavailable
from outlast.store.cloud import CloudStore, _merged, _translate
from outlast.store.layers import RetryStore, open_store
from servers import S3_ENVIRONMENT, LossyProxy, free_port

MIB = 1 << 20


@pytest.mark.server
def test_a_write_whose_reply_was_lost_is_success(lossy_s3: tuple[str, LossyProxy]) -> None:
    url, proxy = lossy_s3
    store = CloudStore(url)
    for lost in (1, 3):
        proxy.lose_replies("PUT", lost)
        store.put_if_absent(f"log/{lost}", [b"our entry"])
        assert store.get(f"log/{lost}") == b"our entry"
    assert proxy.lost == 4


@pytest.mark.server
def test_anothers_write_is_exists_even_when_the_reply_was_lost(lossy_s3: tuple[str, LossyProxy]) -> None:
    url, proxy = lossy_s3
    store = CloudStore(url)
    store.put_if_absent("log/1", [b"their entry"])
    for lost in (1, 3):
        proxy.lose_replies("PUT", lost)
        with pytest.raises(Exists):
            store.put_if_absent("log/1", [b"another one"])
    assert store.get("log/1") == b"their entry"


@pytest.mark.server
def test_when_the_line_stays_down_the_outcome_is_unknown_until_it_is_back(
    lossy_s3: tuple[str, LossyProxy],
) -> None:
    url, proxy = lossy_s3
    store = RetryStore(CloudStore(url), attempts=2, clock=ManualClock())
    proxy.lose_replies("", 10**6)
    with pytest.raises(Unavailable):
        store.put_if_absent("log/1", [b"entry"])
    proxy.lose_replies("", 0)
    assert store.get("log/1") == b"entry"
    store.put_if_absent("log/1", [b"entry"])
    with pytest.raises(Exists):
        store.put_if_absent("log/1", [b"another"])


@pytest.mark.server
def test_big_objects_are_compared_to_the_last_byte(s3: str) -> None:
    store = CloudStore(s3)
    content = bytes(range(256)) * (17 * MIB // 256)
    store.put_if_absent("pack", [content[: 5 * MIB], content[5 * MIB :]])
    store.put_if_absent("pack", [content])
    for other in (content[:-1] + b"!", content[:-1], b"!" + content[1:]):
        with pytest.raises(Exists):
            store.put_if_absent("pack", [other])
    assert store.get("pack") == content


@pytest.mark.server
def test_a_multipart_put_is_whole(s3: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outlast.store.cloud.SINGLE_PUT_BYTES_MAX", 16 * MIB)
    content = bytes(range(251)) * (20 * MIB // 251)
    store = CloudStore(s3)
    store.put("pack", [content])
    assert store.get("pack") == content


@pytest.mark.server
def test_ranges_far_apart_overlapping_and_past_the_end(s3: str) -> None:
    store = CloudStore(s3)
    content = bytes(range(256)) * (6 * MIB // 256)
    store.put("pack", [content])
    ranges = [(5 * MIB, 10), (0, 10), (5, 10), (5 * MIB + 5, 100), (0, 0), (3 * MIB, 1), (0, 10)]
    assert store.get_ranges("pack", ranges) == [content[start : start + length] for start, length in ranges]
    for bad in [(6 * MIB - 1, 2), (6 * MIB, 1), (100 * MIB, 5), (6 * MIB + 1, 0), (0, 1 << 63)]:
        with pytest.raises(Corrupt):
            store.get_ranges("pack", [(6 * MIB - 100, 50), bad])
    with pytest.raises(InvalidInput):
        store.get_ranges("pack", [(-1, 1)])


@pytest.mark.server
def test_prefixes_keep_stores_in_one_bucket_apart(s3: str) -> None:
    one, two = CloudStore(f"{s3}/one"), CloudStore(f"{s3}/one-more/")
    one.put("object", [b"1"])
    two.put("object", [b"2"])
    assert [info.name for info in one.list("")] == ["object"]
    assert (one.get("object"), two.get("object")) == (b"1", b"2")
    assert two.url == f"{s3}/one-more"


@pytest.mark.server
def test_a_store_that_lists_in_no_order_is_sorted(s3: str) -> None:
    store = CloudStore(s3)
    store._lists_in_order = False
    for name in ("b/1", "a/2", "a.b", "a/10"):
        store.put(name, [b""])
    assert [info.name for info in store.list("")] == ["a.b", "a/10", "a/2", "b/1"]
    assert [info.name for info in store.list("a/", after="a/10")] == ["a/2"]


@pytest.mark.server
def test_a_missing_bucket_is_named(s3: str) -> None:
    store = CloudStore("s3://no-such-bucket/prefix")
    for call in (
        lambda: store.put_if_absent("format", [b"x"]),
        lambda: store.get("format"),
        lambda: list(store.list("")),
    ):
        with pytest.raises(NotFound, match="the bucket no-such-bucket of s3://no-such-bucket/prefix does not exist"):
            call()


def test_a_dead_endpoint_is_unavailable_and_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    for key, text in S3_ENVIRONMENT.items():
        monkeypatch.setenv(key, text)
    port = free_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    store = open_store("s3://bucket/prefix", clock=ManualClock())
    with pytest.raises(Unavailable) as caught:
        store.get("format")
    shown = "".join(traceback.format_exception(caught.value))
    assert caught.value.message == f"can't reach http://127.0.0.1:{port} (connection refused)."
    assert "test-secret" not in shown
    assert "test-key-id" not in shown


@pytest.mark.parametrize(
    ("address", "right"),
    [
        ("127.0.0.1:5123", "http://127.0.0.1:5123"),
        ("localhost:5123", "http://localhost:5123"),
        ("http://", "http://"),
    ],
)
def test_an_endpoint_that_is_no_url_is_refused_and_corrected(
    address: str, right: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with pytest.raises(InvalidInput) as caught:
        CloudStore("s3://bucket")
    assert f"AWS_ENDPOINT_URL {address!r} is not a URL; write {right}" in caught.value.message


def test_an_empty_endpoint_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "")
    assert CloudStore("s3://bucket").url == "s3://bucket"


def test_a_panic_of_the_library_becomes_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    class Panics:
        def get(self, *_: object) -> None:
            raise PanicException("called `Result::unwrap()` on an `Err` value")

    monkeypatch.setenv("AWS_REGION", "us-east-1")
    store = CloudStore("s3://bucket")
    store._api = Panics()
    with pytest.raises(Unavailable, match="did not read the object `format`"):
        store.get("format")


def test_missing_keys_are_said_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from obstore.exceptions import PermissionDeniedError

    monkeypatch.delenv("AWS_ACCESS_KEY_ID", raising=False)
    error = _translate(PermissionDeniedError("status code: 403 Forbidden"), "read", "format", "s3://bucket")
    assert error.message.startswith("no AWS credentials were found")
    assert "AWS_ACCESS_KEY_ID" in error.hint
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    error = _translate(PermissionDeniedError("status code: 403 Forbidden"), "read", "format", "s3://bucket")
    assert "does not let us read the object `format` (HTTP 403)" in error.message


@pytest.mark.parametrize(
    "url",
    ["s3://KEYID:KEYSECRET@bucket/x", "s3://bucket/x?sig=KEYSECRET", "s3://bucket/x#KEYSECRET", "az://u:KEYSECRET@c"],
)
def test_secrets_in_urls_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        CloudStore(url)
    assert "KEYSECRET" not in str(caught.value) + caught.value.hint


def test_errors_become_ours() -> None:
    from obstore.exceptions import AlreadyExistsError, GenericError, PermissionDeniedError

    def kind(exc: Exception, action: str = "write") -> type[OutlastError]:
        return type(_translate(exc, action, "pack", "s3://bucket"))

    def reply(status: str, code: str) -> Exception:
        return GenericError(f"Server returned non-2xx status code: {status}: <Error><Code>{code}</Code></Error>")

    assert kind(FileNotFoundError("x"), "read") is NotFound
    assert kind(AlreadyExistsError("x")) is Exists
    assert kind(PermissionDeniedError("x")) is Refused
    assert kind(reply("400 Bad Request", "ExpiredToken")) is Refused
    assert kind(reply("301 Moved", "PermanentRedirect")) is Refused
    assert kind(reply("501 Not Implemented", "NotImplemented")) is Refused
    assert kind(reply("503 Slow Down", "SlowDown")) is Unavailable
    assert kind(reply("429 Too Many Requests", "TooManyRequests")) is Unavailable
    assert kind(reply("507 Insufficient Storage", "XMinioStorageFull")) is StoreFull
    assert kind(GenericError("HTTP error: operation timed out")) is Unavailable


def test_signed_addresses_never_reach_a_message() -> None:
    from obstore.exceptions import GenericError

    exc = GenericError("Error performing GET https://u:pw@host/c/pack?sv=1&sig=KEYSECRET in 3ms - HTTP error: timeout")
    error = _translate(exc, "read", "pack", "az://c")
    assert error.message == "az://c did not read the object `pack` (HTTP error: timeout)."
    assert "KEYSECRET" not in error.message
    assert "pw@" not in error.message


def test_near_ranges_are_joined_and_far_ones_are_not() -> None:
    assert _merged([(10, 5), (0, 5), (3, 9), (7, 0)]) == [(0, 15)]
    assert _merged([(0, 1), (MIB + 1, 1), (3 * MIB, 1)]) == [(0, MIB + 2), (3 * MIB, 3 * MIB + 1)]
