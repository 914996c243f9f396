"""Measure the reading of large files of prompts: seconds and peak memory, beside the library `datasets` alone.

    python jobs/bench/reading.py                       # 1,000,000 prompts; about 3 minutes on two cores
    python jobs/bench/reading.py --rows 100000 --image-bytes 256

Each row is read in a process of its own, which reports its peak resident memory and that after its imports. rayrl reads
the prompts as a run does: without duplicates, and each with its id. `datasets` streams the file and gives each prompt;
that is less work. The file of Parquet has a column of images beside the prompts. Seconds of the CPU count all threads,
and say more than the clock where the machine is busy.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from hardware import hardware

ROWS_PER_GROUP = 10_000
FORMATS = {"wide.parquet": "parquet", "prompts.csv": "csv", "prompts.jsonl": "json"}
"""Files, and the builders of `datasets` that read them."""


def main() -> None:
    """Write the files, read each in processes of their own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--image-bytes", type=int, default=1024)
    parser.add_argument("--files", nargs="+", choices=FORMATS, default=[*FORMATS])
    parser.add_argument("--read", nargs=2, metavar=("READER", "FILE"), help="read one file; used by this script itself")
    arguments = parser.parse_args()
    if arguments.read:
        print(json.dumps(measure(*arguments.read)))
        return
    print(hardware())
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), arguments.rows, arguments.image_bytes)
        print(f"\n{arguments.rows:,} prompts; images of {arguments.image_bytes:,} bytes beside those of Parquet\n")
        print("| file | size (MiB) | reader | time (s) | of the CPU (s) | peak memory (MiB) | above imports (MiB) |")
        print("|---|---|---|---|---|---|---|")
        for name in arguments.files:
            path = Path(folder) / name
            for reader in ("rayrl", "datasets"):
                command = [sys.executable, __file__, "--read", reader, str(path)]
                result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
                assert result["num_rows"] == arguments.rows, result
                memory = f"{result['peak_mib']:.0f} | {result['peak_mib'] - result['start_mib']:.0f}"
                size_mib = path.stat().st_size / 2**20
                seconds = f"{result['read_s']:.1f} | {result['cpu_s']:.1f}"
                print(f"| {name} | {size_mib:.0f} | {reader} | {seconds} | {memory} |")


def write_files(folder: Path, num_rows: int, image_bytes: int) -> None:
    """Write the same prompts as Parquet, CSV and JSONL."""
    images = np.random.default_rng(0)
    schema = pa.schema([("prompt", pa.string()), ("image", pa.binary())])
    with (
        pq.ParquetWriter(folder / "wide.parquet", schema) as parquet,
        (folder / "prompts.csv").open("w", newline="") as of_csv,
        (folder / "prompts.jsonl").open("w") as of_jsonl,
    ):
        writer = csv.writer(of_csv)
        writer.writerow(["id", "prompt"])
        for start in range(0, num_rows, ROWS_PER_GROUP):
            numbers = range(start, min(start + ROWS_PER_GROUP, num_rows))
            prompts = [
                f"Question {n}: how do I mend an old chair, a lamp or a boat, and what do I need for it?"
                for n in numbers
            ]
            content = [images.bytes(image_bytes) for _ in numbers]
            parquet.write_table(pa.table({"prompt": prompts, "image": content}, schema=schema))
            writer.writerows(zip(numbers, prompts, strict=True))
            of_jsonl.writelines(
                json.dumps({"id": n, "prompt": p}) + "\n" for n, p in zip(numbers, prompts, strict=True)
            )


def measure(reader: str, path: str) -> dict[str, float]:
    """Read one file in this process; memory is the peak of the whole process."""
    rows = read_by_rayrl(path) if reader == "rayrl" else read_by_datasets(path)
    start_mib = peak_mib()
    started, started_cpu = time.monotonic(), time.process_time()
    num_rows = sum(1 for _ in rows)
    return {
        "num_rows": num_rows,
        "read_s": time.monotonic() - started,
        "cpu_s": time.process_time() - started_cpu,
        "start_mib": start_mib,
        "peak_mib": peak_mib(),
    }


def read_by_rayrl(path: str) -> Iterator[object]:
    """Return the prompts as a run reads them."""
    from rayrl.config import DataConfig
    from rayrl.data.reading import read_prompts

    return read_prompts(DataConfig(path=path), str)


def read_by_datasets(path: str) -> Iterator[object]:
    """Return the prompts as `datasets` streams them."""
    import datasets

    builder = FORMATS[Path(path).name]
    options: dict[str, Any] = {"columns": ["prompt"]} if builder == "parquet" else {}
    stream = datasets.load_dataset(builder, data_files=path, split="train", streaming=True, **options)
    return (row["prompt"] for row in stream)


def peak_mib() -> float:
    """Return the peak resident memory of this process so far; getrusage would count the process that started it too."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:")]
    return int(line.split()[1]) / 1024


if __name__ == "__main__":
    main()
