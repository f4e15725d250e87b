"""Evaluates the miniature Video-MME slowly, for a test that kills it: arguments ANNOTATIONS MEDIA OUTPUT."""

import sys
import time
from pathlib import Path

from tests.evaluation.miniature import ScriptedEngine, evaluate


class SlowEngine(ScriptedEngine):
    """An engine that takes 0.3 s for each batch."""

    def generate(self, requests):
        time.sleep(0.3)
        return super().generate(requests)


if __name__ == "__main__":
    annotations, media, output = map(Path, sys.argv[1:])
    script = dict.fromkeys(("001-1", "001-2", "002-1", "002-1#2"), "A")
    evaluate("videomme", annotations, media, output, SlowEngine(script), batch_size=1, threads=1)
