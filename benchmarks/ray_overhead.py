"""What Ray Data costs: rows per second through one actor beside the same loop without Ray, and memory as rows grow.

The work is real: activation patching on the pocket target, shards written to disk. Both ways load the target before the
clock starts, do the same shards, and take turns, with one CPU thread each. Last line, one JSON object:

    with_ray, without_ray    records per second, from the first shard begun to the last one written
    ratio                    with_ray / without_ray
    driver_growth, actor_growth    peak memory with ten times the rows over that with one times, minus 1
    driver_bytes_per_record    that growth of the driver, over the records that it is for

A tenth of the rows must give at least 5,000 records, or what the libraries take hides what a record takes.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SMALLEST = 5000
"""Records of a tenth of the rows, at least."""
CHILD_THREADS = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "RAY_ADDRESS": ""}


def config_of(folder: Path, limit: int) -> Any:
    """Activation patching of the first `limit` facts of the pocket world, without balancing the records."""
    from introspect_ray.config import ActivationPatchingConfig, GenerateConfig, SourceConfig

    return GenerateConfig(
        output=str(folder / "out"),
        source=SourceConfig(limit=limit),
        activation_patching=ActivationPatchingConfig(balance=False),
        items_per_shard=64,
        max_failed_share=1.0,
    )


def peak_bytes() -> int:
    """Largest resident size of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed_target(config: Any) -> Any:
    """The config's target, warmed up; notes beside the output when it was ready and whose process it is in."""
    import torch

    from introspect_ray.interventions.target import Target

    torch.set_num_threads(1)
    target = Target.load(config.target)
    target.clean_runs([[1, 2, 3]])
    folder = Path(config.output).parent
    (folder / "ready").write_text(json.dumps({"pid": os.getpid(), "time": time.time()}))
    return target


def last_write(folder: Path) -> float:
    """When the last shard got its name."""
    return max(path.stat().st_mtime for path in (folder / "out" / "shards").glob("shard-*"))


def without_ray(folder: Path, limit: int) -> dict[str, float]:
    """The loop that an actor runs, in this process."""
    from introspect_ray.data.prepare import begin, prepare
    from introspect_ray.data.writer import write_shard
    from introspect_ray.tasks.registry import get_task

    config = config_of(folder, limit)
    prepared = prepare(config, get_task(config.task))
    begin(prepared, prepared.orders)
    target = timed_target(config)
    start = time.time()
    rows = sum(write_shard(prepared.task, target, config, order, "run").num_rows for order in prepared.orders)
    return {"rate": rows / (time.time() - start), "records": rows}


def with_ray(folder: Path, limit: int) -> dict[str, float]:
    """The whole job on a local cluster with one actor; the peaks of driver and actor beside."""
    import ray

    from introspect_ray.data.generate import generate_dataset

    actor_peak = 0

    def watch(_progress: Any) -> None:
        nonlocal actor_peak
        if (folder / "ready").exists():
            actor_peak = max(actor_peak, _peak_of(json.loads((folder / "ready").read_text())["pid"]))

    # An actor's process has never heard of this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[timed_target.__module__])
    summary = generate_dataset(config_of(folder, limit), watch, load_target=timed_target)
    start = json.loads((folder / "ready").read_text())["time"]
    rows = summary.manifest.num_records
    rate = rows / (last_write(folder) - start)
    return {"rate": rate, "records": rows, "driver": float(peak_bytes()), "actor": float(actor_peak)}


def _peak_of(pid: int) -> int:
    """Largest resident size of another process so far; 0 if it is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0)


def in_process(function: Any, limit: int) -> dict[str, float]:
    """The function's result from a process of its own, so that peaks and caches are its own as well."""
    with tempfile.TemporaryDirectory() as folder:
        context = multiprocessing.get_context("spawn")
        with context.Pool(1) as pool:
            return pool.apply(function, (Path(folder), limit))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000, help="source rows of the speed comparison (default: 2000)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds in which both ways run once (default: 3)")
    arguments = parser.parse_args()
    if arguments.rows < 10 or arguments.rounds < 1:
        parser.error("--rows must be at least 10 and --rounds at least 1")
    os.environ.update(CHILD_THREADS)
    rates: dict[str, list[float]] = {"with_ray": [], "without_ray": []}
    large: dict[str, float] = {}
    for number in range(arguments.rounds):
        for name, function in (("without_ray", without_ray), ("with_ray", with_ray)):
            result = in_process(function, arguments.rows)
            rates[name].append(result["rate"])
            print(f"round {number}, {name}: {result}", flush=True)
            large = result
    small = in_process(with_ray, arguments.rows // 10)
    print(f"a tenth of the rows, with_ray: {small}", flush=True)
    if small["records"] < SMALLEST:
        parser.error(f"a tenth of the rows gave {small['records']} records, expected {SMALLEST}: raise --rows")
    per_record = (large["driver"] - small["driver"]) / (large["records"] - small["records"])
    medians = {name: round(statistics.median(found), 2) for name, found in rates.items()}
    ratio = statistics.median(one / other for one, other in zip(rates["with_ray"], rates["without_ray"], strict=True))
    growth = {f"{name}_growth": round(large[name] / small[name] - 1, 4) for name in ("driver", "actor")}
    memory = {**growth, "driver_bytes_per_record": round(per_record, 1)}
    print(json.dumps({**medians, "ratio": round(ratio, 4), **memory}))


if __name__ == "__main__":
    main()
