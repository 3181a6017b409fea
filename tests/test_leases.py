"""Leases: one holder at a time, on a disk and behind a URL, also when holders are killed or held up."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipeline import leases, locations
from pipeline.errors import InputError, LeaseLost
from pipeline.leases import lease, lock_if_free, locked, wait_until_free


@pytest.fixture(params=["disk", "s3"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path / "locks" / "name") if request.param == "disk" else f"{request.getfixturevalue('s3_url')}/name"


HOLDER = textwrap.dedent("""\
    import sys, time
    from pipeline.leases import lease
    from pipeline.errors import LeaseLost

    with lease(sys.argv[1], ttl=float(sys.argv[2])) as held:
        print("held", flush=True)
        sys.stdin.readline()
        try:
            held.check()
        except LeaseLost:
            print("lost", flush=True)
    """)


@pytest.fixture
def start_holder() -> Iterator[object]:
    """Start a process that holds a lease until it is sent a line."""
    started = []

    def start(location: str, ttl: float = 1.0) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, location, str(ttl)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_one_holds_it_at_a_time(location: str) -> None:
    inside, most, times = 0, 0, []

    def hold(_: int) -> None:
        nonlocal inside, most
        with lease(location, ttl=10):
            inside += 1
            most = max(most, inside)
            times.append(time.monotonic())
            time.sleep(0.02)
            inside -= 1

    with ThreadPoolExecutor(5) as pool:
        list(pool.map(hold, range(10)))
    assert len(times) == 10
    assert most == 1


def test_who_waits_is_told_once_who_holds_it(location: str, start_holder: object) -> None:
    process = start_holder(location)  # type: ignore[operator]
    told: list[str] = []

    def let_go_when_told() -> None:
        while not told:
            time.sleep(0.01)
        time.sleep(0.3)
        process.communicate("\n")

    thread = threading.Thread(target=let_go_when_told)
    thread.start()
    with lease(location, waiting=told.append):
        thread.join()
    assert len(told) == 1
    assert f"process {process.pid} on " in told[0]


def test_nobody_waits_for_what_was_given_back(location: str) -> None:
    with lease(location, ttl=60):
        pass
    started, told = time.monotonic(), []
    with lease(location, waiting=told.append):
        assert told == []
    assert time.monotonic() - started < 2


def test_lease_of_a_killed_holder_is_taken_over(location: str, start_holder: object) -> None:
    process = start_holder(location, 1.5)  # type: ignore[operator]
    os.kill(process.pid, signal.SIGKILL)
    started = time.monotonic()
    with lease(location) as held:
        waited = time.monotonic() - started
        held.check()
    assert waited < 5
    if locations.is_url(location):
        assert waited > 1.4  # no sooner than the dead holder had stated


def test_a_holder_that_lives_keeps_it_for_longer_than_its_time(s3_url: str) -> None:
    with lease(f"{s3_url}/name", ttl=0.6) as held:
        other = threading.Thread(target=wait_until_free, args=(f"{s3_url}/name",), daemon=True)
        other.start()
        time.sleep(2)
        held.check()
        assert other.is_alive()
    other.join(5)
    assert not other.is_alive()


def test_a_holder_that_was_held_up_learns_that_it_lost_it(s3_url: str, start_holder: object) -> None:
    process = start_holder(f"{s3_url}/name", 0.6)  # type: ignore[operator]
    os.kill(process.pid, signal.SIGSTOP)
    with lease(f"{s3_url}/name", ttl=60) as held:
        os.kill(process.pid, signal.SIGCONT)
        out, _ = process.communicate("\n", timeout=30)
        assert out == "lost\n"
        held.check()  # and what the late one does at its end takes nothing from the new one


def test_a_dead_holder_that_somebody_waited_for_has_lost_it(s3_url: str, start_holder: object) -> None:
    process = start_holder(f"{s3_url}/name", 0.6)  # type: ignore[operator]
    os.kill(process.pid, signal.SIGSTOP)
    wait_until_free(f"{s3_url}/name")
    os.kill(process.pid, signal.SIGCONT)
    assert process.communicate("\n", timeout=30)[0] == "lost\n"


def test_a_heartbeat_that_is_refused_for_a_while_loses_nothing(s3_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with lease(f"{s3_url}/name", ttl=1.5) as held:
        with monkeypatch.context() as away:
            away.setattr(leases, "write", _refuse)
            time.sleep(0.7)
        before = locations.read(f"{s3_url}/name/{1:012d}")
        time.sleep(0.8)
        assert locations.read(f"{s3_url}/name/{1:012d}") != before
        held.check()


def _refuse(url: str, content: bytes) -> None:
    raise InputError("access was denied", where=url)


def test_who_fills_a_gap_behind_the_end_of_the_chain_holds_nothing(s3_url: str) -> None:
    with lease(f"{s3_url}/name"):
        pass
    with lease(f"{s3_url}/name"):
        pass
    [newest] = locations.entries(f"{s3_url}/name")
    assert int(newest) == 2  # earlier links are gone, the last one stays

    locations.write(f"{s3_url}/name/{9:012d}", locations.read(f"{s3_url}/name/{newest}") or b"")
    with lease(f"{s3_url}/name") as held:
        held.check()
    assert [int(name) for name in locations.entries(f"{s3_url}/name")] == [10]


def test_check_fails_once_another_has_taken_over(s3_url: str) -> None:
    with lease(f"{s3_url}/name", ttl=60) as held:
        held.check()
        locations.write(f"{s3_url}/name/{2:012d}", b"{}")
        with pytest.raises(LeaseLost, match="was taken over by another process"):
            held.check()


def test_a_lock_file_that_is_swept_while_somebody_waits_locks_nobody_out_and_lets_nobody_in_twice(
    tmp_path: Path,
) -> None:
    path, inside = tmp_path / "lock", []

    def hold() -> None:
        with locked(path):
            inside.append(path.stat().st_ino)

    with lock_if_free(path) as free:
        assert free  # no file, no holder
    assert not path.exists()
    with locked(path):
        first = path.stat().st_ino
        with lock_if_free(path) as free:
            assert not free
        waiter = threading.Thread(target=hold)
        waiter.start()
        time.sleep(0.2)
        path.unlink()
        path.touch()  # the inode of the swept file is still open, so this is another one
    waiter.join(10)
    assert inside == [path.stat().st_ino]
    assert inside != [first]


def test_shared_holders_keep_an_exclusive_one_out(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with locked(path, shared=True), locked(path, shared=True), lock_if_free(path) as free:
        assert not free
    with lock_if_free(path) as free:
        assert free


def test_of_many_conditional_puts_exactly_one_wins(s3_url: str) -> None:
    def put(number: int) -> bool:
        return locations.put_if_absent(f"{s3_url}/one", f"writer {number}".encode())

    with ThreadPoolExecutor(16) as pool:
        won = list(pool.map(put, range(48)))
    assert won.count(True) == 1
    assert locations.read(f"{s3_url}/one") == f"writer {won.index(True)}".encode()
    assert put(won.index(True))  # an answer that was lost on the way is given again
    assert not put(99)


def test_of_many_processes_conditional_puts_exactly_one_wins(s3_url: str) -> None:
    code = textwrap.dedent("""\
        import sys
        from pipeline.locations import put_if_absent
        print([put_if_absent(f"{sys.argv[1]}/{i}", sys.argv[2].encode()) for i in range(40)].count(True))
        """)
    command = [sys.executable, "-c", code, s3_url]
    processes = [
        subprocess.Popen([*command, f"process {number}"], stdout=subprocess.PIPE, text=True) for number in range(3)
    ]
    assert sum(int(process.communicate(timeout=60)[0]) for process in processes) == 40
