"""torch.distributed.checkpoint over a repository: `dcp.save`, `dcp.async_save` and `dcp.load` as they are.

>>> writer = OutlastWriter("./runs", name="gpt")                        # doctest: +SKIP
>>> dcp.save({"model": model}, storage_writer=writer, checkpoint_id="1000")   # doctest: +SKIP
>>> dcp.load({"model": model}, storage_reader=OutlastReader("./runs", name="gpt"))   # doctest: +SKIP

Every rank makes its packs durable; the coordinator then commits one entry of the log for all of them. Before it
there is nothing but garbage, so a rank that dies at any moment leaves the checkpoint before as it was. Every byte
that is read is verified, and nothing that was stored is ever unpickled.
"""

from __future__ import annotations

import dataclasses
import io
import os
import re
import socket
from typing import Any

import msgspec
import torch
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

import outlast
from outlast import Passphrase, __version__, records
from outlast.checkpoint import dcp_metadata, pieces, references
from outlast.checkpoint.dcp_metadata import Description, Stored, Topology
from outlast.checkpoint.dcp_read import Reading
from outlast.checkpoint.leaves import Leaves, TensorFile, tensor_bytes
from outlast.checkpoint.pieces import LeafBytes
from outlast.checkpoint.tree import Node, Path, encode, shown
from outlast.errors import Busy, InvalidInput, NoRepository, NotFound, Refused
from outlast.events import NULL_SINK, Event, EventSink
from outlast.records import Entry, Snapshot
from outlast.repo.content import Content, RecentChunks
from outlast.repo.repository import Repository
from outlast.repo.write import Contribution, Writer

_SNAPSHOT_ID = re.compile(r"[0-9a-f]{32}")
_STEP = re.compile(r"(?:^|\D)(\d{1,18})/?$")

CheckpointId = str | os.PathLike[str] | None


class _Share(msgspec.Struct, frozen=True):
    """What one rank stored; it travels to the coordinator beside the results of that rank's items."""

    repository: str
    entry: Entry
    contribution: Contribution | None
    """None for the coordinator, which commits itself"""


class OutlastWriter(StorageWriter):
    """Saves a checkpoint into the repository at `url`, under the name of its run.

    `step` becomes a tag of it. Where one writer serves for many saves, the step is told by
    `dcp.save(..., checkpoint_id=...)`: a number, or whatever ends with one ("step-1000"). The id of the snapshot
    comes back as `dcp.save(...).storage_meta.checkpoint_id`. With a `passphrase` a repository that is made is
    encrypted.

    Refused are objects that can't be read back without running code, with the path at which they lie;
    `torch.distributed.checkpoint` raises that as part of its `CheckpointException`.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        step: int | None = None,
        passphrase: Passphrase | None = None,
        sink: EventSink = NULL_SINK,
    ) -> None:
        self._url, self._name = url, references.run_name(name)
        self._step, self._passphrase, self._sink = step, passphrase, sink
        self._step_asked: int | None = None
        self._step_now: int | None = None
        self._is_coordinator = False
        self._ranks = 1
        self._topology = Topology(1)
        self._now_ns = 0
        self._repository: Repository | None = None
        self._writer: Writer | None = None
        self._contribution: Contribution | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For the process that `async_save` may save in: it opens the repository itself."""
        return self.__dict__ | {"_repository": None, "_writer": None, "_contribution": None}

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return _STEP.search(os.fspath(checkpoint_id)) is not None

    def reset(self, checkpoint_id: CheckpointId = None) -> None:
        self._step_asked = None if checkpoint_id is None else _step_of(checkpoint_id)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Raises `Refused` without collectives: there would be one snapshot for each rank."""
        if not kwargs.get("use_collectives", True):
            raise Refused(
                "without collectives each rank would commit a checkpoint of its own; nothing was saved.",
                hint="Leave out `use_collectives=False`: a checkpoint is committed for all ranks at once, or not.",
            )
        self._end_last()
        self._step_now = self._step if self._step_asked is None else self._step_asked
        self._step_asked = None  # torch tells of the next one only where its `checkpoint_id` is given
        self._is_coordinator = is_coordinator
        if is_coordinator:  # the others open it when they write: then it is there
            self._repository = self._opened(make=True)
            self._now_ns = self._repository.clock.now_ns()

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        self._ranks = len(plans)
        return [dataclasses.replace(plan, storage_data=rank) for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        repository = self._repository = self._of_coordinator()
        leaves = Leaves(set())
        file = f"shards-{plan.storage_data:05d}.safetensors"
        stored = [(item, _stored(item, file, plan, planner, leaves)) for item in plan.items]
        self._topology = dcp_metadata.topology(self._ranks, getattr(planner, "state_dict", None))
        done: Future[list[WriteResult]] = Future()
        writer = self._writer = repository.writer()
        if not stored:
            done.set_result([])
            return done
        try:
            tensors = TensorFile(leaves.found, {"format": "pt"})
            live = {leaf.name: leaf.tensor for leaf in leaves.found}

            def content(name: str) -> LeafBytes:
                """What is on another device, or not row-major, is copied, one at a time."""
                return LeafBytes(tensor_bytes(live[name].cpu().contiguous()), {})

            with pieces.threads() as pool:
                entry = pieces.store(writer, pool, file, pieces.of_tensors(repository, tensors, content))
            self._contribution = None if self._is_coordinator else writer.contribute()
        except BaseException:
            self._writer = None
            writer.abandon()
            raise
        share = _Share(repository.format.id, entry, self._contribution)
        nbytes = {leaf.name: leaf.nbytes for leaf in leaves.found}
        done.set_result([WriteResult(each.index, nbytes.get(at.name, 0), (share, at)) for each, at in stored])
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Commit, on the coordinator, what all ranks stored."""
        repository, writer = self._repository, self._writer
        assert repository is not None and writer is not None
        self._writer = None
        try:
            shares: list[_Share] = [each[0].storage_data[0] for each in results if each]
            if any(share.repository != repository.format.id for share in shares):
                raise Refused(
                    f"{self._url} is not the same repository for all ranks; nothing was saved.",
                    hint="Name a store that all ranks see: a bucket, or a folder of a file system that they share.",
                )
            stored: dict[MetadataIndex, Stored] = {
                each.index: each.storage_data[1] for of_rank in results for each in of_rank
            }
            described = dcp_metadata.describe(metadata, stored, self._topology)
            for share in shares:
                if share.contribution is not None:
                    writer.take(share.contribution)
            repository.refresh()  # other ranks may rely on packs that were committed since this one looked
            text = pieces.of_data(repository, msgspec.json.encode(described))
            with pieces.threads() as pool:
                last = pieces.store(writer, pool, dcp_metadata.FILE, text)
            snapshot = self._commit(repository, writer, [last, *(share.entry for share in shares)])
        except BaseException:
            writer.abandon()
            raise
        metadata.storage_meta = StorageMeta(checkpoint_id=snapshot.id)

    def _commit(self, repository: Repository, writer: Writer, files: list[Entry]) -> Snapshot:
        folder = Entry(path=".", type="dir", mode=0o755)
        entries = [msgspec.structs.replace(each, mtime_ns=self._now_ns) for each in (folder, *files)]
        for entry in sorted(entries, key=lambda entry: records.path_order(entry.raw_path)):
            writer.add_entry(entry)
        step = self._step_now
        return writer.commit(
            Snapshot(
                id="",
                kind="checkpoint",
                name=self._name,
                time=records.time_text(self._now_ns),
                tags={} if step is None else {"step": str(step)},
                host=socket.gethostname(),
                files=len(files),
                bytes=sum(entry.size for entry in entries),
                program=f"outlast {__version__}",
            )
        )

    def _end_last(self) -> None:
        """Whether the coordinator committed what was contributed last, nobody told; the log does."""
        writer, self._writer = self._writer, None
        contribution, self._contribution = self._contribution, None
        if writer is None:
            return
        repository = self._opened(make=False)
        if contribution is not None and all(ref.name in repository.state.packs for ref in contribution.packs):
            writer.settle()
        else:
            writer.abandon()

    def _of_coordinator(self) -> Repository:
        """The repository, which the coordinator has opened or made by now. Raises `Refused`."""
        if self._is_coordinator and self._repository is not None:
            return self._repository
        try:
            return self._opened(make=False)
        except NoRepository as exc:
            raise Refused(
                f"{socket.gethostname()} sees no repository at {self._url}, though the coordinator has one there.",
                hint="Name a store that all ranks see: a bucket, or a folder of a file system that they share.",
            ) from exc

    def _opened(self, *, make: bool) -> Repository:
        if self._repository is None:
            return _open(self._url, self._passphrase, self._sink, make=make)
        self._repository.refresh()
        return self._repository


class OutlastReader(StorageReader):
    """Loads a checkpoint that `OutlastWriter` made: of the run `name` the latest one, or the given snapshot.

    `dcp.load(..., checkpoint_id=...)` asks for another: the id of a snapshot, or a step as `OutlastWriter` takes it.
    Each rank reads the chunks that it needs, whatever the number of ranks that saved, and verifies every one: a
    load that raises `Corrupt` names tensors and pack, and may have filled others.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str,
        snapshot: Snapshot | str = "latest",
        passphrase: Passphrase | None = None,
        sink: EventSink = NULL_SINK,
    ) -> None:
        self._url, self._name, self._passphrase, self._sink = url, name, passphrase, sink
        self._asked = snapshot.id if isinstance(snapshot, Snapshot) else snapshot
        self._step: int | None = None
        self._is_coordinator = False
        self._ranks = 1
        self._loading: tuple[Snapshot, Description, Reading] | None = None

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        text = os.fspath(checkpoint_id)
        return _SNAPSHOT_ID.fullmatch(text) is not None or _STEP.search(text) is not None

    def reset(self, checkpoint_id: CheckpointId = None) -> None:
        if checkpoint_id is not None and _SNAPSHOT_ID.fullmatch(os.fspath(checkpoint_id)):
            self._asked, self._step = os.fspath(checkpoint_id), None
        elif checkpoint_id is not None:
            self._step = _step_of(checkpoint_id)

    def read_metadata(self, *args: Any, **options: Any) -> Metadata:
        """Raises `NoRepository`, `NotFound`, `Corrupt`, `Refused`."""
        repository = _open(self._url, self._passphrase, self._sink, make=False)
        snapshot = self._find(repository)
        files = {entry.path: entry for entry in repository.entries(snapshot) if entry.type == "file"}
        entry = files.get(dcp_metadata.FILE)
        if entry is None:
            raise Refused(
                f"checkpoint {snapshot.id[:8]} was not made through torch.distributed.checkpoint: it has no "
                f"{dcp_metadata.FILE}.",
                hint="`outlast.Run` reads what it saved itself; give the two different names.",
            )
        what = f"{dcp_metadata.FILE} of checkpoint {snapshot.id[:8]}"
        data = Content(entry, RecentChunks(repository).get).read(0, entry.size)
        described = dcp_metadata.read(data, {path: each.size for path, each in files.items()}, what)
        self._loading = snapshot, described, Reading(repository, snapshot, described, files)
        return dcp_metadata.metadata_of(described)

    def _find(self, repository: Repository) -> Snapshot:
        if self._step is None and self._asked != "latest":
            return repository.find_snapshot(self._asked, self._name)
        every = [each for each in repository.snapshots() if each.kind == "checkpoint" and each.name == self._name]
        wanted = [each for each in every if self._step is None or each.tags.get("step") == str(self._step)]
        if not wanted:
            of = "" if self._step is None else f" of step {self._step}"
            raise NotFound(
                f"{self._url} has no checkpoint{of} named {self._name}.", hint="`outlast snapshots` lists all."
            )
        return max(reversed(wanted), key=lambda each: each.time)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self._is_coordinator = is_coordinator

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        assert self._loading is not None
        return dataclasses.replace(plan, storage_data=self._loading[0].id)

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Raises `Busy` where a save was committed while the ranks looked for the latest checkpoint."""
        self._ranks = len(plans)
        if len({plan.storage_data for plan in plans}) > 1:
            raise Busy(
                "the ranks found different latest checkpoints, for one was committed meanwhile; nothing was loaded.",
                hint="Load again, or name the snapshot.",
            )
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        assert self._loading is not None
        snapshot, described, reading = self._loading
        now = dcp_metadata.topology(self._ranks, getattr(planner, "state_dict", None))
        if self._is_coordinator and now != described.saved_by:
            reason = f"checkpoint {snapshot.id[:8]} was saved with {described.saved_by}, now {now}: resharding"
            self._sink.event(Event("checkpoint.resharded", reason, {"snapshot": snapshot.id}))
        for item in plan.items:
            if item.type == LoadItemType.BYTE_IO:
                # Planners take such objects as `torch.save` writes them. These bytes are made here, from a plain value.
                made = io.BytesIO()
                torch.save(reading.object(item.storage_index.fqn), made)
                made.seek(0)
                planner.load_bytes(item, made)
        reading.tensors([item for item in plan.items if item.type == LoadItemType.TENSOR], planner)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def _open(url: str, passphrase: Passphrase | None, sink: EventSink, *, make: bool) -> Repository:
    try:
        return outlast.open(url, passphrase=passphrase, sink=sink)
    except NoRepository:
        if not make:
            raise
        return outlast.create(url, passphrase=passphrase, compression="none", sink=sink)


def _step_of(checkpoint_id: str | os.PathLike[str]) -> int:
    found = _STEP.search(os.fspath(checkpoint_id))
    if found is None:
        raise InvalidInput(f"{os.fspath(checkpoint_id)!r} does not end with the number of a step.")
    return int(found[1])


def _stored(item: WriteItem, file: str, plan: SavePlan, planner: SavePlanner, leaves: Leaves) -> Stored:
    """What will be known of an item; its tensors are gathered and not read yet. Raises `Refused`."""
    fqn = item.index.fqn
    if item.type != WriteItemType.BYTE_IO:
        tensor = planner.resolve_data(item)
        if not isinstance(tensor, torch.Tensor):
            raise Refused(f"the planner gave a {type(tensor).__name__} for the tensor {fqn}; nothing was saved.")
        node = leaves.take(_name(item), tensor)
        return Stored(file, name=node["name"])

    def take(path: Path, tensor: torch.Tensor) -> Node:
        if hasattr(tensor, "to_local"):
            raise Refused(f"{shown(path)} is a sharded tensor inside of an object; nothing was saved.")
        return leaves.take(".".join(map(str, path)), tensor)

    mapping = plan.planner_data if isinstance(plan.planner_data, dict) else {}
    path = mapping.get(fqn, (fqn,))
    return Stored(file, tree=encode(_object(item, planner, path), path, take))


def _object(item: WriteItem, planner: SavePlanner, path: Path) -> object:
    """The object that a planner would write as a pickle."""
    if isinstance(planner, DefaultSavePlanner):
        stock, own = DefaultSavePlanner, type(planner)
        if (own.transform_object, own.resolve_data) == (stock.transform_object, stock.resolve_data):
            return planner.lookup_object(item.index)
    data = planner.resolve_data(item)
    assert isinstance(data, io.BytesIO)
    data.seek(0)
    try:
        return torch.load(data, weights_only=True, map_location="cpu")
    except Exception as exc:
        raise Refused(
            f"{shown(path)} has no form that could be read back without running code; nothing was saved. "
            f"What the planner made of it is not plain: {str(exc).splitlines()[0]}",
            hint="Leave it out of the state, or keep it as numbers, text, lists, dictionaries and tensors.",
        ) from exc


def _name(item: WriteItem) -> str:
    data = item.tensor_data
    if data is None or data.chunk.sizes == data.size:
        return item.index.fqn
    return f"{item.index.fqn}@{','.join(map(str, data.chunk.offsets))}"
