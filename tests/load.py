"""Twenty browser sessions click through a finished run for five minutes: `make load` prints errors, server time and memory.

Twenty browsers would measure the browsers. So each session speaks what a browser speaks with the server, Streamlit's messages over a websocket: it
opens pages, moves the slider of sparsity, changes method, layer and module, and waits for the script to finish.
"""

import argparse
import asyncio
import os
import random
import re
import tempfile
import time
import urllib.request
from collections import defaultdict
from pathlib import Path

import numpy as np
import psutil
import websockets
from browser import PAGES, served
from streamlit.proto.BackMsg_pb2 import BackMsg
from streamlit.proto.ForwardMsg_pb2 import ForwardMsg

from dpruner import pipeline

CHOICES = ("Method", "Domain", "Layer", "Module")
THINKING = (2.0, 8.0)   # seconds between what a page shows and the next click
WARM = 60.0             # seconds after which memory is expected to grow no more


class Session:
    """One visitor.

    Attributes:
        widgets: {id: its element} of all selectboxes and sliders that the page shows.
        errors: words of every exception or error that was shown.
    """

    def __init__(self, address: str, number: int):
        self.url = address.replace("http", "ws", 1) + "/_stcore/stream"
        self.random, self.widgets, self.errors = random.Random(number), {}, []
        self.states: dict[str, object] = {}
        self.page = ""

    async def visit(self, until: float, took: dict[str, list[float]]) -> None:
        """Click until it is time to go; `took` gets the seconds of every click, by page."""
        async with websockets.connect(self.url, subprotocols=["streamlit"], max_size=None) as self.socket:
            await self.rerun()
            while time.monotonic() < until:
                await asyncio.sleep(self.random.uniform(*THINKING))
                self.click()
                began = time.monotonic()
                await self.rerun()
                took[self.page or "run"].append(time.monotonic() - began)

    def click(self) -> None:
        """Every third click opens another page, the others change what a page shows."""
        usable = [w for w in self.widgets.values() if w.label.startswith("Sparsity") or w.label in CHOICES and len(w.options)]
        if not usable or self.random.random() < 1 / 3:
            self.page, self.widgets = self.random.choice(PAGES), {}
            return
        chosen = self.random.choice(usable)
        self.states[chosen.id] = float(self.random.randrange(20, 90)) if hasattr(chosen, "step") else self.random.choice(list(chosen.options))

    async def rerun(self) -> None:
        """Ask for a run of the script with the widgets as they stand, and take in what comes until it is finished."""
        message = BackMsg()
        message.rerun_script.page_name = self.page
        for id, value in self.states.items():
            state = message.rerun_script.widget_states.widgets.add(id=id)
            if isinstance(value, float):
                state.double_array_value.data.append(value)
            else:
                state.string_value = value
        await self.socket.send(message.SerializeToString())
        while True:
            answer = ForwardMsg.FromString(await asyncio.wait_for(self.socket.recv(), 60))
            if answer.HasField("script_finished"):
                if answer.script_finished not in (ForwardMsg.FINISHED_SUCCESSFULLY, ForwardMsg.FINISHED_EARLY_FOR_RERUN,
                                                  ForwardMsg.FINISHED_FRAGMENT_RUN_SUCCESSFULLY):
                    self.errors.append(f"{self.page}: the script ended with {answer.script_finished}")
                if answer.script_finished == ForwardMsg.FINISHED_SUCCESSFULLY:
                    return
            if answer.HasField("delta") and answer.delta.HasField("new_element"):
                self.take(answer.delta.new_element)

    def take(self, element) -> None:
        """Remember what can be clicked, and what went wrong."""
        kind = element.WhichOneof("type")
        if kind in ("selectbox", "slider"):
            self.widgets[getattr(element, kind).id] = getattr(element, kind)
        elif kind == "exception":
            self.errors.append(f"{self.page}: {element.exception.type}: {element.exception.message}")
        elif kind == "alert" and element.alert.format == element.alert.ERROR:
            self.errors.append(f"{self.page}: {element.alert.body}")


def server_of(address: str) -> psutil.Process:
    """The process that listens there."""
    port = int(address.rsplit(":", 1)[1])
    return next(p for p in psutil.Process().children(recursive=True)
                for c in p.net_connections("tcp") if c.laddr.port == port and c.status == psutil.CONN_LISTEN)


async def watch(server: psutil.Process, until: float, sizes: list[tuple[float, int]]) -> None:
    """Memory that the server has to itself, every second; pages of files, which the system can drop, are not counted (Linux)."""
    began = time.monotonic()
    while time.monotonic() < until:
        sizes.append((time.monotonic() - began, 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{server.pid}/status").read_text())[1])))
        await asyncio.sleep(1)


def cached(address: str) -> dict[str, float]:
    """Bytes of Streamlit's caches by name, the largest first, as the server itself tells them."""
    with urllib.request.urlopen(f"{address}/_stcore/metrics") as told:
        found = re.findall(r'cache_memory_bytes\{cache_type="([^"]*)",cache="([^"]*)"[^}]*\} (\S+)', told.read().decode())
    return dict(sorted(((f"{kind} {name}", float(size)) for kind, name, size in found), key=lambda pair: -pair[1]))


async def crowd(address: str, sessions: int, seconds: float):
    """Everybody at once; returns seconds by page, errors, and (when, bytes) of the server."""
    until, took, sizes = time.monotonic() + seconds, defaultdict(list), []
    visitors = [Session(address, number) for number in range(sessions)]
    await asyncio.gather(watch(server_of(address), until, sizes), *(v.visit(until, took) for v in visitors))
    return took, [error for v in visitors for error in v.errors], sizes


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sessions", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--runs", type=Path, help="a folder with a finished run (default: the demonstration, made first)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = args.runs or Path(folder) / "runs"
        if args.runs is None:
            from app import demo
            os.environ["DPRUNER_QUEUE"] = f"{folder}/queue"
            pipeline.run(demo.CONFIG, runs=runs, cache=Path(folder) / "cache")
        with served(runs, Path(folder) / "cache") as address:
            took, errors, sizes = asyncio.run(crowd(address, args.sessions, args.seconds))
            caches = cached(address)
    every = [t for page in took.values() for t in page]
    warm = [size for when, size in sizes if when >= min(WARM, args.seconds / 2)]
    print(f"{args.sessions} sessions, {args.seconds:.0f} s, {len(every)} clicks, {psutil.cpu_count()} cores, load {os.getloadavg()[1]:.1f}\n")
    print("| page | clicks | median | 95th percentile | longest |\n|---|---|---|---|---|")
    for page, times in [*sorted(took.items()), ("all", every)]:
        print(f"| {page} | {len(times)} | {np.median(times):.2f} s | {np.quantile(times, 0.95):.2f} s | {max(times):.2f} s |")
    minutes = [f"{size / 1e6:.0f}" for when, size in sizes if when >= WARM][::60]
    later = [(when / 60, size / 1e6) for when, size in sizes if when >= args.seconds / 2]
    print(f"\nMemory of the server from the first minute on, minute by minute: {', '.join(minutes)} MB; {warm[-1] / 1e6:.0f} MB at the end; "
          f"in the second half it grew by {np.polyfit(*zip(*later, strict=True), 1)[0]:+.1f} MB a minute.")
    print(f"Of it {sum(caches.values()) / 1e6:.0f} MB are in caches, most in {', '.join(f'{n} ({s / 1e6:.1f} MB)' for n, s in list(caches.items())[:3])}.")
    print(f"Errors: {len(errors)}", *sorted(set(errors)), sep="\n")


if __name__ == "__main__":
    main()
