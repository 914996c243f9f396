"""Oracles of a study's tests: longer responses are better."""

import os
import time


def judge(prompt, response):
    return min(5.0, len(response) / 12), "length"


def slow_judge(prompt, response):
    """Write down each call, and take as long as a judge may."""
    with open(os.environ["STUDY_CALLS"], "a") as calls:
        calls.write(f"{prompt} {response}\n")
    time.sleep(0.05)
    return judge(prompt, response)


def broken_judge(prompt, response):
    raise ValueError("no credit")
