"""Text of a page, as a reader sees it."""

from html.parser import HTMLParser


class Page(HTMLParser):
    """Text, tags and images of a page."""

    def __init__(self, html):
        super().__init__()
        self.tags, self.addresses, self.words, self.figures = set(), [], [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]
        self.figures += [value for name, value in attrs if (tag, name) == ("img", "alt")]

    def handle_data(self, data):
        self.words.append(data)
