"""Wait for people while a run is parked: look at their desk now and then, with no actor and no GPU."""

import logging
import time
from datetime import UTC, datetime

from rayrl.config import RunConfig
from rayrl.errors import RayRLError
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.build import build_desk
from rayrl.oracles.people.waiting import Waiting
from rayrl.runs import storage
from rayrl.runs.run import noted_waiting

logger = logging.getLogger(__name__)


def wait_for_people(config: RunConfig) -> None:
    """Return once enough is answered of what the parked run waits for, or its deadline is over.

    A desk that cannot be read, since somebody is in the middle of a correction, or a server is down, is told once, and
    looked at again. This is the one wait without an end of its own: people may take weeks, and `deadline` is theirs.
    """
    people = config.oracle.people_asked()
    noted = noted_waiting(storage.absolute(config.run_dir))
    assert people is not None and noted is not None, "a run is parked for people alone"
    setting = "oracle" if people is config.oracle else "oracle.people"
    waiting, desk = Waiting(**noted), build_desk(people, load_rubric(config.rubric), setting)
    said = f"{waiting.num_answered} of {waiting.num_needed} questions that are needed are answered"
    while people.deadline is None or datetime.now(UTC) < people.deadline:
        try:
            # All of it: the run that goes on reads everything.
            desk.check()
            found = desk.collect(waiting.kind)
        except RayRLError as error:
            said = _told(str(error), said)
        else:
            if any(key not in found for key in waiting.keys):
                return  # a file was put back, or a task removed: the run puts those questions there again
            num_new = sum(len(found[key]) >= waiting.num_people for key in waiting.keys)
            num_answered = waiting.num_answered + num_new
            said = _told(f"{num_answered} of {waiting.num_needed} questions that are needed are answered", said)
            if num_answered >= waiting.num_needed:
                return
        time.sleep(people.poll_s)


def _told(now: str, before: str) -> str:
    """Log what has changed, and return it."""
    if now != before:
        logger.info("%s", now)
    return now
