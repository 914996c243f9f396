"""A real S3 server on this machine, of the package moto: endpoint, keys and buckets, as an environment has them."""

import logging
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
from moto.server import ThreadedMotoServer

KEYS = {"AWS_ACCESS_KEY_ID": "tests", "AWS_SECRET_ACCESS_KEY": "tests", "AWS_DEFAULT_REGION": "us-east-1"}


@contextmanager
def s3_server() -> Iterator[dict[str, str]]:
    """The environment of processes that are to use the server; over at the end."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line per request
    server.start()
    host, port = server.get_host_and_port()
    try:
        yield KEYS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}", "AWS_EC2_METADATA_DISABLED": "true"}
    finally:
        server.stop()


def new_bucket() -> str:
    """URL of a new bucket on the server that this process's environment names."""
    fsspec.filesystem("s3").clear_instance_cache()  # of an earlier server
    bucket = f"bucket-{uuid.uuid4().hex[:8]}"
    fsspec.filesystem("s3", use_listings_cache=False).mkdir(bucket)
    return f"s3://{bucket}"
