"""Make the buckets given on the command line in the S3 server that AWS_ENDPOINT_URL names; those that exist stay."""

from __future__ import annotations

import sys
import time

import boto3
from botocore.exceptions import BotoCoreError, ClientError


def main(names: list[str]) -> None:
    """Tried for a minute: a fresh SeaweedFS answers before its volumes are ready."""
    client = boto3.client("s3")
    deadline = time.monotonic() + 60
    while True:
        try:
            there = {bucket["Name"] for bucket in client.list_buckets()["Buckets"]}
            for name in names:
                if name not in there:
                    client.create_bucket(Bucket=name)
            return
        except (BotoCoreError, ClientError):
            if time.monotonic() > deadline:
                raise
            time.sleep(1)


if __name__ == "__main__":
    main(sys.argv[1:])
