"""Wait for people while a run is parked: look at their desk now and then, with no actor and no GPU."""

import logging
import time
from datetime import UTC, datetime

from rayrl.config import RunConfig
from rayrl.errors import RayRLError
from rayrl.models.judge_prompt import load_rubric
from rayrl.oracles.build import build_desk
from rayrl.oracles.people.desk import Desk
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
    waiting, desk = Waiting(**noted), build_desk(people, load_rubric(config.rubric))
    said = waiting.num_answered, ""
    while people.deadline is None or datetime.now(UTC) < people.deadline:
        num_answered, fault = _look(desk, waiting, said[0])
        if (num_answered, fault) != said:
            logger.info("%s", fault or f"{num_answered} of {waiting.num_needed} questions that are needed are answered")
            said = num_answered, fault
        if num_answered >= waiting.num_needed:
            return
        time.sleep(people.poll_s)


def _look(desk: Desk, waiting: Waiting, num_before: int) -> tuple[int, str]:
    """Count the answered questions; also what keeps the desk from being read, if anything does."""
    try:
        found = desk.collect(waiting.kind)
    except RayRLError as error:
        return num_before, str(error)
    num_new = sum(len(found.get(key, ())) >= waiting.num_people for key in waiting.keys)
    return waiting.num_answered + num_new, ""
