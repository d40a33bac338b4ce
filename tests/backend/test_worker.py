"""An engine is stepped by the thread that loaded it."""

import threading
from functools import partial
from typing import Any

import pytest
from inplace.drivers import Language, StreamDriver, Worker
from inplace.engines import Launched
from models import Repository, open_instance
from streaming import Streams


def test_everything_runs_on_one_thread_in_order_and_errors_are_the_callers() -> None:
    worker, done = Worker(), list[int]()
    for number in range(5):
        worker.submit(partial(done.append, number))
    with pytest.raises(ZeroDivisionError):
        worker.submit(lambda: 1 // 0).result()
    assert worker.submit(threading.get_ident).result() == worker.submit(threading.get_ident).result() != threading.get_ident()
    worker.close()
    assert done == list(range(5))


def test_a_stream_driver_steps_on_the_thread_that_it_is_given(repository: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    worker, seen = Worker(), set[int]()
    loaded = worker.submit(threading.get_ident).result()
    instance = worker.submit(lambda: open_instance(repository.path / "llama")).result()
    launch = instance.engine.launch

    def watched(*given: Any) -> Launched:
        seen.add(threading.get_ident())
        return launch(*given)

    monkeypatch.setattr(instance.engine, "launch", watched)
    driver = StreamDriver(instance, Language(), 4, worker)
    assert Streams(driver).generate("a", [5], 6, end=True).reason == "length"
    driver.close()
    assert seen == {loaded}
