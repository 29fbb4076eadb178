"""Other ways of what a copy does, to compare with.

python bench/sender.py put FOLDER BUCKET THREADS    every file of a folder into a bucket, by obstore alone
python bench/sender.py zipnn FOLDER TARGET          every file of a folder compressed by ZipNN, as its README says
"""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def put(folder: Path, bucket: str, threads: int) -> None:
    import obstore
    from obstore.store import S3Store

    store = S3Store(bucket, client_options={"allow_http": True, "timeout": "300s"})
    files = sorted(path for path in folder.rglob("*") if path.is_file())

    def send(path: Path) -> None:
        obstore.put(store, path.name, path.read_bytes(), mode="create", use_multipart=False)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(send, files))


def zipnn(folder: Path, target: Path) -> None:
    import zipnn

    for path in sorted(folder.rglob("*")):
        if path.is_file():
            dtype = "bfloat16" if path.suffix == ".safetensors" else "float32"
            packed = zipnn.ZipNN(bytearray_dtype=dtype, input_format="byte").compress(path.read_bytes())
            (target / f"{path.parent.name}-{path.name}.znn").write_bytes(packed)


if __name__ == "__main__":
    if sys.argv[1] == "put":
        put(Path(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    else:
        zipnn(Path(sys.argv[2]), Path(sys.argv[3]))
