"""Worker processes end with the process that started them."""

import signal
import subprocess
import sys
import time

import psutil
import pytest

from data.workers import map_in_workers
from tests import ROOT

PARENT = """
import sys, time
from data.workers import map_in_workers

def work(seconds, word):
    sys.stdout.write(word + "\\n")  # one write: print makes two, and those of two workers may mix
    time.sleep(seconds)


if __name__ == "__main__":
    for _ in map_in_workers(work, [60, 60], {"word": "ready"}, workers=2, method=sys.argv[1]):
        pass
"""


@pytest.mark.parametrize("method", ["fork", "spawn"])
@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_workers_end_with_a_parent_that_is_struck(tmp_path, method, sign):
    (tmp_path / "parent.py").write_text(PARENT)
    command = [sys.executable, str(tmp_path / "parent.py"), method]
    environment = {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline(), parent.stdout.readline()] == [b"ready\n"] * 2
        workers = psutil.Process(parent.pid).children(recursive=True)
        parent.send_signal(sign)
    _, alive = psutil.wait_procs(workers, timeout=20)
    for worker in alive:
        worker.kill()
    assert len(workers) >= 2 and not alive


@pytest.mark.slow
def test_jobs_are_done_in_order_by_any_number_of_workers_and_an_error_ends_them():
    def done(workers: int) -> list[int]:
        return [*map_in_workers(pow, range(9), {"exp": 2}, workers, "fork", chunksize=2)]

    assert done(0) == done(1) == done(2) == [number**2 for number in range(9)]
    before = time.monotonic()
    with pytest.raises(TypeError):
        [*map_in_workers(pow, [None, 0], {"exp": 2}, workers=2, method="fork")]
    assert time.monotonic() - before < 20
