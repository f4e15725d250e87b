"""`python -m dynfocus_jax.train` that records the batch of every step, and can kill itself.

Before every step it appends a line {"step", "records", "digest" of the whole batch} to the file RECORDED.
The JSON object KILL gives the moments at which it sends itself SIGKILL, whichever comes first: "seconds" from
the start; "after" seconds after a number of "steps"; "save", the folder of checkpoints, while it saves there.
"""

import hashlib
import itertools
import json
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np

from dynfocus_jax import train
from dynfocus_jax.command import run_command
from dynfocus_jax.json_lines import append_json_line
from dynfocus_jax.training.stage_data import StageData

MOMENTS = json.loads(os.environ.get("KILL", "{}"))


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def kill_after(seconds):
    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()


def kill_inside_a_save(folder, stale):
    while set(Path(folder).glob("*tmp*")) <= stale:
        time.sleep(0.0005)
    kill()


def recorded(data, start, *arguments, _feed=StageData.feed):
    feed, steps = _feed(data, start, *arguments), itertools.count(start)
    take = feed.take

    def recording_take(running):
        batch, note = take(running)
        step = next(steps)
        if step - start == MOMENTS.get("steps"):
            kill_after(MOMENTS["after"])
        digest = hashlib.sha256(b"".join(np.asarray(array).tobytes() for array in batch)).hexdigest()
        entry = {"step": step, "records": batch.index.tolist(), "digest": digest}
        append_json_line(Path(os.environ["RECORDED"]), entry)
        return batch, note

    feed.take = recording_take
    return feed


if __name__ == "__main__":
    if "seconds" in MOMENTS:
        kill_after(MOMENTS["seconds"])
    if "save" in MOMENTS:
        folder = MOMENTS["save"]
        arguments = (folder, set(Path(folder).glob("*tmp*")))
        threading.Thread(target=kill_inside_a_save, args=arguments, daemon=True).start()
    StageData.feed = recorded
    run_command(train.main)
