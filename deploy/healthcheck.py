"""Exit code 0 if the thinwire process in this container answers /healthz, or the path given: for HEALTHCHECK.

It asks for HTTP on 127.0.0.1:9100: start the process with `--http 127.0.0.1:9100`, or 0.0.0.0:9100 if
Prometheus asks it, too. Plain http.client, so that a proxy for downloads is not asked for it.
"""

import http.client
import sys

path = sys.argv[1] if len(sys.argv) > 1 else "/healthz"
connection = http.client.HTTPConnection("127.0.0.1", 9100, timeout=4)
try:
    connection.request("GET", path)
    answer = connection.getresponse()
except (OSError, http.client.HTTPException) as e:
    sys.exit(f"http://127.0.0.1:9100{path}: {e}")
if answer.status != 200:
    sys.exit(
        f"http://127.0.0.1:9100{path}: {answer.status} {answer.read(200).decode(errors='replace').strip()}"
    )
