"""SIGTERM ends a job as Ctrl-C does, whatever a library does to its handler meanwhile."""

import os
import signal
import threading

import pytest

from introspect_ray.cli import run_job
from introspect_ray.config import GenerateConfig
from introspect_ray.interruption import sigterm_interrupts, sigterm_kept


def end_by_sigterm(_):
    with sigterm_kept():
        signal.signal(signal.SIGTERM, lambda *_: None)
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_job_that_is_told_to_end_says_how_to_go_on(capsys):
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        run_job(GenerateConfig, end_by_sigterm, "A job.", [])
    assert (stopped.value.code, capsys.readouterr().err) == (130, "interrupted; the same command continues\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_leave_signals_alone():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with sigterm_interrupts(), sigterm_kept():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
