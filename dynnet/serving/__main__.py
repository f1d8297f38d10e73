"""Serve an exported model over HTTP.

python -m dynnet.serving stages --replicas 2
curl --data-binary @cat.png -H 'Content-Type: image/png' http://127.0.0.1:8000/predict
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dynnet.errors import DynnetError
from dynnet.serving.arguments import count
from dynnet.serving.door import check_free, missing


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until interrupted; the exit status is 2 where something is wrong."""
    parser = argparse.ArgumentParser(
        "python -m dynnet.serving", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="that `dynnet export` wrote")
    parser.add_argument("--server", choices=["ray", "litserve"], default="ray", help="default: %(default)s")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 lets others in (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="default: %(default)s")
    parser.add_argument("--replicas", type=count, default=1, help="processes with the model (default: %(default)s)")
    parser.add_argument("--threads", type=count, default=1, help="of the engine in each (default: %(default)s)")
    parser.add_argument("--batch", type=count, default=8, help="images of a call, at most (default: %(default)s)")
    parser.add_argument("--wait_ms", type=float, default=2.0, help="for others to come (default: %(default)s)")
    parser.add_argument(
        "--queue", type=count, default=100, help="requests that wait; more get 503 (default: %(default)s)"
    )
    given = vars(parser.parse_args(argv))
    server, host, port = given.pop("server"), given.pop("host"), given.pop("port")
    for ends in (signal.SIGINT, signal.SIGTERM):
        signal.signal(ends, signal.default_int_handler)
    try:
        check_free(host, port)
        (_by_ray if server == "ray" else _by_litserve)(given, host, port)
    except DynnetError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130  # as shells do
    return 0


def _by_ray(given: dict[str, object], host: str, port: int) -> None:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nobody is told of it
    try:
        import ray
        from ray import serve

        from dynnet.serving.ray_serve import application
    except ImportError as error:
        raise missing(error) from None
    made = application(**given)  # type: ignore[arg-type]
    if not ray.is_initialized():
        ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        serve.start(http_options={"host": host, "port": port})
        serve.run(made, route_prefix="/predict")
        print(f"http://{host}:{port}/predict answers; Ctrl-C ends it", flush=True)
        while True:
            time.sleep(3600)
    finally:
        serve.shutdown()
        ray.shutdown()


def _by_litserve(given: dict[str, object], host: str, port: int) -> None:
    try:
        from dynnet.serving.lit_serve import server
    except ImportError as error:
        raise missing(error) from None
    made = server(**given)  # type: ignore[arg-type]
    print(f"http://{host}:{port}/predict answers; Ctrl-C ends it", flush=True)
    made.run(host=host, port=port, generate_client_file=False, log_level="warning")


if __name__ == "__main__":
    sys.exit(main())
