"""What was paid for stays, however a run ends: no call is paid twice, and the cap holds over the sum of runs."""

import os
import signal
import subprocess
import sys
import threading
from collections import Counter

import pytest
from chat_server import Reply, chat_server, said

from introspect_ray.config import ChatConfig, EndpointConfig
from introspect_ray.data.journal import FILES_TOGETHER, open_journal
from introspect_ray.data.storage import Folder
from introspect_ray.errors import UserError
from introspect_ray.models.chat import Completion, Failure, ask
from introspect_ray.models.endpoint import EndpointChat

RUN = """
import sys
from introspect_ray.config import ChatConfig
from introspect_ray.data.journal import open_journal
from introspect_ray.data.storage import Folder
from introspect_ray.models.chat import ask
from introspect_ray.models.endpoint import EndpointChat

chat = EndpointChat(ChatConfig.model_validate_json(sys.argv[1]), 0, open_journal(Folder(sys.argv[2])))
chat.complete([ask(str(n)) for n in range(int(sys.argv[3]))])
"""
URLS = pytest.mark.parametrize("url", ["{}", "memory://{}"], ids=["disk", "memory"])


def config(url, cap):
    prices = {"input_price": 1e6, "output_price": 0.0, "max_cost": cap, "concurrency": 2, "attempts": 1}
    return ChatConfig(kind="endpoint", endpoint=EndpointConfig(url=url, **prices))


def test_a_run_that_is_killed_between_answers_pays_nothing_twice_and_the_cap_holds_over_all_runs(tmp_path, monkeypatch):
    """Each call costs 30, and 33 at most: with 30 answers under way, kills and goes on, 10 fit into 330."""
    monkeypatch.setenv("no_proxy", "*")
    cap, most, output = 330.0, 33.0, str(tmp_path / "out")
    held, driver = threading.Event(), []

    def answer(_text, number):
        if number in (4, 8):
            os.kill(driver[-1].pid, signal.SIGKILL)
            return Reply(hold=held)
        return said("fine", sent=30, answered=0)

    with chat_server(answer) as (url, requests):
        for _ in range(2):
            arguments = [config(url, cap).model_dump_json(), output, "20"]
            driver.append(subprocess.Popen([sys.executable, "-c", RUN, *arguments]))
            assert driver[-1].wait(200) == -signal.SIGKILL
        journal = open_journal(Folder(output))
        found = EndpointChat(config(url, cap), 0, journal).complete([ask(str(n)) for n in range(20)])
        held.set()
        sent = Counter(body["messages"][0]["content"] for _, body in requests)
        # A kill finds at most as many calls under way as run at once: these alone are made again.
        assert sum(sent.values()) - len(sent) <= 2 * 2
        assert len(requests) * 30 <= cap and journal.spent <= cap < journal.spent + most
        answered = [one for one in found if isinstance(one, Completion)]
        assert len(answered) >= 6 and {one.reason for one in found if isinstance(one, Failure)} == {"cost_cap"}
        assert open_journal(Folder(output)).spent == journal.spent


@URLS
def test_calls_outlive_the_process_and_many_files_become_one(tmp_path, url, monkeypatch):
    folder = Folder(url.format(tmp_path))
    journal = open_journal(folder)
    for number in range(FILES_TOGETHER):
        call = journal.begin(f"r{number}", 3.0, None)
        journal.end(call, 2.0, Completion(f"answer \u2028 {number}", 1, 1) if number else Failure("refused"))
    assert len(Folder(f"{folder.url}/calls").names()) < FILES_TOGETHER
    lost = journal.begin("lost", 3.0, None)
    free = journal.begin("free", 3.0, None)
    journal.end(free, 0.0, None)
    again = open_journal(folder)
    assert again.spent == journal.spent == 2.0 * FILES_TOGETHER + lost.cost
    assert again.find("r0") == Failure("refused") and again.find("r9") == Completion("answer \u2028 9", 1, 1)
    assert again.find("lost") is None and again.begin("next", 1.0, again.spent) is None

    # A stop after one file took the place of the others, before they are gone.
    with monkeypatch.context() as patch:
        patch.setattr(Folder, "remove", lambda *_: None)
        again.settle()
    assert len(Folder(f"{folder.url}/calls").names()) > 2
    settled = open_journal(folder)
    assert settled.spent == again.spent and settled.find("r9") is None
    settled.settle()
    assert len(Folder(f"{folder.url}/calls").names()) == 1 and open_journal(folder).spent == again.spent


def test_threads_write_together_and_nothing_is_lost(tmp_path):
    folder = Folder(str(tmp_path))
    journal = open_journal(folder)

    def call(number):
        for each in range(20):
            begun = journal.begin(f"{number}/{each}", 1.0, None)
            journal.end(begun, 0.5, Completion("x", 1, 1))

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    again = open_journal(folder)
    assert again.spent == 80 and all(again.find(f"{n}/{each}") for n in range(8) for each in range(20))


def test_a_file_that_is_no_journal_is_named(tmp_path):
    (tmp_path / "calls").mkdir()
    (tmp_path / "calls" / "x.jsonl").write_text('{"cost": 1}\n')
    with pytest.raises(UserError, match=r"calls/x\.jsonl holds something else than calls .*delete it"):
        open_journal(Folder(str(tmp_path)))
