"""Oracle of a study's tests: longer responses are better."""


def judge(prompt, response):
    return min(5.0, len(response) / 12), "length"
