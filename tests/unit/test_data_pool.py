"""A pool that Ray Data ends for an actor that was never placed is made again, for the orders that are left."""

from types import SimpleNamespace

import pytest

import introspect_ray.data.pool as pool_module
from introspect_ray.config import ActorConfig
from introspect_ray.data.pool import NEVER_RAN, PIPELINES, Pool, run_orders
from introspect_ray.data.shards import ShardOrder
from introspect_ray.data.storage import Folder
from introspect_ray.errors import RunFailed

ORDERS = [ShardOrder(index, "run") for index in range(4)]


@pytest.fixture
def pool(tmp_path):
    return Pool(Folder(str(tmp_path)), ActorConfig(), object, {})


def pipelines(monkeypatch, done_by_each):
    """Each pipeline does so many of its orders, then ends with the error, or well if it has no more; their orders."""
    asked = []

    def pipeline(_pool, orders, _run_id):
        done = done_by_each[len(asked)]
        asked.append([order.index for order in orders])

        def rows():
            for order in orders[:done]:
                yield {"index": order.index, "info": f"made {order.index}", "error_kind": "", "error": ""}
            if done < len(orders):
                raise RuntimeError(f"ActorDiedError\n{NEVER_RAN} - it was cancelled before it started running.")

        return SimpleNamespace(iter_rows=rows)

    monkeypatch.setattr(pool_module, "_pipeline", pipeline)
    return asked


def test_what_is_left_goes_on_with_another_pool(pool, monkeypatch):
    asked = pipelines(monkeypatch, [1, 0, 3])
    assert [(order.index, info) for order, info in run_orders(pool, ORDERS)] == [(n, f"made {n}") for n in range(4)]
    assert asked == [[0, 1, 2, 3], [1, 2, 3], [1, 2, 3]]


def test_a_pool_that_never_starts_fails_the_run(pool, monkeypatch):
    asked = pipelines(monkeypatch, [0] * PIPELINES)
    with pytest.raises(RunFailed, match="an actor was cancelled before it started"):
        list(run_orders(pool, ORDERS))
    assert len(asked) == PIPELINES
