"""
How long raters wait until a vote of theirs is acknowledged: a Space on this machine, raters who answer at once.

    python benchmarks/vote_latency.py --raters 20 --votes 500

Each rater loads a question, looks at it for 0.5 to 1.5 s, answers it, and so on, over HTTP as the page does. The time
is that from sending the vote to the acknowledgement, when it is on the disk. With `--hub`, votes go to a Hub on this
machine once a minute besides; take 2,000, or all is over before. Prints one line of JSON, in milliseconds.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import threading
import time
from pathlib import Path

import datasets
import numpy as np
import psutil


ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(ROOT / "src"), str(ROOT / "tests"), str(ROOT / "tests/spaces")]


def make_long_study(folder: Path) -> None:
    """A study with more questions than are asked: pairs of pictures of the size that the base paints."""
    from onereward.preferences import CANDIDATE_FEATURES, StudySettings, make_study
    from onereward.preferences.schema import to_png

    rows = []
    for case in range(60):
        draw = np.random.default_rng(case)
        source, mask = draw.integers(0, 256, (64, 64), dtype=np.uint8), np.zeros((64, 64), np.uint8)
        mask[16:48, 16:48] = 255
        for seed, model in enumerate("abc"):
            painted = np.where(mask > 0, draw.integers(0, 256, (64, 64), dtype=np.uint8), source)
            row = {"image": to_png(source), "mask": to_png(mask), "label_map": None, "target": None, "task": "fill"}
            row |= {"prompt": "noise", "modality": "none", "case_id": f"noise-{case}", "source": "noise"}
            rows.append(row | {"condition": "", "candidate": to_png(painted), "model": model, "seed": seed})
    settings = StudySettings(goal=1000, answers_per_minute=10_000, undo_seconds=1)
    make_study(folder, datasets.Dataset.from_list(rows, features=CANDIDATE_FEATURES), settings)


def summary(seconds: list[float]) -> dict[str, float]:
    p50, p95, p99, longest = (np.quantile(seconds, share) * 1e3 for share in (0.5, 0.95, 0.99, 1.0))
    return {"p50": round(p50, 1), "p95": round(p95, 1), "p99": round(p99, 1), "max": round(longest, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--raters", type=int, default=20)
    parser.add_argument("--votes", type=int, default=500)
    parser.add_argument("--hub", action="store_true", help="send the votes to a Hub on this machine as well")
    options = parser.parse_args()

    scratch, settings, hub = Path(tempfile.mkdtemp(prefix="onereward-latency-")), {"HF_HUB_OFFLINE": "1"}, None
    if options.hub:
        from loopback_hub import LoopbackHub

        hub = LoopbackHub(scratch / "hub").__enter__()
        settings = {**hub.env(scratch / "home"), "HF_HUB_OFFLINE": "0", "ONEREWARD_VOTES_REPO": "org/votes"}
    from rater import Rater
    from running_space import RunningSpace

    make_long_study(scratch / "study")
    space = RunningSpace(scratch / "space", {**settings, "ONEREWARD_STUDY": str(scratch / "study")})
    begun = time.monotonic()
    space.start()
    started = time.monotonic() - begun
    try:
        raters = [Rater(space.url, seed=number) for number in range(options.raters)]
        each, failures = options.votes // options.raters, []

        def work(rater):
            try:
                time.sleep(rater.random.uniform(0, 1.5))  # they do not come at the same moment
                rater.join()
                rater.answer(each, pause=(0.5, 1.5))
            except BaseException as error:
                failures.append(error)
                raise

        threads = [threading.Thread(target=work, args=(rater,)) for rater in raters]
        begun = time.monotonic()
        used = sum(psutil.Process(space.process.pid).cpu_times()[:2])
        psutil.cpu_percent(None)  # from here on
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - begun
        used = sum(psutil.Process(space.process.pid).cpu_times()[:2]) - used
        others = (psutil.cpu_percent(None) / 100 * os.cpu_count() * seconds - used) / seconds
    finally:
        space.end(signal.SIGTERM)
        shutil.rmtree(scratch)
    if failures:
        raise failures[0]
    result = {"raters": options.raters, "votes": sum(len(rater.kept) for rater in raters), "hub": options.hub}
    result |= {"vote_ms": summary([second for rater in raters for second in rater.seconds])}
    result |= {"next_ms": summary([second for rater in raters for second in rater.next_seconds])}
    # cores that the Space used, and all other processes, the raters among them
    result |= {"space_cores": round(used / seconds, 2), "other_cores": round(others, 2)}
    result |= {"start_s": round(started, 1), "seconds": round(seconds, 1), "cores": os.cpu_count()}
    print(json.dumps(result | {"python": platform.python_version()}))


if __name__ == "__main__":
    main()
