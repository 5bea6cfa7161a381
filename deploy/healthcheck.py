"""Exit code 0 if the server of this container answers that it is ready, else 1 and what it said.

A container's HEALTHCHECK; http.client asks no proxy that the environment may name.
"""

import os
import sys
from http.client import HTTPConnection, HTTPException


def main() -> int:
    connection = HTTPConnection("127.0.0.1", int(os.environ["LLAMA_ADAPTER_PORT"]), timeout=3)
    try:
        connection.request("GET", "/health/ready")
        response = connection.getresponse()
        answer = response.read(1000).decode(errors="replace")
    except (OSError, HTTPException) as error:
        print(f"no answer: {error}")
        return 1
    print(response.status, answer)
    return 0 if response.status == 200 else 1


if __name__ == "__main__":
    sys.exit(main())
