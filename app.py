"""Spec Decode in the browser: `python app.py`, also the entry point of the Hugging Face Space.

Parses flags, serves the page at once and loads the model behind it. Exit code 1 when it cannot serve, 2 for bad flags.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from spec_decode.ui import Engine, build, launch_options


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; a bad flag exits with code 2."""
    parser = argparse.ArgumentParser(prog="app.py", description="Watch, measure and trust speculative decoding.")
    parser.add_argument("--target", default="embedded", help="target model: embedded, a Hub id or a directory")
    parser.add_argument("--drafter", help="drafter: lookup, a Hub id or a directory (default: the pair's own)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: %(default)s)")
    parser.add_argument("--dtype", default="auto", help="number format of the weights (default: %(default)s)")
    parser.add_argument(
        "--host", default=os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1"), help="address to listen on"
    )
    parser.add_argument("--port", type=_port, help="port to listen on (default: GRADIO_SERVER_PORT, else from 7860 up)")
    parser.add_argument("--share", action="store_true", help="open a public gradio.live link")
    parser.add_argument("--max-queue", type=int, default=32, help="visitors that may wait (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Serve until interrupted; returns the exit code."""
    flags = parse(argv)

    def load(progress: Any) -> Any:
        from spec_decode.models import load_pair

        return load_pair(flags.target, flags.drafter, flags.device, flags.dtype, progress)

    def race(*args: Any, **options: Any) -> Any:
        from spec_decode.race import Race

        return Race(*args, **options)

    engine = Engine(load, race, drafters=("lookup",), own=flags.drafter)
    page = build(engine, flags.max_queue)
    try:
        _, url, _ = page.launch(
            server_name=flags.host,
            server_port=flags.port,
            share=flags.share or None,
            prevent_thread_lock=True,
            **launch_options(),
        )
    except OSError as error:
        taken = "Cannot find empty port" in str(error)
        port = flags.port or os.environ.get("GRADIO_SERVER_PORT", "7860 to 7959")
        why = f"port {port} is taken; choose another with --port" if taken else str(error)
        print(f"app.py: cannot serve on {flags.host}: {why}.", file=sys.stderr)
        return 1
    print(f"Spec Decode is at {url}", flush=True)
    engine.start()
    page.block_thread()
    return 0


def _port(text: str) -> int:
    if not text.isdecimal() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"a port is a number from 1 to 65535, not {text!r}")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
