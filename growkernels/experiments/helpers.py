"""Reproductions under torchrun: the first process runs the study, the others help its pool.

The first one schedules the study's parts among its own workers and those of the others, by the same
messages. So numbers, checkpoints and ``--resume`` are those of one process. All processes see the
run's folder under one path.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import threading
from collections.abc import Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from growkernels.experiments import pool

PLACE = "where the first process listens"


def of_torchrun() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ["WORLD_SIZE"]) > 1


def restarted() -> bool:
    """Whether torchrun has started the processes again, after one of them had failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def helped() -> bool:
    """Of the first process: let the others join, False. Of another: help it to its end, True."""
    if not of_torchrun():
        return False
    if int(os.environ["RANK"]) == 0:
        _listen()
        return False
    own = pool.workers_on("cpu")
    program = "from growkernels.experiments import helpers; helpers.help_out()"
    environment: Mapping[str, str] = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
    }
    others = [
        subprocess.Popen([sys.executable, "-c", program], env=environment) for _ in range(own - 1)
    ]
    try:
        help_out()
    except BaseException:
        for process in others:
            process.terminate()
        raise
    finally:
        for process in others:
            process.wait()
    return True


def help_out() -> None:
    """Work on what the first process sends, until it is gone."""
    place = json.loads(store_of(PLACE).get(PLACE))
    try:
        connection = Client(tuple(place["address"]), authkey=bytes.fromhex(place["key"]))
        assert isinstance(connection, Connection)
        connection.send(int(os.environ["RANK"]))
    except (ConnectionError, EOFError):
        return  # it has ended already
    pool.serve_runs(connection)


def store_of(name: str) -> Store:
    """Where the processes of this start find one another, for the purpose of this name."""
    # torchrun's store outlives a restart, with the address of a process that is gone.
    store, *_ = next(rendezvous("env://"))
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    return PrefixStore(f"start {start} {name}", store)


def _listen() -> None:
    key = secrets.token_bytes(32)
    listener = Listener((os.environ["MASTER_ADDR"], 0), backlog=64, authkey=key)
    store_of(PLACE).set(PLACE, json.dumps({"address": listener.address, "key": key.hex()}))
    threading.Thread(target=_welcome, args=(listener,), daemon=True).start()


def _welcome(listener: Listener) -> None:
    while True:
        try:
            connection = listener.accept()
            assert isinstance(connection, Connection)
            pool.helpers.append((connection, connection.recv()))
        except (AuthenticationError, EOFError, ConnectionError):
            continue
