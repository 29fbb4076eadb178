"""outlast.yaml: what it comes to, every mistake with its line, and nothing that could end in a traceback."""

from __future__ import annotations

import doctest
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outlast import config
from outlast.config import show, values
from outlast.config.document import FILE_BYTES_MAX
from outlast.config.fields import TABLES, TOP, Field, Section
from outlast.errors import NotFound
from outlast.repo.thaw_plan import Prices, Thaw
from outlast.tiers.policy import DrillPolicy, Policy, Source, Tier

HOUR, DAY = 3600, 86400

AS_PRACTITIONERS_WRITE_IT = """\
storage_tiers:
  hot_tier:     {type: nvme_ssd,       url: ./hot,               retention: 7_days,     purpose: active_training}
  warm_tier:    {type: ssd,            url: ./warm,              retention: 30_days,    purpose: frequent_restores}
  cold_tier:    {type: hdd,            url: ./cold,              retention: 180_days,   purpose: archival}
  glacier_tier: {type: object_storage, url: s3://bucket/outlast, retention: indefinite, purpose: long_term_archival}
sources:
  models: {paths: [./models], importance: critical, stage: middle}
  data:   {paths: [./data],   importance: normal}
  config: {paths: [./configs, ./outlast.yaml], importance: critical}
"""

WITH_EVERYTHING = """\
storage_tiers:
  hot:
    type: nvme_ssd
    url: /tiers/hot
    retention: 7_days
    purpose: "what is trained: now"
    sync: {mode: sync, batch_size: 4}
  cold: &cold
    url: s3://${BUCKET}/outlast/
    storage_class: GLACIER_IR
    archive: {class: DEEP_ARCHIVE, after: 90 days}
    sync: {bandwidth: 50 MB/s}
  colder:
    <<: *cold
    url: s3://other
    archive: {class: GLACIER}
sources:
  models:
    paths: [models, ~/more]
    exclude: ['*.tmp', logs/**]
    importance: low
    stage: final
    full: 1w
    incremental: auto
    retention: 1 h 30 min
    rpo: 6h
    rto: 20 min
    drill: {level: L4, golden: python golden.py, quality: 'score "50 %" # of all'}
  notes: {paths: notes.md, drill: off}
policies:
  copies: 1
  verified_within: 2 weeks
  lease: 90 s
  sync: {interval: 30 min, bandwidth: 400 Mbit/s}
  drill: {every: 1 day}
  runs: {drill: {level: L1}}
  prices:
    currency: EUR
    egress_per_gb: 0.09
    STANDARD: {per_gb_month: 0.02}
    DEEP_ARCHIVE:
      per_gb_month: 0.00099
      per_1000_moves: 0.06
      standard: {hours: 12, per_gb: 0.02, per_1000_requests: 0.1}
      bulk: {hours: 48.5, per_gb: 0, per_1000_requests: 0.025}
"""


def load(text: str | bytes, **environment: str) -> config.Config:
    return config.read(text.encode() if isinstance(text, str) else text, "/team/outlast.yaml", environment)


def told(text: str | bytes, **environment: str) -> list[str]:
    """The mistakes, as printed, without the name of the file."""
    with pytest.raises(config.Mistaken) as caught:
        load(text, **environment)
    return [mistake.text("") for mistake in caught.value.mistakes]


def warned(text: str) -> list[str]:
    found = [warning.text("") for warning in load(text).warnings]
    return [each for each in found if "is not there; is it" not in each]


# -- what it comes to --------------------------------------------------------------------------------


def test_the_shape_that_practitioners_write() -> None:
    policy = load(AS_PRACTITIONERS_WRITE_IT).policy
    assert [(tier.name, tier.url, tier.type, tier.retention_seconds) for tier in policy.tiers] == [
        ("hot_tier", "/team/hot", "nvme_ssd", 7 * DAY),
        ("warm_tier", "/team/warm", "ssd", 30 * DAY),
        ("cold_tier", "/team/cold", "hdd", 180 * DAY),
        ("glacier_tier", "s3://bucket/outlast", "object_storage", None),
    ]
    assert policy.tiers[3].purpose == "long_term_archival"
    assert policy.sources == (
        Source("models", ("/team/models",), importance="critical", stage="middle"),
        Source("data", ("/team/data",)),
        Source("config", ("/team/configs", "/team/outlast.yaml"), importance="critical"),
    )
    assert policy.copies == Policy(()).copies
    assert policy.run_drill == DrillPolicy()


def test_every_key_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home-of-somebody")
    policy = load(WITH_EVERYTHING, BUCKET="team").policy
    half_hour, rate = 1800, 50e6
    far: Any = ("object_storage", None, "", "async", half_hour, 16, rate)
    assert policy == Policy(
        (
            Tier("hot", "/tiers/hot", "nvme_ssd", 7 * DAY, "what is trained: now", "sync", half_hour, 4, rate),
            Tier("cold", "s3://team/outlast", *far, "GLACIER_IR", "DEEP_ARCHIVE", 90 * DAY),
            Tier("colder", "s3://other", *far, "GLACIER_IR", "GLACIER", 30 * DAY),
        ),
        (
            Source(
                *("models", ("/team/models", "/home-of-somebody/more"), ("*.tmp", "logs/**"), "low", "final"),
                *(7 * DAY, "auto", 5400, 6 * HOUR, 1200),
                drill=DrillPolicy(DAY, 4, "python golden.py", 'score "50 %" # of all'),
            ),
            Source("notes", ("/team/notes.md",), drill=None),
        ),
        copies=1,
        verified_within_seconds=14 * DAY,
        run_drill=DrillPolicy(DAY, 1),
        lease_seconds=90,
        prices=Prices(
            "EUR",
            {"DEEP_ARCHIVE": {"standard": Thaw(12, 0.02, 0.1), "bulk": Thaw(48.5, 0, 0.025)}},
            {"STANDARD": 0.02, "DEEP_ARCHIVE": 0.00099},
            {"DEEP_ARCHIVE": 0.06},
            0.09,
        ),
    )


def test_a_shared_drill_that_is_off_is_turned_on_again_by_a_source() -> None:
    text = "storage_tiers: {a: {url: a}}\nsources: {s: {paths: s}, t: {paths: t, drill: on}}\npolicies: {drill: off}"
    policy = load(text).policy
    assert [source.drill for source in policy.sources] == [None, DrillPolicy()]
    assert policy.run_drill is None


def test_what_is_shown_is_a_file_that_says_the_same() -> None:
    for text in (AS_PRACTITIONERS_WRITE_IT, WITH_EVERYTHING):
        found = load(text, BUCKET="team")
        shown = "\n".join(show.lines(found))
        again = config.read(shown.encode(), "/elsewhere/copy.yaml", {})
        assert again.policy == found.policy, shown


def test_what_is_shown_tells_where_values_come_from() -> None:
    shown = list(show.lines(load(WITH_EVERYTHING, BUCKET="team")))
    assert "      interval: 30 min  # policies.sync" in shown
    assert "      batch_size: 16  # default" in shown
    assert "      batch_size: 4" in shown
    assert "    # rto: none" in shown
    assert shown[shown.index("  prices:") :] == [
        *("  prices:", "    currency: EUR", "    egress_per_gb: 0.09"),
        *("    STANDARD:", "      per_gb_month: 0.02"),
        *("    DEEP_ARCHIVE:", "      per_gb_month: 0.00099", "      per_1000_moves: 0.06"),
        *("      standard:", "        hours: 12", "        per_gb: 0.02", "        per_1000_requests: 0.1"),
        *("      bulk:", "        hours: 48.5", "        per_gb: 0", "        per_1000_requests: 0.025"),
    ]
    assert "    # full: 3 days  # stage final" not in shown
    plain = list(show.lines(load(AS_PRACTITIONERS_WRITE_IT)))
    assert "    # full: 1 day  # stage middle; critical: intervals x0.5, retention x2" in plain
    assert not any("prices" in line or "archive" in line for line in plain), "only where they were given"


@given(st.text(st.characters(exclude_categories=["C", "Z"]) | st.just(" "), min_size=1))
def test_any_text_survives_being_shown(text: str) -> None:
    policy = Policy((Tier("a", "/a", purpose=text if text.strip() else "x"),), run_drill=None)
    shown = "\n".join(show.lines(config.Config(policy, "x")))
    assert load(shown).policy == policy


@pytest.mark.parametrize("name", ["${X}", "a$${b", "it's # 5: [x]", "~home", "50%"])
def test_any_path_survives_being_shown(name: str) -> None:
    policy = Policy((Tier("a", f"/data/{name}"),), (Source("s", (f"/x/{name}",), (name,)),))
    assert load("\n".join(show.lines(config.Config(policy, "x")))).policy == policy


@given(st.integers(1, values.DURATION_SECONDS_MAX))
def test_durations_are_read_as_they_are_written(seconds: int) -> None:
    assert values.read_duration(values.write_duration(seconds)) == seconds


@given(st.integers(1, 10**15) | st.integers(1, 1000).map(lambda count: count * 10**6))
def test_rates_are_read_as_they_are_written(rate: int) -> None:
    assert values.read_rate(values.write_rate(float(rate))) == rate


# -- mistakes ----------------------------------------------------------------------------------------

ONE_TIER = "storage_tiers: {hot: {url: ./hot}}\n"


def tier(text: str) -> str:
    return f"storage_tiers:\n  hot:\n    url: ./hot\n    {text}\n"


def source(text: str) -> str:
    return f"{ONE_TIER}sources:\n  models:\n    paths: [m]\n    {text}\n"


def far(text: str) -> str:
    return f"storage_tiers:\n  hot: {{url: ./hot, retention: 9 days}}\n  far:\n    url: s3://b/x\n    {text}\n"


def prices(text: str) -> str:
    return f"{ONE_TIER}policies:\n  prices:\n    {text}\n"


FAR, PRICES = ":5: storage_tiers.far", ":4: policies.prices"
HOT, MODELS = ":4: storage_tiers.hot", ":5: sources.models"
CREDENTIALS = (
    "may hold nothing but bucket and prefix, and no key or password; "
    "give credentials in the environment, as AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
)
MISTAKES = {
    tier("retension: 7 days"): f"{HOT}.retension: unknown key; did you mean `retention`?",
    tier("Retention: 7 days"): f"{HOT}.Retention: unknown key; did you mean `retention`?",
    tier("interval: 7 days"): f"{HOT}.interval: unknown key; it belongs into storage_tiers.NAME.sync",
    tier("zz: 1"): f"{HOT}.zz: unknown key; known are type, url, retention, purpose, storage_class, archive, sync",
    tier("retention: 7"): f"{HOT}.retention: `7` has no unit; write `7 days` or `7 h`",
    tier("retention: 12:30"): f"{HOT}.retention: `12:30` is no duration; write `12 h 30 min`",
    tier("retention: 5m"): f"{HOT}.retention: `m` could be minutes or months; write `5 min` or `5 months`",
    tier("retention: 5 dys"): f"{HOT}.retention: `dys` is no unit of time; did you mean `days`?",
    tier("retention: -1 day"): f"{HOT}.retention: `-1 day` is no time to come; "
    "write a number and a unit, as `7 days`, `12h` or `90 min`",
    tier("retention: 2000 years"): f"{HOT}.retention: `2000 years` is more than 1000 years",
    tier("retention: 1 ms"): f"{HOT}.retention: `ms` is no unit of time; did you mean `mins`?",
    tier("retention:"): f"{HOT}.retention: has no value; give it one, or leave the key out",
    tier("retention: [7 days]"): f"{HOT}.retention: takes one value; it takes: duration, `indefinite`",
    tier("type: nvme"): f"{HOT}.type: `nvme` is unknown; did you mean `nvme_ssd`?",
    tier("type: tape"): f"{HOT}.type: `tape` is unknown; known are memory, nvme_ssd, ssd, hdd, object_storage",
    tier("sync: {mode: on}"): f"{HOT}.sync.mode: `on` is unknown; known are async, sync",
    tier("sync: {bandwidth: 50 Mb/s}"): f"{HOT}.sync.bandwidth: `Mb` could be bytes or bits; "
    "write `50 MB/s` or `50 Mbit/s`",
    tier("sync: {bandwidth: 50}"): f"{HOT}.sync.bandwidth: `50` is no number of bytes per second; "
    "write it as `50 MB/s` or `400 Mbit/s`",
    tier("sync: {bandwidth: 0 MB/s}"): f"{HOT}.sync.bandwidth: `0 MB/s` moves nothing; "
    "write it as `50 MB/s` or `400 Mbit/s`",
    tier("sync: {batch_size: 010}"): f"{HOT}.sync.batch_size: `010` is no number from 1 to 1,000,000",
    tier("sync: fast"): f"{HOT}.sync: takes keys and values; write `key: value` in lines that are indented below it",
    tier("purpose: !!python/name:os.system x"): f"{HOT}.purpose: "
    "the tag tag:yaml.org,2002:python/name:os.system is not known here; leave it out",
    tier('purpose: "a\\x07"'): f"{HOT}.purpose: holds characters that can't be printed; "
    "write it in one line, without control characters",
    tier("url: ./other"): ":4: storage_tiers.hot.url: stands here twice, first in line 3",
    tier("? [a]\n    : 1"): ":4: storage_tiers.hot: a key is a word, and this is none",
    tier("<<: 5"): ":4: storage_tiers.hot: `<<` takes an alias of keys and values",
    tier("\tpurpose: x"): ":4: is indented with a tab; YAML takes spaces alone",
    tier("purpose: a: b"): ":4: is no YAML: mapping values are not allowed here; "
    "is the line above indented as it should be, and is what holds `: ` in quotes?",
    "storage_tiers: {hot: {url: ${HOT}}}": ":1: is no YAML: expected ',' or '}', but got '{'; "
    "is a `${NAME}` there that is not in quotes? inside [] and {} it has to be",
    "storage_tiers: {hot: {type: ssd}}": ":1: storage_tiers.hot.url: is missing; add `url`: the repository",
    "storage_tiers: {hot: {url: ~}}": ":1: storage_tiers.hot.url: has no value; "
    "`~` alone is YAML's word for nothing; write `~/`",
    "storage_tiers: {hot: {url: 'memory://x'}}": ":1: storage_tiers.hot.url: memory:// lives only inside one process; "
    "write a folder, as /dev/shm/outlast for memory",
    "storage_tiers: {hot: {url: 'ftp://me:secret@x'}}": ":1: storage_tiers.hot.url: `ftp://` is no kind of store; "
    "write a path, s3://BUCKET/PREFIX, gs://… or az://…",
    "storage_tiers: {hot: {url: 's3://key:secret@x'}}": f":1: storage_tiers.hot.url: {CREDENTIALS}",
    "storage_tiers: {hot: {url: 'az://x?sig=secret'}}": f":1: storage_tiers.hot.url: {CREDENTIALS}",
    "storage_tiers: {hot: {url: 's3:///x'}}": ":1: storage_tiers.hot.url: names no bucket; write s3://BUCKET/PREFIX",
    "storage_tiers: {hot: {url: 's3:x'}}": ":1: storage_tiers.hot.url: names no store; "
    "write a path, or s3://BUCKET/PREFIX; for a folder of that name, ./NAME",
    "storage_tiers: {hot: {url: 'file://host/x'}}": ":1: storage_tiers.hot.url: names no folder of this machine; "
    "write a path, as /data/backups",
    'storage_tiers: {hot: {url: "s3://${BUCKET}"}}': ":1: storage_tiers.hot.url: "
    "the environment variable BUCKET is not set; set BUCKET where outlast runs",
    'storage_tiers: {hot: {url: "${A:-b}"}}': ":1: storage_tiers.hot.url: `${A:-b}` names no variable; "
    "write ${NAME}; for the characters `${` write `$${`",
    "storage_tiers: {a b: {url: x}}": ":1: storage_tiers.a b: can't be a name; "
    "write letters, digits, `_` and `-`, beginning with a letter or digit; latest is taken",
    "storage_tiers: {}": ":1: storage_tiers: names nothing; name at least one, or leave the key out",
    "sources: {}\nstorage_tiers: {hot: {url: x}}": ":1: sources: names nothing; "
    "name at least one, or leave the key out",
    "policies: {copies: 1}": ":1: storage_tiers: is missing; name the repositories there, the nearest first",
    ONE_TIER + "policies: {lease: 3 s}": ":2: policies.lease: is shorter than a slow answer of a bucket; "
    "write at least 10 s",
    tier("storage_class: GLACIER_IR"): f"{HOT}.storage_class: is for buckets of S3 (s3://…) alone; leave it out",
    tier("archive: {class: GLACIER}"): f"{HOT}.archive: is for buckets of S3 (s3://…) alone; leave it out",
    far("storage_class: GLACIR_IR"): f"{FAR}.storage_class: `GLACIR_IR` is unknown; did you mean `GLACIER_IR`?",
    far("storage_class: glacier_ir"): f"{FAR}.storage_class: `glacier_ir` is unknown; did you mean `GLACIER_IR`?",
    far("storage_class: DEEP_ARCHIVE"): f"{FAR}.storage_class: `DEEP_ARCHIVE` has to be thawed before it is read; "
    "write `archive: {class: DEEP_ARCHIVE}`",
    far("storage_class: STANDARD"): f"{FAR}.storage_class: `STANDARD` is where packs are created without it; "
    "leave it out",
    far("archive: {class: DEEP}"): f"{FAR}.archive.class: `DEEP` is unknown; known are GLACIER, DEEP_ARCHIVE",
    far("archive: {class: GLACIER_IR}"): f"{FAR}.archive.class: `GLACIER_IR` is read at once, and is no archive; "
    "write `storage_class: GLACIER_IR` in the tier",
    far("archive: {after: 3 days}"): f"{FAR}.archive.class: is missing; write GLACIER or DEEP_ARCHIVE",
    far("archive: DEEP_ARCHIVE"): f"{FAR}.archive: takes keys and values; "
    "write `key: value` in lines that are indented below it",
    far("after: 3 days"): f"{FAR}.after: unknown key; it belongs into storage_tiers.NAME.archive",
    "storage_tiers: {far: {url: 's3://b', archive: {class: GLACIER}}}": ":1: storage_tiers.far.archive: "
    "can't be said of the first tier, to which backups go; put one before it that is read at once",
    prices("currency: euro"): f"{PRICES}.currency: `euro` is no currency; write its three letters, as EUR",
    prices("egress_per_gb: free"): f"{PRICES}.egress_per_gb: `free` is no amount; write a number, as `0.09`",
    prices("glacier: {per_gb_month: 1}"): f"{PRICES}.glacier: unknown key; did you mean `GLACIER`?",
    prices("GLACIER: {per_gb_month: -1}"): f"{PRICES}.GLACIER.per_gb_month: `-1` is no amount; "
    "write a number, as `0.09`",
    prices("GLACIER: {bulk: {hours: 5, per_gb: 0}}"): f"{PRICES}.GLACIER.bulk.per_1000_requests: is missing; "
    "add `per_1000_requests`: of thawing: one for each pack",
    prices("STANDARD_IA: {bulk: {hours: 5, per_gb: 0, per_1000_requests: 0}}"): f"{PRICES}.STANDARD_IA.bulk: "
    "is never needed: STANDARD_IA is read at once; leave it out",
    "polices: {}\n" + ONE_TIER: ":1: polices: unknown key; did you mean `policies`?",
    "- 1": ":1: takes keys and values; write `key: value` in lines that are indented below it",
    "": ":1: is empty; begin with `storage_tiers:`",
    "# nothing\n": ":1: is empty; begin with `storage_tiers:`",
    ONE_TIER + "---\n" + ONE_TIER: ":2: has more than one document; leave out `---` and what follows",
    source("drill: {level: 2}"): f"{MODELS}.drill.level: `2` is no level; the levels are L0, L1, L2, L3, L4, L5",
    source("drill: {level: L3}"): f"{MODELS}.drill.level: L3 needs a command, and golden names none; "
    "add golden, or write L2",
    source("drill: sometimes"): f"{MODELS}.drill: takes keys and values; "
    "write `key: value` in lines that are indented below it",
    source("retention: indefinite"): f"{MODELS}.retention: `indefinite` can't be said here; "
    "write a number and a unit, as `7 days`, `12h` or `90 min`",
    source("incremental: auto"): f"{MODELS}.incremental: auto follows from rpo, and there is none; "
    "add rpo, as `rpo: 6 h`",
    source("incremental: 12 h\n    rpo: 6h"): ":6: sources.models.rpo: is shorter than the 12 h between two backups; "
    "write `incremental: auto`, or `incremental: 3 h`",
    source("rpo"): ":5: is no YAML: could not find expected ':'; is a `:` missing, or a quote or bracket not closed?",
    source("rpo: '6 h"): ":5: is no YAML: found unexpected end of stream; "
    "is a `:` missing, or a quote or bracket not closed?",
    source("exclude: [[a]]"): f"{MODELS}.exclude[0]: is no single value; exclude takes a list of globs",
    source("exclude: ['/']"): f"{MODELS}.exclude[0]: the pattern '/' matches nothing; "
    "Give a glob such as '*.tmp' or 'logs/**'",
    source("exclude: {a: b}"): f"{MODELS}.exclude: takes a list of globs; write [one, two], or one a line after `- `",
    f"{ONE_TIER}sources: {{m: {{paths: []}}}}": ":2: sources.m.paths: names no path; write at least one",
    f"{ONE_TIER}sources: {{m: {{paths: ['s3://x/y']}}}}": ":2: sources.m.paths[0]: "
    "is a URL; sources are folders and files on this machine",
    f"{ONE_TIER}sources: {{m: {{paths: [hot/packs]}}}}": ":2: sources.m.paths[0]: lies in the repository of hot; "
    "back up what is elsewhere",
    f"{ONE_TIER}sources: {{m: {{paths: [a/x, b/x]}}}}": ":2: sources.m.paths[1]: has the same last part as /team/a/x: "
    "both would come back as x; make them two sources, or name the folder that holds both",
    f"{ONE_TIER}sources: {{latest: {{paths: [a]}}}}": ":2: sources.latest: can't be a name; "
    "write letters, digits, `_` and `-`, beginning with a letter or digit; latest is taken",
    "storage_tiers:\n  hot: {url: ./x}\n  cold: {url: /team/x/}": ":3: storage_tiers.cold.url: is that of hot too; "
    "each tier is a repository of its own",
    "storage_tiers:\n  hot: {url: 's3://b/x'}\n  cold: {url: 's3://b/x/y'}": ":3: storage_tiers.cold.url: "
    "lies inside that of hot, or around it; take another",
    "storage_tiers: {hot: {url: x}, cold: {url: data/cold}}\nsources: {d: {paths: data}}": ":2: sources.d.paths[0]: "
    "holds the repository of cold, which would be backed up too; move the tier, or add cold to exclude",
}


@pytest.mark.parametrize("text", MISTAKES, ids=lambda text: repr(MISTAKES[text])[:70])
def test_each_mistake_is_told_with_its_line_and_what_to_write(text: str) -> None:
    expected = MISTAKES[text]
    assert told(text) == [expected]
    assert "secret" not in told(text)[0]


def test_all_mistakes_are_told_at_once_in_the_order_of_lines() -> None:
    found = told(
        "storage_tiers:\n  hot: {type: nvme, url: x, purpos: y}\n  hot: {}\nsources:\n  m: {stage: mid}\n"
        "policies: {copies: 0}\n"
    )
    assert [each.split(": ")[0] + " " + each.split(": ")[1] for each in found] == [
        ":2 storage_tiers.hot.type",
        ":2 storage_tiers.hot.purpos",
        ":3 storage_tiers.hot",
        ":5 sources.m.paths",
        ":5 sources.m.stage",
        ":6 policies.copies",
    ]


WARNINGS = {
    "storage_tiers:\n  a: {url: a, retention: 9 days}\n  b: {url: b, retention: 8 days}": ":3: storage_tiers.b."
    "retention: is shorter than that of a, which is nearer; is the order of the tiers right?",
    far("archive: {class: GLACIER}\n    retention: 30 days"): f"{FAR}.archive.after: "
    "is not shorter than the retention: hardly anything is ever archived; write less, or leave archive out",
    "storage_tiers: {a: {url: 's3://b', type: ssd}}": ":1: storage_tiers.a.type: says ssd, and the url is a bucket; "
    "write object_storage, or leave it out",
    f"{ONE_TIER}policies: {{copies: 1}}": ":2: policies.copies: asks for 1 other tiers, and there are none; "
    "those that there are will do",
    source("drill: off\n    rto: 1 h"): ":6: sources.models.rto: is measured by drills, and they are off; "
    "turn drill on, or leave rto out",
    source("incremental: 12 h\n    rpo: 12 h"): ":6: sources.models.rpo: is just the 12 h between two backups; "
    "write `incremental: auto`, or `incremental: 6 h`",
    source("drill: {golden: x}"): f"{MODELS}.drill.golden: is never run: it belongs to L3, and drills go up to L2; "
    "write `level: L3`",
    "storage_tiers: {hot: {url: data/hot}}\nsources: {d: {paths: data}}": ":2: sources.d.paths[0]: "
    "holds the repository of hot: what destroys the one destroys the other; move the tier",
}


@pytest.mark.parametrize("text", WARNINGS, ids=lambda text: repr(WARNINGS[text])[:70])
def test_what_is_probably_not_meant_is_told_and_done(text: str) -> None:
    assert warned(text) == [WARNINGS[text]]


def test_a_tier_that_the_source_excludes_may_lie_in_it() -> None:
    text = "storage_tiers: {hot: {url: x}, cold: {url: data/cold}}\nsources: {d: {paths: data, exclude: [cold]}}"
    assert warned(text) == []


def test_two_names_of_one_folder_are_one_place(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    [found] = told(f"storage_tiers: {{a: {{url: {tmp_path}/real}}, b: {{url: {tmp_path}/link}}}}")
    assert "is that of a too" in found


# -- files that are none -----------------------------------------------------------------------------


def test_what_is_no_text_is_told_with_the_line() -> None:
    assert told(b"storage_tiers:\n  a: {url: \xff}") == [":2: is not UTF-8; save it as UTF-8"]
    assert told("storage_tiers: {}".encode("utf-16")) == [":1: is not UTF-8; save it as UTF-8"]
    assert told("a: b\nc: \x00") == [":2: holds the character U+0000; indent with spaces and save it as plain text"]
    assert told(b" " * (FILE_BYTES_MAX + 1)) == [":1: is larger than 1 MiB; is it the right file?"]
    assert load("\ufeff" + ONE_TIER).policy.tiers[0].name == "hot"


def test_what_unfolds_without_end_is_refused() -> None:
    deep = "[" * 100_000
    assert told(deep) == [":1: is no YAML: it is nested more than 20 deep"]
    nine = [f"b{n}: &b{n} {{<<: [{', '.join([f'*b{n - 1}' if n else '*a'] * 9)}]}}\n" for n in range(15)]
    bomb = "a: &a {x: 1}\n" + "".join(nine)
    assert "unfold to too much" in told(bomb + "storage_tiers: {<<: *b14}")[-1]
    assert "`<<` takes an alias" in told("storage_tiers: &a\n  <<: *a\n  hot: {url: x}\n")[0]
    assert "is no YAML: it has more than 50,000 values" in told("a: [" + "1," * 60_000 + "]")[0]
    assert told(tier('purpose: "\\UFFFFFFFF"')) == [":4: is no YAML: a number is out of range"]


MUTATED = (AS_PRACTITIONERS_WRITE_IT.encode(), WITH_EVERYTHING.encode())
PIECES = [
    *(b"\t", b"\n", b": ", b"{", b"}", b"[", b"]", b"&a ", b"*a", b"<<: *a", b"!!x ", b'"', b"'", b"#", b"|", b">"),
    *(b"- ", b"? ", b"%", b"@", b"\xff", b"\x00", b"~", b"off", b"12:30", b"9" * 50, b"-1", b"${", b"\\U", b"\xc2\x85"),
]


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_any_change_of_a_file_is_read_or_told_with_a_line(data: st.DataObject) -> None:
    text = data.draw(st.sampled_from(MUTATED))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = min(len(text), start + data.draw(st.integers(0, 12)))
        new = data.draw(st.sampled_from(PIECES) | st.binary(max_size=3) | st.just(text[start:end] * 2))
        text = text[:start] + new + text[end:]
    lines = text.count(b"\n") + text.count(b"\r") + 2
    try:
        found = load(text, BUCKET="team")
    except config.Mistaken as exc:
        assert exc.mistakes
        assert exc.message
        for mistake in exc.mistakes:
            assert 1 <= mistake.line <= lines
            assert mistake.text("x").isprintable()
    else:
        assert load("\n".join(show.lines(found))).policy == found.policy


# -- finding it, and the table -----------------------------------------------------------------------


def test_the_file_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("OUTLAST_CONFIG", raising=False)
    with pytest.raises(NotFound, match=r"the configuration outlast\.yaml is not there"):
        config.find()
    (tmp_path / "outlast.yaml").write_text(ONE_TIER)
    assert config.find() == "outlast.yaml"
    assert config.load(config.find()).policy.tiers[0].url == str(tmp_path / "hot")
    monkeypatch.setenv("OUTLAST_CONFIG", "other.yaml")
    with pytest.raises(NotFound, match=r"other\.yaml, which OUTLAST_CONFIG names, is not there"):
        config.find()
    assert config.find("outlast.yaml") == "outlast.yaml"


def test_each_key_sets_one_part_of_the_policy_and_none_is_left_out() -> None:
    """A field that is added to the policy's records has to be given a key, or be named here."""
    set_elsewhere = {
        Tier: {"name"},
        Source: {"name", "drill"},
        Policy: {"tiers", "sources", "run_drill", "prices"},
        DrillPolicy: set(),
        Prices: {"thaw", "per_gb_month", "per_1000_moves"},
        Thaw: set(),
    }
    keys: dict[type[msgspec.Struct], set[str]] = {record: set(names) for record, names in set_elsewhere.items()}
    for section in {**TABLES, **TOP}.values():
        for field in section.fields:
            if section.record is not None and not isinstance(field.kind, Section):
                keys[section.record].add(field.attribute)
    for record, names in keys.items():
        assert names == set(record.__struct_fields__), record
    assert os.path.isabs(load(ONE_TIER).policy.tiers[0].url)


def test_the_examples_in_the_code_hold() -> None:
    for module in (values, show):
        assert doctest.testmod(module).failed == 0


def rows() -> Iterator[str]:
    """The keys as the table of docs/tiers.md lists them."""
    for where, section in TABLES.items():
        for field in section.fields:
            key = f"{where}.{field.key}"
            is_of_any = f"{where}.{'WAY' if where.endswith('CLASS') else 'CLASS'}" in TABLES
            if key not in TABLES and not (is_of_any and isinstance(field.kind, Section)):
                yield f"| `{key}` | {takes(field)} | {default_of(field, section)} | {field.meaning} |"


def takes(field: Field) -> str:
    if not isinstance(field.kind, Section):
        return field.kind.words
    [table] = [where for where, section in TABLES.items() if section is field.kind]
    return f"as `{table}`"


def default_of(field: Field, section: Section) -> str:
    if isinstance(field.kind, Section) or section.record is None:
        return field.unset
    if field.key == "type":
        return "`object_storage` for a bucket, else `ssd`"
    default = field.default(section.record)
    if default is msgspec.NODEFAULT:
        return "needed"
    if field.unset or default == ():
        return field.unset or "none"
    return f"`{field.kind.write(default)}`"


def test_the_table_of_the_documentation_is_that_of_the_code() -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "tiers.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\| `(?:storage_tiers|sources|policies)\..*$", page, re.MULTILINE)
    assert documented == list(rows()), "\n".join(rows())
