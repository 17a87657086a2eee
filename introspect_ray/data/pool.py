"""Orders through a pool of actors on Ray Data: whoever is free takes the next, results come as they are done.

driver  orders (JSON)  ->  actors: `make()` once, then `work(order)` for each  ->  results (JSON), any order
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from typing import Any

import ray
import ray.data
import torch

from introspect_ray.config import ActorConfig
from introspect_ray.data.generate import RETRIES_PER_SHARD, check_resources, quiet_rows, run_context
from introspect_ray.errors import RunFailed, UserError

logger = logging.getLogger(__name__)

Work = Callable[[Any], Any]
"""One order -> its result; both go into JSON."""


class _Worker:
    """Holds what `make` loads. What `work` raises travels as a row: Ray keeps little more than an exception's text."""

    def __init__(self, make: Callable[[], Work]):
        # Ray sets OMP_NUM_THREADS to the actor's CPUs; torch read it when it was imported, which may be earlier.
        torch.set_num_threads(max(1, int(ray.get_runtime_context().get_assigned_resources().get("CPU", 1))))
        self.work, self.refused = None, ""
        try:
            self.work = make()
        except UserError as error:
            self.refused = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        rows = [self._row(str(order)) for order in batch["order"]]
        return {name: [row[name] for row in rows] for name in rows[0]}

    def _row(self, order: str) -> dict[str, str]:
        row = {"order": order, "result": "", "error_kind": "", "error": ""}
        if self.work is None:
            return row | {"error_kind": UserError.__name__, "error": self.refused}
        try:
            return row | {"result": json.dumps(self.work(json.loads(order)))}
        except UserError as error:
            return row | {"error_kind": UserError.__name__, "error": str(error)}
        except Exception as error:
            logger.exception("an order failed")
            return row | {"error_kind": type(error).__name__, "error": f"{type(error).__name__}: {error}"}


def run_orders(make: Callable[[], Work], orders: Sequence[Any], actors: ActorConfig, what: str) -> Iterator[Any]:
    """The result of every order as it is done. Needs a connection to Ray.

    Raises UserError at once if an actor does; RunFailed after the last order if others failed, `what` naming them.
    """
    if not orders:
        return
    check_resources(actors)
    rows = ray.data.from_items([{"order": json.dumps(order)} for order in orders], override_num_blocks=len(orders))
    with warnings.catch_warnings():
        # No named arguments replace the last two yet (Ray 2.60; they go in 2.64, hence the pin).
        warnings.simplefilter("ignore")
        done = rows.map_batches(
            _Worker,
            fn_constructor_kwargs={"make": make},
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(
                min_size=actors.min_size, max_size=actors.max_size, initial_size=actors.initial_size
            ),
            num_cpus=actors.num_cpus,
            num_gpus=actors.num_gpus or None,
            max_restarts=-1,
            max_task_retries=RETRIES_PER_SHARD,
        )
    lost: list[str] = []
    answered = 0
    with run_context(), closing(quiet_rows(done.iter_rows(), lambda _stream: None)) as results:
        try:
            for row in results:
                answered += 1
                if row["error_kind"] == UserError.__name__:
                    raise UserError(row["error"])
                if row["error_kind"]:
                    lost.append(row["error"])
                else:
                    yield json.loads(row["result"])
        except ray.exceptions.RayError as error:
            raise RunFailed(f"{what}: {str(error).strip().splitlines()[0]}; the same command tries again") from error
    if lost or answered < len(orders):
        reason = lost[0] if lost else "their processes died"
        missing = len(orders) - answered + len(lost)
        raise RunFailed(f"{missing} of {len(orders)} {what} failed ({reason}); the same command tries again")
